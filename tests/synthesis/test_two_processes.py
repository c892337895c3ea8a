"""Both trainings as jobs of two processes: the curve of one process with as many devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tumorjax.files import read_csv
from tumorjax.volumes import write_case

ROOT = Path(__file__).resolve().parents[2]
SPACING = (4.0, 4.0, 4.0)
TRAINING = [
    "--config.training.batch_size=4",
    "--config.training.steps=6",
    "--config.training.save_every=3",
    "--config.training.log_every=1",
    "--config.data.held_out=0.25",
]
AUTOENCODER = [
    "--config.model.widths=(4,8)",
    "--config.model.decoder_blocks=(1,)",
    "--config.model.latent_channels=3",
    "--config.training.patch_size=(16,16,16)",
    "--config.evaluation.batches=2",
]
DIFFUSION = [
    "--config.model.widths=(8,16)",
    "--config.training.crop=(16,16,16)",
    "--config.quality.tumors=2",
]


def _write_scans(url, rng):
    settings = {"spacing": list(SPACING), "window": [-175.0, 250.0]}
    for case in "abcdefgh":
        image = (0.5 + 0.1 * rng.standard_normal((28, 24, 24))).clip(0, 1).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        label[3:25, 3:21, 3:21] = 5  # liver
        label[6:10, 8:12, 8:11] = 27  # liver_lesion
        image[label == 27] *= 0.4
        write_case(url, case, image, label, SPACING, {"patient": case}, settings)


def _run(job: str, workdir: Path, store: Path, processes: int, *settings: str) -> None:
    """Runs a job of one or two processes, with two devices in all."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tumorjax.main", f"--config=configs/{job}.py"]
    command += [f"--workdir={workdir}", f"--config.data.store={store}", *TRAINING, *settings]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}",
        "PYTHONPATH": str(ROOT),
    }
    started = []
    for index in range(processes):
        more = [
            f"--config.processes.coordinator=127.0.0.1:{port}",
            f"--config.processes.num_processes={processes}",
            f"--config.processes.process_id={index}",
        ]
        started.append(
            subprocess.Popen(
                command + more * (processes > 1),
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    ends = [(process.communicate(timeout=900)[0], process.returncode) for process in started]
    assert [code for _, code in ends] == [0] * processes, "\n".join(text for text, _ in ends)


@pytest.mark.slow
def test_two_processes_train_both_networks_as_one_does(tmp_path, rng):
    store = tmp_path / "store"
    _write_scans(store, rng)
    for processes in (1, 2):
        work = tmp_path / str(processes)
        _run("autoencoder", work / "autoencoder", store, processes, *AUTOENCODER)
    # One autoencoder for both, so that what differs is the second job.
    first = f"--config.autoencoder={tmp_path / '1' / 'autoencoder'}"
    for processes in (1, 2):
        work = tmp_path / str(processes)
        _run("diffusion", work / "diffusion", store, processes, first, *DIFFUSION)
    for job in ("autoencoder", "diffusion"):
        one, two = (tmp_path / str(processes) / job for processes in (1, 2))
        curves = [read_csv(folder / "metrics.csv") for folder in (one, two)]
        assert [row["step"] for row in curves[1]] == [str(step) for step in range(1, 7)]
        for a, b in zip(*curves, strict=True):
            assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-3), job
        # Each patient is seen by one of the processes, and recorded by the first.
        records = [json.loads((folder / "trained_on.json").read_text()) for folder in (one, two)]
        assert records[0] == records[1]
        qualities = [json.loads((folder / "quality.json").read_text()) for folder in (one, two)]
        assert qualities[0].keys() == qualities[1].keys()
