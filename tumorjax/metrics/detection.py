"""Lesions found and missed: matching, sizes, size groups, and the FROC curve.

A lesion is a connected component of the true tumour mask, a candidate one of the predicted mask.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist

from tumorjax.metrics.components import label_components, remove_small
from tumorjax.metrics.overlap import as_mask, as_masks
from tumorjax.metrics.surface import bounding_box

# Rule -> its default threshold. IoU 0.1 is what 3D detection uses (Baumgartner et al., nnDetection,
# 2021): lesions are small and their borders are known to about a voxel.
RULES = {"any": 0.0, "fraction": 0.5, "iou": 0.1}

# Largest radius of each size group, mm (the paper's section 3.2).
SIZE_GROUPS = {"tiny": 5.0, "small": 10.0, "medium": 20.0, "large": float("inf")}

# Even steps, closer at both ends, where a well-trained network has most of its voxels.
THRESHOLDS = (0.01, 0.02, 0.05, *(round(0.1 * step, 1) for step in range(1, 10)), 0.95, 0.98, 0.99)


class LesionMatch(NamedTuple):
    """Which lesions of one scan were found, and which candidates are none.

    All arrays but the last two have one entry a lesion; the last two have one a candidate.
    """

    detected: Bool[np.ndarray, " lesions"]
    volume_mm3: Float[np.ndarray, " lesions"]
    radius_mm: Float[np.ndarray, " lesions"]
    longest_inplane_mm: Float[np.ndarray, " lesions"]
    false_positive: Bool[np.ndarray, " candidates"]
    candidate_mm3: Float[np.ndarray, " candidates"]


def match_lesions(
    truth: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    prediction: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    spacing: Sequence[float],
    rule: str = "any",
    threshold: float | None = None,
    connectivity: int = 26,
    minimum_mm3: float = 0.0,
) -> LesionMatch:
    """Decides which lesions a prediction finds, and which of its candidates are false.

    Rules:
        any: a lesion is found when one predicted voxel lies in it. A candidate that touches no
            lesion is false.
        fraction: a lesion is found when at least `threshold` of its volume is predicted, by however
            many candidates. A candidate that touches no lesion is false.
        iou: lesions and candidates are paired one to one, in the way that gives the largest total
            intersection over union among pairs of at least `threshold`. A lesion with a partner is
            found; a candidate without one is false, so a second hit of the same lesion counts as
            false too.

    Args:
        truth: tumour mask [x, y, z].
        prediction: predicted tumour mask of the same shape.
        spacing: voxel size (x, y, z), mm.
        rule: any, fraction or iou.
        threshold: the rule's share, 0..1; None takes the default in `RULES`.
        connectivity: 6, 18 or 26, for lesions and candidates.
        minimum_mm3: candidates smaller than this are dropped first.

    Raises:
        ValueError: shapes differ, or rule or threshold is unknown.
    """
    threshold = check_rule(rule, threshold)
    truth, prediction = as_masks(truth, prediction)
    box = bounding_box(truth, prediction)
    if box is not None:
        truth, prediction = truth[box], prediction[box]
    voxel = float(np.prod(spacing))
    lesions, n_lesions = label_components(truth, connectivity)
    candidates, n_candidates = label_components(
        remove_small(prediction, minimum_mm3 / voxel, connectivity), connectivity
    )
    lesion_voxels = np.bincount(lesions.ravel(), minlength=n_lesions + 1)[1:]
    candidate_voxels = np.bincount(candidates.ravel(), minlength=n_candidates + 1)[1:]
    overlap = _overlaps(lesions, n_lesions, candidates, n_candidates)
    if rule == "iou":
        union = lesion_voxels[:, None] + candidate_voxels[None] - overlap
        iou = overlap / np.maximum(union, 1)
        iou[(iou < threshold) | (overlap == 0)] = 0
        pairs = linear_sum_assignment(iou, maximize=True)
        paired = [(lesion, candidate) for lesion, candidate in zip(*pairs, strict=True)]
        paired = [pair for pair in paired if iou[pair] > 0]
        detected = np.isin(np.arange(n_lesions), [lesion for lesion, _ in paired])
        false = ~np.isin(np.arange(n_candidates), [candidate for _, candidate in paired])
    else:
        hit = overlap.sum(axis=1)
        detected = (hit > 0) & (hit / np.maximum(lesion_voxels, 1) >= threshold)
        false = overlap.sum(axis=0) == 0
    boxes = ndimage.find_objects(lesions) if n_lesions else []
    longest = [
        longest_inplane(lesions[where] == number, spacing)
        for number, where in enumerate(boxes, start=1)
    ]
    return LesionMatch(
        detected=detected,
        volume_mm3=lesion_voxels * voxel,
        radius_mm=sphere_radius(lesion_voxels * voxel),
        longest_inplane_mm=np.array(longest, dtype=np.float64),
        false_positive=false,
        candidate_mm3=candidate_voxels * voxel,
    )


def check_rule(rule: str, threshold: float | None) -> float:
    """Returns the rule's threshold, the default one for None.

    Raises:
        ValueError: the rule is unknown or the threshold is not a share.
    """
    if rule not in RULES:
        raise ValueError(f"lesion rule is {rule!r}. Expected one of {', '.join(RULES)}")
    threshold = RULES[rule] if threshold is None else float(threshold)
    if not 0 <= threshold <= 1:
        raise ValueError(f"lesion threshold is {threshold}. Expected a share, 0 to 1")
    return threshold


def sphere_radius(volume_mm3: float | Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Returns the radius (mm) of the sphere that has this volume (mm^3)."""
    return np.cbrt(np.asarray(volume_mm3, dtype=np.float64) * 3 / (4 * np.pi))


