"""A diffusion model whose tumours are known in advance, in the place of a trained one."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from tumorjax.synthesis.trained_diffusion import TrainedDiffusion

WINDOW = (-175.0, 250.0)


def known_tumor(level, texture, key, image, mask, organ, radius_mm):
    """Draws `level` of the organ into the mask, with noise; the scan without it is smoothed."""
    kernel = jnp.ones((3, 3, 3, 1, 1)) / 27
    padded = jnp.pad(image, ((0, 0), *[(1, 1)] * 3, (0, 0)), mode="edge")
    without = jax.lax.conv_general_dilated(
        padded, kernel, (1, 1, 1), "VALID", dimension_numbers=("NXYZC", "XYZIO", "NXYZC")
    )
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(image.shape[0]))
    noise = jax.vmap(lambda k: jax.random.normal(k, image.shape[1:]))(keys)
    # Larger tumours are darker, so that the radius given is seen in what comes out.
    drawn = level[organ][:, None, None, None, None] - 0.001 * radius_mm[:, None, None, None, None]
    drawn = drawn + texture * noise
    return jnp.where(mask[..., None] > 0, drawn, without), without


@pytest.fixture(scope="session")
def make_trained():
    """(crop, spacing, window, organs, level, texture) -> a model; levels are in [-1, 1]."""

    def make(
        crop=(32, 32, 32),
        spacing=(3.0, 3.0, 3.0),
        window=WINDOW,
        organs=("liver", "pancreas", "kidney"),
        level=(-0.1, 0.0, 0.1),
        texture=0.02,
    ):
        generate = jax.tree_util.Partial(known_tumor, jnp.asarray(level), jnp.asarray(texture))
        config = ConfigDict({"preparation": {"order": 1}})
        return TrainedDiffusion(generate, organs, spacing, window, crop, {}, config)

    return make
