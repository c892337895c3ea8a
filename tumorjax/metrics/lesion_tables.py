"""What lesions and candidates share, counted on the host or by a kernel."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32
from scipy import ndimage

from tumorjax.metrics.components import label_components, warn_of_bound
from tumorjax.metrics.lesion_sizes import longest_inplane, longest_of_chords

# Kernels are compiled for tables of these many lesions or candidates; where there are more, or
# where the rows of all lesions would be as many as this, the host counts.
_CAPACITIES = (16, 64, 256, 1024)
_MOST_ROWS = 1 << 27


class LesionTable(NamedTuple):
    """Sizes of lesions and candidates, and the voxels that they share.

    `pairs` has a row (lesion, candidate, voxels) for each two that overlap, numbered from 0.
    """

    lesion_voxels: Int[np.ndarray, " lesions"]
    candidate_voxels: Int[np.ndarray, " candidates"]
    pairs: Int[np.ndarray, "pairs 3"]
    longest_inplane_mm: Float[np.ndarray, " lesions"]

    @property
    def dice(self) -> float:
        """Dice of all lesions and all candidates, 0..1; NaN without any."""
        total = self.lesion_voxels.sum() + self.candidate_voxels.sum()
        return float(2 * self.pairs[:, 2].sum() / total) if total else float("nan")


def empty_table() -> LesionTable:
    """Returns the table of two empty masks."""
    none = np.zeros(0, np.int64)
    return LesionTable(none, none, np.zeros((0, 3), np.int64), np.zeros(0))


def host_table(
    truth: Bool[np.ndarray, "x y z"],
    prediction: Bool[np.ndarray, "x y z"],
    spacing: Sequence[float],
    minimum: float,
    connectivity: int,
) -> tuple[LesionTable, Bool[np.ndarray, "x y z"]]:
    """Counts what lesions and candidates share, on the host.

    Args:
        truth: mask [x, y, z], best cropped to the objects.
        prediction: mask of the same shape.
        spacing: voxel size (x, y, z), mm.
        minimum: candidates of fewer voxels are dropped first.
        connectivity: 6, 18 or 26.

    Returns:
        The table, and the prediction that is left.
    """
    lesions, n_lesions = label_components(truth, connectivity, "host")
    candidates, n_candidates = label_components(prediction, connectivity, "host")
    inside = candidates[prediction]
    sizes = np.bincount(inside, minlength=n_candidates + 1)
    large = sizes >= minimum
    large[0] = False
    if not large[1:].all():
        numbers = np.where(large, np.cumsum(large), 0).astype(np.int32)
        candidates, prediction = candidates.copy(), prediction.copy()
        candidates[prediction] = numbers[inside]
        prediction[prediction] = large[inside]
    return _count(lesions, n_lesions, candidates, int(large.sum()), spacing), prediction


def device_tables(
    truths: Bool[Array, "b x y z"] | Bool[np.ndarray, "b x y z"],
    predictions: Bool[Array, "b x y z"] | Bool[np.ndarray, "b x y z"],
    spacings: Sequence[Sequence[float]],
    minimum: Sequence[float],
    connectivity: int,
) -> tuple[list[LesionTable | None], Bool[Array, "b x y z"]]:
    """Counts what lesions and candidates share, with kernels.

    Args:
        truths: masks, each in its box.
        predictions: masks.
        spacings: voxel size (x, y, z) of each pair, mm.
        minimum: for each pair, candidates of fewer voxels are dropped first.
        connectivity: 6, 18 or 26.

    Returns:
        The tables, None where the bound on steps was hit (the log says so) and the host has to do
        it; and the predictions that are left, on the device.
    """
    from tumorjax.metrics import component_kernels, detection_kernels

    smallest = np.ceil(minimum).astype(np.int32)
    steps = np.int32(component_kernels.STEPS)
    lesions, candidates, counts, done = detection_kernels.label_pairs(
        truths, predictions, smallest, connectivity, steps
    )
    counts, done = np.asarray(counts), np.asarray(done)
    capacity = next((size for size in _CAPACITIES if size >= counts.max()), None)
    rows = len(truths) * truths.shape[1] * truths.shape[3]
    if capacity is not None and capacity * rows <= _MOST_ROWS:
        counted = detection_kernels.tables(lesions, candidates, capacity)
        overlap, sizes, chords = (np.asarray(array) for array in counted)
    else:
        overlap = sizes = chords = None
    tables: list[LesionTable | None] = []
    for index, spacing in enumerate(spacings):
        n_lesions, n_candidates = (int(count) for count in counts[index])
        if not done[index]:
            warn_of_bound(int(steps))
            tables.append(None)
        elif overlap is None:
            labels = np.asarray(lesions[index]), np.asarray(candidates[index])
            tables.append(_count(labels[0], n_lesions, labels[1], n_candidates, spacing))
        else:
            pair = np.nonzero(overlap[index])
            tables.append(
                LesionTable(
                    sizes[index, 0, :n_lesions].astype(np.int64),
                    sizes[index, 1, :n_candidates].astype(np.int64),
                    np.stack([*pair, overlap[index][pair]], axis=1).astype(np.int64),
                    longest_of_chords(chords[index, :n_lesions], spacing),
                )
            )
    return tables, candidates > 0


def _count(
    lesions: Int32[np.ndarray, "x y z"],
    n_lesions: int,
    candidates: Int32[np.ndarray, "x y z"],
    n_candidates: int,
    spacing: Sequence[float],
) -> LesionTable:
    boxes = ndimage.find_objects(lesions) if n_lesions else []
    longest = [
        longest_inplane(lesions[where] == number, spacing)
        for number, where in enumerate(boxes, start=1)
    ]
    in_lesion, in_candidate = lesions[lesions > 0], candidates[candidates > 0]
    at_lesion = candidates[lesions > 0]  # the candidate at each voxel of a lesion
    both = at_lesion > 0
    pair = (in_lesion[both].astype(np.int64) - 1) * n_candidates + at_lesion[both] - 1
    if n_lesions * n_candidates <= 1 << 20:
        voxels = np.bincount(pair, minlength=n_lesions * n_candidates)
        pair = np.flatnonzero(voxels)
        voxels = voxels[pair]
    else:  # in noise, where a table of all pairs would not fit
        pair, voxels = np.unique(pair, return_counts=True)
    divisor = max(n_candidates, 1)
    return LesionTable(
        np.bincount(in_lesion, minlength=n_lesions + 1)[1:],
        np.bincount(in_candidate, minlength=n_candidates + 1)[1:],
        np.stack([pair // divisor, pair % divisor, voxels], axis=1),
        np.array(longest, dtype=np.float64),
    )
