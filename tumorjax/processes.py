"""Several processes that do one job: how they start, wait for each other, agree, and end.

They are connected by `jax.distributed`; on CPU their devices talk through Gloo. Every process runs
the same program. Only the first writes files, unless a function says otherwise. All that is here
does nothing, at once, in a job of one process.
"""

import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tumorjax import cluster, heartbeat, rendezvous
from tumorjax.errors import Lost, Preempted, UserError
from tumorjax.files import write_json_atomic
from tumorjax.heartbeat import KEY
from tumorjax.locks import claimed
from tumorjax.settings import first_difference

# The section "processes" of a config; times in seconds.
DEFAULTS: dict[str, Any] = {
    # host:port of the first process; "auto" where a cluster tells; "" for one process alone.
    "coordinator": "",
    "num_processes": 1,  # where the coordinator is given as host:port
    "process_id": 0,  # likewise; another in each process
    "start_seconds": 300.0,  # that processes wait for each other at the start
    "silent_seconds": 30.0,  # without a sign of life, until a process is taken for lost
    "grace_seconds": 25.0,  # from the signal to stop to the end; schedulers often give 30
}
# All processes have to run these in one version: they compile the same program, or wait forever.
_PACKAGES = ("tumorjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# JAX's own watch ends a process without saying why: it comes after ours.
_JAX_HEARTBEAT_SECONDS = 300
_SHARED_FOLDER_SECONDS = 30.0
# A process that is done waits for the others, however long their last cells take.
_END_SECONDS = 7 * 24 * 3600

_watch: heartbeat.Watch | None = None
_tell_jax: Callable[[], None] | None = None
_counts: Counter[str] = Counter()


def start(settings: Mapping[str, Any]) -> None:
    """Joins the processes of a job, if the settings say that there are several.

    To be called before JAX computes anything. A second call does nothing.

    Args:
        settings: coordinator, num_processes and process_id, see `cluster.find`; start_seconds that
            processes wait for each other; silent_seconds after which one without a sign of life is
            taken for lost; grace_seconds that it has after it was told to stop.

    Raises:
        UserError: the coordinator cannot be reached, a process is missing, two have one number, a
            number is out of range, or their versions differ.
    """
    global _watch, _tell_jax
    if _watch is not None:
        return
    place = cluster.find(settings)
    if place is None:
        return
    times = ("start_seconds", "silent_seconds", "grace_seconds")
    start_seconds, silent, grace = (float(settings.get(name, DEFAULTS[name])) for name in times)
    rendezvous.meet(place, start_seconds)
    # JAX is imported where it is needed: main.py and jobs that never do can do without the wait.
    import jax
    from jax._src import distributed

    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(start_seconds),
        heartbeat_timeout_seconds=_JAX_HEARTBEAT_SECONDS,
    )
    _tell_jax = _take_sigterm_back()
    _watch = heartbeat.Watch(
        distributed.global_state.client,
        place.index,
        place.count,
        place.coordinator,
        silent,
        grace,
    )
    _watch.start()
    agree("versions", _versions())


def index() -> int:
    """Returns the number of this process, from 0 on. Unlike JAX's, it starts no devices."""
    return 0 if _watch is None else _watch.index


def count() -> int:
    """Returns how many processes do the job."""
    return 1 if _watch is None else _watch.count


def is_first() -> bool:
    """Whether this process writes the job's files."""
    return index() == 0


def notify() -> None:
    """Tells all processes of the job, and JAX's preemption service, that it is to save and stop."""
    if _watch is not None:
        _watch.notify()
    if _tell_jax is not None:
        _tell_jax()


def noticed() -> bool:
    """Whether a process of the job was told to stop. Processes learn it seconds apart."""
    return _watch is not None and _watch.noticed.is_set()


