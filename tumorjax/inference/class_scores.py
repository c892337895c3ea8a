"""Class scores on another grid, block by block: which class wins, and how probable classes are.

Interpolation here is one matrix an axis whose rows are weights: none negative, their sum 1. So a
value lies between the least and the largest of those that it is made of, and in a block of voxels
only those classes can win whose largest score there is at least every other class's least one. In
most blocks of a scan that is one class, and there is nothing to compute. Where several can, theirs
are interpolated by small matrix products and compared one after the other. Beside scores and result
there is never more than a few blocks. Blocks are worked on by as many threads as there are cores.

Holding classes x voxels of the scan instead is what exhausts memory elsewhere: nnU-Net's issues
1128, 2014, 2912.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Float32, UInt8

from tumorjax.resampling import one_blas_thread

Weights = Float32[np.ndarray, "new old"]

# New voxels of a block along an axis: enough for BLAS, few enough for a processor's own cache.
BLOCK = 32
# Interpolated in float32, two scores this far apart (relative to their size) may change places.
_ROUNDING = 4e-6
# Below exp(-18) a class's share is 0 in float16, and that of 255 such classes nearly so.
_NEGLIGIBLE = 18.0


class _Band(NamedTuple):
    """Some new voxels of an axis, the old ones that they are made of, and the weights."""

    new: slice
    old: slice
    weights: Weights | None


def best_classes(
    scores: Float[np.ndarray, "a b c classes"], matrices: Sequence[Weights]
) -> UInt8[np.ndarray, "a2 b2 c2"]:
    """Returns the class of the highest score on another grid.

    Args:
        scores: logits or probabilities of at most 256 classes. Best with the class axis outermost
            in memory, as `sliding_window.predict` returns them.
        matrices: for each axis the weights [new, old] with which old voxels make new ones.

    Returns:
        What interpolating every class and then argmax give; the first class where several are
        equal.
    """
    bands = [_bands(matrix) for matrix in matrices]
    result = np.zeros([len(matrix) for matrix in matrices], np.uint8)
    by_class = np.moveaxis(scores, -1, 0)
    assert len(by_class) <= 256, "a label map is uint8"

    def work(first: _Band) -> None:
        slab = np.asarray(by_class[:, first.old], np.float32)
        for second, third, can_win in _blocks(slab, bands, margin=None):
            block = result[first.new, second.new, third.new]
            candidates = np.flatnonzero(can_win).astype(np.uint8)
            block[...] = candidates[0]
            if len(candidates) == 1:
                continue
            best = _interpolated(slab[candidates[0]], first, second, third)
            for candidate in candidates[1:]:
                score = _interpolated(slab[candidate], first, second, third)
                np.copyto(block, candidate, where=score > best)
                np.maximum(best, score, out=best)

    with one_blas_thread(), ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(work, bands[0]):
            pass
    return result


def class_probabilities(
    scores: Float[np.ndarray, "a b c classes"],
    matrices: Sequence[Weights],
    classes: Sequence[int],
    softmax: bool = False,
) -> Iterator[tuple[slice, Float16[np.ndarray, "chosen rows b2 c2"]]]:
    """Yields the probabilities of chosen classes on another grid, slab by slab.

    Args:
        scores: of all classes.
        matrices: for each axis the weights [new, old] with which old voxels make new ones.
        classes: those wanted, as indices into the scores.
        softmax: the scores are logits: they are interpolated, then made probabilities. Otherwise
            they are probabilities, and are interpolated.

    Yields:
        The rows of the new grid's first axis, in order, and the probabilities there.
    """
    bands = [_bands(matrix) for matrix in matrices]
    shape = [len(matrix) for matrix in matrices]
    by_class, classes = np.moveaxis(scores, -1, 0), list(classes)

    def work(first: _Band) -> np.ndarray:
        slab = np.asarray(by_class[:, first.old], np.float32)
        if not softmax:
            slab = slab[classes]
        result = np.zeros((len(classes), first.new.stop - first.new.start, *shape[1:]), np.float16)
        margin = _NEGLIGIBLE if softmax else np.inf
        for second, third, counts in _blocks(slab, bands, margin):
            found = {
                int(c): _interpolated(slab[c], first, second, third) for c in np.flatnonzero(counts)
            }
            if softmax:
                found = _softmax(found)
            for position, index in enumerate(classes):
                part = found.get(index if softmax else position)
                if part is not None:
                    result[position, :, second.new, third.new] = part
        return result

    threads = _threads()
    with ThreadPoolExecutor(threads) as pool:
        # No more slabs at a time than threads: the caller may be slow.
        for low in range(0, len(bands[0]), threads):
            group = bands[0][low : low + threads]
            with one_blas_thread():
                slabs = list(pool.map(work, group))
            for band, slab in zip(group, slabs, strict=True):
                yield band.new, slab


def _softmax(scores: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Makes logits probabilities, in place."""
    largest = np.maximum.reduce(list(scores.values()))
    for score in scores.values():
        score -= largest
        np.exp(score, out=score)
    total = sum(scores.values())
    for score in scores.values():
        score /= total
    return scores


def _blocks(
    slab: Float32[np.ndarray, "classes a b c"], bands: Sequence[list[_Band]], margin: float | None
) -> Iterator[tuple[_Band, _Band, Any]]:
    """Yields the blocks of a slab, and which classes come within the margin of winning there.

    Args:
        slab: all old voxels of some new rows.
        bands: of the three axes.
        margin: None for that of rounding.
    """
    least, largest = slab.min(axis=1), slab.max(axis=1)
    for second in bands[1]:
        low, high = (
            extreme(values[:, second.old], axis=1)
            for extreme, values in ((np.min, least), (np.max, largest))
        )
        for third in bands[2]:
            bottom = low[:, third.old].min(axis=1).max()
            top = high[:, third.old].max(axis=1)
            slack = _ROUNDING * (abs(bottom) + np.abs(top)) if margin is None else margin
            yield second, third, top >= bottom - slack


def _interpolated(
    values: Float32[np.ndarray, "a b c"], *block: _Band
) -> Float32[np.ndarray, "a2 b2 c2"]:
    """Returns one block of one class on the new grid.

    Args:
        values: the class's slab, as long as the first band's old voxels.
        block: the bands of the three axes.
    """
    first, second, third = (band.weights for band in block)
    part = np.ascontiguousarray(values[:, block[1].old, block[2].old])
    if first is not None:
        part = (first @ part.reshape(len(part), -1)).reshape(-1, *part.shape[1:])
    if second is not None:
        part = np.matmul(second, part)
    if third is not None:
        part = np.matmul(part.reshape(-1, part.shape[2]), third.T).reshape(*part.shape[:2], -1)
    # A slab that nothing multiplies is the caller's.
    return part.copy() if np.may_share_memory(part, values) else part


def _bands(matrix: Weights) -> list[_Band]:
    assert (matrix >= 0).all(), "these weights go beyond the values that they are applied to"
    stays = matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix)))
    bands = []
    for start in range(0, len(matrix), BLOCK):
        rows = matrix[start : start + BLOCK]
        used = np.flatnonzero(rows.any(axis=0))
        old = slice(int(used[0]), int(used[-1]) + 1)
        weights = None if stays else np.ascontiguousarray(rows[:, old])
        bands.append(_Band(slice(start, start + len(rows)), old, weights))
    return bands


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
