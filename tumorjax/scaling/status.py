"""The job "status": how far a study or a training is, seen from outside while it runs.

It only reads: nothing in the workdir is made, changed or waited for.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tumorjax.buckets import BucketPath
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.locks import is_held
from tumorjax.scaling import grid

STATES = ("done", "running", "stopped", "failed", "waiting")
# A training tells every 10 s or every step that it lives; one silent for longer has stopped.
_SILENT_SECONDS = 60.0
_SILENT_STEPS = 10
# Until its first step is compiled, and for a test case, nothing is heard.
_SILENT_START_SECONDS = 1800.0
_SILENT_CASE_SECONDS = 900.0


def run(config: ConfigDict, workdir: Path) -> int:
    """Prints the state of the job in a workdir.

    Args:
        config: json says whether to print JSON.
        workdir: of a study, of a job that trains one network, or of a cell.

    Returns:
        0, whatever the state.

    Raises:
        UserError: nothing of that kind is in the workdir.
    """
    state = status(workdir)
    print(json.dumps(state, indent=1, allow_nan=False) if config.json else text(state))
    return 0


def status(workdir: Path, now: float | None = None) -> dict[str, Any]:
    """Returns the state of a study or a training.

    Args:
        workdir: of the job.
        now: seconds since 1970; None for the clock.

    Returns:
        workdir, kind ("study" or "training"), a count for each of `STATES`, finished (a study's
        report is written), running_side_by_side, seconds_left (None where nothing runs or no speed
        is known), starts and repeated_steps (of all cells), goodput (of their time), set_aside
        (cases and cells in rejected.csv), and cells: for each cell, state, step, steps, loss,
        steps_per_second, seconds_left, starts, repeated_steps, goodput, testing (tests done, of a
        cell that is trained), reason (of one that failed or stopped).

    Raises:
        UserError: nothing of that kind is in the workdir.
    """
    now = time.time() if now is None else now
    config = _json(workdir / "config.json")
    if not config or "training" not in config:
        raise UserError(
            f"{workdir}: no config.json of a study or a training. Give the --workdir that such a"
            " job has or had"
        )
    rejected = _rows(workdir / "rejected.csv")
    study = "grid" in config
    steps = int(config["training"]["steps"])
    if study:
        failed = {row["case"]: row["reason"] for row in rejected if row["stage"] == "cell"}
        names = [cell.id for cell in grid.cells(config["grid"])]
        cells = [_cell(workdir, name, steps, failed.get(name), now) for name in names]
    else:
        done = (workdir / "done.json").is_file() or (workdir / "results.json").is_file()
        cells = [_training(workdir, workdir.name, steps, done, False, None, now)]
    counts = Counter(cell["state"] for cell in cells)
    records = [cell.pop("record") for cell in cells]
    wall = sum(record["wall_seconds"] for record in records if record)
    useful = sum(record["useful_seconds"] for record in records if record)
    return {
        "workdir": str(workdir),
        "kind": "study" if study else "training",
        **{state: counts[state] for state in STATES},
        "finished": (workdir / "done.json").is_file(),
        "seconds_left": _seconds_left(cells, records),
        "starts": sum(cell["starts"] for cell in cells),
        "repeated_steps": sum(cell["repeated_steps"] for cell in cells),
        "goodput": useful / wall if wall > 0 else None,
        "set_aside": len(rejected),
        "cells": cells,
    }


def text(state: Mapping[str, Any]) -> str:
    """Returns what `status` found as a table."""
    cells = state["cells"]
    counts = ", ".join(f"{state[name]} {name}" for name in STATES if state[name])
    lines = [
        f"{state['workdir']}: {state['kind']}"
        + (f" of {len(cells)} cells" if state["kind"] == "study" else "")
        + f", {counts}; {_left(state)}"
    ]
    rows = [("cell", "state", "step", "loss", "steps/s", "left", "starts", "redone", "goodput")]
    for cell in cells:
        what = cell["state"]
        if cell["testing"] is not None and what in ("running", "stopped"):
            what += f", {cell['testing']} tested"
        rows.append(
            (
                cell["cell"],
                what,
                f"{cell['step']}/{cell['steps']}",
                _number(cell["loss"], ".4f"),
                _number(cell["steps_per_second"], ".3g"),
                "" if cell["seconds_left"] is None else _duration(cell["seconds_left"]),
                str(cell["starts"] or ""),
                str(cell["repeated_steps"] or ""),
                _number(cell["goodput"], ".0%"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        fields = [
            value.ljust(width) if index < 2 else value.rjust(width)
            for index, (value, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(fields).rstrip())
    lines += [f"{cell['cell']}: {cell['reason']}" for cell in cells if cell["reason"]]
    if state["goodput"] is not None:
        lines.append(
            f"goodput {state['goodput']:.0%}: {state['starts']} starts,"
            f" {state['repeated_steps']} steps done again"
        )
    if state["set_aside"]:
        lines.append(f"{state['set_aside']} set aside, see {state['workdir']}/rejected.csv")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- one training


def _cell(workdir: Path, name: str, steps: int, failed: str | None, now: float) -> dict[str, Any]:
    folder = workdir / "cells" / name
    held = is_held(workdir / "cells" / f".{name}.lock")
    done = (folder / "results.json").is_file()
    return _training(folder, name, steps, done, held, failed, now)


def _training(
    folder: Path,
    name: str,
    steps: int,
    done: bool,
    held: bool,
    failed: str | None,
    now: float,
) -> dict[str, Any]:
    """Returns the state of one training, with its record ({} without one)."""
    record = _json(folder / "goodput.json") or {}
    curve = _rows(folder / "metrics.csv")
    saved = int(curve[-1]["step"]) if curve else 0
    step = steps if done else int(record.get("step", saved))
    tests = list((folder / "cases").glob("*.json")) if (folder / "cases").is_dir() else []
    trained = step >= steps
    if done:
        state = "done"
    elif held or _alive(record, tests, now):
        state = "running"
    elif failed or record.get("state") == "failed":
        state = "failed"
    elif record or curve or (folder / "config.json").is_file():
        state = "stopped"
    else:
        state = "waiting"
    if record:
        end = now if state == "running" and not trained else record["written"]
        record |= {"wall_seconds": max(0.0, end - record["first_start"])}
    each = record.get("step_seconds")
    each = each + record["load_seconds"] if each else None
    reason = failed or record.get("reason", "") if state in ("failed", "stopped") else ""
    return {
        "cell": name,
        "state": state,
        "step": step,
        "steps": steps,
        "loss": float(curve[-1]["loss"]) if curve and curve[-1].get("loss") else None,
        "steps_per_second": 1 / each if each else None,
        "seconds_left": (steps - step) * each if each and state == "running" else None,
        "starts": int(record.get("starts", 0)),
        "repeated_steps": int(record.get("repeated_steps", 0)),
        "goodput": _share(record),
        "testing": len(tests) if trained and not done and tests else None,
        "reason": reason,
        "record": record,
    }


def _alive(record: Mapping[str, Any], tests: Sequence[Path], now: float) -> bool:
    """Whether a training was heard of lately, by its record or its tests' results."""
    if not record or record["state"] not in ("running", "trained"):
        return False
    if record["state"] == "trained":
        heard = max([record["written"], *map(_written, tests)])
        return now - heard < _SILENT_CASE_SECONDS
    if not record["compiled"]:
        return now - record["written"] < _SILENT_START_SECONDS
    each = record.get("step_seconds", 0.0) + record.get("load_seconds", 0.0)
    return now - record["written"] < max(_SILENT_SECONDS, _SILENT_STEPS * each)


