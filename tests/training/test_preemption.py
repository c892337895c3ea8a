"""Told to stop: what there is is saved, the exit code says so, and the same command goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.segmentation import get_config
from tumorjax import parallel
from tumorjax.clock import Clock
from tumorjax.files import read_csv
from tumorjax.scaling import grid
from tumorjax.training import checkpoints, preemption, segmenter
from tumorjax.volumes import open_store, write_case

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "model.widths": (4, 8),
    "model.blocks": (1, 1),
    "training.patch_size": (8, 8, 8),
    "training.batch_size": 8,
    "training.steps": 6,
    "training.save_every": 4,
    "training.log_every": 1,
}
# The job as a user starts it; step 2 sends its own process the signal that a scheduler would.
COMMAND = """
import os, signal
from tumorjax import main
from tumorjax.training import loop, preemption

train = loop.train

def told(*arguments, progress, **settings):
    def show(step, row):
        progress(step, row)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        while step == 2 and not preemption.told():
            pass
    return train(*arguments, progress=show, **settings)

loop.train = told
main.entry()
"""


@pytest.fixture
def store(tmp_path, rng):
    url = tmp_path / "store"
    settings = {"spacing": [4.0, 4.0, 4.0], "window": [-175.0, 250.0]}
    for case in ("a", "b"):
        image = rng.random((20, 18, 16), np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[4:12, 4:12, 4:12] = 5  # liver
        label[6:9, 6:9, 6:9] = 27  # liver_lesion
        write_case(url, case, image, label, (4.0,) * 3, {"patient": case}, settings)
    return open_store(url)


def _config(store):
    config = get_config()
    config.data.store = str(store.url)
    for name, value in SIZES.items():
        section, key = name.split(".")
        config[section][key] = value
    return config


def _weights(folder):
    return checkpoints.load_model(folder)[0].args[0]


def test_sigterm_saves_ends_with_75_and_the_same_command_goes_on(store, tmp_path):
    options = [f"--config.{name}={value}" for name, value in SIZES.items()]
    stopped = subprocess.run(
        [
            *(sys.executable, "-c", COMMAND, f"--config={ROOT / 'configs' / 'segmentation.py'}"),
            *(f"--workdir={tmp_path / 'stopped'}", f"--config.data.store={store.url}", *options),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert stopped.returncode == 75, stopped.stderr
    assert "tumorjax: SIGTERM: saving, then stopping, within 25 s" in stopped.stderr
    assert stopped.stderr.strip().splitlines()[-1] == (
        f"tumorjax: {tmp_path / 'stopped'}: told to stop, step 3 of 6 is saved."
        " Run the same command again: it goes on from there"
    )
    # Saved though no save was due.
    assert checkpoints.steps(tmp_path / "stopped") == [3]
    for name in ("stopped", "whole"):
        assert segmenter.run(_config(store), tmp_path / name) == 0
    for name, value in _weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(_weights(tmp_path / "stopped")[name], value, err_msg=name)
    rows = read_csv(tmp_path / "stopped" / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]


def test_a_study_goes_on_with_fewer_devices_and_with_more(store, tmp_path, monkeypatch):
    config = _config(store)
    config.training.optimizer = "sgd"
    sources = [(store, case) for case in store.cases]

    def train(folder, devices, stop=0):
        folder.mkdir(exist_ok=True)
        mesh = parallel.make_mesh({"data": -1}, jax.devices()[:devices])
        monkeypatch.setattr(preemption, "requested", lambda step, alone=False: step == stop)
        segmenter.train_segmenter(config, sources, folder, mesh, clock=Clock())

    train(tmp_path / "whole", 8)
    for devices, stop in ((8, 2), (4, 5)):
        with pytest.raises(preemption.Preempted, match=f"step {stop} of 6 is saved"):
            train(tmp_path / "moved", devices, stop)
    train(tmp_path / "moved", 8)
    moved = _weights(tmp_path / "moved")
    for name, value in _weights(tmp_path / "whole").items():
        np.testing.assert_allclose(moved[name], value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_is_heard_while_the_main_thread_waits(number):
    heard = threading.Event()

    def listen():
        while not preemption.told():
            time.sleep(0.01)
        heard.set()

    with preemption.watch():
        assert not preemption.told()
        preemption.stop_if_told("waiting")
        threading.Thread(target=listen, daemon=True).start()
        os.kill(os.getpid(), number)
        assert heard.wait(10)
        assert preemption.requested(7)
        with pytest.raises(preemption.Preempted, match="told to stop while waiting"):
            preemption.stop_if_told("waiting")
    with preemption.watch():
        assert not preemption.told(), "another job in this process is told anew"
    assert signal.getsignal(number) is signal.SIG_DFL


LISTENER = """
import os, signal, sys, time
from tumorjax.training import preemption
# A shell lets what it starts in the background ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
with preemption.watch(float(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("grace", "signals", "code"),
    [
        (60, [signal.SIGTERM, signal.SIGTERM], 128 + signal.SIGTERM),
        (60, [signal.SIGUSR1, signal.SIGINT], -signal.SIGINT),
        (1, [signal.SIGTERM], 75),
    ],
)
def test_a_second_signal_ends_at_once_and_the_grace_time_ends(grace, signals, code):
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, str(grace)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signals[0])
    assert "saving, then stopping" in process.stderr.readline()
    for number in signals[1:]:
        # An order that arrives twice within two seconds is one.
        time.sleep(2.5)
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    if grace == 1:
        assert "not everything could be saved in 1 s (processes.grace_seconds)" in err


def test_all_threads_of_a_study_stop_their_cells(tmp_path, monkeypatch):
    cells = grid.cells({"n_real": (1, 2, 3, 4), "arms": ("real",), "seeds": (0,)})
    both, told = threading.Barrier(2), threading.Event()
    monkeypatch.setattr(preemption, "told", told.is_set)
    saved = []

    def work(cell, place):
        both.wait(10)
        told.set()
        saved.append(cell)
        preemption.stop_if_told("training")

    with pytest.raises(preemption.Preempted):
        grid.share(cells, tmp_path, lambda cell: False, work, ["first", "second"])
    assert len(saved) == 2
