"""The mesh, and the rules that say which array lies where on it.

Axes: "cell" (independent cells of the grid side by side), "data" (the batch), "fsdp" (the batch as
well, and parameters with what the optimizer keeps of them), "space" (a volume's first axis).
Everything that is sharded goes through `RULES` and `jax.jit` with NamedSharding; no other module
names an axis.

Arrays of cells that advance together are stacked: they have one axis more in front, over "cell",
and the same rules for the others. docs/parallel.md says which axis helps when.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from tumorjax.errors import UserError

AXES = ("cell", "data", "fsdp", "space")
# What can be spread over slices of a machine (TPU slices, GPU nodes) without being asked for: their
# network carries a gradient once a step, but neither a halo nor the weights of every layer.
SLICE_AXES = ("cell", "data")
# Samples are spread over both: with "fsdp" each device gathers the weights as it needs them, and
# would otherwise compute what its neighbour computes.
ROWS = ("data", "fsdp")
# A config's mesh: devices along each axis, and slices along each, all 1 for the usual layout.
SIZES = dict.fromkeys(AXES, 1) | {f"dcn_{axis}": 1 for axis in AXES}
# One entry a cell, in front.
CELLS = PartitionSpec("cell")

# (kind of array, pattern of the parameter's name, what is tried in turn). A spec of a parameter is
# for the last axes of its array, others for the first ones; the first whose every axis divides is
# taken, and an array that none fits is whole on every device. Kinds: "state" (parameters, and what
# an optimizer keeps under their names), "batch" [b, x, y, z, ...], "sample" [b, ...] (values of a
# sample that are no volume), "sums" [b, classes, ...].
RULES: tuple[tuple[str, str, tuple[PartitionSpec, ...]], ...] = (
    # [.., in, out]: by outputs, or where there are few, as in a head, by inputs.
    ("state", r"\.kernel$", (PartitionSpec(None, "fsdp"), PartitionSpec("fsdp", None))),
    ("state", r"", (PartitionSpec(),)),
    ("batch", r"", (PartitionSpec(ROWS, "space"),)),
    ("sample", r"", (PartitionSpec(ROWS),)),
    ("sums", r"", (PartitionSpec(ROWS, "space"), PartitionSpec(ROWS))),
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


# ---------------------------------------------------------------------------- the mesh


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the devices out along the axes, neighbours on the machine's network side by side.

    Where the devices are of several slices, these lie along "cell" as far as it divides, then along
    "data"; "fsdp" and "space" stay within a slice unless `sizes` puts slices along them.

    Args:
        sizes: axis name -> devices along it; one may be -1 for all that are left. Axes that are
            not named have size 1. "dcn_" and an axis -> how many slices lie along it, for one who
            wants them elsewhere; then all of them are to be given.
        devices: those to use; None for all.

    Raises:
        UserError: an axis is unknown, or the sizes do not divide the devices or the slices. Says
            which would.
    """
    devices = list(devices if devices is not None else jax.devices())
    if unknown := sorted(set(sizes) - set(SIZES)):
        raise UserError(
            f"mesh has the unknown axis {unknown[0]!r}. Expected {', '.join(AXES)}, or one of them"
            " with dcn_ in front"
        )
    shape = _shape({axis: int(sizes.get(axis, 1)) for axis in AXES}, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    wanted = [int(sizes.get(f"dcn_{axis}", 1)) for axis in AXES]
    outer = wanted if math.prod(wanted) > 1 else _slices_along(shape, slices)
    if any(n < 1 or size % n for size, n in zip(shape, outer, strict=True)) or (
        math.prod(outer) != slices
    ):
        named = ", ".join(f"{a} {size}" for a, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"the devices are of {slices} slices, which do not divide over the mesh {named}:"
            f" {dict(zip(AXES, outer, strict=True))} would be {math.prod(outer)} of them. Make"
            f" mesh.cell times mesh.data a multiple of {slices}, or say with mesh.dcn_cell,"
            " dcn_data, dcn_fsdp and dcn_space how many slices lie along each axis"
        )
    if slices == 1:
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        inner = [size // n for size, n in zip(shape, outer, strict=True)]
        laid_out = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    return Mesh(laid_out, AXES)


def split_cells(mesh: Mesh) -> list[Mesh]:
    """Returns one mesh for each position along "cell", for cells that run side by side."""
    return [Mesh(mesh.devices[index : index + 1], AXES) for index in range(mesh.shape["cell"])]


def local_mesh(mesh: Mesh) -> Mesh:
    """Returns the part of a mesh that is this process's devices, for work that it does by itself.

    Raises:
        UserError: its devices are no block of the mesh.
    """
    try:
        return mesh.local_mesh
    except ValueError as error:
        raise UserError(
            f"the devices of process {jax.process_index()} are no block of the mesh"
            f" {dict(mesh.shape)}. Choose sizes that divide by those of a process"
        ) from error


def own_cells(mesh: Mesh) -> list[int]:
    """Returns the positions along "cell" at which this process has devices."""
    return _positions(mesh, ("cell",))


def processes_of(mesh: Mesh) -> list[int]:
    """Returns the processes that have devices of a mesh, in order."""
    return sorted({device.process_index for device in mesh.devices.flat})


def first_process(mesh: Mesh) -> int:
    """Returns the process that writes the files of what is done on a mesh."""
    return processes_of(mesh)[0]


def batch_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the rows of a batch that lie on this process's devices, which it has to load.

    Args:
        mesh: of the job.
        batch_size: rows of the whole batch, over all processes; of one cell if stacked.

    Raises:
        UserError: the rows do not divide over the devices.
    """
    _check_rows(mesh, batch_size)
    each = batch_size // rows(mesh)
    return [p * each + i for p in _positions(mesh, ROWS) for i in range(each)]


def rows(mesh: Mesh) -> int:
    """Over how many devices a batch's samples are spread."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


# ---------------------------------------------------------------------------- shardings


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts arrays that each process has by itself, all the same, whole onto a mesh's devices.

    Weights from a checkpoint lie on one device of each process. jax.device_put would have one
    process send them to the others, which not every backend can.
    """
    sharding = replicated(mesh)

    def place(leaf: Array | np.ndarray) -> Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(place, tree)


def by_cell(mesh: Mesh) -> NamedSharding:
    """The sharding of one value a cell [cells, ...]: over "cell"."""
    return NamedSharding(mesh, CELLS)


def batch_sharding(mesh: Mesh, *, stacked: bool = False) -> NamedSharding:
    """The sharding of a batch [b, x, y, z, ...]: samples over "data" and "fsdp", x over "space"."""
    return NamedSharding(mesh, _stacked(_rule("batch")[0], stacked))


def sample_sharding(mesh: Mesh, *, stacked: bool = False) -> NamedSharding:
    """The sharding of one value a sample [b]: over "data" and "fsdp"."""
    return NamedSharding(mesh, _stacked(_rule("sample")[0], stacked))


def by_class(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The sharding of [b, classes, ...]: b as samples, classes over "space" where they divide."""
    specs = _rule("sums")
    return NamedSharding(mesh, next((s for s in specs if _divides(s, shape, mesh)), specs[-1]))


def state_shardings(mesh: Mesh, state: Any, *, stacked: bool = False) -> Any:
    """The sharding of a training state: whatever is shaped like a parameter lies with it.

    Args:
        mesh: of the job.
        state: a pytree that holds dictionaries of arrays under parameters' names.
        stacked: every array has the cells in front.

    Raises:
        UserError: the cells do not divide over the devices along "cell".
    """

    def of(path, value):
        name = next((str(key.key) for key in reversed(path) if hasattr(key, "key")), "")
        shape = tuple(np.shape(value))
        if stacked:
            _check_cells(mesh, shape[0], f"the state's {name}")
        spec = _fitting(_rule("state", name), shape[1:] if stacked else shape, mesh)
        return NamedSharding(mesh, _stacked(spec, stacked))

    return jax.tree_util.tree_map_with_path(of, state)


def gathered(mesh: Mesh, parameters: dict[str, Array]) -> dict[str, Array]:
    """Returns parameters whole on every device, inside jit; their gradients lie as they did.

    With "fsdp" a device holds its share of each parameter and of what the optimizer keeps of it.
    Said so plainly, XLA gathers the weights and sums the gradients into shares; left to itself, it
    may gather the activations of one sample after another instead.

    Args:
        mesh: of the job.
        parameters: one cell's, by name.
    """
    if mesh.shape["fsdp"] == 1:
        return parameters
    lying = {name: sharding.spec for name, sharding in state_shardings(mesh, parameters).items()}

    @jax.custom_vjp
    def gather(parameters):
        return {n: _constrained(mesh, v, PartitionSpec()) for n, v in parameters.items()}

    def scatter(_, gradient):
        return ({n: _constrained(mesh, g, lying[n]) for n, g in gradient.items()},)

    gather.defvjp(lambda parameters: (gather(parameters), None), scatter)
    return gather(parameters)


def check_space(mesh: Mesh, patch_size: Sequence[int], divisor: Sequence[int], name: str) -> None:
    """Checks that a network can be split over "space".

    Args:
        mesh: of the job.
        patch_size: voxels (x, y, z).
        divisor: product of the network's strides along each axis.
        name: of the network.

    Raises:
        UserError: its coarsest level has not as many planes for each device; the levels would
            then move whole between devices.
    """
    space, planes = mesh.shape["space"], patch_size[0] // divisor[0]
    if space > 1 and planes % space:
        raise UserError(
            f"mesh.space {space}: a patch of {patch_size[0]} voxels along x has {planes} planes at"
            f" {name}'s coarsest level, {divisor[0]} times coarser, which do not divide over"
            f" {space} devices. Make mesh.space one of {_divisors(planes)}, or"
            f" training.patch_size along x a multiple of {space * divisor[0]}"
        )


def split_batch(mesh: Mesh, volumes: Array) -> Array:
    """Says, inside jit, that one cell's volumes [b, x, y, z, ...] lie as a batch does."""
    if rows(mesh) * mesh.shape["space"] == 1:
        return volumes
    return _constrained(mesh, volumes, batch_sharding(mesh).spec)


def put_batch(
    mesh: Mesh, batch: Mapping[str, np.ndarray], *, stacked: bool = False, whole: bool = False
) -> dict[str, Array]:
    """Moves this process's share of a batch onto its devices.

    Args:
        mesh: of the job.
        batch: arrays [b, ...] of the rows that `batch_rows` names, in their order; or
            [cells, b, ...] of those cells that `own_cells` names. x is whole.
        stacked: the cells are in front.
        whole: leave x whole on the devices too, for volumes that are rotated there first.

    Returns:
        The batch of all processes.

    Raises:
        UserError: the batch does not divide by the devices along "data" and "fsdp", the cells by
            those along "cell", or x by those along "space".
    """
    placed = {}
    for name, array in batch.items():
        shape, inner = list(array.shape), int(stacked)
        if stacked:
            shape[0] = array.shape[0] * mesh.shape["cell"] // len(own_cells(mesh))
            _check_cells(mesh, shape[0], name)
        shape[inner] = array.shape[inner] * rows(mesh) // len(_positions(mesh, ROWS))
        # Values of a sample that are no volume, such as its organ, have no first spatial axis.
        split = array.ndim > inner + 1 and not whole
        _check_rows(mesh, shape[inner], name, tuple(shape))
        if split and shape[inner + 1] % mesh.shape["space"]:
            raise UserError(
                f"{name} of shape {tuple(shape)}: {shape[inner + 1]} voxels along x do not divide"
                f" over {mesh.shape['space']} devices along 'space'. Change training.patch_size,"
                f" or mesh.space to one of {_divisors(shape[inner + 1])}"
            )
        sharding = (batch_sharding if split else sample_sharding)(mesh, stacked=stacked)
        placed[name] = jax.make_array_from_process_local_data(sharding, array, tuple(shape))
    return placed


# ---------------------------------------------------------------------------- cells


def stack_cells(mesh: Mesh, states: Mapping[int, Any]) -> Any:
    """Stacks states of cells that lie on their own parts of the mesh. Nothing leaves its device.

    Args:
        mesh: of all cells.
        states: position along "cell" -> state as `state_shardings` lays it out on that part, of
            all positions of `own_cells`.

    Returns:
        the state with the cells in front, as `state_shardings(..., stacked=True)` has it.
    """
    first = next(iter(states.values()))
    like = jax.tree.map(lambda x: np.broadcast_to(0, (mesh.shape["cell"], *x.shape)), first)

    def stack(sharding: NamedSharding, like: Any, *cells: Array) -> Array:
        shards = [shard.data[None] for cell in cells for shard in cell.addressable_shards]
        return jax.make_array_from_single_device_arrays(like.shape, sharding, shards)

    shardings = state_shardings(mesh, like, stacked=True)
    return jax.tree.map(stack, shardings, like, *states.values())


def cell_state(mesh: Mesh, stacked: Any, position: int) -> Any:
    """Returns one cell's state of a stacked one, on the cell's own part of the mesh.

    Args:
        mesh: of all cells.
        stacked: see `stack_cells`.
        position: along "cell", one of `own_cells`.
    """
    place = split_cells(mesh)[position]

    def part(array: Array) -> Array:
        spec = cast(NamedSharding, array.sharding).spec
        sharding = NamedSharding(place, PartitionSpec(*spec[1:]))
        # Of a single cell the index is slice(None).
        shards = [s for s in array.addressable_shards if (s.index[0].start or 0) == position]
        shards = [shard.data[0] for shard in shards]
        return jax.make_array_from_single_device_arrays(array.shape[1:], sharding, shards)

    return jax.tree.map(part, stacked)


def cell_values(mesh: Mesh, stacked: Mapping[str, Array]) -> dict[int, dict[str, float]]:
    """Returns the numbers of this process's cells.

    Args:
        mesh: of all cells.
        stacked: name -> [cells], over "cell".

    Returns:
        position along "cell" -> name -> number.
    """
    found: dict[int, dict[str, float]] = {position: {} for position in own_cells(mesh)}
    for name, array in stacked.items():
        for shard in array.addressable_shards:
            first = shard.index[0].start or 0
            for offset, value in enumerate(np.asarray(shard.data)):
                found[first + offset][name] = float(value)
    return found


# ---------------------------------------------------------------------------- inside


def _shape(sizes: dict[str, int], count: int) -> list[int]:
    """Returns the sizes with the -1 filled in."""
    shape = list(sizes.values())
    if any(size == 0 or size < -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh sizes are {sizes}: expected positive sizes, at most one -1")
    fixed = math.prod(size for size in shape if size != -1)
    if count % fixed or (-1 not in shape and fixed != count):
        open_ended = -1 in shape
        fits = []
        for axis, size in sizes.items():
            others = fixed // size if size > 0 else fixed
            if size > 1 and count % others == 0:
                found = _divisors(count // others) if open_ended else [count // others]
                fits.append(f"mesh.{axis} {' or '.join(map(str, found))}")
        if not open_ended and count % fixed == 0:
            fits.append("-1 for one axis, which then takes the rest")
        # Where no single axis can mend it.
        fits = fits or [f"sizes whose product divides {count}: {_divisors(count)}"]
        named = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh sizes {named} need {'a multiple of ' if open_ended else ''}{fixed} devices and"
            f" there are {count}. What would fit: {'; '.join(fits)}"
        )
    return [count // fixed if size == -1 else size for size in shape]


def _slices_along(shape: Sequence[int], slices: int) -> list[int]:
    """Returns how many slices lie along each axis where nothing is asked for."""
    outer, left = [], slices
    for axis, size in zip(AXES, shape, strict=True):
        outer.append(math.gcd(size, left) if axis in SLICE_AXES else 1)
        left //= outer[-1]
    return outer


def _positions(mesh: Mesh, axes: Sequence[str]) -> list[int]:
    """Returns where along some axes, as if they were one, this process has devices."""
    moved = np.moveaxis(mesh.devices, [AXES.index(axis) for axis in axes], range(len(axes)))
    lines = moved.reshape(math.prod(moved.shape[: len(axes)]), -1)
    here = jax.process_index()
    return [i for i, line in enumerate(lines) if any(d.process_index == here for d in line)]


def _check_rows(
    mesh: Mesh, count: int, name: str = "the batch", shape: tuple[int, ...] | None = None
) -> None:
    if count % rows(mesh):
        raise UserError(
            f"{name}{f' of shape {shape}' if shape else ''}: {count} samples do not divide over"
            f" {rows(mesh)} devices, {mesh.shape['data']} along 'data' times {mesh.shape['fsdp']}"
            f" along 'fsdp'. Make training.batch_size a multiple of {rows(mesh)}, or mesh.data"
            f" times mesh.fsdp one of {_divisors(count)}"
        )


def _check_cells(mesh: Mesh, count: int, name: str) -> None:
    if count % mesh.shape["cell"]:
        raise UserError(
            f"{name}: {count} cells do not divide over {mesh.shape['cell']} devices along 'cell'."
            f" Make mesh.cell one of {_divisors(count)}"
        )


def _constrained(mesh: Mesh, value: Array, spec: PartitionSpec) -> Array:
    # Within jax.shard_map some of the axes are taken, which the mesh of the context knows.
    context = jax.sharding.get_abstract_mesh()
    sharding = NamedSharding(mesh if context.empty else context, spec)
    return jax.lax.with_sharding_constraint(value, sharding)


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _rule(kind: str, name: str = "") -> tuple[PartitionSpec, ...]:
    return next(specs for of, pattern, specs in RULES if of == kind and re.search(pattern, name))


def _stacked(spec: PartitionSpec, stacked: bool) -> PartitionSpec:
    return PartitionSpec("cell", *spec) if stacked else spec


def _size(mesh: Mesh, names: Any) -> int:
    """Returns over how many devices an entry of a spec spreads an axis."""
    names = names if isinstance(names, tuple) else (names,) if names else ()
    return math.prod(mesh.shape[name] for name in names)


def _divides(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> bool:
    return all(size % _size(mesh, names) == 0 for names, size in zip(spec, shape, strict=False))


def _fitting(specs: Sequence[PartitionSpec], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the first spec that divides an array's last axes, without axes of size 1."""
    for spec in specs:
        if len(spec) > len(shape):
            continue
        names = (None,) * (len(shape) - len(spec)) + tuple(spec)
        spread = [_size(mesh, name) for name in names]
        if math.prod(spread) > 1 and all(n % by == 0 for n, by in zip(shape, spread, strict=True)):
            split = zip(names, spread, strict=True)
            return PartitionSpec(*(name if by > 1 else None for name, by in split))
    return PartitionSpec()
