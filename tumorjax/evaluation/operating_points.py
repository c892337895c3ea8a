"""FROC curves from counts per scan, and the threshold at which tumours are shown to annotators."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tumorjax.errors import UserError
from tumorjax.evaluation.summary import draw_patients, ratio

CURVE_COLUMNS = (
    "class",
    "threshold",
    *(
        column
        for name in ("sensitivity", "false_positives_per_scan")
        for column in (name, f"{name}_low", f"{name}_high")
    ),
    "n_detected",
    "n_tumors",
    "n_scans",
    "n_patients",
)


class Counts(NamedTuple):
    """What each patient's scans add to one class's FROC curve.

    Attributes:
        thresholds: ascending probabilities.
        detected: lesions found.
        false_positives: candidates that touch no lesion.
        n_lesions: of each patient.
        n_scans: of each patient.
    """

    thresholds: Float[np.ndarray, " thresholds"]
    detected: Int[np.ndarray, "patients thresholds"]
    false_positives: Int[np.ndarray, "patients thresholds"]
    n_lesions: Int[np.ndarray, " patients"]
    n_scans: Int[np.ndarray, " patients"]


def check_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Returns thresholds in ascending order, each once.

    Raises:
        UserError: one is no probability above 0 and up to 1, or there is none.
    """
    ordered = tuple(sorted({float(value) for value in thresholds}))
    if not ordered or not 0 < ordered[0] <= ordered[-1] <= 1:
        raise UserError(
            f"config.froc.thresholds is {tuple(thresholds)}. Expected probabilities above 0, up to"
            " 1"
        )
    return ordered


def gather(
    scans: Iterable[tuple[str, Mapping[str, Mapping[str, Any]]]], thresholds: Sequence[float]
) -> dict[str, Counts]:
    """Adds up scans, one at a time.

    Args:
        scans: (patient, class -> counts as `measure.froc_counts` returns them).
        thresholds: those of the counts.

    Returns:
        class -> counts of its patients, in alphabetical order.
    """
    sums: dict[str, dict[str, np.ndarray]] = {}
    for patient, classes in scans:
        for name, counts in classes.items():
            added = np.concatenate(
                [[1, counts["n_lesions"]], counts["detected"], counts["false_positives"]]
            ).astype(np.int64)
            of_class = sums.setdefault(name, {})
            of_class[patient] = of_class.get(patient, 0) + added
    size = len(thresholds)
    result = {}
    for name, of_class in sums.items():
        table = np.stack([of_class[patient] for patient in sorted(of_class)])
        result[name] = Counts(
            np.asarray(thresholds, np.float64),
            table[:, 2 : 2 + size],
            table[:, 2 + size :],
            table[:, 1],
            table[:, 0],
        )
    return result


def curve_rows(
    name: str, counts: Counts, settings: Mapping[str, Any]
) -> list[dict[str, float | int | str | None]]:
    """Returns a class's FROC curve with bootstrap intervals over patients, a row a threshold.

    Sensitivities are percent. What is undefined is None.
    """
    draws = draw_patients(len(counts.n_scans), settings)
    sides = {
        "sensitivity": (counts.detected, counts.n_lesions, 100),
        "false_positives_per_scan": (counts.false_positives, counts.n_scans, 1),
    }
    rows: list[dict[str, Any]] = [
        {
            "class": name,
            "threshold": float(threshold),
            "n_detected": int(counts.detected[:, index].sum()),
            "n_tumors": int(counts.n_lesions.sum()),
            "n_scans": int(counts.n_scans.sum()),
            "n_patients": len(counts.n_scans),
        }
        for index, threshold in enumerate(counts.thresholds)
    ]
    for metric, (parts, wholes, scale) in sides.items():
        means = scale * ratio(parts.sum(0), wholes.sum())
        resampled = scale * ratio(draws @ parts, (draws @ wholes)[:, None])
        for index, row in enumerate(rows):
            row[metric] = _defined(means[index])
            enough = np.count_nonzero(wholes) > 1
            ends = _interval(resampled[:, index], settings) if enough else None
            row[f"{metric}_low"], row[f"{metric}_high"] = ends or (None, None)
    return rows


