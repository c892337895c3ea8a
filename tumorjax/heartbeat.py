"""How the processes of a job notice that one of them has ended, so that none waits for it forever.

Every process leaves a sign of life in the key-value store of JAX's coordination service. The first
process looks at them; what it finds, and what a process that ends says itself, all read there. JAX
has a watch of its own, which ends a process by abort() and does not say which other is gone; it is
set to wait for longer than this one.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

# EX_UNAVAILABLE: another process of the job is gone; the same command goes on where it stopped.
LOST = 69
# EX_TEMPFAIL: this job was told to stop and has saved what it had; the same command goes on.
PREEMPTED = 75

KEY = "tumorjax"
BEAT_SECONDS = 2.0
# How long the first process, which holds the store, stays so that the others can read why it ends.
_FAREWELL_SECONDS = 6.0


class Watch:
    """Signs of life of this process, and what the others' mean. One thread, from `start` on.

    Args:
        client: of JAX's coordination service.
        index: of this process.
        count: of the job's processes.
        coordinator: host:port of the service, in process 0.
        silent_seconds: after which a process without a sign of life is taken for lost.
        grace_seconds: that a process has to save and end after it was told to stop.
    """

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        coordinator: str,
        silent_seconds: float,
        grace_seconds: float,
    ):
        self.client = client
        self.index = index
        self.count = count
        self.coordinator = coordinator
        self.silent_seconds = silent_seconds
        self.grace_seconds = grace_seconds
        self.noticed = threading.Event()
        self._published = False
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._ending = threading.Lock()
        self._beats = 0
        self._who = who()
        # process -> (its last sign, when it came)
        self._signs: dict[int, tuple[str, float]] = {}
        self._answered = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        if self.index == 0:
            self.client.key_value_set(f"{KEY}/job/open", self._who, allow_overwrite=True)
        now = time.monotonic()
        self._signs = {i: ("", now) for i in range(self.count) if i != self.index}
        _catch_abort(self)
        self._thread.start()

    def notify(self) -> None:
        """Tells all processes that the job is to save and to stop."""
        self.noticed.set()
        self._wake.set()

    def close(self) -> None:
        """Ends the watch: from now on the others may end as they like."""
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=4 * BEAT_SECONDS)

    def leave(self, code: int, message: str) -> None:
        """Tells the others that this process ends, and why; they end with the same exit code."""
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=4 * BEAT_SECONDS)
        try:
            self._publish({"process": self.index, "code": code, "message": message})
            self._sign("left")
            deadline = time.monotonic() + (_FAREWELL_SECONDS if self.index == 0 else 0)
            while time.monotonic() < deadline and not all(
                sign.startswith("left") for sign in self._read_signs().values()
            ):
                time.sleep(0.2)
        except Exception as error:
            # The store is in process 0: without it nobody is left to tell.
            if self._reachable():
                raise
            print(f"tumorjax: process 0 is gone too ({error})", file=sys.stderr)

    def wait_for_news(self) -> None:
        """Waits for as long as it may take to notice that another process is gone.

        It returns where none is; otherwise the process ends in here.
        """
        self._thread.join(timeout=self.silent_seconds + 4 * BEAT_SECONDS)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._beat()
                self._answered = time.monotonic()
            except Exception as error:
                silent = time.monotonic() - self._answered > self.silent_seconds
                if not self._closed.is_set() and (silent or not self._reachable()):
                    self._end_without_first(str(error))
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _beat(self) -> None:
        self._beats += 1
        self._sign(str(self._beats))
        if self.noticed.is_set() and not self._published:
            self.client.key_value_set(f"{KEY}/job/notice", str(self.index), allow_overwrite=True)
            self._published = True
        if self.index == 0:
            self._look()
        records = {
            name.rsplit("/", 1)[-1]: value
            for name, value in self.client.key_value_dir_get(f"{KEY}/job/")
        }
        if "notice" in records:
            self.noticed.set()
            self._published = True
        if "stop" in records:
            self._end(json.loads(records["stop"]))

    def _look(self) -> None:
        now = time.monotonic()
        for index, sign in self._read_signs().items():
            if sign != self._signs[index][0]:
                self._signs[index] = sign, now
        for index, (sign, when) in self._signs.items():
            if now - when > self.silent_seconds and not sign.startswith("left"):
                name = sign.partition(" ")[2] or "never heard of"
                self._publish(
                    {
                        "process": index,
                        "code": LOST,
                        "message": f"({name}) has given no sign of life for {now - when:.0f} s: it"
                        " was killed, or its machine or network is gone",
                    }
                )
                return

    def _sign(self, word: str) -> None:
        self.client.key_value_set(
            f"{KEY}/signs/{self.index}", f"{word} {self._who}", allow_overwrite=True
        )

    def _read_signs(self) -> dict[int, str]:
        found = {
            int(name.rsplit("/", 1)[-1]): value
            for name, value in self.client.key_value_dir_get(f"{KEY}/signs/")
        }
        return {index: found.get(index, "") for index in self._signs}

    def _publish(self, record: Mapping[str, Any]) -> None:
        """Says why the job ends, unless somebody has said it."""
        names = [name for name, _ in self.client.key_value_dir_get(f"{KEY}/job/")]
        if not any(name.endswith("/stop") for name in names):
            self.client.key_value_set(f"{KEY}/job/stop", json.dumps(record), allow_overwrite=True)

    def _end(self, record: Mapping[str, Any]) -> None:
        code = int(record["code"])
        if code == PREEMPTED and self._closed.wait(self.grace_seconds):
            # This process has stopped too, as it should.
            return
        if not self._ending.acquire(blocking=False):
            return
        if self.index:
            self._sign("left")
        else:
            deadline = time.monotonic() + _FAREWELL_SECONDS
            gone = {int(record["process"])}
            while time.monotonic() < deadline and not all(
                sign.startswith("left") or index in gone
                for index, sign in self._read_signs().items()
            ):
                time.sleep(0.2)
        self._exit(f"process {record['process']} {record['message']}", code)

    def _end_without_first(self, found: str) -> None:
        if self._ending.acquire(blocking=False):
            self._exit(
                f"process 0 at {self.coordinator}, which holds the others together, is gone"
                f" ({found.splitlines()[0] if found else 'no answer'})",
                LOST,
            )

    def _exit(self, message: str, code: int) -> None:
        advice = (
            " Run the same command again in all processes: the job goes on from its checkpoints"
            if code in (LOST, PREEMPTED)
            else ""
        )
        say(f"tumorjax: {message}.{advice}")
        # The main thread may wait in the device's library for a process that will not come.
        os._exit(code)

    def _reachable(self) -> bool:
        host, _, port = self.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            return False
        return True


def who() -> str:
    """Returns a name for this process that a person finds it by."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def say(line: str) -> None:
    """Writes a line to stderr, also while another thread is about to end the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"{line}\n".encode())


def _catch_abort(watch: Watch) -> None:
    """Has the process say why it ends where JAX ends it by abort().

    When process 0 is gone JAX aborts within milliseconds, earlier than any watch in Python could
    notice. Python's own handlers run only in the main thread, after abort() would have returned;
    this one runs in the thread that aborts. An abort for any other reason goes on as it would.
    """

    def handle(_: int) -> None:
        if not watch._closed.is_set() and not watch._reachable():
            watch._end_without_first("connection closed")
            # Another thread is about to end the process, and says why.
            time.sleep(4 * BEAT_SECONDS)
        libc.signal(signal.SIGABRT, None)

    libc = ctypes.CDLL(None)
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    handler = handler_type(handle)
    _KEPT.append(handler)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


# A handler that was given to C must not be collected.
_KEPT: list[Any] = []
