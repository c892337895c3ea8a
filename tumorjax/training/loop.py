"""The training loop: steps, the curve, checkpoints, and going on where a killed run stopped."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from tumorjax import parallel
from tumorjax.clock import Clock
from tumorjax.files import read_csv, write_csv_atomic
from tumorjax.training import checkpoints

Step = Callable[[Any, dict[str, Array]], tuple[Any, dict[str, Array]]]


class Diverged(Exception):
    """The loss is no longer a number."""


def train(
    folder: Path,
    state: Any,
    step: Step,
    batches_from: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    *,
    mesh: Mesh,
    steps: int,
    save_every: int,
    log_every: int,
    clock: Clock,
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, row: None,
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
        steps: length of the training.
        save_every: steps between checkpoints; the last is always saved.
        log_every: steps between rows of the curve.
        clock: gets the phases "load" and "train".
        progress: called with each row of the curve.

    Returns:
        the trained state.

    Raises:
        Diverged: the loss became NaN or infinite.
        UserError: a checkpoint in the folder is of another network.
    """
    curve = folder / "metrics.csv"
    with checkpoints.open_manager(folder, write=True) as manager:
        restored = checkpoints.restore_newest(manager, state)
        position = 0
        if restored is not None:
            state, position = restored
        rows = _rows_until(curve, position)
        if position >= steps:
            return state
        batches = batches_from(position)
        for number in range(position + 1, steps + 1):
            with clock("load"):
                batch = next(batches)
            with clock("train"):
                state, scalars = step(state, parallel.put_batch(mesh, batch))
                # One step in flight at a time: on CPU, dispatch would otherwise run far ahead
                # and hold the batches of many steps.
                jax.block_until_ready(scalars)
            log, keep = (number % n == 0 or number == steps for n in (log_every, save_every))
            # Also before a save, so that no bad checkpoint takes the place of a good one.
            if (log or keep) and not math.isfinite(loss := float(scalars["loss"])):
                raise Diverged(
                    f"{folder.name}: the loss is {loss} at step {number}. Lower"
                    " training.learning_rate or training.clip"
                )
            if log:
                row = {name: float(value) for name, value in scalars.items()}
                rows.append({"step": number, "seconds": round(clock.total(), 1), **row})
                progress(number, row)
            if keep:
                with clock("train"):
                    if jax.process_index() == 0 and rows:
                        write_csv_atomic(curve, rows, list(rows[-1]))
                    checkpoints.save(manager, number, state, number)
        close = getattr(batches, "close", None)
        if close is not None:
            close()
        with clock("train"):
            manager.wait_until_finished()
    return state


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
