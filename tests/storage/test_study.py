"""A whole study in a bucket: the same as on a disk, through a server's bad days and a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scaling.test_study import SMALL
from tumorjax.buckets import BucketPath
from tumorjax.files import read_csv

ROOT = Path(__file__).resolve().parents[2]


def command(workdir, **changes):
    settings = SMALL | changes
    return [
        *(sys.executable, "-m", "tumorjax.main", "--config=configs/scaling.py"),
        *(f"--workdir={workdir}", "--config.mesh.cell=1", "--config.mesh.data=1"),
        "--config.cpu_devices=1",
        *(f"--config.{key}={value!r}" for key, value in settings.items()),
    ]


def environment(scratch):
    # One device, as a CPU has, not the eight of the tests.
    ours = {"TUMORJAX_SCRATCH": str(scratch), "XLA_FLAGS": ""}
    return os.environ | ours


def run(workdir, scratch):
    kept = {"cwd": ROOT, "env": environment(scratch), "capture_output": True, "text": True}
    done = subprocess.run(command(workdir), timeout=800, **kept)
    assert done.returncode in (0, 1), done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)  # minutes on a quiet machine
def test_a_study_in_a_bucket_is_the_one_on_a_disk(proxy, bucket, tmp_path):
    here, there = tmp_path / "study", BucketPath(bucket) / "study"
    run(here, tmp_path)
    proxy.rate = 0.05
    # Killed in a training, and continued with nothing of it on this machine.
    process = subprocess.Popen(command(there), cwd=ROOT, env=environment(tmp_path / "first"))
    cell = there / "cells" / "real-n0001-s0"
    deadline = time.monotonic() + 600
    while not list((cell / "checkpoints").glob("*/complete.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    run(there, tmp_path / "second")
    assert sum(proxy.count.values()) > 20
    proxy.rate = 0.0
    assert "already finished" in run(there, tmp_path / "third")
    assert read_csv(there / "results.csv") == read_csv(here / "results.csv")
    for name in ("laws.json", "done.json", "synthesis.json"):
        assert json.loads((there / name).read_text()) == json.loads((here / name).read_text()), name
    for cells in here.glob("cells/[!.]*"):
        same = (there / "cells" / cells.name, cells)
        assert read_csv(same[0] / "cases.csv") == read_csv(same[1] / "cases.csv")
        curves = [read_csv(folder / "metrics.csv") for folder in same]
        for rows in zip(*curves, strict=True):
            assert rows[0] | {"seconds": ""} == rows[1] | {"seconds": ""}
    # All of the report came along, and nothing half done stayed.
    report = {path.relative_to(here).as_posix() for path in (here / "report").rglob("*.*")}
    assert report == {str(path.relative_to(there)) for path in (there / "report").rglob("*")}
    left = {path.name for path in there.rglob("*.part")}
    assert not left
