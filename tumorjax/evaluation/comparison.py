"""Several models on the same cases: differences with intervals, and paired tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from tumorjax.errors import UserError
from tumorjax.evaluation.settings import case_settings
from tumorjax.evaluation.summary import (
    METRICS,
    RATIOS,
    SCALE,
    number_of,
    patient_sums,
    ratio,
)
from tumorjax.files import location, read_csv
from tumorjax.settings import first_difference, plain

COLUMNS = (
    *("split", "class", "metric", "model", "other", "n_patients", "value", "other_value"),
    *("difference", "difference_low", "difference_high"),
    *("p_bootstrap", "p_bootstrap_holm", "p_wilcoxon", "p_wilcoxon_holm", "n_tests"),
)
# How many resamples are drawn at once: ten million counts.
_BLOCK = 10_000_000
# With fewer patients no two-sided paired test can fall under 5 %, and resamples of so few say too
# little: five differences of one sign have a chance of 1 in 16.
LEAST_PATIENTS = 6
# What a case's truth says; it must be the same for all models.
_TRUTH = ("patient", "split", "has_tumor", "n_lesions")


class Model(NamedTuple):
    """What a comparison needs of one evaluation.

    Attributes:
        name: for tables.
        folder: its workdir.
        rows: of its cases.csv.
        rejected: cases that it set aside.
        info: its evaluation.json; empty for a study's cell, which has none.
    """

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    rejected: frozenset[str]
    info: Mapping[str, Any]


def read_model(name: str, folder: str | Path) -> Model:
    """Reads a finished evaluation, or a study's cell.

    Raises:
        UserError: it is neither.
    """
    folder = location(folder)
    rejected = folder / "rejected.csv"
    try:
        rows: list[dict[str, Any]] = list(read_csv(folder / "cases.csv"))
        info = folder / "evaluation.json"
        return Model(
            name,
            folder,
            rows,
            frozenset(row["case"] for row in (read_csv(rejected) if rejected.is_file() else ())),
            json.loads(info.read_text()) if info.is_file() else {},
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"config.compare.{name}: {folder} has no results to read ({error!r}). Expected the"
            " workdir of a finished evaluation, a study's cell, or a folder of masks"
        ) from error


def on_same_cases(models: Sequence[Model]) -> tuple[list[Model], list[str]]:
    """Returns the models with the rows of the cases that all of them have.

    A case that some model set aside (it is in a rejected.csv) is left out for all. Any other
    difference is an error: means over different cases say nothing of models.

    Returns:
        The models, and the cases left out.

    Raises:
        UserError: cases, truths, settings or grids differ.
    """
    first = models[0]
    rejected = frozenset().union(*(model.rejected for model in models))
    cases = [{row["case"] for row in model.rows} - rejected for model in models]
    for model, there in zip(models[1:], cases[1:], strict=True):
        _check_same_kind(first, model)
        if there != cases[0]:
            raise UserError(
                f"{first.name} and {model.name} were not evaluated on the same cases. Only"
                f" {first.name} has: {_some(cases[0] - there)}; only {model.name} has:"
                f" {_some(there - cases[0])}. Evaluate both on the same"
            )
    if not cases[0]:
        raise UserError("there is no case that all models to compare have")
    classes = {row["class"] for model in models for row in model.rows}
    chosen = []
    for model in models:
        rows = [row for row in model.rows if row["case"] not in rejected]
        chosen.append(model._replace(rows=rows + _absent_rows(rows, classes)))
    for model in chosen[1:]:
        _check_same_truth(chosen[0], model)
    left_out = sorted(rejected & {row["case"] for model in models for row in model.rows})
    return chosen, left_out


def compare(
    model: Model, other: Model, settings: Mapping[str, Any], resamples: int
) -> list[dict[str, Any]]:
    """Tests how a model differs from another, for each split, class and metric.

    - difference: of the metric over all patients, the model's less the other's, with its percentile
      interval; both are resampled with the same patients.
    - p_bootstrap: two-sided, from the same resamples: twice the smaller share that lies on either
      side of 0 (counting the observed data as one of them). Needs `LEAST_PATIENTS`.
    - p_wilcoxon: signed-rank test of the patients' own values (`scipy.stats.wilcoxon`), for those
      for whom the metric is defined. Patients without a difference say nothing; with no other
      patients p is 1.

    Args:
        model: as `on_same_cases` returns it.
        other: likewise.
        settings: seed and confidence.
        resamples: p_bootstrap is at least 2 / (resamples + 1).

    Returns:
        Rows with `COLUMNS`, without Holm's correction; None where undefined. A class that one
        tumour makes up alone is not tested again as the class of all tumours.
    """
    lines = []
    for split in dict.fromkeys(row["split"] for row in model.rows):
        sides = [[row for row in side.rows if row["split"] == split] for side in (other, model)]
        patients = sorted({str(row["patient"]) for row in sides[0]})
        for name in classes_of(sides[1]):
            sums = [
                patient_sums([row for row in rows if row["class"] == name], patients)
                for rows in sides
            ]
            tests = _paired(sums[0], sums[1], settings, resamples)
            for metric in METRICS:
                line = {"split": split, "class": name, "metric": metric}
                line |= {"model": model.name, "other": other.name}
                lines.append(line | tests[metric])
    return lines


def classes_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the classes of rows; all tumours together only where there are several kinds."""
    names = list(dict.fromkeys(str(row["class"]) for row in rows))
    alone = len(names) == 2 and "tumor" in names
    return [name for name in names if not (alone and name == "tumor")]


