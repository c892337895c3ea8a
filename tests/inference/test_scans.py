"""What an input names: files, folders, lists; names of cases that are safe and of one file each."""

import numpy as np
import pytest

from tumorjax.errors import UserError
from tumorjax.inference.scans import find_scans, read_scan
from tumorjax.settings import several


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_nnunets_suffix_is_no_part_of_a_name_and_second_channels_are_refused(tmp_path):
    for name in ("a_0000.nii.gz", "b_0000.nii", "c_0001.nii.gz", "d_0000.nii", "d_0001.nii.gz"):
        touch(tmp_path / name)
    touch(tmp_path / ".e_0000.nii.gz")
    touch(tmp_path / "dataset.json")
    scans, rejected = find_scans(tmp_path)
    assert {case: source.path.name for case, source in scans.items()} == {
        "a": "a_0000.nii.gz", "b": "b_0000.nii", "c_0001": "c_0001.nii.gz"
    }  # fmt: skip
    assert [row["case"] for row in rejected] == ["d"]
    assert "2 files of one case (d_0000.nii, d_0001.nii.gz)" in rejected[0]["reason"]


def test_lists_name_files_and_folders_from_where_they_lie(tmp_path):
    touch(tmp_path / "data" / "x_0000.nii.gz")
    touch(tmp_path / "data" / "y.nii")
    touch(tmp_path / "atlas" / "BDMAP_1" / "ct.nii.gz")
    touch(tmp_path / "atlas" / "BDMAP_2" / "ct.nii.gz")
    other = touch(tmp_path / "other" / "x.nii.gz")
    lines = [
        *("# a remark", "", "../data/y.nii", "../atlas/BDMAP_1/ct.nii.gz", "../data"),
        *(str(other), "../data/missing.nii.gz"),
    ]
    listed = tmp_path / "lists" / "scans.txt"
    listed.parent.mkdir()
    listed.write_text("\n".join(lines))
    scans, rejected = find_scans(listed)
    assert set(scans) == {"BDMAP_1"}
    reasons = {row["case"]: row["reason"] for row in rejected}
    assert set(reasons) == {"x", "y", "missing"}
    assert str(other) in reasons["x"]
    assert "2 files of one case" in reasons["y"]
    assert "no such file" in reasons["missing"]

    paths = (str(tmp_path / "atlas"), str(other))
    for given in (paths, list(paths), str(paths)):
        scans, rejected = find_scans(given)
        assert list(scans) == ["BDMAP_1", "BDMAP_2", "x"]
        assert not rejected


def test_a_single_file_keeps_its_own_name(tmp_path):
    path = touch(tmp_path / "BDMAP_1" / "ct.nii.gz")
    assert list(find_scans(path)[0]) == ["ct"]
    assert list(find_scans([str(path)])[0]) == ["BDMAP_1"]


def test_nothing_to_read_is_said_with_what_was_looked_for(tmp_path):
    touch(tmp_path / "notes.md")
    for source, message in (
        (tmp_path, r"no \.nii\.gz or \.nii file in it, no CASE/ct\.nii\.gz, and no DICOM"),
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "notes.md", r"expected a \.nii\.gz or \.nii file"),
        ([], "no scan in it"),
    ):
        with pytest.raises(UserError, match=message):
            find_scans(source)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="no path in it"):
        find_scans(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not readable as text"):
        find_scans(tmp_path / "binary.txt")


@pytest.mark.parametrize("name", ["a b", "x;y", "-rf", "ü", "a" * 130])
def test_unsafe_names_are_no_cases(tmp_path, name):
    touch(tmp_path / f"{name}.nii.gz")
    scans, rejected = find_scans(tmp_path)
    assert not scans
    assert "not usable as a name" in rejected[0]["reason"]


def test_scans_are_read_from_their_source(tmp_path, save_phantom, phantom):
    save_phantom(tmp_path / "a.nii.gz")
    (source,) = find_scans(tmp_path)[0].values()
    scan = read_scan(source)
    np.testing.assert_array_equal(scan.image, phantom((40, 32, 30), (2, 2, 2))[0])
    assert scan.name == str(tmp_path / "a.nii.gz")
    assert scan.slices == ()


def test_a_setting_is_one_path_or_a_sequence_of_them():
    assert several("") == []
    assert several("runs/a") == ["runs/a"]
    assert several("('a', 'b (1)')") == ["a", "b (1)"]
    assert several("['a']") == several(["a"]) == several(("a",)) == ["a"]
    for wrong in ("(a, b)", "('a'", "(1, 2)", "('a')"):
        with pytest.raises(UserError, match="no sequence of paths"):
            several(wrong)
