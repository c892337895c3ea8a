"""Orientation, spacing and resampling of volumes. Orientation is handled here and nowhere else.

Arrays are [x, y, z], spacings (x, y, z) in mm, affines those of NIfTI: from voxel index to mm in
RAS+, voxel centres at whole indices.

Resampling keeps the physical extent: the outer faces of the first and the last voxel of the new
grid lie on those of the old one. A new axis has round(length / new spacing) voxels, so its true
spacing (`resampled_spacing`) differs from the one asked for by at most half a voxel over the whole
axis. Voxel o of the new axis has its centre at (o + 0.5) * old / new - 0.5 of the old one; beyond
the faces the volume is continued by reflection. Going back to the first shape is the same function.
"""

from collections.abc import Sequence

import nibabel.orientations as orientations
import numpy as np
from jaxtyping import Float, Num, Shaped

from tumorjax.errors import UserError
from tumorjax.label_resampling import label_boxes, resample_labels
from tumorjax.resampling import (
    KERNELS,
    axis_matrix,
    bands_of,
    check_shapes,
    memory_order,
    one_blas_thread,
    slabs,
)

__all__ = [
    "axis_codes",
    "axis_matrix",
    "check_affine",
    "from_canonical",
    "label_boxes",
    "prepare_image",
    "resample",
    "resample_labels",
    "resample_to_shape",
    "resampled_affine",
    "resampled_shape",
    "resampled_spacing",
    "spacing_of",
    "to_canonical",
]

Affine = Float[np.ndarray, "4 4"]
Shape = tuple[int, int, int]

# What a 12-bit scanner can tell apart.
_SCANNER_HU = (-1024, 3071)


