"""Checkpoints in buckets: complete or not there, and continued from on any machine."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_checkpoints import _config, _state
from tumorjax import parallel
from tumorjax.buckets import BucketPath
from tumorjax.clock import Clock
from tumorjax.errors import UserError
from tumorjax.files import read_csv, write_json_atomic
from tumorjax.training import checkpoints, loop, mirror


@pytest.fixture
def folder(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("TUMORJAX_SCRATCH", str(tmp_path))
    folder = BucketPath(bucket) / "cell"
    write_json_atomic(folder / "config.json", _config().to_dict())
    return folder


def save(folder, *steps):
    with checkpoints.open_manager(folder, write=True) as manager:
        for step in steps:
            checkpoints.save(manager, step, _state(step), 10 * step)
        checkpoints.finish(manager)


def newest(folder):
    with checkpoints.open_manager(folder) as manager:
        state, position = checkpoints.restore_newest(manager, _state(0))
    step = int(state["step"])
    expected = _state(step)["parameters"]
    assert position == 10 * step
    for name, value in expected.items():
        np.testing.assert_array_equal(state["parameters"][name], value)
    return step


def steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


# What is the same for both kinds of server is tested with one of them.
one = pytest.mark.parametrize("proxy", ["s3"], indirect=True)


@one
def test_the_newest_come_back_and_the_old_go(folder, tmp_path):
    assert not checkpoints.has_any(folder)
    save(folder, 1, 2, 3)
    assert newest(folder) == 3
    assert steps(folder) == [2, 3]
    assert checkpoints.has_any(folder)
    apply, _ = checkpoints.load_model(folder)
    for name, value in _state(3)["parameters"].items():
        np.testing.assert_array_equal(apply.args[0][name], value)
    # Nothing of it stays on this machine.
    assert not list(tmp_path.iterdir())


@one
def test_what_was_cut_off_or_damaged_is_passed_over(folder, caplog):
    save(folder, 1, 2)
    place = folder / "checkpoints"
    record = json.loads((place / "2" / mirror.RECORD).read_text())
    # An upload that did not come to its end.
    name = next(iter(record["files"]))
    (place / "3" / "0123" / name).write_bytes(b"part")
    assert newest(folder) == 2
    damaged = place / "2" / record["token"] / max(record["files"], key=record["files"].get)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    assert newest(folder) == 1
    assert "passed over" in caplog.text
    # The next save clears up.
    save(folder, 4)
    assert steps(folder) == [2, 4]
    assert newest(folder) == 4


@one
def test_a_save_that_cannot_be_kept_is_an_error(proxy, folder, monkeypatch):
    def refuse(path, data):
        raise UserError(f"{path}: access was refused")

    with checkpoints.open_manager(folder, write=True) as manager:
        checkpoints.save(manager, 1, _state(1), 10)
        checkpoints.finish(manager)
        monkeypatch.setattr(BucketPath, "write_bytes", refuse)
        checkpoints.save(manager, 2, _state(2), 20)
        with pytest.raises(UserError, match="access was refused"):
            checkpoints.finish(manager)
    monkeypatch.undo()
    assert newest(folder) == 1


@one
def test_a_training_of_several_processes_is_refused_before_it_starts(folder):
    with pytest.raises(UserError, match="2 processes share this training"):
        mirror.open_mirror(folder / "checkpoints", 2, True, (0, 1))
    # Each of them may read it.
    mirror.open_mirror(folder / "checkpoints", 2, False, (0, 1)).close()


@one
def test_trainings_are_copied_between_disks_and_buckets(folder, tmp_path, bucket):
    save(folder, 1, 2)
    (folder / "store" / "x").write_bytes(b"its own scans")
    here, again = tmp_path / "here" / "copy", BucketPath(bucket) / "again"
    mirror.copy_training(folder, here, without=("store",))
    mirror.copy_training(here, again)
    mirror.copy_training(again, BucketPath(bucket) / "third")
    for place in (here, again, BucketPath(bucket) / "third"):
        assert newest(place) == 2
        assert (place / "config.json").read_bytes() == (folder / "config.json").read_bytes()
        assert not (place / "store").exists()


def test_a_training_that_was_stopped_goes_on_anywhere(proxy, folder, tmp_path, monkeypatch, rng):
    """A descent on random data, stopped after an upload and continued by a machine with nothing."""
    data = rng.normal(size=(12, 8, 5)).astype(np.float32)
    mesh = parallel.make_mesh({"data": 1}, jax.devices()[:1])

    @jax.jit
    def step(state, batch):
        def loss(weights):
            return jnp.mean((batch["x"] @ weights - 1) ** 2)

        value, slope = jax.value_and_grad(loss)(state["parameters"]["weights"])
        weights = state["parameters"]["weights"] - 0.1 * slope
        return {"parameters": {"weights": weights}, "step": state["step"] + 1}, {"loss": value}

    def batches_from(position, stop=None):
        for number, x in enumerate(data[position:], start=position):
            if number == stop:
                raise KeyboardInterrupt
            yield {"x": x}

    def train(place, batches):
        state = {"parameters": {"weights": jnp.zeros(5)}, "step": jnp.zeros((), jnp.int32)}
        state = jax.device_put(state, parallel.state_shardings(mesh, state))
        settings = {"steps": 12, "save_every": 3, "log_every": 1, "clock": Clock(), "mesh": mesh}
        return loop.train(place, state, step, batches, **settings)

    whole = train(tmp_path / "whole", batches_from)
    proxy.rate = 0.15
    with pytest.raises(KeyboardInterrupt):
        train(folder, lambda position: batches_from(position, stop=8))
    assert steps(folder) == [3, 6]
    monkeypatch.setenv("TUMORJAX_SCRATCH", str(tmp_path / "elsewhere"))
    begun = []
    state = train(folder, lambda position: begun.append(position) or batches_from(position))
    assert begun == [6]
    assert int(state["step"]) == 12
    weights = [one["parameters"]["weights"] for one in (whole, state)]
    np.testing.assert_array_equal(*weights)
    curves = [read_csv(place / "metrics.csv") for place in (tmp_path / "whole", folder)]
    assert [r["loss"] for r in curves[0]] == [r["loss"] for r in curves[1]]