def choose_threshold(counts: Counts, wanted: float, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the operating point with enough sensitivity and the fewest false positives.

    Of thresholds that have equally few, the highest. (At low thresholds candidates grow together,
    and there may be fewer false positives than at a higher one; the highest threshold with enough
    sensitivity stands beside.) Source: the paper's section 3.1, stage 2.

    Intervals are percentiles over resamples of the patients. The threshold is chosen anew in each;
    where a resample has none, it counts as lower than all, and an end of the interval that falls
    there is None. Sensitivity and false positives are those at the threshold that was chosen on all
    patients; so chosen, they are a little better than on new ones. "left_out" says what to expect
    of those: for each patient, the threshold is chosen on all others.

    Args:
        counts: of one class.
        wanted: least sensitivity, percent.
        settings: seed, resamples and confidence.

    Returns:
        A class's entry in thresholds.json, see docs/evaluation.md.
    """
    chosen, highest = _chosen(counts.detected.sum(0), counts.n_lesions.sum(),
                              counts.false_positives.sum(0), wanted)  # fmt: skip
    with_lesions = int(np.count_nonzero(counts.n_lesions))
    entry: dict[str, Any] = {
        "threshold": None,
        "threshold_interval": [None, None],
        "sensitivity": None,
        "sensitivity_interval": [None, None],
        "false_positives_per_scan": None,
        "false_positives_per_scan_interval": [None, None],
        "highest_threshold": None,
        "left_out": {"sensitivity": None, "false_positives_per_scan": None},
        "n_patients": len(counts.n_scans),
        "n_patients_with_tumor": with_lesions,
        "n_tumors": int(counts.n_lesions.sum()),
        "n_scans": int(counts.n_scans.sum()),
        "identifiable": bool(chosen >= 0),
        "reason": None,
    }
    if chosen < 0:
        if with_lesions:
            best = 100 * counts.detected.sum(0) / counts.n_lesions.sum()
            entry["reason"] = (
                f"no threshold finds {wanted:g} % of the tumours: at most {best.max():.1f} %, at"
                f" {counts.thresholds[len(best) - 1 - best[::-1].argmax()]:g}"
            )
        else:
            entry["reason"] = "no scan has a tumour of this class"
        return entry
    rows = curve_rows("", counts, settings)
    row = rows[int(chosen)]
    entry["threshold"] = row["threshold"]
    for metric in ("sensitivity", "false_positives_per_scan"):
        entry[metric] = row[metric]
        entry[f"{metric}_interval"] = [row[f"{metric}_low"], row[f"{metric}_high"]]
    entry["highest_threshold"] = float(counts.thresholds[int(highest)])
    if with_lesions > 1:
        entry["threshold_interval"] = _threshold_interval(counts, wanted, settings)
        entry["left_out"] = _left_out(counts, wanted)
    return entry


def _chosen(
    detected: Int[np.ndarray, "*n thresholds"],
    n_lesions: Int[np.ndarray, "*n"],
    false_positives: Int[np.ndarray, "*n thresholds"],
    wanted: float,
) -> tuple[Int[np.ndarray, "*n"], Int[np.ndarray, "*n"]]:
    """Returns the index of the chosen and of the highest sufficient threshold; -1 for none."""
    n_lesions = np.asarray(n_lesions)
    enough = (100 * detected >= wanted * n_lesions[..., None] - 1e-9) & (n_lesions[..., None] > 0)
    last = enough.shape[-1] - 1
    highest = np.where(enough.any(-1), last - enough[..., ::-1].argmax(-1), -1)
    candidates = np.where(enough, false_positives, np.iinfo(np.int64).max)
    chosen = np.where(enough.any(-1), last - candidates[..., ::-1].argmin(-1), -1)
    return chosen, highest


def _threshold_interval(
    counts: Counts, wanted: float, settings: Mapping[str, Any]
) -> list[float | None]:
    draws = draw_patients(len(counts.n_scans), settings)
    # A resample without any tumour says nothing of thresholds.
    draws = draws[draws @ counts.n_lesions > 0]
    chosen, _ = _chosen(
        draws @ counts.detected, draws @ counts.n_lesions, draws @ counts.false_positives, wanted
    )
    tail = (1 - float(settings["confidence"])) / 2
    ends = np.quantile(chosen, [tail, 1 - tail], method="inverted_cdf")
    return [float(counts.thresholds[int(end)]) if end >= 0 else None for end in ends]


def _left_out(counts: Counts, wanted: float) -> dict[str, float | None]:
    others = [values.sum(0) - values for values in counts[1:4]]
    chosen, _ = _chosen(others[0], others[2], others[1], wanted)
    if (chosen < 0).any():
        return {"sensitivity": None, "false_positives_per_scan": None}
    patients = np.arange(len(chosen))
    found, false = counts.detected[patients, chosen], counts.false_positives[patients, chosen]
    return {
        "sensitivity": float(100 * found.sum() / counts.n_lesions.sum()),
        "false_positives_per_scan": float(false.sum() / counts.n_scans.sum()),
    }


def _interval(
    values: Float[np.ndarray, " resamples"], settings: Mapping[str, Any]
) -> tuple[float, float] | None:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    tail = 50 * (1 - float(settings["confidence"]))
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
