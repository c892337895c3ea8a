"""Building blocks of the segmentation networks. Arrays are [b, x, y, z, c]."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.models.convolution import convolution_of_parts, transposed_convolution

LEAKY_SLOPE = 0.01


def he_normal(key: Array, shape: tuple[int, ...]) -> Array:
    """nnU-Net's initial weights: He's normal for a leaky ReLU of slope 0.01.

    Args:
        key: decides the weights.
        shape: [i, j, k, in, out]; the fan is counted over the first four axes.

    Returns:
        float32 weights of mean 0 and variance 2 / (1 + 0.01^2) / fan.
    """
    return normal(key, shape, (2 / ((1 + LEAKY_SLOPE**2) * math.prod(shape[:4]))) ** 0.5)


def normal(key: Array, shape: tuple[int, ...], scale: float) -> Array:
    """Returns float32 values from a normal distribution of mean 0 and deviation `scale`."""
    words = jax.random.key_data(key)
    if isinstance(words, jax.core.Tracer):
        return jax.random.normal(key, shape) * scale
    # Drawn by numpy: JAX compiles a draw for each shape of a kernel, seconds for a whole network.
    seed = int.from_bytes(np.asarray(words, "<u4").tobytes(), "little")
    draw = np.random.Generator(np.random.Philox(seed))
    return jnp.asarray(draw.standard_normal(shape, np.float32) * np.float32(scale))


class Conv(nnx.Module):
    """Convolution with padding size // 2. Parameters are float32, operands `dtype`.

    Called with several arrays in a tuple, it takes their channels as if they stood side by side.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        *,
        bias: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        size, stride = triple(size), triple(stride)
        self.kernel = nnx.Param(he_normal(rngs.params(), (*size, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if bias else None
        self.stride = stride
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "b x y z c"] | tuple[Float[Array, "b x y z _c"], ...]
    ) -> Float[Array, "b x2 y2 z2 d"]:
        parts = [part.astype(self.dtype) for part in (x if isinstance(x, tuple) else (x,))]
        y = convolution_of_parts(parts, self.kernel[...].astype(self.dtype), self.stride)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class TransposedConv(nnx.Module):
    """Transposed convolution whose kernel is its stride."""

    # PyTorch lays out such a kernel [in, out, ...]; `torch_weights` goes by this.
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | tuple[int, int, int],
        *,
        bias: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (*triple(stride), in_channels, out_channels)
        # PyTorch counts the fan of a transposed kernel over its outputs; nnU-Net inherits that.
        fan_shape = (*shape[:3], out_channels, in_channels)
        self.kernel = nnx.Param(jnp.swapaxes(he_normal(rngs.params(), fan_shape), 3, 4))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 d"]:
        y = transposed_convolution(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class InstanceNorm(nnx.Module):
    """Normalises each channel of each sample over its voxels, in float32, with scale and bias.

    With affine=False it has neither, and no parameters.
    """

    def __init__(self, channels: int, *, epsilon: float = 1e-5, affine: bool = True):
        self.scale = nnx.Param(jnp.ones(channels)) if affine else None
        self.bias = nnx.Param(jnp.zeros(channels)) if affine else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z c"]:
        y = x.astype(jnp.float32)
        centred = y - _voxel_mean(y)
        gain = jax.lax.rsqrt(_voxel_mean(jnp.square(centred)) + self.epsilon)
        if self.scale is None or self.bias is None:
            return (centred * gain).astype(x.dtype)
        return (centred * (self.scale[...] * gain) + self.bias[...]).astype(x.dtype)


def _voxel_mean(x: Float[Array, "b x y z c"]) -> Float[Array, "b 1 1 1 c"]:
    # Along z first: XLA:CPU sums one contiguous axis faster than three at once.
    count = x.shape[1] * x.shape[2] * x.shape[3]
    return (x.sum(axis=3).sum(axis=(1, 2)) / count)[:, None, None, None]


class Fixed(nnx.Variable):
    """A value that training leaves as it is: running statistics, a table of embeddings.

    It is among the parameters, so that checkpoints and weight import carry it; see
    `tumorjax.models.fixed_parameters`.
    """


class ConvNormAct(nnx.Module):
    """Convolution, instance norm and, unless it is the last of a residual block, leaky ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        *,
        bias: bool = True,
        act: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(in_channels, out_channels, size, stride, bias=bias, dtype=dtype, rngs=rngs)
        self.norm = InstanceNorm(out_channels)
        self.act = act

    def __call__(
        self, x: Float[Array, "b x y z c"] | tuple[Float[Array, "b x y z _c"], ...]
    ) -> Float[Array, "b x2 y2 z2 d"]:
        y = self.norm(self.conv(x))
        return leaky_relu(y) if self.act else y


class GroupNorm(nnx.Module):
    """Normalises groups of channels of each sample over its voxels, in float32."""

    def __init__(self, channels: int, groups: int, *, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups = groups
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z c"]:
        y = x.astype(jnp.float32)
        centred = y - self._group_mean(y)
        gain = jax.lax.rsqrt(self._group_mean(jnp.square(centred)) + self.epsilon)
        return (centred * (self.scale[...] * gain) + self.bias[...]).astype(x.dtype)

    def _group_mean(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b 1 1 1 c"]:
        of_channels = _voxel_mean(x)
        groups = of_channels.reshape(*of_channels.shape[:4], self.groups, -1)
        return jnp.repeat(groups.mean(axis=-1), groups.shape[-1], axis=-1)


def leaky_relu(x: Array) -> Array:
    """Leaky ReLU with nnU-Net's slope of 0.01."""
    return jnp.where(x >= 0, x, LEAKY_SLOPE * x)


def average_pool(
    x: Float[Array, "b x y z c"], size: tuple[int, int, int]
) -> Float[Array, "b x2 y2 z2 c"]:
    """Means over blocks of `size` voxels; what does not fill a block is dropped, as in PyTorch."""
    b, *shape, c = x.shape
    fit = [n // s for n, s in zip(shape, size, strict=True)]
    x = x[:, : fit[0] * size[0], : fit[1] * size[1], : fit[2] * size[2]]
    return x.reshape(b, fit[0], size[0], fit[1], size[1], fit[2], size[2], c).mean(axis=(2, 4, 6))


def triple(value: int | tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the value for the three axes."""
    if isinstance(value, int):
        return (value, value, value)
    x, y, z = value
    return (int(x), int(y), int(z))
