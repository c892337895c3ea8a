"""What an evaluation writes of one model, from the kept records, one case at a time."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tumorjax.errors import CaseError
from tumorjax.evaluation import comparison, figures, operating_points, worst
from tumorjax.evaluation.cases import UNION
from tumorjax.evaluation.measure import Task
from tumorjax.evaluation.nnunet_summary import Summary
from tumorjax.evaluation.records import Outcome, read_result
from tumorjax.evaluation.summary import CASE_COLUMNS, SUMMARY_COLUMNS, summarize
from tumorjax.files import (
    location,
    read_csv,
    write_csv_atomic,
    write_json_atomic,
    write_text_atomic,
)


def write_results(
    config: ConfigDict,
    task: Task,
    outcomes: Iterator[Outcome],
    info: dict[str, Any],
    read_scan: worst.ReadScan | None,
) -> int:
    """Goes through a model's cases and writes everything that is about it alone.

    Args:
        config: of the job; froc, worst and compare are read.
        task: what all cases share.
        outcomes: of the cases; they are computed while this goes through them.
        info: what evaluation.json says.
        read_scan: for pictures; None where there are only masks.

    Returns:
        0, or 1 where cases were set aside.
    """
    workdir = task.workdir
    cases: list[str] = []
    fresh, rejected = 0, []
    for outcome in outcomes:
        if outcome.error is None:
            cases.append(outcome.case)
            fresh += outcome.fresh
        else:
            rejected.append(outcome.error)
    cases.sort()
    rejected.sort(key=lambda error: error.case)

    summary = Summary(task.labels, info["grid"])
    rows: list[dict[str, Any]] = []
    pictures: list[worst.Entry] = []

    def counts() -> Iterator[tuple[str, Mapping[str, Any]]]:
        # Each record is read once; what is not needed for means is not held.
        for case in cases:
            result = read_result(workdir, case)
            rows.extend(result["rows"])
            pictures.extend(worst.entries_of(result))
            summary.add(result)
            if "froc" in result:
                yield result["rows"][0]["patient"], result["froc"]

    froc = operating_points.gather(counts(), task.thresholds)
    _write_tables(rows, summary, rejected, task, info)
    if froc:
        _write_froc(config, task, froc, rows, info)
    if config.worst and task.tumors:
        worst.write_page(
            workdir, pictures, config.worst, task.tumors, read_scan, info["name"], info["grid"]
        )
    # Last, so that a folder with it is a finished evaluation.
    write_json_atomic(workdir / "evaluation.json", info | {"n_cases": len(cases)})
    for error in rejected:
        print(f"set aside: {error}", file=sys.stderr)
    if rejected:
        state = f"{len(cases)} cases evaluated, {len(rejected)} in rejected.csv"
    elif not fresh:
        state = f"finished before, all {len(cases)} cases are there"
    else:
        state = f"{fresh} cases evaluated, {len(cases) - fresh} were there"
    print(f"{workdir}: {state}; numbers are on {info['grid']}")
    return 1 if rejected else 0


def _write_tables(
    rows: list[dict[str, Any]],
    summary: Summary,
    rejected: Sequence[CaseError],
    task: Task,
    info: Mapping[str, Any],
) -> None:
    workdir = task.workdir
    # Of anatomy's 32 labels most data sets have a few: a tumour that no mask has is left out.
    seen = {row["class"] for row in rows if row["has_tumor"] or row["predicted_tumor"]} | {UNION}
    rows = [row for row in rows if row["class"] in seen]
    write_csv_atomic(workdir / "cases.csv", rows, CASE_COLUMNS)
    lines = [line | {"grid": info["grid"]} for line in summarize_splits(rows, task.settings)]
    write_csv_atomic(workdir / "summary.csv", lines, ("split", *SUMMARY_COLUMNS, "grid"))
    write_text_atomic(workdir / "summary.json", summary.text())
    reasons = workdir / "rejected.csv"
    if rejected:
        table = [
            {"case": e.case, "stage": "evaluation", "reason": f"{e.found}. {e.action}"}
            for e in rejected
        ]
        write_csv_atomic(reasons, table, ("case", "stage", "reason"))
    else:
        reasons.unlink(missing_ok=True)


def summarize_splits(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns `summary.summarize` of each split, with a column split."""
    lines = []
    for split in dict.fromkeys(row["split"] for row in rows):
        part = [row for row in rows if row["split"] == split]
        lines += [{"split": split} | line for line in summarize(part, settings)]
    return lines


def _write_froc(
    config: ConfigDict,
    task: Task,
    froc: Mapping[str, operating_points.Counts],
    rows: Sequence[Mapping[str, Any]],
    info: Mapping[str, Any],
) -> None:
    """Writes froc.csv, froc.png, froc.pdf and thresholds.json."""
    settings, wanted = task.settings, float(config.froc.sensitivity)
    known = [*task.tumors, *([UNION] if UNION not in task.tumors else [])]
    lines = [
        line for name in known for line in operating_points.curve_rows(name, froc[name], settings)
    ]
    write_csv_atomic(task.workdir / "froc.csv", lines, operating_points.CURVE_COLUMNS)
    points = {
        name: operating_points.choose_threshold(froc[name], wanted, settings) for name in known
    }
    record = {
        "model": info["name"],
        "measured": info["measured"],
        "grid": info["grid"],
        "wanted_sensitivity": wanted,
        "confidence": settings["confidence"],
        "connectivity": settings["connectivity"],
        "minimum_mm3": settings["minimum_mm3"],
        "splits": sorted({row["split"] for row in rows}),
        "thresholds": list(task.thresholds),
        "classes": points,
    }
    write_json_atomic(task.workdir / "thresholds.json", record)
    curves = [(info["name"], lines)]
    for name, folder in config.compare.items():
        path = location(str(folder)) / "froc.csv"
        if path.is_file():
            curves.append((name, [_numbers(line) for line in read_csv(path)]))
    with figures.style():
        # A single kind of tumour and all tumours together are the same curve.
        shown = comparison.classes_of(lines)
        chosen = [(name, [r for r in part if r["class"] in shown]) for name, part in curves]
        note = f"measured on {info['grid']}; bars: {100 * settings['confidence']:g} % intervals"
        figures.save(
            figures.froc_figure(chosen, points, wanted, note), task.workdir / "figures" / "froc"
        )


def _numbers(line: Mapping[str, str]) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        key: None if value == "" else float(value) for key, value in line.items() if key != "class"
    }
    for key in ("n_tumors", "n_scans"):
        numbers[key] = int(numbers[key])
    return numbers | {"class": line["class"]}
