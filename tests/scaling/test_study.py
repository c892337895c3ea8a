"""The whole way, small: scans become a report; a killed study ends as an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.scaling import get_config
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.scaling import study
from tumorjax.scaling.cell import RESULT_COLUMNS
from tumorjax.training.checkpoints import load_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "virtual.patients_per_site": 3,
    "virtual.ood_patients_per_site": 1,
    "cohort.id_test": 4,
    "grid.n_real": (1, 2),
    "model.widths": (4, 8),
    "model.blocks": (1, 1),
    "training.patch_size": (16, 16, 16),
    "training.steps": 6,
    "training.save_every": 2,
    "training.log_every": 2,
    "inference.overlap": 0.0,
    "laws.bootstrap": 100,
}


def small_config(**changes):
    config = get_config()
    for key, value in (SMALL | changes).items():
        section, name = key.split(".")
        config[section][name] = value
    config.mesh.cell = 1
    config.mesh.data = 1
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    import jax

    # The other tests' eight devices would each train a cell; one is what a CPU has.
    device = jax.devices()[:1]
    workdir = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: device)
        code = study.run(small_config(), workdir)
        assert code in (0, 1)
        yield workdir


def test_a_study_leaves_what_it_promises(finished):
    rows = read_csv(finished / "results.csv")
    assert tuple(rows[0]) == RESULT_COLUMNS
    cells = {row["cell"] for row in rows}
    assert cells == {f"{arm}-n000{n}-s0" for arm in ("real", "real+synthetic") for n in (1, 2)}
    assert {row["split"] for row in rows} == {"id", "ood"}
    assert {row["class"] for row in rows} == {"kidney_lesion", "tumor"}
    assert {int(r["n_synthetic"]) for r in rows if r["arm"] == "real+synthetic"} == {3, 6}
    for name in ("laws.json", "timing.json", "report/index.html", "rejected.csv"):
        assert (finished / name).is_file(), name
    for cell in cells:
        folder = finished / "cells" / cell
        curve = read_csv(folder / "metrics.csv")
        assert [row["step"] for row in curve] == ["2", "4", "6"]
        assert len(read_csv(folder / "cases.csv")) > 4


def test_no_patient_is_trained_and_tested_on(finished):
    cells = finished / "cells"
    tested = {row["patient"] for row in read_csv(cells / "real-n0002-s0" / "cases.csv")}
    synthetic = finished / "synthetic" / "cases"
    sources = {json.loads(p.read_text())["patient"] for p in synthetic.glob("*/case.json")}
    assert sources
    assert not tested & sources


def test_a_cell_is_a_checkpoint(finished):
    apply, config = load_model(finished / "cells" / "real-n0002-s0")
    import numpy as np

    x = np.random.default_rng(0).random((1, 16, 16, 16, 1), np.float32)
    assert apply(x).shape == (1, 16, 16, 16, 3)
    assert list(config.task.classes) == ["kidney", "kidney_lesion"]


def test_a_finished_study_says_so_and_does_nothing(finished, capsys):
    before = (finished / "results.csv").stat().st_mtime_ns
    assert study.run(small_config(), finished) in (0, 1)
    assert "already finished" in capsys.readouterr().out
    assert (finished / "results.csv").stat().st_mtime_ns == before


def test_a_workdir_of_another_study_is_refused(finished):
    with pytest.raises(UserError, match=r"training\.steps was 6 and is 8"):
        study.run(small_config(**{"training.steps": 8}), finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.patch_size": (16, 16, 15)}, r"\(16, 16, 15\).*each axis must divide by"),
        ({"training.freeze": ("nothing",)}, "nothing"),
        ({"model.name": "vnet"}, "vnet"),
        ({"laws.bootstrap": 50}, "bootstrap is 50"),
        (
            {"model.name": "suprem", "model.widths": None, "model.blocks": None}
            | {"training.deep_supervision": True},
            "deep.supervision",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_anything_is_made(
    tmp_path, changes, message
):
    config = small_config(**changes)
    with pytest.raises(UserError, match=message):
        study.run(config, tmp_path)
    assert not (tmp_path / "scans").exists()


def test_tumours_can_be_made_while_it_trains(finished, tmp_path):
    changes = {"data.store": str(finished / "store"), "synthesis.online": True}
    changes |= {"grid.n_real": (1,), "grid.arms": ("real+synthetic",)}
    assert study.run(small_config(**changes), tmp_path) in (0, 1)
    assert not (tmp_path / "synthetic").exists()
    rows = read_csv(tmp_path / "results.csv")
    assert {int(row["n_synthetic"]) for row in rows} == {3}
    # The same scans, another training: tumours are there from the first step.
    curves = [
        read_csv(folder / "cells" / "real+synthetic-n0001-s0" / "metrics.csv")[0]["loss"]
        for folder in (finished, tmp_path)
    ]
    assert curves[0] != curves[1]


def test_cells_can_train_their_own_synthesizer(finished, tmp_path):
    changes = {"data.store": str(finished / "store"), "grid.n_real": (1,)}
    changes |= {"synthesis.synthesizer": "diffusion", "synthesis.trained_on": "cell"}
    config = small_config(**changes | {"grid.arms": ("real+synthetic",)})
    networks = config.synthesis.networks
    networks.autoencoder.model.widths = (8, 8)
    networks.autoencoder.evaluation.batches = 1
    networks.diffusion.model.widths = (8, 16)
    networks.diffusion.training.crop = (16, 16, 16)
    networks.autoencoder.training.patch_size = (16, 16, 16)
    for network in (networks.autoencoder, networks.diffusion):
        network.training.update({"batch_size": 2, "steps": 2, "log_every": 1})
    assert study.run(config, tmp_path) in (0, 1)
    cell = tmp_path / "cells" / "real+synthetic-n0001-s0"
    trained_on = json.loads((cell / "synthesizer" / "trained_on.json").read_text())
    assert len(trained_on["patients"]) == 1
    tested = {row["patient"] for row in read_csv(cell / "cases.csv")}
    assert not tested & set(trained_on["patients"])
    made = list((cell / "synthetic" / "cases").glob("*/case.json"))
    assert made
    assert json.loads(made[0].read_text())["synthetic"]["synthesizer"] == "diffusion"
    assert {int(row["n_synthetic"]) for row in read_csv(tmp_path / "results.csv")} == {len(made)}
    assert "its own annotated scans" in (tmp_path / "report" / "index.html").read_text()


def test_the_report_says_who_drew_the_tumours(finished):
    assert json.loads((finished / "synthesis.json").read_text())["synthesizer"] == "rules"
    assert "drawn by hand-written rules" in (finished / "report" / "index.html").read_text()


def test_a_grid_larger_than_the_cohort_is_refused_before_training(finished, tmp_path):
    config = small_config(**{"grid.n_real": (1, 500), "data.store": str(finished / "store")})
    with pytest.raises(UserError, match="500"):
        study.run(config, tmp_path)
    assert not (tmp_path / "cells").exists()


def test_a_store_on_another_grid_is_refused(finished, tmp_path):
    config = small_config(**{"data.store": str(finished / "store")})
    config.preparation.spacing = (3.0, 3.0, 3.0)
    with pytest.raises(UserError, match="spacing"):
        study.run(config, tmp_path)


@pytest.mark.slow
def test_cells_side_by_side_end_as_cells_in_turn(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    for devices in (1, 2):
        command = [sys.executable, "-m", "tumorjax.main", "--config=configs/scaling.py"]
        command += [f"--workdir={tmp_path / str(devices)}", f"--config.cpu_devices={devices}"]
        command += [f"--config.{key}={value}" for key, value in SMALL.items()]
        assert subprocess.run(command, cwd=ROOT, env=environment).returncode in (0, 1)
    first, second = (tmp_path / name / "results.csv" for name in ("1", "2"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_a_study_killed_three_times_ends_as_an_undisturbed_one(tmp_path):
    arguments = [f"--config.{key}={value}" for key, value in SMALL.items()]
    # Long enough that a kill falls into training, testing and preparation.
    arguments += ["--config.training.steps=60", "--config.training.save_every=10"]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}

    def start(workdir):
        command = [sys.executable, "-m", "tumorjax.main", "--config=configs/scaling.py"]
        command += [f"--workdir={workdir}", *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)

    undisturbed = start(tmp_path / "undisturbed")
    begin = time.monotonic()
    assert undisturbed.wait() in (0, 1)
    length = time.monotonic() - begin
    chance = random.Random(0)
    for _ in range(3):
        process = start(tmp_path / "killed")
        time.sleep(chance.uniform(0.2, 0.6) * length)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() in (0, 1)
    first, second = (tmp_path / name / "results.csv" for name in ("undisturbed", "killed"))
    assert first.read_bytes() == second.read_bytes()
