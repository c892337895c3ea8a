"""nnU-Net's way of resampling: splines, slice by slice where a scan's slices are thick.

The same numbers as nnU-Net's resample_data_or_seg_to_shape (nnunetv2 2.8.1, which calls
skimage.transform.resize and scipy.ndimage.map_coordinates), as one matrix an axis: a spline over a
grid is a linear map of each axis alone, so `slabs` and `class_scores` do the work, and no array of
classes x voxels is ever held.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float16, Num, UInt8
from scipy import ndimage

from tumorjax.inference.class_scores import best_classes, class_probabilities
from tumorjax.resampling import Band, cut_bands, memory_order, one_blas_thread, slabs

# A grid is resampled slice by slice where its largest spacing is more than this times its smallest.
ANISOTROPY = 3.0
# Spline weights fall off by 0.27 a voxel; what is smaller than this is no part of float32.
_LEAST_WEIGHT = 1e-8


def separate_axis(
    spacing: Sequence[float], new_spacing: Sequence[float], separate: bool | None = None
) -> int | None:
    """Returns the axis along which slices are resampled on their own, or None.

    Args:
        spacing: of the grid at hand, mm.
        new_spacing: of the grid wanted, mm.
        separate: nnU-Net's force_separate_z; None decides by `ANISOTROPY`, of the old grid first.
    """
    for grid in (spacing, new_spacing):
        largest, smallest = max(grid), min(grid)
        if separate or (separate is None and largest / smallest > ANISOTROPY):
            axes = [axis for axis, size in enumerate(grid) if size == largest]
            # Two thick axes: nnU-Net then resamples all of them alike.
            return axes[0] if len(axes) == 1 else None
    return None


@functools.lru_cache(maxsize=32)
def spline_matrix(old: int, new: int, order: int) -> Float[np.ndarray, "new old"]:
    """Returns the weights with which an axis' old voxels make its new ones.

    Args:
        old: voxels before.
        new: voxels after, over the same length.
        order: of the spline: 0 nearest, 1 linear, 3 cubic. Unlike `resampling.axis_matrix` there
            is no averaging along an axis that shrinks, as nnU-Net has none.

    Returns:
        float32 matrix, each row of which sums to 1; the volume goes on as its border is.
    """
    if order == 0:
        # As scipy.ndimage.map_coordinates rounds.
        index = np.floor((old / new * (np.arange(new) + 0.5) - 0.5) + 0.5).astype(int)
        return np.eye(old, dtype=np.float32)[np.clip(index, 0, old - 1)]
    # What zooming does to each unit vector is the matrix of zooming.
    matrix = ndimage.zoom(np.eye(old), (new / old, 1), order=order, mode="nearest", grid_mode=True)
    matrix[np.abs(matrix) < _LEAST_WEIGHT] = 0
    return matrix.astype(np.float32)


def resample(
    array: Float[np.ndarray, "a b c"],
    shape: Sequence[int],
    axis: int | None,
    order: int = 3,
    order_across: int = 0,
) -> Float[np.ndarray, "a2 b2 c2"]:
    """Resamples an image to another shape as nnU-Net does.

    Args:
        array: float32.
        shape: the new one.
        axis: `separate_axis`; None resamples the three axes alike.
        order: of the spline, within slices where there is a separate axis.
        order_across: of the spline across slices.

    Returns:
        float32, never beyond the range of the array (of the slice, where slices are separate).
    """
    if array.shape == tuple(shape):
        return array
    within = [
        None if n == m or side == axis else _bands(n, m, order)
        for side, (n, m) in enumerate(zip(array.shape, shape, strict=True))
    ]
    between = list(shape)
    if axis is not None:
        between[axis] = array.shape[axis]
    result = _resampled(array, within, between)
    others = None if axis is None else tuple(side for side in range(3) if side != axis)
    keep = axis is not None
    low = array.min(axis=others, keepdims=keep)
    high = array.max(axis=others, keepdims=keep)
    np.clip(result, low, high, out=result)
    if axis is None or between[axis] == shape[axis]:
        return result
    across: list[list[Band] | None] = [None, None, None]
    across[axis] = _bands(between[axis], shape[axis], order_across)
    return _resampled(result, across, shape)


def winners(
    logits: Float[np.ndarray, "a b c classes"],
    shape: Sequence[int],
    axis: int | None,
    order: int = 1,
    order_across: int = 0,
) -> UInt8[np.ndarray, "a2 b2 c2"]:
    """Returns the class of the largest logit on another grid of the same extent.

    Args:
        logits: at the network's spacing.
        shape: of the grid wanted.
        axis: `separate_axis`.
        order: of the logits' interpolation, 0 or 1.
        order_across: across slices, 0 or 1.
    """
    return best_classes(logits, _matrices(logits, shape, axis, order, order_across))


def probabilities(
    logits: Float[np.ndarray, "a b c classes"],
    shape: Sequence[int],
    axis: int | None,
    classes: Sequence[int],
    order: int = 1,
    order_across: int = 0,
) -> Iterator[tuple[slice, Float16[np.ndarray, "chosen rows b2 c2"]]]:
    """Yields the probabilities of chosen classes on another grid, in slabs of the first axis.

    Args:
        classes: those wanted, as indices into the logits.
        logits, shape, axis, order, order_across: as for `winners`.

    Yields:
        The slab's place, in order, and its probabilities.
    """
    matrices = _matrices(logits, shape, axis, order, order_across)
    return class_probabilities(logits, matrices, classes, softmax=True)


def _matrices(
    logits: Float[np.ndarray, "a b c classes"],
    shape: Sequence[int],
    axis: int | None,
    order: int,
    order_across: int,
) -> list[Float[np.ndarray, "new old"]]:
    _check_orders(order, order_across)
    return [
        spline_matrix(old, new, order_across if side == axis else order)
        for side, (old, new) in enumerate(zip(logits.shape[:3], shape, strict=True))
    ]


def _check_orders(*orders: int) -> None:
    assert set(orders) <= {0, 1}, "beyond linear, values would have to be clipped"


def painted(
    logits: Float[np.ndarray, "a b c regions"],
    values: Sequence[int],
    shape: Sequence[int],
    axis: int | None,
    order: int = 1,
    order_across: int = 0,
) -> UInt8[np.ndarray, "a2 b2 c2"]:
    """Returns a label map of overlapping regions: each is painted over those before it.

    Args:
        logits: a region is where its sigmoid is above a half.
        values: that the regions are painted with (nnU-Net's regions_class_order).
        shape, axis, order, order_across: as for `winners`.
    """
    result = np.zeros(tuple(shape), np.uint8)
    for where, parts in _slabs_of_classes(logits, shape, axis, order, order_across):
        target = where(result)
        for value, part in zip(values, parts, strict=True):
            target[part > 0] = value
    return result


def _slabs_of_classes(
    logits: Float[np.ndarray, "a b c classes"],
    shape: Sequence[int],
    axis: int | None,
    order: int,
    order_across: int,
) -> Any:
    """Yields (view of the same slab in an array of `shape`, each class's values there)."""
    _check_orders(order, order_across)
    weights = [
        None if n == m else _bands(n, m, order_across if side == axis else order)
        for side, (n, m) in enumerate(zip(logits.shape[:3], shape, strict=True))
    ]
    memory, back = memory_order(logits[..., 0])
    turned = logits.transpose(*memory, 3)
    new = [shape[side] for side in memory]
    weights = [weights[side] for side in memory]
    with one_blas_thread():
        classes = [slabs(turned[..., c], weights, new) for c in range(logits.shape[-1])]
        for parts in zip(*classes, strict=True):
            low, high = parts[0][:2]
            yield (
                lambda array, low=low, high=high: array.transpose(memory)[low:high],
                [part for _, _, part in parts],
            )


def _bands(old: int, new: int, order: int) -> list[Band]:
    return cut_bands(spline_matrix(old, new, order))


def _resampled(
    array: Num[np.ndarray, "a b c"], weights: Sequence[list[Band] | None], shape: Sequence[int]
) -> Float[np.ndarray, "a2 b2 c2"]:
    memory, back = memory_order(array)
    new = [shape[side] for side in memory]
    output = np.empty(new, np.float32)
    with one_blas_thread():
        source = array.transpose(memory)
        for low, high, slab in slabs(source, [weights[side] for side in memory], new):
            output[low:high] = slab
    return output.transpose(back)
