"""What is recorded of a training: curves, speed, profile, and the time that counted."""

import json
import socket
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax import parallel
from tumorjax.clock import Clock
from tumorjax.errors import Preempted, UserError
from tumorjax.files import read_csv
from tumorjax.training import loop, monitor
from tumorjax.training.monitor import Monitor

PATIENT = "BDMAP_00004711"


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""

    class Clock:
        now = 1_000_000.0

        def time(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)
    return clock


def record_of(folder):
    return json.loads((folder / "goodput.json").read_text())


def steps(clock, watched, numbers, load=1.0, step=3.0):
    for number in numbers:
        clock.now += load + step
        watched.step(number, load, step)


def test_goodput_counts_a_step_once_however_often_it_is_done(tmp_path, clock):
    first = Monitor({}, tmp_path)
    first.start(0, 10)
    # The first step compiles for 20 s, and counts 3 s as the next one does.
    clock.now += 21
    first.step(1, 1.0, 20.0)
    steps(clock, first, range(2, 6))
    clock.now += 2
    first.save(5, 2.0)
    steps(clock, first, (6, 7))
    first._write()  # as every ten seconds; then killed
    assert record_of(tmp_path)["useful_seconds"] == pytest.approx(7 * 3)
    clock.now += 100

    second = Monitor({}, tmp_path)
    second.start(5, 10)
    record = record_of(tmp_path)
    assert (record["starts"], record["repeated_steps"], record["step"]) == (2, 2, 5)
    assert record["useful_seconds"] == pytest.approx(5 * 3)
    steps(clock, second, range(6, 11))
    second.end()
    record = record_of(tmp_path)
    assert record["state"] == "trained"
    assert record["useful_seconds"] == pytest.approx(10 * 3)
    seconds = 21 + 4 * 4 + 2 + 2 * 4 + 100 + 5 * 4
    assert monitor.goodput(record, clock.now) == pytest.approx(30 / seconds)
    assert record["load_seconds"] == pytest.approx(1)
    assert record["step_seconds"] == pytest.approx(3)


def test_a_checkpoint_that_was_never_finished_is_no_step_of_progress(tmp_path, clock):
    first = Monitor({}, tmp_path)
    first.start(0, 10)
    steps(clock, first, range(1, 5))
    first.save(4, 1.0)
    steps(clock, first, range(5, 9))
    first.save(8, 1.0)  # its files were not complete
    second = Monitor({}, tmp_path)
    second.start(4, 10)
    record = record_of(tmp_path)
    assert record["repeated_steps"] == 4
    assert record["useful_seconds"] == pytest.approx(4 * 3)
    assert [number for number, _ in record["saves"]] == [4]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "stopped"),
        (Preempted("step 3 is saved"), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (ValueError("the loss is nan"), "failed"),
    ],
)
def test_the_record_says_how_a_training_ended(tmp_path, clock, error, state):
    watched = Monitor({}, tmp_path)
    watched.start(0, 10)
    steps(clock, watched, range(1, 4))
    watched.end(error)
    record = record_of(tmp_path)
    assert record["state"] == state
    assert record["reason"] == ("" if error is None else f"{type(error).__name__}: {error}")


