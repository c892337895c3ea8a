"""SegResNet and SegResNetDS: residual networks whose blocks normalise before they convolve.

Source: Myronenko, "3D MRI brain tumor segmentation using autoencoder regularization", BrainLes
2018, without its autoencoder branch. The reference implementations are MONAI's SegResNet and
SegResNetDS; the second has transposed convolutions, deep supervision and kernels for anisotropic
scans.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.errors import UserError
from tumorjax.models.layers import Conv, GroupNorm, InstanceNorm, TransposedConv
from tumorjax.models.rematerialization import run_block
from tumorjax.models.unet import LEAVES, check_divides
from tumorjax.models.upsampling import OverlappingTransposedConv, upsample_linear

VARIANTS = ("segresnet", "segresnet_ds")
NORMS = ("group", "instance")
UPSAMPLING = ("nontrainable", "deconv")
# For crops of 32^3 on a CPU.
SMALL = {"init_filters": 8, "blocks_down": (1, 1, 1, 1)}
SETTINGS = (
    *("classes", "in_channels", "variant", "init_filters", "blocks_down", "blocks_up", "norm"),
    *("groups", "upsample_mode", "resolution", "dsdepth", "deep_supervision", "remat", "dtype"),
    "seed",
)


class Block(nnx.Module):
    """Norm, ReLU, convolution, twice; and the input on top."""

    def __init__(self, channels, size, *, norm, dtype, rngs):
        options: dict[str, Any] = {"bias": False, "dtype": dtype, "rngs": rngs}
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.conv1 = Conv(channels, channels, size, **options)
        self.conv2 = Conv(channels, channels, size, **options)

    def __call__(self, x):
        y = self.conv1(jax.nn.relu(self.norm1(x)))
        return x + self.conv2(jax.nn.relu(self.norm2(y)))


class Down(nnx.Module):
    """A level of the encoder: a strided convolution, unless it is the first, and blocks."""

    def __init__(self, channels, blocks, size, downsample, *, norm, dtype, rngs):
        self.downsample = nnx.data(downsample)
        self.blocks = nnx.List(
            [Block(channels, size, norm=norm, dtype=dtype, rngs=rngs) for _ in range(blocks)]
        )

    def __call__(self, x):
        x = x if self.downsample is None else self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class Up(nnx.Module):
    """A level of the decoder: half the channels, twice the voxels, the skip added, blocks."""

    def __init__(self, channels, blocks, size, stride, *, mode, ds, classes, norm, dtype, rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        # SegResNet halves the channels first, SegResNetDS in the transposed convolution itself.
        project = not (ds and mode == "deconv")
        self.project = nnx.data(
            Conv(2 * channels, channels, 1, bias=False, **options) if project else None
        )
        grow = None
        if mode == "deconv":
            grow = (
                OverlappingTransposedConv(2 * channels, channels, stride, **options)
                if ds
                else TransposedConv(channels, channels, stride, **options)
            )
        self.grow = nnx.data(grow)
        self.blocks = nnx.List([Block(channels, size, norm=norm, **options) for _ in range(blocks)])
        self.head = nnx.data(Conv(channels, classes, 1, **options) if classes else None)
        self.stride = stride

    def __call__(self, x, skip):
        x = x if self.project is None else self.project(x)
        x = upsample_linear(x, self.stride) if self.grow is None else self.grow(x)
        x = x + skip
        for block in self.blocks:
            x = block(x)
        return x


class SegResNet(nnx.Module):
    """SegResNet or SegResNetDS.

    Args:
        in_channels: channels of the input.
        classes: channels of the output, background counted.
        ds: SegResNetDS instead of SegResNet.
        init_filters: channels of the finest level; each further level has twice as many.
        blocks_down: blocks of each encoder level, finest first.
        blocks_up: blocks of each decoder level, coarsest first.
        scales: steps from each level to the next coarser one; a kernel is 3 where a step is 2.
        norm: makes a norm for a number of channels.
        upsample_mode: "nontrainable" (trilinear) or "deconv" (transposed convolution).
        dsdepth: finest decoder levels of a SegResNetDS that have a head.
        deep_supervision: return the logits of all heads, finest first, instead of the finest.
        remat: recompute each level's activations in the backward pass instead of keeping them.
        dtype: of the convolutions' operands; parameters, norms and logits are float32.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        ds: bool,
        init_filters: int,
        blocks_down: Sequence[int],
        blocks_up: Sequence[int],
        scales: Sequence[tuple[int, int, int]],
        norm: Any,
        upsample_mode: str,
        dsdepth: int,
        deep_supervision: bool = False,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        sizes = [(2 * x - 1, 2 * y - 1, 2 * z - 1) for x, y, z in scales]
        widths = [init_filters * 2**level for level in range(len(blocks_down))]
        self.stem = Conv(in_channels, init_filters, sizes[0], bias=False, **options)
        down = []
        for level, (width, count) in enumerate(zip(widths, blocks_down, strict=True)):
            step = level - 1
            downsample = (
                Conv(widths[step], width, sizes[step], scales[step], bias=False, **options)
                if level
                else None
            )
            down.append(Down(width, count, sizes[level], downsample, norm=norm, **options))
        self.down = nnx.List(down)
        up = []
        for level, count in zip(range(len(widths) - 2, -1, -1), blocks_up, strict=True):
            up.append(
                Up(
                    *(widths[level], count, sizes[level], scales[level]),
                    mode=upsample_mode,
                    ds=ds,
                    classes=classes if ds and level < dsdepth else 0,
                    norm=norm,
                    **options,
                )
            )
        self.up = nnx.List(up)
        self.norm = nnx.data(None if ds else norm(init_filters))
        self.head = nnx.data(None if ds else Conv(init_filters, classes, 1, **options))
        self.deep_supervision = deep_supervision
        self.remat = remat
        # Each axis of an input must divide by this.
        self.divisor = tuple(math.prod(scale[axis] for scale in scales[:-1]) for axis in range(3))

    def __call__(
        self, x: Float[Array, "b x y z c"]
    ) -> Float[Array, "b x y z classes"] | list[Float[Array, "b _x _y _z classes"]]:
        """Returns logits, or with deep supervision those of all heads, finest first.

        Raises:
            ValueError: an axis of x does not divide by the product of the strides.
        """
        check_divides(x.shape[1:4], self.divisor)

        x = self.stem(x)
        skips = []
        for level in self.down:
            x = run_block(level, x, remat=self.remat)
            skips.append(x)
        logits = []
        for index, up in enumerate(self.up):
            x = run_block(up, x, skips[-2 - index], remat=self.remat)
            if up.head is not None and (self.deep_supervision or index == len(self.up) - 1):
                logits.append(up.head(x).astype(jnp.float32))
        if self.head is not None and self.norm is not None:
            logits.append(self.head(jax.nn.relu(self.norm(x))).astype(jnp.float32))
        return logits[::-1] if self.deep_supervision else logits[-1]


