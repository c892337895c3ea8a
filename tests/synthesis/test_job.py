"""The job "synthesis": scans on their own grids with tumours, nothing else changed."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from configs.synthesis import get_config
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.synthesis import job

# Left, posterior, superior: x and y run against RAS+, and z comes first in the file.
AFFINE = np.array([[0, -1.5, 0, 90], [0, 0, -1.5, 80], [3.0, 0, 0, -50], [0, 0, 0, 1]])


def write_case(folder, rng, organs=("liver",), affine=AFFINE, radius=40.0):
    shape = (34, 90, 80)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    grid = np.meshgrid(
        *[(np.arange(n) - n / 2) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij"
    )
    image = np.full(shape, 20.0)
    masks = {}
    for index, name in enumerate(organs):
        centre = 65.0 * (index - (len(organs) - 1) / 2)
        masks[name] = (
            sum(((g - c) / radius) ** 2 for g, c in zip(grid, (0, centre, 0), strict=True)) < 1
        )
        image[masks[name]] = 110
    image = np.rint(ndimage.gaussian_filter(image, 0.5) + rng.normal(0, 12, shape)).astype(np.int16)
    (folder / "segmentations").mkdir(parents=True)
    scan = nib.Nifti1Image(image, affine)
    scan.header["descrip"] = b"JANE DOE 1950"
    scan.header.set_xyzt_units("mm")
    scan.set_sform(affine, 2)
    scan.set_qform(affine, 1)
    nib.save(scan, folder / "ct.nii.gz")
    for name, mask in masks.items():
        nib.save(
            nib.Nifti1Image(mask.astype(np.uint8), affine),
            folder / "segmentations" / f"{name}.nii.gz",
        )
    return image, masks


def config_of(tmp_path, **changes):
    config = get_config()
    config.input = str(tmp_path / "in")
    config.output = str(tmp_path / "out")
    for key, value in changes.items():
        config[key] = value
    return config


def voxels(path):
    return np.asanyarray(nib.load(path).dataobj)


def test_tumours_come_back_on_the_grid_of_the_scan(tmp_path, rng):
    image, masks = write_case(tmp_path / "in" / "BDMAP_1", rng)
    assert job.run(config_of(tmp_path), tmp_path / "work") == 0
    before = nib.load(tmp_path / "in" / "BDMAP_1" / "ct.nii.gz")
    after = nib.load(tmp_path / "out" / "BDMAP_1" / "ct.nii.gz")
    tumor_file = nib.load(tmp_path / "out" / "BDMAP_1" / "segmentations" / "liver_lesion.nii.gz")
    for file in (after, tumor_file):
        np.testing.assert_array_equal(file.affine, before.affine)
        for field in ("sform_code", "qform_code", "xyzt_units", "srow_x", "srow_z", "quatern_b"):
            np.testing.assert_array_equal(file.header[field], before.header[field])
        np.testing.assert_array_equal(file.header["pixdim"][:4], before.header["pixdim"][:4])
        assert bytes(file.header["descrip"]).strip(b"\0") == b""
    assert after.get_data_dtype() == np.int16
    result, tumor = np.asanyarray(after.dataobj), np.asanyarray(tumor_file.dataobj) > 0
    assert tumor.any()
    assert not (tumor & ~masks["liver"]).any()
    far = ndimage.distance_transform_edt(~tumor, sampling=(3.0, 1.5, 1.5)) > 8
    np.testing.assert_array_equal(result[far], image[far])
    assert np.mean(result[tumor].astype(float) - image[tumor]) < -15
    record = json.loads((tmp_path / "out" / "BDMAP_1" / "synthesis.json").read_text())
    assert record["tumor_volume_mm3"] == pytest.approx(tumor.sum() * 3 * 1.5 * 1.5, abs=0.1)
    assert record["request"]["size"] == "small"


def test_finished_cases_are_skipped_changed_requests_made_anew(tmp_path, rng, capsys):
    write_case(tmp_path / "in" / "BDMAP_1", rng)
    made = tmp_path / "out" / "BDMAP_1" / "ct.nii.gz"
    job.run(config_of(tmp_path, number=2), tmp_path / "work")
    first, time = voxels(made), made.stat().st_mtime_ns
    # A second case and a continued run: the first is left alone and would come out the same.
    write_case(tmp_path / "in" / "BDMAP_2", rng)
    job.run(config_of(tmp_path, number=2), tmp_path / "work")
    assert made.stat().st_mtime_ns == time
    assert "1 scans written" in capsys.readouterr().out
    assert job.run(config_of(tmp_path, number=2), tmp_path / "work") == 0
    assert "already finished" in capsys.readouterr().out
    job.run(
        config_of(tmp_path, number=2, output=str(tmp_path / "other"), workers=2), tmp_path / "work"
    )
    np.testing.assert_array_equal(voxels(tmp_path / "other" / "BDMAP_1" / "ct.nii.gz"), first)
    # Stopped before its record was written: made again.
    (tmp_path / "out" / "BDMAP_1" / "synthesis.json").unlink()
    job.run(config_of(tmp_path, number=2), tmp_path / "work")
    np.testing.assert_array_equal(voxels(made), first)
    job.run(config_of(tmp_path, number=2, seed=1), tmp_path / "work")
    assert (voxels(made) != first).any()


def test_kidneys_of_two_files_and_a_radius_in_mm_in_the_layout_of_two_folders(tmp_path, rng):
    _, masks = write_case(
        tmp_path / "in" / "ct" / "BDMAP_1", rng, ("kidney_left", "kidney_right"), radius=28.0
    )
    (tmp_path / "in" / "label" / "BDMAP_1").mkdir(parents=True)
    (tmp_path / "in" / "ct" / "BDMAP_1" / "segmentations").rename(
        tmp_path / "in" / "label" / "BDMAP_1" / "segmentations"
    )
    assert job.run(config_of(tmp_path, organ="kidney", size="12.0"), tmp_path / "work") == 0
    tumor = voxels(tmp_path / "out" / "BDMAP_1" / "segmentations" / "kidney_lesion.nii.gz") > 0
    radius = (tumor.sum() * 3 * 1.5 * 1.5 * 3 / 4 / np.pi) ** (1 / 3)
    assert 0.75 * 12 <= radius < 1.35 * 12
    sides = [(tumor & mask).any() for mask in masks.values()]
    assert sum(sides) == 1


def test_bad_cases_are_set_aside_with_their_reasons(tmp_path, rng):
    source = tmp_path / "in"
    write_case(source / "BDMAP_1", rng)
    write_case(source / "BDMAP_2", rng, ("spleen",))
    write_case(source / "BDMAP_3", rng, radius=2.0)
    write_case(source / "BDMAP_4", rng)
    (source / "BDMAP_4" / "ct.nii.gz").write_bytes(
        (source / "BDMAP_4" / "ct.nii.gz").read_bytes()[:5000]
    )
    write_case(source / "BDMAP_5", rng)
    mask = source / "BDMAP_5" / "segmentations" / "liver.nii.gz"
    nib.save(nib.Nifti1Image(voxels(mask), AFFINE + np.eye(4, k=3) * 9), mask)
    write_case(source / "BDMAP_6", rng)
    mask = source / "BDMAP_6" / "segmentations" / "liver.nii.gz"
    nib.save(nib.Nifti1Image(0 * voxels(mask), AFFINE), mask)
    write_case(source / "bad id", rng)
    assert job.run(config_of(tmp_path), tmp_path / "work") == 1
    rows = {row["case"]: row["reason"] for row in read_csv(tmp_path / "work" / "rejected.csv")}
    for case, reason in {
        "BDMAP_2": "no mask of the liver",
        "BDMAP_3": "has no place for a small tumour",
        "BDMAP_4": "not readable to its end",
        "BDMAP_5": "its corners lie up to 9.00 mm away",
        "BDMAP_6": "there is no liver in the scan",
        "bad id": "not usable as a name",
    }.items():
        assert reason in rows.pop(case)
    assert not rows
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["BDMAP_1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ""}, "config.input is empty"),
        ({"input": "nowhere"}, "no such file or folder"),
        ({"organ": "spleen"}, "no tumours of 'spleen'"),
        ({"size": "huge"}, "config.size is 'huge'"),
        ({"size": "-3"}, "config.size is '-3'"),
        ({"number": -1}, "config.number is -1"),
        ({"synthesizer": "dreams"}, "synthesizer 'dreams' is unknown"),
        ({"prior": "guess"}, "prior 'guess' is unknown"),
    ],
)
def test_wrong_configs_are_said_before_anything_is_read(tmp_path, changes, message):
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=message):
        job.run(config_of(tmp_path, **changes), tmp_path / "work")


def test_empty_folders_and_outputs_over_inputs_are_refused(tmp_path, rng):
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=r"no scans\. Expected CASE/ct\.nii\.gz"):
        job.run(config_of(tmp_path), tmp_path / "work")
    write_case(tmp_path / "in" / "BDMAP_1", rng)
    with pytest.raises(UserError, match="where the scans are"):
        job.run(config_of(tmp_path, output=str(tmp_path / "in")), tmp_path / "work")


def test_a_real_scan_gets_a_tumour_in_its_liver(tmp_path, real_data):
    folder = real_data / "totalsegmentator"
    segmentation = nib.load(folder / "example_seg.nii.gz")
    case = tmp_path / "in" / "example"
    (case / "segmentations").mkdir(parents=True)
    scan = nib.load(folder / "example_ct_sm.nii.gz")
    nib.save(scan, case / "ct.nii.gz")
    liver = (np.asanyarray(segmentation.dataobj) == 5).astype(np.uint8)
    nib.save(nib.Nifti1Image(liver, scan.affine), case / "segmentations" / "liver.nii.gz")
    assert (
        job.run(
            config_of(tmp_path, size="medium", input=str(case / "ct.nii.gz")), tmp_path / "work"
        )
        == 0
    )
    before = np.asanyarray(scan.dataobj).astype(float)
    after = voxels(tmp_path / "out" / "example" / "ct.nii.gz").astype(float)
    tumor = voxels(tmp_path / "out" / "example" / "segmentations" / "liver_lesion.nii.gz") > 0
    assert not (tumor & (liver == 0)).any()
    assert 10 <= (tumor.sum() * 27 * 3 / 4 / np.pi) ** (1 / 3) <= 20
    # A dark lesion with the grain of the liver about it.
    core = ndimage.binary_erosion(tumor)
    assert -90 < np.mean(after[core] - before[core]) < -15
    assert 0.6 < after[core].std() / before[core].std() < 2.0
    np.testing.assert_array_equal(after[liver == 0], before[liver == 0])