def correct(lines: Sequence[Mapping[str, Any]], family: str = "metric") -> list[dict[str, Any]]:
    """Adds Holm's correction to rows of `compare`, those of all pairs of models together.

    Args:
        lines: of all comparisons that are reported together.
        family: what is corrected together: "metric", all comparisons (models, classes, splits) of
            one metric; or "all".

    Returns:
        The rows with p_bootstrap_holm, p_wilcoxon_holm and n_tests, the number of tests that were
        corrected together.

    Raises:
        UserError: the family is unknown.
    """
    if family not in ("metric", "all"):
        raise UserError(f"config.comparison.family is {family!r}. Expected metric or all")
    corrected = [dict(line) for line in lines]
    families: dict[str, list[dict[str, Any]]] = {}
    for line in corrected:
        families.setdefault(line["metric"] if family == "metric" else "", []).append(line)
    for members in families.values():
        for test in ("p_bootstrap", "p_wilcoxon"):
            adjusted = holm([line[test] for line in members])
            for line, value in zip(members, adjusted, strict=True):
                line[f"{test}_holm"] = value
        count = sum(line["p_bootstrap"] is not None for line in members)
        for line in members:
            line["n_tests"] = count
    return [{column: line[column] for column in COLUMNS} for line in corrected]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Returns p values corrected for how many there are, step down (Holm 1979).

    None stands for a test that could not be done; it does not count.
    """
    defined = [index for index, p in enumerate(p_values) if p is not None]
    p = np.array([p_values[index] for index in defined], np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted: list[float | None] = [None] * len(p_values)
    for place, value in zip(order, steps, strict=True):
        adjusted[defined[int(place)]] = float(min(value, 1.0))
    return adjusted


def signed_rank(differences: Float[np.ndarray, " n"]) -> float | None:
    """Returns the two-sided p value of Wilcoxon's signed-rank test; None without any pair."""
    differences = np.asarray(differences, np.float64)
    # Two ways of adding the same percentages may differ in the last digit.
    differences = np.where(np.abs(differences) < 1e-9, 0, differences)
    if not len(differences):
        return None
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="wilcox").pvalue)


