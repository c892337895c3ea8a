"""The state of a study, seen from outside."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.status import get_config
from tumorjax.errors import UserError
from tumorjax.files import write_csv_atomic, write_json_atomic
from tumorjax.scaling import status
from tumorjax.training.monitor import Monitor

ROOT = Path(__file__).resolve().parents[2]
STEPS = 100


def train(folder, steps, seconds=0.5, error=None, end=True, position=0):
    """Records a training as the loop does."""
    write_json_atomic(folder / "config.json", {"training": {"steps": STEPS}})
    monitor = Monitor({}, folder)
    monitor.start(position, STEPS)
    for number in range(position + 1, steps + 1):
        monitor.step(number, 0.1 * seconds, 0.9 * seconds)
    monitor.save(steps, 0.01)
    rows = [{"step": steps, "seconds": 1.0, "loss": 1 / steps, "learning_rate": 0.1}]
    write_csv_atomic(folder / "metrics.csv", rows, list(rows[0]))
    if end:
        monitor.end(error)


@pytest.fixture
def study(tmp_path):
    """Six cells: one done, one that trains, one killed, one failed, one tested, one not begun."""
    grid = {"arms": ["real"], "n_real": [1, 2, 4, 8, 16, 32], "seeds": [0]}
    write_json_atomic(tmp_path / "config.json", {"grid": grid, "training": {"steps": STEPS}})
    cells = tmp_path / "cells"
    train(cells / "real-n0001-s0", STEPS)
    write_json_atomic(cells / "real-n0001-s0" / "results.json", [])
    train(cells / "real-n0002-s0", 40, end=False)
    train(cells / "real-n0004-s0", 60, end=False)
    train(cells / "real-n0004-s0", 50, end=False, position=30)
    long_ago(cells / "real-n0004-s0", 3600)
    train(cells / "real-n0008-s0", 20, error=ValueError("the loss is nan"))
    train(cells / "real-n0016-s0", STEPS)
    write_json_atomic(cells / "real-n0016-s0" / "cases" / "case0.json", [])
    rejected = [
        {"case": "real-n0008-s0", "stage": "cell", "reason": "Diverged: the loss is nan"},
        {"case": "scan7", "stage": "preparation", "reason": "4D"},
    ]
    write_csv_atomic(tmp_path / "rejected.csv", rejected, ("case", "stage", "reason"))
    return tmp_path


def long_ago(folder, seconds):
    record = json.loads((folder / "goodput.json").read_text())
    for name in ("first_start", "started", "written"):
        record[name] -= seconds
    write_json_atomic(folder / "goodput.json", record)


def test_each_cell_is_where_its_files_say(study):
    state = status.status(study)
    found = {cell["cell"]: cell for cell in state["cells"]}
    states = [cell["state"] for cell in state["cells"]]
    assert states == ["done", "running", "stopped", "failed", "running", "waiting"]
    assert {name: state[name] for name in status.STATES} == {
        "done": 1, "running": 2, "stopped": 1, "failed": 1, "waiting": 1,
    }  # fmt: skip
    assert [cell["step"] for cell in state["cells"]] == [100, 40, 50, 20, 100, 0]
    assert {cell["steps"] for cell in state["cells"]} == {STEPS}
    running = found["real-n0002-s0"]
    assert running["loss"] == pytest.approx(1 / 40)
    assert running["steps_per_second"] == pytest.approx(2.0)
    assert running["seconds_left"] == pytest.approx(60 * 0.5)
    killed = found["real-n0004-s0"]
    assert (killed["starts"], killed["repeated_steps"]) == (2, 30)
    assert found["real-n0008-s0"]["reason"] == "Diverged: the loss is nan"
    assert found["real-n0016-s0"]["testing"] == 1
    assert (state["kind"], state["set_aside"], state["starts"]) == ("study", 2, 6)
    # 60 steps of the one that runs, 50 of the one that was killed, 100 of the last; two at a time.
    assert state["seconds_left"] == pytest.approx((60 + 50 + 100) * 0.5 / 2, rel=0.01)


def test_goodput_is_of_all_cells_time(study):
    cells = study / "cells"
    wanted = 0.0
    for cell, steps in (("real-n0001-s0", 100), ("real-n0004-s0", 50), ("real-n0008-s0", 20)):
        path = cells / cell / "goodput.json"
        record = json.loads(path.read_text())
        write_json_atomic(path, record | {"first_start": record["written"] - 200})
        wanted += steps * 0.45
    for cell in ("real-n0002-s0", "real-n0016-s0"):
        (cells / cell / "goodput.json").unlink()
    state = status.status(study)
    assert state["goodput"] == pytest.approx(wanted / 600, rel=1e-3)
    found = {cell["cell"]: cell["goodput"] for cell in state["cells"]}
    assert found["real-n0001-s0"] == pytest.approx(45 / 200, rel=1e-3)
    assert found["real-n0002-s0"] is None


def test_who_holds_a_cell_runs_it_however_long_it_is_silent(study):
    import fcntl

    lock = study / "cells" / ".real-n0004-s0.lock"
    lock.touch()
    cells = {cell["cell"]: cell["state"] for cell in status.status(study)["cells"]}
    assert cells["real-n0004-s0"] == "stopped"
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cells = {cell["cell"]: cell["state"] for cell in status.status(study)["cells"]}
    assert cells["real-n0004-s0"] == "running"


def test_a_training_is_given_time_to_compile_and_to_test(study):
    now = time.time()
    folder = study / "cells" / "real-n0032-s0"
    Monitor({}, folder).start(0, STEPS)
    later = {cell["cell"]: cell["state"] for cell in status.status(study, now + 600)["cells"]}
    assert later["real-n0002-s0"] == "stopped"
    assert later["real-n0016-s0"] == later["real-n0032-s0"] == "running"
    much_later = {cell["cell"]: cell["state"] for cell in status.status(study, now + 4e3)["cells"]}
    assert set(much_later.values()) == {"done", "failed", "stopped"}


def test_nothing_is_changed_and_the_table_names_every_cell(study, capsys):
    before = {path: path.stat() for path in study.rglob("*")}
    assert status.run(get_config(), study) == 0
    after = {path: path.stat() for path in study.rglob("*")}
    for path, stat in after.items():
        assert stat.st_mtime_ns == before[path].st_mtime_ns, path
    assert set(after) == set(before)
    output = capsys.readouterr().out
    first, header, *rows = output.splitlines()
    assert "1 done, 2 running, 1 stopped, 1 failed, 1 waiting" in first
    assert header.split()[:3] == ["cell", "state", "step"]
    names = [f"real-n{n:04d}-s0" for n in (1, 2, 4, 8, 16, 32)]
    assert [row.split()[0] for row in rows[:6]] == names
    assert "running, 1 tested" in rows[4]
    assert "real-n0008-s0: Diverged: the loss is nan" in rows
    assert "2 set aside" in output


def test_the_command_prints_json_for_programs_and_starts_no_accelerator(study):
    code = (
        "import sys; from tumorjax import main\n"
        "try: main.entry()\n"
        "finally: print('jax' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--config=configs/status.py", f"--workdir={study}",
         "--config.json=True"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    state = json.loads(result.stdout)
    assert (state["running"], len(state["cells"])) == (2, 6)
    assert result.stderr.strip().endswith("False")


def test_a_training_alone_has_a_state_too(study, tmp_path):
    folder = tmp_path / "segmentation"
    train(folder, 25)
    state = status.status(folder)
    assert (state["kind"], state["stopped"]) == ("training", 1)
    train(folder, STEPS, position=25)
    write_json_atomic(folder / "done.json", {})
    state = status.status(folder)
    assert (state["done"], state["seconds_left"], state["starts"]) == (1, 0.0, 2)
    assert "finished" in status.text(state)
    # A cell's folder as well.
    assert status.status(study / "cells" / "real-n0001-s0")["done"] == 1


def test_a_study_that_has_not_begun_its_cells_waits(tmp_path):
    grid = {"arms": ["real"], "n_real": [1], "seeds": [0, 1]}
    write_json_atomic(tmp_path / "config.json", {"grid": grid, "training": {"steps": STEPS}})
    state = status.status(tmp_path)
    assert (state["waiting"], state["seconds_left"], state["goodput"]) == (2, None, None)
    assert "nothing runs" in status.text(state)


def test_a_folder_of_something_else_is_refused_and_not_made(tmp_path):
    with pytest.raises(UserError, match=r"nothing: no config\.json of a study or a training"):
        status.run(get_config(), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    for other in ({"input": "scans"}, {"grid": {"arms": ["real"], "n_real": [1], "seeds": [0]}}):
        write_json_atomic(tmp_path / "config.json", other)
        with pytest.raises(UserError, match=r"no config\.json of a study"):
            status.run(get_config(), tmp_path)
