"""The training loop: steps, the curve, checkpoints, and going on where a killed run stopped.

`train` is one training, on a mesh of its own. `train_side_by_side` is several of one architecture,
whose states are stacked and advance together in one step: they share nothing but the program, and
each leaves what it would leave alone.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from tumorjax import parallel, processes
from tumorjax.clock import Clock, Lap
from tumorjax.files import read_csv, write_csv_atomic
from tumorjax.training import checkpoints, preemption
from tumorjax.training.monitor import Monitor

# Cells come here hours apart where each trains a synthesizer first. A process that is gone ends the
# job by itself.
_WAIT_SECONDS = 7 * 24 * 3600.0

Batch = Mapping[str, np.ndarray]
Step = Callable[[Any, dict[str, Array]], tuple[Any, dict[str, Array]]]
Put = Callable[[Batch], dict[str, Array]]
StackedStep = Callable[[Any, dict[str, Array], Array], tuple[Any, dict[str, Array]]]


class Diverged(Exception):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Plan:
    """How long a training is, and when it tells and saves.

    Attributes:
        steps: length of the training.
        save_every: steps between checkpoints; the last is always saved.
        log_every: steps between rows of the curve.
        clock: gets the phases "load" and "train".
    """

    steps: int
    save_every: int
    log_every: int
    clock: Clock


@dataclass(frozen=True)
class Run:
    """One training among those that run side by side.

    Attributes:
        folder: as for `train`.
        state: initial state, on the cell's own part of the mesh.
        batches_from: as for `train`: this process's rows of the cell's batches.
        progress: as for `train`.
        monitor: as for `train`.
    """

    folder: Path
    state: Any
    batches_from: Callable[[int], Iterator[Batch]]
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, row: None
    monitor: Monitor | None = None


def train(
    folder: Path,
    state: Any,
    step: Step,
    batches_from: Callable[[int], Iterator[Batch]],
    *,
    mesh: Mesh,
    put: Put | None = None,
    steps: int,
    save_every: int,
    log_every: int,
    clock: Clock,
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, row: None,
    monitor: Monitor | None = None,
) -> Any:
    """Trains until `steps`, from the newest checkpoint in the folder if there is one.

    The result does not depend on where a run was stopped: the state holds its random key and its
    step, and `batches_from(n)` continues behind n batches.

    Args:
        folder: gets checkpoints/ and metrics.csv (step, seconds, then what `step` reports).
        state: initial training state on the mesh; a dictionary with "parameters" and "step".
        step: (state, batch) -> (state, scalars). It is given the state away.
        batches_from: iterator over this process's batches that begins behind n of them.
        mesh: of the devices.
        put: moves a batch onto them; `parallel.put_batch` if None.
        steps, save_every, log_every, clock: see `Plan`.
        progress: called with each row of the curve.
        monitor: records how it runs, in the process that writes the curve.

    Returns:
        the trained state.

    Raises:
        Diverged: the loss became NaN or infinite.
        Preempted: the job was told to stop; the step that was reached is saved.
        UserError: a checkpoint in the folder is of another network, or the disk is full.
    """
    put = put or functools.partial(parallel.put_batch, mesh)
    plan = Plan(steps, save_every, log_every, clock)
    run = Run(folder, state, batches_from, progress, monitor)
    alone = parallel.processes_of(mesh) == [jax.process_index()]
    with _Training(run, plan, mesh) as training:
        state = training.state
        for number in range(training.position + 1, steps + 1):
            with clock("load") as load:
                batch = next(training.batches)
            with clock("train") as lap, training.trace(number):
                placed = put(batch)
                state, scalars = step(state, placed)
                # One step in flight at a time: on CPU, dispatch would otherwise run far ahead
                # and hold the batches of many steps.
                jax.block_until_ready(scalars)
            training.stepped(number, load, lap, step, state, placed)
            del placed
            stop = preemption.requested(number, alone) and number < steps
            if stop or training.is_due(number):
                training.keep(number, {k: float(v) for k, v in scalars.items()}, state, stop)
            if stop:
                raise preemption.Preempted(
                    f"{folder}: told to stop, step {number} of {steps} is saved"
                )
    return state


def train_side_by_side(
    runs: Mapping[int, Run],
    step: StackedStep,
    idle: tuple[Callable[[int], Any], Batch],
    *,
    mesh: Mesh,
    put: Put,
    plan: Plan,
) -> tuple[dict[int, Any], dict[int, Exception]]:
    """Trains one cell at each position along the mesh's "cell", all in one step.

    A cell that has come to its end, or whose loss is no longer a number, is frozen: its state stays
    as it is, bit for bit, and the others go on. Each continues from its own newest checkpoint, and
    they need not be at the same step.

    Args:
        runs: position along "cell" -> training, of those positions that this process has devices
            at. A position without a training stays idle. All processes call this together.
        step: (stacked state, stacked batch, active) -> (stacked state, stacked scalars). It is
            given the state away, and leaves the cells that are not active as they are.
        idle: for positions without a training: position -> a state there, and a batch of this
            process's rows. Only their shapes matter.
        mesh: of the devices, with the same training on all of those that "cell" does not divide.
        put: moves a stacked batch onto the devices.
        plan: of all trainings.

    Returns:
        trained: position -> state, on the cell's own part of the mesh.
        failed: position -> what ended it.

    Raises:
        Preempted: the job was told to stop; what every cell has reached is saved.
        UserError: a checkpoint is of another network, or the disk is full.
    """
    alone = parallel.processes_of(mesh) == [jax.process_index()]
    places = parallel.split_cells(mesh)
    own = parallel.own_cells(mesh)
    failed: dict[int, Exception] = {}
    with contextlib.ExitStack() as stack:
        trainings = {
            position: stack.enter_context(_Training(run, plan, places[position]))
            for position, run in runs.items()
        }
        states = {
            position: trainings[position].state if position in trainings else idle[0](position)
            for position in own
        }
        state = parallel.stack_cells(mesh, states)
        states.clear()
        left = max((plan.steps - t.position for t in trainings.values()), default=0)
        batch = dict.fromkeys(own, idle[1])
        # All processes make as many steps as the slowest cell needs: a step is made together.
        total = max(processes.gather(left, _WAIT_SECONDS))
        for made in range(1, total + 1):
            numbers = {p: training.position + made for p, training in trainings.items()}
            active = [p for p, n in numbers.items() if n <= plan.steps and p not in failed]
            with plan.clock("load") as load:
                for position in active:
                    batch[position] = next(trainings[position].batches)
            with plan.clock("train") as lap, contextlib.ExitStack() as traces:
                for position in active[:1]:
                    traces.enter_context(trainings[position].trace(numbers[position]))
                stacked = {name: np.stack([batch[p][name] for p in own]) for name in idle[1]}
                placed = put(stacked)
                mask = _mask(mesh, own, active)
                state, scalars = step(state, placed, mask)
                jax.block_until_ready(scalars)
            for position in active:
                training = trainings[position]
                training.stepped(numbers[position], load, lap, step, state, placed, mask)
            del placed
            stop = preemption.requested(made, alone) and made < total
            found = parallel.cell_values(mesh, scalars)
            for position in active:
                training, number = trainings[position], numbers[position]
                try:
                    # At each step: a frozen state would not show later that it went wrong.
                    if (
                        stop
                        or training.is_due(number)
                        or not math.isfinite(found[position]["loss"])
                    ):
                        cell = parallel.cell_state(mesh, state, position)
                        training.keep(number, found[position], cell, stop)
                except Diverged as error:
                    failed[position] = error
                    training.stop(error)
            if stop:
                raise preemption.Preempted(
                    f"told to stop: what {len(active)} trainings have reached is saved"
                )
        return {p: parallel.cell_state(mesh, state, p) for p in trainings}, failed


class _Training:
    """A training's folder while it trains: where it begins, its curve and its checkpoints.

    Attributes:
        position: steps made before.
        state: to begin with, on the mesh.
        batches: from there on.
    """

    def __init__(self, run: Run, plan: Plan, mesh: Mesh):
        self._run, self._plan = run, plan
        self._curve = run.folder / "metrics.csv"
        # Of the processes that have a part of the mesh, the first writes the curve.
        owners = parallel.processes_of(mesh)
        self._writes = jax.process_index() == owners[0]
        some = owners if len(owners) < jax.process_count() else None
        self._manager = checkpoints.open_manager(run.folder, write=True, processes=some)
        self._monitor = run.monitor if self._writes else None
        self.state, self.position = run.state, 0
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> "_Training":
        restored = checkpoints.restore_newest(self._manager, self.state)
        if restored is not None:
            self.state, self.position = restored
        self._rows = _rows_until(self._curve, self.position)
        started = self.position < self._plan.steps
        if started and self._monitor is not None:
            self._monitor.start(self.position, self._plan.steps)
        self.batches = self._run.batches_from(self.position) if started else iter(())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        try:
            close = getattr(self.batches, "close", None)
            if close is not None:
                close()
            with self._plan.clock("train"):
                if kind is None or issubclass(kind, preemption.Preempted):
                    checkpoints.finish(self._manager)
                self._manager.close()
        except BaseException as failure:
            self.stop(failure)
            raise
        self.stop(error)

    def trace(self, number: int) -> contextlib.AbstractContextManager:
        """Returns what a step is made in, so that a profile shows it."""
        return contextlib.nullcontext() if self._monitor is None else self._monitor.trace(number)

    def stepped(self, number: int, load: Lap, lap: Lap, step: Callable, *arguments: Any) -> None:
        """Tells of a step that was made: how long it took, and of what calls of `step` are."""
        if self._monitor is not None:
            self._monitor.compiled(step, *arguments)
            self._monitor.step(number, load.seconds, lap.seconds)

    def stop(self, error: BaseException | None) -> None:
        """Tells that it has ended, once, and what ended it before its time."""
        if self._monitor is not None:
            self._monitor.end(error)
            self._monitor = None

    def is_due(self, number: int) -> bool:
        """Whether something is told or saved after a step."""
        return any(self._due(number))

    def _due(self, number: int) -> tuple[bool, bool]:
        log, save = (
            number % every == 0 or number == self._plan.steps
            for every in (self._plan.log_every, self._plan.save_every)
        )
        return log, save

    def keep(self, number: int, scalars: Mapping[str, float], state: Any, stop: bool) -> None:
        """Tells and saves what is due after a step; where training is to stop, saves in any case.

        Raises:
            Diverged: the loss is no longer a number.
        """
        log, save = self._due(number)
        # Also before a save, so that no bad checkpoint takes the place of a good one.
        if not math.isfinite(scalars["loss"]):
            raise Diverged(
                f"{self._run.folder.name}: the loss is {scalars['loss']} at step {number}. Lower"
                " training.learning_rate or training.clip"
            )
        if log:
            seconds = round(self._plan.clock.total(), 1)
            self._rows.append({"step": number, "seconds": seconds, **scalars})
            self._run.progress(number, scalars)
            if self._monitor is not None:
                self._monitor.row(number, scalars)
        if save or stop:
            with self._plan.clock("train") as lap:
                if self._writes and self._rows:
                    write_csv_atomic(self._curve, self._rows, list(self._rows[-1]))
                checkpoints.save(self._manager, number, state, number)
            if self._monitor is not None:
                self._monitor.save(number, lap.seconds)


def _mask(mesh: Mesh, own: Sequence[int], active: Sequence[int]) -> Bool[Array, "cells"]:
    """Returns which cells are to advance, each process saying so of its own."""
    return jax.make_array_from_process_local_data(
        parallel.by_cell(mesh),
        np.asarray([position in active for position in own]),
        (mesh.shape["cell"],),
    )


def _rows_until(curve: Path, step: int) -> list[dict[str, Any]]:
    """Returns the curve's rows up to a step; later ones will be made again."""
    if not curve.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for row in read_csv(curve):
        if int(row["step"]) <= step:
            numbers: dict[str, Any] = {k: float(v) if v else math.nan for k, v in row.items()}
            rows.append(numbers | {"step": int(row["step"])})
    return rows
