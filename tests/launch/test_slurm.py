"""The batch scripts in a real Slurm of two small machines on this one (tests/launch/slurm.sh)."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tumorjax.files import read_csv

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
MISSING = [
    name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),  # minutes on a quiet machine
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"{', '.join(MISSING)} missing: apt-get install slurmctld slurmd slurm-client munge",
    ),
]

# Two trainings of a tiny network on a small cohort; long enough to be stopped in the middle.
SMALL = (
    "virtual.patients_per_site=3",
    "virtual.ood_patients_per_site=1",
    "cohort.id_test=4",
    "grid.n_real=(1, 2)",
    "grid.arms=('real',)",
    "model.widths=(4, 8)",
    "model.blocks=(1, 1)",
    "training.patch_size=(16, 16, 16)",
    "training.steps=300",
    "training.save_every=50",
    "training.log_every=100",
    "inference.overlap=0.0",
    "laws.bootstrap=100",
    "workers=1",
    "cpu_devices=1",
)
ARGUMENTS = [f"--config.{setting}" for setting in SMALL]
# What a machine of this Slurm has, in place of what the scripts ask for.
SIZE = ("--cpus-per-task=1", "--gres=gpu:1", "--time=30")


@pytest.fixture(scope="module")
def slurm():
    # Not pytest's folder, which others may not look into: munge wants its socket to be reachable.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    script = ROOT / "tests" / "launch" / "slurm.sh"
    subprocess.run([script, "start", folder], check=True, timeout=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("TUMORJAX_PYTHON", str(Path(sys.executable).parent))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("XLA_FLAGS", "")
        try:
            yield folder
        finally:
            subprocess.run([script, "stop", folder], check=True, timeout=120)
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of the same study, in one process and without Slurm."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "tumorjax.main", "--config=configs/scaling.py"]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [*command, f"--workdir={workdir}", *ARGUMENTS], cwd=ROOT, env=environment, timeout=1500
    )
    assert process.returncode in (0, 1)
    return workdir


def submit(script, workdir, config, *arguments, options=()):
    """Submits a batch script and returns its job's number."""
    command = ["sbatch", "--parsable", *SIZE, f"--output={workdir}-%t-%a.log", *options]
    printed = subprocess.run(
        [*command, f"launch/slurm/{script}", *arguments],
        cwd=ROOT,
        env=os.environ | {"TUMORJAX_WORKDIR": str(workdir), "TUMORJAX_CONFIG": config},
        check=True,
        capture_output=True,
        text=True,
    )
    return printed.stdout.strip().split(";")[0]


def logs(workdir):
    return "\n".join(
        f"{f.name}\n{f.read_text()}" for f in workdir.parent.glob(f"{workdir.name}*.log")
    )


def field(job, name):
    """A field of a job's record, such as JobState or Restarts."""
    command = ["scontrol", "--oneliner", "show", "job", job]
    record = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(rf"\b{name}=(\S+)", record)[1]


def wait(what, workdir, seconds=1500):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, logs(workdir)
        time.sleep(0.5)


def wait_for_checkpoint(workdir):
    """Until a training that is under way has saved."""

    def saved():
        return [
            cell
            for cell in (workdir / "cells").glob("*")
            if not (cell / "results.json").exists() and any((cell / "checkpoints").glob("[0-9]*"))
        ]

    wait(saved, workdir)


def wait_for_end(jobs, workdir):
    def over():
        return all(field(job, "JobState") in ("COMPLETED", "FAILED", "TIMEOUT") for job in jobs)

    wait(over, workdir)
    assert [field(job, "JobState") for job in jobs] == ["COMPLETED"] * len(jobs), logs(workdir)


def test_an_array_that_is_requeued_ends_as_an_undisturbed_study(slurm, undisturbed, tmp_path):
    workdir = tmp_path / "array"
    options = ("--array=0-1", "--mem=2G")
    job = submit("study_array.sbatch", workdir, "configs/scaling.py", *ARGUMENTS, options=options)
    tasks = [f"{job}_{index}" for index in range(2)]
    wait_for_checkpoint(workdir)
    # As when another user's job takes the machine, by Slurm ...
    subprocess.run(["scontrol", "requeue", tasks[1]], check=True)
    # ... and as when the time is almost up, which the job itself answers.
    subprocess.run(["scancel", "--signal=USR1", tasks[0]], check=True)
    wait_for_end(tasks, workdir)
    assert [field(task, "Restarts") for task in tasks] == ["1", "1"], logs(workdir)
    assert "exit code 75: back into the queue" in logs(workdir)
    results = [folder / "results.csv" for folder in (workdir, undisturbed)]
    assert results[0].read_bytes() == results[1].read_bytes()


def test_one_program_over_two_machines_goes_on_after_a_requeue(slurm, undisturbed, tmp_path):
    """Two processes with a device each train the cells side by side, and find what one finds."""
    workdir = tmp_path / "program"
    options = ("--nodes=2", "--mem=3G")
    job = submit("study.sbatch", workdir, "configs/scaling.py", *ARGUMENTS, options=options)
    wait_for_checkpoint(workdir)
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for_end([job], workdir)
    assert field(job, "Restarts") == "1", logs(workdir)
    tables = [read_csv(folder / "results.csv") for folder in (workdir, undisturbed)]
    assert [row["cell"] for row in tables[0]] == [row["cell"] for row in tables[1]]
    for rows in zip(*tables, strict=True):
        for name, expected in rows[1].items():
            try:
                number = float(expected)
            except ValueError:
                assert rows[0][name] == expected, name
            else:
                assert float(rows[0][name]) == pytest.approx(number, rel=1e-3, abs=0.1), name
    for cell in {row["cell"] for row in tables[0]}:
        curves = [
            read_csv(folder / "cells" / cell / "metrics.csv") for folder in (workdir, undisturbed)
        ]
        assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
        losses = [[float(row["loss"]) for row in curve] for curve in curves]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_preparation_with_dask_makes_the_store_of_one_process(slurm, undisturbed, tmp_path):
    from tumorjax.volumes import open_store

    workdir = tmp_path / "preparation"
    settings = (
        "--config.virtual.patients_per_site=2",
        "--config.virtual.ood_patients_per_site=1",
        "--config.spacing=(4.0, 4.0, 4.0)",
        "--config.order=1",
    )
    job = submit(
        "preparation.sbatch",
        workdir,
        "configs/preparation.py:virtual",
        *settings,
        options=("--nodes=2", "--ntasks-per-node=1", "--mem-per-cpu=2G"),
    )
    wait_for_end([job], workdir)
    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "tumorjax.main", "--config=configs/preparation.py:virtual"]
    command += [f"--workdir={alone}", "--config.workers=1", *settings]
    process = subprocess.run(command, cwd=ROOT, timeout=900)
    assert process.returncode == 0
    stores = [open_store(str(folder / "store")) for folder in (workdir, alone)]
    assert stores[0].cases == stores[1].cases
    assert len(stores[0].cases) > 10
    for case in stores[0].cases:
        for kind in ("image", "label"):
            first, second = (store.read(case, kind) for store in stores)
            assert (first == second).all(), (case, kind)
    log = (workdir / "dask.log").read_text()
    workers = set(re.findall(r"Registered to: +(\S+)", log))
    assert len(re.findall(r"Register worker", log)) >= 2, log
    assert all(address.startswith("tls://") for address in workers)
    assert not list(workdir.glob(".dask-*")), "the job's key is left behind"
    assert read_csv(workdir / "tumors.csv")
