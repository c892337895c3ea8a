"""The FROC curve: lesions found against false positives per scan, over thresholds."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from tumorjax.metrics.backends import choose, on_accelerator
from tumorjax.metrics.boxes import bounding_box, bucket, common_box, padded_crop
from tumorjax.metrics.components import check_connectivity, label_components, warn_of_bound
from tumorjax.metrics.lesion_tables import smallest_count
from tumorjax.metrics.overlap import as_mask

# Even steps, closer at both ends, where a well-trained network has most of its voxels.
THRESHOLDS = (0.01, 0.02, 0.05, *(round(0.1 * step, 1) for step in range(1, 10)), 0.95, 0.98, 0.99)


class Froc(NamedTuple):
    """Counts over scans, per threshold. Two of them may be added with `add_froc`."""

    thresholds: Float[np.ndarray, " thresholds"]
    detected: Int[np.ndarray, " thresholds"]
    false_positives: Int[np.ndarray, " thresholds"]
    n_lesions: int
    n_scans: int

    @property
    def sensitivity(self) -> Float[np.ndarray, " thresholds"]:
        """Share of all scans' lesions that are found, 0..1; NaN without any lesion."""
        return self.detected / self.n_lesions if self.n_lesions else self.detected * float("nan")

    @property
    def false_positives_per_scan(self) -> Float[np.ndarray, " thresholds"]:
        """Mean number of candidates a scan that touch no lesion; NaN without any scan."""
        if not self.n_scans:
            return self.false_positives * float("nan")
        return self.false_positives / self.n_scans


