"""Synthesizers with random weights, and what benchmarks.synthesis gives them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SIZE, RADIUS_MM, SPACING = 96, 10.0, (1.0, 1.0, 1.0)
WINDOW = (-175.0, 250.0)
ORGANS = ("liver", "pancreas", "kidney")
CODES = 16_384

# Preset of the autoencoder, variant of configs/diffusion.py, and what differs from its model.
NETWORKS: dict[str, tuple[str, str, dict[str, str]]] = {
    "tumorjax": ("small", "virtual", {}),
    "tumorjax-large": ("small", "virtual", {"preset": "large"}),
    "tumorjax-difftumor": ("difftumor", "paper", {}),
}


class Row(NamedTuple):
    """What a row measures.

    Attributes:
        run: does it once and waits for the result.
        parameters: of all its networks.
        stages: name -> (how often it is part of a run, function that does it once).
    """

    run: Callable[[], Any]
    parameters: int
    stages: dict[str, tuple[int, Callable[[], Any]]]


def scene(size: int = SIZE, radius: float = RADIUS_MM) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a noisy crop [x, y, z] in HU, the mask of its organ and that of a tumour to be."""
    noise = np.random.default_rng(0).standard_normal((size,) * 3, np.float32)
    distance = np.linalg.norm(np.indices((size,) * 3) - size / 2, axis=0)
    organ = distance < 4 * radius
    return np.where(organ, 110, -100).astype(np.float32) + 20 * noise, organ, distance <= radius


def untrained_autoencoder(preset: str):
    """Returns encode and decode of an autoencoder with random weights, as if it was loaded."""
    import jax
    from jax.tree_util import Partial

    from tumorjax.synthesis import autoencoder, trained_autoencoder, vector_quantization

    model = autoencoder.create(preset=preset)
    channels = model.settings.latent_channels
    given: dict[str, Any] = {"parameters": model.parameters}
    if model.settings.kind == "vq":
        codebook = vector_quantization.empty(CODES, channels)
        codebook["embeddings"] = jax.random.normal(jax.random.key(0), (CODES, channels))
        given["codebook"] = codebook
    images = (
        2 * np.random.default_rng(seed).random((1, 16, 16, 16, 1), np.float32) - 1
        for seed in range(2)
    )
    scale = trained_autoencoder.latent_scale(model, given, images)
    given["latent"] = {name: np.asarray(value, np.float32) for name, value in scale.items()}
    encode = Partial(functools.partial(trained_autoencoder.encode_latents, model), given)
    decode = Partial(functools.partial(trained_autoencoder.decode_latents, model), given)
    return encode, decode, channels


def untrained_diffusion(autoencoder: str, variant: str, model: dict[str, str], size: int = SIZE):
    """Returns a synthesizer with random weights, as trained_diffusion.load would."""
    from jax.tree_util import Partial

    from configs import diffusion
    from tumorjax.synthesis import denoisers, trained_diffusion

    config = diffusion.get_config(variant)
    config.model.update(model)
    config.preparation.spacing = SPACING
    encode, decode, channels = untrained_autoencoder(autoencoder)
    apply, weights = denoisers.functional(config.model, channels, len(ORGANS))
    generate = trained_diffusion.make_generate(
        config.diffusion, Partial(apply, weights), encode, decode, channels
    )
    return trained_diffusion.TrainedDiffusion(
        generate, ORGANS, SPACING, WINDOW, (size,) * 3, {}, config
    )
