"""Submissions to the Decathlon: values, names and archive, and a check that finds what is wrong."""

import gzip
import json
import zipfile

import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict

from tumorjax.errors import UserError
from tumorjax.inference import msd, predict
from tumorjax.inference.native_grid import Structure

TASK = "Task03_Liver"


@pytest.fixture
def liver_network(network):
    """The built-in network, with classes that hold a liver and its tumour."""
    network.task.classes = ConfigDict(
        {"kidney": ["kidney_left", "kidney_right"], "liver": ["liver"], "tumor": ["liver_lesion"]}
    )
    return network


@pytest.mark.parametrize("suffix", ["", "_0000"])
def test_the_job_writes_an_archive_that_the_check_accepts(
    liver_network, tmp_path, config_for, save_phantom, capsys, suffix
):
    source, output = tmp_path / "imagesTs", tmp_path / "out"
    truths = {
        f"liver_{number}": save_phantom(
            source / f"liver_{number}{suffix}.nii.gz", (24, 20, 18), codes=codes
        )
        for number, codes in ((131, "RAS"), (7, "LPS"), (142, "PIR"))
    }
    # As in the Decathlon's own archives.
    (source / "._liver_131.nii.gz").write_bytes(b"x")
    config = config_for(source, output, "msd_liver")
    assert config.msd == TASK
    assert predict.run(config, tmp_path / "work") == 0
    assert "3 masks, checked against their images (the challenge has 70" in capsys.readouterr().out
    values = np.zeros(256, np.uint8)
    values[[5, 27]] = 1, 2
    with zipfile.ZipFile(output / f"{TASK}.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{TASK}/{case}.nii.gz" for case in sorted(truths)]
        for case, truth in truths.items():
            data = gzip.decompress(archive.read(f"{TASK}/{case}.nii.gz"))
            mask = nib.Nifti1Image.from_bytes(data)
            assert mask.get_data_dtype() == np.uint8
            np.testing.assert_array_equal(np.asanyarray(mask.dataobj), values[truth])
            image = nib.load(source / f"{case}{suffix}.nii.gz")
            np.testing.assert_array_equal(mask.affine, image.affine)
    record = json.loads((output / "labels.json").read_text())
    assert record["labels"] == {"background": 0, "liver": 1, "liver_lesion": 2}
    assert msd.main([str(output / f"{TASK}.zip"), str(source)]) == 0

    before = (output / f"{TASK}.zip").read_bytes()
    assert predict.run(config, tmp_path / "work") == 0
    assert (output / f"{TASK}.zip").read_bytes() == before


def test_there_is_no_archive_of_a_part(liver_network, tmp_path, config_for, save_phantom, capsys):
    source, output = tmp_path / "imagesTs", tmp_path / "out"
    for number in (1, 2, 3):
        save_phantom(source / f"liver_{number}.nii.gz", (20, 16, 16))
    whole = (source / "liver_2.nii.gz").read_bytes()
    (source / "liver_2.nii.gz").write_bytes(whole[:100])
    assert predict.run(config_for(source, output, "msd_liver"), tmp_path / "work") == 1
    assert f"no {TASK}.zip yet" in capsys.readouterr().out
    assert not (output / f"{TASK}.zip").exists()
    (source / "liver_2.nii.gz").write_bytes(whole)
    for part, written in ((0, False), (1, True)):
        config = config_for(source, output, "msd_liver", num_parts=2, part=part)
        (output / "liver_2.nii.gz").unlink(missing_ok=True) if part == 0 else None
        predict.run(config, tmp_path / "work")
        assert (output / f"{TASK}.zip").exists() == written


def test_what_is_no_image_of_the_task_or_not_known_is_refused(
    liver_network, tmp_path, config_for, save_phantom
):
    save_phantom(tmp_path / "in" / "pancreas_001.nii.gz")
    config = config_for(tmp_path / "in", tmp_path / "out", "msd_liver")
    with pytest.raises(UserError, match=r"pancreas_001: no image of Task03_Liver"):
        predict.run(config, tmp_path / "work")
    config = config_for(tmp_path / "in", tmp_path / "out", "msd_pancreas")
    with pytest.raises(UserError, match="wants pancreas, pancreatic_lesion, which the checkpoint"):
        predict.run(config, tmp_path / "work")
    config = config_for(tmp_path / "in", tmp_path / "out", "msd_pancreas", form="structures")
    with pytest.raises(UserError, match="The Decathlon takes labels"):
        predict.run(config, tmp_path / "work")


