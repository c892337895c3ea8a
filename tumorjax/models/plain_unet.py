"""nnU-Net's plain U-Net: convolutions, instance norm and leaky ReLU, nothing else.

Source: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical
image segmentation", Nature Methods 2021; the reference implementation is PlainConvUNet of the
package dynamic-network-architectures.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.models.unet import (
    LEAVES,
    check_divides,
    conv_stage,
    make_decoder,
    plan,
    run_unet,
    torch_aliases,
    torch_decoder_key,
    torch_heads,
)

__all__ = [
    "PRESETS",
    "SETTINGS",
    "PlainUNet",
    "create",
    "torch_aliases",
    "torch_heads",
    "torch_names",
]

# nnU-Net's default plan, whose patches of about 128^3 have six stages: 31.2 M parameters.
PRESETS = {"nnunet": 6}
BLOCKS = (2,)
SETTINGS = (
    *("classes", "in_channels", "preset", "patch_size", "stages", "widths", "blocks"),
    *("decoder_blocks", "strides", "kernels", "deep_supervision", "remat", "dtype", "seed"),
)


class PlainUNet(nnx.Module):
    """Plain encoder and decoder, one segmentation head a decoder level.

    Args:
        in_channels: channels of the input.
        classes: channels of the output, background counted.
        widths: channels of each stage, finest first.
        blocks: convolutions of each stage; the first has the stride.
        strides: step into each stage; the first is normally 1.
        kernels: size of the convolutions of each stage.
        decoder_blocks: convolutions of each decoder level, for all or coarsest first.
        deep_supervision: return the logits of all levels, finest first, instead of the finest.
        remat: recompute each stage's activations in the backward pass instead of keeping them.
        dtype: of the convolutions' operands; parameters, norms and logits are float32.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        widths: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[tuple[int, int, int]],
        kernels: Sequence[tuple[int, int, int]],
        decoder_blocks: int | Sequence[int] = 2,
        deep_supervision: bool = False,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        encoder = []
        channels = in_channels
        for width, count, size, step in zip(widths, blocks, kernels, strides, strict=True):
            encoder.append(conv_stage(channels, width, count, size, step, **options))
            channels = width
        self.encoder = nnx.List(encoder)
        self.transposed, self.decoder, self.heads = make_decoder(
            classes, widths, decoder_blocks, kernels, strides, **options
        )
        self.deep_supervision = deep_supervision
        self.remat = remat
        # Each axis of an input must divide by this.
        self.divisor = tuple(math.prod(step[axis] for step in strides) for axis in range(3))

    def __call__(
        self, x: Float[Array, "b x y z c"]
    ) -> Float[Array, "b x y z classes"] | list[Float[Array, "b _x _y _z classes"]]:
        """Returns logits, or with deep supervision those of all levels, finest first.

        Raises:
            ValueError: an axis of x does not divide by the product of the strides.
        """
        check_divides(x.shape[1:4], self.divisor)
        return run_unet(self, self.transposed, x)


def create(
    *,
    classes: int,
    in_channels: int = 1,
    preset: str | None = None,
    patch_size: Sequence[int] | None = None,
    stages: int | None = None,
    widths: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    strides: Sequence[int | tuple[int, int, int]] | None = None,
    kernels: Sequence[int | tuple[int, int, int]] | None = None,
    seed: int = 0,
    **settings,
) -> PlainUNet:
    """Returns the network with initial weights from `seed`.

    Args:
        classes: number of output classes, background counted.
        in_channels: channels of the input.
        preset: "nnunet", two convolutions a stage; else widths and blocks.
        patch_size: with a preset, decides the number of stages and the strides as nnU-Net's
            planner does: an axis is halved until 4 to 7 voxels are left.
        stages: with a preset, the number of stages; each halves all axes. 6 if not given.
        widths: channels of each stage, finest first.
        blocks: convolutions of each stage.
        strides: step into each stage. None for 1, 2, 2, ...
        kernels: size of the convolutions of each stage, odd. None for 3.
        seed: of the initial weights.
        settings: see `PlainUNet`.

    Raises:
        UserError: settings that are unknown or do not go together.
    """
    shape = plan(preset, PRESETS, BLOCKS, patch_size, stages, widths, blocks, strides, kernels)
    return PlainUNet(in_channels, classes, **shape, **settings, rngs=nnx.Rngs(seed))


def torch_names(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Returns for each parameter its key in the state_dict of PlainConvUNet."""
    names = {}
    for name in parameters:
        path, _, leaf = name.rpartition(".")
        part, _, rest = path.partition(".")
        if part == "encoder":
            path = f"encoder.stages.{rest}".replace(".blocks.", ".0.convs.")
        else:
            path = torch_decoder_key(path)
        names[name] = f"{path}.{LEAVES[leaf]}"
    return names
