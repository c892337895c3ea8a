"""Denoisers by name, and what they are told of a scan and of the tumour that it is to have."""

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tumorjax import backend, models
from tumorjax.errors import UserError
from tumorjax.settings import plain
from tumorjax.synthesis.autoencoder import FACTOR
from tumorjax.synthesis.even_convolution import fold
from tumorjax.training.checkpoints import compute_dtype

NETWORKS = ("latent_unet", "video_unet")
# What a hole in a scan is filled with: the middle of the window, as in DiffTumor. With the usual
# window it is 37.5 HU, not far from soft tissue, which an autoencoder knows.
HOLE = 0.0


def functional(
    settings: Mapping[str, Any], latent_channels: int, organs: int, seed: int = 0
) -> tuple[Callable[[dict[str, Array], Any], Array], dict[str, Array]]:
    """Builds a denoiser, as a function and its initial parameters (see `models.functional`).

    Args:
        settings: name (one of `NETWORKS`), preset and what else the network's `create` takes.
        latent_channels: of the autoencoder.
        organs: number of host organs.
        seed: of the weights.

    Raises:
        UserError: the name, the preset or a setting is unknown.
    """
    values = {key: value for key, value in settings.items() if value is not None}
    name = values.pop("name")
    if name not in NETWORKS:
        raise UserError(f"model.name is {name!r}. Expected one of {', '.join(NETWORKS)}")
    module = importlib.import_module(f"tumorjax.synthesis.{name}")
    preset = values.pop("preset", "")
    if preset and preset not in module.PRESETS:
        raise UserError(
            f"model.preset is {preset!r}. {name} has {', '.join(module.PRESETS)}; or leave it empty"
        )
    unknown = sorted(set(values) - set(module.SETTINGS))
    if unknown:
        raise UserError(
            f"model {name} has no setting {', '.join(unknown)}. Expected some of"
            f" {', '.join(module.SETTINGS)}"
        )
    values = module.PRESETS.get(preset, {}) | values
    values["dtype"] = jnp.dtype(compute_dtype(values.get("dtype", "auto")))
    return models.functional(module.create(latent_channels, organs, seed=seed, **values))


def abstract(
    settings: Mapping[str, Any], latent_channels: int, organs: int
) -> tuple[Callable[[dict[str, Array], Any], Array], dict[str, jax.ShapeDtypeStruct]]:
    """Returns a denoiser's function and the shapes of its parameters; nothing is drawn.

    Equal settings give the same function, so that it is compiled once.
    """
    return _abstract(json.dumps(plain(settings)), latent_channels, organs)


@backend.cached(8)
def _abstract(text: str, latent_channels: int, organs: int):
    functions = []

    def build() -> dict[str, Array]:
        apply, parameters = functional(json.loads(text), latent_channels, organs)
        functions.append(apply)
        return parameters

    parameters = jax.eval_shape(build)
    return functions[0], parameters


def with_hole(
    image: Float[Array, "b x y z 1"], mask: Bool[Array, "b x y z"], margin: int
) -> Float[Array, "b x y z 1"]:
    """Takes a tumour out of a scan in [-1, 1].

    Args:
        image: the scan.
        mask: the tumour.
        margin: voxels about it that go as well. A real tumour shows in the voxels that it shares
            with its surroundings; a healthy scan has no such hint where a tumour is to be.
    """
    return jnp.where(dilate(mask, margin)[..., None], HOLE, image)


def touched(mask: Bool[Array, "b X Y Z"], margin: int) -> Bool[Array, "b x y z"]:
    """Returns the latent voxels that a tumour may change.

    They are those of its hole and their neighbours, since each latent voxel sees beyond its own
    voxels of the scan.
    """
    hole = dilate(mask, margin)
    return dilate(fold(hole[..., None], FACTOR).any(axis=-1), 1)


def dilate(mask: Bool[Array, "b x y z"], voxels: int) -> Bool[Array, "b x y z"]:
    """Grows a mask by so many voxels along each axis, corners included."""
    for axis in (1, 2, 3):
        size = mask.shape[axis]
        padding = [(0, 0)] * mask.ndim
        padding[axis] = (voxels, voxels)
        padded = jnp.pad(mask, padding)
        parts = [
            jax.lax.slice_in_dim(padded, shift, shift + size, axis=axis)
            for shift in range(2 * voxels + 1)
        ]
        mask = jnp.stack(parts).any(axis=0)
    return mask
