"""The tables of a report as data frames: for the page, for CSV and for LaTeX."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tumorjax.scaling.figures import select
from tumorjax.scaling.results import ALL_TUMORS, ARMS, LESS_IS_BETTER, METRICS, SPLITS
from tumorjax.scaling.words import number, range_of, reason_in_words

# The columns of the paper's Table 5.
TABLE_5 = ("patient_sensitivity", "tumor_sensitivity", "dsc", "nsd", "early_tumor_sensitivity")


def scores(
    found: Mapping[str, Any], metrics: Sequence[str], label: str = ALL_TUMORS
) -> pd.DataFrame:
    """Returns one row for each split, arm and n_real: seeds, then each metric with low and high."""
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    present = [m for m in metrics if select(found["curves"], metric=m, **{"class": label})]
    for split in SPLITS:
        for arm in ARMS:
            for metric in present:
                keys = {"split": split, "arm": arm, "metric": metric, "class": label}
                for curve in select(found["curves"], **keys):
                    for index, n in enumerate(curve["n"]):
                        row = rows.setdefault((split, arm, n), {"seeds": curve["seeds"][index]})
                        row[metric] = curve["mean"][index]
                        row[f"{metric}_low"] = curve["low"][index]
                        row[f"{metric}_high"] = curve["high"][index]
    order = sorted(rows, key=lambda key: (ARMS.index(key[1]), SPLITS.index(key[0]), key[2]))
    lines = [
        {"arm": arm, "split": split, "n_real": n} | rows[split, arm, n] for split, arm, n in order
    ]
    columns = ["arm", "split", "n_real", "seeds"]
    columns += [name for m in present for name in (m, f"{m}_low", f"{m}_high")]
    return pd.DataFrame(lines, columns=columns)


def printed_scores(table: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Returns `scores` as one reads them: a mean and its interval in one field."""
    present = [metric for metric in metrics if metric in table.columns]
    lines = []
    for _, row in table.iterrows():
        line = {"arm": row["arm"], "split": row["split"], "scans": row["n_real"]}
        for metric in present:
            line[METRICS[metric]] = _printed(row, metric)
        lines.append(line)
    return pd.DataFrame(lines, columns=["arm", "split", "scans", *(METRICS[m] for m in present)])


def law_table(found: Mapping[str, Any], metrics: Sequence[str]) -> pd.DataFrame:
    """Returns one row for each curve of all tumours: law, plateau and forecast."""
    lines = []
    more_is_better = [metric for metric in metrics if metric not in LESS_IS_BETTER]
    for split, metric in itertools.product(SPLITS, more_is_better):
        keys = {"split": split, "metric": metric, "class": ALL_TUMORS}
        for curve in select(found["curves"], **keys):
            law, ahead = curve["law"], curve["forecast"]
            check = ahead["left_out"]
            lines.append(
                {
                    "split": split,
                    "metric": METRICS[metric],
                    "arm": curve["arm"],
                    "law": reason_in_words(law),
                    "ceiling a": _with(law["a"], law["interval"]["a"]),
                    "exponent c": _with(law["c"], law["interval"]["c"], 2),
                    "levels off at": _count(curve["plateau"]["n"]),
                    "95 % sure from": _count(curve["plateau"]["n_sure"]),
                    "forecast at 2n": _with(ahead["score"], ahead["interval"]),
                    "check: predicted": _with(check["predicted"], check["interval"]),
                    "check: measured": _with(check["observed"], None),
                }
            )
    return pd.DataFrame(lines)


def savings_table(
    found: Mapping[str, Any], metrics: Sequence[str], labels: Sequence[str] = (ALL_TUMORS,)
) -> pd.DataFrame:
    """Returns one row for each split, metric and class: what synthetic tumours save."""
    lines = []
    for split, metric, label in itertools.product(SPLITS, metrics, labels):
        keys = {"split": split, "metric": metric, "class": label}
        for saved in select(found["savings"], **keys):
            same = saved["same_score"]
            lines.append(
                {
                    "split": split,
                    "metric": METRICS[metric],
                    "tumours": class_name(saved["class"]),
                    "real alone": saved["n_real_alone"],
                    "with synthetic": saved["n_real_with_synthetic"],
                    "saved, %": _with(saved["saved_percent"], saved["interval"], 0),
                    "same score at": _count(same["n_real"]),
                    "saved for the same score, %": _with(
                        same["saved_percent"], same["interval"], 0
                    ),
                    "best score, difference": _with(
                        saved["best_difference"], saved["best_difference_interval"]
                    ),
                }
            )
    columns = ["split", "metric", "tumours", "real alone", "with synthetic", "saved, %"]
    columns += ["same score at", "saved for the same score, %", "best score, difference"]
    if len(labels) == 1:
        columns.remove("tumours")
    return pd.DataFrame(lines, columns=columns)


def equivalents_table(found: Mapping[str, Any], metric: str) -> pd.DataFrame:
    """Returns how many real scans alone give each score of the synthetic arm."""
    lines = []
    for entry in select(found["equivalents"], metric=metric, **{"class": ALL_TUMORS}):
        for point in entry["points"]:
            beyond = {"above": "more than measured", "below": "fewer than measured", None: ""}
            lines.append(
                {
                    "split": entry["split"],
                    "scans with synthetic": point["n_real"],
                    "score": f"{point['score']:.1f}",
                    "real scans alone": _with(point["n_real_alone"], None, 0)
                    or beyond[point["beyond"]],
                    "95 % interval": range_of(point["interval"], 0),
                    "by": entry["method"],
                }
            )
    columns = ["split", "scans with synthetic", "score", "real scans alone", "95 % interval", "by"]
    return pd.DataFrame(lines, columns=columns)


def organ_table(found: Mapping[str, Any], metrics: Sequence[str]) -> pd.DataFrame:
    """Returns one row for each tumour class, split, arm and n_real with printed scores."""
    tables = []
    for label in classes(found):
        table = printed_scores(scores(found, metrics, label), metrics)
        table.insert(0, "tumours", class_name(label))
        tables.append(table)
    return pd.concat(tables, ignore_index=True).fillna("") if tables else pd.DataFrame()


def classes(found: Mapping[str, Any]) -> list[str]:
    """Returns the tumour classes that were measured one by one."""
    names = dict.fromkeys(curve["class"] for curve in found["curves"])
    return [name for name in names if name != ALL_TUMORS]


def class_name(label: str) -> str:
    """Returns a class's name for readers: kidney_lesion becomes "kidney lesion"."""
    return "all" if label == ALL_TUMORS else label.replace("_", " ")


def _printed(row: pd.Series, metric: str) -> str:
    if pd.isna(row[metric]):
        return ""
    digits = 2 if metric in LESS_IS_BETTER else 1
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    interval = "" if pd.isna(low) else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{row[metric]:.{digits}f}{interval}"


def _with(value: float | None, interval: Sequence[float | None] | None, digits: int = 1) -> str:
    """Returns a value with its interval in brackets; empty where it is not known."""
    if value is None:
        return ""
    between = range_of(interval, digits)
    return number(value, digits) + (f" ({between})" if between else "")


def _count(n: int | None) -> str:
    return "" if n is None else str(n)
