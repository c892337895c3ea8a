"""A trained autoencoder for use: from images to latents of about unit variance, and back."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from tumorjax.errors import UserError
from tumorjax.synthesis import autoencoder
from tumorjax.synthesis.autoencoder_training import build
from tumorjax.training import checkpoints


class TrainedAutoencoder(NamedTuple):
    """An autoencoder with its weights.

    Attributes:
        encode: x [b, x, y, z, 1] in [-1, 1] -> z [b, x/4, y/4, z/4, c], the latents' means, scaled
            to about unit variance.
        decode: z -> x in [-1, 1]. Both are pytrees that hold the weights, so that a jitted function
            that takes them is compiled once for all of one architecture.
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
    folder = Path(folder)
    values = {
        name: _read_json(folder, f"{name}.json") for name in ("config", "latent", "trained_on")
    }
    config = ConfigDict(values["config"])
    model = build(config)
    parameters = restore_parameters(folder, model.parameters)
    statistics = {
        "shift": jnp.asarray(values["latent"]["shift"], jnp.float32),
        "scale": jnp.asarray(values["latent"]["scale"], jnp.float32),
    }
    given = {"parameters": parameters, "latent": statistics}

    def encode(given: dict[str, Any], x: Float[Array, "b x y z 1"]) -> Float[Array, "b x y z c"]:
        mean, _ = autoencoder.split_latent(model.encode(given["parameters"], x))
        return (mean - given["latent"]["shift"]) / given["latent"]["scale"]

    def decode(given: dict[str, Any], z: Float[Array, "b x y z c"]) -> Float[Array, "b x y z 1"]:
        z = z * given["latent"]["scale"] + given["latent"]["shift"]
        return jnp.clip(model.decode(given["parameters"], z), -1, 1)

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


def restore_parameters(folder: Path, like: dict[str, Array]) -> dict[str, Array]:
    """Returns the parameters of the newest checkpoint in a training's folder.

    Args:
        folder: of the training.
        like: parameters of the same shapes.

    Raises:
        UserError: there is no checkpoint, or it is of another network.
    """
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: no checkpoints. Was its training finished?")
    with checkpoints.open_manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{folder}: no checkpoint. Train first")
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    found = restored["state"]["parameters"]
    for name, value in like.items():
        if name not in found or found[name].shape != value.shape:
            raise UserError(
                f"{folder}: its checkpoint is of another network ({name} differs). Use the"
                " config.json that it was trained with"
            )
    return {name: jnp.asarray(found[name]) for name in like}


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise UserError(
            f'{folder}: no {name}. Give the workdir of a finished job "autoencoder"'
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / name}: not readable ({error})") from error
