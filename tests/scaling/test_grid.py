"""The cells of a study: their names, their order, and that nobody does one twice."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tumorjax.errors import UserError
from tumorjax.scaling import grid

SETTINGS = {"n_real": (60, 120), "arms": ("real", "real+synthetic"), "seeds": (0, 1)}


def test_cells_are_named_as_users_know_them_and_come_seed_by_seed():
    names = [cell.id for cell in grid.cells(SETTINGS)]
    assert names[:3] == ["real-n0060-s0", "real+synthetic-n0060-s0", "real-n0120-s0"]
    assert len(set(names)) == len(names) == 8
    assert [name[-1] for name in names] == ["0"] * 4 + ["1"] * 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_real", ("abc",)),
        ("n_real", "abc"),
        ("n_real", (3.5,)),
        ("n_real", (4, 4)),
        ("n_real", (0, 4)),
        ("n_real", (True,)),
        ("seeds", (0, 0)),
        ("seeds", (-1,)),
    ],
)
def test_a_grid_that_is_no_grid_is_told(key, value):
    with pytest.raises(UserError, match=f"grid.{key}"):
        grid.cells(SETTINGS | {key: value})


def _work(folder: Path, places: int) -> None:
    def work(cell: grid.Cell, place: int) -> None:
        time.sleep(0.05)
        with open(folder / "log.txt", "a") as log:
            log.write(f"{cell.id}\n")
        (folder / f"{cell.id}.done").touch()

    grid.share(
        grid.cells(SETTINGS),
        folder,
        lambda cell: (folder / f"{cell.id}.done").exists(),
        work,
        list(range(places)),
        poll_seconds=0.05,
    )


def test_processes_and_threads_do_every_cell_once(tmp_path):
    code = (
        "import pathlib, runpy, sys;"
        "runpy.run_path(sys.argv[1])['_work'](pathlib.Path(sys.argv[2]), 2)"
    )
    command = [sys.executable, "-c", code, __file__, str(tmp_path)]
    workers = [subprocess.Popen(command) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    done = (tmp_path / "log.txt").read_text().split()
    assert sorted(done) == sorted(cell.id for cell in grid.cells(SETTINGS))


def test_a_cell_that_fails_is_returned_and_the_others_go_on(tmp_path):
    cells = grid.cells(SETTINGS)
    done: list[grid.Cell] = []

    def work(cell: grid.Cell, place: int) -> None:
        if cell == cells[2]:
            raise ValueError("loss is nan")
        done.append(cell)

    failed = grid.share(cells, tmp_path, lambda cell: cell in done, work, [0])
    assert list(failed) == [cells[2]]
    assert "nan" in str(failed[cells[2]])
    assert len(done) == 7


def test_a_claim_is_exclusive_and_ends_with_its_holder(tmp_path):
    path = tmp_path / "cell.lock"
    with grid.claimed(path) as first:
        found = []
        thread = threading.Thread(target=lambda: found.append(_free(path)))
        thread.start()
        thread.join()
        assert first
        assert found == [False]
    assert _free(path)


def _free(path: Path) -> bool:
    with grid.claimed(path) as free:
        return free


@pytest.mark.parametrize("places", [1, 3])
def test_all_places_together_do_all_cells(tmp_path, places):
    _work(tmp_path, places)
    assert len((tmp_path / "log.txt").read_text().split()) == 8