def froc(
    truths: Iterable[Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"]],
    probabilities: Iterable[Float[Array, "x y z"] | Float[np.ndarray, "x y z"]],
    spacings: Iterable[Sequence[float]],
    thresholds: Sequence[float] = THRESHOLDS,
    connectivity: int = 26,
    minimum_mm3: float = 0.0,
    backend: str = "auto",
) -> Froc:
    """Returns lesion sensitivity against false positives per scan over thresholds.

    At each threshold the voxels of at least that probability form candidates. A lesion that any
    candidate touches is found; a candidate that touches no lesion is a false positive. Scans are
    taken one at a time, so the arguments may be generators; counts of several calls add up with
    `add_froc`.

    Args:
        truths: tumour masks [x, y, z].
        probabilities: tumour probabilities of the same shapes, 0..1.
        spacings: voxel sizes (x, y, z), mm.
        thresholds: probabilities; used in ascending order.
        connectivity: 6, 18 or 26, for lesions and candidates.
        minimum_mm3: candidates smaller than this are dropped.
        backend: host, device or auto; see `backends.choose`.

    Raises:
        ValueError: the three do not have equally many entries, a pair's shapes differ, or
            connectivity or backend is unknown.
    """
    ordered = np.unique(np.asarray(thresholds, dtype=np.float64))
    none = np.zeros(len(ordered), np.int64)
    total = Froc(ordered, none, none, 0, 0)
    for truth, probability, spacing in zip(truths, probabilities, spacings, strict=True):
        counts = _froc_scan(
            truth, probability, spacing, ordered, connectivity, minimum_mm3, backend
        )
        total = add_froc(total, counts)
    return total


def add_froc(first: Froc, second: Froc) -> Froc:
    """Returns the counts of two disjoint groups of scans together.

    Raises:
        ValueError: they were counted at different thresholds.
    """
    if not np.array_equal(first.thresholds, second.thresholds):
        raise ValueError("FROC counts at different thresholds cannot be added")
    return Froc(
        first.thresholds,
        first.detected + second.detected,
        first.false_positives + second.false_positives,
        first.n_lesions + second.n_lesions,
        first.n_scans + second.n_scans,
    )


def operating_point(curve: Froc, sensitivity: float = 0.9) -> int | None:
    """Returns the index of the highest threshold that still has a sensitivity, or None.

    Source: the paper's section 3.1, stage 2 (sensitivity 90 %).
    """
    enough = np.flatnonzero(curve.sensitivity >= sensitivity)
    return int(enough[-1]) if len(enough) else None


def _froc_scan(
    truth: Array | np.ndarray,
    probability: Array | np.ndarray,
    spacing: Sequence[float],
    thresholds: Float[np.ndarray, " thresholds"],
    connectivity: int,
    minimum_mm3: float,
    backend: str,
) -> Froc:
    if np.shape(truth) != np.shape(probability):
        raise ValueError(
            f"truth has shape {np.shape(truth)} and probability {np.shape(probability)}. Both must"
            " lie on the same grid"
        )
    check_connectivity(connectivity)
    minimum = minimum_mm3 / float(np.prod(spacing))
    if choose(backend, truth, probability) == "device":
        found = _on_device(truth, probability, thresholds, connectivity, minimum)
        if found is not None:
            return found
    truth, probability = as_mask(truth), np.asarray(probability)
    box = bounding_box(truth, probability >= thresholds[0]) if len(thresholds) else None
    if box is not None:
        truth, probability = truth[box], probability[box]
    lesions, n_lesions = label_components(truth, connectivity, "host")
    levels = _levels(probability, thresholds)
    detected, false_positives = np.zeros((2, len(thresholds)), np.int64)
    for index in range(len(thresholds)):
        mask = levels > index
        candidates, n_candidates = label_components(mask, connectivity, "host")
        candidate, lesion = candidates[mask], lesions[mask]
        large = np.bincount(candidate, minlength=n_candidates + 1) >= minimum
        candidate, lesion = candidate[large[candidate]], lesion[large[candidate]]
        detected[index] = _distinct(lesion)
        false_positives[index] = _distinct(candidate) - _distinct(candidate[lesion > 0])
    return Froc(thresholds, detected, false_positives, n_lesions, 1)


def _on_device(
    truth: Array | np.ndarray,
    probability: Array | np.ndarray,
    thresholds: Float[np.ndarray, " thresholds"],
    connectivity: int,
    minimum: float,
) -> Froc | None:
    """Returns one scan's counts, or None where the components need the host."""
    from tumorjax.metrics import component_kernels, detection_kernels, volume_kernels

    levels: Array | np.ndarray
    if on_accelerator(probability):
        levels = volume_kernels.probability_levels(probability, thresholds)
    else:
        levels = _levels(np.asarray(probability), thresholds)
    box = common_box(truth, levels)
    if box is None:
        none = np.zeros(len(thresholds), np.int64)
        return Froc(thresholds, none, none, 0, 1)
    size = bucket([side.stop - side.start for side in box])
    steps = component_kernels.STEPS
    counts, n_lesions, done = detection_kernels.froc_counts(
        padded_crop(truth, box, size) != 0,
        padded_crop(levels, box, size),
        np.int32(len(thresholds)),
        smallest_count(minimum),
        connectivity,
        np.int32(steps),
        length=1 << int(len(thresholds) - 1).bit_length(),
    )
    if not done:
        warn_of_bound(steps)
        return None
    found, false = np.asarray(counts)[:, : len(thresholds)].astype(np.int64)
    return Froc(thresholds, found, false, int(n_lesions), 1)


def _levels(
    probability: Float[np.ndarray, "x y z"], thresholds: Float[np.ndarray, " thresholds"]
) -> UInt[np.ndarray, "x y z"]:
    """Returns how many thresholds each probability reaches; the thresholds ascend."""
    levels = np.zeros(probability.shape, np.min_scalar_type(len(thresholds)))
    for threshold in thresholds:
        levels += probability >= threshold
    return levels


def _distinct(labels: Int[np.ndarray, " voxels"]) -> int:
    """Returns how many different labels there are, 0 apart."""
    return int(np.count_nonzero(np.bincount(labels)[1:]))
