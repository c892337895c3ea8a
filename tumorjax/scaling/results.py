"""The table of results that laws and report are made from: read, checked, grouped into curves."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tumorjax import files
from tumorjax.errors import UserError
from tumorjax.metrics.detection import SIZE_GROUPS

REAL, WITH_SYNTHETIC = "real", "real+synthetic"
ARMS = (REAL, WITH_SYNTHETIC)
SPLITS = ("id", "ood")
ALL_TUMORS = "tumor"

METRICS: dict[str, str] = {
    "dsc": "Dice score (DSC)",
    "nsd": "Surface Dice (NSD)",
    "tumor_sensitivity": "Tumours found",
    "patient_sensitivity": "Patients found",
    "early_tumor_sensitivity": "Early tumours found",
    "patient_specificity": "Specificity",
    "auc": "Area under the ROC curve",
    "false_positives_per_scan": "False alarms per scan",
    **{f"sensitivity_{size}": f"{size.capitalize()} tumours found" for size in SIZE_GROUPS},
}
LESS_IS_BETTER = ("false_positives_per_scan",)


@dataclass(frozen=True)
class Observation:
    """One cell's score on one split: what one row of a results table says about one metric."""

    cell: str
    score: float
    low: float
    high: float


# One curve's observations: n_real -> one per seed.
Curve = dict[int, list[Observation]]
# (class, split, metric, arm) -> curve.
Curves = dict[tuple[str, str, str, str], Curve]
# Cell -> its rows of cases.csv.
Cases = Mapping[str, Sequence[Mapping[str, Any]]]


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Reads a results table.

    Raises:
        UserError: the file is missing, no CSV or empty.
    """
    path = files.location(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such results table. Set --config.results to a CSV file with the columns"
            " split, arm, n_real and at least one metric"
        )
    try:
        rows = files.read_csv(path)
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error}). Export it as CSV") from error
    if not rows:
        raise UserError(f"{path}: no rows. Expected a header and one row per cell and split")
    return rows


def records(table: Any) -> list[dict[str, Any]]:
    """Returns a data frame or a sequence of mappings as a list of dictionaries."""
    if isinstance(table, pd.DataFrame):
        return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]
    return [dict(row) for row in table]


def curves(
    table: Any,
    metrics: Sequence[str] = tuple(METRICS),
    splits: Sequence[str] = SPLITS,
    name: str = "results table",
) -> Curves:
    """Groups a results table into one curve per class, split, metric and arm.

    Args:
        table: data frame or rows with split, arm, n_real and at least one of `metrics` (with
            METRIC_low and METRIC_high where known); class, seed and cell are optional. Rows that
            agree in class, split, arm and n_real are seeds of one point.
        metrics: the metrics to take, where the table has them.
        splits: the splits to take.
        name: how errors call the table.

    Returns:
        Curves in a fixed order: all tumours together first, then the table's classes.

    Raises:
        UserError: a column is missing, a value is no number or out of range, an arm or split is
            unknown. The message names the row (the header is row 1).
    """
    rows = records(table)
    if not rows:
        raise UserError(f"{name}: no rows. Expected one row per cell and split")
    columns = list(rows[0])
    missing = [column for column in ("split", "arm", "n_real") if column not in columns]
    if missing:
        raise UserError(
            f"{name}: column {', '.join(missing)} is missing; found"
            f" {', '.join(map(str, columns))}. Expected split, arm, n_real and at least one metric"
        )
    present = [metric for metric in metrics if metric in columns]
    if not present:
        raise UserError(
            f"{name}: no metric column; found {', '.join(map(str, columns))}."
            f" Expected at least one of {', '.join(metrics)}"
        )
    unsorted: Curves = {}
    classes = []
    for number, row in enumerate(rows, start=2):
        where = f"{name}, row {number}"
        arm = _choice(row["arm"], ARMS, f"{where}: arm")
        split = _choice(row["split"], SPLITS, f"{where}: split")
        n_real = _count(row["n_real"], f"{where}: n_real")
        label = str(row.get("class") or "").strip() or ALL_TUMORS
        if _is_empty(row.get("class")):
            label = ALL_TUMORS
        if label not in classes:
            classes.append(label)
        if split not in splits:
            continue
        for metric in present:
            score = _number(row.get(metric), f"{where}: {metric}")
            if math.isnan(score):
                continue
            upper = math.inf if metric in LESS_IS_BETTER else 100.0
            if not 0 <= score <= upper:
                raise UserError(
                    f"{where}: {metric} is {score:g}. Expected"
                    + (" 0 or more" if math.isinf(upper) else " a percentage from 0 to 100")
                )
            low, high = (
                _number(row.get(f"{metric}_{end}"), f"{where}: {metric}_{end}")
                for end in ("low", "high")
            )
            cell = str(row.get("cell") or "") or cell_name(arm, n_real, row.get("seed"))
            curve = unsorted.setdefault((label, split, metric, arm), {})
            curve.setdefault(n_real, []).append(Observation(cell, score, low, high))
    if not unsorted:
        raise UserError(f"{name}: every metric is empty in the splits {', '.join(splits)}")
    classes.sort(key=lambda label: label != ALL_TUMORS)
    return {
        key: dict(sorted(unsorted[key].items()))
        for key in (
            (label, split, metric, arm)
            for label in classes
            for split in SPLITS
            for metric in present
            for arm in ARMS
        )
        if key in unsorted
    }


def cell_name(arm: str, n_real: int, seed: Any) -> str:
    """Returns the id of a cell of the grid, for instance real+synthetic-n0060-s0."""
    seed = 0 if _is_empty(seed) else int(float(seed))
    return f"{arm}-n{n_real:04d}-s{seed}"


def read_cases(study: str | Path) -> Cases:
    """Reads the rows per test case of all cells of a study.

    Args:
        study: a study's folder, with cells/ID/cases.csv.

    Returns:
        cell -> rows; empty where the folder is no study's.
    """
    paths = sorted(files.location(study).glob("cells/*/cases.csv"))
    return {path.parent.name: files.read_csv(path) for path in paths}


def _is_empty(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or str(value).strip().lower() in ("", "nan", "na", "n/a", "null", "none")
    )


def _number(value: Any, where: str) -> float:
    if _is_empty(value):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(
            f"{where} is {value!r}, which is no number. Leave the field empty where it is undefined"
        ) from None
    if math.isinf(number):
        raise UserError(f"{where} is infinite. Leave the field empty where it is undefined")
    return number


def _count(value: Any, where: str) -> int:
    number = _number(value, where)
    if math.isnan(number) or number != int(number) or number < 1:
        raise UserError(f"{where} is {value!r}. Expected a whole number of scans, 1 or more")
    return int(number)


def _choice(value: Any, choices: Iterable[str], where: str) -> str:
    text = str(value).strip().lower().replace(" ", "")
    if text not in choices:
        raise UserError(f"{where} is {value!r}, which is unknown. Expected {' or '.join(choices)}")
    return text


def setting(settings: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """Returns a setting, or the default where it is not set (None counts as not set)."""
    value = None if settings is None else settings.get(key)
    return default if value is None else value
