"""Each source's files and label names are found; what is unknown or ambiguous is listed."""

import json

import numpy as np
import pytest

from data_prep.sources import (
    IGNORED,
    PAIRED,
    LabelFile,
    find,
    match_label,
    match_table,
    read_patients,
)
from tumorjax.anatomy import LABELS
from tumorjax.errors import UserError


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def reasons(found):
    return {error.case: f"{error.found}. {error.action}" for error in found.rejected}


def dataset(folder, **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *((name, name) for name in LABELS),
        ("Gallbladder", "gall_bladder"),
        ("left kidney", "kidney_left"),
        ("kidney_right", "kidney_right"),
        ("Right-Adrenal-Gland", "adrenal_gland_right"),
        ("left adrenal", "adrenal_gland_left"),
        ("kidney", "kidney"),
        ("Kidneys", "kidney"),
        ("inferior vena cava", "postcava"),
        ("small_bowel", "intestine"),
        ("oesophagus", "esophagus"),
        ("renal mass", "kidney_lesion"),
        ("Liver Tumor", "liver_lesion"),
        ("hepatic lesions", "liver_lesion"),
        ("pancreas_cancer", "pancreatic_lesion"),
        ("colorectal carcinoma", "colon_lesion"),
        ("tumor", None),
        ("cyst", None),
        ("heart", None),
    ],
)
def test_names_of_structures(name, ours):
    assert match_label(name, {}) == ours


def test_overrides_go_first_and_must_name_a_structure():
    assert match_label("Cyst", {"cyst": "kidney_lesion"}) == "kidney_lesion"
    assert match_label("spleen", {"spleen": ""}) == IGNORED
    with pytest.raises(UserError, match=r"labels.cyst is 'kidny'"):
        match_label("cyst", {"cyst": "kidny"})
    assert set(PAIRED) == {"kidney", "adrenal_gland", "femur", "lung"}


def test_a_bare_tumour_is_that_of_the_only_organ_that_has_one():
    names = match_table({1: "kidney", 2: "tumor", 3: "spleen"}, {}, "x")
    assert names == {1: "kidney", 2: "kidney_lesion", 3: "spleen"}
    with pytest.raises(UserError, match=r"unknown label names 'tumor' \(2\), 'cyst' \(4\)"):
        match_table({1: "kidney", 2: "tumor", 3: "liver", 4: "cyst"}, {}, "dataset.json")


# ------------------------------------------------------------------ abdomen_atlas


def test_both_layouts_of_abdomen_atlas(tmp_path):
    nested, split = tmp_path / "nested", tmp_path / "split"
    for case in ("BDMAP_00000001", "BDMAP_00000002"):
        touch(nested / case / "ct.nii.gz")
        touch(split / "ct" / case / "ct.nii.gz")
        for folder in (nested / case, split / "label" / case):
            for name in ("liver", "liver_lesion"):
                touch(folder / "segmentations" / f"{name}.nii.gz")
            touch(folder / "segmentations" / ".DS_Store")
            touch(folder / "combined_labels.nii.gz")
    touch(nested / ".virtual.json")
    (nested / "patients.csv").write_text("case,patient,site\nBDMAP_00000002,p1,here\n")
    for folder in (nested, split):
        found = find("abdomen_atlas", folder)
        assert found.rejected == []
        assert [case.case for case in found.cases] == ["BDMAP_00000001", "BDMAP_00000002"]
        names = {label.path.name: label.names[1] for label in found.cases[0].labels}
        assert names == {"liver.nii.gz": "liver", "liver_lesion.nii.gz": "liver_lesion"}
    first, second = find("abdomen_atlas", nested).cases
    assert (first.patient, first.site) == ("BDMAP_00000001", "abdomen_atlas")
    assert (second.patient, second.site) == ("p1", "here")


