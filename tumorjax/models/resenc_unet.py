"""nnU-Net's residual-encoder U-Net.

Source: Isensee et al., "nnU-Net Revisited", MICCAI 2024; the reference implementation is
ResidualEncoderUNet of the package dynamic-network-architectures, whose names are kept, so that
weights map one to one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.models.layers import (
    Conv,
    ConvNormAct,
    InstanceNorm,
    average_pool,
    leaky_relu,
)
from tumorjax.models.unet import (
    LEAVES,
    Stage,
    check_divides,
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
    "ResEncUNet",
    "create",
    "torch_aliases",
    "torch_heads",
    "torch_names",
    "torch_renames",
]

# nnU-Net's planners for 8, 24 and 40 GB of GPU memory. They differ in the patches that fit, and so
# in the number of stages where none is given; widths and blocks of each stage are the same.
PRESETS = {"M": 5, "L": 6, "XL": 6}
BLOCKS = (1, 3, 4, 6)
SETTINGS = (
    *("classes", "in_channels", "preset", "patch_size", "stages", "widths", "blocks"),
    *("decoder_blocks", "strides", "kernels", "deep_supervision", "remat", "dtype", "seed"),
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

    def __init__(self, in_channels, out_channels, size, stride, *, dtype, rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv1 = ConvNormAct(in_channels, out_channels, size, stride, **options)
        self.conv2 = ConvNormAct(out_channels, out_channels, size, act=False, **options)
        self.skip = Skip(in_channels, out_channels, stride, **options)

    def __call__(self, x):
        return leaky_relu(self.conv2(self.conv1(x)) + self.skip(x))


class ResEncUNet(nnx.Module):
    """Residual encoder, plain decoder, one segmentation head a decoder level.

    Args:
        in_channels: channels of the input.
        classes: channels of the output, background counted.
        widths: channels of each stage, finest first.
        blocks: residual blocks of each stage.
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
        decoder_blocks: int | Sequence[int] = 1,
        deep_supervision: bool = False,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.stem = ConvNormAct(in_channels, widths[0], kernels[0], **options)
        encoder = []
        channels = widths[0]
        for width, count, size, step in zip(widths, blocks, kernels, strides, strict=True):
            stage = []
            for index in range(count):
                block_step = step if index == 0 else (1, 1, 1)
                stage.append(ResidualBlock(channels, width, size, block_step, **options))
                channels = width
            encoder.append(Stage(stage))
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
        return run_unet(self, self.transposed, self.stem(x))


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
) -> ResEncUNet:
    """Returns the network with initial weights from `seed`.

    Args:
        classes: number of output classes, background counted.
        in_channels: channels of the input.
        preset: "M", "L" or "XL", nnU-Net's ResEncM (62.8 M parameters at 96^3), ResEncL and
            ResEncXL; else widths and blocks.
        patch_size: with a preset, decides the number of stages and the strides as nnU-Net's
            planner does: an axis is halved until 4 to 7 voxels are left.
        stages: with a preset, the number of stages; each halves all axes.
        widths: channels of each stage, finest first.
        blocks: residual blocks of each stage.
        strides: step into each stage. None for 1, 2, 2, ...
        kernels: size of the convolutions of each stage, odd. None for 3.
        seed: of the initial weights.
        settings: see `ResEncUNet`.

    Raises:
        UserError: settings that are unknown or do not go together.
    """
    shape = plan(preset, PRESETS, BLOCKS, patch_size, stages, widths, blocks, strides, kernels)
    return ResEncUNet(in_channels, classes, **shape, **settings, rngs=nnx.Rngs(seed))


def torch_names(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Returns for each parameter its key in the state_dict of ResidualEncoderUNet."""
    return {name: _torch_key(name) for name in parameters}


def _torch_key(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    part, _, rest = path.partition(".")
    if part == "stem":
        path = f"encoder.stem.convs.0.{rest}"
    elif part == "encoder":
        # The first entry of a skip is the pool.
        path = f"encoder.stages.{rest}".replace(".skip.", ".skip.1.")
    else:
        path = torch_decoder_key(path)
    return f"{path}.{LEAVES[leaf]}"


def torch_renames(model: ResEncUNet) -> dict[str, str]:
    """Returns the keys of skips that project and do not pool: there the projection is first."""
    renames = {}
    for s, stage in enumerate(model.encoder):
        blocks: Any = stage.blocks
        for b, block in enumerate(blocks):
            skip = block.skip
            if skip.stride == (1, 1, 1) and skip.conv is not None:
                for leaf in ("conv.kernel", "norm.scale", "norm.bias"):
                    name = f"encoder.{s}.blocks.{b}.skip.{leaf}"
                    renames[name] = _torch_key(name).replace(".skip.1.", ".skip.0.")
    return renames
