"""Scans become a store; each bad one is set aside with its reason and the rest goes on."""

import errno
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from configs.preparation import get_config
from data_prep import prepare as job
from data_prep.prepare import prepare
from tumorjax import volumes
from tumorjax.anatomy import LABELS
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.geometry import resample_to_shape, spacing_of, to_canonical
from tumorjax.volumes import open_store

SETTINGS = {"spacing": (1.5, 1.5, 1.5), "window": (-175, 250)}
# Axes point to the left, back and up; 24 x 22.4 x 30 mm.
AFFINE = np.array([[-0.8, 0, 0, 11], [0, -0.8, 0, -3], [0, 0, 2.5, 40], [0, 0, 0, 1.0]])
SHAPE = (30, 28, 12)


def scan(rng):
    """A body with a liver and a tumour in it; returns HU and masks."""
    image = np.full(SHAPE, -1000, np.int16)
    image[3:27, 3:25] = 20
    masks = {name: np.zeros(SHAPE, bool) for name in ("liver", "spleen", "liver_lesion")}
    masks["liver"][5:20, 5:20, 2:10] = True
    masks["spleen"][21:26, 6:12, 2:10] = True
    masks["liver_lesion"][9:14, 8:13, 4:7] = True
    image[masks["liver"]], image[masks["liver_lesion"]] = 110, 60
    return image + rng.integers(-9, 10, SHAPE).astype(np.int16), masks


def save(path, array, affine=AFFINE, text=True, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = nib.Nifti1Image(array, affine)
    if text:
        volume.header["descrip"] = b"JOHN DOE 1950"
        volume.header["db_name"] = b"JOHN DOE"
    for name, value in fields.items():
        volume.header[name] = value
    nib.save(volume, path)


def write_atlas(folder, cases, rng):
    for case in cases:
        image, masks = scan(rng)
        save(folder / case / "ct.nii.gz", image)
        for name, mask in masks.items():
            save(folder / case / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8))


def write_nnunet(folder, rng, cases=("a_1", "a_2")):
    for case in cases:
        image, masks = scan(rng)
        label = masks["liver"] + masks["liver_lesion"].astype(np.uint8)
        save(folder / "imagesTr" / f"{case}_0000.nii.gz", image)
        save(folder / "labelsTr" / f"{case}.nii.gz", label)
    labels = {"background": 0, "liver": 1, "tumor": 2}
    table = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(table))


@pytest.fixture
def atlas(tmp_path, rng):
    write_atlas(tmp_path / "atlas", ["c1", "c2", "c3"], rng)
    return tmp_path / "atlas"


def run(folder, tmp_path, source="abdomen_atlas", settings=SETTINGS, **more):
    return prepare(source, folder, tmp_path / "store", settings, tmp_path / "work", **more)


# ------------------------------------------------------------------ what a good case becomes


def test_a_case_is_the_scan_resampled_in_ras_in_the_window(atlas, tmp_path):
    (atlas / "patients.csv").write_text("case,patient,site\nc1,p9,north\n")
    steps = []
    assert run(atlas, tmp_path, progress=lambda *s: steps.append(s)) == []
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert not (tmp_path / "work" / "rejected.csv").exists()
    store = open_store(tmp_path / "store")
    assert store.cases == ["c1", "c2", "c3"]
    assert store.settings == {"spacing": [1.5] * 3, "window": [-175.0, 250.0], "order": 3}
    assert store.verify() == []

    file = nib.load(atlas / "c1" / "ct.nii.gz")
    image, _ = to_canonical(np.asanyarray(file.dataobj), file.affine)
    expected = (resample_to_shape(image, (16, 15, 20), 3).clip(-175, 250) + 175) / 425
    np.testing.assert_allclose(store.read("c1", "image"), expected, atol=2e-4)
    label = store.read("c1", "label")
    assert set(np.unique(label)) == {0, *(LABELS[n] for n in ("liver", "spleen", "liver_lesion"))}
    # x grows to the right: the spleen, at large indices of an axis to the left, is at small x.
    assert np.argwhere(label == LABELS["spleen"])[:, 0].max() < 5

    record = store.record("c1")
    assert (record["patient"], record["site"], record["source"]) == ("p9", "north", "abdomen_atlas")
    assert store.record("c2")["patient"] == "c2"
    np.testing.assert_allclose(record["spacing"], (24 / 16, 22.4 / 15, 30 / 20))
    (tumor,) = record["tumors"]
    assert tumor["class"] == "liver_lesion"
    assert tumor["volume_mm3"] == pytest.approx(5 * 5 * 3 * 0.8 * 0.8 * 2.5, rel=0.25)
    original = record["original"]
    assert original["shape"] == list(SHAPE)
    assert original["orientation"] == "LPS"
    assert (original["sform_code"], original["qform_code"]) == (2, 0)
    np.testing.assert_allclose(original["affine"], AFFINE, rtol=1e-6)
    np.testing.assert_allclose(original["spacing"], (0.8, 0.8, 2.5), rtol=1e-6)
    assert set(record["source_hash"]) == {
        "c1/ct.nii.gz",
        *(f"c1/segmentations/{name}.nii.gz" for name in ("liver", "spleen", "liver_lesion")),
    }