def test_abdomen_atlas_sets_aside_what_is_incomplete(tmp_path):
    touch(tmp_path / "good" / "ct.nii.gz")
    touch(tmp_path / "good" / "segmentations" / "liver.nii.gz")
    touch(tmp_path / "empty_folder" / "ct.nii.gz")
    (tmp_path / "empty_folder" / "segmentations").mkdir()
    touch(tmp_path / "no_folder" / "ct.nii.gz")
    touch(tmp_path / "no_ct" / "segmentations" / "liver.nii.gz")
    touch(tmp_path / "unknown" / "ct.nii.gz")
    for name in ("liver", "wing", "fin"):
        touch(tmp_path / "unknown" / "segmentations" / f"{name}.nii.gz")
    for place in (tmp_path / "twice", tmp_path / "ct" / "twice"):
        touch(place / "ct.nii.gz")
    for place in (tmp_path / "twice", tmp_path / "label" / "twice"):
        touch(place / "segmentations" / "liver.nii.gz")
    touch(tmp_path / "b a d" / "ct.nii.gz")
    touch(tmp_path / "b a d" / "segmentations" / "liver.nii.gz")
    found = find("abdomen_atlas", tmp_path)
    assert [case.case for case in found.cases] == ["good"]
    why = reasons(found)
    assert set(why) == {"empty_folder", "no_folder", "no_ct", "unknown", "twice", "b a d"}
    assert "segmentations is missing or empty" in why["empty_folder"]
    assert "segmentations is missing or empty" in why["no_folder"]
    assert "0 files ct.nii.gz" in why["no_ct"]
    assert "unknown structures fin.nii.gz, wing.nii.gz" in why["unknown"]
    assert "2 cases have this id" in why["twice"]
    assert "Rename the case" in why["b a d"]
    found = find("abdomen_atlas", tmp_path, {"labels": {"wing": "", "fin": "spleen"}})
    unknown = next(case for case in found.cases if case.case == "unknown")
    assert [label.names[1] for label in unknown.labels] == ["spleen", "liver"]


# ------------------------------------------------------------------ nnunet


@pytest.mark.parametrize("version", [1, 2])
def test_nnunet_in_both_forms(tmp_path, version):
    if version == 2:
        labels = {"background": 0, "kidney": 1, "tumor": 2}
        dataset(tmp_path, labels=labels, channel_names={"0": "CT"}, file_ending=".nii.gz")
    else:
        labels = {"0": "background", "1": "kidney", "2": "tumor"}
        dataset(tmp_path, labels=labels, modality={"0": "CT"})
    for case in ("case_001", "case_002", "no_label"):
        touch(tmp_path / "imagesTr" / f"{case}_0000.nii.gz")
    for case in ("case_001", "case_002", "no_image"):
        touch(tmp_path / "labelsTr" / f"{case}.nii.gz")
    touch(tmp_path / "imagesTr" / "._case_001_0000.nii.gz")
    found = find("nnunet", tmp_path)
    assert [case.case for case in found.cases] == ["case_001", "case_002"]
    assert found.cases[0].labels == (
        LabelFile(tmp_path / "labelsTr" / "case_001.nii.gz", {1: "kidney", 2: "kidney_lesion"}),
    )
    why = reasons(found)
    assert "0 files for labelsTr/no_label.nii.gz" in why["no_label"]
    assert "0 files for imagesTr/no_image_0000.nii.gz" in why["no_image"]


def test_nnunet_with_listed_files_that_lead_outside(tmp_path):
    folder = tmp_path / "set"
    dataset(
        folder,
        labels={"background": 0, "liver": 1},
        dataset={
            "a": {"images": ["images/a.nii.gz"], "label": "labels/a.nii.gz"},
            "b": {"images": ["../b.nii.gz"], "label": "labels/b.nii.gz"},
            "../c": {"images": ["images/a.nii.gz"], "label": "labels/a.nii.gz"},
            "d/e": {"images": ["images/a.nii.gz"], "label": "labels/a.nii.gz"},
        },
    )
    touch(tmp_path / "b.nii.gz")
    touch(folder / "images" / "a.nii.gz")
    touch(folder / "labels" / "a.nii.gz")
    found = find("nnunet", folder)
    assert [case.case for case in found.cases] == ["a"]
    why = reasons(found)
    assert set(why) == {"b", "../c", "d/e"}
    assert "outside the data set" in why["b"]
    assert "'../c' is not usable as a name" in why["../c"]
    assert "'d/e' is not usable as a name" in why["d/e"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"labels": {"background": 0, "liver": [1, 2], "liver_lesion": 2}}, "liver are regions"),
        ({"labels": {"background": 0, "liver": 1, "ignore": 2}}, "label ignore"),
        (
            {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "T1", "1": "T2"}},
            "2 ch",
        ),
        ({"labels": {"background": 0, "liver": 1}, "file_ending": ".nrrd"}, "file_ending"),
        ({"labels": {"background": 0, "heart": 1, "wing": 2}}, r"'heart' \(1\), 'wing' \(2\)"),
        ({"labels": {"background": 0, "liver": "x"}}, "whole numbers"),
        ({"labels": {"background": 0, "liver": 1}}, "no cases"),
        ({"names": {}}, "no labels"),
    ],
)
def test_nnunet_tables_that_cannot_be_used(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        find("nnunet", dataset(tmp_path, **content))


# ------------------------------------------------------------------ msd


@pytest.mark.parametrize(
    ("task", "labels", "ours"),
    [
        ("Task03_Liver", ["liver", "cancer"], {1: "liver", 2: "liver_lesion"}),
        ("Task07_Pancreas", ["pancreas", "cancer"], {1: "pancreas", 2: "pancreatic_lesion"}),
        ("Task08_HepaticVessel", ["Vessel", "Tumour"], {1: "hepatic_vessel", 2: "liver_lesion"}),
        ("Task09_Spleen", ["spleen"], {1: "spleen"}),
        ("Task10_Colon", ["colon cancer primaries"], {1: "colon_lesion"}),
    ],
)
def test_msd_tasks(tmp_path, task, labels, ours):
    table = {"0": "background"} | {str(n): name for n, name in enumerate(labels, 1)}
    pairs = [
        {"image": f"./imagesTr/x_{n}.nii.gz", "label": f"./labelsTr/x_{n}.nii.gz"} for n in (0, 1)
    ]
    folder = dataset(tmp_path / task, labels=table, training=pairs)
    for part in ("imagesTr", "labelsTr"):
        touch(folder / part / "x_0.nii.gz")
    touch(folder / "imagesTr" / "x_1.nii.gz")
    found = find("msd", folder)
    assert [case.case for case in found.cases] == ["x_0"]
    assert found.cases[0].labels[0].names == ours
    assert "labelsTr/x_1.nii.gz missing" in reasons(found)["x_1"]


def test_msd_lists_that_lead_outside_or_repeat(tmp_path):
    pairs = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": "./labelsTr/a.nii.gz"}
        for name in ("a", "b", "b", "../up", "../../out")
    ]
    folder = dataset(tmp_path / "Task09_Spleen", labels={"0": "background", "1": "spleen"},
                     training=pairs)  # fmt: skip
    for path in ("imagesTr/a", "imagesTr/b", "labelsTr/a", "up", "../out"):
        touch(folder / f"{path}.nii.gz")
    found = find("msd", folder)
    assert [case.case for case in found.cases] == ["a"]
    why = reasons(found)
    assert set(why) == {"b", "../up", "../../out"}
    assert "2 cases" in why["b"]
    assert "not usable" in why["../up"]
    assert "outside" in why["../../out"]


