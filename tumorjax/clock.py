"""Where the time of a job goes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Lap:
    """How long one stretch took.

    Attributes:
        seconds: known when it is over.
    """

    seconds = 0.0


class Clock:
    """Adds up wall time by phase: with clock("train"): ... Threads may share one."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[Lap]:
        begin, lap = time.perf_counter(), Lap()
        try:
            yield lap
        finally:
            with self._lock:
                lap.seconds = time.perf_counter() - begin
                self.seconds[phase] = self.seconds.get(phase, 0.0) + lap.seconds

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.start
