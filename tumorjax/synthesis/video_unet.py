"""DiffTumor's denoiser: a U-Net made for video, whose frames are the axial planes of the latents.

Convolutions, linear attention and changes of resolution act within a plane; planes see each other
by attention along z. It is the network of Ho et al. ("Video diffusion models", NeurIPS 2022) with
the widths and the 17 input channels of DiffTumor (Chen et al., CVPR 2024): noisy latent, latent of
the scan with the hole, and the mask at the latents' resolution in {-1, 1}. It is told the time, and
organ and radius only where that is asked for.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from tumorjax.errors import UserError
from tumorjax.models.layers import Conv, GroupNorm, normal
from tumorjax.synthesis.autoencoder import FACTOR
from tumorjax.synthesis.latent_unet import Dense, Embedding, Inputs, check_shape, sinusoids

SETTINGS = ("width", "multipliers", "heads", "head_width", "told", "dtype")
DIFFTUMOR: dict[str, Any] = {"width": 24, "multipliers": (1, 2, 4, 8), "heads": 8, "head_width": 32}
PRESETS = {"difftumor": DIFFTUMOR}

_GROUPS = 8
# Of the relative position bias, as T5 has it (Raffel et al., 2020).
_BUCKETS = 32
_MAX_DISTANCE = 32


def create(
    latent_channels: int,
    organs: int,
    *,
    width: int = DIFFTUMOR["width"],
    multipliers: tuple[int, ...] = DIFFTUMOR["multipliers"],
    heads: int = DIFFTUMOR["heads"],
    head_width: int = DIFFTUMOR["head_width"],
    told: bool = False,
    dtype: jnp.dtype = jnp.float32,
    seed: int = 0,
) -> "VideoUNet":
    """Returns the network with initial weights.

    Args:
        latent_channels: c of the latents.
        organs: how many host organs there are; of use only where `told`.
        width: channels of the stem.
        multipliers: channels of each level, in widths; each level has half the voxels along x, y.
        heads: of all attention.
        head_width: channels of a head.
        told: whether organ and radius are embedded beside the time, which DiffTumor does not do.
        dtype: of convolutions' operands; parameters are float32.
        seed: of the weights.

    Raises:
        UserError: a setting does not fit.
    """
    if width < _GROUPS or width % _GROUPS or head_width % 2 or not multipliers:
        raise UserError(
            f"model.width is {width}, model.multipliers {tuple(multipliers)} and model.head_width"
            f" {head_width}. Expected a multiple of {_GROUPS}, at least one, and an even number"
        )
    widths = [width * multiplier for multiplier in multipliers]
    return VideoUNet(
        latent_channels, organs, width, widths, heads, head_width, told, dtype, nnx.Rngs(seed)
    )


class VideoUNet(nnx.Module):
    """See above. Called with `latent_unet.Inputs`; within, arrays are [b, z, x, y, c]."""

    def __init__(
        self,
        latent_channels: int,
        organs: int,
        width: int,
        widths: list[int],
        heads: int,
        head_width: int,
        told: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        embedding = 4 * width
        attention = (heads, head_width)
        conv: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.stem = Conv(2 * latent_channels + 1, width, (1, 7, 7), **conv)
        self.stem_attention = Normed(width, AxialAttention(width, *attention, rngs=rngs))
        self.time_in = Dense(width, embedding, rngs=rngs)
        self.time_out = Dense(embedding, embedding, rngs=rngs)
        self.told = Embedding(width, embedding, organs, timed=False, rngs=rngs) if told else None
        self.position_bias = nnx.Param(normal(rngs.params(), (_BUCKETS, heads), 1.0))
        self.down: nnx.List = nnx.List([])
        before = width
        for level, channels in enumerate(widths):
            shrink = level < len(widths) - 1
            self.down.append(
                Level(before, channels, embedding, attention, "down" if shrink else "", **conv)
            )
            before = channels
        self.middle1 = Block(before, before, embedding, **conv)
        self.middle_plane = Normed(before, PlaneAttention(before, *attention, rngs=rngs))
        self.middle_axis = Normed(before, AxialAttention(before, *attention, rngs=rngs))
        self.middle2 = Block(before, before, embedding, **conv)
        self.up: nnx.List = nnx.List([])
        for level in reversed(range(len(widths))):
            out = widths[level - 1] if level else width
            self.up.append(
                Level(2 * widths[level], out, embedding, attention, "up" if level else "", **conv)
            )
        self.head_block = Block(2 * width, width, None, **conv)
        self.head = Conv(width, latent_channels, 1, **conv)
        self.width = width

    def __call__(self, inputs: Inputs) -> Float[Array, "b x y z c"]:
        check_shape(inputs.noisy.shape[1:3], 2 ** (len(self.down) - 1))
        # The nearest voxel of the scan, as PyTorch's interpolation takes it.
        mask = 2 * inputs.mask[:, ::FACTOR, ::FACTOR, ::FACTOR, None] - 1
        x = jnp.concatenate([inputs.noisy, inputs.latent, mask], axis=-1)
        x = self.stem(jnp.moveaxis(x, 3, 1))
        stem = x
        vector = self.time_in(sinusoids(inputs.time, self.width))
        vector = self.time_out(jax.nn.gelu(vector, approximate=False))
        if self.told is not None:
            vector = vector + self.told(inputs)
        bias = self.position_bias[...][position_buckets(x.shape[1])]
        bias = jnp.moveaxis(bias, -1, 0)
        x = self.stem_attention(x, bias)
        skips = []
        for level in self.down:
            kept, x = level(x, vector, bias)
            skips.append(kept)
        x = self.middle1(x, vector)
        x = self.middle_axis(self.middle_plane(x), bias)
        x = self.middle2(x, vector)
        for level in self.up:
            _, x = level(jnp.concatenate([x, skips.pop()], axis=-1), vector, bias)
        x = self.head_block(jnp.concatenate([x, stem], axis=-1), None)
        return jnp.moveaxis(self.head(x), 1, 3).astype(jnp.float32)


class Level(nnx.Module):
    """Two blocks, linear attention in the plane, attention along z, and a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        attention: tuple[int, int],
        change: str,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        conv: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.block1 = Block(in_channels, out_channels, embedding, **conv)
        self.block2 = Block(out_channels, out_channels, embedding, **conv)
        self.plane = Normed(out_channels, LinearAttention(out_channels, *attention, rngs=rngs))
        self.axis = Normed(out_channels, AxialAttention(out_channels, *attention, rngs=rngs))
        self.change = (
            Halving(out_channels, **conv)
            if change == "down"
            else Doubling(out_channels, **conv)
            if change == "up"
            else None
        )

    def __call__(self, x: Array, vector: Array, bias: Array) -> tuple[Array, Array]:
        """Returns the features before and after the change of resolution."""
        x = self.block2(self.block1(x, vector), vector)
        x = self.axis(self.plane(x), bias)
        return x, x if self.change is None else self.change(x)


