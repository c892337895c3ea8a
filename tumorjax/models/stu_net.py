"""STU-Net: one residual U-Net at four sizes, made to be trained at scale and transferred.

Source: Huang et al., "STU-Net: Scalable and Transferable Medical Image Segmentation Models
Empowered by Large-scale Supervised Pre-training", 2023 (arXiv 2304.06716); the reference
implementation is that of uni-medical/STU-Net.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.errors import UserError
from tumorjax.models.layers import Conv, ConvNormAct, leaky_relu
from tumorjax.models.unet import LEAVES, Stage, check_divides, plan, planned_strides, run_unet
from tumorjax.models.unet import torch_heads as torch_heads
from tumorjax.models.upsampling import upsample_nearest

# Size -> width of the first stage and blocks of each: the paper scales both together.
PRESETS = {"S": (16, 1), "B": (32, 1), "L": (64, 2), "H": (96, 3)}
MULTIPLES = (1, 2, 4, 8, 16, 16)
SETTINGS = (
    *("classes", "in_channels", "preset", "patch_size", "widths", "blocks", "strides", "kernels"),
    *("deep_supervision", "remat", "dtype", "seed"),
)


class ResidualBlock(nnx.Module):
    """Two convolutions and a shortcut, projected where the block begins a stage."""

    def __init__(self, in_channels, out_channels, size, stride, *, project, dtype, rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv1 = ConvNormAct(in_channels, out_channels, size, stride, **options)
        self.conv2 = ConvNormAct(out_channels, out_channels, size, act=False, **options)
        self.project = nnx.data(
            Conv(in_channels, out_channels, 1, stride, **options) if project else None
        )

    def __call__(self, x):
        shortcut = x if self.project is None else self.project(x)
        return leaky_relu(self.conv2(self.conv1(x)) + shortcut)


class Upsampling(nnx.Module):
    """Nearest-neighbour interpolation and a 1^3 convolution."""

    def __init__(self, in_channels, out_channels, stride, *, dtype, rngs):
        self.conv = Conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)
        self.stride = stride

    def __call__(self, x):
        # The two commute, and here the convolution has an eighth of the voxels.
        return upsample_nearest(self.conv(x), self.stride)


class STUNet(nnx.Module):
    """Residual encoder and decoder, one segmentation head a decoder level.

    Args:
        in_channels: channels of the input.
        classes: channels of the output, background counted.
        widths: channels of each stage, finest first.
        blocks: residual blocks of each stage, of the encoder's and the decoder's.
        strides: step into each stage; the first is 1.
        kernels: size of the convolutions of each stage.
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
        deep_supervision: bool = False,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}

        def stage(channels: int, level: int, stride: tuple[int, int, int]) -> Stage:
            width, size = widths[level], kernels[level]
            rest = [
                ResidualBlock(width, width, size, 1, project=False, **options)
                for _ in range(blocks[level] - 1)
            ]
            first = ResidualBlock(channels, width, size, stride, project=True, **options)
            return Stage([first, *rest])

        channels = (in_channels, *widths[:-1])
        self.encoder = nnx.List([stage(c, i, strides[i]) for i, c in enumerate(channels)])
        levels = range(len(widths) - 2, -1, -1)
        self.upsampling = nnx.List(
            [Upsampling(widths[i + 1], widths[i], strides[i + 1], **options) for i in levels]
        )
        self.decoder = nnx.List([stage(2 * widths[i], i, (1, 1, 1)) for i in levels])
        self.heads = nnx.List([Conv(widths[i], classes, 1, **options) for i in levels])
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
        return run_unet(self, self.upsampling, x)


def create(
    *,
    classes: int,
    in_channels: int = 1,
    preset: str | None = None,
    patch_size: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    strides: Sequence[int | tuple[int, int, int]] | None = None,
    kernels: Sequence[int | tuple[int, int, int]] | None = None,
    seed: int = 0,
    **settings,
) -> STUNet:
    """Returns the network with initial weights from `seed`.

    Args:
        classes: number of output classes, background counted.
        in_channels: channels of the input.
        preset: "S", "B", "L" or "H" (14.6, 58.3, 440 and 1457 M parameters); else widths and
            blocks.
        patch_size: decides the strides as nnU-Net's planner does; stages that it does not
            need have stride 1, as in the reference. Without it all axes are halved five times.
        widths: channels of each stage, finest first.
        blocks: residual blocks of each stage.
        strides: step into each stage. None for 1, 2, 2, ...
        kernels: size of the convolutions of each stage, odd. None for 3.
        seed: of the initial weights.
        settings: see `STUNet`.

    Raises:
        UserError: settings that are unknown or do not go together.
    """
    if preset and preset not in PRESETS:
        raise UserError(f"model.preset is {preset!r}. Expected one of {', '.join(PRESETS)}")
    if preset:
        width, count = PRESETS[preset]
        widths = [width * multiple for multiple in MULTIPLES] if widths is None else widths
        blocks = [count] * len(widths) if blocks is None else blocks
    if patch_size is not None and strides is None and widths is not None:
        planned = planned_strides(patch_size)[: len(widths)]
        strides = planned + [(1, 1, 1)] * (len(widths) - len(planned))
    shape = plan(None, dict.fromkeys(PRESETS, 6), (), None, None, widths, blocks, strides, kernels)
    return STUNet(in_channels, classes, **shape, **settings, rngs=nnx.Rngs(seed))


_PARTS = {
    "encoder": "conv_blocks_context",
    "upsampling": "upsample_layers",
    "decoder": "conv_blocks_localization",
    "heads": "seg_outputs",
}
_LAYERS = {"project": "conv3", "conv1.conv": "conv1", "conv1.norm": "norm1"} | {
    "conv2.conv": "conv2",
    "conv2.norm": "norm2",
}


def torch_names(parameters: Iterable[str]) -> dict[str, str]:
    """Returns for each parameter its key in the state_dict of the reference's STUNet."""
    names = {}
    for name in parameters:
        path, _, leaf = name.rpartition(".")
        part, level, *rest = path.split(".")
        if part in ("encoder", "decoder"):
            rest = [rest[1], _LAYERS[".".join(rest[2:])]]
        names[name] = ".".join([_PARTS[part], level, *rest, LEAVES[leaf]])
    return names