def longest_inplane(
    lesion: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"], spacing: Sequence[float]
) -> float:
    """Returns a lesion's longest diameter in an axial slice, as RECIST measures it.

    The largest distance between the centres of two pixels of the lesion in one slice, plus the mean
    of the in-plane pixel sizes, since centres lie half a pixel inside on either end. One pixel thus
    has its own width, and a row of n pixels is n pixels long.

    Args:
        lesion: mask [x, y, z] whose slices along z are axial.
        spacing: voxel size (x, y, z), mm.

    Returns:
        Millimetres; 0 for an empty mask.
    """
    lesion = as_mask(lesion)
    x_size, y_size = float(spacing[0]), float(spacing[1])
    longest = -1.0
    for z in np.flatnonzero(lesion.any(axis=(0, 1))):
        rows = lesion[:, :, z]
        x = np.flatnonzero(rows.any(axis=1))
        # The two ends of each row are enough: a pixel between them is nearer to any other.
        first = rows[x].argmax(axis=1)
        last = rows.shape[1] - 1 - rows[x, ::-1].argmax(axis=1)
        ends = np.concatenate([np.stack([x, first], axis=1), np.stack([x, last], axis=1)])
        ends = ends * (x_size, y_size)
        if np.hypot(*(ends.max(axis=0) - ends.min(axis=0))) > longest:
            longest = max(longest, pdist(ends).max())
    return 0.0 if longest < 0 else longest + (x_size + y_size) / 2


def size_group(radius_mm: float) -> str:
    """Returns the size group of a lesion: tiny (radius up to 5 mm), small, medium or large."""
    return next(name for name, largest in SIZE_GROUPS.items() if radius_mm <= largest)


def is_early(
    match: LesionMatch, diameter: str = "sphere", limit_mm: float = 20.0
) -> Bool[np.ndarray, " lesions"]:
    """Says which lesions are early ones: those whose largest diameter is under a limit.

    Args:
        match: from `match_lesions`.
        diameter: "sphere" for that of the sphere of the same volume, "recist" for the longest
            in-plane one.
        limit_mm: the limit, mm; a lesion of exactly this size is not early.

    Raises:
        ValueError: the diameter's name is unknown.
    """
    if diameter not in ("sphere", "recist"):
        raise ValueError(f"early diameter is {diameter!r}. Expected sphere or recist")
    largest = 2 * match.radius_mm if diameter == "sphere" else match.longest_inplane_mm
    return largest < limit_mm


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

    Raises:
        ValueError: the three do not have equally many entries, or a pair's shapes differ.
    """
    ordered = np.unique(np.asarray(thresholds, dtype=np.float64))
    none = np.zeros(len(ordered), np.int64)
    total = Froc(ordered, none, none, 0, 0)
    for truth, probability, spacing in zip(truths, probabilities, spacings, strict=True):
        counts = _froc_scan(truth, probability, spacing, ordered, connectivity, minimum_mm3)
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
) -> Froc:
    truth, probability = as_mask(truth), np.asarray(probability)
    if truth.shape != probability.shape:
        raise ValueError(
            f"truth has shape {truth.shape} and probability {probability.shape}. Both must lie on"
            " the same grid"
        )
    voxel = float(np.prod(spacing))
    box = bounding_box(truth, probability >= thresholds[0]) if len(thresholds) else None
    if box is not None:
        truth, probability = truth[box], probability[box]
    lesions, n_lesions = label_components(truth, connectivity)
    detected, false_positives = np.zeros((2, len(thresholds)), np.int64)
    for index, threshold in enumerate(thresholds):
        mask = remove_small(probability >= threshold, minimum_mm3 / voxel, connectivity)
        candidates, n_candidates = label_components(mask, connectivity)
        detected[index] = np.count_nonzero(np.unique(lesions[mask]))
        true = np.count_nonzero(np.unique(candidates[truth]))
        false_positives[index] = n_candidates - true
    return Froc(thresholds, detected, false_positives, n_lesions, 1)


def _overlaps(
    lesions: Int[np.ndarray, "x y z"],
    n_lesions: int,
    candidates: Int[np.ndarray, "x y z"],
    n_candidates: int,
) -> Int[np.ndarray, "lesions candidates"]:
    """Returns how many voxels each lesion shares with each candidate."""
    both = (lesions > 0) & (candidates > 0)
    pairs = (lesions[both].astype(np.int64) - 1) * n_candidates + candidates[both] - 1
    counts = np.bincount(pairs, minlength=n_lesions * n_candidates)
    return counts.reshape(n_lesions, n_candidates)