def test_orientation_of_the_file_does_not_matter(tmp_path, rng):
    image, masks = scan(rng)
    label = masks["liver"] + masks["liver_lesion"].astype(np.uint8)
    start = nib.orientations.io_orientation(AFFINE)
    for codes in ("LPS", "RAS", "IPL", "PSR", "SLA"):
        turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))
        affine = AFFINE @ nib.orientations.inv_ornt_aff(turn, SHAPE)
        for place, array in (("imagesTr/{}_0000", image), ("labelsTr/{}", label)):
            turned = nib.orientations.apply_orientation(array, turn)
            save(tmp_path / "set" / f"{place.format(codes)}.nii.gz", turned, affine)
    table = {"labels": {"background": 0, "liver": 1, "tumor": 2}}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(table))
    assert run(tmp_path / "set", tmp_path, "nnunet") == []
    store = open_store(tmp_path / "store")
    assert len(store.cases) == 5
    for case in store.cases:
        assert store.record(case)["original"]["orientation"] == case
        for kind in ("image", "label"):
            np.testing.assert_allclose(
                store.read(case, kind), store.read("RAS", kind), atol=2.5e-4 * (kind == "image")
            )


def test_msd_with_a_channel_axis_and_only_tumours(tmp_path, rng):
    folder = tmp_path / "Task10_Colon"
    image, masks = scan(rng)
    lesion = masks["liver_lesion"].astype(np.uint8)
    save(folder / "imagesTr" / "colon_001.nii.gz", image[..., None])
    save(folder / "labelsTr" / "colon_001.nii.gz", lesion[..., None])
    save(folder / "imagesTr" / "colon_002.nii.gz", image)
    save(folder / "labelsTr" / "colon_002.nii.gz", lesion * 0)
    table = {
        "labels": {"0": "background", "1": "colon cancer primaries"},
        "training": [
            {"image": f"./imagesTr/colon_00{n}.nii.gz", "label": f"./labelsTr/colon_00{n}.nii.gz"}
            for n in (1, 2)
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(table))
    (row,) = run(folder, tmp_path, "msd")
    assert row["case"] == "colon_002"
    assert "no tumour is labelled" in row["reason"]
    store = open_store(tmp_path / "store")
    assert store.record("colon_001")["labels"] == ["colon_lesion"]


def test_scans_without_labels(tmp_path, rng):
    image, _ = scan(rng)
    save(tmp_path / "in" / "a_0000.nii.gz", image)
    save(tmp_path / "in" / "b" / "ct.nii.gz", image)
    assert run(tmp_path / "in", tmp_path, "scans") == []
    store = open_store(tmp_path / "store")
    assert store.cases == ["a", "b"]
    assert store.record("a")["labels"] == []
    assert not store.read("a", "label").any()
    assert store.locations("a") == {}
    np.testing.assert_array_equal(store.read("a", "image"), store.read("b", "image"))


def test_sides_of_kits_like_kidneys(tmp_path, rng):
    folder = tmp_path / "kits"
    image, _ = scan(rng)
    label = np.zeros(SHAPE, np.uint8)
    label[5:9, 10:14, 3:8], label[20:24, 10:14, 3:8], label[21, 11, 5] = 1, 1, 2
    save(folder / "imagesTr" / "k_0000.nii.gz", image)
    save(folder / "labelsTr" / "k.nii.gz", label)
    table = {"labels": {"background": 0, "kidney": 1, "tumor": 2}}
    (folder / "dataset.json").write_text(json.dumps(table))
    assert run(folder, tmp_path, "nnunet") == []
    label = open_store(tmp_path / "store").read("k", "label")
    middle = {
        n: np.argwhere(label == LABELS[n])[:, 0].mean() for n in ("kidney_left", "kidney_right")
    }
    assert middle["kidney_left"] < 6 < 10 < middle["kidney_right"]


def test_the_virtual_cohort_is_made_and_prepared(tmp_path):
    cohort = {"patients_per_site": 1, "ood_patients_per_site": 0, "sites": ["alder"],
              "ood_sites": [], "tumors": ["liver_lesion"], "healthy_share": 0.0}  # fmt: skip
    settings = {**SETTINGS, "spacing": (4, 4, 4), "source_settings": cohort}
    assert run(tmp_path / "scans", tmp_path, "virtual", settings, workers=1) == []
    store = open_store(tmp_path / "store")
    record = store.record(store.cases[0])
    assert record["site"] == "alder"
    assert record["tumors"]
    assert {"liver", "kidney_left", "kidney_right", "pancreas"} <= set(record["labels"])
    # The liver is on the right: RAS+ x is larger there.
    label = store.read(store.cases[0], "label")
    x = {n: np.argwhere(label == LABELS[n])[:, 0].mean() for n in ("liver", "spleen")}
    assert x["liver"] > x["spleen"]


# ------------------------------------------------------------------ bad input

BAD = {
    # what is done to the case -> what its reason has to say
    "truncated": "ct.nii.gz: not readable to its end",
    "empty": "ct.nii.gz: the file is empty",
    "series": "ct.nii.gz: 4D",
    "colour": "ct.nii.gz: an RGB image",
    "nan": "voxels are NaN or infinite",
    "zero_spacing": "voxel size 0 x 0.8 x 2.5 mm",
    "negative_spacing": "voxel size -0.8 x 0.8 x 2.5 mm",
    "huge_spacing": "spacing",
    "singular": "the affine is singular",
    "no_orientation": "left and right are unknown",
    "scaled": "no Hounsfield units|no CT in HU",
    "shifted": "no Hounsfield units",
    "other_grid": "liver.nii.gz: its grid differs from the image's: shape",
    "moved_grid": "liver.nii.gz: its grid differs from the image's: corners",
    "unknown_values": "spleen.nii.gz: unknown label values 3, 4",
    "empty_folder": "segmentations is missing or empty",
    "unknown_structure": "unknown structures wing.nii.gz",
    "no_organ": "no organ is labelled",
    "only_tumour": "no organ is labelled",
    "truncated_label": "liver.nii.gz: not readable to its end",
}


def spoil(folder, kind, rng):
    """Makes a good case a bad one."""
    image, masks = scan(rng)
    ct, masks_of = folder / "ct.nii.gz", folder / "segmentations"
    liver = masks_of / "liver.nii.gz"
    affine = AFFINE.copy()
    if kind in ("truncated", "truncated_label"):
        path = ct if kind == "truncated" else liver
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty":
        ct.write_bytes(b"")
    elif kind == "series":
        save(ct, np.stack([image, image], axis=-1))
    elif kind == "colour":
        save(ct, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    elif kind == "nan":
        holes = image.astype(np.float32)
        holes[3, 4, 5] = np.nan
        save(ct, holes)
    elif kind in ("zero_spacing", "negative_spacing"):
        # As a broken converter leaves it; nibabel itself would not write it.
        save(folder / "ct.nii", image)
        data = bytearray((folder / "ct.nii").read_bytes())
        data[80:84] = np.float32(0 if kind == "zero_spacing" else -0.8).tobytes()
        ct.unlink()
        (folder / "ct.nii").write_bytes(data)
    elif kind == "huge_spacing":
        save(ct, image, np.diag([0.8, 0.8, 2500, 1]))
    elif kind == "singular":
        save(folder / "ct.nii", image)
        data = bytearray((folder / "ct.nii").read_bytes())
        data[280:296] = np.array([0.8, 0.8, 0, 0], np.float32).tobytes()
        data[296:312] = np.array([0.8, 0.8, 0, 0], np.float32).tobytes()
        ct.unlink()
        (folder / "ct.nii").write_bytes(data)
    elif kind == "no_orientation":
        save(ct, image, None)
    elif kind == "scaled":
        save(ct, ((image + 1000) / 1200).astype(np.float32))
    elif kind == "shifted":
        save(ct, image + np.int16(1024))
    elif kind == "other_grid":
        save(liver, masks["liver"][1:].astype(np.uint8))
    elif kind == "moved_grid":
        affine[2, 3] += 2.5
        save(liver, masks["liver"].astype(np.uint8), affine)
    elif kind == "unknown_values":
        save(masks_of / "spleen.nii.gz", rng.integers(2, 4, SHAPE).astype(np.uint8) + np.uint8(1))
    elif kind == "empty_folder":
        shutil.rmtree(masks_of)
        masks_of.mkdir()
    elif kind == "unknown_structure":
        save(masks_of / "wing.nii.gz", masks["liver"].astype(np.uint8))
    else:
        for name in masks:
            keep = kind == "only_tumour" and name == "liver_lesion"
            save(masks_of / f"{name}.nii.gz", masks[name].astype(np.uint8) * np.uint8(keep))


def test_every_kind_of_bad_case_is_set_aside_with_its_reason_and_the_rest_goes_on(tmp_path, rng):
    folder = tmp_path / "atlas"
    write_atlas(folder, ["good1", *BAD, "good2", "b a d"], rng)
    for kind in BAD:
        spoil(folder / kind, kind, rng)
    rows = run(folder, tmp_path, workers=1)
    store = open_store(tmp_path / "store")
    assert store.cases == ["good1", "good2"]
    assert store.verify() == []
    reasons = {row["case"]: row["reason"] for row in rows}
    assert set(reasons) == {*BAD, "b a d"}
    for kind, words in BAD.items():
        assert any(part in reasons[kind] for part in words.split("|")), (kind, reasons[kind])
        assert reasons[kind].count(". ") >= 1, "says what to do"
    assert "not usable as a name" in reasons["b a d"]
    assert read_csv(tmp_path / "work" / "rejected.csv") == rows
    # Nothing of a bad case is in the store, and no header's text or folder is in any message.
    there = {p.name for p in (tmp_path / "store" / "cases").iterdir()}
    assert there == {"good1", "good2"}
    text = (tmp_path / "work" / "rejected.csv").read_text()
    assert "DOE" not in text
    assert str(tmp_path) not in text


def test_unknown_values_of_nnunet_labels(tmp_path, rng):
    folder = tmp_path / "set"
    write_nnunet(folder, rng)
    _, masks = scan(rng)
    save(folder / "labelsTr" / "a_1.nii.gz", masks["liver"].astype(np.uint8) * np.uint8(9))
    (row,) = run(folder, tmp_path, "nnunet")
    assert row == {
        "case": "a_1",
        "stage": "check",
        "reason": "a_1.nii.gz: unknown label values 9; known are 0, 1, 2. Correct the file, or name"
        " the values in the source's table of labels",
    }
    assert open_store(tmp_path / "store").cases == ["a_2"]


def test_no_disk_space_sets_cases_aside_and_keeps_what_is_done(atlas, tmp_path, monkeypatch):
    write = volumes._write_array

    def full(root, prefix, values):
        if "/c2/" in prefix and "label" in prefix:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(root, prefix, values)

    monkeypatch.setattr(volumes, "_write_array", full)
    (row,) = run(atlas, tmp_path, workers=1)
    assert (row["case"], row["stage"]) == ("c2", "store")
    assert "no space left" in row["reason"]
    assert "Free some space and run again" in row["reason"]
    store = open_store(tmp_path / "store")
    assert store.cases == ["c1", "c3"]
    assert not list((tmp_path / "store" / "cases" / "c2").rglob("*.json"))
    monkeypatch.undo()
    assert run(atlas, tmp_path) == []
    assert store.cases == ["c1", "c2", "c3"]


def test_a_store_of_other_settings_is_refused_before_any_work(atlas, tmp_path):
    run(atlas, tmp_path)
    with pytest.raises(UserError, match=r"other settings \(spacing is \[1.5, 1.5, 1.5\] there"):
        run(atlas, tmp_path, settings={**SETTINGS, "spacing": (1, 1, 1)})
    assert open_store(tmp_path / "store").cases == ["c1", "c2", "c3"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spacing": (1.5, 1.5)}, "spacing"),
        ({"spacing": (1.5, 0, 1)}, "positive mm"),
        ({"spacing": "fine"}, "spacing: expected 3 numbers"),
        ({"window": (250, -175)}, "low, then high"),
        ({"order": 2}, "order is 2"),
        ({"spacings": 3}, "unknown settings spacings"),
    ],
)
def test_settings_that_cannot_be_used(atlas, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        run(atlas, tmp_path, settings={**SETTINGS, **change})
    assert not (tmp_path / "store").exists()


def test_a_folder_that_is_no_data_set_leaves_no_store(tmp_path):
    for source in ("abdomen_atlas", "nnunet", "msd"):
        with pytest.raises(UserError, match="not a folder"):
            run(tmp_path / "missing", tmp_path, source)
    assert list(tmp_path.iterdir()) == []


def test_an_id_that_another_source_has_taken(atlas, tmp_path, rng):
    run(atlas, tmp_path)
    write_nnunet(tmp_path / "set", rng, ["c1", "d1"])
    (row,) = run(tmp_path / "set", tmp_path, "nnunet")
    assert row["case"] == "c1"
    assert "of this id from the source abdomen_atlas" in row["reason"]
    store = open_store(tmp_path / "store")
    assert store.cases == ["c1", "c2", "c3", "d1"]
    assert store.record("c1")["source"] == "abdomen_atlas"


# ------------------------------------------------------------------ running again


def test_only_what_is_missing_or_changed_is_done_again(atlas, tmp_path, rng, monkeypatch):
    run(atlas, tmp_path)
    done = []
    whole = job.prepare_case
    monkeypatch.setattr(
        job, "prepare_case", lambda task: done.append(task.scan.case) or whole(task)
    )
    assert run(atlas, tmp_path) == []
    assert done == []
    # Touched, but the same bytes: hashed, not done again.
    os.utime(atlas / "c1" / "ct.nii.gz", ns=(1, 1))
    run(atlas, tmp_path)
    assert done == []
    # Another image, another mask, a mask gone, another patient.
    image, masks = scan(rng)
    save(atlas / "c1" / "ct.nii.gz", image)
    (atlas / "c2" / "segmentations" / "spleen.nii.gz").unlink()
    (atlas / "patients.csv").write_text("case,patient,site\nc3,p1,\n")
    run(atlas, tmp_path)
    assert sorted(done) == ["c1", "c2", "c3"]
    store = open_store(tmp_path / "store")
    assert store.record("c2")["labels"] == ["liver", "liver_lesion"]
    assert store.record("c3")["patient"] == "p1"
    # A damaged record.
    done.clear()
    path = tmp_path / "store" / "cases" / "c1" / "case.json"
    path.write_bytes(path.read_bytes()[:-30])
    assert run(atlas, tmp_path) == []
    assert done == ["c1"]
    assert open_store(tmp_path / "store").verify() == []


def test_a_case_that_turned_bad_leaves_the_store(atlas, tmp_path, rng):
    run(atlas, tmp_path)
    spoil(atlas / "c2", "nan", rng)
    (row,) = run(atlas, tmp_path)
    assert row["case"] == "c2"
    assert open_store(tmp_path / "store").cases == ["c1", "c3"]


# ------------------------------------------------------------------ engine and job


def test_dask_processes_give_the_same_store(atlas, tmp_path, rng, monkeypatch):
    write_atlas(atlas, ["c4", "bad"], rng)
    spoil(atlas / "bad", "singular", rng)
    run(atlas, tmp_path, workers=1)
    monkeypatch.setattr(job, "_SMALL", 0)
    rows = prepare("abdomen_atlas", atlas, tmp_path / "other", SETTINGS, tmp_path / "w2", workers=2)
    assert [row["case"] for row in rows] == ["bad"]
    assert "singular" in rows[0]["reason"]
    here, there = open_store(tmp_path / "store"), open_store(tmp_path / "other")
    assert here.cases == there.cases == ["c1", "c2", "c3", "c4"]
    for case in here.cases:
        assert here.record(case)["checksum"]["image"] == there.record(case)["checksum"]["image"]
        np.testing.assert_array_equal(here.read(case, "label"), there.read(case, "label"))


def test_a_cluster_of_ones_own_by_its_address(atlas, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, processes=False, dashboard_address=None, silence_logs="ERROR"
    ) as cluster:
        assert run(atlas, tmp_path, scheduler=cluster.scheduler_address) == []
    assert open_store(tmp_path / "store").cases == ["c1", "c2", "c3"]


def test_a_scheduler_that_does_not_answer(atlas, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not answer"):
        run(atlas, tmp_path, scheduler="not-an-address")


def test_the_job_writes_statistics_and_says_what_was_set_aside(atlas, tmp_path, rng, capsys):
    spoil(atlas / "c3", "empty", rng)
    config = get_config()
    config.input, config.workers = str(atlas), 1
    assert job.run(config, tmp_path / "run") == 1
    out = capsys.readouterr().out
    assert "2 cases" in out
    assert "1 cases were set aside" in out
    rows = read_csv(tmp_path / "run" / "statistics.csv")
    counts = {row["structure"]: (row["scans"], row["tumors"]) for row in rows}
    assert counts == {"liver": ("2", ""), "spleen": ("2", ""), "liver_lesion": ("2", "2")}
    assert len(read_csv(tmp_path / "run" / "tumors.csv")) == 2
    assert (tmp_path / "run" / "statistics.png").read_bytes()[:4] == b"\x89PNG"
    shutil.rmtree(atlas / "c3")
    assert job.run(config, tmp_path / "run") == 0
    assert not (tmp_path / "run" / "rejected.csv").exists()
    config.input = ""
    with pytest.raises(UserError, match="input is empty"):
        job.run(config, tmp_path / "run")


@pytest.mark.parametrize("variant", ["abdomen_atlas", "nnunet", "msd", "virtual"])
def test_configs(variant):
    config = get_config(variant)
    assert (config.job, config.source) == ("preparation", variant)
    with pytest.raises(ValueError, match="dicom"):
        get_config("dicom")


# ------------------------------------------------------------------ real scans


def test_a_real_scan_with_its_organs(real_data, tmp_path):
    source = real_data / "totalsegmentator"
    folder = tmp_path / "set"
    for place, name in (("imagesTr/t_0000", "example_ct_sm"), ("labelsTr/t", "example_seg")):
        (folder / place).parent.mkdir(parents=True)
        shutil.copy(source / f"{name}.nii.gz", folder / f"{place}.nii.gz")
    values = np.unique(np.asanyarray(nib.load(source / "example_seg.nii.gz").dataobj))
    known = {1: "spleen", 2: "kidney_right", 3: "kidney_left", 4: "gallbladder", 5: "liver",
             6: "stomach", 7: "pancreas", 52: "aorta", 63: "inferior_vena_cava"}  # fmt: skip
    labels = {"background": 0}
    labels |= {known.get(int(v), f"other_{v}"): int(v) for v in values if v}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(UserError, match="unknown label names 'other_"):
        run(folder, tmp_path, "nnunet")
    drop = {name: "" for name in labels if name.startswith("other_")}
    settings = {**SETTINGS, "source_settings": {"labels": drop}}
    assert run(folder, tmp_path, "nnunet", settings) == []
    store = open_store(tmp_path / "store")
    record = store.record("t")
    assert record["shape"] == [244, 202, 60]
    seg = nib.load(source / "example_seg.nii.gz")
    truth, prepared = np.asanyarray(seg.dataobj), store.read("t", "label")
    for value, name in ((5, "liver"), (1, "spleen")):
        before = (truth == value).sum() * np.prod(spacing_of(seg.affine))
        after = (prepared == LABELS[name]).sum() * np.prod(record["spacing"])
        assert after == pytest.approx(before, rel=0.02)


def test_a_real_scan_without_an_organ_is_set_aside(real_data, tmp_path):
    case = tmp_path / "atlas" / "lung"
    (case / "segmentations").mkdir(parents=True)
    shutil.copy(real_data / "lung" / "lung1_ct.nii.gz", case / "ct.nii.gz")
    shutil.copy(real_data / "lung" / "lung1_tumour.nii.gz", case / "segmentations" / "gtv.nii.gz")
    settings = {**SETTINGS, "source_settings": {"labels": {"gtv": ""}}}
    (row,) = run(tmp_path / "atlas", tmp_path, settings=settings)
    assert row["case"] == "lung"
    assert "no organ is labelled" in row["reason"]
