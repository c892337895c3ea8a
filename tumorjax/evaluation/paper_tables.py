"""Tables in the form of the paper's Tables 3, 4 and 5, as LaTeX (package booktabs) and CSV.

Table 3: one test set; for each tumour Sen., DSC and NSD, three tumours side by side; the methods
with their numbers of parameters. Table 4: several test sets side by side. Table 5: for each test
set the patient-level numbers of all tumours together. What the paper does not have is added in
small print: intervals under the numbers, how many patients and tumours there are, and p values of
the last method against each other one.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tumorjax import anatomy
from tumorjax.evaluation.tables import TABLE5_COLUMNS, latex_text, write_table
from tumorjax.files import csv_text, location, write_text_atomic

# As the paper heads them.
METRICS = {"tumor_sensitivity": "Sen.", "dsc": "DSC", "nsd": "NSD"}
SPLITS = {
    "": "All test data",
    "id": "Test on in-distribution data",
    "ood": "Test on out-of-distribution data",
}
TEST_NAMES = {"p_wilcoxon_holm": "Wilcoxon", "p_bootstrap_holm": "bootstrap"}

Rows = Sequence[Mapping[str, Any]]


def tumor_title(name: str) -> str:
    """Returns a class's heading: kidney_lesion becomes Kidney Tumor, as in the paper."""
    adjectives = {"pancreas": "pancreatic"}
    if name == "tumor":
        return "All Tumors"
    if name in anatomy.HOST:
        host = anatomy.HOST[name]
        return f"{adjectives.get(host, host).title()} Tumor"
    return name.replace("_", " ").title()


def write_tables(
    folder: str | Path,
    methods: Sequence[Mapping[str, Any]],
    comparisons: Rows,
    grid: str,
    confidence: float,
) -> None:
    """Writes table3, table4 and table5 as .tex and .csv.

    Args:
        folder: for the six files.
        methods: in the tables' order, the one that is compared last: name, parameters (None where
            unknown) and summary (rows of `summary.summarize` with their split).
        comparisons: rows of `comparison.correct`; empty for one method.
        grid: on which the numbers are.
        confidence: of the intervals.
    """
    folder = location(folder)
    share = f"{100 * confidence:g} \\%"
    note = (
        f"DSC and NSD in \\%, Sen.: share of tumors found. Measured on {latex_text(grid)}. In small"
        f" print {share} intervals (bootstrap over patients)."
    )
    if comparisons:
        note += (
            " $\\Delta$: last method less the best other; $p$: paired tests of that difference,"
            " after Holm."
        )
    splits = list(dict.fromkeys(row["split"] for method in methods for row in method["summary"]))
    classes = _classes(methods)
    cells = [(split, name) for split in splits for name in classes if _has(methods, split, name)]
    for number, per_block in ((3, 3), (4, 4)):
        text = _wide_table(methods, comparisons, cells, per_block, number == 3, note, len(splits))
        write_text_atomic(folder / f"table{number}.tex", text)
        columns, lines = _long_form(methods, cells)
        write_text_atomic(folder / f"table{number}.csv", csv_text(lines, columns))
    rows = [
        {"method": method["name"], "test": SPLITS.get(row["split"], f"Test on {row['split']}")}
        | dict(row)
        for split in splits
        for method in methods
        for row in method["summary"]
        if row["split"] == split and row["class"] == "tumor"
    ]
    headings = {key: text for key, text in TABLE5_COLUMNS.items() if key != "n_real"}
    columns5 = {"method": "Method", "n_patients": "Patients", "n_tumors": "Tumors"} | headings
    caption = (
        f"All tumors together, in %, but false positives per scan. Measured on {grid}. In brackets"
        f" {100 * confidence:g} % intervals (bootstrap over patients)."
    )
    write_table(folder / "table5", rows, columns5, caption, group="test")