def create(
    *,
    classes: int,
    in_channels: int = 1,
    variant: str = "segresnet",
    init_filters: int | None = None,
    blocks_down: Sequence[int] = (1, 2, 2, 4),
    blocks_up: Sequence[int] | None = None,
    norm: str | None = None,
    groups: int = 8,
    upsample_mode: str | None = None,
    resolution: Sequence[float] | None = None,
    dsdepth: int | None = None,
    deep_supervision: bool = False,
    seed: int = 0,
    **settings,
) -> SegResNet:
    """Returns the network with initial weights from `seed`. Defaults are MONAI's.

    Args:
        classes: number of output classes, background counted.
        in_channels: channels of the input.
        variant: "segresnet" or "segresnet_ds".
        init_filters: channels of the finest level. None for 8, of SegResNetDS 32.
        blocks_down: blocks of each encoder level, finest first.
        blocks_up: blocks of each decoder level, coarsest first. None for one each.
        norm: "group" or "instance". None for group, of SegResNetDS instance, which MONAI's
            Auto3DSeg trains it with: the batch norm of MONAI's default cannot be had, as it
            would learn other statistics from a batch of two crops than it is used with.
        groups: of the group norm.
        upsample_mode: "nontrainable" or "deconv". None for nontrainable, of SegResNetDS deconv.
        resolution: spacing of the scans in mm, for kernels and strides of a SegResNetDS that
            leave coarse axes alone until the others are as coarse. None for isotropic.
        dsdepth: finest decoder levels of a SegResNetDS that have a head. None for all with deep
            supervision, else the finest alone.
        deep_supervision: return the logits of all heads; SegResNetDS only.
        seed: of the initial weights.
        settings: see `SegResNet`.

    Raises:
        UserError: settings that are unknown or do not go together.
    """
    ds = variant == "segresnet_ds"
    init_filters = init_filters or (32 if ds else 8)
    norm = norm or ("instance" if ds else "group")
    upsample_mode = upsample_mode or ("deconv" if ds else "nontrainable")
    for name, value, known in (
        ("variant", variant, VARIANTS),
        ("norm", norm, NORMS),
        ("upsample_mode", upsample_mode, UPSAMPLING),
    ):
        if value not in known:
            raise UserError(f"model.{name} is {value!r}. Expected one of {', '.join(known)}")
    if not ds and (deep_supervision or resolution is not None or dsdepth is not None):
        raise UserError(
            "model.deep_supervision, model.dsdepth and model.resolution are SegResNetDS's. Set"
            " model.variant to segresnet_ds, or leave them out"
        )
    levels = len(blocks_down) - 1
    blocks_up = (1,) * levels if blocks_up is None else blocks_up
    if levels < 1 or len(blocks_up) != levels:
        raise UserError(
            f"model.blocks_down {blocks_down} and model.blocks_up {blocks_up}: expected one number"
            " of blocks fewer upwards than downwards, where there are two at least"
        )
    if norm == "group" and (groups < 1 or init_filters % groups):
        raise UserError(f"model.init_filters {init_filters}: must divide by model.groups, {groups}")
    if resolution is not None and (len(resolution) != 3 or min(resolution) <= 0):
        raise UserError(f"model.resolution is {resolution}. Expected three spacings in mm")
    if dsdepth is None:
        dsdepth = levels if deep_supervision else 1
    return SegResNet(
        in_channels,
        classes,
        ds=ds,
        init_filters=init_filters,
        blocks_down=tuple(blocks_down),
        blocks_up=tuple(blocks_up),
        scales=level_scales(resolution or (1, 1, 1), levels + 1),
        norm=InstanceNorm if norm == "instance" else lambda channels: GroupNorm(channels, groups),
        upsample_mode=upsample_mode,
        dsdepth=max(dsdepth, 1),
        deep_supervision=deep_supervision,
        **settings,
        rngs=nnx.Rngs(seed),
    )


