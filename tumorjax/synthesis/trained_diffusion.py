"""Trained tumour synthesizers for use: a diffusion model with its autoencoder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from tumorjax import backend
from tumorjax.errors import UserError
from tumorjax.files import location
from tumorjax.synthesis import denoisers, diffusion, trained_autoencoder
from tumorjax.synthesis.latent_unet import Inputs
from tumorjax.training import checkpoints


class TrainedDiffusion(NamedTuple):
    """A synthesizer of tumours.

    Attributes:
        generate: (key, image [b, x, y, z, 1] in [-1, 1], mask [b, x, y, z], organ int32 [b],
            radius_mm float32 [b]) -> (with the tumour, without it), both decoded, [b, x, y, z, 1]
            in [-1, 1]. Their difference is what the tumour changes. Organ is a number in `organs`;
            each row has random numbers of its own. It is a pytree that holds the weights.
        organs: host organs that it knows.
        spacing: (x, y, z) in mm, of the scans that it was trained on.
        window: HU that -1 and 1 stand for.
        crop: voxels (x, y, z) that it was trained on.
        trained_on: scans that any part of it has seen, see `leakage`.
        config: of the training.
    """

    generate: jax.tree_util.Partial
    organs: tuple[str, ...]
    spacing: tuple[float, float, float]
    window: tuple[float, float]
    crop: tuple[int, int, int]
    trained_on: dict[str, Any]
    config: ConfigDict


class _Sampling(NamedTuple):
    """How tumours are drawn: the settings of the config's section diffusion, and the latents'."""

    objective: str
    timesteps: int
    sampler: str
    steps: int
    guidance: float
    clip: float | None
    hole_margin: int
    latent_channels: int


def load(
    folder: str | Path,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
) -> TrainedDiffusion:
    """Loads what the job "diffusion" trained.

    Args:
        folder: its workdir.
        sampler: one of `diffusion.SAMPLERS`; None for the training's own, as with those below.
        steps: of the sampler.
        guidance: strength of the classifier-free guidance on organ and size; 1 for none.

    Raises:
        UserError: the folder has no trained synthesizer, or the settings do not suit it.
    """
    folder = location(folder)
    try:
        config = ConfigDict(json.loads((folder / "config.json").read_text()))
        trained_on = json.loads((folder / "trained_on.json").read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: no {Path(error.filename).name}. Give the workdir of a diffusion job"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: its records cannot be read ({error})") from error
    if config.get("job") != "diffusion":
        raise UserError(f"{folder}: no workdir of a diffusion job. Give that one")
    if not checkpoints.has_any(folder):
        raise UserError(f"{folder}: no checkpoint. Was its training finished?")
    autoencoder = trained_autoencoder.load(folder / "autoencoder")
    apply, parameters = denoisers.abstract(
        config.model, autoencoder.latent_channels, len(config.organs)
    )
    with checkpoints.open_manager(folder) as manager:
        restored = checkpoints.read(manager, manager.latest_step())
    if set(restored["ema"]) != set(parameters):
        raise UserError(f"{folder}: its checkpoint is of another network than its config")
    weights = {name: jnp.asarray(restored["ema"][name]) for name in parameters}
    generate = make_generate(
        config.diffusion,
        jax.tree_util.Partial(apply, weights),
        autoencoder.encode,
        autoencoder.decode,
        autoencoder.latent_channels,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
    )
    x, y, z = (int(size) for size in config.training.crop)
    across, along, through = autoencoder.spacing
    low, high = autoencoder.window
    return TrainedDiffusion(
        generate,
        tuple(config.organs),
        (across, along, through),
        (low, high),
        (x, y, z),
        trained_on,
        config,
    )


def make_generate(
    settings: ConfigDict,
    denoiser: jax.tree_util.Partial,
    encode: jax.tree_util.Partial,
    decode: jax.tree_util.Partial,
    latent_channels: int,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
) -> jax.tree_util.Partial:
    """Returns `TrainedDiffusion.generate` of the given parts.

    Args:
        settings: the config's section diffusion.
        denoiser: (Inputs) -> prediction.
        encode: of the autoencoder.
        decode: of the autoencoder.
        latent_channels: of the autoencoder.
        sampler: in place of that of the settings, if not None; so are steps and guidance.
        steps: of the sampler.
        guidance: see `load`.

    Raises:
        UserError: sampler or steps do not suit the objective.
    """
    sampling = _Sampling(
        settings.objective,
        int(settings.timesteps),
        settings.sampler if sampler is None else sampler,
        int(settings.steps if steps is None else steps),
        float(settings.guidance if guidance is None else guidance),
        settings.get("clip"),
        int(settings.hole_margin),
        latent_channels,
    )
    diffusion.check_settings(
        sampling.objective, sampling.sampler, sampling.steps, sampling.timesteps
    )
    return jax.tree_util.Partial(_generator(sampling), denoiser, encode, decode)


@backend.cached(32)
def _generator(sampling: _Sampling) -> Callable[..., tuple[Array, Array]]:
    """Returns the function for some settings: the same one each time, so compiled once."""

    def generate(
        denoiser: jax.tree_util.Partial,
        encode: jax.tree_util.Partial,
        decode: jax.tree_util.Partial,
        key: PRNGKeyArray,
        image: Float[Array, "b x y z 1"],
        mask: Bool[Array, "b x y z"],
        organ: Int[Array, " b"],
        radius_mm: Float[Array, " b"],
    ) -> tuple[Float[Array, "b x y z 1"], Float[Array, "b x y z 1"]]:
        rows = image.shape[0]
        inside = jnp.asarray(mask) > 0
        both = jnp.concatenate([image, denoisers.with_hole(image, inside, sampling.hole_margin)])
        healthy, holed = jnp.split(encode(both), 2)

        def denoise(noisy: Array, time: Array) -> Array:
            inputs = Inputs(
                noisy,
                diffusion.network_time(sampling.objective, time),
                holed,
                inside.astype(jnp.float32),
                jnp.asarray(organ, jnp.int32),
                jnp.asarray(radius_mm, jnp.float32),
                jnp.ones(rows, bool),
            )
            if sampling.guidance == 1:
                return denoiser(inputs)
            twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), inputs)
            twice = twice._replace(known=jnp.arange(2 * rows) < rows)
            told, untold = jnp.split(denoiser(twice), 2)
            return diffusion.guided(told, untold, sampling.guidance)

        drawn = diffusion.sample(
            key,
            denoise,
            (*healthy.shape[:4], sampling.latent_channels),
            objective=sampling.objective,
            sampler=sampling.sampler,
            steps=sampling.steps,
            timesteps=sampling.timesteps,
            clip=sampling.clip,
        )
        # Elsewhere the scan's own latents are known, and better than any prediction of them.
        kept = denoisers.touched(inside, sampling.hole_margin)[..., None]
        decoded = decode(jnp.concatenate([jnp.where(kept, drawn, healthy), healthy]))
        with_tumor, without = jnp.split(decoded, 2)
        return with_tumor, without

    return generate
