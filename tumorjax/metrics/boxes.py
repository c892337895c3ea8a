"""The part of a scan in which something is, and the few sizes that kernels are compiled for."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from tumorjax.metrics.backends import on_accelerator

# Kernels are compiled for boxes of powers of two only, from these sizes on; along z, where masks
# are packed into words, from one word of 32 bits. At worst padding doubles an axis, but up to 1024
# voxels there are no more than 7 sizes for it.
_SMALLEST = (16, 16, 32)

Box = tuple[slice, slice, slice]


def bounding_box(*masks: Shaped[np.ndarray, "x y z"]) -> Box | None:
    """Returns the smallest box that holds all that is not zero, or None if all masks are empty.

    Args:
        *masks: masks or labels [x, y, z], in any memory order.
    """
    low, high = [], []
    for mask in masks:
        box = _box_of_one(mask)
        if box is not None:
            low.append([part.start for part in box])
            high.append([part.stop for part in box])
    if not low:
        return None
    return _slices(np.min(low, axis=0), np.max(high, axis=0))


def bucket(shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns the size that a box of this shape is padded to: larger by one or more on each axis.

    The one is for the dual grid, which has a point more than there are voxels.
    """
    x, y, z = (
        max(smallest, 1 << int(size).bit_length())
        for size, smallest in zip(shape, _SMALLEST, strict=True)
    )
    return x, y, z


def padded_pair(
    truth: Array | np.ndarray, prediction: Array | np.ndarray
) -> tuple[Bool[Array, "bx by bz"], Bool[Array, "bx by bz"], tuple[int, int, int]] | None:
    """Returns two masks cropped to the box about both, each at the low corner of a bucket.

    Masks on an accelerator are cropped there, others on the host.

    Args:
        truth: mask [x, y, z]; what is not zero is inside.
        prediction: mask of the same shape.

    Returns:
        Both crops with zeros around them, and the box's own shape; None if both masks are empty.
    """
    box = common_box(truth, prediction)
    if box is None:
        return None
    shape = _shape(box)
    size = bucket(shape)
    return padded_crop(truth, box, size) != 0, padded_crop(prediction, box, size) != 0, shape


def common_box(*volumes: Array | np.ndarray) -> Box | None:
    """As `bounding_box`, for volumes on the host or on an accelerator, where each is looked at."""
    if not any(on_accelerator(volume) for volume in volumes):
        return bounding_box(*(np.asarray(volume) for volume in volumes))
    from tumorjax.metrics import volume_kernels

    low, high = np.array([volume_kernels.extent(volume) for volume in volumes]).transpose(1, 0, 2)
    first, last = low.min(axis=0), high.max(axis=0)
    return None if (first >= last).any() else _slices(first, last)


def padded_crop(
    volume: Shaped[Array, "x y z"] | Shaped[np.ndarray, "x y z"],
    box: Box,
    size: tuple[int, int, int],
) -> Shaped[Array, "bx by bz"] | Shaped[np.ndarray, "bx by bz"]:
    """Returns the box of a volume at the low corner of an array of `size`, zeros around it."""
    part = _shape(box)
    if on_accelerator(volume):
        from tumorjax.metrics import volume_kernels

        return volume_kernels.crop(volume, [side.start for side in box], part, size)
    crop = np.asarray(volume)[box]
    out = np.zeros(size, crop.dtype)
    out[: part[0], : part[1], : part[2]] = crop
    return out


def _shape(box: Box) -> tuple[int, int, int]:
    x, y, z = (side.stop - side.start for side in box)
    return x, y, z


def _slices(first: Int[np.ndarray, "3"], last: Int[np.ndarray, "3"]) -> Box:
    x, y, z = (slice(int(start), int(stop)) for start, stop in zip(first, last, strict=True))
    return x, y, z


def _box_of_one(mask: np.ndarray) -> Box | None:
    # The axis with the largest stride first, so that memory is read in its order.
    order = sorted(range(3), key=lambda axis: -abs(mask.strides[axis]))
    values = mask.transpose(order)
    first = _occupied(values)
    if not first.any():
        return None
    found = np.flatnonzero(first)
    # Then only what the first axis leaves: most of a scan is outside of any lesion.
    plane = _merged(values[found[0] : found[-1] + 1])
    sides = [found, np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))]
    box = [slice(0, 0)] * 3
    for axis, indices in zip(order, sides, strict=True):
        box[axis] = slice(int(indices[0]), int(indices[-1]) + 1)
    return box[0], box[1], box[2]


def _occupied(values: np.ndarray) -> Bool[np.ndarray, " first"]:
    """Says for each plane of the first axis whether anything in it is not zero."""
    if values.flags.c_contiguous and values.size and values.dtype.kind in "bui":
        rows = values.reshape(len(values), -1).view(np.uint8)
        if not rows.shape[1] % 8:  # eight bytes at a time: as fast as memory is read
            return np.bitwise_or.reduce(rows.view(np.uint64), axis=1).astype(bool)
    return np.asarray(values.any(axis=(1, 2)))


def _merged(values: np.ndarray) -> Bool[np.ndarray, "second third"]:
    """Says for each line along the first axis whether anything in it is not zero."""
    if values.dtype.kind in "bui":
        return np.bitwise_or.reduce(values, axis=0).astype(bool)
    return np.asarray(values.any(axis=0))
