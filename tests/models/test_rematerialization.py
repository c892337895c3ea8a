"""Blocks that are computed again in the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax import models

NETWORKS = {
    "resenc_unet": {"widths": (8, 8), "blocks": (4, 4)},
    "plain_unet": {"widths": (8, 8), "blocks": (6, 6), "decoder_blocks": 6},
}


def _compiled(name, x, remat):
    network = models.create(name, classes=2, remat=remat, **NETWORKS[name])
    apply, parameters = models.functional(network)

    def loss(values):
        return jnp.square(apply(values, x)).mean()

    return jax.jit(jax.value_and_grad(loss)).lower(parameters).compile(), parameters


@pytest.mark.parametrize("name", NETWORKS)
def test_less_is_kept_and_the_gradient_stays(rng, name):
    x = jnp.asarray(rng.standard_normal((1, 32, 32, 32, 1)), jnp.float32)
    memory, results = [], []
    for remat in (False, True):
        compiled, parameters = _compiled(name, x, remat)
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        results.append(compiled(parameters))
    assert memory[1] < 0.8 * memory[0]
    (value, gradient), (again, gradient_again) = results
    np.testing.assert_allclose(again, value, rtol=1e-5)
    for key, expected in gradient.items():
        scale = max(1e-3, float(jnp.abs(expected).max()))
        np.testing.assert_allclose(gradient_again[key], expected, atol=1e-3 * scale, err_msg=key)
