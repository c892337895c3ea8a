"""Evaluation as a job: numbers from two folders of masks, or from a checkpoint and a store.

Each case's numbers are kept (records.py), so that a second run does only what is missing or
changed. From them come, one case at a time, cases.csv, summary.csv and summary.json (nnU-Net's
form), tables in the paper's form, the worst cases with pictures, and, where there are
probabilities, FROC curves and thresholds.json. Other models on the same cases are compared.
"""

import errno
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tumorjax.errors import UserError
from tumorjax.evaluation import comparison, folders, operating_points, scans, worst
from tumorjax.evaluation.cases import UNION, evaluate_case, label_overlap
from tumorjax.evaluation.measure import Task
from tumorjax.evaluation.paper_tables import write_tables
from tumorjax.evaluation.results import summarize_splits, write_results
from tumorjax.evaluation.settings import DEFAULTS, complete_settings
from tumorjax.evaluation.summary import (
    CASE_COLUMNS,
    METRICS,
    SUMMARY_COLUMNS,
    paired_difference,
    summarize,
)
from tumorjax.files import location, write_csv_atomic
from tumorjax.metrics.detection import THRESHOLDS
from tumorjax.settings import plain

__all__ = [
    "CASE_COLUMNS",
    "DEFAULTS",
    "METRICS",
    "SUMMARY_COLUMNS",
    "UNION",
    "evaluate_case",
    "label_overlap",
    "paired_difference",
    "run",
    "summarize",
]


def run(config: ConfigDict, workdir: Path) -> int:
    """Evaluates masks or a checkpoint, see configs/evaluation.py.

    Returns:
        Exit code: 0 all cases done, 1 some set aside in workdir/rejected.csv.

    Raises:
        UserError: the configuration asks for neither or both, or what it names is not there.
    """
    workdir = location(workdir)
    masks, network = bool(config.truth or config.prediction), bool(config.checkpoint)
    if masks == network:
        raise UserError(
            "evaluation needs either config.truth and config.prediction (two folders of masks), or"
            " config.checkpoint and config.data.store"
        )
    if masks and not (config.truth and config.prediction):
        raise UserError("config.truth and config.prediction go together: set both folders")
    settings = complete_settings(config.evaluation) | {"seed": config.seed}
    _check(config)
    try:
        return _evaluate(config, settings, workdir)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"{workdir}: no space left on the disk. Free some and run again: what is finished stays"
        ) from error


def _evaluate(config: ConfigDict, settings: dict[str, Any], workdir: Path) -> int:
    read_scan: worst.ReadScan | None = None
    if config.checkpoint:
        # The networks' libraries take seconds to import; masks do not need them.
        from tumorjax.evaluation import stores

        thresholds = operating_points.check_thresholds(config.froc.thresholds or THRESHOLDS)
        model = stores.open_model(config)
        task = stores.task_of_model(config, settings, thresholds, workdir, model)
        outcomes = stores.outcomes(config, task, model)
        info = _info(config, settings, model.grid, model.parameters, config.checkpoint)
        read_scan = scans.from_store(model.store)
    else:
        task = folders.task_of_folders(config, settings, workdir)
        outcomes = folders.outcomes(config, task, config.prediction)
        info = _info(config, settings, folders.GRID, None, config.prediction)
        if config.images:
            read_scan = scans.from_folder(config.images)
    others = _others(config, info["name"], workdir, task)
    code = write_results(config, task, outcomes, info, read_scan)
    for name, folder, other in others:
        if other is not None:
            theirs = _info(config, settings, folders.GRID, None, folder) | {"name": name}
            part = folders.outcomes(config, other, folder)
            code = max(code, write_results(config, other, part, theirs, read_scan))
    places = [(name, folder if own is None else own.workdir) for name, folder, own in others]
    _compare(config, settings, info, task, places)
    return code


# Settings


def _check(config: ConfigDict) -> None:
    if config.worst < 0:
        raise UserError(f"config.worst is {config.worst}. Expected a number of cases, or 0")
    if not 0 < config.froc.sensitivity <= 100:
        raise UserError(
            f"config.froc.sensitivity is {config.froc.sensitivity}. Expected percent, up to 100"
        )
    if config.comparison.resamples < 1:
        raise UserError(
            f"config.comparison.resamples is {config.comparison.resamples}. Expected 1 or more"
        )
    if config.comparison.family not in ("metric", "all"):
        raise UserError(
            f"config.comparison.family is {config.comparison.family!r}. Expected metric or all"
        )


def _info(
    config: ConfigDict,
    settings: Mapping[str, Any],
    grid: str,
    parameters: int | None,
    source: str,
) -> dict[str, Any]:
    """Returns evaluation.json: what was measured, how, and on which grid."""
    return {
        "name": config.name or location(source).name or source,
        "grid": grid,
        "parameters": parameters,
        "measured": {"checkpoint": source, "store": config.data.store}
        if config.checkpoint
        else {"truth": config.truth, "prediction": source},
        "settings": plain(settings),
    }


def _others(
    config: ConfigDict, own_name: str, workdir: Path, task: Task
) -> list[tuple[str, str, Task | None]]:
    """Returns name and folder of each model to compare with, and how to measure it here if so.

    Raises:
        UserError: a folder is not there, or folders of masks are to be compared with a checkpoint.
    """
    others: list[tuple[str, str, Task | None]] = []
    for name, folder in config.compare.items():
        folder = str(folder)
        if name == own_name:
            raise UserError(
                f"config.compare has {name!r}, which is this model's own name. Set config.name"
            )
        if (location(folder) / "cases.csv").is_file():
            comparison.read_model(name, folder)
            others.append((name, folder, None))
            continue
        if not location(folder).is_dir():
            raise UserError(
                f"config.compare.{name}: {folder} is not there. Expected the workdir of a finished"
                " evaluation, a study's cell, or a folder of masks"
            )
        if config.checkpoint:
            raise UserError(
                f"config.compare.{name}: {folder} has no cases.csv. Beside a checkpoint only"
                " finished evaluations can be compared: evaluate those masks on their own first"
            )
        # Any name will do for tables; a folder's name must be safe.
        safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip(".-") or "model"
        place = workdir / "models" / f"{len(others)}-{safe}"
        others.append((name, folder, task._replace(workdir=place)))
    return others


# Several models


def _compare(
    config: ConfigDict,
    settings: Mapping[str, Any],
    info: Mapping[str, Any],
    task: Task,
    others: Sequence[tuple[str, str | Path]],
) -> None:
    """Writes comparison.csv, and the tables of all models with this one last."""
    folder = task.workdir
    models = [comparison.read_model(name, place) for name, place in others]
    models.append(comparison.read_model(info["name"], folder))
    lines: list[dict[str, Any]] = []
    if others:
        models, left_out = comparison.on_same_cases(models)
        if left_out:
            print(f"set aside by one of the models, so left out for all: {', '.join(left_out)}")
        *rest, mine = models
        for other in rest:
            lines += comparison.compare(mine, other, settings, config.comparison.resamples)
        lines = comparison.correct(lines, config.comparison.family)
        write_csv_atomic(folder / "comparison.csv", lines, comparison.COLUMNS)
    else:
        (folder / "comparison.csv").unlink(missing_ok=True)
    methods = [
        {
            "name": model.name,
            "parameters": model.info.get("parameters"),
            "summary": summarize_splits(model.rows, settings),
        }
        for model in models
    ]
    if task.tumors:
        write_tables(folder / "tables", methods, lines, info["grid"], settings["confidence"])