def scalars_of(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_reads_what_was_logged_and_a_repeated_step_once(tmp_path, clock, rng):
    pytest.importorskip("tensorboard")
    losses = dict(enumerate(rng.random(9), start=1))
    settings = {"tensorboard": True}
    for position, last, factor in ((0, 6, 1.0), (4, 9, 2.0)):
        watched = Monitor(settings, tmp_path)
        watched.start(position, 9)
        for number in range(position + 1, last + 1):
            steps(clock, watched, [number], load=0.5, step=1.5)
            watched.row(number, {"loss": factor * losses[number]})
        watched.end()
    scalars = scalars_of(tmp_path / "tensorboard")
    wanted = {n: (1.0 if n <= 4 else 2.0) * loss for n, loss in losses.items()}
    assert scalars["loss"] == pytest.approx(wanted, rel=1e-6)
    assert set(scalars["time/loader_share"].values()) == {0.25}
    assert set(scalars["time/step_seconds"].values()) == {1.5}
    assert all(0 < value < 100 for value in scalars["memory/process_gb"].values())
    # What a CPU could do at most nobody has published.
    assert "mfu" not in scalars


def test_mfu_is_the_share_of_what_the_device_could_do(tmp_path, clock):
    pytest.importorskip("tensorboard")
    mesh = jax.make_mesh((2,), ("data",))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())

    step = jax.jit(lambda x, w: x @ w, in_shardings=(rows, whole), out_shardings=rows)
    x = jax.device_put(jnp.ones((256, 64)), rows)
    w = jax.device_put(jnp.ones((64, 32)), whole)
    step(x, w)
    watched = Monitor({"tensorboard": True, "peak_flops": 1e6}, tmp_path)
    watched.start(0, 2)
    watched.compiled(step, x, w)
    steps(clock, watched, (1,), load=0.5, step=1.5)
    watched.row(1, {"loss": 1.0})
    watched.end()
    # Of one of two devices, which has half of the rows.
    share = 2 * 128 * 64 * 32 / (2.0 * 1e6)
    assert scalars_of(tmp_path / "tensorboard")["mfu"][1] == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("cpu", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets_or_none(kind, peak):
    assert monitor.peak_flops(kind) == peak


def test_a_profile_has_its_steps_once_in_a_run(tmp_path):
    double = jax.jit(lambda x: x @ x)
    settings = {"profile_steps": (3, 4)}

    def train(folder, position, last):
        watched = Monitor(settings, folder, tmp_path)
        watched.start(position, last)
        for number in range(position + 1, last + 1):
            with watched.trace(number):
                double(jnp.ones((8, 8))).block_until_ready()
            watched.step(number, 0.0, 0.1)
        watched.end()
        return list((tmp_path / "profile").rglob("*.xplane.pb"))

    assert train(tmp_path / "first", 0, 2) == []
    assert train(tmp_path / "first", 4, 6) == []  # past those steps
    (path,) = train(tmp_path / "second", 2, 6)
    events = jax.profiler.ProfileData.from_file(str(path))
    numbers = {
        dict(event.stats)["step_num"]
        for plane in events.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert numbers == {3, 4}
    assert train(tmp_path / "third", 0, 6) == [path]


def test_a_profile_of_a_training_that_ends_is_kept(tmp_path):
    watched = Monitor({"profile_steps": (1, 9)}, tmp_path)
    watched.start(0, 2)
    with watched.trace(1):
        jnp.ones(3).block_until_ready()
    watched.end(ValueError("diverged"))
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    # And the next one can be recorded.
    jax.profiler.start_trace(str(tmp_path / "other"))
    jax.profiler.stop_trace()


def test_weights_and_biases_offline_gets_numbers_and_no_names(tmp_path, clock, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setattr(sys, "argv", ["tumorjax", f"--config.data.cases={PATIENT}"])
    monkeypatch.setattr(socket, "gethostname", lambda: "workstation-of-somebody")
    config = {
        "monitor": {"wandb": "liver", "wandb_mode": "offline"},
        "seed": 17,
        "data": {"cases": [PATIENT], "store": f"/scans/{PATIENT}"},
        "training": {"learning_rate": 0.0625, "start_from": f"/home/{PATIENT}"},
    }
    folder = tmp_path / "real-n0002-s0"
    watched = monitor.of_training(config, folder, ("seed", "training"))
    watched.start(0, 4)
    print(PATIENT)
    steps(clock, watched, (1, 2))
    watched.row(2, {"loss": 0.8125})
    watched.end()
    (run,) = (folder / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    assert record_of(folder)["run"] in log.name
    # It writes in a process of its own, which ends a moment later.
    deadline = time.monotonic() + 60
    while b"0.8125" not in (content := log.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for wanted in (b"liver", b"real-n0002-s0", b"0.8125", b"0.0625", b"time/loader_share"):
        assert wanted in content, wanted
    for path in (folder / "wandb").rglob("*"):
        if path.is_file():
            assert PATIENT.encode() not in path.read_bytes(), path
    assert b"workstation-of-somebody" not in content


@pytest.mark.parametrize(
    ("settings", "module", "extra"),
    [
        ({"tensorboard": True}, "tensorboard", "monitor"),
        ({"wandb": "liver"}, "wandb", "wandb"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, settings, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf'{module} is not installed.*"tumorjax\[{extra}\]"'):
        Monitor(settings, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile_steps": (5, 3)}, r"profile_steps is \(5, 3\)"),
        ({"profile_steps": (5,)}, r"profile_steps is \(5,\)"),
        ({"profile_steps": (1.5, 3)}, "profile_steps"),
        ({"wandb_mode": "dryrun"}, "wandb_mode is 'dryrun'"),
        ({"tensorbord": True}, "unknown key tensorbord"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        Monitor(settings, tmp_path)


def test_the_loss_of_time_is_interpolated_where_no_save_is_known(tmp_path, clock):
    first = Monitor({}, tmp_path)
    first.start(0, 100)
    steps(clock, first, range(1, 81), step=0.5)
    first._write()
    second = Monitor({}, tmp_path)
    second.start(40, 100)
    record = record_of(tmp_path)
    np.testing.assert_allclose(record["useful_seconds"], 20.0)
    assert record["repeated_steps"] == 40


def train(folder, watched, steps, calls=None):
    """Trains one weight, and stops it (as a kill would) where the loader ends."""
    mesh = parallel.make_mesh({"data": 2}, jax.devices()[:2])
    state = {"parameters": {"w": jnp.ones((4, 4))}, "step": jnp.zeros((), jnp.int32)}
    shardings = parallel.state_shardings(mesh, state)
    rows = {"x": parallel.sample_sharding(mesh)}

    def descend(state, batch):
        def loss(w):
            return jnp.mean((batch["x"] @ w) ** 2)

        value, slope = jax.value_and_grad(loss)(state["parameters"]["w"])
        new = {"parameters": {"w": state["parameters"]["w"] - 0.1 * slope}}
        return new | {"step": state["step"] + 1}, {"loss": value}

    step = jax.jit(descend, in_shardings=(shardings, rows), donate_argnums=0)

    def batches_from(position):
        for number in range(position, steps if calls is None else calls):
            yield {"x": np.random.default_rng(number).random((6, 4), np.float32)}

    return loop.train(
        folder,
        jax.device_put(state, shardings),
        step,
        batches_from,
        mesh=mesh,
        steps=steps,
        save_every=2,
        log_every=1,
        clock=Clock(),
        monitor=watched,
    )


def test_the_loop_tells_of_a_training_that_was_stopped_and_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    settings = {"tensorboard": True, "profile_steps": (4, 5), "peak_flops": 1e9}
    with pytest.raises(StopIteration):
        train(tmp_path, Monitor(settings, tmp_path), steps=8, calls=5)
    record = record_of(tmp_path)
    assert (record["state"], record["step"], record["steps"]) == ("failed", 5, 8)
    assert [number for number, _ in record["saves"]] == [2, 4]
    end = train(tmp_path, Monitor(settings, tmp_path), steps=8)
    record = record_of(tmp_path)
    assert (record["state"], record["step"], record["starts"]) == ("trained", 8, 2)
    assert record["repeated_steps"] == 1
    assert 0 < monitor.goodput(record, record["written"]) < 1
    assert record["step_seconds"] > 0
    scalars = scalars_of(tmp_path / "tensorboard")
    curve = {int(row["step"]): float(row["loss"]) for row in read_csv(tmp_path / "metrics.csv")}
    assert scalars["loss"] == pytest.approx(curve, abs=1e-6)
    assert list(scalars["mfu"]) == list(range(1, 9))
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    # As without anybody who watches.
    alone = train(tmp_path / "alone", None, steps=8)
    np.testing.assert_array_equal(end["parameters"]["w"], alone["parameters"]["w"])
    assert not (tmp_path / "alone" / "goodput.json").exists()
    # A finished one is not started again.
    train(tmp_path, Monitor(settings, tmp_path), steps=8)
    assert record_of(tmp_path) == record
