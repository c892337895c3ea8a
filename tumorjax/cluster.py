"""Where the processes of a job are: told by hand, by a scheduler's variables, or found by JAX."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tumorjax.errors import UserError

# Where a cluster tells the first machine and no port. Any free one would do, the same in all.
DEFAULT_PORT = 8476


@dataclass(frozen=True)
class Place:
    """A process among those of its job.

    Attributes:
        coordinator: host:port of the first process, which the others can reach.
        count: how many processes there are.
        index: which one this is, from 0 on.
        local_devices: GPUs of this machine that are this process's; None for all.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def find(settings: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Place | None:
    """Says which process of which job this is.

    Args:
        settings: coordinator ("" for one process, host:port, or "auto"); with host:port also
            num_processes and process_id.
        environment: variables of the process. "auto" looks for those of SkyPilot, for
            JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (or
            JOB_COMPLETION_INDEX, which Kubernetes sets), for those of a Slurm step, and then for
            what JAX itself knows: TPU VMs, GKE, Kubernetes jobs, Open MPI.

    Returns:
        None where the job is one process.

    Raises:
        UserError: a value is missing, no number or out of range, or "auto" finds nothing.
    """
    coordinator = str(settings.get("coordinator", "") or "")
    if not coordinator:
        return None
    if coordinator != "auto":
        return _checked(
            coordinator,
            settings.get("num_processes", 1),
            settings.get("process_id", 0),
            ("processes.coordinator", "processes.num_processes", "processes.process_id"),
        )
    for look in (_skypilot, _variables, _slurm, _jax):
        place = look(environment)
        if place is not None:
            return place if place.count > 1 else None
    raise UserError(
        "processes.coordinator is 'auto', and nothing here tells which process this is: no"
        " variables of SkyPilot, no JAX_COORDINATOR_ADDRESS, no Slurm step (start with srun), no"
        " TPU VM, no Kubernetes job, no Open MPI. Give --config.processes.coordinator=HOST:PORT,"
        " num_processes and process_id, or leave coordinator empty for one process"
    )


def _skypilot(environment: Mapping[str, str]) -> Place | None:
    if not {"SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS"} <= set(environment):
        return None
    machines = environment["SKYPILOT_NODE_IPS"].split()
    if not machines:
        raise UserError("SKYPILOT_NODE_IPS is empty. Expected one address a line")
    return _checked(
        machines[0],
        len(machines),
        environment["SKYPILOT_NODE_RANK"],
        ("SKYPILOT_NODE_IPS", "SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK"),
    )


def _variables(environment: Mapping[str, str]) -> Place | None:
    # Without a number of processes the variable may be for JAX's own detection, which reads it too.
    if not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"} <= set(environment):
        return None
    name = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environment else "JOB_COMPLETION_INDEX"
    if name not in environment:
        raise UserError(
            "JAX_COORDINATOR_ADDRESS is set, and neither JAX_PROCESS_ID nor JOB_COMPLETION_INDEX."
            " Set JAX_PROCESS_ID, or completionMode: Indexed in the Kubernetes job"
        )
    return _checked(
        environment["JAX_COORDINATOR_ADDRESS"],
        environment["JAX_NUM_PROCESSES"],
        environment[name],
        ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", name),
    )


def _slurm(environment: Mapping[str, str]) -> Place | None:
    # SLURM_STEP_NODELIST is there under srun alone: a batch script itself is one process.
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if not set(names) <= set(environment):
        return None
    # By the job's number, so that two jobs that share a machine take two ports; of the range that
    # no service has.
    port = 61440 + _number(environment["SLURM_JOB_ID"], "SLURM_JOB_ID") % 4096
    # "node001", "node001,node007", "node[001-004,007],other"
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", environment["SLURM_STEP_NODELIST"])
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST is {environment['SLURM_STEP_NODELIST']!r}: no names")
    place = _checked(
        f"{first[1]}{first[2] or ''}:{port}",
        environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"]),
        environment["SLURM_PROCID"],
        ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"),
    )
    # One process on a machine takes all its GPUs; several take one each.
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_NTASKS_PER_NODE"))
    if tasks is None or re.fullmatch(r"1(\(x\d+\))?", tasks):
        return place
    local = _number(environment.get("SLURM_LOCALID", "0"), "SLURM_LOCALID")
    return replace(place, local_devices=(local,))


def _jax(environment: Mapping[str, str]) -> Place | None:
    from jax._src import clusters

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            environment.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, 300
        )
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"this looks like a cluster, and JAX cannot tell its processes: {error}. Give"
            " --config.processes.coordinator=HOST:PORT with num_processes and process_id"
        ) from error
    coordinator, count, index, local = found
    if coordinator is None or count is None or index is None:
        return None
    names = ("coordinator's address", "number of processes", "number of this process")
    place = _checked(coordinator, count, index, names)
    return replace(place, local_devices=None if local is None else tuple(local))


def _checked(coordinator: str, count: Any, index: Any, names: tuple[str, str, str]) -> Place:
    """Returns a place whose values make sense; `names` says where they are from."""
    # A name, an IPv4 address or an IPv6 one in brackets, then the port.
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/]+)(?::(\d+))?", coordinator)
    if not match or int(match[2] or DEFAULT_PORT) not in range(1, 65536):
        raise UserError(
            f"{names[0]} is {coordinator!r}. Expected HOST:PORT of the first process, such as"
            f" node001:{DEFAULT_PORT}, or 'auto'"
        )
    total, number = _number(count, names[1]), _number(index, names[2])
    if total < 1:
        raise UserError(f"{names[1]} is {total}. Expected 1 or more")
    if not 0 <= number < total:
        raise UserError(
            f"{names[2]} is {number} and there are {total} processes ({names[1]}). Expected 0 to"
            f" {total - 1}, another in each process"
        )
    return Place(f"{match[1]}:{match[2] or DEFAULT_PORT}", total, number)


def _number(value: Any, name: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value!r}. Expected a whole number") from None
