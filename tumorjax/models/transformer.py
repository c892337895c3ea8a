"""Building blocks of networks with attention. Tokens are [..., n, c], volumes [b, x, y, z, c]."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.models.layers import normal, triple


class Dense(nnx.Module):
    """Matrix product over the last axis. Parameters are float32, operands `dtype`.

    Initial weights have the variance of PyTorch's Linear, 1 / (3 in); biases start at 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (in_channels, out_channels)
        self.kernel = nnx.Param(normal(rngs.params(), shape, (3 * in_channels) ** -0.5))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        y = jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class PatchConv(nnx.Module):
    """Convolution whose kernel is its stride: one product per patch of voxels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int | tuple[int, int, int],
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (*triple(size), in_channels, out_channels)
        scale = (3 * math.prod(shape[:4])) ** -0.5
        self.kernel = nnx.Param(normal(rngs.params(), shape, scale))
        self.bias = nnx.Param(jnp.zeros(out_channels))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 d"]:
        kernel = self.kernel[...].astype(self.dtype)
        i, j, k, c, d = kernel.shape
        b, nx, ny, nz, _ = x.shape
        x = x.astype(self.dtype).reshape(b, nx // i, i, ny // j, j, nz // k, k, c)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, nx // i, ny // j, nz // k, i * j * k * c)
        return jnp.matmul(x, kernel.reshape(-1, d)) + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Normalises over the last axis, in float32, with scale and bias."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        y = layer_norm(x.astype(jnp.float32))
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def layer_norm(x: Float[Array, "*b c"], epsilon: float = 1e-5) -> Float[Array, "*b c"]:
    """Normalises over the last axis, in float32, without scale and bias."""
    y = x.astype(jnp.float32)
    centred = y - y.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)


class Mlp(nnx.Module):
    """Two matrix products with a GELU (the exact one) between them."""

    def __init__(self, channels: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear1 = Dense(channels, width, dtype=dtype, rngs=rngs)
        self.linear2 = Dense(width, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return self.linear2(jax.nn.gelu(self.linear1(x), approximate=False))


def attention(
    qkv: Float[Array, "*b n 3c"], heads: int, bias: Float[Array, "#*b #h n n"] | None = None
) -> Float[Array, "*b n c"]:
    """Multi-head attention of every token to all tokens of its group.

    Args:
        qkv: queries, keys and values side by side, each with its heads side by side.
        heads: number of heads.
        bias: added to the scaled products before the softmax.

    Returns:
        The heads' outputs side by side, in qkv's dtype; products and softmax are float32.
    """
    *groups, n, channels = qkv.shape
    size = channels // (3 * heads)
    # Heads before tokens: XLA:CPU multiplies batches of matrices that lie together.
    parts = jnp.moveaxis(qkv.reshape(*groups, n, 3, heads, size), (-3, -2), (0, -3))
    q, k, v = parts[0], parts[1], parts[2]
    scores = jnp.matmul(
        q * jnp.asarray(size**-0.5, q.dtype),
        jnp.swapaxes(k, -1, -2),
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.swapaxes(jnp.matmul(weights, v), -2, -3).reshape(*groups, n, heads * size)


class SelfAttention(nnx.Module):
    """Projections around `attention`."""

    def __init__(
        self, channels: int, heads: int, *, qkv_bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.qkv = Dense(channels, 3 * channels, bias=qkv_bias, **options)
        self.proj = Dense(channels, channels, **options)
        self.heads = heads

    def __call__(
        self, x: Float[Array, "*b n c"], bias: Float[Array, "#*b #h n n"] | None = None
    ) -> Float[Array, "*b n c"]:
        return self.proj(attention(self.qkv(x), self.heads, bias))
