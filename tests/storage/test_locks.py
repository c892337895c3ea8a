"""Locks in buckets: one holder at a time, among processes, and none after a holder's death."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tumorjax import locks
from tumorjax.buckets import BucketPath
from tumorjax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import sys, time
from tumorjax import locks
from tumorjax.buckets import BucketPath
with locks.claimed(BucketPath(sys.argv[1])) as free:
    print(free, flush=True)
    time.sleep(60)
"""
COUNT = """
import sys
from tumorjax import locks
from tumorjax.buckets import BucketPath
folder = BucketPath(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with locks.locked(folder / ".lock"):
        value = int((folder / "count").read_text())
        (folder / "count").write_text(str(value + 1))
"""


def start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_take_turns(bucket):
    folder = BucketPath(bucket)
    (folder / "count").write_text("0")
    others = [start(COUNT, folder, 10) for _ in range(2)]
    assert [other.wait(60) for other in others] == [0, 0]
    assert (folder / "count").read_text() == "20"


def test_threads_claim_once(bucket):
    lock = BucketPath(bucket) / ".lock"
    together, held = threading.Barrier(6), []

    def run():
        together.wait()
        with locks.claimed(lock) as free:
            held.append(free)
            together.wait()

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(held) == [False] * 5 + [True]
    with locks.claimed(lock) as free:
        assert free


def test_a_killed_holder_of_this_machine_lets_go_at_once(bucket):
    lock = BucketPath(bucket) / ".lock"
    holder = start(HOLD, lock)
    try:
        assert holder.stdout.readline() == "True\n"
        with locks.claimed(lock) as free:
            assert not free
        assert locks.is_held(lock)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    assert not locks.is_held(lock)
    started = time.monotonic()
    with locks.claimed(lock) as free:
        assert free
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("proxy", ["s3"], indirect=True)
def test_a_holder_elsewhere_is_given_up_after_the_lease_alone(bucket, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.2)
    monkeypatch.setattr(locks, "LEASE", 1.0)
    lock = BucketPath(bucket) / ".lock"
    monkeypatch.setattr(locks, "_space", lambda: "another machine")
    here = locks._acquire(lock, wait=False)
    monkeypatch.setattr(locks, "_space", lambda: "this machine")
    # While it is renewed it is held, however long.
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        with locks.claimed(lock) as free:
            assert not free
    here.stop.set()  # as if its process had died
    here.thread.join()
    started = time.monotonic()
    with locks.locked(lock):
        assert 0.7 < time.monotonic() - started < 10
    with pytest.raises(UserError, match=r"\.lock: the lock was lost"):
        here.release()


def test_a_lock_survives_a_bad_server(proxy, bucket, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)
    lock = BucketPath(bucket) / ".lock"
    # Of writes that were done, the answer that is lost must not look like somebody else's write.
    proxy.matches = lambda method, path: method in ("PUT", "POST")
    proxy.script = ["lost", "503", "cut", "lost"]
    with locks.claimed(lock) as free:
        assert free
        time.sleep(0.5)
    assert not proxy.script
    with locks.claimed(lock) as free:
        assert free
