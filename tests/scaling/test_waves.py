"""A study whose cells are trained in waves leaves what it leaves when they are trained in turn."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.scaling.test_study import SMALL, small_config
from tumorjax import parallel
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.heartbeat import LOST
from tumorjax.scaling import grid, study, waves
from tumorjax.training.checkpoints import load_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory):
    device = jax.devices()[:1]
    workdir = tmp_path_factory.mktemp("turn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: device)
        assert study.run(_config(), workdir) in (0, 1)
    return workdir


# Not AdamW: a bias before a norm has no gradient but rounding, which AdamW makes steps of.
_CHANGES = {"training.optimizer": "sgd", "grid.n_real": (1, 2, 3), "grid.arms": ("real",)}


def _config(**changes):
    return small_config(**_CHANGES | changes)


def _same(first, second):
    one, other = (read_csv(folder / "results.csv") for folder in (first, second))
    assert [row["cell"] for row in one] == [row["cell"] for row in other]
    for a, b in zip(one, other, strict=True):
        for name in ("n_patients", "n_tumors", "n_synthetic"):
            assert a[name] == b[name]
        for name in ("dsc", "nsd"):
            assert (a[name] == "") == (b[name] == "")
            if a[name]:
                assert float(a[name]) == pytest.approx(float(b[name]), abs=0.5)
    for cell in sorted({row["cell"] for row in one}):
        networks = [load_model(folder / "cells" / cell) for folder in (first, second)]
        values, others = (apply.args[0] for apply, _ in networks)
        for name, value in values.items():
            np.testing.assert_allclose(others[name], value, atol=2e-4, err_msg=f"{cell} {name}")
        assert networks[0][1].seed == networks[1][1].seed
        curves = [read_csv(f / "cells" / cell / "metrics.csv") for f in (first, second)]
        assert [row["step"] for row in curves[1]] == ["2", "4", "6"]
        for a, b in zip(*curves, strict=True):
            assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-3)


def test_waves_leave_what_cells_in_turn_leave(in_turn, tmp_path):
    # Three cells on two positions of two devices each: a whole wave, and one with an idle position.
    config = _config(**{"data.store": str(in_turn / "store"), "grid.side_by_side": "stacked"})
    config.mesh.cell, config.mesh.data = 2, 2
    devices = jax.devices()[:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        assert study.run(config, tmp_path) in (0, 1)
    _same(in_turn, tmp_path)
    # The way is no setting of the study: it may go on in another.
    again = _config(**{"data.store": str(in_turn / "store")})
    assert study.run(again, tmp_path) in (0, 1)


def _start(workdir, store):
    """Starts a study as one job of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = SMALL | _CHANGES | {"data.store": str(store)}
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    flags += ["--config.cpu_devices=1", f"--config.processes.coordinator=127.0.0.1:{port}"]
    command = [sys.executable, "-m", "tumorjax.main", "--config=configs/scaling.py"]
    command += [f"--workdir={workdir}", *flags, "--config.processes.num_processes=2"]
    return [
        subprocess.Popen(
            [*command, f"--config.processes.process_id={index}"],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def test_two_processes_of_one_job_leave_what_one_leaves(in_turn, tmp_path):
    running = _start(tmp_path, in_turn / "store")
    said = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    _same(in_turn, tmp_path)
    # Two cells side by side, then the third; each process reported its own.
    assert "real-n0001-s0: " in said[0]
    assert "real-n0002-s0: " in said[1]
    assert (tmp_path / "report" / "index.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_both_go_on(in_turn, tmp_path, killed):
    running = _start(tmp_path, in_turn / "store")
    first = tmp_path / "cells" / "real-n0001-s0" / "checkpoints" / "2"
    deadline = time.monotonic() + 300
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.exists()
    running[killed].send_signal(signal.SIGKILL)
    since = time.monotonic()
    said = running[1 - killed].communicate(timeout=120)[0]
    assert time.monotonic() - since < 60
    assert running[1 - killed].returncode == LOST, said
    assert f"process {killed}" in said
    running[killed].communicate()
    assert not (tmp_path / "done.json").exists()
    again = _start(tmp_path, in_turn / "store")
    said = [process.communicate(timeout=600)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], "\n".join(said)
    _same(in_turn, tmp_path)


def test_a_cell_that_fails_is_set_aside_and_its_wave_goes_on(in_turn, tmp_path, monkeypatch):
    config = _config(**{"data.store": str(in_turn / "store"), "grid.side_by_side": "stacked"})
    config.mesh.cell, config.mesh.data = 2, 1
    monkeypatch.setattr(waves.cells_module, "segment_and_measure", _failing(1))
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    assert study.run(config, tmp_path) == 1
    rejected = [row for row in read_csv(tmp_path / "rejected.csv") if row["stage"] == "cell"]
    assert [row["case"] for row in rejected] == ["real-n0001-s0"]
    assert rejected[0]["reason"] == "OSError: disk on fire"
    assert {row["n_real"] for row in read_csv(tmp_path / "results.csv")} == {"2", "3"}
    assert not (tmp_path / "done.json").exists()


def _failing(n_real):
    real = waves.cells_module.segment_and_measure

    def work(apply, config, scans, folder, *rest):
        if len(scans.real) == n_real:
            raise OSError("disk on fire")
        return real(apply, config, scans, folder, *rest)

    return work


@pytest.mark.parametrize(
    ("cell", "changes", "message"),
    [
        (4, {}, "mesh.cell is 4 .* the grid has 3 cells"),
        (2, {"grid.side_by_side": "rows"}, "side_by_side is 'rows'"),
    ],
)
def test_what_cannot_be_stacked_is_said(in_turn, tmp_path, monkeypatch, cell, changes, message):
    config = _config(
        **{"data.store": str(in_turn / "store"), "grid.side_by_side": "stacked"} | changes
    )
    config.mesh.cell, config.mesh.data = cell, 1
    devices = jax.devices()[:cell]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    with pytest.raises(UserError, match=message):
        study.run(config, tmp_path)


def test_waves_are_of_one_program(tmp_path):
    config = _config(**{"synthesis.online": True, "grid.arms": ("real", "real+synthetic")})
    mesh = parallel.make_mesh({"cell": 2}, jax.devices()[:2])
    cells = grid.cells(config.grid)
    folders = {cell: tmp_path / "cells" / cell.id for cell in cells}
    with waves.ExitStack() as claims:
        wave, others = waves._next_wave(cells, config, mesh, folders, (), claims)
        assert [cell.id for cell in wave] == ["real-n0001-s0", "real-n0002-s0"]
        assert not others
        # They are held until the wave is done.
        with waves.ExitStack() as more:
            rest, others = waves._next_wave(cells, config, mesh, folders, (), more)
            assert [cell.arm for cell in rest] == ["real+synthetic"] * 2
            assert others
    (tmp_path / "cells" / "real-n0001-s0").mkdir()
    (tmp_path / "cells" / "real-n0001-s0" / "results.json").write_text(json.dumps([]))
    with waves.ExitStack() as claims:
        wave, _ = waves._next_wave(cells, config, mesh, folders, (), claims)
    # The first without results decides: of the other arm now.
    assert [cell.id for cell in wave] == ["real+synthetic-n0001-s0", "real+synthetic-n0002-s0"]
