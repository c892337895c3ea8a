"""Where the time of a job goes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up wall time by phase: with clock("train"): ... Threads may share one."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                elapsed = time.perf_counter() - begin
                self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.start
