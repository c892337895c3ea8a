"""A perceptual loss from a segmentation network that was trained on CT.

LPIPS compares images by features of VGG, learned on photographs, whose weights have to be had from
elsewhere. A segmentation network's encoder knows what tells one tissue from another in CT, in 3D.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
CVPR 2018, without its learned weights of channels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.settings import plain
from tumorjax.training import checkpoints

_EPSILON = 1e-6

Features = Callable[[dict[str, Array], Array], list[Array]]


class EncoderFeatures(nnx.Module):
    """The outputs of all stages of a U-Net's encoder, finest first."""

    def __init__(self, network: Any):
        self.stem = getattr(network, "stem", None)
        self.encoder = network.encoder

    def __call__(self, x: Float[Array, "b x y z 1"]) -> list[Float[Array, "b _x _y _z _c"]]:
        if self.stem is not None:
            x = self.stem(x)
        found = []
        for stage in self.encoder:
            x = stage(x)
            found.append(x)
        return found


def load(folder: str | Path, preparation: ConfigDict) -> tuple[Features, dict[str, Array]]:
    """Loads the encoder of a trained segmentation network.

    Args:
        folder: of a cell or of a segmentation job.
        preparation: spacing and window of the scans to compare; the network's must be the same.

    Returns:
        features(parameters, x [b, x, y, z, 1] in [0, 1]) -> activations of each stage, and the
        parameters. Each axis of x must divide by the network's strides.

    Raises:
        UserError: there is no such network, it is for another grid, or it has no encoder of stages.
    """
    apply, config = checkpoints.load_model(folder)
    for name in ("spacing", "window"):
        wanted, found = list(preparation[name]), list(config.preparation[name])
        if [float(v) for v in wanted] != [float(v) for v in found]:
            raise UserError(
                f"{folder} (training.perceptual): trained with {name} {found}, and"
                f" preparation.{name} is {wanted}. Give a network of the same"
            )
    settings = plain(config)["training"]
    network = checkpoints.build_model(
        config, deep_supervision=bool(settings.get("deep_supervision", False))
    )
    if not isinstance(getattr(network, "encoder", None), nnx.List):
        raise UserError(
            f"{folder} (training.perceptual): {config.model.name} has no encoder of stages. Give"
            " one of resenc_unet, plain_unet or stu_net"
        )
    (trained,) = apply.args
    features, first = models.functional(EncoderFeatures(network))
    return features, {name: trained[name] for name in first}


def distance(
    features: Features,
    parameters: dict[str, Array],
    truth: Float[Array, "b x y z 1"],
    other: Float[Array, "b x y z 1"],
) -> Float[Array, ""]:
    """Returns the mean over stages of the squared distance between features of unit length.

    Args:
        features: from `load`, with its parameters.
        parameters: those.
        truth: images in [-1, 1].
        other: their reconstructions.
    """

    def unit(x: Array) -> list[Array]:
        found = features(parameters, jnp.clip((x + 1) / 2, 0, 1))
        return [
            y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + _EPSILON)
            for y in (level.astype(jnp.float32) for level in found)
        ]

    pairs = list(zip(unit(jax.lax.stop_gradient(truth)), unit(other), strict=True))
    terms = [jnp.square(a - b).sum(-1).mean() for a, b in pairs]
    return sum(terms[1:], start=terms[0]) / len(terms)
