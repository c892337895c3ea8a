"""Files are written whole or not at all, and names from outside cannot lead elsewhere."""

import math
import os
import pickle
import stat

import numpy as np
import pytest

from tumorjax import files
from tumorjax.errors import CaseError, UserError


@pytest.mark.parametrize("case", ["BDMAP_00000001", "liver_0", "a", "0", "case-1.b+c", "x" * 128])
def test_ordinary_case_ids_pass_unchanged(case):
    assert files.check_case_id(case) == case


@pytest.mark.parametrize(
    "case",
    ["", "../x", "a/b", "a\\b", ".x", "..", "a..b", "x" * 129, "a b", "a\n", "ä", "-rf", None, 7],
)
def test_unsafe_case_ids_are_refused(case):
    with pytest.raises(UserError, match="Rename the case"):
        files.check_case_id(case)


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "table.csv"
    files.write_text_atomic(path, "first")
    assert path.read_text() == "first"

    def no_space(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        files.write_text_atomic(path, "second, longer")
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["table.csv"]


def test_results_have_the_permissions_of_ordinary_files(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_bytes_atomic(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_json_has_no_nan(tmp_path):
    files.write_json_atomic(tmp_path / "a.json", {"a": [1, 2.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1,\n  2.5,\n  null\n ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json_atomic(tmp_path / "b.json", {"a": math.nan})
    assert not (tmp_path / "b.json").exists()


def test_csv_fields_are_short_and_the_undefined_is_empty(tmp_path):
    row = {
        "a": 1 / 3, "b": float("nan"), "c": None, "d": np.float32(2), "e": True, "f": 7, "g": "x,y"
    }  # fmt: skip
    files.write_csv_atomic(tmp_path / "a.csv", [row, {"a": 0.0}], list(row))
    text = (tmp_path / "a.csv").read_text()
    assert text == 'a,b,c,d,e,f,g\n0.333333,,,2,1,7,"x,y"\n0,,,,,,\n'
    assert files.read_csv(tmp_path / "a.csv")[0] == {
        "a": "0.333333", "b": "", "c": "", "d": "2", "e": "1", "f": "7", "g": "x,y"
    }  # fmt: skip


def test_case_errors_cross_processes_whole():
    error = pickle.loads(pickle.dumps(CaseError("case_1", "4D", "Give one phase")))
    assert (error.case, error.found, error.action) == ("case_1", "4D", "Give one phase")
    assert str(error) == "case_1: 4D. Give one phase"
