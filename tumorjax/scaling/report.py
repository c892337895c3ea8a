"""The report of a study: one folder with a page that opens without a network.

    report/index.html     all figures and tables in one file
    report/figures/       each figure as PNG and PDF
    report/tables/        each table as CSV and LaTeX

Made from laws.json alone, and from what else a study left. The same inputs give the same bytes.
"""

import base64
import importlib.metadata
import io
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tumorjax import files
from tumorjax.errors import UserError
from tumorjax.metrics.detection import SIZE_GROUPS
from tumorjax.pages import template
from tumorjax.scaling import figures, pictures, report_tables, synthetic_arm, words
from tumorjax.scaling.results import (
    ALL_TUMORS,
    ARMS,
    LESS_IS_BETTER,
    METRICS,
    SPLITS,
    Cases,
    read_cases,
    setting,
)
from tumorjax.settings import plain

_DPI = 120
_SAMPLES_SHOWN = 2
_ALARMS = ("patient_specificity", "auc", "false_positives_per_scan")
_REALISM_SHOWN = ("contact_sheet", "sizes", "auc")
_PACKAGES = (
    "tumorjax",
    "jax",
    "flax",
    "optax",
    "grain",
    "orbax-checkpoint",
    "tensorstore",
    "dask",
    "nibabel",
    "numpy",
    "scipy",
    "connected-components-3d",
    "matplotlib",
)


def write(workdir: str | Path, config: Mapping[str, Any]) -> Path:
    """Writes the report of a study, or of a table whose laws are known.

    Args:
        workdir: has laws.json; results.csv, cells/, realism/, synthesis.json, timing.json,
            rejected.csv and config.json are used where they are. Gets report/, whole or not at all.
        config: of the job. `report.samples`: number of test scans shown of each split; `results`:
            the table of a laws job, in whose folder a study's cells are looked for.

    Returns:
        The page.

    Raises:
        UserError: there is no laws.json.
    """
    workdir = files.location(workdir)
    if not (workdir / "laws.json").is_file():
        raise UserError(f"{workdir / 'laws.json'} is missing. Fit the laws before the report")
    found = json.loads((workdir / "laws.json").read_text())
    study = _study_folder(workdir, config)
    metric = _headline_metric(found)
    cases = read_cases(study)
    tables = _tables(found, metric, study)
    texts = {
        "headline": words.headline(found, metric),
        "grounds": words.grounds(found),
        "tiles": _tiles(found, metric),
        "stories": {figures.SPLIT_NAMES[s]: words.story(found, metric, s) for s in SPLITS},
        "progress": _progress(study, config),
        "synthesis": _synthesis(study),
        "realism": _realism(study),
        "timing": _timing(study),
        "rejected": _rejected(study),
        "config": _config(study, config),
        "versions": _versions(),
    }
    with files.replacing_folder(workdir / "report") as folder:
        with matplotlib.rc_context(figures.STYLE):
            drawn = _save_figures(_draw(found, metric, study, cases, config), folder / "figures")
        drawn |= _realism_figures(study, folder / "figures")
        _save_tables(tables, folder / "tables")
        page = template("tumorjax.scaling", "report.html").render(
            found=found, metric=METRICS[metric], figures=drawn, tables=tables, **texts
        )
        (folder / "index.html").write_text(page, encoding="utf-8")
    return workdir / "report" / "index.html"


def _study_folder(workdir: Path, config: Mapping[str, Any]) -> Path:
    beside = files.location(config.get("results") or workdir).parent
    if not (workdir / "cells").is_dir() and config.get("results") and (beside / "cells").is_dir():
        return beside
    return workdir


def _headline_metric(found: Mapping[str, Any]) -> str:
    measured = found["settings"]["metrics"]
    return next((m for m in METRICS if m in measured and m not in LESS_IS_BETTER), measured[0])


# Figures


def _draw(
    found: Mapping[str, Any], metric: str, study: Path, cases: Cases, config: Mapping[str, Any]
) -> dict[str, Figure]:
    """Returns name -> figure, for all that there is something to draw from."""
    curves = found["curves"]
    everything = figures.select(curves, **{"class": ALL_TUMORS})
    measured = [m for m in METRICS if figures.select(everything, metric=m)]
    splits = [s for s in SPLITS if figures.select(everything, split=s)]
    rows = [(figures.SPLIT_NAMES[split], {"split": split}) for split in splits]
    drawn = {}
    if splits:
        drawn["headline"] = figures.headline(curves, metric, splits)
        table_5 = [m for m in report_tables.TABLE_5 if m in measured]
        if set(table_5) - {metric}:
            columns = [(METRICS[m], {"metric": m}) for m in table_5]
            drawn["metrics"] = figures.scaling_grid(everything, rows, columns)
        if figures.select(found["differences"], metric=metric, **{"class": ALL_TUMORS}):
            drawn["gains"] = figures.gains(found, metric, splits)
    organs = report_tables.classes(found)
    if organs:
        columns = [
            (report_tables.class_name(organ).capitalize(), {"class": organ}) for organ in organs
        ]
        drawn["organs"] = figures.scaling_grid(
            figures.select(curves, metric=metric), rows or _all_rows(curves), columns, True
        )
    lesions = _lesion_counts(cases)
    sizes = [size for size in SIZE_GROUPS if f"sensitivity_{size}" in measured]
    if sizes:
        columns = [
            (size.capitalize() + lesions.get(size, ""), {"metric": f"sensitivity_{size}"})
            for size in sizes
        ]
        drawn["sizes"] = figures.scaling_grid(everything, rows, columns, same_scale=True)
    alarms = [
        m for m in ("patient_specificity", "auc", "false_positives_per_scan") if m in measured
    ]
    if alarms:
        columns = [(METRICS[m], {"metric": m}) for m in alarms]
        drawn["alarms"] = figures.scaling_grid(everything, rows, columns)
    samples = _samples(study, cases, config)
    if samples is not None:
        drawn["samples"] = samples
    training = _training(study)
    if training:
        drawn["training"] = figures.training_curves(training)
    return drawn


