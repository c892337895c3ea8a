"""3D convolution with stride 1 as a few 2D convolutions over (y, z), Winograd's along x.

A tile of m neighbouring output planes of a kernel with 3 x taps needs m + 2 products of transformed
input planes and transformed kernels, where the plain sum over taps needs 3 m: half as many at
m = 4, two thirds at m = 2. A product here is a 2D convolution over (y, z), all tiles in its batch.
Both gradients are of the same form: that of the input is the convolution with the mirrored kernel,
that of the kernel takes the transposed transforms.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016; the points
of the transforms are 0, 1, -1, 2, -2 and infinity. In float32 the results differ from the plain sum
by about 1e-6 of their norm, the kernel's gradient by 1e-5 where it sums over many voxels.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# By m: rows are products, columns the planes of a tile (with one of its neighbours at each end).
_INPUT = {
    2: ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    4: (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
}
# Rows are products, columns the kernel's taps.
_KERNEL = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}
# Rows are output planes, columns products.
_OUTPUT = {
    2: ((1, 1, 1, 0), (0, 1, -1, -1)),
    4: ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
}
# Eigen's gradient of a 2D kernel slows down as its batch grows, by a third at 24 images of 48^2:
# it is summed over slabs of so many images, or of more where they hold no more than these pixels.
_SLAB_IMAGES = 6
_SLAB_PIXELS = 4096


def tile_size(planes: int) -> int:
    """Returns how many output planes a tile should have: 4 or 2, whichever multiplies less."""
    return min((4, 2), key=lambda m: (-(-planes // m) * (m + 2), m))


@jax.custom_vjp
def convolve(
    x: Float[Array, "b x y z c"], kernel: Float[Array, "3 j k c d"]
) -> Float[Array, "b x y z d"]:
    """Convolves with stride 1 and padding kernel // 2.

    Args:
        x: the input.
        kernel: weights with 3 x taps and odd sizes along y and z.

    Returns:
        The sums in x's dtype. Transforms and sums are float32 whatever it is.
    """
    m = tile_size(x.shape[1])
    wide = kernel.astype(jnp.float32)
    products = []
    for of_input, of_kernel in zip(_INPUT[m], _KERNEL[m], strict=True):
        # Made one after the other, each input is free again before the next.
        u = _combine(of_input, _tile_planes(x, m))
        products.append(_convolve_planes(u, _combine(of_kernel, list(wide))))
    tiles = jnp.stack([_combine(row, products) for row in _OUTPUT[m]], axis=2)
    return _from_tiles(tiles, x.shape[1]).astype(x.dtype)


def _forward(x, kernel):
    return convolve(x, kernel), (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    mirrored = jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4)
    return convolve(gradient, mirrored), _kernel_gradient(x, kernel, gradient)


convolve.defvjp(_forward, _backward)


def _kernel_gradient(x, kernel, gradient):
    m = tile_size(x.shape[1])
    taps: list[list[Array]] = [[], [], []]
    planes = _output_planes(gradient, m)
    for k, of_input in enumerate(_INPUT[m]):
        u = _combine(of_input, _tile_planes(x, m))
        v = _combine([row[k] for row in _OUTPUT[m]], planes)
        product = _planar_kernel_gradient(u, v, kernel.shape[1:])
        for tap, factor in enumerate(_KERNEL[m][k]):
            if factor:
                # One running sum a tap: products of all k at once would be three times the memory.
                taps[tap] = [sum(taps[tap], start=product * factor)]
    return jnp.stack([total for (total,) in taps]).astype(kernel.dtype)


def _combine(factors: Sequence[float], parts: Sequence[Array]) -> Array:
    """Returns the sum of factor * part, without the terms of factor 0."""
    terms = [
        part if factor == 1 else -part if factor == -1 else factor * part
        for factor, part in zip(factors, parts, strict=True)
        if factor
    ]
    return sum(terms[1:], start=terms[0])


def _tile_planes(x, m: int) -> list[Array]:
    """Returns m + 2 arrays [b, tiles, y, z, c]: the i-th plane of each tile, from -1 on."""
    tiles = -(-x.shape[1] // m)
    x = jnp.pad(x, ((0, 0), (1, m * tiles - x.shape[1] + 1), (0, 0), (0, 0), (0, 0)))
    return [x[:, i : i + m * (tiles - 1) + 1 : m].astype(jnp.float32) for i in range(m + 2)]


def _output_planes(y, m: int) -> list[Array]:
    """Returns m arrays [b, tiles, y, z, d]: the i-th output plane of each tile."""
    tiles = -(-y.shape[1] // m)
    y = jnp.pad(y, ((0, 0), (0, m * tiles - y.shape[1]), (0, 0), (0, 0), (0, 0)))
    return [y[:, i::m].astype(jnp.float32) for i in range(m)]


def _from_tiles(tiles, planes: int):
    """[b, tiles, m, y, z, d] -> [b, planes, y, z, d]."""
    b, count, m, *rest = tiles.shape
    return tiles.reshape(b, count * m, *rest)[:, :planes]


def _convolve_planes(u, kernel):
    b, tiles, ny, nz, c = u.shape
    padding = [(n // 2, n // 2) for n in kernel.shape[:2]]
    y = lax.conv_general_dilated(
        u.reshape(b * tiles, ny, nz, c), kernel, (1, 1), padding, dimension_numbers=_DIMENSIONS
    )
    return y.reshape(b, tiles, ny, nz, -1)


def _planar_kernel_gradient(u, v, shape: tuple[int, ...]):
    """Gradient of a 2D kernel of `shape` [j, k, c, d], summed over slabs of images."""
    b, tiles, ny, nz, c = u.shape
    u, v = u.reshape(b * tiles, ny, nz, c), v.reshape(b * tiles, ny, nz, -1)
    # Padded beforehand: XLA:CPU transposes both for this, and transposes an image with a border
    # about it twice as fast as one whose border the convolution has to think of.
    u = jnp.pad(u, ((0, 0), *((n // 2, n // 2) for n in shape[:2]), (0, 0)))
    zero = jnp.zeros(shape)
    step = max(_SLAB_IMAGES, _SLAB_PIXELS // (ny * nz))
    total = None
    for start in range(0, b * tiles, step):
        image, pull = u[start : start + step], v[start : start + step]
        run: Callable = partial(
            lax.conv_general_dilated,
            image,
            window_strides=(1, 1),
            padding="VALID",
            dimension_numbers=_DIMENSIONS,
        )
        part = jax.vjp(run, zero)[1](pull)[0]
        total = part if total is None else total + part
    return total
