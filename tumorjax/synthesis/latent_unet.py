"""The denoiser of tumours in a scan's latents: a small 3D U-Net that is told where and what.

It sees the noisy latent, the latent of the scan with a hole where the tumour will be, and the
tumour's mask at the scan's own resolution: the mask's voxels that lie in one latent voxel are its
channels. A latent voxel is larger than a small tumour, so a mask at the latent's resolution would
say little of where it is and nothing of its shape. Organ, radius and time act on every block.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tumorjax.errors import UserError
from tumorjax.models.layers import Conv, TransposedConv, normal
from tumorjax.synthesis.autoencoder import FACTOR, VoxelNorm
from tumorjax.synthesis.even_convolution import fold

SETTINGS = ("widths", "blocks", "attention_heads", "dtype")
# For latents of 8^3 on a CPU, and of 24^3 on an accelerator.
SMALL: dict[str, Any] = {"widths": (32, 128), "blocks": 1, "attention_heads": 0}
LARGE: dict[str, Any] = {"widths": (96, 192, 384), "blocks": 2, "attention_heads": 8}
PRESETS = {"small": SMALL, "large": LARGE}


class Inputs(NamedTuple):
    """What a denoiser is given.

    Attributes:
        noisy: [b, x, y, z, c] noisy latent.
        time: [b], see `diffusion.network_time`.
        latent: [b, x, y, z, c] latent of the scan with the hole.
        mask: [b, 4x, 4y, 4z] the tumour's voxels, 0 or 1.
        organ: [b] number of the host organ.
        radius_mm: [b] radius of the sphere of the tumour's volume.
        known: [b] whether the denoiser is told organ and radius.
    """

    noisy: Float[Array, "b x y z c"]
    time: Float[Array, " b"]
    latent: Float[Array, "b x y z c"]
    mask: Float[Array, "b X Y Z"]
    organ: Int[Array, " b"]
    radius_mm: Float[Array, " b"]
    known: Bool[Array, " b"]


def create(
    latent_channels: int,
    organs: int,
    *,
    widths: tuple[int, ...] = SMALL["widths"],
    blocks: int = SMALL["blocks"],
    attention_heads: int = SMALL["attention_heads"],
    dtype: jnp.dtype = jnp.float32,
    seed: int = 0,
) -> "LatentUNet":
    """Returns the network with initial weights; its first predictions are 0.

    Args:
        latent_channels: c of the latents.
        organs: how many host organs there are.
        widths: channels of each level; each level has half the voxels along each axis.
        blocks: residual blocks of a level, on the way down and on the way up.
        attention_heads: of the attention between all voxels of the lowest level; 0 for none.
        dtype: of convolutions' operands; parameters are float32.
        seed: of the weights.

    Raises:
        UserError: a setting does not fit.
    """
    widths = tuple(int(width) for width in widths)
    if not widths or any(width % 8 or width < 8 for width in widths) or blocks < 1:
        raise UserError(
            f"model.widths is {widths} and model.blocks {blocks}. Expected multiples of 8, and at"
            " least one block"
        )
    if attention_heads < 0 or (attention_heads and widths[-1] % attention_heads):
        raise UserError(
            f"model.attention_heads is {attention_heads}. Expected 0, or a divisor of the lowest"
            f" level's {widths[-1]} channels"
        )
    return LatentUNet(
        latent_channels, organs, widths, blocks, attention_heads, dtype, nnx.Rngs(seed)
    )


class LatentUNet(nnx.Module):
    """See the module's text. Called with `Inputs`; returns a prediction [b, x, y, z, c]."""

    def __init__(
        self,
        latent_channels: int,
        organs: int,
        widths: tuple[int, ...],
        blocks: int,
        attention_heads: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        embedding = 4 * widths[0]
        self.embed = Embedding(widths[0], embedding, organs, rngs=rngs)
        conv: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.stem = Conv(2 * latent_channels + FACTOR**3, widths[0], 3, **conv)
        self.down: nnx.List = nnx.List([])
        self.shrink: nnx.List = nnx.List([])
        channels = widths[0]
        for level, width in enumerate(widths):
            if level:
                self.shrink.append(Conv(8 * channels, width, 1, **conv))
                channels = width
            self.down.append(
                nnx.List([Block(width, width, embedding, **conv) for _ in range(blocks)])
            )
        self.middle = Block(channels, channels, embedding, **conv)
        self.attention = (
            Attention(channels, attention_heads, rngs=rngs) if attention_heads else None
        )
        self.up: nnx.List = nnx.List([])
        self.grow: nnx.List = nnx.List([])
        for level in reversed(range(len(widths))):
            width = widths[level]
            if level < len(widths) - 1:
                self.grow.append(TransposedConv(channels, width, 2, **conv))
            self.up.append(
                nnx.List(
                    [
                        Block(2 * width if index == 0 else width, width, embedding, **conv)
                        for index in range(blocks)
                    ]
                )
            )
            channels = width
        self.norm = VoxelNorm(channels)
        self.head = Conv(channels, latent_channels, 3, **conv)
        self.head.kernel[...] = jnp.zeros_like(self.head.kernel[...])

    def __call__(self, inputs: Inputs) -> Float[Array, "b x y z c"]:
        check_shape(inputs.noisy.shape[1:4], 2 ** (len(self.down) - 1))
        embedding = self.embed(inputs)
        mask = 2 * fold(inputs.mask[..., None], FACTOR) - 1
        x = self.stem(jnp.concatenate([inputs.noisy, inputs.latent, mask], axis=-1))
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                x = self.shrink[level - 1](fold(x, 2))
            for block in blocks:
                x = block(x, embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        if self.attention is not None:
            x = self.attention(x)
        for level, blocks in enumerate(self.up):
            if level:
                x = self.grow[level - 1](x)
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            for block in blocks:
                x = block(x, embedding)
        return self.head(jax.nn.silu(self.norm(x))).astype(jnp.float32)


class Embedding(nnx.Module):
    """One vector of organ and radius, and where it is `timed`, of the time.

    What is not told has a vector of its own.
    """

    def __init__(self, width: int, out: int, organs: int, *, timed: bool = True, rngs: nnx.Rngs):
        self.time_in = Dense(width, out, rngs=rngs) if timed else None
        self.time_out = Dense(out, out, rngs=rngs) if timed else None
        self.radius_in = Dense(width, out, rngs=rngs)
        self.radius_out = Dense(out, out, rngs=rngs)
        # The last row stands for "not told".
        self.organ = nnx.Param(normal(rngs.params(), (organs + 1, out), 0.5))
        self.width = width

    def __call__(self, inputs: Inputs) -> Float[Array, "b d"]:
        table = self.organ[...]
        organ = jnp.where(inputs.known, inputs.organ, table.shape[0] - 1)
        # Radii from 1 to 100 mm over about as many steps as there are times.
        size = sinusoids(200 * jnp.log(jnp.maximum(inputs.radius_mm, 0.5)), self.width)
        size = self.radius_out(jax.nn.silu(self.radius_in(size)))
        vector = table[organ] + jnp.where(inputs.known[:, None], size, 0.0)
        if self.time_in is None or self.time_out is None:
            return vector
        time = self.time_in(sinusoids(inputs.time, self.width))
        return vector + self.time_out(jax.nn.silu(time))


class Block(nnx.Module):
    """Residual block: norm, SiLU, convolution, twice; the embedding scales and shifts between."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.norm1 = VoxelNorm(in_channels)
        self.conv1 = Conv(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.modulate = Dense(embedding, 2 * out_channels, rngs=rngs)
        self.norm2 = VoxelNorm(out_channels)
        self.conv2 = Conv(out_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        same = in_channels == out_channels
        self.skip = None if same else Conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b x y z c"], embedding: Float[Array, "b d"]
    ) -> Float[Array, "b x y z e"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        scale, shift = jnp.split(self.modulate(jax.nn.silu(embedding)), 2, axis=-1)
        y = self.norm2(y) * (1 + _per_voxel(scale)) + _per_voxel(shift)
        y = self.conv2(jax.nn.silu(y))
        # Both terms have about unit variance; so does their sum.
        return (y + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)


class Attention(nnx.Module):
    """Attention between all voxels, added to what it is given."""

    def __init__(self, channels: int, heads: int, *, rngs: nnx.Rngs):
        self.norm = VoxelNorm(channels)
        self.queries = Dense(channels, 3 * channels, rngs=rngs)
        self.out = Dense(channels, channels, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z c"]:
        b, *shape, c = x.shape
        tokens = self.queries(self.norm(x).reshape(b, math.prod(shape), c))
        q, k, v = jnp.split(tokens.reshape(b, -1, self.heads, 3 * c // self.heads), 3, axis=-1)
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(b, *shape, c)
        return x + self.out(mixed)


class Dense(nnx.Module):
    """Linear layer with bias, in float32."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        scale = in_features**-0.5
        self.kernel = nnx.Param(normal(rngs.params(), (in_features, out_features), scale))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        return jnp.matmul(x, self.kernel[...]) + self.bias[...]


def sinusoids(values: Float[Array, " b"], width: int) -> Float[Array, "b width"]:
    """Sines and cosines of values, at frequencies from 1 to 1/10,000 (Vaswani et al., 2017)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half))
    angles = values[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def check_shape(shape: tuple[int, ...], multiple: int) -> None:
    """Refuses latents that a network cannot halve as often as it does.

    Raises:
        UserError: a side is no multiple.
    """
    if any(size % multiple for size in shape):
        raise UserError(
            f"latents of {'x'.join(map(str, shape))} voxels. The denoiser needs multiples of"
            f" {multiple}: crops of multiples of {FACTOR * multiple}"
        )


def _per_voxel(x: Float[Array, "b c"]) -> Float[Array, "b 1 1 1 c"]:
    return x[:, None, None, None]
