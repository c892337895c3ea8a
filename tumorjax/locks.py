"""Files that one process at a time holds: how processes share a folder or a place in a bucket.

On disks these are file locks of the system, which go with their holder. In buckets a lock is an
object that is written under a condition (it has not changed since it was read), so that of several
processes one succeeds. Its holder renews it every `HEARTBEAT` seconds. One that was not renewed for
`LEASE` seconds, by the clock of the process that waits, was left by a holder that died, and is
taken over; so is at once one whose holder was a process of this machine that is gone. Clocks of
different machines are never compared to take a lock, only to see at a glance that it is held.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tumorjax.buckets import BucketPath
from tumorjax.errors import UserError
from tumorjax.key_values import clear_errors, insist, open_bucket

HEARTBEAT = 10.0
# Long enough for a server's bad minute (see key_values.RETRIES) not to cost a lock.
LEASE = 90.0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file; waits while another process holds it. A killed holder lets go."""
    if isinstance(path, BucketPath):
        with _held(path, wait=True):
            yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Holds a lock file if nobody else does; yields whether it was free.

    In a bucket the answer takes up to `LEASE` seconds where the holder seems to have died.
    """
    if isinstance(path, BucketPath):
        with _held(path, wait=False) as free:
            yield free
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_held(path: Path) -> bool:
    """Whether a process holds a lock file. Lets go at once of what it finds free."""
    if isinstance(path, BucketPath):
        found = insist(lambda: open_bucket(path.bucket).read(path.key))
        holder, watch = _parse(found.value), _Watch()
        if holder is None or watch.is_dead(holder, found.stamp.generation):
            return False
        return watch.is_alive(holder, found.stamp.generation)
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


# ---------------------------------------------------------------------------- in buckets


@contextmanager
def _held(path: BucketPath, wait: bool) -> Iterator[bool]:
    lock = _acquire(path, wait)
    if lock is None:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _acquire(path: BucketPath, wait: bool) -> "_Lock | None":
    values, watched = open_bucket(path.bucket), _Watch()
    while True:
        with clear_errors(path):
            found = insist(lambda: values.read(path.key))
        holder = _parse(found.value)
        if holder is None or watched.is_dead(holder, found.stamp.generation):
            lock = _Lock(path)
            if lock.take(found.stamp.generation):
                return lock
            continue  # Somebody was faster: look at what is there now.
        if not wait and watched.is_alive(holder, found.stamp.generation):
            return None
        time.sleep(min(1.0, HEARTBEAT / 5))


def _parse(text: bytes) -> dict[str, Any] | None:
    """Returns who holds a lock; None if it is free."""
    try:
        return json.loads(text)["holder"]
    except (ValueError, KeyError, TypeError):
        return None  # Not there yet, or not written by this program: nobody renews it.


class _Watch:
    """Sees whether a lock's holder is alive: whether the lock changes."""

    def __init__(self) -> None:
        self.generation: bytes | None = None
        self.since = time.monotonic()
        self.changed = False

    def _look(self, generation: bytes) -> None:
        if generation != self.generation:
            self.changed = self.generation is not None
            self.generation, self.since = generation, time.monotonic()

    def is_dead(self, holder: dict[str, Any], generation: bytes) -> bool:
        self._look(generation)
        if holder.get("host") == socket.gethostname():
            born = _born(holder.get("pid"))
            # A process of this name space that is gone, or whose number another has now.
            if holder.get("space") == _space() and not _same_time(born, holder.get("born")):
                return True
        return time.monotonic() - self.since > LEASE

    def is_alive(self, holder: dict[str, Any], generation: bytes) -> bool:
        self._look(generation)
        return self.changed or abs(time.time() - holder.get("renewed", 0)) < 2 * HEARTBEAT


class _Lock:
    """A lock in a bucket that this process tries to take, and then renews until it lets go."""

    def __init__(self, path: BucketPath) -> None:
        self.path, self.values = path, open_bucket(path.bucket)
        self.me = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "space": _space(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
        }
        self.generation = b""
        self.lost = ""
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)

    def _text(self) -> bytes:
        # Never the same twice: where generations are hashes of the content, it must change them.
        return json.dumps({"holder": self.me | {"renewed": time.time()}}).encode()

    def _write(self, text: bytes, generation: bytes) -> bool:
        """Writes if nothing has changed since `generation`; says whether it was so."""
        with clear_errors(self.path):
            stamp = insist(lambda: self.values.write(self.path.key, text, if_equal=generation))
            if stamp.generation:
                self.generation = stamp.generation
                return True
            # An answer may have got lost after the write was done, and its retry then failed.
            found = insist(lambda: self.values.read(self.path.key))
        if found.state == "value" and found.value == text:
            self.generation = found.stamp.generation
            return True
        return False

    def take(self, generation: bytes) -> bool:
        if not self._write(self._text(), generation):
            return False
        self.thread.start()
        return True

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self.stop.wait(HEARTBEAT):
            try:
                if not self._write(self._text(), self.generation):
                    self.lost = "another process has taken it over"
            except Exception as error:
                # Nobody takes it before LEASE has passed, so that this may be tried until then.
                if time.monotonic() - renewed > LEASE - HEARTBEAT:
                    self.lost = str(error)
                logging.getLogger(__name__).warning("%s: not renewed: %s", self.path, error)
            else:
                renewed = time.monotonic()
            if self.lost:
                logging.getLogger(__name__).error("%s: lost: %s", self.path, self.lost)
                return

    def release(self) -> None:
        self.stop.set()
        self.thread.join()
        # Freed, not removed: a condition on a removal is not kept by all servers.
        free = json.dumps({"free": self.me["token"]}).encode()
        if self.lost or not self._write(free, self.generation):
            raise UserError(
                f"{self.path}: the lock was lost while it was held"
                f" ({self.lost or 'another process has taken it over'}), as if this process had"
                f" died. Run the same command again"
            )


def _space() -> str:
    """Names the space that process numbers count in: containers have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return str(uuid.getnode())


def _same_time(one: float | None, other: float | None) -> bool:
    # The system's times of birth move with its clock when that is set.
    return one is not None and other is not None and abs(one - other) < 5


def _born(pid: Any) -> float | None:
    """Returns when a process of this machine was started; None if there is none of this number."""
    try:
        process = psutil.Process(int(pid))
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.Error, TypeError, ValueError):
        return None
