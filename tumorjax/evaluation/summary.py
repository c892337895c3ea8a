"""From rows per case to means with intervals: which numbers there are and how they are pooled.

Rows are those of `evaluate.evaluate_case`, or the same read back from cases.csv.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tumorjax.errors import UserError
from tumorjax.evaluation.settings import complete_settings
from tumorjax.metrics.detection import SIZE_GROUPS

CASE_COLUMNS = (
    "case",
    "patient",
    "split",
    "class",
    "has_tumor",
    "predicted_tumor",
    "score",
    "dsc",
    "nsd",
    "n_lesions",
    "n_detected",
    "n_early",
    "n_early_detected",
    "false_positives",
    *(f"{kind}_{group}" for group in SIZE_GROUPS for kind in ("lesions", "detected")),
    "truth_mm3",
    "predicted_mm3",
)

# The metrics that come with an interval, in the order of results.csv. All are percentages but the
# last, which is a count.
METRICS = (
    "dsc",
    "nsd",
    "tumor_sensitivity",
    "patient_sensitivity",
    "patient_specificity",
    "early_tumor_sensitivity",
    "false_positives_per_scan",
)
GROUP_METRICS = tuple(f"sensitivity_{group}" for group in SIZE_GROUPS)
# What `patient_sums` counts, and the factor from its ratios to each metric's unit.
RATIOS = METRICS + GROUP_METRICS
SCALE = np.array([1.0 if name == "false_positives_per_scan" else 100.0 for name in RATIOS])
SUMMARY_COLUMNS = (
    "class",
    "n_patients",
    "n_tumors",
    *(column for name in METRICS for column in (name, f"{name}_low", f"{name}_high")),
    "auc",
    *GROUP_METRICS,
)


def summarize(
    rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any] | None = None
) -> list[dict]:
    """Returns each class's means over one split, with 95 % bootstrap intervals over patients.

    - dsc, nsd: mean over the scans whose truth has the tumour. A false tumour in a healthy scan
      does not enter them (its row says 0); it counts in specificity and false positives per scan.
    - tumor_sensitivity, early_tumor_sensitivity, sensitivity of size groups: found lesions by all
      lesions, pooled over patients.
    - patient_sensitivity, patient_specificity, auc: per patient. One with several scans has a
      tumour (or a predicted one) if any of them has, and the highest of their scores.
    - false_positives_per_scan: mean over all scans.

    The bootstrap draws patients, each with all of their scans. The same seed draws the same
    patients for every class and for every call with the same patients. Where fewer than two
    patients have anything to say on a metric there is no interval.

    Args:
        rows: of `evaluate_case`, all of one split; values may be text as read from cases.csv.
        settings: seed, resamples and confidence; see `settings.DEFAULTS` for what is absent.

    Returns:
        One dictionary with `SUMMARY_COLUMNS` a class, in the order in which classes first appear.
        Percent 0..100 but for false positives; None where undefined.
    """
    rows, settings = list(rows), complete_settings(settings)
    patients = sorted({str(row["patient"]) for row in rows})
    draws = draw_patients(len(patients), settings)
    table = []
    for name in dict.fromkeys(row["class"] for row in rows):
        chosen = [row for row in rows if row["class"] == name]
        numerators, denominators = patient_sums(chosen, patients)
        means = ratio(numerators.sum(axis=0), denominators.sum(axis=0)) * SCALE
        resampled = ratio(draws @ numerators, draws @ denominators) * SCALE
        low, high = percentile_interval(resampled, denominators, settings)
        line: dict[str, Any] = {
            "class": name,
            "n_patients": len({str(row["patient"]) for row in chosen}),
            "n_tumors": int(denominators[:, RATIOS.index("tumor_sensitivity")].sum()),
        }
        for index, metric in enumerate(RATIOS):
            line[metric] = _defined(means[index])
            if metric in METRICS:
                line[f"{metric}_low"] = _defined(low[index])
                line[f"{metric}_high"] = _defined(high[index])
        line["auc"] = _defined(100 * _patient_auc(chosen))
        table.append({column: line[column] for column in SUMMARY_COLUMNS})
    return table


def paired_difference(
    first: Iterable[Mapping[str, Any]],
    second: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any] | None = None,
) -> list[dict]:
    """Returns how much higher each metric is in `second` than in `first`, on the same patients.

    Both are resampled with the same patients, so what patients have in common cancels.

    Args:
        first: rows of `evaluate_case`, one split.
        second: rows of another model on the same cases.
        settings: as for `summarize`.

    Returns:
        One dictionary a class: class, n_patients, and each of `METRICS` with _low and _high, in the
        metric's unit. None where undefined.

    Raises:
        UserError: the two do not have the same patients and classes.
    """
    first, second, settings = list(first), list(second), complete_settings(settings)
    patients = sorted({str(row["patient"]) for row in first})
    classes = list(dict.fromkeys(row["class"] for row in first))
    if patients != sorted({str(row["patient"]) for row in second}) or set(classes) != {
        row["class"] for row in second
    }:
        raise UserError(
            "a paired difference needs the same patients and classes on both sides. Evaluate both"
            " models on the same cases"
        )
    draws = draw_patients(len(patients), settings)
    table = []
    for name in classes:
        sides = [
            patient_sums([row for row in rows if row["class"] == name], patients)
            for rows in (first, second)
        ]
        means = [ratio(n.sum(axis=0), d.sum(axis=0)) * SCALE for n, d in sides]
        resampled = [ratio(draws @ n, draws @ d) * SCALE for n, d in sides]
        low, high = percentile_interval(resampled[1] - resampled[0], sides[0][1], settings)
        line: dict[str, Any] = {"class": name, "n_patients": len(patients)}
        for metric in METRICS:
            index = RATIOS.index(metric)
            line[metric] = _defined(means[1][index] - means[0][index])
            line[f"{metric}_low"] = _defined(low[index])
            line[f"{metric}_high"] = _defined(high[index])
        table.append(line)
    return table


def patient_sums(
    rows: Sequence[Mapping[str, Any]], patients: Sequence[str]
) -> tuple[Float[np.ndarray, "patients metrics"], Float[np.ndarray, "patients metrics"]]:
    """Returns what each patient adds to every metric's numerator and denominator.

    Every metric is a ratio of sums over patients, so a resample is one product with the matrix of
    how often each patient was drawn.

    Args:
        rows: of `evaluate_case`, one class.
        patients: the patients, in the order of the result; those without rows add nothing.

    Returns:
        Numerators and denominators [patients, METRICS then GROUP_METRICS], as fractions or counts.
    """
    position = {patient: index for index, patient in enumerate(patients)}
    numerators, denominators = np.zeros((2, len(patients), len(RATIOS)))
    has_tumor, predicted, seen = np.zeros((3, len(patients)), bool)
    pairs = {
        "tumor_sensitivity": ("n_detected", "n_lesions"),
        "early_tumor_sensitivity": ("n_early_detected", "n_early"),
        **{
            f"sensitivity_{group}": (f"detected_{group}", f"lesions_{group}")
            for group in SIZE_GROUPS
        },
    }
    for row in rows:
        patient = position[str(row["patient"])]
        seen[patient] = True
        has_tumor[patient] |= bool(number_of(row["has_tumor"]))
        predicted[patient] |= bool(number_of(row["predicted_tumor"]))
        if number_of(row["has_tumor"]):
            for metric in ("dsc", "nsd"):
                numerators[patient, RATIOS.index(metric)] += number_of(row[metric]) / 100
                denominators[patient, RATIOS.index(metric)] += 1
        for metric, (part, whole) in pairs.items():
            numerators[patient, RATIOS.index(metric)] += number_of(row[part])
            denominators[patient, RATIOS.index(metric)] += number_of(row[whole])
        index = RATIOS.index("false_positives_per_scan")
        numerators[patient, index] += number_of(row["false_positives"])
        denominators[patient, index] += 1
    index = RATIOS.index("patient_sensitivity")
    numerators[:, index], denominators[:, index] = has_tumor & predicted, has_tumor
    index = RATIOS.index("patient_specificity")
    numerators[:, index], denominators[:, index] = seen & ~has_tumor & ~predicted, seen & ~has_tumor
    return numerators, denominators


def area_under_curve(
    scores: Float[np.ndarray, " n"], positive: Sequence[bool] | np.ndarray
) -> float:
    """Returns the chance that a positive scores higher than a negative, ties counting half.

    This is the area under the ROC curve (the Mann-Whitney statistic), 0..1; NaN if either kind is
    missing.
    """
    positive = np.asarray(positive, bool)
    high, low = np.asarray(scores)[positive], np.sort(np.asarray(scores)[~positive])
    if not len(high) or not len(low):
        return float("nan")
    below = np.searchsorted(low, high, side="left") + np.searchsorted(low, high, side="right")
    return float(below.mean() / 2 / len(low))


def _patient_auc(rows: Sequence[Mapping[str, Any]]) -> float:
    scores: dict[str, float] = {}
    positive: dict[str, bool] = {}
    for row in rows:
        patient, score = str(row["patient"]), number_of(row["score"])
        if np.isnan(score):
            return float("nan")  # masks without probabilities
        scores[patient] = max(scores.get(patient, -np.inf), score)
        positive[patient] = positive.get(patient, False) or bool(number_of(row["has_tumor"]))
    return area_under_curve(np.array(list(scores.values())), list(positive.values()))


def draw_patients(
    n_patients: int, settings: Mapping[str, Any]
) -> Int[np.ndarray, "resamples patients"]:
    """Returns how often each resample has each patient."""
    generator = np.random.default_rng(int(settings["seed"]))
    shares = np.full(n_patients, 1 / max(n_patients, 1))
    return generator.multinomial(n_patients, shares, size=int(settings["resamples"]))


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Returns numerators / denominators, NaN where a denominator is 0."""
    undefined = denominators == 0
    return np.where(undefined, np.nan, numerators / np.where(undefined, 1, denominators))


def percentile_interval(
    resampled: Float[np.ndarray, "resamples metrics"],
    denominators: Float[np.ndarray, "patients metrics"],
    settings: Mapping[str, Any],
) -> tuple[Float[np.ndarray, " metrics"], Float[np.ndarray, " metrics"]]:
    """Returns the percentile interval of each metric over the resamples that define it."""
    tail = 50 * (1 - float(settings["confidence"]))
    low, high = np.full((2, resampled.shape[1]), np.nan)
    for index in np.flatnonzero((denominators > 0).sum(axis=0) >= 2):
        values = resampled[~np.isnan(resampled[:, index]), index]
        if len(values):
            low[index], high[index] = np.percentile(values, [tail, 100 - tail])
    return low, high


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def number_of(value: Any) -> float:
    """Returns a value of a row as a number, NaN where it is undefined; rows may hold text."""
    return float("nan") if value is None or value == "" else float(value)
