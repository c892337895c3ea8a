"""Swin UNETR: a transformer with shifted windows as the encoder of a U-Net.

Source: Hatamizadeh et al., "Swin UNETR: Swin Transformers for Semantic Segmentation of Brain
Tumors in MRI Images", 2022, and He et al., "SwinUNETR-V2", MICCAI 2023; the reference
implementation is SwinUNETR of MONAI (without dropout and stochastic depth, which are off there by
default), whose names are kept, so that weights map one to one.

With 48 features version 1 has 62.2 M parameters and version 2 has 72.8 M.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.errors import UserError
from tumorjax.models.layers import Conv, normal, triple
from tumorjax.models.rematerialization import run_block
from tumorjax.models.transformer import Dense, LayerNorm, Mlp, PatchConv, attention, layer_norm
from tumorjax.models.unetr_blocks import (
    ResBlock,
    UpBlock,
    check_patch,
    check_settings,
    torch_heads,
    torch_key,
)

__all__ = ["SETTINGS", "SwinUNETR", "create", "torch_buffers", "torch_heads", "torch_names"]

# For crops of 32^3 on a CPU.
SMALL = {"feature_size": 12, "depths": (1, 1, 1, 1), "heads": (2, 2, 4, 4), "window_size": 4}
SETTINGS = (
    *("classes", "in_channels", "feature_size", "version", "depths", "heads", "window_size"),
    *("merging", "deep_supervision", "remat", "dtype", "seed"),
)
# The order in which patch merging lays the eight voxels of a 2^3 block side by side. Weights are
# bound to the order that they were trained with; two published ones repeat voxels and drop others.
MERGING = {
    "merging": ("000", "100", "010", "001", "110", "101", "011", "111"),  # MONAI since 1.6
    "mergingv2": ("000", "001", "010", "011", "100", "101", "110", "111"),  # MONAI's mergingv2
    # MONAI 0.9 to 1.5, the Universal Model, and SuPreM's backbone.
    "merging_repeated": ("000", "100", "010", "001", "101", "010", "001", "111"),
    # SuPreM's code for fine-tuning on TotalSegmentator.
    "merging_suprem": ("000", "100", "010", "001", "101", "110", "101", "111"),
}
MLP_RATIO = 4


class WindowAttention(nnx.Module):
    """Attention within windows, with a learnt bias for each relative position."""

    def __init__(
        self,
        channels: int,
        heads: int,
        window: tuple[int, int, int],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        positions = int(np.prod([2 * size - 1 for size in window]))
        table = normal(rngs.params(), (positions, heads), 0.02)
        self.relative_position_bias_table = nnx.Param(table)
        self.qkv = Dense(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.proj = Dense(channels, channels, dtype=dtype, rngs=rngs)
        self.heads = heads
        self.window = window

    def __call__(
        self, x: Float[Array, "b w n c"], regions: np.ndarray | None
    ) -> Float[Array, "b w n c"]:
        """Lets the voxels of each window see each other.

        Args:
            x: the voxels of each window.
            regions: [w, n], voxels of different regions do not see each other. None for one.
        """
        n = x.shape[2]
        # A window that the volume cuts short takes the first rows and columns of the whole
        # window's table, as in MONAI, whatever its voxels' relative positions are.
        index = relative_position_index(self.window)[:n, :n]
        bias = self.relative_position_bias_table[...][index].transpose(2, 0, 1)[None]
        if regions is not None:
            # The barrier keeps XLA from making the whole mask, n^2 values a window, a constant.
            labels = jax.lax.optimization_barrier(jnp.asarray(regions))
            apart = labels[:, None, :, None] != labels[:, None, None, :]
            bias = bias + jnp.where(apart, -100.0, 0.0)
        return self.proj(attention(self.qkv(x), self.heads, bias))


class SwinBlock(nnx.Module):
    """Window attention and a perceptron, each after a layer norm and with a shortcut."""

    def __init__(
        self,
        channels: int,
        heads: int,
        window: tuple[int, int, int],
        shifted: bool,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm1 = LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window, **options)
        self.norm2 = LayerNorm(channels)
        self.mlp = Mlp(channels, MLP_RATIO * channels, **options)
        self.window = window
        self.shifted = shifted

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z c"]:
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x):
        b, *shape, c = x.shape
        # Where the volume is no larger than a window there is one window, and it is not shifted.
        window = [min(n, w) for n, w in zip(shape, self.window, strict=True)]
        shift = [
            w // 2 if self.shifted and n > w else 0 for n, w in zip(shape, self.window, strict=True)
        ]
        counts = [-(-n // w) for n, w in zip(shape, window, strict=True)]
        padded = [n * w for n, w in zip(counts, window, strict=True)]
        x = jnp.pad(x, ((0, 0), *((0, p - n) for p, n in zip(padded, shape, strict=True)), (0, 0)))
        x = jnp.roll(x, [-step for step in shift], axis=(1, 2, 3))
        x = x.reshape(b, counts[0], window[0], counts[1], window[1], counts[2], window[2], c)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
        y = self.attn(
            x.reshape(b, int(np.prod(counts)), int(np.prod(window)), c),
            shifted_regions(padded, window, shift) if any(shift) else None,
        )
        y = y.reshape(x.shape).transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, *padded, c)
        y = jnp.roll(y, shift, axis=(1, 2, 3))
        return y[:, : shape[0], : shape[1], : shape[2]]


def relative_position_index(window: tuple[int, int, int]) -> np.ndarray:
    """Returns the row of the bias table for each pair of a window's voxels, int64 [n, n]."""
    offsets = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1).reshape(-1, 3)
    apart = offsets[:, None] - offsets[None] + (np.asarray(window) - 1)
    return apart @ np.asarray(
        [(2 * window[1] - 1) * (2 * window[2] - 1), 2 * window[2] - 1, 1], np.int64
    )


