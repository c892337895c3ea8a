"""The job "scaling": from scans to curves, laws and a report.

Steps, each of which continues where it was stopped: prepare the store, split the cohort, make the
synthetic scans, train and test every cell of the grid, gather results.csv, fit the laws, write the
report. Several processes may be started on one workdir, each for itself; they share the cells. Or
they are one job (processes.coordinator) and train the cells side by side, see waves.py.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from data_prep.prepared_store import prepared_store
from tumorjax import parallel, processes
from tumorjax.anatomy import class_table, tumor_classes
from tumorjax.clock import Clock
from tumorjax.data import cohort
from tumorjax.errors import UserError
from tumorjax.files import read_csv, write_csv_atomic, write_json_atomic
from tumorjax.locks import locked
from tumorjax.scaling import grid, laws, report, synthetic_arm, waves
from tumorjax.scaling.cell import RESULT_COLUMNS, Scans, is_done, run_cell
from tumorjax.scaling.results import REAL, WITH_SYNTHETIC
from tumorjax.settings import first_difference, plain
from tumorjax.synthesis import realism
from tumorjax.synthesis.store import make_store
from tumorjax.training import monitor, preemption
from tumorjax.training.segmenter import check_network
from tumorjax.volumes import Store, open_store

# What may differ between two runs of one study: where it computes, not what.
_FREE = ("mesh", "processes", "workers", "cpu_devices", "monitor", "rehearse", "rehearsal")
_FREE_OF_GRID = ("side_by_side",)
_WAYS = ("auto", "stacked", "threads")
# That others wait while one process prepares, makes synthetic scans or writes the report.
_WAIT_SECONDS = 7 * 24 * 3600.0
_REJECTED_COLUMNS = ("case", "stage", "reason")


def run(config: ConfigDict, workdir: Path) -> int:
    """Runs the study, or what is left of it.

    Args:
        config: see configs/scaling.py.
        workdir: see the README for what it holds.

    Returns:
        0, or 1 if cases or cells were set aside (workdir/rejected.csv).

    Raises:
        UserError: the configuration cannot be run, or the workdir holds another study.
    """
    clock = Clock()
    parallel.split_cpu(config.cpu_devices)
    _check(config, workdir)
    cells = grid.cells(config.grid)
    folders = {cell: workdir / "cells" / cell.id for cell in cells}
    if _finished(workdir):
        print(f"{workdir}: already finished, see {workdir / 'report' / 'index.html'}")
        return 1 if _rejected(workdir) else 0
    mesh = parallel.make_mesh(config.mesh)
    stacked = _is_stacked(config, mesh, cells)
    with clock("prepare"):
        store, rejected = prepared_store(config, workdir)
    records = {case: store.record(case) for case in store.cases}
    classes = config.task.classes
    split = cohort.split(records, config.cohort, config.seed, classes)
    n_reals = list(config.grid.n_real)
    cohort.check_grid(split, records, n_reals, list(config.grid.arms), config.synthesis)
    print(
        f"{len(records)} scans: {len(split.train)} annotated and {len(split.healthy)} healthy to"
        f" train on, {len(split.id_test)} in-distribution and {len(split.ood_test)}"
        " out-of-distribution to test on"
    )
    tests = [("id", case) for case in split.id_test] + [("ood", case) for case in split.ood_test]
    synthesis = config.synthesis
    synthetic_store, implants = None, []
    if WITH_SYNTHETIC in config.grid.arms:
        source = synthetic_arm.origin(synthesis, {case: records[case] for _, case in tests})
        if processes.is_first():
            write_json_atomic(workdir / "synthesis.json", source._asdict())
        implants = cohort.plan_synthetic(
            split, records, synthesis.per_real * max(n_reals), synthesis, config.seed
        )
        if not synthesis.online and source.trained_on != "cell":
            url = synthesis.store or str(workdir / "synthetic")
            with clock("synthesize"):
                if processes.is_first():
                    with locked(workdir / ".synthesize.lock"):
                        rejected += make_store(
                            store, url, implants, synthesis, progress=_bar("implant")
                        )
                rejected = processes.gather(rejected, _WAIT_SECONDS)[0]
                synthetic_store = open_store(url)

    def scans_of(cell: grid.Cell, place: Mesh) -> Scans:
        real = cohort.subset(split, records, cell.n_real, cell.seed)
        scans = Scans(store, real, None, (), tests)
        if cell.arm != WITH_SYNTHETIC:
            return scans
        mine = implants[: synthesis.per_real * cell.n_real]
        if synthesis.online:
            return replace(scans, hosts=[implant.case for implant in mine])
        made = synthetic_store
        if made is None:
            settings = ConfigDict(config.to_dict() | {"seed": cell.seed})
            tested = {case: records[case] for _, case in tests}
            made = synthetic_arm.of_cell(
                settings, mine, store, real, tested, folders[cell], place, clock
            )
        there = set(made.cases)
        names = [implant.name for implant in mine if implant.name in there]
        return replace(scans, synthetic_store=made, synthetic=names)

    progress = _Progress(cells, lambda cell: is_done(folders[cell]))

    def work(cell: grid.Cell, place: Mesh) -> None:
        folders[cell].mkdir(parents=True, exist_ok=True)
        run_cell(
            cell,
            config,
            scans_of(cell, place),
            folders[cell],
            place,
            clock,
            progress.training(cell),
        )
        done(cell)

    def done(cell: grid.Cell) -> None:
        progress.done(cell, json.loads((folders[cell] / "results.json").read_text()))

    if stacked:
        failed = waves.run(cells, config, mesh, folders, scans_of, progress.training, done, clock)
    else:
        errors = grid.share(
            cells,
            workdir / "cells",
            lambda cell: is_done(folders[cell]),
            work,
            parallel.split_cells(mesh),
        )
        failed = {cell: f"{type(error).__name__}: {error}" for cell, error in errors.items()}
    preemption.stop_if_told("the report was to be written")
    rejected += [
        {"case": cell.id, "stage": "cell", "reason": reason} for cell, reason in failed.items()
    ]
    if processes.is_first():
        _conclude(config, workdir, store, split, synthetic_store, folders, rejected, clock)
    processes.barrier("report", _WAIT_SECONDS)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in clock.seconds.items())
    print(f"time: {seconds}; in all {clock.total():.0f} s")
    print(f"report: {workdir / 'report' / 'index.html'}")
    if rejected:
        print(f"{len(rejected)} set aside, see {workdir / 'rejected.csv'}")
    if failed and len(failed) == len(cells):
        raise UserError(f"no cell could be trained. {next(iter(failed.values()))}")
    return 1 if rejected or _rejected(workdir) else 0


def _conclude(
    config: ConfigDict,
    workdir: Path,
    store: Store,
    split: cohort.Split,
    synthetic_store: Store | None,
    folders: Mapping[grid.Cell, Path],
    rejected: list[dict[str, Any]],
    clock: Clock,
) -> None:
    """Compares synthetic with real tumours, and writes results, laws and report."""
    with locked(workdir / ".report.lock"):
        if not _finished(workdir):
            if synthetic_store is not None:
                with clock("realism"):
                    reference = _reference(list(folders), folders)
                    rejected += _realism(
                        workdir / "realism", store, split.train, synthetic_store, reference
                    )
            _gather(config, workdir, folders, rejected, clock)


def _is_stacked(config: ConfigDict, mesh: Mesh, cells: list[grid.Cell]) -> bool:
    """Whether cells are trained in one step, or each by a thread or process for itself.

    Raises:
        UserError: the way that is asked for does not fit the processes or the mesh.
    """
    way = config.grid.get("side_by_side", "auto")
    if way not in _WAYS:
        raise UserError(f"grid.side_by_side is {way!r}. Expected one of {', '.join(_WAYS)}")
    if way == "threads" and processes.count() > 1:
        raise UserError(
            "grid.side_by_side=threads is for processes that work on their own: start them"
            " without processes.coordinator, or leave it at auto"
        )
    # On a CPU the devices share the cores, and each step would wait for the slowest of them.
    many = 1 < mesh.shape["cell"] <= len(cells)
    automatic = processes.count() > 1 or (jax.default_backend() != "cpu" and many)
    stacked = way == "stacked" or (way == "auto" and automatic)
    if stacked:
        waves.check(config, mesh, cells)
    return stacked


def _check(config: ConfigDict, workdir: Path) -> None:
    """Refuses what cannot be run before anything is made, and keeps the study's configuration."""
    class_table(config.task.classes)
    if not tumor_classes(config.task.classes):
        raise UserError("task.classes has no tumour. Add one, for instance liver_lesion")
    unknown = sorted(set(config.grid.arms) - set(cohort.ARMS))
    if unknown or not config.grid.arms or not config.grid.n_real or not config.grid.seeds:
        raise UserError(
            f"grid has arms {list(config.grid.arms)}, n_real {list(config.grid.n_real)} and seeds"
            f" {list(config.grid.seeds)}. Expected arms among {', '.join(cohort.ARMS)}, and at"
            " least one of each"
        )
    if WITH_SYNTHETIC in config.grid.arms:
        synthetic_arm.check(config.synthesis)
    check_network(config)
    laws.check_settings(config.laws)
    monitor.check_settings(config.get("monitor", {}))
    if not config.data.store and not config.data.root and config.data.source != "virtual":
        raise UserError(
            f"data.root is empty. Give the folder of the {config.data.source} scans, or data.store"
        )
    path = workdir / "config.json"
    wanted = _settings(plain(config))
    with locked(workdir / ".config.lock"):
        if path.is_file():
            difference = first_difference(_settings(json.loads(path.read_text())), wanted)
            if difference:
                raise UserError(
                    f"{workdir} holds a study with other settings: {difference}."
                    " Use its settings, or another --workdir"
                )
        else:
            write_json_atomic(path, plain(config))


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of a configuration decides the results."""
    kept = {key: value for key, value in values.items() if key not in _FREE}
    grid_settings = {k: v for k, v in values["grid"].items() if k not in _FREE_OF_GRID}
    return kept | {"grid": grid_settings}


def _reference(cells: list[grid.Cell], folders: Mapping[grid.Cell, Path]) -> str:
    """Returns the folder of the largest cell without synthetic tumours; "" if there is none."""
    real = [cell for cell in cells if cell.arm == REAL and is_done(folders[cell])]
    return str(folders[max(real, key=lambda cell: (cell.n_real, -cell.seed))]) if real else ""


def _realism(
    folder: Path, store: Store, real: Sequence[str], synthetic: Store, checkpoint: str
) -> list[dict[str, Any]]:
    """Compares the training patients' tumours with the synthetic ones; returns what was set aside.

    What they look like is said by the encoder of a network that has seen no synthetic tumour.
    """
    try:
        summary = realism.write(store, real, synthetic, None, folder, {"checkpoint": checkpoint})
    except UserError as error:
        # A study may well have too few tumours to compare; its curves do not depend on it.
        print(f"synthetic and real tumours are not compared: {error}")
        return []
    return [dict(row) for row in summary["rejected"]]


def _gather(
    config: ConfigDict,
    workdir: Path,
    folders: Mapping[grid.Cell, Path],
    rejected: list[dict[str, Any]],
    clock: Clock,
) -> None:
    rows: list[dict[str, Any]] = []
    for folder in folders.values():
        if is_done(folder):
            rows += json.loads((folder / "results.json").read_text())
    # What cells set aside themselves, in this run or in one before.
    for path in (folder / synthetic_arm.REJECTED for folder in folders.values()):
        rejected += read_csv(path) if path.is_file() else []
    write_csv_atomic(workdir / "rejected.csv", rejected, _REJECTED_COLUMNS)
    if not rows:
        return
    with clock("laws"):
        write_csv_atomic(workdir / "results.csv", rows, RESULT_COLUMNS)
        cases = {
            cell.id: read_csv(folder / "cases.csv")
            for cell, folder in folders.items()
            if is_done(folder)
        }
        write_json_atomic(workdir / "laws.json", laws.analyse(rows, config.laws, cases=cases))
    timing = {name: round(value, 1) for name, value in clock.seconds.items()}
    write_json_atomic(workdir / "timing.json", timing | {"total": round(clock.total(), 1)})
    with clock("report"):
        report.write(workdir, config)
    # The report shows the time up to itself; the file that stays has it all.
    timing = {name: round(value, 1) for name, value in clock.seconds.items()}
    write_json_atomic(workdir / "timing.json", timing | {"total": round(clock.total(), 1)})
    if all(is_done(folder) for folder in folders.values()):
        write_json_atomic(workdir / "done.json", {"cells": [cell.id for cell in folders]})


def _finished(workdir: Path) -> bool:
    return (workdir / "done.json").is_file()


def _rejected(workdir: Path) -> bool:
    path = workdir / "rejected.csv"
    return path.is_file() and bool(read_csv(path))


def _bar(name: str):
    """Returns a progress callback (done, total) that draws a bar on a terminal."""
    bar = tqdm(unit=name, disable=None)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return show


class _Progress:
    """Tells how far the grid is, and how long it will take."""

    def __init__(self, cells: list[grid.Cell], is_done) -> None:
        self.cells = cells
        self.is_done = is_done
        self.start = time.perf_counter()
        self.done_before = sum(map(is_done, cells))

    def training(self, cell: grid.Cell):
        bar = tqdm(desc=cell.id, unit="step", disable=None, leave=False)

        def show(step: int, row: Mapping[str, float]) -> None:
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
            bar.update(step - bar.n)

        return show

    def done(self, cell: grid.Cell, lines: list[dict[str, Any]]) -> None:
        count = sum(map(self.is_done, self.cells))
        elapsed = time.perf_counter() - self.start
        left = elapsed / max(1, count - self.done_before) * (len(self.cells) - count)
        scores = ", ".join(
            f"{line['split']} DSC {line['dsc']:.1f}"
            for line in lines
            if line["class"] == "tumor" and line["dsc"] is not None
        )
        print(
            f"cell {count}/{len(self.cells)} {cell.id}: {scores or 'nothing to measure'};"
            f" about {left / 60:.0f} min left",
            flush=True,
        )
