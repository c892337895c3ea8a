"""Result tables for papers: the form of the paper's Table 5, as LaTeX or CSV."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tumorjax.files import csv_text, write_text_atomic

# Table 5's columns, and specificity and false positives, without which its sensitivities say
# little: a network that marks every scan has a patient-level sensitivity of 100.
TABLE5_COLUMNS: dict[str, str] = {
    "n_real": "#real CT",
    "patient_sensitivity": "Patient-level Sen.",
    "tumor_sensitivity": "Tumor-level Sen.",
    "dsc": "DSC",
    "nsd": "NSD",
    "early_tumor_sensitivity": "Early Tumor Sen.",
    "patient_specificity": "Specificity",
    "false_positives_per_scan": "FP/scan",
}

_SPECIAL = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
)


def latex_table(
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    caption: str = "",
    group: str | None = None,
    label: str = "",
) -> str:
    """Returns a LaTeX table (package booktabs), one line a row.

    Args:
        rows: of results.csv or `evaluate.summarize`; values may be text.
        columns: row key -> heading, in order; None takes `TABLE5_COLUMNS`. A number has one decimal
            (whole numbers none), with its interval behind it where the row has KEY_low and
            KEY_high. What is undefined is a dash.
        caption: plain text.
        group: row key whose changes start a block of its own with that value as heading, as Table 5
            does for its test sets; None for one block.
        label: for \\ref.

    Returns:
        The table environment's text.
    """
    columns = TABLE5_COLUMNS if columns is None else columns
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(caption)}}}",
        *([rf"\label{{{label}}}"] if label else []),
        rf"\begin{{tabular}}{{{'r' * len(columns)}}}",
        r"\toprule",
        " & ".join(latex_text(heading) for heading in columns.values()) + r" \\",
        r"\midrule",
    ]
    block = None
    for index, row in enumerate(rows):
        if group is not None and row[group] != block:
            block = row[group]
            lines += [r"\midrule"] if index else []
            lines += [rf"\multicolumn{{{len(columns)}}}{{l}}{{{latex_text(str(block))}}} \\"]
        lines.append(" & ".join(_cell(row, key) for key in columns) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def write_table(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    caption: str = "",
    group: str | None = None,
) -> None:
    """Writes PATH.tex as `latex_table` makes it, and PATH.csv with the same rows and intervals.

    Args:
        path: without ending.
        rows: as for `latex_table`.
        columns: as for `latex_table`; PATH.csv has the keys as header.
        caption: as for `latex_table`.
        group: as for `latex_table`; its column comes first in PATH.csv.
    """
    columns = TABLE5_COLUMNS if columns is None else columns
    present = set().union(*(row.keys() for row in rows))
    keys = [group] if group else []
    for key in columns:
        keys += [
            name for name in (key, f"{key}_low", f"{key}_high") if name == key or name in present
        ]
    write_text_atomic(f"{path}.tex", latex_table(rows, columns, caption, group))
    chosen = [{key: row.get(key) for key in keys} for row in rows]
    write_text_atomic(f"{path}.csv", csv_text(chosen, keys))


def latex_text(text: str) -> str:
    """Returns plain text with the characters that mean something to LaTeX escaped."""
    return text.translate(_SPECIAL)


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = _number(row.get(key))
    if value is None:
        text = row.get(key)
        return latex_text(text) if isinstance(text, str) and text else "--"
    low, high = _number(row.get(f"{key}_low")), _number(row.get(f"{key}_high"))
    interval = "" if low is None or high is None else rf" \scriptsize({low:.1f}--{high:.1f})"
    whole = key.startswith("n_") and value == int(value)
    return (f"{value:.0f}" if whole else f"{value:.1f}") + interval


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None  # text, or undefined
    return number if np.isfinite(number) else None
