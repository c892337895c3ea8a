"""Ways to make a volume of features larger that U-Nets use besides `layers.TransposedConv`."""

import itertools

import jax.numpy as jnp
from flax import nnx
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
        first, last = (jnp.take(x, jnp.array([i]), axis) for i in (0, size - 1))
        before = jnp.concatenate([first, jnp.delete(x, size - 1, axis)], axis)
        after = jnp.concatenate([jnp.delete(x, 0, axis), last], axis)
        pair = [0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after]
        shape = (*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
        x = jnp.stack(pair, axis + 1).reshape(shape).astype(x.dtype)
    return x


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
