"""nnU-Net's residual-encoder U-Net.

Source: Isensee et al., "nnU-Net Revisited", MICCAI 2024; the reference implementation is
ResidualEncoderUNet of the package dynamic-network-architectures, whose names are kept, so that
weights map one to one.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.errors import UserError
from tumorjax.models.layers import (
    Conv,
    ConvNormAct,
    InstanceNorm,
    TransposedConv,
    average_pool,
    leaky_relu,
    triple,
)

# The presets of nnU-Net's planners for a patch of 96^3; a sixth stage is for larger patches.
PRESETS: dict[str, dict[str, tuple[int, ...]]] = {
    "M": {"widths": (32, 64, 128, 256, 320), "blocks": (1, 3, 4, 6, 6)},
    "L": {"widths": (32, 64, 128, 256, 320, 320), "blocks": (1, 3, 4, 6, 6, 6)},
}
SETTINGS = (
    *("classes", "in_channels", "preset", "widths", "blocks", "decoder_blocks", "strides"),
    *("deep_supervision", "remat", "dtype", "seed"),
)


class Skip(nnx.Module):
    """The shortcut of a residual block: pooled when strided, projected when channels change."""

    def __init__(self, in_channels, out_channels, stride, *, dtype, rngs):
        self.stride = stride
        project = in_channels != out_channels
        self.conv = nnx.data(
            Conv(in_channels, out_channels, 1, bias=False, dtype=dtype, rngs=rngs)
            if project
            else None
        )
        self.norm = nnx.data(InstanceNorm(out_channels) if project else None)

    def __call__(self, x):
        if self.stride != (1, 1, 1):
            x = average_pool(x, self.stride)
        return self.norm(self.conv(x)) if self.conv is not None and self.norm is not None else x


class ResidualBlock(nnx.Module):
    """Two convolutions and a shortcut (ResNet-D)."""

    def __init__(self, in_channels, out_channels, stride, *, dtype, rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv1 = ConvNormAct(in_channels, out_channels, 3, stride, **options)
        self.conv2 = ConvNormAct(out_channels, out_channels, 3, act=False, **options)
        self.skip = Skip(in_channels, out_channels, stride, **options)

    def __call__(self, x):
        return leaky_relu(self.conv2(self.conv1(x)) + self.skip(x))


class Stage(nnx.Module):
    """Blocks in a row."""

    def __init__(self, blocks: Sequence[nnx.Module]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class ResEncUNet(nnx.Module):
    """Residual encoder, plain decoder, one segmentation head a decoder level.

    Args:
        in_channels: channels of the input.
        classes: channels of the output, background counted.
        widths: channels of each stage, finest first.
        blocks: residual blocks of each stage.
        decoder_blocks: convolutions of each decoder level.
        strides: step into each stage; the first is normally 1. None for 1, 2, 2, ...
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
        decoder_blocks: int = 1,
        strides: Sequence[int | tuple[int, int, int]] | None = None,
        deep_supervision: bool = False,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        steps = [triple(s) for s in strides or (1, *(2 for _ in widths[1:]))]
        self.stem = ConvNormAct(in_channels, widths[0], 3, **options)
        encoder = []
        channels = widths[0]
        for width, count, step in zip(widths, blocks, steps, strict=True):
            stage = []
            for index in range(count):
                stage.append(
                    ResidualBlock(channels, width, step if index == 0 else (1, 1, 1), **options)
                )
                channels = width
            encoder.append(Stage(stage))
        self.encoder = nnx.List(encoder)
        transposed, decoder, heads = [], [], []
        for level in range(len(widths) - 2, -1, -1):
            transposed.append(
                TransposedConv(widths[level + 1], widths[level], steps[level + 1], **options)
            )
            decoder.append(
                Stage(
                    [
                        ConvNormAct(
                            widths[level] * (2 if i == 0 else 1), widths[level], 3, **options
                        )
                        for i in range(decoder_blocks)
                    ]
                )
            )
            heads.append(Conv(widths[level], classes, 1, **options))
        self.transposed = nnx.List(transposed)
        self.decoder = nnx.List(decoder)
        self.heads = nnx.List(heads)
        self.deep_supervision = deep_supervision
        self.remat = remat
        # Each axis of an input must divide by this.
        self.divisor = tuple(math.prod(step[axis] for step in steps) for axis in range(3))

    def __call__(
        self, x: Float[Array, "b x y z c"]
    ) -> Float[Array, "b x y z classes"] | list[Float[Array, "b _x _y _z classes"]]:
        """Returns logits, or with deep supervision those of all levels, finest first.

        Raises:
            ValueError: an axis of x does not divide by the product of the strides.
        """
        for size, divisor in zip(x.shape[1:4], self.divisor, strict=True):
            if size % divisor:
                raise ValueError(
                    f"input of shape {x.shape[1:4]}: each axis must divide by {self.divisor}."
                    " Choose another patch size, or fewer stages"
                )
        run = nnx.remat(lambda stage, x: stage(x)) if self.remat else lambda stage, x: stage(x)
        x = self.stem(x)
        skips = []
        for stage in self.encoder:
            x = run(stage, x)
            skips.append(x)
        logits = []
        for level, (up, stage, head) in enumerate(
            zip(self.transposed, self.decoder, self.heads, strict=True)
        ):
            x = jnp.concatenate([up(x), skips[-2 - level]], axis=-1)
            x = run(stage, x)
            if self.deep_supervision or level == len(self.heads) - 1:
                logits.append(head(x).astype(jnp.float32))
        return logits[::-1] if self.deep_supervision else logits[-1]


def create(
    *,
    classes: int,
    in_channels: int = 1,
    preset: str | None = None,
    widths: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    **settings,
) -> ResEncUNet:
    """Returns the network with initial weights from `seed`.

    Args:
        classes: number of output classes, background counted.
        in_channels: channels of the input.
        preset: "M" (ResEncM at 96^3, 62.8 M parameters) or "L"-sized; else widths and blocks.
        widths: channels of each stage, finest first.
        blocks: residual blocks of each stage.
        seed: of the initial weights.
        settings: see `ResEncUNet`.
    """
    if preset and preset not in PRESETS:
        raise UserError(f"model.preset is {preset!r}. Expected one of {', '.join(PRESETS)}")
    shape: dict = dict(PRESETS[preset]) if preset else {}
    if widths is not None:
        shape["widths"] = tuple(widths)
    if blocks is not None:
        shape["blocks"] = tuple(blocks)
    if set(shape) != {"widths", "blocks"} or len(shape["widths"]) != len(shape["blocks"]):
        raise UserError(
            f"model.widths {shape.get('widths')} and model.blocks {shape.get('blocks')}: give a"
            f" preset ({', '.join(PRESETS)}), or as many blocks as widths"
        )
    return ResEncUNet(in_channels, classes, **shape, **settings, rngs=nnx.Rngs(seed))
