"""The mesh, its rules, and what does not divide."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tumorjax import parallel
from tumorjax.errors import UserError


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
        ({"data": 3}, r"3 devices and there are 8.*\[1, 2, 4, 8\]"),
        ({"data": -1, "space": -1}, "at most one -1"),
        ({"batch": 8}, "unknown axis 'batch'"),
        ({"data": 0}, "positive"),
    ],
)
def test_sizes_that_do_not_fit_are_told(sizes, message):
    with pytest.raises(UserError, match=message):
        parallel.make_mesh(sizes)


def test_kernels_are_split_over_fsdp_where_they_divide():
    mesh = parallel.make_mesh({"data": 2, "fsdp": 4})
    parameters = {
        "stem.conv.kernel": np.zeros((3, 3, 3, 1, 8)),
        "heads.0.kernel": np.zeros((1, 1, 1, 8, 3)),
        "stem.norm.scale": np.zeros(8),
    }
    found = {n: s.spec for n, s in parallel.parameter_shardings(mesh, parameters).items()}
    assert found["stem.conv.kernel"] == PartitionSpec(None, None, None, None, "fsdp")
    assert set(found["heads.0.kernel"]) <= {None}
    assert set(found["stem.norm.scale"]) <= {None}


def test_a_batch_is_split_or_refused(rng):
    mesh = parallel.make_mesh({"data": 4, "space": 2})
    batch = {"image": rng.random((4, 8, 2, 2, 1)).astype(np.float32)}
    placed = parallel.put_batch(mesh, batch)["image"]
    np.testing.assert_array_equal(placed, batch["image"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 4, 2, 2, 1)}
    with pytest.raises(UserError, match="does not divide over 4 devices"):
        parallel.put_batch(mesh, {"image": batch["image"][:3]})


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