def barrier(name: str, seconds: float, among: Collection[int] | None = None) -> None:
    """Waits until all processes are here.

    Args:
        name: of the place in the program; all processes pass the same barriers in the same order.
        seconds: how long the slowest may take.
        among: of which processes, this one included; None for all.

    Raises:
        Lost: some did not come; it names them.
        Preempted: the job was told to stop meanwhile.
    """
    if _watch is None:
        return
    members, group = _members(among)
    client, here = _watch.client, f"{name}/{group}/{_next(f'{name}/{group}')}"
    client.key_value_set(f"{KEY}/barrier/{here}/{_watch.index}", "")
    errors: list[Exception] = []

    def wait() -> None:
        try:
            client.wait_at_barrier(f"{KEY}/{here}", int(seconds * 1000), members)
        except Exception as error:
            errors.append(error)

    # In a thread of its own: a process that waits in JAX hears no signal.
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    # One that was told to stop lets the others come for as long as such news takes.
    patience = 4 * heartbeat.BEAT_SECONDS
    while thread.is_alive():
        thread.join(0.1)
        if noticed() and thread.is_alive():
            thread.join(patience)
            if thread.is_alive():
                raise Preempted(f"told to stop while waiting at {name!r}")
    if errors:
        # JAX's own message names processes as well, in ten lines.
        came = {
            int(key.rsplit("/", 1)[-1])
            for key, _ in client.key_value_dir_get(f"{KEY}/barrier/{here}/")
        }
        missing = [str(i) for i in members if i not in came]
        if not missing:
            raise errors[0]
        raise Lost(
            f"barrier {name!r}: {'process' if len(missing) == 1 else 'processes'}"
            f" {', '.join(missing)} of {len(members)} did not come within {seconds:g} s. Look into"
            " their logs"
        ) from errors[0]
    client.key_value_delete(f"{KEY}/barrier/{here}/{_watch.index}")


def gather(value: Any, seconds: float = 300.0, among: Collection[int] | None = None) -> list[Any]:
    """Returns the values of all processes, in the order of their numbers.

    Args:
        value: of JSON's types, small.
        seconds: how long the slowest process may take to come here.
        among: of which processes, this one included; None for all.

    Raises:
        Lost, Preempted: as `barrier`.
    """
    if _watch is None:
        return [json.loads(json.dumps(value))]
    members, group = _members(among)
    client, number = _watch.client, _next(f"gathered/{group}")
    here = f"{KEY}/gather/{group}"
    client.key_value_set(f"{here}/{number}/{_watch.index}", json.dumps(value))
    barrier("gather", seconds, among)
    found = {
        int(key.rsplit("/", 1)[-1]): json.loads(text)
        for key, text in client.key_value_dir_get(f"{here}/{number}/")
    }
    # All have read the values of the time before, since all were at the barrier after that.
    if number > 1:
        client.key_value_delete(f"{here}/{number - 1}/{_watch.index}")
    return [found[i] for i in members]


