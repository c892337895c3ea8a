"""The mesh, its rules, and what does not divide."""

import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tumorjax import parallel
from tumorjax.errors import UserError

ROWS = ("data", "fsdp")


def test_minus_one_takes_what_is_left():
    mesh = parallel.make_mesh({"cell": 2, "data": -1})
    assert dict(mesh.shape) == {"cell": 2, "data": 4, "fsdp": 1, "space": 1}
    cells = parallel.split_cells(mesh)
    assert [dict(cell.shape)["data"] for cell in cells] == [4, 4]
    devices = [device for cell in cells for device in cell.devices.ravel()]
    assert sorted(d.id for d in devices) == [d.id for d in jax.devices()]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"data 3.* need 3 devices and there are 8.*would fit: mesh\.data 8$"),
        ({"data": 2, "space": 2}, r"mesh\.data 4; mesh\.space 4; -1 for one axis"),
        ({"data": -1, "space": 3}, r"multiple of 3 devices.*mesh\.space 1 or 2 or 4 or 8$"),
        ({"data": 3, "space": 3}, r"product divides 8: \[1, 2, 4, 8\]"),
        ({"data": -1, "space": -1}, "at most one -1"),
        ({"batch": 8}, "unknown axis 'batch'"),
        ({"dcn_batch": 8}, "unknown axis 'dcn_batch'"),
        ({"data": 0}, "positive"),
        ({"data": 8, "dcn_data": 2}, "the devices are of 1 slices"),
    ],
)
def test_sizes_that_do_not_fit_are_told(sizes, message):
    with pytest.raises(UserError, match=message):
        parallel.make_mesh(sizes)


