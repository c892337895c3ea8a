"""The cells of a study, and how threads and processes share them."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tumorjax.errors import UserError
from tumorjax.locks import claimed
from tumorjax.training import preemption

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One training of the study: so many annotated scans, with or without synthetic ones."""

    arm: str
    n_real: int
    seed: int

    @property
    def id(self) -> str:
        """Name of the cell's folder."""
        return f"{self.arm}-n{self.n_real:04d}-s{self.seed}"


def cells(settings: Mapping[str, Any]) -> list[Cell]:
    """Returns the cells of a grid, seed by seed and from few scans to many.

    Args:
        settings: n_real, arms and seeds.

    Raises:
        UserError: n_real or seeds are not whole numbers from 1 and 0 on, or one comes twice.
    """
    for key, least in (("n_real", 1), ("seeds", 0)):
        values = settings[key]
        if isinstance(values, str) or not all(
            isinstance(value, int) and not isinstance(value, bool) and value >= least
            for value in values
        ):
            raise UserError(
                f"grid.{key} is {values!r}. Expected whole numbers from {least} on, such as (4,8)"
            )
        if len(set(values)) < len(values):
            raise UserError(f"grid.{key} is {tuple(values)}: name each number once")
    return [
        Cell(arm, int(n_real), int(seed))
        for seed in settings["seeds"]
        for n_real in sorted(settings["n_real"])
        for arm in settings["arms"]
    ]


def share(
    grid: Sequence[Cell],
    folder: Path,
    is_done: Callable[[Cell], bool],
    work: Callable[[Cell, T], None],
    places: Sequence[T],
    poll_seconds: float = 2.0,
) -> dict[Cell, Exception]:
    """Has every cell done once, by this process and by whoever else works on the folder.

    Each place (a mesh) is served by a thread of its own. A thread takes the first cell that is not
    done and that no thread or process has claimed; when all are claimed it waits for those, since
    a process that dies gives its cell back.

    Args:
        grid: all cells.
        folder: holds a lock file for each cell.
        is_done: whether a cell's results are complete on disk.
        work: does a cell at a place.
        places: where cells can be done side by side.
        poll_seconds: how often to look again while others hold the last cells.

    Returns:
        the cells that failed here with their errors; they are not tried again.

    Raises:
        Preempted: the job was told to stop; the cells of all places have saved what they had.
    """
    failed: dict[Cell, Exception] = {}
    mutex = threading.Lock()
    stop = threading.Event()

    def serve(place: T) -> None:
        while not stop.is_set():
            waiting = False
            worked = False
            for cell in grid:
                if stop.is_set():
                    return
                preemption.stop_if_told("cells were trained and tested")
                if cell in failed or is_done(cell):
                    continue
                with claimed(folder / f".{cell.id}.lock") as free:
                    if not free:
                        waiting = True
                        continue
                    # Somebody may have finished it between the look and the claim.
                    if cell in failed or is_done(cell):
                        continue
                    try:
                        work(cell, place)
                    except preemption.Preempted:
                        raise
                    except Exception as error:
                        logging.getLogger(__name__).exception("cell %s failed", cell.id)
                        with mutex:
                            failed[cell] = error
                    worked = True
            if not waiting and not worked:
                return
            if waiting and not worked:
                time.sleep(poll_seconds)

    def serve_beside(place: T) -> None:
        try:
            serve(place)
        except preemption.Preempted:
            # The first place's thread hears of it as well, and says so.
            return

    threads = [
        threading.Thread(target=serve_beside, args=(place,), daemon=True) for place in places[1:]
    ]
    for thread in threads:
        thread.start()
    try:
        serve(places[0])
        for thread in threads:
            thread.join()
        preemption.stop_if_told("cells were trained and tested")
    except preemption.Preempted:
        # Each saves its own.
        for thread in threads:
            thread.join()
        raise
    except BaseException:
        stop.set()
        raise
    return failed
