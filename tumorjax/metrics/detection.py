"""Lesions found and missed: which lesions a prediction finds, and which candidates are false.

A lesion is a connected component of the true tumour mask, a candidate one of the predicted mask.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.optimize import linear_sum_assignment

from tumorjax.metrics.backends import choose
from tumorjax.metrics.boxes import bounding_box, padded_pair
from tumorjax.metrics.components import check_connectivity
from tumorjax.metrics.froc import THRESHOLDS, Froc, add_froc, froc, operating_point
from tumorjax.metrics.lesion_sizes import (
    SIZE_GROUPS,
    longest_inplane,
    size_group,
    sphere_radius,
)
from tumorjax.metrics.lesion_tables import LesionTable, device_tables, empty_table, host_table
from tumorjax.metrics.overlap import as_masks, check_shapes

__all__ = [
    "RULES",
    "SIZE_GROUPS",
    "THRESHOLDS",
    "Froc",
    "LesionMatch",
    "add_froc",
    "check_rule",
    "decide",
    "froc",
    "is_early",
    "longest_inplane",
    "match_lesions",
    "operating_point",
    "size_group",
    "sphere_radius",
]

# Rule -> its default threshold. IoU 0.1 is what 3D detection uses (Baumgartner et al., nnDetection,
# 2021): lesions are small and their borders are known to about a voxel.
RULES = {"any": 0.0, "fraction": 0.5, "iou": 0.1}


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
    backend: str = "auto",
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
        backend: host, device or auto; see `backends.choose`.

    Raises:
        ValueError: shapes differ, or rule, threshold, connectivity or backend is not usable.
    """
    threshold = check_rule(rule, threshold)
    check_connectivity(connectivity)
    check_shapes(truth, prediction, ndim=3)
    minimum = minimum_mm3 / float(np.prod(spacing))
    table = None
    if choose(backend, truth, prediction) == "device":
        pair = padded_pair(truth, prediction)
        if pair is None:
            table = empty_table()
        else:
            batch = pair[0][None], pair[1][None]
            (table,), _ = device_tables(*batch, [spacing], [minimum], connectivity)
    if table is None:
        truth, prediction = as_masks(truth, prediction)
        box = bounding_box(truth, prediction)
        if box is not None:
            truth, prediction = truth[box], prediction[box]
        table, _ = host_table(truth, prediction, spacing, minimum, connectivity)
    return decide(table, spacing, rule, threshold)


def decide(
    table: LesionTable, spacing: Sequence[float], rule: str, threshold: float
) -> LesionMatch:
    """Applies a rule of `match_lesions` to what lesions and candidates share.

    Args:
        table: their sizes and overlaps.
        spacing: voxel size (x, y, z), mm.
        rule: any, fraction or iou.
        threshold: the rule's share, 0..1.
    """
    voxel = float(np.prod(spacing))
    lesion, candidate, shared = table.pairs.T
    n_lesions, n_candidates = len(table.lesion_voxels), len(table.candidate_voxels)
    if rule == "iou":
        union = table.lesion_voxels[lesion] + table.candidate_voxels[candidate] - shared
        iou = shared / np.maximum(union, 1)
        enough = iou >= threshold
        # Only lesions and candidates that may be partners: in noise there are thousands of others.
        rows, row = np.unique(lesion[enough], return_inverse=True)
        columns, column = np.unique(candidate[enough], return_inverse=True)
        score = np.zeros((len(rows), len(columns)))
        score[row, column] = iou[enough]
        first, second = linear_sum_assignment(score, maximize=True)
        paired = score[first, second] > 0
        detected = np.isin(np.arange(n_lesions), rows[first[paired]])
        false = ~np.isin(np.arange(n_candidates), columns[second[paired]])
    else:
        hit = np.bincount(lesion, shared, minlength=n_lesions)
        detected = (hit > 0) & (hit / np.maximum(table.lesion_voxels, 1) >= threshold)
        false = np.bincount(candidate, minlength=n_candidates) == 0
    return LesionMatch(
        detected=detected,
        volume_mm3=table.lesion_voxels * voxel,
        radius_mm=sphere_radius(table.lesion_voxels * voxel),
        longest_inplane_mm=table.longest_inplane_mm,
        false_positive=false,
        candidate_mm3=table.candidate_voxels * voxel,
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