def shifted_regions(
    shape: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> np.ndarray:
    """Labels what lay together before a shift brought a volume's two ends into one window.

    Args:
        shape: of the volume, a multiple of the window.
        window: in voxels.
        shift: in voxels.

    Returns:
        int8 [windows, voxels of a window], equal for voxels that may see each other.
    """
    labels = np.zeros((1, 1, 1), np.int8)
    for axis, (n, w, s) in enumerate(zip(shape, window, shift, strict=True)):
        place = np.arange(n)
        line = np.where(place < n - w, 0, np.where(place < n - s, 1, 2)) if s else np.zeros(n)
        labels = 3 * labels + line.astype(np.int8).reshape(
            [-1 if a == axis else 1 for a in (0, 1, 2)]
        )
    counts = [n // w for n, w in zip(shape, window, strict=True)]
    blocks = labels.reshape(counts[0], window[0], counts[1], window[1], counts[2], window[2])
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(-1, int(np.prod(window)))


class PatchMerging(nnx.Module):
    """Halves the resolution: eight voxels side by side, normalised and projected."""

    def __init__(self, channels: int, order: Sequence[str], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(8 * channels)
        self.reduction = Dense(8 * channels, 2 * channels, bias=False, dtype=dtype, rngs=rngs)
        self.order = tuple(order)

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 2c"]:
        x = jnp.pad(x, ((0, 0), *((0, n % 2) for n in x.shape[1:4]), (0, 0)))
        starts = [[int(digit) for digit in corner] for corner in self.order]
        corners = [x[:, i::2, j::2, k::2] for i, j, k in starts]
        return self.reduction(self.norm(jnp.concatenate(corners, axis=-1)))


class SwinStage(nnx.Module):
    """Blocks with and without shift in turn, then patch merging.

    In version 2 a residual convolution block comes first.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        heads: int,
        window: tuple[int, int, int],
        *,
        version: int,
        merging: str,
        remat: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv_block = nnx.data(
            ResBlock(channels, channels, **options) if version == 2 else None
        )
        self.blocks = nnx.List(
            SwinBlock(channels, heads, window, index % 2 == 1, **options) for index in range(depth)
        )
        self.downsample = PatchMerging(channels, MERGING[merging], **options)
        self.remat = remat

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 2c"]:
        if self.conv_block is not None:
            x = run_block(self.conv_block, x, remat=self.remat)
        for block in self.blocks:
            x = run_block(block, x, remat=self.remat)
        return self.downsample(x)


class SwinUNETR(nnx.Module):
    """Swin transformer, convolutional skip connections and a convolutional decoder.

    Args:
        in_channels: channels of the input.
        classes: channels of the output, background counted; None for a backbone without head.
        feature_size: channels at the two finest levels; they double at each coarser one.
        version: 1, or 2 with a residual convolution block before each stage of the transformer.
        depths: blocks of the four stages.
        heads: of the attention in the four stages.
        window: of the attention, in voxels of its stage.
        merging: order of patch merging, a name in `MERGING`.
        remat: recompute each block's activations in the backward pass instead of keeping them.
        dtype: of the operands of convolutions and matrix products; parameters, norms, softmax and
            logits are float32.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int | None,
        *,
        feature_size: int,
        version: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: tuple[int, int, int],
        merging: str,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width = feature_size
        self.patch_embed = PatchConv(in_channels, width, 2, **options)
        self.stages = nnx.List(
            SwinStage(
                2**level * width,
                depths[level],
                heads[level],
                window,
                version=version,
                merging=merging,
                remat=remat,
                **options,
            )
            for level in range(4)
        )
        self.encoder1 = ResBlock(in_channels, width, **options)
        self.encoder2 = ResBlock(width, width, **options)
        self.encoder3 = ResBlock(2 * width, 2 * width, **options)
        self.encoder4 = ResBlock(4 * width, 4 * width, **options)
        self.encoder10 = ResBlock(16 * width, 16 * width, **options)
        self.decoder5 = UpBlock(16 * width, 8 * width, **options)
        self.decoder4 = UpBlock(8 * width, 4 * width, **options)
        self.decoder3 = UpBlock(4 * width, 2 * width, **options)
        self.decoder2 = UpBlock(2 * width, width, **options)
        self.decoder1 = UpBlock(width, width, **options)
        self.out = nnx.data(None if classes is None else Conv(width, classes, 1, **options))
        self.window = window
        self.remat = remat
        # Each axis of an input must divide by this. Where none is larger, the coarsest level is one
        # voxel, which instance norm makes 0: MONAI refuses such a patch, here it trains all the
        # same, on what the shortcuts carry.
        self.divisor = triple(2**5)

    def features(
        self, x: Float[Array, "b x y z c"]
    ) -> tuple[Float[Array, "b x5 y5 z5 16f"], Float[Array, "b x y z f"]]:
        """Returns the coarsest features, 32 times coarser than x, and the finest.

        Raises:
            ValueError: an axis of x does not divide by 32.
        """
        check_patch(x.shape[1:4], self.divisor)

        def run(block, *inputs):
            return run_block(block, *inputs, remat=self.remat)

        y = self.patch_embed(x)
        hidden = [layer_norm(y)]
        for stage in self.stages:
            y = stage(y)
            hidden.append(layer_norm(y))
        coarsest = run(self.encoder10, hidden[4])
        y = run(self.decoder5, coarsest, hidden[3])
        y = run(self.decoder4, y, run(self.encoder4, hidden[2]))
        y = run(self.decoder3, y, run(self.encoder3, hidden[1]))
        y = run(self.decoder2, y, run(self.encoder2, hidden[0]))
        return coarsest, run(self.decoder1, y, run(self.encoder1, x))

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z classes"]:
        """Returns logits.

        Raises:
            ValueError: an axis of x does not divide by 32, or the network has no head.
        """
        if self.out is None:
            raise ValueError("this network was made without head: it gives features alone")
        return self.out(self.features(x)[1]).astype(jnp.float32)


def create(
    *,
    classes: int,
    in_channels: int = 1,
    deep_supervision: bool = False,
    seed: int = 0,
    **settings,
) -> SwinUNETR:
    """Returns the network with initial weights from `seed`.

    Args:
        classes: number of output classes, background counted.
        in_channels: channels of the input.
        deep_supervision: must be False.
        seed: of the initial weights.
        settings: see `build`; the defaults are version 2 with 48 features, 72.8 M parameters.

    Raises:
        UserError: a setting does not fit.
    """
    return build(
        "swin_unetr", in_channels, classes, deep_supervision, rngs=nnx.Rngs(seed), **settings
    )


def build(
    name: str,
    in_channels: int,
    classes: int | None,
    deep_supervision: bool,
    *,
    feature_size: int = 48,
    version: int = 2,
    depths: Sequence[int] = (2, 2, 2, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int | Sequence[int] = 7,
    merging: str = "merging",
    remat: bool = False,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> SwinUNETR:
    """Checks the settings and returns the network; `name` is that of the model in messages."""
    if merging not in MERGING:
        raise UserError(f"model.merging is {merging!r}. Expected one of {', '.join(MERGING)}")
    if version not in (1, 2):
        raise UserError(f"model.version is {version!r}. Expected 1 or 2")
    if len(depths) != 4 or len(heads) != 4 or min(depths) < 1:
        raise UserError(
            f"model.depths {tuple(depths)} and model.heads {tuple(heads)}: expected one number for"
            " each of the four stages"
        )
    window = triple(window_size if isinstance(window_size, int) else tuple(window_size))  # type: ignore
    if min(window) < 2:
        raise UserError(f"model.window_size is {window}. Expected at least 2 voxels an axis")
    check_settings(
        name,
        deep_supervision,
        {2**level * feature_size: count for level, count in enumerate(heads)},
    )
    return SwinUNETR(
        in_channels,
        classes,
        feature_size=feature_size,
        version=version,
        depths=tuple(depths),
        heads=tuple(heads),
        window=window,
        merging=merging,
        remat=remat,
        dtype=dtype,
        rngs=rngs,
    )


def torch_names(parameters: Mapping[str, Array]) -> dict[str, str]:
    """Returns the name of each parameter in the state_dict of MONAI's SwinUNETR."""
    return {name: _key(name) for name in parameters}


def _key(name: str) -> str:
    if name.startswith("patch_embed."):
        return torch_key(name.replace("patch_embed.", "swinViT.patch_embed.proj."))
    if not name.startswith("stages."):
        return torch_key(name)
    _, stage, rest = name.split(".", 2)
    level = int(stage) + 1
    if rest.startswith("conv_block."):
        return torch_key(f"swinViT.layers{level}c.0.layer." + rest.removeprefix("conv_block."))
    return torch_key(f"swinViT.layers{level}.0.{rest}")


def torch_buffers(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns what MONAI's state_dict holds besides weights: each attention's position index."""
    assert isinstance(model, SwinUNETR)
    index = relative_position_index(model.window)
    return {
        f"swinViT.layers{level}.0.blocks.{block}.attn.relative_position_index": index
        for level, stage in enumerate(model.stages, 1)
        for block in range(len(stage.blocks))
    }
