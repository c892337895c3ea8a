"""A trained autoencoder for use: from images to latents of a scale fit for diffusion, and back."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from tumorjax import backend
from tumorjax.errors import UserError
from tumorjax.files import location
from tumorjax.models import convolution
from tumorjax.synthesis import autoencoder, vector_quantization
from tumorjax.synthesis.autoencoder import Autoencoder
from tumorjax.training import checkpoints

_LEAST_SCALE = 1e-6


class TrainedAutoencoder(NamedTuple):
    """An autoencoder with its weights.

    Attributes:
        encode: x [b, x, y, z, 1] in [-1, 1] -> z [b, x/4, y/4, z/4, c]. For kind "kl" the latents'
            means, scaled to about unit variance; for "vq" the latents before they are replaced by
            codes, scaled so that the codes lie in [-1, 1].
        decode: z -> x in [-1, 1]; for "vq" by way of the nearest codes. Both are pytrees that hold
            the weights, so that a jitted function that takes them is compiled once for all of one
            architecture.
        latent_channels: c.
        factor: 4, how much coarser the latents' grid is.
        margin: latents about a part that make its decoding exact; None where nothing does.
        spacing: of the scans, mm (x, y, z).
        window: HU of -1 and 1.
        config: of the training.
        trained_on: which patients it has seen, see leakage.py.
    """

    encode: jax.tree_util.Partial
    decode: jax.tree_util.Partial
    latent_channels: int
    factor: int
    margin: int | None
    spacing: tuple[float, ...]
    window: tuple[float, ...]
    config: ConfigDict
    trained_on: dict[str, Any]


def load(folder: str | Path) -> TrainedAutoencoder:
    """Loads what the job "autoencoder" left in its workdir.

    Raises:
        UserError: something is missing there, or does not belong together.
    """
    folder = location(folder)
    values = {
        name: _read_json(folder, f"{name}.json") for name in ("config", "latent", "trained_on")
    }
    config = ConfigDict(values["config"])
    model, encode, decode = _functions(autoencoder.settings_of(config))
    given = _restore(folder, model)
    given["latent"] = {
        name: jnp.asarray(values["latent"][name], jnp.float32) for name in ("shift", "scale")
    }
    return TrainedAutoencoder(
        jax.tree_util.Partial(encode, given),
        jax.tree_util.Partial(decode, given),
        model.settings.latent_channels,
        autoencoder.FACTOR,
        autoencoder.decoder_margin(model.settings),
        tuple(config.preparation.spacing),
        tuple(config.preparation.window),
        config,
        values["trained_on"],
    )


def encode_latents(
    model: Autoencoder, given: Mapping[str, Any], x: Float[Array, "b x y z 1"]
) -> Float[Array, "b x2 y2 z2 c"]:
    """Returns the scaled latents of images, see `TrainedAutoencoder.encode`.

    Args:
        model: the autoencoder's functions.
        given: parameters; latent, of `latent_scale`; codebook for kind "vq".
        x: in [-1, 1].
    """
    return (_encode(model, given, x) - given["latent"]["shift"]) / given["latent"]["scale"]


def decode_latents(
    model: Autoencoder, given: Mapping[str, Any], z: Float[Array, "b x y z c"]
) -> Float[Array, "b x2 y2 z2 1"]:
    """Undoes `encode_latents`; the images are clipped to [-1, 1]."""
    z = z * given["latent"]["scale"] + given["latent"]["shift"]
    if model.settings.kind == "vq":
        embeddings = given["codebook"]["embeddings"]
        z = embeddings[vector_quantization.nearest(embeddings, z)]
    return jnp.clip(model.decode(given["parameters"], z), -1, 1)


def latent_scale(
    model: Autoencoder, state: Mapping[str, Any], images: Iterable[Float[np.ndarray, "b x y z 1"]]
) -> dict[str, list[float]]:
    """Returns what is subtracted from latents, and then divides them, for diffusion.

    Args:
        model: the autoencoder's functions.
        state: trained parameters; codebook for kind "vq".
        images: in [-1, 1].

    Returns:
        shift and scale, a number for each channel: for "kl" mean and standard deviation over the
        images; for "vq" the middle and half the range of all numbers in the codebook, as in
        DiffTumor.
    """
    if model.settings.kind == "vq":
        low, high = vector_quantization.latent_range(state["codebook"])
        channels = model.settings.latent_channels
        scale = max((high - low) / 2, _LEAST_SCALE)
        return {"shift": [(low + high) / 2] * channels, "scale": [scale] * channels}
    encode = jax.jit(
        lambda state, x: _encode(model, state, x), compiler_options=convolution.compiler_options()
    )
    given = {"parameters": state["parameters"]}
    latents = [np.asarray(encode(given, x), np.float64) for x in images]
    values = np.concatenate([z.reshape(-1, z.shape[-1]) for z in latents])
    scale = np.maximum(values.std(axis=0), _LEAST_SCALE)
    return {"shift": values.mean(axis=0).tolist(), "scale": scale.tolist()}


@backend.cached(8)
def _functions(settings: autoencoder.Settings) -> tuple[Autoencoder, Callable, Callable]:
    """Returns an architecture's functions: the same ones each time, so compiled once."""
    model = autoencoder.create(**settings._asdict())
    return (
        model,
        functools.partial(encode_latents, model),
        functools.partial(decode_latents, model),
    )


def _encode(model: Autoencoder, given: Mapping[str, Any], x: Array) -> Array:
    encoded = model.encode(given["parameters"], x)
    return encoded if model.settings.kind == "vq" else autoencoder.split_latent(encoded)[0]


def _restore(folder: Path, model: Autoencoder) -> dict[str, Any]:
    """Returns parameters and codebook of the newest checkpoint in a training's folder."""
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: no checkpoints. Was its training finished?")
    with checkpoints.open_manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{folder}: no checkpoint. Train first")
        state = checkpoints.read(manager, step)
    found = state["parameters"]
    for name, value in model.parameters.items():
        if name not in found or found[name].shape != value.shape:
            raise UserError(
                f"{folder}: its checkpoint is of another network than its config.json ({name}"
                " differs). Give the folder as the job left it"
            )
    given = {"parameters": {name: jnp.asarray(found[name]) for name in model.parameters}}
    if model.settings.kind == "vq":
        given["codebook"] = {"embeddings": jnp.asarray(state["codebook"]["embeddings"])}
    return given


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise UserError(
            f'{folder}: no {name}. Give the workdir of a finished job "autoencoder"'
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / name}: not readable ({error})") from error