def level_scales(resolution: Sequence[float], levels: int) -> list[tuple[int, int, int]]:
    """Returns the step from each level to the next: coarse axes wait until others are as coarse.

    Source: MONAI's scales_for_resolution.
    """
    spacing = np.asarray(resolution, float)
    # Halvings after which an axis would be coarser than the coarsest is now.
    ahead = np.floor(np.log2(spacing.max() / spacing)).astype(int)
    scales = []
    for level in range(levels):
        if level < ahead.max():
            x, y, z = (1 if 2**level >= 2**n else 2 for n in ahead)
        else:
            x, y, z = 2, 2, 2
        scales.append((x, y, z))
    return scales


def torch_names(parameters: Iterable[str]) -> dict[str, str]:
    """Returns for each parameter its key in the state_dict of MONAI's network."""
    # Only SegResNet has a norm before its head.
    key = _plain_key if "norm.scale" in parameters else _ds_key
    names = {}
    for name in parameters:
        path, _, leaf = name.rpartition(".")
        names[name] = f"{key(path.split('.'))}.{LEAVES[leaf]}"
    return names


def _plain_key(path: list[str]) -> str:
    match path:
        case ["stem"]:
            return "convInit.conv"
        case ["norm"]:
            return "conv_final.0"
        case ["head"]:
            return "conv_final.2.conv"
        case ["down", level, "downsample"]:
            return f"down_layers.{level}.0.conv"
        case ["up", level, "project"]:
            return f"up_samples.{level}.0.conv"
        case ["up", level, "grow"]:
            return f"up_samples.{level}.1.deconv"
    part, level, _, block, layer = path
    # Where a level begins with a strided convolution, or with nothing, blocks count from 1.
    index = int(block) + (part == "down")
    layer = f"{layer}.conv" if layer.startswith("conv") else layer
    return f"{part}_layers.{level}.{index}.{layer}"


def _ds_key(path: list[str]) -> str:
    match path:
        case ["stem"]:
            return "encoder.conv_init"
        case ["down", level, "downsample"]:
            return f"encoder.layers.{int(level) - 1}.downsample"
        case ["down", *rest]:
            return ".".join(["encoder.layers", *rest])
        case ["up", level, "project"]:
            return f"up_layers.{level}.upsample.preconv"
        case ["up", level, "grow"]:
            return f"up_layers.{level}.upsample.deconv"
    return ".".join(["up_layers", *path[1:]])


def torch_heads(parameters: Iterable[str]) -> set[str]:
    """Returns the parameters that depend on the number of classes."""
    return {name for name in parameters if "head" in name.split(".")}