def table(*names):
    return [Structure(name, value, value, "") for value, name in enumerate(names, start=1)]


def test_names_of_other_programs_are_understood():
    for names in (("liver", "cancer"), ("liver", "tumor"), ("liver", "liver_lesion")):
        known = {"liver": ("liver",), "liver_lesion": ("liver_lesion",)}
        anatomy = {name: known.get(name, ()) for name in names}
        found = msd.structures_of(TASK, table(*names), anatomy, (names[1],))
        assert [(one.name, one.value) for one in found] == [("liver", 1), (names[1], 2)]
    # A class that unites lesions of two organs is not the liver's alone.
    anatomy = {"liver": ("liver",), "tumor": ("liver_lesion", "kidney_lesion")}
    with pytest.raises(UserError, match="wants liver_lesion"):
        msd.structures_of(TASK, table("liver", "tumor"), anatomy, ("tumor",))


# ---------------------------------------------------------------------------- the check


@pytest.fixture
def submission(tmp_path, rng):
    """Images, and an archive of masks that is right."""
    images, masks = {}, {}
    for number in (1, 2, 3):
        case = f"liver_{number}"
        affine = np.diag([-0.7, -0.7, 2.0 + number, 1.0])
        affine[:3, 3] = rng.uniform(-100, 100, 3)
        images[case], masks[case] = tmp_path / f"{case}.nii.gz", tmp_path / f"{case}_mask.nii.gz"
        shape = (12, 11, 5 + number)
        image = rng.integers(-1000, 1000, shape).astype(np.int16)
        nib.save(nib.Nifti1Image(image, affine), images[case])
        mask = rng.integers(0, 3, shape).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, affine), masks[case])
    path = tmp_path / f"{TASK}.zip"
    msd.write_archive(path, TASK, masks)
    return path, images, masks


def test_a_right_archive_passes(submission):
    path, images, _ = submission
    msd.check_archive(path, TASK, images)


def replaced(change):
    """Returns (masks) -> masks, with the second one's file changed."""

    def make(masks):
        image = nib.load(masks["liver_2"])
        data = np.array(image.dataobj)
        data, affine = change(data, image.affine.copy())
        nib.save(nib.Nifti1Image(data, affine), masks["liver_2"])
        return masks

    return make


def moved(data, affine):
    affine[0, 3] += 0.5
    return data, affine


def marked(data, affine):
    data[3, 4, 2] = 4
    return data, affine


def cut(masks):
    data = masks["liver_2"].read_bytes()
    masks["liver_2"].write_bytes(data[: len(data) // 2])
    return masks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: {k: v for k, v in masks.items() if k != "liver_2"},
         r"Task03_Liver/liver_2\.nii\.gz is missing"),
        (lambda masks: masks | {"liver_9": masks["liver_1"]}, r"liver_9\.nii\.gz is of no image"),
        (replaced(lambda data, affine: (data[:-1], affine)),
         r"liver_2\.nii\.gz has shape \(11, 11, 7\), its image \(12, 11, 7\)"),
        (replaced(moved), r"liver_2\.nii\.gz lies up to 0\.50 mm beside its image"),
        (replaced(lambda data, affine: (data, affine @ np.diag([-1, 1, 1, 1]))), "beside its"),
        (replaced(marked), r"liver_2\.nii\.gz has the value 4, expected 0, 1, 2"),
        (replaced(lambda data, affine: (data * np.float32(0.5), affine)), r"the value 0\.5"),
        (cut, r"liver_2\.nii\.gz is not readable"),
    ],
)  # fmt: skip
def test_every_fault_is_named(submission, capsys, change, message):
    path, images, masks = submission
    msd.write_archive(path, TASK, change(dict(masks)))
    with pytest.raises(UserError, match=message):
        msd.check_archive(path, TASK, images)


def test_other_files_are_no_archives(tmp_path, submission, capsys):
    path, images, _ = submission
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="not readable as an archive"):
        msd.check_archive(path, TASK, images)
    assert msd.main([str(path)]) == 2
    assert msd.main([str(path), str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
