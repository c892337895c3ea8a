"""Two processes on this machine: they meet, agree, train as one does, and end together."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.segmentation import get_config
from tumorjax import parallel, processes, rendezvous
from tumorjax.clock import Clock
from tumorjax.cluster import Place
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.training import checkpoints, segmenter
from tumorjax.volumes import open_store, write_case

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
TRAINING = {
    "model.widths": [2, 4],
    "model.blocks": [1, 1],
    "training.patch_size": [8, 8, 8],
    "training.batch_size": 4,
    "training.steps": 12,
    "training.save_every": 4,
    "training.log_every": 1,
    "training.optimizer": "sgd",
}


def _port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _run(task, folder, devices=2):
    """Runs both processes; returns (exit code, last line as JSON or None, stderr) of each."""
    port = _port()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(
            [
                sys.executable,
                Path(__file__).with_name("worker.py"),
                task,
                str(port),
                str(i),
                folder,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ends = []
    for process in started:
        out, err = process.communicate(timeout=240)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        ends.append((process.returncode, json.loads(lines[-1]) if lines else None, err))
    return ends


def test_processes_gather_agree_and_tell_who_is_late(tmp_path):
    (first, zero, err), (second, one, _) = _run("talk", tmp_path)
    assert (first, second) == (0, 0), err
    assert zero["gathered"] == one["gathered"] == [{"index": i, "devices": 2} for i in (0, 1)]
    assert (zero["own"], one["own"]) == ([0], [1])
    for found in (zero, one):
        assert found["differ"].startswith(
            "UserError: process 0 and process 1 of the job differ in their config:"
            " config.a.b was 1 and is 2."
        )
        assert found["held"] == zero["held"]
        assert found["replicated"] == [True, 4, 15.0, [[[0, 1, 2], [3, 4, 5]]] * 2]
    # Of states that each has for itself, and of one that is spread over both; read by one process.
    assert zero["restored"] == [[3, 0.0, 12.0], [3, 0.0, 6.0]]
    assert one["restored"] == [[3, 300.0, 312.0], [3, 12.0, 18.0]]
    for name, start in (("own0", 0), ("own1", 300), ("both", 0)):
        assert checkpoints.steps(tmp_path / name) == [2, 3]
        with checkpoints.open_manager(tmp_path / name) as manager:
            kernel = checkpoints.read(manager, 3)["parameters"]["kernel"]
        np.testing.assert_array_equal(kernel, start + 3 * np.arange(8))
    assert zero["late"].startswith("Lost: barrier 'late': process 1 of 2 did not come within 1 s.")


def test_two_processes_train_as_one_stop_at_one_step_and_one_goes_on(tmp_path, rng):
    settings = {"spacing": [4.0, 4.0, 4.0], "window": [-175.0, 250.0]}
    for case in ("a", "b"):
        image = rng.random((20, 18, 16), np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[4:12, 4:12, 4:12] = 5  # liver
        write_case(tmp_path / "store", case, image, label, (4.0,) * 3, {"patient": case}, settings)
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    ends = _run("train", tmp_path)
    assert [code for code, _, _ in ends] == [0, 0], ends[0][2] + ends[1][2]
    stopped = checkpoints.steps(tmp_path / "both")[-1]
    assert 1 < stopped < 12
    for _, found, _ in ends:
        assert f"step {stopped} of 12 is saved" in found["stopped"]

    config = get_config()
    for name, value in TRAINING.items():
        section, key = name.split(".")
        config[section][key] = value
    store = open_store(tmp_path / "store")
    sources = [(store, case) for case in store.cases]

    def train(folder, devices):
        folder.mkdir(exist_ok=True)
        mesh = parallel.make_mesh({"data": -1}, jax.devices()[:devices])
        apply = segmenter.train_segmenter(config, sources, folder, mesh, clock=Clock())
        return jax.tree.map(np.asarray, apply.args[0])

    # Undisturbed on as many devices of one process; and what the two had, continued by one.
    whole, continued = train(tmp_path / "whole", 4), train(tmp_path / "both", 4)
    for name, value in whole.items():
        np.testing.assert_allclose(continued[name], value, atol=2e-4, err_msg=name)
    curves = [read_csv(tmp_path / name / "metrics.csv") for name in ("whole", "both")]
    assert [row["step"] for row in curves[1]] == [str(step) for step in range(1, 13)]
    for a, b in zip(*curves, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)


def test_a_process_that_is_gone_ends_the_others_with_its_name(tmp_path):
    found = {}
    threads = [
        threading.Thread(target=lambda task=task: found.update({task: _run(task, tmp_path)}))
        for task in ("die0", "die1", "fail")
    ]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 60
    for task, died, words in (
        ("die0", 0, "process 0 at 127.0.0.1:"),
        ("die1", 1, "process 1 (pid "),
    ):
        (code, _, _), (other, _, err) = found[task][died], found[task][1 - died]
        assert (code, other) == (-9, 69), err
        last = err.strip().splitlines()[-1]
        assert last.startswith(f"tumorjax: {words}")
        assert "Run the same command again in all processes" in last
    (waiting, _, heard), (failed, _, raised) = found["fail"]
    assert (waiting, failed) == (3, 3)
    assert raised.rstrip().endswith("KeyError: 'lesion_volume'")
    assert "tumorjax: process 1 ended: KeyError: 'lesion_volume'" in heard


def _meet(*places, seconds=20.0):
    """Has processes meet, each in a thread; returns what each was told, "" for nothing."""
    told = [""] * len(places)

    def meet(number, place):
        try:
            rendezvous.meet(place, seconds)
        except UserError as error:
            told[number] = str(error)

    threads = [threading.Thread(target=meet, args=pair) for pair in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_processes_that_do_not_fit_together_are_told():
    here = f"127.0.0.1:{_port()}"
    assert _meet(*(Place(here, 3, index) for index in (2, 0, 1))) == ["", "", ""]
    here = f"127.0.0.1:{_port()}"
    (told,) = _meet(Place(here, 2, 1), seconds=1)
    assert told.startswith(f"the first process cannot be reached at {here} within 1 s (Connection")
    told = _meet(Place(here, 4, 0), Place(here, 4, 2), seconds=2)
    assert told[0] == told[1]
    assert told[0].startswith(f"processes 1, 3 of 4 did not come to {here} within 2 s.")
    here = f"127.0.0.1:{_port()}"
    told = _meet(*(Place(here, 3, index) for index in (0, 1, 1)))
    assert len(set(told)) == 1
    assert told[0].startswith("two processes are number 1: pid ")
    here = f"127.0.0.1:{_port()}"
    told = _meet(Place(here, 2, 0), Place(here, 3, 1))
    assert set(told) == {told[0]}
    assert "was told of 3 processes and process 0 of 2" in told[0]
    with socket.create_server(("", int(here.rpartition(":")[2]))):
        (told,) = _meet(Place(here, 2, 0))
    assert "cannot be listened on (Address already in use)" in told


def test_a_stranger_at_the_port_is_none_of_the_job():
    port = _port()
    here = f"127.0.0.1:{port}"
    told = []
    thread = threading.Thread(
        target=lambda: told.extend(_meet(Place(here, 2, 0), Place(here, 2, 1)))
    )
    thread.start()
    sent = False
    while not sent and thread.is_alive():
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                stranger.sendall(b'GET / HTTP/1.1\r\n{"index": "none"}\n')
                sent = True
        except OSError:
            time.sleep(0.01)
    thread.join()
    assert told == ["", ""]


def test_a_workdir_is_held_by_one_job_or_shared_by_those_of_one_process(tmp_path):
    def refused(alone, words):
        with pytest.raises(UserError, match=words), processes.holding(tmp_path, alone):
            raise AssertionError("both hold it")

    with processes.holding(tmp_path, alone=False), processes.holding(tmp_path, alone=False):
        refused(True, "another job works here")
    with processes.holding(tmp_path, alone=True):
        for alone in (True, False):
            refused(alone, rf"the last to have it for itself is or was pid {os.getpid()} on")
    with processes.holding(tmp_path, alone=True):
        assert (tmp_path / ".job.json").is_file()


def test_one_process_agrees_with_itself():
    processes.start({"coordinator": ""})
    processes.barrier("alone", 1)
    processes.agree("config", {"a": 1})
    assert processes.gather({"a": (1, 2)}) == [{"a": [1, 2]}]
    assert (processes.index(), processes.count(), processes.is_first()) == (0, 1, True)
