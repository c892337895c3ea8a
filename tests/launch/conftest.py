"""Stand-ins for the programs that launch files call, which write down how they were called."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]

# Dask's scheduler writes where it listens and stays; a worker stays; a job ends with $CODE.
PYTHON = """#!{python}
import json, os, sys, time
arguments = sys.argv[1:]
if arguments[0] == "-c":
    os.execv("{python}", ["{python}", *arguments])
with open("{calls}", "a") as file:
    file.write(json.dumps(["python", *arguments]) + "\\n")
if arguments[:3] == ["-m", "dask", "scheduler"]:
    with open(arguments[arguments.index("--scheduler-file") + 1], "w") as file:
        json.dump(dict(address="tls://node1:4711"), file)
if arguments[:2] == ["-m", "dask"]:
    time.sleep(60)
sys.exit(int(os.environ.get("CODE", "0")))
"""

# Runs what follows its options, as srun does.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift; done
exec "$@"
"""

# What scripts wait for is there at once.
SLEEP = """#!/usr/bin/env bash
exec /bin/sleep 0.1
"""

OTHER = """#!{python}
import json, sys
from pathlib import Path
with open("{calls}", "a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
"""


@pytest.fixture
def stand_ins(tmp_path):
    """Runs a command with stand-ins for python, srun, scontrol and xpk on its PATH.

    `run(command, **variables)` returns the finished process, and `calls(program)` the arguments of
    each call of a program.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    record = tmp_path / "calls.jsonl"
    texts = {"python": PYTHON, "srun": SRUN, "sleep": SLEEP, "scontrol": OTHER, "xpk": OTHER}
    for name, text in texts.items():
        file = folder / name
        file.write_text(text.replace("{python}", sys.executable).replace("{calls}", str(record)))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def run(command, **variables):
        environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )

    def calls(program):
        lines = (
            [json.loads(line) for line in record.read_text().splitlines()]
            if record.exists()
            else []
        )
        return [line[1:] for line in lines if line[0] == program]

    return SimpleNamespace(run=run, calls=calls, folder=folder)
