"""What augmentation does to one scan's intensities, as functions of their parameters.

All work on one volume [x, y, z] of any intensity scale and are batched by `jax.vmap`. Random
choices are made in `augmentation`; here everything but the noise is a plain function. Each does
what the transform of the same name in batchgeneratorsv2 (nnU-Net's) does.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Volume = Float[Array, "x y z"]
Scalar = Float[Array, ""]

# A flat patch has no range to scale by; batchgeneratorsv2 divides by this instead.
_LEAST_SPREAD = 1e-7


def add_noise(key: Key[Array, ""], image: Volume, std: Scalar | float) -> Volume:
    """Adds white Gaussian noise.

    Args:
        key: the noise's.
        image: [x, y, z].
        std: of the noise, in the image's unit.
    """
    return image + std * jax.random.normal(key, image.shape, image.dtype)


def blur(image: Volume, sigma: Float[Array, "3"], largest_sigma: float) -> Volume:
    """Smooths with a Gaussian along each axis; the volume is reflected at its borders.

    As in batchgeneratorsv2 a kernel is sampled at whole voxels, cut off at about three sigma (an
    odd width next to 6 sigma + 0.5) and normalised.

    Args:
        image: [x, y, z].
        sigma: for each axis, voxels.
        largest_sigma: that `sigma` can have: fixes the size of the computation.
    """
    reach = int(np.floor(3 * largest_sigma + 0.25))
    taps = np.arange(-reach, reach + 1)
    matrices = []
    for axis, size in enumerate(image.shape):
        used = jnp.abs(taps) <= jnp.floor(3 * sigma[axis] + 0.25)
        weights = jnp.where(used, jnp.exp(-0.5 * (taps / sigma[axis]) ** 2), 0)
        weights = weights / weights.sum()
        matrices.append(jnp.einsum("k,kij->ij", weights, _shifts(size, reach)))
    return _along_axes(image, matrices)


def low_resolution(image: Volume, scale: Scalar) -> Volume:
    """Reduces the resolution and brings the volume back to its size.

    The reduction takes the nearest voxel (as a scanner's coarse grid would, without smoothing),
    the return is trilinear, with torch's grids ("nearest-exact", align_corners False). The reduced
    size round(scale * size) differs from sample to sample, while a compiled program has fixed
    shapes; but both steps are linear and act on each axis by itself, so that together they are one
    square matrix an axis, with two entries a row, and no reduced volume is made.

    Args:
        image: [x, y, z].
        scale: of the resolution, above 0 and at most 1.
    """
    matrices = []
    for size in image.shape:
        reduced = jnp.maximum(jnp.round(scale * size), 1)
        place = jnp.maximum((jnp.arange(size) + 0.5) * (reduced / size) - 0.5, 0)
        lower = jnp.floor(place)
        upper = jnp.minimum(lower + 1, reduced - 1)
        share = (place - lower)[:, None]

        def nearest(index: Float[Array, "n"], reduced=reduced, size=size) -> Float[Array, "n m"]:
            source = jnp.minimum(jnp.floor((index + 0.5) * (size / reduced)), size - 1)
            return jax.nn.one_hot(source.astype(jnp.int32), size, dtype=image.dtype)

        matrices.append((1 - share) * nearest(lower) + share * nearest(upper))
    return _along_axes(image, matrices)


def brightness(image: Volume, factor: Scalar, center: Scalar | float) -> Volume:
    """Multiplies intensities by a factor, as seen from `center` (nnU-Net's zero)."""
    return center + factor * (image - center)


def contrast(image: Volume, factor: Scalar) -> Volume:
    """Stretches intensities about their mean and cuts them off at their former range."""
    mean = image.mean()
    return jnp.clip(mean + factor * (image - mean), image.min(), image.max())


def gamma(image: Volume, exponent: Scalar, invert: bool) -> Volume:
    """Raises intensities, scaled to [0, 1] by their range, to a power; mean and std are kept.

    Args:
        image: [x, y, z].
        exponent: above 1 darkens what lies in between.
        invert: whether the negative image is changed, so that the bright end is spread instead.
    """
    if invert:
        return -gamma(-image, exponent, invert=False)
    low, span = image.min(), image.max() - image.min()
    # Rounding must not make a base negative, whose power is not a number.
    base = jnp.clip((image - low) / jnp.maximum(span, _LEAST_SPREAD), 0, 1)
    changed = base**exponent * span + low
    ratio = image.std() / jnp.maximum(changed.std(), _LEAST_SPREAD)
    return (changed - changed.mean()) * ratio + image.mean()


def _shifts(size: int, reach: int) -> Float[np.ndarray, "taps n n"]:
    """Returns matrices that shift an axis by -reach..reach voxels, reflecting at the border."""
    reflected = np.pad(np.arange(size), reach, mode="reflect")
    source = np.stack([reflected[k : k + size] for k in range(2 * reach + 1)])
    return (source[:, :, None] == np.arange(size)).astype(np.float32)


def _along_axes(image: Volume, matrices: list[Float[Array, "n n"]]) -> Volume:
    """Applies one matrix to each axis. Accelerators would otherwise round the operands."""
    x, y, z = matrices
    precision = jax.lax.Precision.HIGHEST
    image = jnp.einsum("ax,xyz->ayz", x, image, precision=precision)
    image = jnp.einsum("by,xyz->xbz", y, image, precision=precision)
    return jnp.einsum("cz,xyz->xyc", z, image, precision=precision)
