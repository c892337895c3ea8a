"""What augmentation does to a scan's geometry: rotation with scaling, and mirroring.

All work on one volume [x, y, z] and are batched by `jax.vmap`. Random choices are made in
`augmentation`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

Volume = Float[Array, "x y z"]
Label = UInt8[Array, "x y z"]
Matrix = Float[Array, "3 3"]


def rotated_extent(patch_size: Sequence[int], degrees: float, scale: float) -> tuple[int, int, int]:
    """Returns the size to crop so that a rotated patch is still filled (mostly).

    nnU-Net's get_patch_size: the largest reach of the patch's corner under a rotation by the
    largest angle about one axis at a time, divided by the least scale.

    Args:
        patch_size: (x, y, z) voxels that remain.
        degrees: the largest angle; at most 90 count.
        scale: the size is divided by it.
    """
    corner = np.asarray(patch_size, float)
    angle = np.deg2rad(min(abs(degrees), 90))
    extent = corner.copy()
    for axis in range(3):
        angles = [angle if i == axis else 0.0 for i in range(3)]
        # batchgenerators multiplies row vectors, which is the rotation the other way.
        turned = corner @ np.asarray(_rotation(np.cos(angles), np.sin(angles)))
        extent = np.maximum(extent, np.abs(turned))
    x, y, z = (int(size) for size in extent / scale)
    return x, y, z


def affine_matrix(radians: Float[Array, "3"], scale: Float[Array, ""]) -> Matrix:
    """Returns the matrix from the patch's voxels to the source's, both from their centres.

    Args:
        radians: rotation about x, then y, then z.
        scale: above 1 the patch covers more of the source: things become smaller.
    """
    return jnp.array(_rotation(jnp.cos(radians), jnp.sin(radians))) * scale


def center_crop(volume: Array, patch_size: Sequence[int]) -> Array:
    """Cuts a patch out of the middle of a volume's first three axes, without interpolation."""
    return volume[
        tuple(
            slice(size // 2 - patch // 2, size // 2 - patch // 2 + patch)
            for size, patch in zip(volume.shape, patch_size, strict=False)
        )
    ]


def resample(
    image: Volume, label: Label, matrix: Matrix, patch_size: Sequence[int]
) -> tuple[Volume, Label]:
    """Samples a patch through an affine map about the centres: trilinear, labels nearest.

    Outside the source there is air (0) and background. Coordinates are those of torch's
    grid_sample with align_corners False, and for the image so is the result.

    Args:
        image: [x, y, z] source.
        label: [x, y, z] source.
        matrix: from `affine_matrix`.
        patch_size: voxels (x, y, z) to sample.

    Returns:
        The patch's image and label.
    """
    offsets = [jnp.arange(size) - (size - 1) / 2 for size in patch_size]
    x, y, z = offsets[0][:, None, None], offsets[1][:, None], offsets[2]
    places = [
        row[0] * x + row[1] * y + row[2] * z + (size - 1) / 2
        for row, size in zip(matrix, image.shape, strict=True)
    ]
    lower = [jnp.floor(place) for place in places]
    share = [place - low for place, low in zip(places, lower, strict=True)]
    index = [low.astype(jnp.int32) for low in lower]
    flat_image, flat_label = image.reshape(-1), label.reshape(-1)

    sampled = jnp.zeros(tuple(patch_size), image.dtype)
    for corner in np.ndindex(2, 2, 2):
        place, inside = _flat_index(
            [i + step for i, step in zip(index, corner, strict=True)], image.shape
        )
        weight = jnp.ones((), image.dtype)
        for fraction, step in zip(share, corner, strict=True):
            weight = weight * (fraction if step else 1 - fraction)
        sampled += jnp.where(inside, weight, 0) * flat_image[place]

    nearest = [
        i + (fraction >= 0.5).astype(jnp.int32) for i, fraction in zip(index, share, strict=True)
    ]
    place, inside = _flat_index(nearest, image.shape)
    return sampled, jnp.where(inside, flat_label[place], 0)


def mirror(
    image: Volume,
    label: Label,
    axes: Sequence[int],
    flip: Bool[Array, "axes"],
    mirror_table: UInt8[np.ndarray, "classes+1"] | None,
) -> tuple[Volume, Label]:
    """Mirrors along some axes; across x the classes of left and right organs swap.

    Args:
        image: [x, y, z].
        label: [x, y, z] class indices.
        axes: that can be mirrored.
        flip: whether each of them is.
        mirror_table: class index after mirroring x, from `anatomy.mirror_table`.
    """
    for number, axis in enumerate(axes):
        image = jnp.where(flip[number], jnp.flip(image, axis), image)
        label = jnp.where(flip[number], jnp.flip(label, axis), label)
    if 0 in axes and mirror_table is not None:
        # XLA would otherwise work out the flips anew for each class that swaps: 10 times slower.
        label = swapped = jax.lax.optimization_barrier(label)
        for old, new in enumerate(np.asarray(mirror_table).tolist()):
            if old != new:
                swapped = jnp.where(label == old, jnp.uint8(new), swapped)
        label = jnp.where(flip[tuple(axes).index(0)], swapped, label)
    return image, label


def _rotation(cos: Any, sin: Any) -> list[list]:
    """Returns Rz Ry Rx for the cosines and sines of the three angles."""
    (a, b, c), (d, e, f) = cos, sin
    return [
        [c * b, c * e * d - f * a, c * e * a + f * d],
        [f * b, f * e * d + c * a, f * e * a - c * d],
        [-e, b * d, b * a],
    ]


def _flat_index(index: Sequence[Array], shape: Sequence[int]) -> tuple[Array, Array]:
    """Returns the position in the flattened volume, and whether it is inside."""
    inside = jnp.ones((), bool)
    flat = jnp.zeros((), jnp.int32)
    for i, size in zip(index, shape, strict=True):
        inside = inside & (i >= 0) & (i < size)
        flat = flat * size + jnp.clip(i, 0, size - 1)
    return flat, inside