def _share(record: Mapping[str, Any]) -> float | None:
    wall = record.get("wall_seconds", 0.0)
    return record["useful_seconds"] / wall if wall > 0 else None


def _seconds_left(
    cells: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> float | None:
    """Returns how long all cells will take, as many side by side as there are now."""
    if all(cell["state"] in ("done", "failed") for cell in cells):
        return 0.0
    running = sum(cell["state"] == "running" for cell in cells)
    speeds = [cell["steps_per_second"] for cell in cells if cell["steps_per_second"]]
    if not running or not speeds:
        return None
    each = 1 / statistics.median(speeds)
    left = [c for c in cells if c["state"] not in ("done", "failed")]
    # What cells took that are done, beside their steps: starting, compiling, loading, saving.
    others = [
        record["wall_seconds"] - record["step"] * each
        for cell, record in zip(cells, records, strict=True)
        if cell["state"] == "done" and record and record["starts"] == 1
    ]
    beside = max(0.0, statistics.median(others)) if others else 0.0
    fresh = sum(c["state"] == "waiting" for c in left)
    return (sum(c["steps"] - c["step"] for c in left) * each + fresh * beside) / running


# ---------------------------------------------------------------------------- reading and telling


def _written(path: Path) -> float:
    """When a file was written, s since 1970; 0 in a bucket, which is not asked for it."""
    return 0.0 if isinstance(path, BucketPath) else path.stat().st_mtime


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, NotADirectoryError) as error:
        raise UserError(f"{path}: not readable ({error}). Is this a job's workdir?") from error


def _rows(path: Path) -> list[dict[str, str]]:
    return read_csv(path) if path.is_file() else []


def _left(state: Mapping[str, Any]) -> str:
    if state["done"] == len(state["cells"]):
        return "finished" if state["finished"] or state["kind"] != "study" else "report to be made"
    if state["seconds_left"] is None:
        return "nothing runs" if not state["running"] else "time left not known yet"
    return f"about {_duration(state['seconds_left'])} left"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes // 1440} d"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