def _all_rows(curves: figures.Curves) -> list[tuple[str, dict[str, str]]]:
    present = [split for split in SPLITS if figures.select(curves, split=split)]
    return [(figures.SPLIT_NAMES[split], {"split": split}) for split in present]


def _lesion_counts(cases: Cases) -> dict[str, str]:
    """Returns size group -> number of its lesions in the tests, for titles."""
    counts = {}
    rows = [row for row in next(iter(cases.values()), []) if row["class"] == ALL_TUMORS]
    for size in SIZE_GROUPS:
        parts = []
        for split in SPLITS:
            chosen = [row for row in rows if row["split"] == split]
            if chosen:
                number = sum(int(float(row[f"lesions_{size}"] or 0)) for row in chosen)
                parts.append(f"{number} {split.upper()}")
        if parts:
            counts[size] = f" ({', '.join(parts)})"
    return counts


def _cells(study: Path) -> list[tuple[str, int, int, Path]]:
    """Returns arm, n_real, seed and folder of each cell; the id says them all."""
    cells = []
    for folder in sorted(study.glob("cells/*/")):
        arm, _, rest = folder.name.rpartition("-n")
        number, _, seed = rest.partition("-s")
        if arm in ARMS and number.isdigit() and seed.isdigit():
            cells.append((arm, int(number), int(seed), folder))
    return sorted(cells, key=lambda cell: (ARMS.index(cell[0]), cell[1], cell[2]))


def _samples(study: Path, cases: Cases, config: Mapping[str, Any]) -> Figure | None:
    """Draws the slices of both arms' smallest and largest cells that show the same scans."""
    shown = []
    cells = [cell for cell in _cells(study) if (cell[3] / "samples.npz").is_file()]
    for arm in ARMS:
        of_arm = [cell for cell in cells if cell[0] == arm]
        ends = {n: next(c for c in of_arm if c[1] == n) for n in sorted({c[1] for c in of_arm})}
        for n in sorted({*list(ends)[:1], *list(ends)[-1:]}):
            samples = pictures.read_samples(ends[n][3] / "samples.npz")
            if samples:
                dice = _dice(cases.get(ends[n][3].name, []))
                shown.append((f"{arm}, n = {n}", samples, dice))
    if not shown:
        return None
    common = set.intersection(*(set(samples) for _, samples, _ in shown))
    count = min(int(setting(config.get("report"), "samples", _SAMPLES_SHOWN)), _SAMPLES_SHOWN)
    chosen = pictures.choose({c: s for c, s in shown[0][1].items() if c in common}, count)
    return pictures.side_by_side(shown, chosen) if chosen else None


def _dice(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        row["case"]: float(row["dsc"])
        for row in rows
        if row["class"] == ALL_TUMORS and row["dsc"] not in ("", None)
    }


def _training(study: Path) -> list[tuple[str, int, dict[str, np.ndarray]]]:
    curves = []
    for arm, n, _, folder in _cells(study):
        if (folder / "metrics.csv").is_file():
            table = pd.read_csv(io.StringIO((folder / "metrics.csv").read_text()))
            dice = table[[name for name in table.columns if str(name).startswith("dice_")]]
            # Over the classes that the crops of a row had: the others are empty.
            mean = 100 * dice.mean(axis=1) if dice.shape[1] else pd.Series(np.nan, table.index)
            curve = {"step": table["step"], "loss": table["loss"], "dice": mean}
            curves.append((arm, n, {key: value.to_numpy() for key, value in curve.items()}))
    return curves


def _save_figures(drawn: Mapping[str, Figure], folder: Path) -> dict[str, str]:
    """Saves each figure as PNG and PDF and returns its PNG as text for the page."""
    folder.mkdir()
    # Says what it does with every glyph of a PDF, where the program's own level is INFO.
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    encoded = {}
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
        (folder / f"{name}.png").write_bytes(buffer.getvalue())
        encoded[name] = base64.b64encode(buffer.getvalue()).decode()
        figure.set_layout_engine("none")  # it stays as it was laid out for the PNG
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    return encoded


