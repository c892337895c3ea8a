"""All that is kept of one case: its rows, voxel counts, FROC counts and pictures.

This is what worker processes run, on arrays or on files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from tumorjax.errors import CaseError
from tumorjax.evaluation import snapshots
from tumorjax.evaluation.cases import UNION, evaluate_tumors, has_any, label_overlap
from tumorjax.evaluation.masks import read_pair
from tumorjax.evaluation.records import Outcome, keep
from tumorjax.metrics.boxes import bounding_box
from tumorjax.metrics.detection import froc

Labels = Mapping[str, int | Sequence[int]]


class Task(NamedTuple):
    """What all cases of an evaluation share.

    Attributes:
        workdir: where records go.
        labels: label name -> value or values in the masks.
        tumors: those of them that are tumours.
        settings: complete ones.
        thresholds: of the FROC curve, ascending.
        pictures: whether pictures are kept.
        file_labels: what values files of masks may hold.
        table: from the files' values to those of `labels`; None where they are the same.
    """

    workdir: Path
    labels: Labels
    tumors: Labels
    settings: Mapping[str, Any]
    thresholds: tuple[float, ...]
    pictures: bool
    file_labels: Labels
    table: UInt8[np.ndarray, "256"] | None = None


class Probabilities(NamedTuple):
    """What evaluation needs of a network's output.

    Attributes:
        scores: see `cases.tumor_scores`.
        box: outside of it no tumour has a probability as high as the lowest threshold, and no mask
            has a tumour.
        values: of the tumours, in their order, inside the box.
    """

    scores: Mapping[str, float]
    box: tuple[slice, ...]
    values: Float32[np.ndarray, "x y z tumors"]


def measure(
    task: Task,
    names: Mapping[str, str],
    made_from: Mapping[str, Any],
    truth: UInt8[np.ndarray, "x y z"],
    prediction: UInt8[np.ndarray, "x y z"],
    spacing: Sequence[float],
    probabilities: Probabilities | None,
    files: tuple[str, str],
) -> Outcome:
    """Measures one case and keeps its record.

    Args:
        task: what all cases share.
        names: case, patient and split.
        made_from: see `records.keep`.
        truth: label values [x, y, z], RAS+.
        prediction: of the same shape.
        spacing: voxel size (x, y, z), mm.
        probabilities: None where there are only masks.
        files: names of truth and prediction, for the record.
    """
    scores = None if probabilities is None else probabilities.scores
    # Most of a scan has no label; what has is cut out once.
    box = bounding_box(truth, prediction) or (slice(0, 0),) * 3
    masks = truth[box], prediction[box]
    rows = evaluate_tumors(*masks, spacing, task.tumors, task.settings, scores, names)
    result: dict[str, Any] = {
        "case": names["case"],
        "rows": rows,
        "overlap": label_overlap(*masks, task.labels, truth.size),
        "spacing": [float(size) for size in spacing],
        "reference_file": files[0],
        "prediction_file": files[1],
    }
    if probabilities is not None:
        result["froc"] = froc_counts(task, truth, spacing, probabilities)
    if task.pictures and task.tumors:
        result["pictures"] = snapshots.keep(
            task.workdir, names["case"], truth, prediction, spacing, task.tumors, task.settings, box
        )
    keep(task.workdir, names["case"], made_from, result)
    return Outcome(names["case"], fresh=True)


def measure_files(
    task: Task,
    names: Mapping[str, str],
    made_from: Mapping[str, Any],
    truth: Path,
    prediction: Path,
) -> Outcome:
    """Reads the two masks of a case and measures it; a mask that cannot be used is its outcome."""
    try:
        true_mask, predicted_mask, spacing = read_pair(truth, prediction, task.file_labels)
    except CaseError as error:
        found = f"{error.case}: {error.found}"
        case = names["case"]
        return Outcome(case, error=CaseError(case, found, error.action))
    if task.table is not None:
        true_mask, predicted_mask = task.table[true_mask], task.table[predicted_mask]
    files = str(truth), str(prediction)
    return measure(task, names, made_from, true_mask, predicted_mask, spacing, None, files)


def tumor_region(
    truth: UInt8[np.ndarray, "x y z"],
    prediction: UInt8[np.ndarray, "x y z"],
    probabilities: Float32[np.ndarray, "x y z classes"],
    tumors: Mapping[str, int],
    lowest: float,
    scores: Mapping[str, float],
) -> Probabilities:
    """Cuts a network's output down to where any tumour may be, which most often is little.

    Args:
        truth: class indices.
        prediction: class indices.
        probabilities: of background and all classes.
        tumors: tumour name -> its index.
        lowest: the lowest threshold that will be asked for; for the sum of tumours, too.
        scores: see `cases.tumor_scores`.
    """
    indices = list(tumors.values())
    reached = np.zeros(truth.shape, bool)
    for index in indices:
        # Where a sum reaches the threshold, one of its parts reaches its share.
        reached |= probabilities[..., index] >= lowest / len(indices)
    masks = has_any(truth, indices) | has_any(prediction, indices)
    box = bounding_box(reached, masks) or (slice(0, 0),) * 3
    values = np.stack([probabilities[(*box, index)] for index in indices], axis=-1)
    return Probabilities(scores, box, values)


def froc_counts(
    task: Task,
    truth: UInt8[np.ndarray, "x y z"],
    spacing: Sequence[float],
    probabilities: Probabilities,
) -> dict[str, dict[str, Any]]:
    """Returns one scan's counts for the FROC curve of each tumour and of all together.

    Returns:
        Tumour -> n_lesions, and for each threshold detected and false_positives.
    """
    truth = truth[probabilities.box]
    counts: dict[str, dict[str, Any]] = {}
    maps = {
        name: (has_any(truth, value), probabilities.values[..., position])
        for position, (name, value) in enumerate(task.tumors.items())
    }
    if UNION not in maps and len(maps) > 1:
        every = np.logical_or.reduce([mask for mask, _ in maps.values()])
        maps[UNION] = (every, probabilities.values.sum(axis=-1))
    for name, (mask, values) in maps.items():
        curve = froc(
            [mask],
            [values],
            [spacing],
            task.thresholds,
            task.settings["connectivity"],
            task.settings["minimum_mm3"],
        )
        counts[name] = {
            "n_lesions": int(curve.n_lesions),
            "detected": [int(count) for count in curve.detected],
            "false_positives": [int(count) for count in curve.false_positives],
        }
    if UNION not in counts:
        counts[UNION] = next(iter(counts.values()))
    return counts
