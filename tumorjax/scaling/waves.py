"""Cells of a study in waves: those of a wave are trained in one step, over all processes.

Every process runs this with the same cells. A cell lies at one position along the mesh's "cell";
the processes that have devices there load its crops, test it and write its files.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tumorjax import parallel, processes
from tumorjax.clock import Clock
from tumorjax.errors import Preempted, UserError
from tumorjax.locks import claimed
from tumorjax.scaling import cell as cells_module
from tumorjax.scaling.cell import Scans
from tumorjax.scaling.grid import Cell
from tumorjax.scaling.results import WITH_SYNTHETIC
from tumorjax.training import preemption
from tumorjax.training.segmenter import Training, train_side_by_side

# Cells of one wave are tested for as long as it takes; a process that is gone ends the job itself.
_WAIT_SECONDS = 7 * 24 * 3600.0
_POLL_SECONDS = 2.0

Progress = Callable[[Cell], Callable[[int, Mapping[str, float]], None]]


def check(config: ConfigDict, mesh: Mesh, grid: Sequence[Cell]) -> None:
    """Refuses a mesh whose positions the grid's cells cannot fill.

    Raises:
        UserError: there are fewer cells than positions, or a position's devices are of several
            processes and cells train synthesizers of their own.
    """
    positions = mesh.shape["cell"]
    if positions > len(grid):
        raise UserError(
            f"mesh.cell is {positions} (of {mesh.devices.size} devices in {processes.count()}"
            f" processes), and the grid has {len(grid)} cells: the others would have nothing to"
            f" do. Make mesh.cell at most {len(grid)} and mesh.data, fsdp or space larger, or"
            " start fewer processes"
        )
    shared = any(len(parallel.processes_of(place)) > 1 for place in parallel.split_cells(mesh))
    if shared and config.synthesis.trained_on == "cell" and WITH_SYNTHETIC in config.grid.arms:
        raise UserError(
            "synthesis.trained_on=cell needs each cell within one process, and the mesh puts one"
            " on several. Make mesh.cell a multiple of the number of processes"
        )


def run(
    grid: Sequence[Cell],
    config: ConfigDict,
    mesh: Mesh,
    folders: Mapping[Cell, Path],
    scans_of: Callable[[Cell, Mesh], Scans],
    progress: Progress,
    done: Callable[[Cell], None],
    clock: Clock,
) -> dict[Cell, str]:
    """Trains and tests every cell that is not done, wave by wave.

    Args:
        grid: all cells.
        config: of the study.
        mesh: of the devices of all processes.
        folders: of the cells; their parent holds a lock file for each cell.
        scans_of: (cell, its part of the mesh) -> what it works on.
        progress: cell -> what is called with each row of its training curve.
        done: called in one process when a cell's results are complete.
        clock: gets the phases load, train, infer and metrics.

    Returns:
        the cells that failed with their reasons; they are not tried again.
    """
    failed: dict[Cell, str] = {}
    while True:
        preemption.stop_if_told("cells were trained and tested")
        with ExitStack() as claims:
            wave, others = _next_wave(grid, config, mesh, folders, failed, claims)
            if wave:
                failed |= _run_wave(wave, config, mesh, folders, scans_of, progress, done, clock)
        if not wave and not others:
            return failed
        if not wave:
            # Somebody else has the last cells, and gives them back if it dies.
            time.sleep(_POLL_SECONDS)


def _next_wave(
    grid: Sequence[Cell],
    config: ConfigDict,
    mesh: Mesh,
    folders: Mapping[Cell, Path],
    failed: Collection[Cell],
    claims: ExitStack,
) -> tuple[list[Cell], bool]:
    """Claims the next cells; returns them, and whether others hold some that are not done.

    One process looks and tells the others: what each would see at its own time might differ.
    """
    wave: list[Cell] = []
    others = False
    if processes.is_first():
        for cell in grid:
            if len(wave) == mesh.shape["cell"]:
                break
            folder = folders[cell]
            if cell in failed or cells_module.is_done(folder):
                continue
            # One program for all of a wave: with tumours made in the step, or without.
            if wave and _is_online(config, cell) != _is_online(config, wave[0]):
                continue
            with ExitStack() as claim:
                if not claim.enter_context(claimed(folder.parent / f".{cell.id}.lock")):
                    others = True
                elif not cells_module.is_done(folder):
                    wave.append(cell)
                    claims.push(claim.pop_all())
    found = processes.gather([[cell.id for cell in wave], others], _WAIT_SECONDS)[0]
    by_id = {cell.id: cell for cell in grid}
    return [by_id[name] for name in found[0]], bool(found[1])


def _run_wave(
    wave: Sequence[Cell],
    config: ConfigDict,
    mesh: Mesh,
    folders: Mapping[Cell, Path],
    scans_of: Callable[[Cell, Mesh], Scans],
    progress: Progress,
    done: Callable[[Cell], None],
    clock: Clock,
) -> dict[Cell, str]:
    places = parallel.split_cells(mesh)
    mine = {p: wave[p] for p in parallel.own_cells(mesh) if p < len(wave)}
    failed: dict[Cell, str] = {}

    def note(cell: Cell, error: Exception) -> None:
        if isinstance(error, Preempted):
            raise error
        logging.getLogger(__name__).error("cell %s failed", cell.id, exc_info=error)
        failed[cell] = f"{type(error).__name__}: {error}"

    scans: dict[int, Scans] = {}
    trainings: dict[int, Training] = {}
    for position, cell in mine.items():
        folders[cell].mkdir(parents=True, exist_ok=True)
        try:
            scans[position] = scans_of(cell, places[position])
        except Exception as error:
            note(cell, error)
            continue
        trainings[position] = cells_module.training_of(
            cell, scans[position], folders[cell], progress(cell)
        )
    transform = cells_module.transform_of(config, mesh) if _is_online(config, wave[0]) else None
    trained, diverged = train_side_by_side(
        config, trainings, mesh, clock=clock, transform=transform
    )
    for position, reason in diverged.items():
        note(mine[position], reason)

    def test(position: int, apply: jax.tree_util.Partial, local: Mesh | None) -> None:
        owners = parallel.processes_of(places[position])
        part = slice(owners.index(jax.process_index()), None, len(owners))
        cells_module.segment_and_measure(
            apply, config, scans[position], folders[mine[position]], clock, local, part
        )

    # Weights that several processes hold are gathered by all of them, in one order.
    local = {position: _at_home(places[position], apply) for position, apply in trained.items()}
    _each(local, test, lambda position, error: note(mine[position], error))
    reasons = _merged(failed, wave)

    def finish(position: int) -> None:
        cell = mine[position]
        if parallel.first_process(places[position]) == jax.process_index():
            cells_module.conclude(cell, config, scans[position], folders[cell], clock)
            done(cell)

    left = {position: () for position in local if mine[position] not in reasons}
    _each(left, finish, lambda position, error: note(mine[position], error))
    return _merged(failed, wave)


def _at_home(
    place: Mesh, apply: jax.tree_util.Partial
) -> tuple[jax.tree_util.Partial, Mesh | None]:
    """Returns a trained network for this process's devices alone, and these where they are several.

    Args:
        place: the cell's part of the mesh; all processes of it call this together.
        apply: with weights on it.
    """
    here = [d for d in place.devices.flat if d.process_index == jax.process_index()]
    whole = jax.jit(lambda weights: weights, out_shardings=parallel.replicated(place))(apply.args)
    weights = jax.tree.map(lambda x: x.addressable_data(0), whole)
    local = jax.tree_util.Partial(apply.func, *jax.device_put(weights, here[0]))
    return local, parallel.make_mesh({"data": -1}, here) if len(here) > 1 else None


def _each(
    items: Mapping[int, tuple[Any, ...]],
    work: Callable[..., None],
    failed: Callable[[int, Exception], None],
) -> None:
    """Does the work of each position in a thread of its own; reports those that fail."""
    with ThreadPoolExecutor(max(1, len(items))) as pool:
        futures = {p: pool.submit(work, p, *arguments) for p, arguments in items.items()}
    for position, future in futures.items():
        error = future.exception()
        if isinstance(error, Exception):
            failed(position, error)
        elif error is not None:
            raise error


def _is_online(config: ConfigDict, cell: Cell) -> bool:
    return bool(config.synthesis.online) and cell.arm == WITH_SYNTHETIC


def _merged(failed: Mapping[Cell, str], wave: Sequence[Cell]) -> dict[Cell, str]:
    """Returns what failed in any process."""
    mine = {cell.id: reason for cell, reason in failed.items()}
    found: dict[str, str] = {}
    for other in reversed(processes.gather(mine, _WAIT_SECONDS)):
        found |= other
    return {cell: found[cell.id] for cell in wave if cell.id in found}