def agree(name: str, value: Any, seconds: float = 300.0) -> None:
    """Refuses to go on where a value differs between processes. All processes find out.

    Args:
        name: of the value, for the message.
        value: of JSON's types. Its hash is compared; it is sent only where that differs.
        seconds: how long the slowest process may take to come here.

    Raises:
        UserError: it differs; says between which processes, and where first.
        Lost, Preempted: as `barrier`.
    """
    if _watch is None:
        return
    text = json.dumps(value, sort_keys=True)
    digests = gather(_digest(value), seconds)
    other = next((i for i, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    key = f"{KEY}/agree/{_next('agreed')}"
    if _watch.index in (0, other):
        _watch.client.key_value_set_bytes(f"{key}/{_watch.index}", zlib.compress(text.encode()))
    pair = [
        json.loads(
            zlib.decompress(
                _watch.client.blocking_key_value_get_bytes(f"{key}/{i}", int(1000 * seconds))
            )
        )
        for i in (0, other)
    ]
    # Process 0 holds what the others have yet to read.
    barrier("agree", seconds)
    raise UserError(
        f"process 0 and process {other} of the job differ in their {name}:"
        f" {first_difference(pair[0], pair[1], name)}. Start all processes with the same command,"
        " on the same data and versions"
    )


def agree_on_store(store: Any) -> None:
    """Refuses to go on where processes read stores that differ in a case or a setting.

    Args:
        store: a `volumes.Store`.

    Raises:
        UserError: they differ; says where first.
    """
    if _watch is None:
        return
    cases = {case: _digest(store.record(case)) for case in store.cases}
    agree("store", {"settings": store.settings, "cases": cases})


@contextmanager
def holding(workdir: Path, alone: bool) -> Iterator[None]:
    """Keeps jobs apart that would write the same files.

    A job of several processes has its workdir for itself. Jobs of one process share one, if they
    are made for it: those of a study each do other cells. In a bucket they are told apart by the
    locks of their cells alone.

    Args:
        workdir: of the job, a folder that all its processes see.
        alone: a job of one process wants it for itself, too.

    Raises:
        UserError: another job works there, or the processes see different folders.
    """
    path, note = workdir / ".job.lock", workdir / ".job.json"
    with ExitStack() as stack:
        if is_first():
            if alone or count() > 1:
                free = stack.enter_context(claimed(path))
            elif "://" in str(workdir):
                free = True
            else:
                free = stack.enter_context(_shared(path))
            if not free:
                raise UserError(
                    f"{workdir}: another job works here{_told_by(note)}. Wait for its end, stop it,"
                    " or give another --workdir"
                )
            mine = {"job": uuid.uuid4().hex, "who": heartbeat.who()}
            if alone or count() > 1:
                write_json_atomic(note, mine)
        if count() > 1:
            job = gather(mine["job"] if is_first() else None)[0]
            # Folders over a network show a new file some seconds late.
            deadline = time.monotonic() + _SHARED_FOLDER_SECONDS
            while _read_note(note).get("job") != job:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{workdir}: process {index()} ({heartbeat.who()}) does not see what"
                        " process 0 writes there. Give a --workdir that all machines share"
                    )
                time.sleep(0.5)
            # Nobody goes on, and may fail and leave, before all have seen it.
            barrier("workdir", 2 * _SHARED_FOLDER_SECONDS)
        yield


def end() -> None:
    """Ends this process's part of a job that went well: waits for the others and disconnects."""
    global _watch
    if _watch is None:
        return
    barrier("end", _END_SECONDS)
    _watch.close()
    import jax

    jax.distributed.shutdown()
    _watch = None


def fail(error: BaseException, code: int, message: str) -> None:
    """Ends this process's part of a job that did not: the others are told, and end as well.

    It returns in a job of one process, and otherwise does not: whatever Python and JAX do at exit
    would wait for the others.

    Args:
        error: that ended it.
        code: exit code.
        message: for this process's stderr and, behind its number, for that of the others.
    """
    if _watch is None:
        return
    import jax

    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, jax.errors.JaxRuntimeError):
            # A process that is gone shows first as an error of a computation that needed it.
            _watch.wait_for_news()
            break
        chain = chain.__cause__ or chain.__context__
    heartbeat.say(message)
    first = message.strip().splitlines()[-1].removeprefix("tumorjax: ")
    _watch.leave(code, f"ended: {first}".rstrip("."))
    os._exit(code)


@contextmanager
def _shared(path: Path) -> Iterator[bool]:
    """Holds a lock file together with others that do; yields whether nobody holds it alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _read_note(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def _told_by(note: Path) -> str:
    who = _read_note(note).get("who")
    return f" (the last to have it for itself is or was {who})" if who else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _members(among: Collection[int] | None) -> tuple[list[int], str]:
    """Returns the processes that are meant, in order, and a name for them."""
    assert _watch is not None
    if among is None or len(among) == _watch.count:
        return list(range(_watch.count)), "all"
    members = sorted(among)
    return members, hashlib.sha256(json.dumps(members).encode()).hexdigest()[:12]


def _next(name: str) -> int:
    """Counts how often a name was used: the same in all processes, as they run one program."""
    _counts[name] += 1
    return _counts[name]


def _take_sigterm_back() -> Callable[[], None]:
    """Gives SIGTERM back to the handler that JAX has replaced; returns what JAX's own would do.

    JAX's preemption service hears of a preemption by a SIGTERM handler in C, which Python cannot
    see. It would be the only one to hear, and of no other signal.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    address = libc.signal(signal.SIGTERM, None)
    # Python keeps its own note of the handler, and puts it into place again.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    if not address:
        raise RuntimeError("JAX's preemption service is off: set jax_enable_preemption_service")
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
    return lambda: handler(signal.SIGTERM)


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:2])), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # Run from its source tree.
            found[package] = ""
    return found
