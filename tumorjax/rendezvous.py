"""All processes of a job meet once, before JAX connects them.

JAX ends a process by abort() where the coordinator cannot be reached, a process is missing or two
have one number, and does not say which. Here they find out in Python and say it. The first process
listens on the coordinator's port, notes who comes, and lets all go on together; JAX then takes the
port over.
"""

import json
import os
import socket
import time
from typing import Any

from tumorjax.cluster import Place
from tumorjax.errors import UserError
from tumorjax.heartbeat import who

_GREETING = {"tumorjax": "rendezvous"}
# Between attempts to reach the first process, and until one that was reached has to greet.
_RETRY_SECONDS, _GREETING_SECONDS = 0.5, 5.0


def meet(place: Place, seconds: float) -> None:
    """Waits until all processes of a job are there.

    Args:
        place: of this process.
        seconds: how long.

    Raises:
        UserError: the port is taken; the first process cannot be reached; processes are missing
            (named); two have one number; or they were told of different numbers of processes. The
            last three in all processes that came.
    """
    if place.index == 0:
        _gather(place, seconds)
    else:
        _join(place, seconds)


def _gather(place: Place, seconds: float) -> None:
    host, port = _split(place.coordinator)
    deadline = time.monotonic() + seconds
    try:
        # All addresses of the machine: its name may resolve to one that the others do not use.
        if socket.has_dualstack_ipv6():
            server = socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=place.count
            )
        else:
            server = socket.create_server(("", port), backlog=place.count)
    except OSError as error:
        raise UserError(
            f"port {port} of this machine cannot be listened on ({os.strerror(error.errno or 0)}):"
            f" another job or program has it, or {place.coordinator} is the address of another"
            " machine. Give another port"
        ) from error
    came: dict[int, tuple[socket.socket, dict[str, Any]]] = {}
    strangers: list[socket.socket] = []
    problem = ""
    with server:
        while len(came) < place.count - 1 and not problem:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [i for i in range(1, place.count) if i not in came]
                problem = (
                    f"{_numbers(missing)} of {place.count} did not come to {place.coordinator}"
                    f" within {seconds:g} s. Look into their logs, start all processes of a job"
                    " together, or raise processes.start_seconds"
                )
                break
            server.settimeout(left)
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            hello = _exchange(connection, _GREETING) or {}
            index = hello.get("index")
            if not isinstance(index, int):
                # Whoever it was, it is none of the job's processes.
                connection.close()
                continue
            if hello["count"] != place.count:
                problem = (
                    f"process {index} ({hello['who']}) was told of {hello['count']} processes and"
                    f" process 0 of {place.count}. Give all the same processes.num_processes"
                )
                strangers.append(connection)
            elif index in came or index == 0:
                first = came[index][1]["who"] if index in came else who()
                problem = (
                    f"two processes are number {index}: {first} and {hello['who']}. Give each its"
                    " own processes.process_id"
                )
                strangers.append(connection)
            else:
                came[index] = connection, hello
        for connection in [pair[0] for pair in came.values()] + strangers:
            with connection:
                _send(connection, {"problem": problem})
    if problem:
        raise UserError(problem)


def _join(place: Place, seconds: float) -> None:
    host, port = _split(place.coordinator)
    deadline = time.monotonic() + seconds
    found = "nothing was tried"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=max(0.1, min(left, 10.0)))
        except OSError as error:
            found = error.strerror or str(error)
            time.sleep(_RETRY_SECONDS)
            continue
        with connection:
            hello = {"index": place.index, "count": place.count, "who": who()}
            if _exchange(connection, hello) != _GREETING:
                # An earlier run's first process may still be on its way out.
                found = "something else answers there"
                time.sleep(_RETRY_SECONDS)
                continue
            # The first process waits as long as this one does, and then says who is missing.
            answer = _receive(connection, seconds + _GREETING_SECONDS)
        if answer is None:
            raise UserError(
                f"process 0 at {place.coordinator} ended while it waited for the others. Look into"
                " its log"
            )
        if answer["problem"]:
            raise UserError(answer["problem"])
        return
    raise UserError(
        f"the first process cannot be reached at {place.coordinator} within {seconds:g} s"
        f" ({found}). Is process 0 started, is this its machine (processes.coordinator), and is"
        " the port open?"
    )


def _exchange(connection: socket.socket, mine: dict[str, Any]) -> dict[str, Any] | None:
    """Greets; returns the other's greeting, None where it has none."""
    if not _send(connection, mine):
        return None
    return _receive(connection, _GREETING_SECONDS)


def _send(connection: socket.socket, message: dict[str, Any]) -> bool:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        # The other end is gone; who waits for it finds it missing.
        return False
    return True


def _receive(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    connection.settimeout(seconds)
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 10_000:
            # Byte by byte: what follows a line is the next message.
            part = connection.recv(1)
            if not part:
                return None
            line += part
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def _split(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _numbers(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:8])) + (" and others" if len(indices) > 8 else "")
    return f"process {shown}" if len(indices) == 1 else f"processes {shown}"