@dataclass(frozen=True)
class Device:
    """What the layout of a mesh asks of a device."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "a device"


def _slices(count: int, each: int) -> list[Device]:
    return [Device(i, i // each) for i in range(count * each)]


@pytest.mark.parametrize(
    ("sizes", "count", "each", "outer"),
    [
        ({"cell": 4, "data": 2}, 2, 4, {"cell": 2}),
        ({"cell": 2, "data": -1}, 4, 4, {"cell": 2, "data": 2}),
        ({"cell": 3, "data": 4, "fsdp": 2}, 4, 6, {"data": 4}),
        ({"cell": 2, "data": 2, "space": 4, "dcn_cell": 1, "dcn_data": 2}, 2, 8, {"data": 2}),
        ({"fsdp": 4, "space": 2, "dcn_fsdp": 2}, 2, 4, {"fsdp": 2}),
    ],
)
def test_slices_lie_along_cells_then_data_or_where_one_says(sizes, count, each, outer):
    mesh = parallel.make_mesh(sizes, _slices(count, each))
    found = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for axis, name in enumerate(parallel.AXES):
        blocks = np.split(found, outer.get(name, 1), axis)
        # Within its block an axis stays on a slice.
        assert all((np.diff(block, axis=axis) == 0).all() for block in blocks), name
    assert sorted(device.id for device in mesh.devices.ravel()) == list(range(count * each))


def test_slices_do_not_divide_fsdp_or_space_unasked():
    with pytest.raises(UserError, match=r"2 slices.*mesh\.cell times mesh\.data a multiple of 2"):
        parallel.make_mesh({"fsdp": 4, "space": 2}, _slices(2, 4))


def test_a_torus_gives_neighbours_to_the_axis_that_talks_most():
    # 4x4 chips of one core, numbered row by row, as v5e shows them.
    @dataclass(frozen=True)
    class Chip(Device):
        coords: tuple[int, int, int] = (0, 0, 0)
        core_on_chip: int = 0

    chips = [Chip(i, 0, i // 8, "tpu", "TPU v4", coords=(i % 4, i // 4, 0)) for i in range(16)]
    mesh = parallel.make_mesh({"data": 4, "space": 4}, chips)
    coords = np.array([chip.coords for chip in mesh.devices.ravel()]).reshape(
        *mesh.devices.shape, 3
    )
    # Along "space" one goes around a ring of the torus: one coordinate differs by one.
    steps = np.abs(np.diff(coords, axis=3)).sum(-1)
    assert (steps == 1).all()


def test_a_process_loads_the_rows_of_its_devices(monkeypatch):
    devices = [Device(i, 0, i // 4) for i in range(8)]
    mesh = parallel.make_mesh({"cell": 2, "data": 2, "fsdp": 2}, devices)
    # Batches of 8 rows over data x fsdp = 4; each process has one cell and all rows of it.
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert parallel.own_cells(mesh) == [1]
    assert parallel.batch_rows(mesh, 8) == list(range(8))
    mesh = parallel.make_mesh({"data": 4, "space": 2}, devices)
    assert parallel.own_cells(mesh) == [0]
    assert parallel.batch_rows(mesh, 8) == [4, 5, 6, 7]
    # Two processes share each volume: both load it.
    mesh = parallel.make_mesh({"space": 8}, devices)
    assert parallel.batch_rows(mesh, 3) == [0, 1, 2]
    with pytest.raises(UserError, match=r"3 samples.*multiple of 2.*one of \[1, 3\]"):
        parallel.batch_rows(parallel.make_mesh({"fsdp": 2, "space": 4}, devices), 3)


def _parameters(cells: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    return {
        "stem.conv.kernel": np.zeros((*cells, 3, 3, 3, 1, 8)),
        "heads.0.kernel": np.zeros((*cells, 1, 1, 1, 8, 3)),
        "few.kernel": np.zeros((*cells, 1, 1, 1, 2, 3)),
        "stem.norm.scale": np.zeros((*cells, 8)),
    }


def _specs(mesh, state, **options):
    shardings = parallel.state_shardings(mesh, state, **options)
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def test_kernels_are_split_over_fsdp_where_they_divide():
    mesh = parallel.make_mesh({"data": 2, "fsdp": 4})
    found = _specs(mesh, {"parameters": _parameters(), "optimizer": (0, _parameters())})
    assert found["parameters"] == {
        "stem.conv.kernel": PartitionSpec(None, None, None, None, "fsdp"),
        "heads.0.kernel": PartitionSpec(None, None, None, "fsdp", None),
        "few.kernel": PartitionSpec(),
        "stem.norm.scale": PartitionSpec(),
    }
    assert found["optimizer"] == (PartitionSpec(), found["parameters"])


def test_stacked_states_follow_the_same_rules_behind_their_cells():
    mesh = parallel.make_mesh({"cell": 4, "fsdp": 2})
    state = {"parameters": _parameters((8,)), "step": np.zeros(8), "key": np.zeros((8, 2))}
    found = _specs(mesh, state, stacked=True)
    assert found["parameters"] == {
        "stem.conv.kernel": PartitionSpec("cell", None, None, None, None, "fsdp"),
        "heads.0.kernel": PartitionSpec("cell", None, None, None, "fsdp", None),
        "few.kernel": PartitionSpec("cell", None, None, None, "fsdp", None),
        "stem.norm.scale": PartitionSpec("cell"),
    }
    assert found["step"] == found["key"] == PartitionSpec("cell")
    assert parallel.batch_sharding(mesh, stacked=True).spec == PartitionSpec("cell", ROWS, "space")
    assert parallel.sample_sharding(mesh, stacked=True).spec == PartitionSpec("cell", ROWS)
    with pytest.raises(UserError, match=r"6 cells.*4 devices.*\[1, 2, 3, 6\]"):
        parallel.state_shardings(mesh, {"step": np.zeros(6)}, stacked=True)


def test_a_batch_is_split_or_refused(rng):
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "space": 2})
    batch = {
        "image": rng.random((4, 8, 2, 2, 1)).astype(np.float32),
        "organ": rng.integers(0, 9, 4),
    }
    placed = parallel.put_batch(mesh, batch)
    for name, shape in (("image", (1, 4, 2, 2, 1)), ("organ", (1,))):
        np.testing.assert_array_equal(placed[name], batch[name])
        assert {shard.data.shape for shard in placed[name].addressable_shards} == {shape}
    with pytest.raises(UserError, match=r"3 samples do not divide over 4 devices, 2.* 2 along"):
        parallel.put_batch(mesh, {"image": batch["image"][:3]})
    with pytest.raises(UserError, match=r"7 voxels along x.*mesh\.space to one of \[1, 7\]"):
        parallel.put_batch(mesh, {"image": batch["image"][:, :7]})


def test_a_stacked_batch_is_split_over_cells_too(rng):
    mesh = parallel.make_mesh({"cell": 2, "data": 2, "space": 2})
    batch = {
        "image": rng.random((4, 2, 8, 2, 2, 1)).astype(np.float32),
        "organ": rng.integers(0, 9, (4, 2)),
    }
    placed = parallel.put_batch(mesh, batch, stacked=True)
    for name, shape in (("image", (2, 1, 4, 2, 2, 1)), ("organ", (2, 1))):
        np.testing.assert_array_equal(placed[name], batch[name])
        assert {shard.data.shape for shard in placed[name].addressable_shards} == {shape}
    with pytest.raises(UserError, match=r"3 cells do not divide"):
        parallel.put_batch(mesh, {"image": batch["image"][:3]}, stacked=True)


@pytest.mark.parametrize(
    ("flags", "wanted", "found"),
    [("", 3, 3), ("", 1, 1), ("--xla_force_host_platform_device_count=2", 3, 2)],
)
def test_a_cpu_shows_as_several_devices_unless_xla_is_told_otherwise(flags, wanted, found):
    code = (
        "import jax; from tumorjax import parallel;"
        f" parallel.split_cpu({wanted}); print(len(jax.devices())); parallel.split_cpu(5);"
        " print(len(jax.devices()))"
    )
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    # Once JAX runs, its devices stay as they are.
    assert run.stdout.split() == [str(found)] * 2
