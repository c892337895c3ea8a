"""Numbers of one case: overlap, surfaces, lesions found and missed, for each tumour and for all."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from tumorjax import anatomy
from tumorjax.errors import UserError
from tumorjax.evaluation.settings import complete_settings
from tumorjax.evaluation.summary import CASE_COLUMNS
from tumorjax.metrics.batch import Comparison, compare_masks
from tumorjax.metrics.boxes import bounding_box
from tumorjax.metrics.components import remove_small
from tumorjax.metrics.detection import SIZE_GROUPS, is_early, size_group

# The class that unites all tumour classes.
UNION = "tumor"


def evaluate_case(
    truth: UInt8[Array, "x y z"] | UInt8[np.ndarray, "x y z"],
    prediction: UInt8[Array, "x y z"] | UInt8[np.ndarray, "x y z"],
    spacing: Sequence[float],
    classes: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any] | None = None,
    probabilities: Float[Array, "x y z classes"] | Float[np.ndarray, "x y z classes"] | None = None,
    *,
    case: str = "",
    patient: str | None = None,
    split: str = "",
) -> list[dict[str, Any]]:
    """Returns the numbers of one scan: a row for each tumour class, and one for all together.

    Predicted components under the minimum size are dropped first, class by class, so that all
    numbers speak of the same mask. A lesion of the class "tumor" is a component of all tumour
    classes united: found under another tumour's name counts as found there.

    Args:
        truth: class indices [x, y, z], 0 is background.
        prediction: class indices of the same shape.
        spacing: voxel size (x, y, z), mm.
        classes: the task: class name -> label names, in the order of the indices 1, 2, ...
        settings: see `settings.DEFAULTS`, which fills in what is absent.
        probabilities: [x, y, z, 1 + number of classes]; without them scores are undefined.
        case: the case's id, for the row.
        patient: the patient's id; None takes the case's.
        split: id or ood, for the row.

    Returns:
        Dictionaries with `CASE_COLUMNS`. dsc and nsd are percent, score is the highest tumour
        probability of the scan (0..1), undefined values are None. Empty if the task has no tumour.

    Raises:
        ValueError: shapes differ.
        UserError: a setting is not usable.
    """
    tumors = anatomy.tumor_classes(classes)
    return evaluate_tumors(
        truth,
        prediction,
        spacing,
        tumors,
        complete_settings(settings),
        None if probabilities is None else tumor_scores(probabilities, tumors),
        {"case": case, "patient": patient or case, "split": split},
    )


def evaluate_tumors(
    truth: Array | np.ndarray,
    prediction: Array | np.ndarray,
    spacing: Sequence[float],
    tumors: Mapping[str, int | Sequence[int]],
    settings: Mapping[str, Any],
    scores: Mapping[str, float] | None,
    names: Mapping[str, str],
) -> list[dict[str, Any]]:
    """As `evaluate_case`, for any labels.

    Args:
        truth: label values [x, y, z].
        prediction: label values of the same shape.
        spacing: voxel size (x, y, z), mm.
        tumors: a tumour's name -> its value in the masks, or the values that it unites.
        settings: complete ones.
        scores: see `tumor_scores`; None where there are only masks.
        names: the rows' case, patient and split.
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.shape != prediction.shape:
        raise ValueError(f"truth has shape {truth.shape}, prediction {prediction.shape}")
    if not tumors:
        return []
    if UNION in tumors and len(tumors) > 1:
        raise UserError(
            f"a tumour class is called {UNION!r}, the name for all tumours together, and there are"
            f" others ({', '.join(tumors)}). Rename it"
        )
    values = np.unique(np.hstack(list(tumors.values())))
    box = bounding_box(has_any(truth, values), has_any(prediction, values))
    box = box or (slice(0, 0), slice(0, 0), slice(0, 0))
    truth, prediction = truth[box], prediction[box]
    minimum = settings["minimum_mm3"] / float(np.prod(spacing))

    masks = [
        remove_small(has_any(prediction, value), minimum, settings["connectivity"])
        for value in tumors.values()
    ]
    truths = [has_any(truth, value) for value in tumors.values()]
    rows = _rows(truths, masks, spacing, list(tumors), settings)
    for row, name in zip(rows, tumors, strict=True):
        row["score"] = None if scores is None else scores[name]
    if UNION not in tumors:
        present = [row for row in rows if row["has_tumor"] or row["predicted_tumor"]]
        tolerance = settings["tolerances_mm"]
        if len(present) == 1 and tolerance.get(UNION) == tolerance.get(present[0]["class"]):
            union = present[0] | {"class": UNION}
        else:
            predicted = np.logical_or.reduce(masks)
            (union,) = _rows([has_any(truth, values)], [predicted], spacing, [UNION], settings)
        union["score"] = None if scores is None else scores[UNION]
        rows.append(union)
    return [
        {column: _rounded((dict(names) | row)[column]) for column in CASE_COLUMNS} for row in rows
    ]


