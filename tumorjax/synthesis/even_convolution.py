"""Convolutions with kernels of even size, as autoencoders halve and double resolution with them.

XLA's CPU backend is slow at strided and input-dilated 3D convolutions, and slower still at their
gradients. Here neither occurs: voxels are folded in blocks of 2^3 first, or unfolded afterwards,
and what is left has stride 1; on CPU that is one 2D convolution (see models/convolution.py).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tumorjax import backend


def halving(
    padded: Float[Array, "b x+2 y+2 z+2 c"], kernel: Float[Array, "4 4 4 c d"]
) -> Float[Array, "b x/2 y/2 z/2 d"]:
    """Convolves with stride 2, without a strided convolution, whose gradient is slow on CPUs.

    Voxels are gathered in blocks of 2^3; of those it is a 2^3 convolution with stride 1.

    Args:
        padded: the input with its border of one voxel; even sizes.
        kernel: the weights.
    """
    c, d = kernel.shape[-2:]
    taps = kernel.reshape(2, 2, 2, 2, 2, 2, c, d).transpose(0, 2, 4, 1, 3, 5, 6, 7)
    return convolution(fold(padded), taps.reshape(2, 2, 2, 8 * c, d))


def doubling(
    padded: Float[Array, "b x+2 y+2 z+2 c"], kernel: Float[Array, "4 4 4 c d"]
) -> Float[Array, "b 2*x 2*y 2*z d"]:
    """Convolves transposed with stride 2, without an input-dilated convolution.

    Two outputs lie between the centres of two neighbouring inputs and see both: of a 2^3
    convolution with 8 d channels each output voxel is one.

    Args:
        padded: the input with its border of one voxel.
        kernel: the weights.
    """
    c, d = kernel.shape[-2:]
    # Of inputs p - 1 and p, the outputs 2p - 1 and 2p take the kernel's elements (2, 0) and (3, 1).
    taps = kernel.reshape(2, 2, 2, 2, 2, 2, c, d)[::-1, :, ::-1, :, ::-1]
    taps = taps.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(2, 2, 2, c, 8 * d)
    return unfold(convolution(padded, taps))[:, 1:-1, 1:-1, 1:-1]


def fold(x: Float[Array, "b x y z c"], factor: int = 2) -> Float[Array, "b x2 y2 z2 d"]:
    """Lays the voxels of each block of factor^3 side by side in the channels of one."""
    b, *shape, c = x.shape
    nx, ny, nz = (size // factor for size in shape)
    blocks = x.reshape(b, nx, factor, ny, factor, nz, factor, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return blocks.reshape(b, nx, ny, nz, factor**3 * c)


def unfold(x: Float[Array, "b x y z 8*c"]) -> Float[Array, "b 2*x 2*y 2*z c"]:
    """Undoes `fold` by 2."""
    b, nx, ny, nz, c = x.shape
    blocks = x.reshape(b, nx, ny, nz, 2, 2, 2, c // 8).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return blocks.reshape(b, 2 * nx, 2 * ny, 2 * nz, c // 8)


def convolution(
    x: Float[Array, "b x y z c"], kernel: Float[Array, "i j k c d"]
) -> Float[Array, "b x2 y2 z2 d"]:
    """Convolves with stride 1 and without padding; the kernel may have any size."""
    if backend.platform() != "cpu":
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), "VALID", dimension_numbers=("NXYZC", "XYZIO", "NXYZC")
        )
    size, count = kernel.shape[0], x.shape[1] - kernel.shape[0] + 1
    taps = jnp.concatenate([x[:, i : i + count] for i in range(size)], axis=-1)
    b, nx, ny, nz, c = taps.shape
    planar = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], c, kernel.shape[-1])
    y = jax.lax.conv_general_dilated(
        taps.reshape(b * nx, ny, nz, c),
        planar,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(b, nx, *y.shape[1:])


def pad(x: Float[Array, "b x y z c"], padding: str, width: int = 1) -> Float[Array, "b x2 y2 z2 c"]:
    """Puts a border of `width` voxels about x: of "zeros", or "replicate", its outermost voxels."""
    mode = "constant" if padding == "zeros" else "edge"
    return jnp.pad(x, ((0, 0), *[(width, width)] * 3, (0, 0)), mode=mode)