def test_msd_tasks_without_our_structures_are_refused(tmp_path):
    folder = dataset(tmp_path / "Task06_Lung", labels={"0": "background", "1": "cancer"},
                     training=[])  # fmt: skip
    with pytest.raises(UserError, match="neither its name"):
        find("msd", folder)


# ------------------------------------------------------------------ all


def test_wrong_sources_and_folders(tmp_path):
    with pytest.raises(UserError, match="source is 'dicom'"):
        find("dicom", tmp_path)
    for source in ("abdomen_atlas", "nnunet", "msd"):
        with pytest.raises(UserError, match="not a folder"):
            find(source, tmp_path / "missing")
        with pytest.raises(UserError, match="unknown settings lables"):
            find(source, tmp_path, {"lables": {}})
    with pytest.raises(UserError, match="no cases"):
        find("abdomen_atlas", tmp_path)
    with pytest.raises(UserError, match=r"dataset.json is missing"):
        find("nnunet", tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        find("msd", tmp_path)


def test_tables_of_patients(tmp_path):
    assert read_patients(tmp_path) == {}
    path = tmp_path / "patients.csv"
    path.write_text("case,patient\na,p1\nb,\n")
    assert read_patients(tmp_path) == {"a": ("p1", ""), "b": ("", "")}
    path.write_text("case,name\na,p1\n")
    with pytest.raises(UserError, match="expected the columns"):
        read_patients(tmp_path)
    path.write_text("case,patient\na,p1\na,p2\n")
    with pytest.raises(UserError, match="stands there twice"):
        read_patients(tmp_path)
    path.write_bytes(np.random.default_rng(1).bytes(500))
    with pytest.raises(UserError):
        read_patients(tmp_path)


# ------------------------------------------------------------------ scans without labels


def test_scans_without_labels(tmp_path):
    for name in ("a.nii.gz", "b_0000.nii.gz", "c/ct.nii", "d/mr.nii.gz", ".e.nii.gz", "notes.txt"):
        touch(tmp_path / name)
    (tmp_path / "patients.csv").write_text("case,patient,site\nb,bob,north\n")
    found = find("scans", tmp_path)
    assert [(c.case, c.patient, c.site, c.labels) for c in found.cases] == [
        ("a", "a", "scans", ()),
        ("b", "bob", "north", ()),
        ("c", "c", "scans", ()),
    ]
    assert not found.rejected


def test_a_folder_without_scans_is_refused(tmp_path):
    touch(tmp_path / "c" / "mr.nii.gz")
    with pytest.raises(UserError, match=r"no scans\. Expected CASE\.nii\.gz"):
        find("scans", tmp_path)