def _realism_figures(study: Path, folder: Path) -> dict[str, str]:
    """Copies the figures of realism that the page shows, and returns their PNGs as text."""
    encoded = {}
    for name in _REALISM_SHOWN:
        source = study / "realism" / "figures" / f"{name}.png"
        if source.is_file():
            for ending in (".png", ".pdf"):
                picture = source.with_suffix(ending).read_bytes()
                (folder / f"realism_{name}{ending}").write_bytes(picture)
            encoded[f"realism_{name}"] = base64.b64encode(source.read_bytes()).decode()
    return encoded


# Tables


def _tables(found: Mapping[str, Any], metric: str, study: Path) -> dict[str, pd.DataFrame]:
    metrics = [m for m in METRICS if m in found["settings"]["metrics"]]
    scores = report_tables.scores(found, metrics)
    main = [m for m in metrics if m == metric or m in report_tables.TABLE_5]
    tables = {
        "scores": scores,
        "table5": report_tables.printed_scores(scores, report_tables.TABLE_5),
        "laws": report_tables.law_table(found, main),
        "laws_all_scores": report_tables.law_table(found, metrics),
        "savings": report_tables.savings_table(found, main),
        "savings_all_scores": report_tables.savings_table(
            found, metrics, [ALL_TUMORS, *report_tables.classes(found)]
        ),
        "equivalents": report_tables.equivalents_table(found, metric),
        "organs": report_tables.organ_table(found, report_tables.TABLE_5),
    }
    if (study / "results.csv").is_file():
        results = pd.read_csv(io.StringIO((study / "results.csv").read_text()))
        columns = ["split", "class", "n_patients", "n_tumors"]
        if set(columns) <= set(results.columns):
            tests = results[columns].drop_duplicates().reset_index(drop=True)
            tests["class"] = tests["class"].map(report_tables.class_name)
            tests.columns = pd.Index(["split", "tumours", "patients", "number of tumours"])
            tables["tests"] = tests
    return {name: table for name, table in tables.items() if len(table)}


def _save_tables(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    folder.mkdir()
    for name, table in tables.items():
        (folder / f"{name}.csv").write_text(table.to_csv(index=False, lineterminator="\n"))
        if name != "scores":  # a table of numbers to compute with, too wide for print
            text = table.astype(object).where(table.notna(), "")
            latex = (
                text.to_latex(index=False, escape=True).replace("−", "$-$").replace("·", "$\\cdot$")
            )
            (folder / f"{name}.tex").write_text(latex)


def _tiles(found: Mapping[str, Any], metric: str) -> list[dict[str, str]]:
    """Returns the few numbers that stand on top of the page."""
    tiles = []
    for split in SPLITS:
        for arm in ARMS:
            keys = {"split": split, "arm": arm, "metric": metric, "class": ALL_TUMORS}
            for curve in figures.select(found["curves"], **keys):
                best = int(np.argmax(curve["mean"]))
                interval = words.range_of((curve["low"][best], curve["high"][best]))
                tiles.append(
                    {
                        "arm": arm,
                        "name": f"{figures.SPLIT_NAMES[split]}, {figures.ARM_NAMES[arm]}",
                        "value": f"{curve['mean'][best]:.1f}",
                        "note": f"best, at {curve['n'][best]} scans"
                        + (f"; {interval}" if interval else ""),
                    }
                )
    return tiles


# What else a study left


def _progress(study: Path, config: Mapping[str, Any]) -> str:
    """Returns a sentence when cells of the grid are missing."""
    grid = config.get("grid")
    if not grid:
        return ""
    planned = len(grid["n_real"]) * len(grid["arms"]) * len(grid["seeds"])
    done = len(list(study.glob("cells/*/cases.csv")))
    if done >= planned:
        return ""
    return f"{done} of the study's {planned} cells are done; this report is of those."


def _synthesis(study: Path) -> str:
    """Returns where the study's synthetic tumours come from, "" where it has none."""
    path = study / "synthesis.json"
    return synthetic_arm.sentence(json.loads(path.read_text())) if path.is_file() else ""


def _realism(study: Path) -> str:
    """Returns how real the study's synthetic tumours are, in a sentence; "" where nobody looked."""
    path = study / "realism" / "realism.json"
    return json.loads(path.read_text())["headline"] if path.is_file() else ""


def _timing(study: Path) -> list[tuple[str, float, float]]:
    if not (study / "timing.json").is_file():
        return []
    seconds = json.loads((study / "timing.json").read_text())
    total = seconds.get("total") or sum(seconds.values()) or 1
    return [(name, value, 100 * value / total) for name, value in seconds.items()]


def _rejected(study: Path) -> list[dict[str, str]] | None:
    path = study / "rejected.csv"
    return files.read_csv(path) if path.is_file() else None


def _config(study: Path, config: Mapping[str, Any]) -> str:
    path = study / "config.json"
    values = json.loads(path.read_text()) if path.is_file() else plain(config)
    return json.dumps(values, indent=2)


def _versions() -> list[tuple[str, str]]:
    versions = [("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            versions.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            versions.append((name, "not installed"))
    return versions
