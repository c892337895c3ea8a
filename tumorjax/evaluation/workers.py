"""Cases side by side in processes, with no more of them waiting than keep the processes busy."""

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from tumorjax.errors import UserError
from tumorjax.evaluation.records import Outcome

T = TypeVar("T")
R = TypeVar("R")


def in_processes(
    function: Callable[..., Outcome],
    work: Iterable[Outcome | tuple],
    processes: int,
    total: int | None = None,
) -> Iterator[Outcome]:
    """Yields the outcome of every case, in the order in which they are finished.

    Args:
        function: of this module's level, called with each tuple of `work`.
        work: outcomes that are known already, and arguments of `function`. It is gone through only
            as far as the processes can follow: one waiting piece of work for each of them, so that
            what the pieces hold never adds up.
        processes: 0 for this one alone.
        total: number of cases, for the progress bar.

    Raises:
        UserError: a process was killed.
    """
    with tqdm(total=total, unit="case", disable=not sys.stderr.isatty()) as progress:
        for outcome in _outcomes(function, work, processes):
            yield outcome
            progress.update()


def _outcomes(
    function: Callable[..., Outcome], work: Iterable[Outcome | tuple], processes: int
) -> Iterator[Outcome]:
    if processes < 1:
        for piece in work:
            yield piece if isinstance(piece, Outcome) else function(*piece)
        return
    # Spawned, for a forked process inherits threads' locks without the threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_stay_on_host) as pool:
        running: set[Future[Outcome]] = set()
        try:
            for piece in work:
                if isinstance(piece, Outcome):
                    yield piece
                    continue
                running.add(pool.submit(function, *piece))
                full = len(running) >= 2 * processes
                done = wait(running, None if full else 0, FIRST_COMPLETED).done
                running -= done
                yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most often for want of memory. Set --config.workers"
                " to a lower number and run again: finished cases are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, Future[R]]]:
    """Yields items with their results, in order; a thread works on the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            waiting.append((item, thread.submit(function, item)))
            if len(waiting) > 1:
                yield waiting.popleft()
        yield from waiting


def count_of(workers: int) -> int:
    """Returns config.workers as a number of processes, one per core for 0.

    Raises:
        UserError: it is negative.
    """
    if workers < 0:
        raise UserError(f"config.workers is {workers}. Expected 0 (one per core) or more")
    return workers or os.cpu_count() or 1


def _stay_on_host() -> None:
    # The accelerator belongs to the network; a second process would take its memory away.
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax: Any = sys.modules.get("jax")
    if jax is not None:
        jax.config.update("jax_platforms", "cpu")