def tumor_scores(
    probabilities: Float[Array, "x y z classes"] | Float[np.ndarray, "x y z classes"],
    tumors: Mapping[str, int],
) -> dict[str, float]:
    """Returns the scan's highest probability of each tumour and of any (their sum), 0..1.

    Args:
        probabilities: of background and all classes.
        tumors: tumour name -> its index among them.
    """
    values = np.asarray(probabilities)
    scores = {name: float(values[..., index].max()) for name, index in tumors.items()}
    if scores and UNION not in scores:
        together = np.add.reduce([values[..., index] for index in tumors.values()])
        scores[UNION] = float(together.max())
    return scores


def label_overlap(
    truth: Int[np.ndarray, "x y z"],
    prediction: Int[np.ndarray, "x y z"],
    labels: Mapping[str, int | Sequence[int]],
    voxels: int | None = None,
) -> dict[str, dict[str, float | int | None]]:
    """Returns the volume overlap of every label, organs too, with nnU-Net's names and conventions.

    Args:
        truth: values 0..255 [x, y, z].
        prediction: values of the same shape.
        labels: label name -> its value, or the values that it unites.
        voxels: number of the whole scan's, where the masks are cut out of it; outside of them it
            must be background in both.

    Returns:
        Label name -> Dice and IoU (fractions, None where both masks are empty) and the voxel counts
        TP, FP, FN, TN, n_ref, n_pred.
    """
    voxels = truth.size if voxels is None else voxels
    # Plane by plane as they lie in memory, for numpy counts in eight-byte integers.
    slowest = int(np.argmax(np.abs(truth.strides)))
    planes = np.moveaxis(truth, slowest, 0), np.moveaxis(prediction, slowest, 0)
    counts = np.zeros(1 << 16, np.int64)
    for plane, predicted in zip(*planes, strict=True):
        pairs = (plane.astype(np.uint16) << 8) | predicted.astype(np.uint16)
        counts += np.bincount(pairs.ravel(order="K"), minlength=1 << 16)
    table = counts.reshape(256, 256)
    result: dict[str, dict[str, float | int | None]] = {}
    for name, value in labels.items():
        values = np.unique(value)
        both = int(table[np.ix_(values, values)].sum())
        n_ref, n_pred = int(table[values].sum()), int(table[:, values].sum())
        either = n_ref + n_pred - both
        result[name] = {
            "Dice": 2 * both / (n_ref + n_pred) if either else None,
            "IoU": both / either if either else None,
            "TP": both,
            "FP": n_pred - both,
            "FN": n_ref - both,
            "TN": voxels - either,
            "n_ref": n_ref,
            "n_pred": n_pred,
        }
    return result


def has_any(labels: np.ndarray, values: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns where a label map has one of some values."""
    # One pass a value; numpy's isin would make an index of eight bytes for each voxel.
    first, *others = np.atleast_1d(values)
    mask = labels == first
    for value in others:
        mask |= labels == value
    return mask


def _rows(
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    spacing: Sequence[float],
    names: Sequence[str],
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    limits = [settings["tolerances_mm"].get(name, settings["tolerance_mm"]) for name in names]
    compared = compare_masks(
        truths,
        predictions,
        [spacing] * len(limits),
        limits,
        settings["lesion_rule"],
        settings["lesion_threshold"],
        settings["connectivity"],
    )
    return [_row(each, name, settings) for each, name in zip(compared, names, strict=True)]


def _row(compared: Comparison, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    match = compared.match
    early = is_early(match, settings["early_diameter"], settings["early_mm"])
    groups = np.array([size_group(radius) for radius in match.radius_mm], dtype=object)
    row: dict[str, Any] = {
        "class": name,
        "has_tumor": int(len(match.detected) > 0),
        "predicted_tumor": int(len(match.false_positive) > 0),
        "dsc": 100 * compared.dice,
        "nsd": 100 * compared.nsd,
        "n_lesions": len(match.detected),
        "n_detected": int(match.detected.sum()),
        "n_early": int(early.sum()),
        "n_early_detected": int((early & match.detected).sum()),
        "false_positives": int(match.false_positive.sum()),
        "truth_mm3": float(match.volume_mm3.sum()),
        "predicted_mm3": float(match.candidate_mm3.sum()),
    }
    for group in SIZE_GROUPS:
        row[f"lesions_{group}"] = int((groups == group).sum())
        row[f"detected_{group}"] = int(match.detected[groups == group].sum())
    return row


def _rounded(value: Any) -> Any:
    # To the digits of cases.csv: means over rows that were read back equal those over fresh ones.
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 6)
    return value
