"""Machines that are taken away: the job hears of it, saves, and ends with a code of its own.

Schedulers send a signal some time before they end a process: SIGTERM (Kubernetes, spot machines,
Slurm's preemption), or what they were asked for (Slurm's --signal=USR1@120). In a job of several
processes one may hear of it alone; JAX's preemption service then settles at which step all stop.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tumorjax import heartbeat, processes
from tumorjax.errors import Preempted
from tumorjax.heartbeat import PREEMPTED

__all__ = ["PREEMPTED", "Preempted", "requested", "stop_if_told", "told", "watch"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# One order to stop may reach a process twice, from the scheduler and from the program that started
# it. What comes later is somebody who does not want to wait.
_ONE_ORDER_SECONDS = 2.0

_told = threading.Event()
# Calls of `requested` so far, which all processes make together: steps begin anew in each training.
_calls = 0


@contextmanager
def watch(grace_seconds: float = processes.DEFAULTS["grace_seconds"]) -> Iterator[None]:
    """Listens for signals to stop; to be held around a job, in the main thread.

    The first asks the job to save and stop, which `requested` and `told` say. A second SIGTERM ends
    the process at once, and so does SIGINT, as ever.

    Args:
        grace_seconds: after the first signal; what could not stop until then is ended with the same
            exit code, before the scheduler ends it with another. All files are written whole or not
            at all, so that this loses work, but breaks nothing.
    """
    global _calls
    _told.clear()
    _calls = 0
    # Python calls its handlers in the main thread, between two lines of Python: not while that
    # waits for a device or another process. The byte that it writes here arrives at once.
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _handle)
    _Forked.active = True
    thread = threading.Thread(target=_listen, args=(reading, grace_seconds), daemon=True)
    thread.start()
    try:
        yield
    finally:
        _Forked.active = False
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        writing.close()
        thread.join()
        reading.close()


def told() -> bool:
    """Whether the job was told to stop, here or in another process. Processes learn it seconds
    apart: in a computation that needs them all, ask `requested`."""
    return _told.is_set() or processes.noticed()


def requested(step: int, alone: bool = False) -> bool:
    """Whether to save and stop after this step.

    Args:
        step: that was made.
        alone: this process trains without the others, which do not call this together with it.

    Returns:
        the same in all processes, which call this after each step that they make together.
    """
    global _calls
    if alone or processes.count() == 1:
        stop = told()
    else:
        from jax.experimental import multihost_utils

        _calls += 1
        stop = multihost_utils.reached_preemption_sync_point(_calls)
    if stop and processes.is_first():
        print(f"told to stop: saving step {step}", file=sys.stderr, flush=True)
    return stop


def stop_if_told(doing: str) -> None:
    """Ends the job where it was told to stop and everything is saved that there is.

    Args:
        doing: what is interrupted, for the message "told to stop while ...".

    Raises:
        Preempted: it was told to.
    """
    if told():
        raise Preempted(f"told to stop while {doing}")


def _listen(reading: socket.socket, grace_seconds: float) -> None:
    first: float | None = None
    while True:
        if first is not None:
            reading.settimeout(max(0.01, first + grace_seconds - time.monotonic()))
        try:
            received = reading.recv(1)
        except TimeoutError:
            message = (
                f"tumorjax: not everything could be saved in {grace_seconds:g} s"
                " (processes.grace_seconds). Run the same command again: it goes on from what is"
            )
            processes.fail(Preempted(message), PREEMPTED, message)
            heartbeat.say(message)
            os._exit(PREEMPTED)
        if not received:
            return
        if received[0] not in SIGNALS:
            continue
        name = signal.Signals(received[0]).name
        now = time.monotonic()
        if first is None:
            first = now
            heartbeat.say(
                f"tumorjax: {name}: saving, then stopping, within {grace_seconds:g} s. A second"
                " SIGTERM ends at once"
            )
            _told.set()
            processes.notify()
        elif received[0] == signal.SIGTERM and now - first > _ONE_ORDER_SECONDS:
            # As a process that a signal has ended, in a shell.
            os._exit(128 + signal.SIGTERM)


def _handle(number: int, frame: object) -> None:
    """Lets Python install a handler in C, which writes the byte that `_listen` reads."""


class _Forked:
    """Whether handlers are installed, which a forked process must not inherit: they would have it
    outlive SIGTERM, and write to this process's socket."""

    active = False

    @staticmethod
    def reset() -> None:
        if _Forked.active:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_Forked.reset)
