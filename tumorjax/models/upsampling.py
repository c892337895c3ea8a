"""Ways to make a volume of features larger that U-Nets use besides `layers.TransposedConv`."""

import itertools

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from tumorjax.models.layers import he_normal, triple


def upsample_nearest(
    x: Float[Array, "b x y z c"], factor: tuple[int, int, int]
) -> Float[Array, "b x2 y2 z2 c"]:
    """Repeats each voxel `factor` times along each axis, as PyTorch's interpolate("nearest")."""
    b, nx, ny, nz, c = x.shape
    i, j, k = factor
    x = jnp.broadcast_to(x[:, :, None, :, None, :, None], (b, nx, i, ny, j, nz, k, c))
    return x.reshape(b, nx * i, ny * j, nz * k, c)


def upsample_linear(
    x: Float[Array, "b x y z c"], factor: tuple[int, int, int] = (2, 2, 2)
) -> Float[Array, "b x2 y2 z2 c"]:
    """Doubles axes linearly, as PyTorch's interpolate("trilinear", align_corners=False).

    Args:
        x: the features.
        factor: 2 for an axis that is doubled, 1 for one that stays.
    """
    for axis, step in enumerate(factor, start=1):
        if step == 1:
            continue
        # New voxels lie a quarter of an old one from its centre; the border voxels are repeated.
        size = x.shape[axis]
        before, after = (_shifted(x, axis, by) for by in (-1, 1))
        pair = [0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after]
        shape = (*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
        x = jnp.stack(pair, axis + 1).reshape(shape).astype(x.dtype)
    return x


def _shifted(x: Array, axis: int, by: int) -> Array:
    """Returns each voxel's neighbour at distance 1, or -1, along an axis; beyond the border itself.

    Padding and cutting, unlike gathering or joining, cost one voxel of a neighbour's on devices
    that split the axis.
    """
    size = x.shape[axis]
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (max(-by, 0), max(by, 0), 0)
    padded = lax.pad(x, jnp.zeros((), x.dtype), widths)
    moved = lax.slice_in_dim(padded, max(by, 0), max(by, 0) + size, axis=axis)
    at_border = lax.broadcasted_iota(jnp.int32, x.shape, axis) == (0 if by < 0 else size - 1)
    return jnp.where(at_border, x, moved)


class OverlappingTransposedConv(nnx.Module):
    """Transposed convolution of kernel 3 and stride 2 on axes that double, 1 and 1 on others.

    It is PyTorch's ConvTranspose3d(padding=kernel // 2, output_padding=stride - 1).
    """

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | tuple[int, int, int] = 2,
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.stride = triple(stride)
        size = tuple(2 * step - 1 for step in self.stride)
        kernel = he_normal(rngs.params(), (*size, in_channels, out_channels))
        self.kernel = nnx.Param(kernel)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 d"]:
        kernel = self.kernel[...].astype(self.dtype)
        b, nx, ny, nz, _ = x.shape
        # An output between two voxels sees both, one on a voxel sees that one: no product with
        # zeros, and no input-dilated convolution, which is slow on CPUs.
        x = jnp.pad(x.astype(self.dtype), ((0, 0), *((0, s - 1) for s in self.stride), (0, 0)))
        phases = []
        for phase in itertools.product(*(range(step) for step in self.stride)):
            pairs = [_TAPS[step, part] for step, part in zip(self.stride, phase, strict=True)]
            inputs, weights = [], []
            for taps in itertools.product(*pairs):
                (i, p), (j, q), (k, r) = taps
                inputs.append(x[:, i : i + nx, j : j + ny, k : k + nz])
                weights.append(kernel[p, q, r])
            phases.append(
                jnp.matmul(jnp.concatenate(inputs, axis=-1), jnp.concatenate(weights, axis=0))
            )
        y = jnp.stack(phases, axis=4).reshape(b, nx, ny, nz, *self.stride, -1)
        return y.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(
            b, nx * self.stride[0], ny * self.stride[1], nz * self.stride[2], -1
        )


# (stride, which of an input voxel's outputs) -> pairs of (input's offset, kernel's index).
_TAPS = {
    (1, 0): [(0, 0)],
    (2, 0): [(0, 1)],
    (2, 1): [(0, 2), (1, 0)],
}
