"""The mesh, and the rules that say which array lies where on it.

Axes: "cell" (independent cells of the grid side by side), "data" (the batch), "fsdp" (parameters),
"space" (a volume's first axis). Everything that is sharded goes through the rules below and
`jax.jit` with NamedSharding; no other module names an axis.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from tumorjax.errors import UserError

AXES = ("cell", "data", "fsdp", "space")

# First match wins; names are those of models.functional. A spec is for the last axes of the array;
# an axis that does not divide stays whole.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"\.kernel$", PartitionSpec(None, "fsdp")),
    (r".*", PartitionSpec()),
)
BATCH = PartitionSpec("data", "space")
SAMPLES = PartitionSpec("data")


def start_processes(settings: Mapping[str, Any]) -> None:
    """Joins the processes of a job, if `settings.coordinator` says that there are several.

    Args:
        settings: coordinator ("host:port", "" for one process, "auto" where the cluster tells),
            num_processes and process_id.
    """
    coordinator = settings.get("coordinator", "")
    if not coordinator or jax.distributed.is_initialized():
        return
    if coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(
            coordinator, settings.get("num_processes"), settings.get("process_id")
        )


def split_cpu(devices: int) -> None:
    """Lets JAX show a CPU as several devices, which share its cores.

    A small network's step does not fill two cores, so that two trainings side by side end somewhat
    sooner than one after the other. Without effect on accelerators, and where JAX runs already or
    XLA_FLAGS says how many devices there are.

    Args:
        devices: how many.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or devices < 2:
        return
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        # JAX runs already: this process keeps the devices that it has.
        return


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the devices out along the axes.

    Args:
        sizes: axis name -> devices along it; one may be -1 for all that are left. Axes that are
            not named have size 1.
        devices: those to use; None for all.

    Raises:
        UserError: an axis is unknown, or the sizes do not divide the devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise UserError(f"mesh has the unknown axis {unknown[0]!r}. Expected {', '.join(AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if any(size == 0 or size < -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh sizes are {dict(sizes)}: expected positive sizes, at most one -1")
    fixed = int(np.prod([size for size in shape if size != -1]))
    if len(devices) % fixed or (-1 not in shape and fixed != len(devices)):
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise UserError(
            f"mesh sizes {dict(sizes)} need {'a multiple of ' if -1 in shape else ''}{fixed}"
            f" devices and there are {len(devices)}. Sizes that divide are {divisors}"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in shape]
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def split_cells(mesh: Mesh) -> list[Mesh]:
    """Returns one mesh for each position along "cell", for cells that run side by side."""
    return [Mesh(mesh.devices[index : index + 1], AXES) for index in range(mesh.shape["cell"])]


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch [b, x, y, z, ...]: samples over "data", x over "space"."""
    return NamedSharding(mesh, BATCH)


def sample_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of one value a sample [b]: over "data"."""
    return NamedSharding(mesh, SAMPLES)


def by_class(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The sharding of [b, classes, ...]: b over "data", classes over "space" where they divide."""
    split = shape[1] % mesh.shape["space"] == 0
    return NamedSharding(mesh, BATCH if split else SAMPLES)


def parameter_shardings(mesh: Mesh, parameters: Mapping[str, Array]) -> dict[str, NamedSharding]:
    """The sharding of each parameter, by `PARAMETER_RULES`."""
    return {
        name: NamedSharding(mesh, _fitting(_rule(name), tuple(np.shape(value)), mesh))
        for name, value in parameters.items()
    }


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of a training state: whatever is shaped like a parameter lies with it.

    Args:
        mesh: of the job.
        state: a pytree that holds dictionaries of arrays under parameters' names.
    """

    def of(path, value):
        name = next((str(key.key) for key in reversed(path) if hasattr(key, "key")), "")
        return NamedSharding(mesh, _fitting(_rule(name), tuple(np.shape(value)), mesh))

    return jax.tree_util.tree_map_with_path(of, state)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """Moves this process's share of a batch onto its devices.

    Raises:
        UserError: the batch does not divide by the devices along "data", or x along "space".
    """
    for name, array in batch.items():
        size = array.shape[0] * jax.process_count()
        # Values of a sample that are no volume, such as its organ, have no first spatial axis.
        length = array.shape[1] if array.ndim > 1 else 0
        if size % mesh.shape["data"] or length % mesh.shape["space"]:
            raise UserError(
                f"{name} of shape {(size, *array.shape[1:])} does not divide over"
                f" {mesh.shape['data']} devices along 'data' and {mesh.shape['space']} along"
                " 'space'. Change training.batch_size, training.patch_size or the mesh"
            )
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding(mesh) if array.ndim > 1 else sample_sharding(mesh), array
        )
        for name, array in batch.items()
    }


def _rule(name: str) -> PartitionSpec:
    return next(spec for pattern, spec in PARAMETER_RULES if re.search(pattern, name))


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Aligns a spec with the last axes of an array and drops what does not divide."""
    if len(spec) > len(shape):
        return PartitionSpec()
    names = (None,) * (len(shape) - len(spec)) + tuple(spec)
    return PartitionSpec(
        *(
            name if name and mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, shape, strict=True)
        )
    )
