"""The job "worth": what synthetic tumours are worth, by studies with different synthesizers.

Every synthesizer's arm is compared with real scans alone, and with every other synthesizer's arm,
by the same bootstrap as in `laws`: test patients are drawn anew, the same for all networks, and
the spread between trainings is added. So differences are paired.
"""

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from tumorjax.errors import UserError
from tumorjax.files import location, read_csv, write_bytes_atomic, write_csv_atomic
from tumorjax.scaling import figures, laws
from tumorjax.scaling.results import (
    ALL_TUMORS,
    METRICS,
    REAL,
    SPLITS,
    WITH_SYNTHETIC,
    Cases,
    read_cases,
)
from tumorjax.settings import first_difference

# What the studies may differ in: how tumours were made, which arms were trained, and where.
_FREE = (
    "synthesis",
    "data",
    "workers",
    "cpu_devices",
    "mesh",
    "processes",
    "monitor",
    "rehearse",
    "rehearsal",
    "report",
    "laws",
)
# Distinct in lightness too; the first is that of real scans alone.
_COLORS = ("#5f6368", "#c1272d", "#1f6fb4", "#8a5a00", "#3b7d3b")
_MARKERS = ("o", "s", "^", "D", "v")


class Arm(NamedTuple):
    """One arm: its rows of results.csv, and cell -> its rows of cases.csv."""

    name: str
    rows: list[dict[str, str]]
    cases: Cases


def run(config: ConfigDict, workdir: Path) -> int:
    """Compares the studies, see configs/worth.py.

    Returns:
        0.

    Raises:
        UserError: a folder is no finished study, or the studies are not comparable; says in what.
    """
    if not config.studies:
        raise UserError(
            "config.studies is empty. Set --config.studies=\"{'rules': 'runs/worth_rules'}\""
        )
    if config.metric not in METRICS:
        raise UserError(f"config.metric is {config.metric!r}. Expected one of {', '.join(METRICS)}")
    arms = read_arms({name: location(folder) for name, folder in config.studies.items()})
    found = compare(arms, config.metric, config.bootstrap, config.seed)
    rows = table(found, [arm.name for arm in arms])
    workdir = location(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    write_csv_atomic(workdir / "worth.csv", rows, list(rows[0]))
    text = markdown(found, [arm.name for arm in arms], config.metric)
    write_bytes_atomic(workdir / "worth.md", text.encode())
    with matplotlib.rc_context(figures.STYLE):
        figure = draw(found, [arm.name for arm in arms], config.metric)
        for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
            write_bytes_atomic(workdir / f"worth.{kind}", buffer.getvalue())
    print(text)
    print(f"worth: {workdir / 'worth.csv'}, worth.md, worth.png, worth.pdf")
    return 0


def read_arms(studies: Mapping[str, Path]) -> list[Arm]:
    """Reads real scans alone, then each study's synthetic arm.

    Args:
        studies: name -> folder.

    Raises:
        UserError: see `run`.
    """
    configs: dict[str, Any] = {}
    arms: list[Arm] = []
    for name, folder in studies.items():
        if name == REAL:
            raise UserError(f"config.studies calls a synthesizer {REAL!r}. Choose another name")
        try:
            configs[name] = json.loads((folder / "config.json").read_text())
            rows = read_csv(folder / "results.csv")
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: no finished study ({Path(error.filename).name} is missing). Run"
                " configs/scaling.py:worth there first"
            ) from None
        cases = read_cases(folder)
        for arm, called in ((REAL, REAL), (WITH_SYNTHETIC, name)):
            mine = [row for row in rows if row["arm"] == arm]
            if mine and called not in [a.name for a in arms]:
                cells = {row["cell"] for row in mine}
                arms.append(Arm(called, mine, {c: cases[c] for c in cells if c in cases}))
    first = next(iter(configs))
    for name, values in configs.items():
        difference = first_difference(_comparable(configs[first]), _comparable(values))
        if difference:
            raise UserError(
                f"studies {first} and {name} are not comparable: {difference}. Train both alike"
            )
    arms.sort(key=lambda arm: arm.name != REAL)
    missing = [name for name in (REAL, *studies) if name not in [arm.name for arm in arms]]
    if missing:
        raise UserError(
            f"no results of {', '.join(missing)}. Expected one study with the arm {REAL}, and the"
            f" arm {WITH_SYNTHETIC} in each"
        )
    tested = {arm.name: _tested(arm) for arm in arms}
    for name, patients in tested.items():
        if patients != tested[REAL]:
            raise UserError(
                f"{name} and {REAL} were tested on different scans"
                f" ({len(patients ^ tested[REAL])} differ). Give the studies one data.store"
            )
    return arms


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in config.items() if key not in _FREE}
    # Arms may be trained in studies of their own; so may some of the seeds and numbers.
    values.pop("grid", None)
    return values


def _tested(arm: Arm) -> set[tuple[str, str, str]]:
    return {
        (row["split"], row["patient"], row["case"]) for rows in arm.cases.values() for row in rows
    }


