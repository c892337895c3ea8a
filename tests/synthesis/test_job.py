"""The job "synthesis": scans on their own grids with tumours, nothing else changed."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from configs.synthesis import get_config
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.synthesis import diffusion_render, job

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
    assert record["request"]["tumors"][0]["size"] == "small"
    assert sum(one["volume_mm3"] for one in record["tumors"]) == pytest.approx(
        record["tumor_volume_mm3"], abs=0.1
    )
    # Centres are in the scan's own space: in the tumour by the file's affine.
    for one in record["tumors"]:
        voxel = np.linalg.solve(before.affine, [*one["center_mm"], 1])[:3]
        assert ndimage.binary_dilation(tumor, iterations=2)[tuple(np.rint(voxel).astype(int))]
    assert (tmp_path / "out" / "BDMAP_1" / "preview.png").read_bytes()[:4] == b"\x89PNG"


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
        ({"organ": "liver,pancreas,kidney", "size": "8,9"}, "3 organs and config.size 2 sizes"),
        ({"size_is": "area"}, "config.size_is is 'area'"),
        ({"size": "-3", "size_is": "diameter"}, "or a diameter in mm"),
        ({"position": "beside"}, "position 'beside' is unknown"),
        ({"masks": "nowhere.nii.gz"}, r"no such file or folder \(config.masks\)"),
        ({"labels": "somebody's"}, "config.labels is"),
        ({"labels": "{'brain': 3}"}, "structure 'brain' is unknown"),
        ({"labels": "{'liver': -1}"}, "liver is -1"),
        ({"synthesizer": "diffusion"}, "has no checkpoint"),
        ({"organ": "(liver"}, "is no list"),
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


LABELS = {"liver": 5, "pancreas": 7, "kidney_left": 3, "spleen": 1}


def write_map(path, masks, affine=AFFINE, values=LABELS):
    """A label map, and a scan of any name beside it."""
    organs = np.zeros(next(iter(masks.values())).shape, np.uint8)
    for name, mask in masks.items():
        organs[mask] = values[name]
    nib.save(nib.Nifti1Image(organs, affine), path)


@pytest.fixture
def two_organs(tmp_path, rng):
    """A scan of any name with a liver and a pancreas, and a label map of both."""
    image, masks = write_case(tmp_path / "case", rng, ("liver", "pancreas"), radius=30.0)
    (tmp_path / "case" / "ct.nii.gz").rename(tmp_path / "scan_0000.nii.gz")
    write_map(tmp_path / "organs.nii.gz", masks)
    return image, masks


def of_two(tmp_path, **changes):
    settings = {
        "input": str(tmp_path / "scan_0000.nii.gz"),
        "masks": str(tmp_path / "organs.nii.gz"),
        "labels": "totalsegmentator",
        "organ": "pancreas,liver",
        "size": "12,20",
        "size_is": "diameter",
    }
    return config_of(tmp_path, **(settings | changes))


def test_several_organs_of_a_label_map_in_one_command(tmp_path, two_organs):
    image, masks = two_organs
    assert job.run(of_two(tmp_path), tmp_path / "work") == 0
    folder = tmp_path / "out" / "scan"
    assert sorted(p.name for p in (folder / "segmentations").iterdir()) == [
        "liver_lesion.nii.gz",
        "pancreatic_lesion.nii.gz",
    ]
    after = voxels(folder / "ct.nii.gz")
    everything = np.zeros(image.shape, bool)
    for tumor_name, organ, diameter in (
        ("pancreatic_lesion", "pancreas", 12),
        ("liver_lesion", "liver", 20),
    ):
        tumor = voxels(folder / "segmentations" / f"{tumor_name}.nii.gz") > 0
        assert not (tumor & ~masks[organ]).any()
        volume = tumor.sum() * 3 * 1.5 * 1.5
        assert 0.75 <= (volume * 6 / np.pi) ** (1 / 3) / diameter <= 1.3
        everything |= tumor
    far = ndimage.distance_transform_edt(~everything, sampling=(3.0, 1.5, 1.5)) > 8
    np.testing.assert_array_equal(after[far], image[far])
    # One size for all, as a list of a command line; radii are the rule.
    changes = {"size": "(6,)", "size_is": "radius", "output": str(tmp_path / "one")}
    assert job.run(of_two(tmp_path, **changes), tmp_path / "work") == 0
    record = json.loads((tmp_path / "one" / "scan" / "synthesis.json").read_text())
    assert [one["size"] for one in record["request"]["tumors"]] == [6.0, 6.0]


def test_masks_in_a_folder_of_maps_and_values_that_are_told_beside_them(tmp_path, rng):
    (tmp_path / "in").mkdir()
    (tmp_path / "masks").mkdir()
    for number in (1, 2):
        _, masks = write_case(tmp_path / "case", rng)
        (tmp_path / "case" / "ct.nii.gz").rename(tmp_path / "in" / f"p{number}.nii.gz")
        (tmp_path / "case" / "segmentations" / "liver.nii.gz").unlink()
        (tmp_path / "case" / "segmentations").rmdir()
        if number == 1:
            write_map(tmp_path / "masks" / "p1.nii.gz", masks, values={"liver": 2})
    table = {"labels": {"background": 0, "liver": 2, "whatever": 4}}
    (tmp_path / "masks" / "labels.json").write_text(json.dumps(table))
    config = config_of(tmp_path, masks=str(tmp_path / "masks"))
    assert job.run(config, tmp_path / "work") == 1
    rows = read_csv(tmp_path / "work" / "rejected.csv")
    assert [row["case"] for row in rows] == ["p2"]
    assert "has neither p2.nii.gz nor p2/segmentations" in rows[0]["reason"]
    assert (tmp_path / "out" / "p1" / "segmentations" / "liver_lesion.nii.gz").is_file()
    # Other masks are another request.
    made = tmp_path / "out" / "p1" / "ct.nii.gz"
    time = made.stat().st_mtime_ns
    job.run(config, tmp_path / "work")
    assert made.stat().st_mtime_ns == time
    table["labels"]["spleen"] = 9
    (tmp_path / "masks" / "labels.json").write_text(json.dumps(table))
    job.run(config, tmp_path / "work")
    assert made.stat().st_mtime_ns > time


@pytest.mark.parametrize(
    ("changes", "shift", "reason"),
    [
        ({"labels": "{'liver': 5}", "organ": "liver", "size": "12"}, 500.0, "corners lie up to"),
        ({"labels": "{'liver': 44}", "organ": "liver", "size": "12"}, 0, "no liver in the scan"),
        ({"organ": "liver", "size": "300"}, 0, "has no place for a 150 mm tumour"),
    ],
)
def test_masks_that_do_not_fit_set_the_case_aside(tmp_path, two_organs, changes, shift, reason):
    _, masks = two_organs
    affine = AFFINE.copy()
    affine[0, 3] += shift
    write_map(tmp_path / "organs.nii.gz", masks, affine)
    assert job.run(of_two(tmp_path, **changes), tmp_path / "work") == 1
    assert reason in read_csv(tmp_path / "work" / "rejected.csv")[0]["reason"]
    assert not (tmp_path / "out").exists()


def test_labels_without_the_organ_and_one_map_for_many_are_wrong_use(tmp_path, two_organs, rng):
    with pytest.raises(
        UserError, match=r"have no pancreas: they are liver\. Say by config\.labels"
    ):
        job.run(of_two(tmp_path, labels="{'liver': 5}"), tmp_path / "work")
    for case in ("a", "b"):
        write_case(tmp_path / "many" / case, rng)
    with pytest.raises(UserError, match="one file of masks for 2 scans"):
        job.run(of_two(tmp_path, input=str(tmp_path / "many")), tmp_path / "work")
    source = str(tmp_path / "many" / "a" / "ct.nii.gz")
    config = of_two(tmp_path, input=source, output=str(tmp_path / "many"))
    with pytest.raises(UserError, match=r"config\.output is where the scans are"):
        job.run(config, tmp_path / "work")


def test_oblique_scans_keep_their_grid_and_their_values(tmp_path, rng, make_trained, monkeypatch):
    model = diffusion_render.make_model(make_trained(spacing=(4.0, 4.0, 4.0)))
    monkeypatch.setattr(diffusion_render, "open_model", lambda *settings: model)
    angle = np.deg2rad(12)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image, masks = write_case(tmp_path / "in" / "BDMAP_1", rng, affine=turn @ AFFINE)
    config = config_of(tmp_path, synthesizer="diffusion", checkpoint="model", size="10")
    assert job.run(config, tmp_path / "work") == 0
    before = nib.load(tmp_path / "in" / "BDMAP_1" / "ct.nii.gz")
    after = nib.load(tmp_path / "out" / "BDMAP_1" / "ct.nii.gz")
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.get_data_dtype() == np.int16
    tumor = voxels(tmp_path / "out" / "BDMAP_1" / "segmentations" / "liver_lesion.nii.gz") > 0
    assert tumor.any()
    assert not (tumor & ~masks["liver"]).any()
    result = np.asanyarray(after.dataobj)
    far = ndimage.distance_transform_edt(~tumor, sampling=(3.0, 1.5, 1.5)) > 6
    np.testing.assert_array_equal(result[far], image[far])
    core = ndimage.binary_erosion(tumor)
    assert np.mean(result[core]) == pytest.approx(37.5 - 0.1 * 212.5, abs=12)
    record = json.loads((tmp_path / "out" / "BDMAP_1" / "synthesis.json").read_text())
    assert record["request"]["tumors"][0]["model"] == dict(model.record)


def test_all_voxels_of_odd_files_stay_but_the_changed_ones(tmp_path, rng):
    # Whole numbers beyond what float32 can tell apart, as padding has them.
    image, _ = write_case(tmp_path / "in" / "BDMAP_1", rng)
    path = tmp_path / "in" / "BDMAP_1" / "ct.nii.gz"
    wide = image.astype(np.int32)
    wide[:, 0] = -(2**31) + 5
    nib.save(nib.Nifti1Image(wide, AFFINE), path)
    assert job.run(config_of(tmp_path), tmp_path / "work") == 0
    after = voxels(tmp_path / "out" / "BDMAP_1" / "ct.nii.gz")
    assert after.dtype == np.int32
    np.testing.assert_array_equal(after[:, 0], wide[:, 0])


def test_a_real_scan_with_its_label_map_gets_tumours_of_three_organs(
    tmp_path, real_data, make_trained, monkeypatch
):
    model = diffusion_render.make_model(make_trained(spacing=(4.0, 4.0, 4.0)))
    monkeypatch.setattr(diffusion_render, "open_model", lambda *settings: model)
    folder = real_data / "totalsegmentator"
    config = config_of(
        tmp_path,
        input=str(folder / "example_ct_sm.nii.gz"),
        masks=str(folder / "example_seg.nii.gz"),
        labels="totalsegmentator",
        organ="pancreas,liver,kidney",
        size="12,25,16",
        size_is="diameter",
        synthesizer="diffusion",
        checkpoint="model",
    )
    assert job.run(config, tmp_path / "work") == 0
    before = voxels(folder / "example_ct_sm.nii.gz")
    made = tmp_path / "out" / "example_ct_sm"
    after = voxels(made / "ct.nii.gz")
    organs = voxels(folder / "example_seg.nii.gz")
    everything = np.zeros(before.shape, bool)
    for tumor_name, values, diameter in (
        ("pancreatic_lesion", (7,), 12),
        ("liver_lesion", (5,), 25),
        ("kidney_lesion", (2, 3), 16),
    ):
        tumor = voxels(made / "segmentations" / f"{tumor_name}.nii.gz") > 0
        assert set(np.unique(organs[tumor])) <= set(values)
        assert 0.75 <= (tumor.sum() * 27 * 6 / np.pi) ** (1 / 3) / diameter <= 1.3
        everything |= tumor
    far = ndimage.distance_transform_edt(~everything, sampling=(3.0,) * 3) > 6
    np.testing.assert_array_equal(after[far], before[far])
