"""The arithmetic of resampling: weights per axis, applied in slabs.

Weights are one small matrix per axis, cut into bands, so that all work is matrix products of BLAS.
A volume is worked through in slabs across its slowest axis, and memory beyond input and output is
that of a slab, some tens of MB. See `tumorjax.geometry` for what is offered to others.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Num
from threadpoolctl import threadpool_limits

from tumorjax.errors import UserError

# Output voxels per band of an axis: wide enough for BLAS, narrow enough that few weights are zero.
_BAND = 32
# Voxels of the slab that is worked on; float32, two or three of them at a time.
_SLAB_VOXELS = 4_000_000


def _overlap(distance: np.ndarray, width: float) -> np.ndarray:
    """How much of the voxel at a distance lies in a window of the width."""
    return np.clip((width + 1) / 2 - np.abs(distance), 0, 1)


def _linear(distance: np.ndarray, width: float) -> np.ndarray:
    """The linear interpolant's kernel, averaged over the new voxel where that is the larger."""
    if width <= 1:
        return np.maximum(1 - np.abs(distance), 0)

    def integral(x: np.ndarray) -> np.ndarray:
        x = np.clip(x, -1, 1)
        return np.where(x < 0, (1 + x) ** 2 / 2, 1 - (1 - x) ** 2 / 2)

    return integral(distance + width / 2) - integral(distance - width / 2)


def _cubic(distance: np.ndarray, width: float) -> np.ndarray:
    x = np.abs(distance / width)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


# Order -> kernel(distance in old voxels, width in old voxels), and how far it reaches at a width.
KERNELS: dict[int, tuple[Callable[[np.ndarray, float], np.ndarray], Callable[[float], float]]] = {
    0: (_overlap, lambda width: (width + 1) / 2),
    1: (_linear, lambda width: 1 + width / 2),
    3: (_cubic, lambda width: 2 * width),
}

# One band: its rows (new voxels) and columns (old voxels) of the axis' matrix, and the weights.
Band = tuple[slice, slice, np.ndarray]


def axis_matrix(old: int, new: int, order: int) -> Float[np.ndarray, "new old"]:
    """Returns the weights with which the voxels of an old axis make those of a new one.

    Args:
        old: voxels before.
        new: voxels after, over the same length.
        order: 0 for the shares of the labels (linear where the axis grows, overlap of the voxels
            where it shrinks; the two agree where it stays), 1 for linear, 3 for cubic.

    Returns:
        float32 matrix; each row sums to 1.
    """
    if old == new:
        return np.eye(old, dtype=np.float32)
    ratio = old / new
    width = max(1.0, ratio)
    centre = (np.arange(new) + 0.5) * ratio - 0.5
    kernel, half_width = KERNELS[order]
    half = half_width(width)
    first = np.floor(centre - half).astype(int)
    columns = first[:, None] + np.arange(int(2 * half) + 2)
    distance = columns - centre[:, None]
    weights = kernel(distance, width)
    weights /= weights.sum(axis=1, keepdims=True)
    # Reflection about the outer faces.
    period = columns % (2 * old)
    columns = np.where(period < old, period, 2 * old - 1 - period)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], columns), weights)
    return matrix.astype(np.float32)


def bands_of(old: int, new: int, order: int) -> list[Band] | None:
    """Returns an axis' matrix in bands of rows; None for an axis that stays."""
    return None if old == new else cut_bands(axis_matrix(old, new, order))


def cut_bands(matrix: Float[np.ndarray, "new old"]) -> list[Band]:
    bands = []
    for start in range(0, len(matrix), _BAND):
        rows = matrix[start : start + _BAND]
        used = np.flatnonzero(rows.any(axis=0))
        low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        part = np.ascontiguousarray(rows[:, low:high])
        bands.append((slice(start, start + len(rows)), slice(low, high), part))
    return bands


def one_blas_thread() -> threadpool_limits:
    """Keeps BLAS to one thread: these products are small, and threads that wait for each other cost
    30 times as much processor time on a busy machine."""
    return threadpool_limits(limits=1, user_api="blas")


def _apply(
    array: Float[np.ndarray, "a b c"], bands: list[Band] | None, axis: int
) -> Float[np.ndarray, "a2 b2 c2"]:
    """Multiplies one axis of a float32 volume by its matrix."""
    if bands is None:
        return array
    a, b, c = array.shape
    new = bands[-1][0].stop
    if axis == 0:
        output = np.empty((new, b, c), np.float32)
        for rows, columns, part in bands:
            np.matmul(part, array[columns].reshape(-1, b * c), out=output[rows].reshape(-1, b * c))
    elif axis == 1:
        output = np.empty((a, new, c), np.float32)
        for rows, columns, part in bands:
            np.matmul(part, array[:, columns], out=output[:, rows])
    else:
        output = np.empty((a, b, new), np.float32)
        for rows, columns, part in bands:
            np.matmul(
                array.reshape(a * b, c)[:, columns],
                part.T,
                out=output.reshape(a * b, new)[:, rows],
            )
    return output


def slabs(
    source: Num[np.ndarray, "a b c"], weights: list[list[Band] | None], new: Sequence[int]
) -> Iterator[tuple[int, int, Float[np.ndarray, "rows b2 c2"]]]:
    """Yields the new volume in slabs of its first axis: (first row, last row + 1, slab).

    Each old slice is resampled within its plane once, and kept while later slabs need it.
    """
    # The axis that shrinks most goes first: less is left for the other.
    plane = sorted((1, 2), key=lambda axis: new[axis] / source.shape[axis])

    def in_plane(low: int, high: int) -> np.ndarray:
        step = max(1, _SLAB_VOXELS // (source.shape[1] * source.shape[2]))
        parts = []
        for start in range(low, high, step):
            part = source[start : min(start + step, high)].astype(np.float32, order="C")
            for axis in plane:
                part = _apply(part, weights[axis], axis)
            parts.append(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    first = weights[0]
    if first is None:
        step = max(1, _SLAB_VOXELS // max(source[0].size, new[1] * new[2]))
        for low in range(0, new[0], step):
            yield low, min(low + step, new[0]), in_plane(low, min(low + step, new[0]))
        return
    kept, kept_low = np.empty((0, new[1], new[2]), np.float32), 0
    for rows, columns, part in first:
        low = min(max(columns.start, kept_low), kept_low + len(kept))
        kept = kept[low - kept_low :]
        start = max(columns.start, low + len(kept))
        if len(kept) == 0:
            start = columns.start
        fresh = in_plane(start, columns.stop) if start < columns.stop else kept[:0]
        kept = np.concatenate([kept, fresh]) if len(kept) else fresh
        kept_low = columns.start
        flat = kept[: columns.stop - columns.start].reshape(columns.stop - columns.start, -1)
        yield rows.start, rows.stop, (part @ flat).reshape(-1, new[1], new[2])


def check_shapes(array: np.ndarray, shape: Sequence[int]) -> tuple[int, ...]:
    new = tuple(int(n) for n in shape)
    if array.ndim != 3 or not array.size:
        raise UserError(f"a volume of shape {array.shape} cannot be resampled. Expected [x, y, z]")
    if len(new) != 3 or min(new) < 1:
        raise UserError(f"new shape is {tuple(shape)}. Expected three positive numbers")
    return new


def memory_order(array: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the axes from slowest to fastest in memory, and the order that undoes it."""
    memory = tuple(
        int(axis) for axis in np.argsort([-abs(s) for s in array.strides], kind="stable")
    )
    return memory, tuple(int(axis) for axis in np.argsort(memory))