# ---------------------------------------------------------------------------- orientation


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Returns the voxel size (x, y, z) in mm of an affine."""
    x, y, z = (float(size) for size in np.linalg.norm(affine[:3, :3], axis=0))
    return x, y, z


def check_affine(affine: Affine) -> None:
    """Checks that an affine is a 4x4 matrix of finite numbers that can be inverted.

    Raises:
        UserError: it is not.
    """
    matrix = np.asarray(affine, np.float64)
    if matrix.shape != (4, 4):
        raise UserError(f"the affine has shape {matrix.shape}. Expected a 4x4 matrix")
    if not np.isfinite(matrix).all():
        raise UserError("the affine has values that are not finite. Mend the file's header")
    sizes = np.linalg.norm(matrix[:3, :3], axis=0)
    # The determinant of the directions: 1 for a right-angled grid, 0 for a singular one.
    if not (sizes > 0).all() or abs(np.linalg.det(matrix[:3, :3] / sizes)) < 1e-3:
        raise UserError(
            "the affine is singular: its three axes do not span the space. Mend the file's header"
        )


def axis_codes(affine: Affine) -> str:
    """Returns where an array's axes point, for instance "LPS".

    Raises:
        UserError: the affine is singular.
    """
    check_affine(affine)
    return "".join(orientations.aff2axcodes(affine))


def to_canonical(
    array: Shaped[np.ndarray, "i j k *channels"], affine: Affine
) -> tuple[Shaped[np.ndarray, "x y z *channels"], Affine]:
    """Turns a volume to RAS+ by flips and exchanges of axes, so no value changes.

    An oblique grid stays oblique: its axes are named by the direction that they are closest to.

    Args:
        array: the first three axes are space.
        affine: of the array.

    Returns:
        The volume [x, y, z], a view of the array given, and its affine.

    Raises:
        UserError: the affine is singular.
    """
    check_affine(affine)
    orientation = orientations.io_orientation(affine)
    turned = orientations.apply_orientation(array, orientation)
    return turned, affine @ orientations.inv_ornt_aff(orientation, array.shape[:3])


def from_canonical(
    array: Shaped[np.ndarray, "x y z *channels"], original_affine: Affine
) -> Shaped[np.ndarray, "i j k *channels"]:
    """Undoes `to_canonical`.

    Args:
        array: a volume in RAS+ on the grid that `to_canonical` gave.
        original_affine: the affine that `to_canonical` was given.

    Returns:
        The volume with its axes as in the original file, a view of the array given.

    Raises:
        UserError: the affine is singular.
    """
    check_affine(original_affine)
    there = orientations.io_orientation(original_affine)
    back = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), there)
    return orientations.apply_orientation(array, back)


# ---------------------------------------------------------------------------- resampling


def resampled_shape(
    shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> Shape:
    """Returns the shape at a new spacing: the physical extent divided by it, rounded, at least 1.

    Raises:
        UserError: a spacing is not positive.
    """
    old, new = np.asarray(spacing, np.float64), np.asarray(new_spacing, np.float64)
    if not ((old > 0) & (new > 0) & np.isfinite(old) & np.isfinite(new)).all():
        raise UserError(f"spacing {spacing} or {new_spacing}: expected positive millimetres")
    x, y, z = (max(1, int(n)) for n in np.floor(np.asarray(shape[:3]) * old / new + 0.5))
    return x, y, z


def resampled_spacing(
    shape: Sequence[int], spacing: Sequence[float], new_shape: Sequence[int]
) -> tuple[float, float, float]:
    """Returns the spacing in mm that the same physical extent has with another shape."""
    x, y, z = (float(s * n / m) for s, n, m in zip(spacing, shape, new_shape, strict=False))
    return x, y, z


def resampled_affine(affine: Affine, shape: Sequence[int], new_shape: Sequence[int]) -> Affine:
    """Returns the affine after resampling to another shape over the same physical extent."""
    ratio = np.asarray(shape[:3], np.float64) / np.asarray(new_shape[:3], np.float64)
    step = np.diag([*ratio, 1.0])
    step[:3, 3] = (ratio - 1) / 2
    return np.asarray(affine, np.float64) @ step


def resample(
    array: Num[np.ndarray, "x y z"],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    order: int = 3,
) -> Num[np.ndarray, "x2 y2 z2"]:
    """Resamples a volume to a new spacing over the same physical extent.

    Args:
        array: volume [x, y, z].
        spacing: its voxel size, mm.
        new_spacing: the voxel size wanted, mm; see `resampled_spacing` for the exact one.
        order: 0 for labels, 1 for linear, 3 for cubic; see `resample_to_shape`.

    Returns:
        float32 for orders 1 and 3, the array's own type for labels.

    Raises:
        UserError: a spacing is not positive, or the order is unknown.
    """
    return resample_to_shape(array, resampled_shape(array.shape, spacing, new_spacing), order)


def resample_to_shape(
    array: Num[np.ndarray, "x y z"], shape: Sequence[int], order: int = 3
) -> Num[np.ndarray, "x2 y2 z2"]:
    """Resamples a volume to another shape over the same physical extent.

    Order 1 is linear interpolation; along an axis that shrinks, the mean of the interpolant over
    each new voxel, so that ramps stay ramps and the volume's mean stays exactly. Order 3 is cubic
    convolution (Keys 1981, a = -1/2), its kernel widened by the ratio along an axis that shrinks,
    which averages what would alias; it keeps edges sharper and may overshoot at them. Order 0 is
    for labels, see `resample_labels`.

    Args:
        array: volume [x, y, z] of any number type.
        shape: the new shape.
        order: 0, 1 or 3.

    Returns:
        float32 for orders 1 and 3, the array's own type for labels. Axes lie in memory in the
        order of the array given.

    Raises:
        UserError: the order is unknown, the array is not 3D or is empty, or the shape is not
            positive.
    """
    if order == 0:
        return resample_labels(array, shape)
    if order not in KERNELS:
        raise UserError(f"resampling order is {order!r}. Expected 0 (labels), 1 or 3")
    new = check_shapes(array, shape)
    memory, back = memory_order(array)
    new = tuple(new[axis] for axis in memory)
    source = array.transpose(memory)
    output = np.empty(new, np.float32)
    if source.shape == new:
        output[...] = source
        return output.transpose(back)
    weights = [bands_of(n, m, order) for n, m in zip(source.shape, new, strict=True)]
    with one_blas_thread():
        for low, high, slab in slabs(source, weights, new):
            output[low:high] = slab
    return output.transpose(back)


def prepare_image(
    image: Num[np.ndarray, "x y z"],
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    window: Sequence[float],
    order: int = 3,
) -> Float[np.ndarray, "x2 y2 z2"]:
    """Makes a scan what networks are trained on: resampled, clipped to a window, scaled to [0, 1].

    Before resampling, HU are limited to those of a 12-bit scanner, -1024 to 3071: the padding and
    the metal beyond (-32768, 30000) would ring into the tissue beside them.

    Args:
        image: HU [x, y, z].
        spacing: its voxel size, mm.
        new_spacing: the one wanted, mm; see `resample`.
        window: HU that become 0 and 1.
        order: 1 for linear, 3 for cubic.

    Returns:
        float32 in [0, 1].

    Raises:
        UserError: a spacing is not positive, or the order is unknown.
    """
    if image.min() < _SCANNER_HU[0] or image.max() > _SCANNER_HU[1]:
        image = np.clip(image, *_SCANNER_HU)
    low, high = float(window[0]), float(window[1])
    resampled = resample(image, spacing, new_spacing, order)
    np.clip(resampled, low, high, out=resampled)
    resampled -= np.float32(low)
    resampled *= np.float32(1 / (high - low))
    # Rounding may end a hair above 1.
    return np.minimum(resampled, 1, out=resampled)