def _wide_table(
    methods: Sequence[Mapping[str, Any]],
    comparisons: Rows,
    cells: Sequence[tuple[str, str]],
    per_block: int,
    with_parameters: bool,
    note: str,
    n_splits: int,
) -> str:
    lead = 2 if with_parameters else 1
    width = lead + len(METRICS) * min(per_block, max(len(cells), 1))
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{note}}}",
        rf"\begin{{tabular}}{{{'l' * lead}{'r' * (width - lead)}}}",
        r"\toprule",
    ]
    for start in range(0, len(cells), per_block):
        block = cells[start : start + per_block]
        lines += [r"\midrule"] if start else []
        for row in _block(methods, comparisons, block, with_parameters, n_splits > 1):
            if isinstance(row, str):
                lines.append(row)
            else:
                used = _columns_of(row)
                lines.append(" & ".join([*row, *[""] * (width - used)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _block(
    methods: Sequence[Mapping[str, Any]],
    comparisons: Rows,
    cells: Sequence[tuple[str, str]],
    with_parameters: bool,
    name_splits: bool,
) -> Iterator[list[str] | str]:
    """Yields the lines of one block: headings, methods, difference and tests."""
    lead = 2 if with_parameters else 1
    titles, counts, rules = [], [], []
    for position, (split, name) in enumerate(cells):
        title = latex_text(tumor_title(name))
        titles.append(f"{latex_text(split)} - {title}" if name_splits and split else title)
        row = _row(methods[-1], split, name)
        patients = f"{row['n_patients']} patients" if row else ""
        counts.append(rf"\scriptsize {patients}")
        first = lead + 1 + 3 * position
        rules.append(rf"\cmidrule(lr){{{first}-{first + 2}}}")
    blank = [""] * (lead - 1)
    head = ["Method", *(["Param"] if with_parameters else [])]
    yield head + [rf"\multicolumn{{3}}{{c}}{{{title}}}" for title in titles]
    yield ["", *blank] + [rf"\multicolumn{{3}}{{c}}{{{count}}}" for count in counts]
    yield "".join(rules)
    yield ["", *blank] + list(METRICS.values()) * len(cells)
    yield r"\midrule"
    best = {
        (cell, metric): max(
            (value for m in methods if (value := _value(m, cell, metric)) is not None),
            default=None,
        )
        for cell in cells
        for metric in METRICS
    }
    for method in methods:
        values, intervals = [], []
        for cell in cells:
            for metric in METRICS:
                value = _value(method, cell, metric)
                text = _printed(method, cell, metric, value)
                winner = len(methods) > 1 and value is not None and value == best[cell, metric]
                values.append(rf"\textbf{{{text}}}" if winner else text)
                intervals.append(_interval(method, cell, metric))
        yield [latex_text(method["name"]), *_parameters(method, with_parameters), *values]
        if any(intervals):
            yield ["", *blank, *intervals]
    if comparisons:
        yield from _differences(methods, comparisons, cells, blank)


def _differences(
    methods: Sequence[Mapping[str, Any]],
    comparisons: Rows,
    cells: Sequence[tuple[str, str]],
    blank: list[str],
) -> Iterator[list[str] | str]:
    """Yields the last method less the best other, with its interval and p values."""
    chosen = []
    for cell in cells:
        for metric in METRICS:
            others = [
                (value, other["name"])
                for other in methods[:-1]
                if (value := _value(other, cell, metric)) is not None
            ]
            best = max(others)[1] if others else None
            chosen.append(
                next(
                    (
                        line
                        for line in comparisons
                        if (line["split"], line["class"], line["metric"]) == (*cell, metric)
                        and line["other"] == best
                    ),
                    {},
                )
            )
    yield r"\midrule"
    yield [r"$\Delta$", *blank, *(_signed(line.get("difference")) for line in chosen)]
    ends = [(line.get("difference_low"), line.get("difference_high")) for line in chosen]
    yield ["", *blank, *(_between(_signed(low), _signed(high)) for low, high in ends)]
    for key, name in TEST_NAMES.items():
        yield [rf"$p$ ({name})", *blank, *(_p_value(line.get(key)) for line in chosen)]


def _long_form(
    methods: Sequence[Mapping[str, Any]], cells: Sequence[tuple[str, str]]
) -> tuple[list[str], list[dict[str, Any]]]:
    columns = ["method", "parameters", "split", "class", "n_patients", "n_tumors", "n_found"]
    columns += [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    lines = []
    for method in methods:
        for split, name in cells:
            row = _row(method, split, name)
            if row:
                line = {key: row.get(key) for key in columns} | {"method": method["name"]}
                lines.append(line | {"parameters": method["parameters"], "n_found": _found(row)})
    return columns, lines


def _classes(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(row["class"] for method in methods for row in method["summary"])
    alone = [name for name in names if name != "tumor"]
    return alone or list(names)


def _has(methods: Sequence[Mapping[str, Any]], split: str, name: str) -> bool:
    """Whether a test set has tumours of a class: else there is nothing to put into its columns."""
    rows = [_row(method, split, name) for method in methods]
    return any(row and row["n_tumors"] for row in rows)


def _row(method: Mapping[str, Any], split: str, name: str) -> Mapping[str, Any] | None:
    rows = method["summary"]
    return next((row for row in rows if (row["split"], row["class"]) == (split, name)), None)


def _value(method: Mapping[str, Any], cell: tuple[str, str], metric: str) -> float | None:
    row = _row(method, *cell)
    return None if row is None else row[metric]


def _found(row: Mapping[str, Any]) -> int | None:
    sensitivity = row["tumor_sensitivity"]
    return None if sensitivity is None else round(sensitivity / 100 * row["n_tumors"])


def _printed(
    method: Mapping[str, Any], cell: tuple[str, str], metric: str, value: float | None
) -> str:
    if value is None:
        return "--"
    if metric != "tumor_sensitivity":
        return f"{value:.1f}"
    row = _row(method, *cell)
    assert row is not None
    return f"{value:.1f} ({_found(row)}/{row['n_tumors']})"


def _interval(method: Mapping[str, Any], cell: tuple[str, str], metric: str) -> str:
    row = _row(method, *cell) or {}
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    return "" if low is None or high is None else _between(f"{low:.1f}", f"{high:.1f}")


def _between(low: str, high: str) -> str:
    return rf"\scriptsize {low} to {high}" if low and high and "--" not in (low, high) else ""


def _parameters(method: Mapping[str, Any], wanted: bool) -> list[str]:
    if not wanted:
        return []
    count = method["parameters"]
    return ["--" if count is None else f"{count / 1e6:.1f}M"]


def _signed(value: float | None) -> str:
    return "--" if value is None else f"${value:+.1f}$"


def _p_value(p: float | None) -> str:
    if p is None:
        return "--"
    return "$<$0.001" if p < 0.001 else f"{p:.3f}"


def _columns_of(row: Sequence[str]) -> int:
    return sum(3 if cell.startswith(r"\multicolumn{3}") else 1 for cell in row)