def _paired(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    settings: Mapping[str, Any],
    resamples: int,
) -> dict[str, dict[str, Any]]:
    """Returns the tests of every metric, from what each patient adds to it on both sides."""
    sides = (first, second)
    values = [ratio(n.sum(0), d.sum(0)) * SCALE for n, d in sides]
    resampled = _resampled_differences(first, second, settings, resamples)
    own = [ratio(n, d) * SCALE for n, d in sides]
    tail = 50 * (1 - float(settings["confidence"]))
    tests = {}
    for metric in METRICS:
        index = RATIOS.index(metric)
        both = (first[1][:, index] > 0) & (second[1][:, index] > 0)
        drawn = resampled[~np.isnan(resampled[:, index]), index]
        enough = both.sum() > 1 and len(drawn) > 0
        drawn = np.where(np.abs(drawn) < 1e-9, 0, drawn)
        low, high = np.percentile(drawn, [tail, 100 - tail]) if enough else (np.nan, np.nan)
        smaller = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
        p = min(2 * (smaller + 1) / (len(drawn) + 1), 1.0) if enough else np.nan
        p = p if both.sum() >= LEAST_PATIENTS else np.nan
        rank = signed_rank((own[1] - own[0])[both, index]) if enough else None
        tests[metric] = {
            "n_patients": int(both.sum()),
            "value": _defined(values[1][index]),
            "other_value": _defined(values[0][index]),
            "difference": _defined(values[1][index] - values[0][index]),
            "difference_low": _defined(low),
            "difference_high": _defined(high),
            "p_bootstrap": _defined(p),
            "p_wilcoxon": rank,
        }
    return tests


def _resampled_differences(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    settings: Mapping[str, Any],
    resamples: int,
) -> Float[np.ndarray, "resamples metrics"]:
    patients = len(first[0])
    generator = np.random.default_rng(int(settings["seed"]))
    shares = np.full(patients, 1 / max(patients, 1))
    block = max(_BLOCK // max(patients, 1), 1)
    parts = []
    for start in range(0, resamples, block):
        draws = generator.multinomial(patients, shares, size=min(block, resamples - start))
        before, after = (ratio(draws @ n, draws @ d) * SCALE for n, d in (first, second))
        parts.append(after - before)
    return np.concatenate(parts)


def _check_same_kind(first: Model, model: Model) -> None:
    grids = [side.info.get("grid") for side in (first, model)]
    if None not in grids and grids[0] != grids[1]:
        raise UserError(
            f"{first.name} was measured on {grids[0]}, {model.name} on {grids[1]}: the difference"
            " would be one of grids, too. Write masks with the prediction job, and evaluate both"
            " from folders"
        )
    settings = [side.info.get("settings") for side in (first, model)]
    if None not in settings:
        one, other = (plain(case_settings(side or {})) for side in settings)
        difference = first_difference(one, other, "evaluation")
        if difference:
            raise UserError(
                f"{first.name} and {model.name} were measured by different rules ({difference})."
                " Evaluate both with the same"
            )


def _check_same_truth(first: Model, model: Model) -> None:
    truths = [
        {
            (row["case"], row["class"]): tuple(
                str(row[key]) if key in ("patient", "split") else number_of(row[key])
                for key in _TRUTH
            )
            for row in side.rows
        }
        for side in (first, model)
    ]
    for key, value in truths[0].items():
        if truths[1][key] != value:
            raise UserError(
                f"case {key[0]} has another truth, patient or split in {model.name} than in"
                f" {first.name} ({key[1]}: {_truth(truths[1][key])}, and {_truth(value)}). Evaluate"
                " both on the same annotations"
            )


def _absent_rows(rows: Sequence[Mapping[str, Any]], classes: set[str]) -> list[dict[str, Any]]:
    """Returns rows of classes that no truth and no mask of this model has.

    cases.csv leaves such classes out; another model may have predicted one.
    """
    there = {row["class"] for row in rows}
    cases = {row["case"]: row for row in rows}
    empty = {"has_tumor": 0, "predicted_tumor": 0, "dsc": None, "nsd": None, "score": None}
    return [
        dict.fromkeys(row, 0) | {key: row[key] for key in ("case", "patient", "split")}
        | empty | {"class": name}
        for name in sorted(classes - there)
        for row in cases.values()
    ]  # fmt: skip


def _truth(value: tuple) -> str:
    return ", ".join(f"{key} {item}" for key, item in zip(_TRUTH, value, strict=True))


def _some(names: set[str], most: int = 5) -> str:
    shown = ", ".join(sorted(names)[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