class Block(nnx.Module):
    """Two in-plane convolutions with group norm and SiLU, the first modulated by the time."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int | None,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        conv: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.modulate = Dense(embedding, 2 * out_channels, rngs=rngs) if embedding else None
        self.conv1 = Conv(in_channels, out_channels, (1, 3, 3), **conv)
        self.norm1 = GroupNorm(out_channels, _GROUPS)
        self.conv2 = Conv(out_channels, out_channels, (1, 3, 3), **conv)
        self.norm2 = GroupNorm(out_channels, _GROUPS)
        same = in_channels == out_channels
        self.skip = None if same else Conv(in_channels, out_channels, 1, **conv)

    def __call__(self, x: Array, vector: Array | None) -> Array:
        y = self.norm1(self.conv1(x))
        if self.modulate is not None and vector is not None:
            scale, shift = jnp.split(self.modulate(jax.nn.silu(vector)), 2, axis=-1)
            y = y * (1 + scale[:, None, None, None]) + shift[:, None, None, None]
        y = jax.nn.silu(self.norm2(self.conv2(jax.nn.silu(y))))
        return y + (x if self.skip is None else self.skip(x))


class Normed(nnx.Module):
    """Adds to its input what a module makes of it after a norm over channels (scale alone)."""

    def __init__(self, channels: int, module: nnx.Module):
        self.scale = nnx.Param(jnp.ones(channels))
        self.module = module

    def __call__(self, x: Float[Array, "b z x y c"], *arguments: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        gain = lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
        return x + self.module(centred * gain * self.scale[...], *arguments)


class LinearAttention(nnx.Module):
    """Attention within planes at a cost linear in their voxels (Shen et al., WACV 2021)."""

    def __init__(self, channels: int, heads: int, head_width: int, *, rngs: nnx.Rngs):
        self.queries = _Projection(channels, 3 * heads * head_width, rngs=rngs)
        self.out = Dense(heads * head_width, channels, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "b z x y c"]) -> Float[Array, "b z x y c"]:
        b, nz, nx, ny, _ = x.shape
        q, k, v = _heads(self.queries(x).reshape(b, nz, nx * ny, -1), self.heads)
        q = jax.nn.softmax(q, axis=-1) * q.shape[-1] ** -0.5
        k = jax.nn.softmax(k, axis=2)
        context = jnp.einsum("bznhd,bznhe->bzhde", k, v)
        y = jnp.einsum("bznhd,bzhde->bznhe", q, context)
        return self.out(y.reshape(b, nz, nx, ny, -1))


class PlaneAttention(nnx.Module):
    """Full attention within planes."""

    def __init__(self, channels: int, heads: int, head_width: int, *, rngs: nnx.Rngs):
        self.queries = _Projection(channels, 3 * heads * head_width, rngs=rngs)
        self.out = _Projection(heads * head_width, channels, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "b z x y c"]) -> Float[Array, "b z x y c"]:
        b, nz, nx, ny, _ = x.shape
        q, k, v = _heads(self.queries(x).reshape(b, nz, nx * ny, -1), self.heads)
        return self.out(_attend(q, k, v, 0.0).reshape(b, nz, nx, ny, -1))


class AxialAttention(nnx.Module):
    """Full attention along z, with rotary positions (Su et al., 2021) and a bias by distance."""

    def __init__(self, channels: int, heads: int, head_width: int, *, rngs: nnx.Rngs):
        self.queries = _Projection(channels, 3 * heads * head_width, rngs=rngs)
        self.out = _Projection(heads * head_width, channels, rngs=rngs)
        self.heads = heads

    def __call__(
        self, x: Float[Array, "b z x y c"], bias: Float[Array, "h z z"]
    ) -> Float[Array, "b z x y c"]:
        b, nz, nx, ny, _ = x.shape
        columns = jnp.moveaxis(self.queries(x), 1, 3).reshape(b, nx * ny, nz, -1)
        q, k, v = _heads(columns, self.heads)
        y = _attend(rotated(q), rotated(k), v, bias).reshape(b, nx, ny, nz, -1)
        return jnp.moveaxis(self.out(y), 3, 1)


class Halving(nnx.Module):
    """In-plane convolution of 4 x 4, stride 2, padding 1."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        scale = (16 * channels) ** -0.5
        self.kernel = nnx.Param(normal(rngs.params(), (4, 4, channels, channels), scale))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b z x y c"]) -> Float[Array, "b z x/2 y/2 c"]:
        # Blocks of 2 x 2 side by side in the channels: XLA:CPU's gradient of a strided convolution
        # is slow, that of one with stride 1 is not.
        b, nz, nx, ny, c = x.shape
        x = jnp.pad(x.reshape(b * nz, nx, ny, c), ((0, 0), (1, 1), (1, 1), (0, 0)))
        blocks = x.reshape(b * nz, nx // 2 + 1, 2, ny // 2 + 1, 2, c).transpose(0, 1, 3, 2, 4, 5)
        kernel = self.kernel[...].reshape(2, 2, 2, 2, c, c).transpose(0, 2, 1, 3, 4, 5)
        y = _planar(
            blocks.reshape(*blocks.shape[:3], 4 * c), kernel.reshape(2, 2, 4 * c, c), self.dtype
        )
        return y.reshape(b, nz, nx // 2, ny // 2, c) + self.bias[...].astype(self.dtype)


class Doubling(nnx.Module):
    """In-plane transposed convolution of 4 x 4, stride 2, padding 1; kernel [i, j, in, out]."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        scale = (4 * channels) ** -0.5
        self.kernel = nnx.Param(normal(rngs.params(), (4, 4, channels, channels), scale))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b z x y c"]) -> Float[Array, "b z 2*x 2*y c"]:
        # Voxels 2i and 2i + 1 are sums over (i - 1, i) with taps (3, 1) and (i, i + 1) with taps
        # (2, 0): one convolution of 2 x 2 has all four kinds of voxels of a plane.
        b, nz, nx, ny, c = x.shape
        taps = jnp.asarray([[3, 1], [2, 0]])
        # [phase x, tap x, phase y, tap y, c, d] -> [tap x, tap y, c, phases, d]
        kernel = self.kernel[...][taps][:, :, taps].transpose(1, 3, 4, 0, 2, 5)
        x = jnp.pad(x.reshape(b * nz, nx, ny, c), ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = _planar(x, kernel.reshape(2, 2, c, 4 * c), self.dtype)
        y = y.reshape(b * nz, nx + 1, ny + 1, 2, 2, c)
        rows = [
            jnp.stack([y[:, i : nx + i, j : ny + j, i, j] for j in (0, 1)], axis=3) for i in (0, 1)
        ]
        y = jnp.stack(rows, axis=2).reshape(b, nz, 2 * nx, 2 * ny, c)
        return y + self.bias[...].astype(self.dtype)


class _Projection(nnx.Module):
    """Linear layer without bias."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        scale = in_features**-0.5
        self.kernel = nnx.Param(normal(rngs.params(), (in_features, out_features), scale))

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        return jnp.matmul(x, self.kernel[...])


def position_buckets(length: int) -> Int[np.ndarray, "n n"]:
    """Returns the number of each pair's distance in the table of biases, [query, key].

    Half of the numbers are for either direction; the first half of those are exact, the others
    grow with the logarithm of the distance.
    """
    positions = np.arange(length)
    distance = positions[:, None] - positions[None, :]
    half = _BUCKETS // 2
    exact = half // 2
    size = np.abs(distance)
    far = np.log(np.maximum(size, 1) / exact) / math.log(_MAX_DISTANCE / exact) * (half - exact)
    far = np.minimum(exact + far.astype(int), half - 1)
    return np.where(distance < 0, half, 0) + np.where(size < exact, size, far)


def rotated(x: Float[Array, "b n z h d"]) -> Float[Array, "b n z h d"]:
    """Turns each pair of channels by an angle that grows with the position along z."""
    length, width = x.shape[2], x.shape[-1]
    frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)
    angles = jnp.asarray(np.arange(length)[:, None] * frequencies, jnp.float32)[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return pairs.reshape(x.shape)


def _heads(x: Float[Array, "*n c"], heads: int) -> tuple[Array, Array, Array]:
    """Splits projections into queries, keys and values [*n, heads, c / heads / 3]."""
    q, k, v = (part.reshape(*x.shape[:-1], heads, -1) for part in jnp.split(x, 3, axis=-1))
    return q, k, v


def _attend(q: Array, k: Array, v: Array, bias: Array | float) -> Array:
    """Attention along the third axis of [b, m, n, h, d]."""
    logits = jnp.einsum("bmnhd,bmkhd->bmhnk", q * q.shape[-1] ** -0.5, k) + bias
    y = jnp.einsum("bmhnk,bmkhd->bmnhd", jax.nn.softmax(logits, axis=-1), v)
    return y.reshape(*y.shape[:3], -1)


def _planar(x: Array, kernel: Array, dtype: jnp.dtype) -> Array:
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
