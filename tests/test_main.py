"""The command line: exit codes, and one line for whatever a user gets wrong."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from tumorjax.main import JOBS

ROOT = Path(__file__).resolve().parents[1]
EVALUATION = str(ROOT / "configs" / "evaluation.py")
PREDICTION = str(ROOT / "configs" / "prediction.py")
SCALING = str(ROOT / "configs" / "scaling.py")

# A job that says what it was given, and ends as config.ending wants. Real jobs start JAX, which
# takes seconds; all that is tested here happens before that.
JOB = """
from tumorjax.errors import CaseError, Lost, Preempted, UserError

def run(config, workdir):
    print(config.number, workdir)
    if config.ending == "user error":
        raise UserError("the disk is full. Free some")
    if config.ending == "case error":
        raise CaseError("case_7", "4D, expected 3D", "Give one phase")
    if config.ending == "preempted":
        raise Preempted("cell 3 is saved")
    if config.ending == "lost":
        raise Lost("process 2 did not come")
    if config.ending == "crash":
        raise KeyError("lesion_volume")
    return {"done": None, "zero": 0, "set aside": 1}[config.ending]
"""
CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="small"):
    sizes = {"small": 1, "large": 2}
    if variant not in sizes:
        raise ValueError(f"variant {variant!r}. Expected one of {', '.join(sizes)}")
    return ConfigDict({"job": "fake", "number": sizes[variant], "ending": "done"})
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "fake_job.py").write_text(JOB)
    (tmp_path / "fake.py").write_text(CONFIG)
    start = (
        "import sys; sys.path[:0] = [sys.path.pop(), '.'];"
        "from tumorjax import main; main.JOBS['fake'] = 'fake_job'; main.entry()"
    )

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", start, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_exit_codes_of_jobs(command):
    for ending, code in {"done": 0, "zero": 0, "set aside": 1}.items():
        result = command("--config=fake.py", "--workdir=here", f"--config.ending={ending}")
        assert (result.returncode, result.stdout) == (code, "1 here\n"), result.stderr
    for ending, line in {
        "user error": "tumorjax: the disk is full. Free some\n",
        "case error": "tumorjax: case_7: 4D, expected 3D. Give one phase\n",
    }.items():
        result = command("--config=fake.py", f"--config.ending={ending}")
        assert (result.returncode, result.stderr) == (2, line)


def test_what_goes_on_by_the_same_command_has_codes_of_its_own(command):
    for ending, code, line in (
        ("preempted", 75, "tumorjax: cell 3 is saved. "),
        ("lost", 69, "tumorjax: process 2 did not come. "),
    ):
        result = command("--config=fake.py", f"--config.ending={ending}")
        again = "Run the same command again: it goes on from there\n"
        assert (result.returncode, result.stderr) == (code, line + again)
        assert f"{code} " in command("--help").stdout


def test_a_crash_is_told_from_cases_set_aside(command):
    result = command("--config=fake.py", "--config.ending=crash")
    assert result.returncode == 3
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("KeyError: 'lesion_volume'\n")


def test_variants_overrides_and_the_default_workdir(command):
    assert command("--config=fake.py:large").stdout == "2 runs/fake\n"
    assert command("--config", "fake.py:large", "--config.number=7").stdout == "7 runs/fake\n"


def test_help_is_no_failure(command):
    result = command("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("tumorjax --config=configs/JOB.py")
    assert "prediction" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config is missing. Give --config=configs/JOB.py, JOB one of scaling, laws"),
        (["--config=nowhere.py"], "nowhere.py: no such config file"),
        (["--config=nowhere.py:large"], "nowhere.py: no such config file"),
        (["--config=fake.py:huge"], "fake.py: variant 'huge'. Expected one of small, large"),
        ([f"--config={EVALUATION}:huge"], "has no variants"),
        ([f"--config={SCALING}:huge"], "Expected one of virtual"),
        (["--config=fake.py", "stray"], "unexpected argument 'stray'"),
        (["--config=fake.py", "--wrokdir=x"], "'wrokdir'"),
        (["--config=fake.py", "--config.colour=1"], "no config key config.colour"),
        (["--config=fake.py", "--config.numbr=1"], 'Did you mean "number"'),
        ([f"--config={PREDICTION}", "--config.inference.overlp=1"], "config.inference.overlp."),
        ([f"--config={PREDICTION}", "--config.inferense.overlap=1"], "config.inferense.overlap."),
        (["--config=fake.py", "--config.number=many"], "--config.number=many: invalid literal"),
        (["--config=fake.py", "--config.job=paint"], "config.job is 'paint'. Expected one of"),
        (["--config=typo.py"], "typo.py, line 1"),
        (["--config=empty.py"], "'get_config'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(command, tmp_path, arguments, words):
    (tmp_path / "typo.py").write_text("def get_config(:\n")
    (tmp_path / "empty.py").write_text("")
    result = command(*arguments)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert result.stderr.startswith("tumorjax: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_the_console_script_is_the_same_program():
    script = Path(sys.executable).with_name("tumorjax")
    if not script.exists():
        pytest.skip("tumorjax is not installed beside this Python")
    result = subprocess.run([script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("tumorjax: --config is missing")


def test_every_job_has_a_config_and_a_run_function():
    for job, module in JOBS.items():
        config = importlib.import_module(f"configs.{job}").get_config()
        assert config.job == job
        signature = inspect.signature(importlib.import_module(module).run)
        assert list(signature.parameters) == ["config", "workdir"]