def compare(arms: Sequence[Arm], metric: str, bootstrap: int, seed: int) -> dict[str, Any]:
    """Compares every pair of arms.

    Args:
        arms: real scans alone first.
        metric: of results.csv.
        bootstrap: draws.
        seed: of the draws.

    Returns:
        curves: (split, arm) -> entry of laws.json (n, mean, low, high, seeds).
        differences: (split, arm, other) -> n, difference (other minus arm), low, high.
    """
    curves: dict[tuple[str, str], Any] = {}
    differences: dict[tuple[str, str, str], Any] = {}
    settings = {"metrics": (metric,), "bootstrap": bootstrap, "seed": seed}
    for one, other in itertools.combinations(arms, 2):
        rows, cases = [], {}
        # The analysis knows two arms: the first stands for real scans alone.
        for arm, role in ((one, REAL), (other, WITH_SYNTHETIC)):
            for row in arm.rows:
                cell = f"{arm.name}/{row['cell']}"
                rows.append(row | {"arm": role, "cell": cell})
                if row["cell"] in arm.cases:
                    cases[cell] = arm.cases[row["cell"]]
        rows = [row for row in rows if (row.get("class") or ALL_TUMORS) == ALL_TUMORS]
        report = laws.analyse(rows, settings, cases)
        for entry in report["curves"]:
            name = one.name if entry["arm"] == REAL else other.name
            curves.setdefault((entry["split"], name), entry)
        for entry in report["differences"]:
            differences[entry["split"], one.name, other.name] = entry
    return {"curves": curves, "differences": differences}


def table(found: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns worth.csv: a row per split and number of real scans.

    Columns: split, n_real, then of each arm ARM, ARM_low, ARM_high, ARM_seeds, and of each pair
    OTHER-ARM, OTHER-ARM_low, OTHER-ARM_high (points; 95 % intervals).
    """
    rows = []
    for split in SPLITS:
        curves = {name: found["curves"].get((split, name)) for name in names}
        for n in sorted({n for curve in curves.values() if curve for n in curve["n"]}):
            row: dict[str, Any] = {"split": split, "n_real": n}
            for name, curve in curves.items():
                at = curve["n"].index(n) if curve and n in curve["n"] else None
                for key, column in (("mean", ""), ("low", "_low"), ("high", "_high")):
                    row[name + column] = None if at is None else curve[key][at]
                row[f"{name}_seeds"] = 0 if at is None else curve["seeds"][at]
            for one, other in itertools.combinations(names, 2):
                entry = found["differences"].get((split, one, other))
                at = entry["n"].index(n) if entry and n in entry["n"] else None
                for key, column in (("difference", ""), ("low", "_low"), ("high", "_high")):
                    row[f"{other}-{one}{column}"] = None if at is None else entry[key][at]
            rows.append(row)
    return rows


def markdown(found: Mapping[str, Any], names: Sequence[str], metric: str) -> str:
    """Returns the table as Markdown, for a page of the documentation."""
    pairs = list(itertools.combinations(names, 2))
    titles = ["split", "real scans", *(_title(name) for name in names)]
    titles += [f"{other} − {one}" for one, other in pairs]
    lines = [f"{METRICS[metric]}, mean over trainings [95 % interval]:", ""]
    lines += ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for row in table(found, names):
        cells = [row["split"].upper(), str(row["n_real"])]
        cells += [_interval(row, name) for name in names]
        cells += [_interval(row, f"{other}-{one}", sign=True) for one, other in pairs]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _title(name: str) -> str:
    return "real alone" if name == REAL else f"real + {name}"


def _interval(row: Mapping[str, Any], name: str, sign: bool = False) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if value is None:
        return ""
    form = "{:+.1f}" if sign else "{:.1f}"
    text = form.format(value)
    if low is not None and high is not None:
        text += f" [{form.format(low)}, {form.format(high)}]"
    return text.replace("-", "−")


def draw(found: Mapping[str, Any], names: Sequence[str], metric: str) -> Figure:
    """Returns score against number of real scans, a panel a split and a line an arm."""
    splits = [s for s in SPLITS if any((s, name) in found["curves"] for name in names)]
    figure = Figure(figsize=(4.5 * len(splits), 3.6), layout="constrained")
    axes = figure.subplots(1, len(splits), squeeze=False, sharey=True)[0]
    for axis, split in zip(axes, splits, strict=True):
        numbers = set()
        for index, name in enumerate(names):
            curve = found["curves"].get((split, name))
            if curve is None:
                continue
            color = _COLORS[index % len(_COLORS)]
            # Arms of one number of scans stand side by side, so that intervals can be told apart.
            n = np.array(curve["n"]) * 1.06 ** (index - (len(names) - 1) / 2)
            mean = np.array(curve["mean"])
            if None not in curve["low"]:
                ends = mean - np.array(curve["low"]), np.array(curve["high"]) - mean
                axis.errorbar(n, mean, np.abs(ends), fmt="none", ecolor=color, alpha=0.5, lw=1.3)
            marker = _MARKERS[index % len(_MARKERS)]
            axis.plot(n, mean, color=color, marker=marker, ms=5, lw=1.5, label=_title(name))
            numbers |= set(curve["n"])
        ticks = sorted(numbers)
        axis.set_xscale("log")
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.set_title(figures.SPLIT_NAMES[split])
        axis.set_xlabel("annotated real scans (log scale)")
    axes[0].set_ylabel(METRICS[metric])
    handles, titles = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, titles, loc="outside upper left", ncols=len(names), fontsize=9, frameon=False
    )
    return figure
