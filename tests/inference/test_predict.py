"""Predictions lie on the scans' own grids, whatever those are; bad scans do not stop the others."""

import gzip
import itertools
import json
import subprocess
import sys

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import tensorstore as ts
from jax.tree_util import Partial
from ml_collections import ConfigDict

from tumorjax import geometry
from tumorjax.anatomy import LABELS, class_table
from tumorjax.errors import UserError
from tumorjax.files import read_csv, write_json_atomic
from tumorjax.inference import outputs, predict, sliding_window
from tumorjax.training import checkpoints

CLASSES = {
    "kidney": ["kidney_left", "kidney_right"],
    "liver": ["liver"],
    "tumor": ["liver_lesion", "kidney_lesion"],
}
WINDOW = (-175.0, 250.0)


def brighter_than(threshold, x):
    return jnp.concatenate([jnp.zeros_like(x), (x - threshold) * 2], axis=-1)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_the_networks_own_grid_gives_the_truth_for_all_48_axis_codes(
    network, tmp_path, config_for, save_phantom
):
    pairs = ("RL", "AP", "SI")
    every = [
        "".join(pairs[axis][side] for axis, side in zip(order, sides, strict=True))
        for order in itertools.permutations(range(3))
        for sides in itertools.product((0, 1), repeat=3)
    ]
    truths = {
        codes: save_phantom(tmp_path / "in" / f"{codes}_0000.nii.gz", (24, 20, 18), codes=codes)
        for codes in every
    }
    assert len(truths) == 48
    for number, codes in enumerate(every):
        # Either affine may be the valid one; both, and the units, have to stay.
        path = tmp_path / "in" / f"{codes}_0000.nii.gz"
        image = nib.load(path)
        affine = image.affine.copy()
        image.set_sform(affine, code=(2, 0, 4)[number % 3])
        image.set_qform(affine, code=(0, 1, 3)[number % 3])
        image.header.set_xyzt_units("mm", "sec")
        image.header["descrip"] = image.header["intent_name"] = b"DOE^JANE"
        nib.save(image, path)
    config = config_for(tmp_path / "in", tmp_path / "out", probabilities=("liver",))
    assert predict.run(config, tmp_path / "work") == 0
    for codes, truth in truths.items():
        scan = nib.load(tmp_path / "in" / f"{codes}_0000.nii.gz")
        for name in (f"{codes}.nii.gz", f"{codes}/probabilities/liver.nii.gz"):
            written = nib.load(tmp_path / "out" / name)
            np.testing.assert_array_equal(written.affine, scan.affine)
            assert nib.aff2axcodes(written.affine) == tuple(codes)
            for field in ("sform_code", "qform_code", "xyzt_units", "pixdim"):
                np.testing.assert_array_equal(written.header[field], scan.header[field])
            assert b"DOE" not in gzip.decompress((tmp_path / "out" / name).read_bytes())
        mask = np.asanyarray(nib.load(tmp_path / "out" / f"{codes}.nii.gz").dataobj)
        # The class "tumor" unites labels: it has the id of the first, liver_lesion's.
        np.testing.assert_array_equal(mask, truth)
        liver = np.asanyarray(written.dataobj)
        np.testing.assert_array_equal(liver > 0.5, truth == LABELS["liver"])


def test_oblique_scans_are_resampled_on_their_own_axes(network, tmp_path, config_for, save_phantom):
    """Turned about two axes, and sheared as by a tilted gantry: voxels are what they were."""
    truth = save_phantom(tmp_path / "in" / "straight.nii.gz", codes="LPS")
    straight = nib.load(tmp_path / "in" / "straight.nii.gz")
    turn = nib.eulerangles.euler2mat(0.3, 0.2, 0.0)
    affines = {"turned": straight.affine.copy(), "sheared": straight.affine.copy()}
    affines["turned"][:3, :3] = turn @ straight.affine[:3, :3]
    affines["sheared"][1, 2] = 0.1
    for name, affine in affines.items():
        image = nib.Nifti1Image(np.asanyarray(straight.dataobj), None, straight.header)
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=0, strip_shears=True)
        nib.save(image, tmp_path / "in" / f"{name}.nii.gz")
    assert predict.run(config_for(tmp_path / "in", tmp_path / "out"), tmp_path / "work") == 0
    for name in ("straight", *affines):
        written = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        scan = nib.load(tmp_path / "in" / f"{name}.nii.gz")
        np.testing.assert_array_equal(written.affine, scan.affine)
        np.testing.assert_array_equal(np.asanyarray(written.dataobj), truth)


@pytest.mark.parametrize(
    ("shape", "spacing", "codes"),
    [
        ((80, 61, 30), (1.0, 1.05, 2.0), "LPS"),
        ((100, 80, 24), (0.8, 0.8, 2.5), "LAS"),
        ((30, 24, 60), (2.7, 2.7, 1.0), "PIR"),
    ],
)
def test_other_grids_differ_by_less_than_a_voxel_of_the_network(
    network, tmp_path, monkeypatch, shape, spacing, codes, config_for, turned
):
    # One class, all that is brighter than the middle of the window: a box in air keeps its faces
    # where half of a voxel is filled. (With more classes, the rim of a bright one passes through
    # the brightness of others.)
    network.task.classes = ConfigDict({"liver": ["liver"]})
    apply = Partial(brighter_than, jnp.float32(0.5))
    monkeypatch.setattr(checkpoints, "load_model", lambda folder, step: (apply, network))
    grid = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij")
    box = np.all(
        [(c > low) & (c < low + 0.5) for c, low in zip(grid, (0.1, 0.2, 0.3), strict=True)], 0
    )
    image, affine = turned(np.where(box, 250, -175).astype(np.int16), spacing, codes)
    truth = turned(box, spacing, codes)[0]
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "in" / "a.nii")

    assert predict.run(config_for(tmp_path / "in", tmp_path / "out"), tmp_path / "work") == 0
    result = np.asanyarray(nib.load(tmp_path / "out" / "a.nii.gz").dataobj) == LABELS["liver"]
    assert result.shape == truth.shape
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        mine, true = (np.flatnonzero(mask.any(axis=others)) for mask in (result, truth))
        size = np.linalg.norm(affine[:3, axis])
        assert abs(mine[0] - true[0]) * size <= 2.0
        assert abs(mine[-1] - true[-1]) * size <= 2.0
    apart = np.argwhere(result).mean(0) - np.argwhere(truth).mean(0)
    # No shift: the centres agree to a quarter of the network's voxel of 2 mm.
    assert np.abs(affine[:3, :3] @ apart).max() < 0.5
    assert dice(result, truth) > 0.9


def test_structures_are_written_as_abdomenatlas_has_them(
    network, tmp_path, config_for, save_phantom
):
    truth = save_phantom(tmp_path / "in" / "BDMAP_00000001" / "ct.nii.gz", codes="LPS")
    config = config_for(tmp_path / "in", tmp_path / "out", form="structures")
    assert predict.run(config, tmp_path / "work") == 0
    folder = tmp_path / "out" / "BDMAP_00000001" / "segmentations"
    names = {path.name: np.asanyarray(nib.load(path).dataobj) for path in folder.iterdir()}
    assert set(names) == {
        *("kidney_left.nii.gz", "kidney_right.nii.gz", "liver.nii.gz", "tumor.nii.gz")
    }
    for name in ("kidney_left", "kidney_right", "liver"):
        np.testing.assert_array_equal(names[f"{name}.nii.gz"], truth == LABELS[name])
    np.testing.assert_array_equal(names["tumor.nii.gz"], truth == LABELS["liver_lesion"])
    assert not list(folder.parent.glob(".*"))


def test_labels_json_names_the_values(network, tmp_path, config_for, save_phantom):
    save_phantom(tmp_path / "in" / "a.nii.gz")
    predict.run(config_for(tmp_path / "in" / "a.nii.gz", tmp_path / "out"), tmp_path / "work")
    record = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert record["labels"] == {
        "background": 0,
        "kidney_left": 3,
        "kidney_right": 4,
        "liver": 5,
        "tumor": 27,
    }


def test_bad_scans_are_set_aside_and_the_rest_goes_on(
    network, tmp_path, capsys, config_for, phantom, save_phantom, rng
):
    source = tmp_path / "in"
    save_phantom(source / "a_0000.nii.gz")
    save_phantom(source / "z_0000.nii.gz")
    whole = (source / "a_0000.nii.gz").read_bytes()
    (source / "b_0000.nii.gz").write_bytes(whole[:200])
    image, _ = phantom((20, 20, 20), (2, 2, 2))
    nib.save(nib.Nifti1Image(np.stack([image] * 2, -1), np.eye(4)), source / "c_0000.nii.gz")
    save_phantom(source / "d_0000.nii.gz")
    save_phantom(source / "d_0001.nii.gz")
    save_phantom(source / "e e.nii.gz")
    shifted = phantom((20, 20, 20), (2, 2, 2))[0] + np.int16(1024)
    nib.save(nib.Nifti1Image(shifted, np.eye(4)), source / "g.nii.gz")
    save_phantom(source / "f_0001.nii.gz")
    holes = image.astype(np.float32)
    holes[2, 3, 4] = np.nan
    nib.save(nib.Nifti1Image(holes, np.eye(4)), source / "h_0000.nii.gz")
    bright = rng.uniform(0, 1, image.shape).astype(np.float32)
    nib.save(nib.Nifti1Image(bright, np.eye(4)), source / "i_0000.nii.gz")
    (source / "j_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert predict.run(config_for(source, tmp_path / "out"), tmp_path / "work") == 1
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"a.nii.gz", "z.nii.gz", "f_0001.nii.gz", "labels.json"}
    rows = {row["case"]: row for row in read_csv(tmp_path / "work" / "rejected.csv")}
    assert {case: row["stage"] for case, row in rows.items()} == {
        "b": "read", "c": "read", "d": "find", "e e": "find", "g": "read", "h": "read",
        "i": "read", "j": "read",
    }  # fmt: skip
    assert "1 voxels are NaN" in rows["h"]["reason"]
    assert "no CT in HU" in rows["i"]["reason"]
    assert "j_0000.nii.gz: not readable to its end" in rows["j"]["reason"]
    assert "b_0000.nii.gz: not readable to its end" in rows["b"]["reason"]
    assert "4D" in rows["c"]["reason"]
    assert "no Hounsfield units" in rows["g"]["reason"]
    assert "2 files of one case (d_0000.nii.gz, d_0001.nii.gz)" in rows["d"]["reason"]
    assert "rejected.csv" in capsys.readouterr().out

    for name in ("b_0000", "c_0000", "d_0001", "e e", "g", "h_0000", "i_0000", "j_0000"):
        (source / f"{name}.nii.gz").unlink()
    assert predict.run(config_for(source, tmp_path / "out"), tmp_path / "work") == 0
    assert not (tmp_path / "work" / "rejected.csv").exists()
    assert (tmp_path / "out" / "d.nii.gz").exists()


def test_finished_scans_are_skipped_and_never_mixed(
    network, tmp_path, capsys, monkeypatch, by_brightness, config_for, save_phantom
):
    source, output = tmp_path / "in", tmp_path / "out"
    save_phantom(source / "a.nii.gz")
    predict.run(config_for(source, output), tmp_path / "work")
    before = (output / "a.nii.gz").stat().st_mtime_ns
    capsys.readouterr()
    # Another batch size gives the same masks.
    config = config_for(source, output, **{"inference.batch_size": 1})
    assert predict.run(config, tmp_path / "work") == 0
    assert (output / "a.nii.gz").stat().st_mtime_ns == before
    assert "already finished" in capsys.readouterr().out

    with pytest.raises(UserError, match=r"inference\.overlap was 0\.5 and is 0\.25"):
        predict.run(config_for(source, output, **{"inference.overlap": 0.25}), tmp_path / "work")
    other = Partial(by_brightness, jnp.array([0.1, 0.2, 0.3, 0.4]))
    monkeypatch.setattr(checkpoints, "load_model", lambda folder, step: (other, network))
    with pytest.raises(UserError, match="weights_sha256"):
        predict.run(config_for(source, output), tmp_path / "work")
    (output / "labels.json").unlink()
    with pytest.raises(UserError, match=r"no labels\.json"):
        predict.run(config_for(source, output), tmp_path / "work")


def test_a_killed_write_leaves_no_mask(network, tmp_path, monkeypatch, config_for, save_phantom):
    save_phantom(tmp_path / "in" / "a.nii.gz")
    config = config_for(tmp_path / "in", tmp_path / "out", form="structures")
    write = outputs.write_mask

    def killed(path, mask, like):
        if path.name.startswith("liver"):
            raise KeyboardInterrupt
        write(path, mask, like)

    monkeypatch.setattr(outputs, "write_mask", killed)
    with pytest.raises(KeyboardInterrupt):
        predict.run(config, tmp_path / "work")
    assert not (tmp_path / "out" / "a" / "segmentations").exists()
    monkeypatch.setattr(outputs, "write_mask", write)
    assert predict.run(config, tmp_path / "work") == 0
    assert len(list((tmp_path / "out" / "a" / "segmentations").iterdir())) == 4


def test_a_full_disk_is_said_so(network, tmp_path, monkeypatch, config_for, save_phantom):
    save_phantom(tmp_path / "in" / "a.nii.gz")

    def full(path, mask, like):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "write_mask", full)
    with pytest.raises(UserError, match="no space left"):
        predict.run(config_for(tmp_path / "in", tmp_path / "out"), tmp_path / "work")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": ""}, "config.checkpoint is empty"),
        ({"input": ""}, "config.input is empty"),
        ({"input": "nowhere"}, "nowhere: no such file"),
        ({"form": "rtstruct"}, "Expected one of labels, structures"),
        ({"inference.overlap": 1.5}, "overlap is 1.5"),
        ({"checkpoint": "('a', 3)"}, "no sequence of paths"),
        ({"num_parts": 2, "part": 2}, "Expected a part from 0"),
        ({"probabilities": ("spleen",)}, "'spleen', which the checkpoint does not know"),
        ({"probability_format": "npz"}, "Expected one of nifti, zarr"),
        ({"names": {"cancer": "liver_lesion"}}, "config.names has 'cancer', which the checkpoint"),
        ({"cleanup.minimum_mm3": -1.0}, "Expected numbers from 0 on"),
        ({"form": "dicom"}, "a.nii.gz: NIfTI, and a DICOM segmentation has to name"),
        ({"msd": "Task05_Prostate"}, "Expected one of Task03_Liver, Task07_Pancreas"),
    ],
)
def test_wrong_configs_are_named(network, tmp_path, change, message, config_for, save_phantom):
    save_phantom(tmp_path / "in" / "a.nii.gz")
    names = change.pop("names", {})
    config = config_for(tmp_path / "in", tmp_path / "out", **change)
    config.names = names
    with pytest.raises(UserError, match=message):
        predict.run(config, tmp_path / "work")


def test_output_among_the_scans_and_folders_without_scans_are_refused(
    network, tmp_path, config_for, save_phantom
):
    save_phantom(tmp_path / "in" / "a.nii.gz")
    for source in (tmp_path / "in", tmp_path / "in" / "a.nii.gz"):
        with pytest.raises(UserError, match="where the scans are"):
            predict.run(config_for(source, tmp_path / "in"), tmp_path / "work")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="imagesTs"):
        predict.run(config_for(tmp_path / "empty", tmp_path / "out"), tmp_path / "work")


def test_a_trained_network_predicts_by_its_own_config(rng, tmp_path, config_for, save_phantom):
    """From a checkpoint on disk; the masks are those of the network on the prepared scan."""
    model = {"name": "resenc_unet", "widths": [4, 8], "blocks": [1, 1], "dtype": "float32"}
    trained = {
        "task": {"classes": CLASSES},
        "model": model,
        "training": {"patch_size": [16, 16, 16]},
        "preparation": {"spacing": [2.0, 2.0, 2.0], "window": list(WINDOW)},
    }
    folder = tmp_path / "cell"
    write_json_atomic(folder / "config.json", trained)
    # Weights from numpy: drawing them in JAX compiles a program for each shape.
    apply, parameters = checkpoints.abstract_model(ConfigDict(trained))
    state = {
        "parameters": {
            name: jnp.asarray(rng.standard_normal(value.shape) * 0.3, jnp.float32)
            for name, value in parameters.items()
        }
    }
    with checkpoints.open_manager(folder) as manager:
        checkpoints.save(manager, 7, state, position=0)
        manager.wait_until_finished()

    save_phantom(tmp_path / "in" / "a.nii.gz", (33, 30, 28), (2.2, 2.0, 2.5), "LPS")
    config = config_for(tmp_path / "in", tmp_path / "out", checkpoint=str(folder))
    assert predict.run(config, tmp_path / "work") == 0
    result = nib.load(tmp_path / "out" / "a.nii.gz")

    scan = nib.load(tmp_path / "in" / "a.nii.gz")
    image, affine = geometry.to_canonical(np.asanyarray(scan.dataobj), scan.affine)
    image = geometry.prepare_image(image, geometry.spacing_of(affine), (2.0, 2.0, 2.0), WINDOW)
    network = Partial(apply, state["parameters"])
    probabilities = sliding_window.predict(network, image, (16, 16, 16), skip_air=True)
    every = [geometry.resample_to_shape(probabilities[..., c], (33, 30, 28), 1) for c in range(4)]
    winner = np.argmax(every, axis=0)
    values = np.asanyarray(geometry.to_canonical(np.asanyarray(result.dataobj), scan.affine)[0])
    assert len(np.unique(winner)) > 1
    assert (class_table(CLASSES)[values] == winner).mean() > 0.9995

    other = trained | {"model": model | {"widths": [4, 12]}}
    write_json_atomic(folder / "config.json", other)
    with pytest.raises(UserError, match="checkpoint of another network"):
        predict.run(config, tmp_path / "work")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        predict.run(config, tmp_path / "work")


# ---------------------------------------------------------------------------- beside the masks


def test_what_is_beside_the_masks_is_for_finished_scans_alone(
    network, tmp_path, config_for, save_phantom
):
    source, output = tmp_path / "in", tmp_path / "out"
    truth = save_phantom(source / "a.nii.gz", codes="LPS")
    (source / "broken.nii.gz").write_bytes(b"no NIfTI")
    config = config_for(source, output, statistics=True, preview=True)
    assert predict.run(config, tmp_path / "work") == 1
    assert {path.name for path in output.iterdir()} == {"a", "a.nii.gz", "labels.json"}
    assert {path.name for path in (output / "a").iterdir()} == {"statistics.json", "preview.png"}
    found = json.loads((output / "a" / "statistics.json").read_text())["structures"]
    voxels = {name: one["voxels"] for name, one in found.items()}
    values = {"kidney_left": 3, "kidney_right": 4, "liver": 5, "tumor": 27}
    assert voxels == {name: (truth == value).sum() for name, value in values.items()}
    assert found["tumor"]["lesion_count"] == 1
    centre = np.argwhere(truth == 27).mean(axis=0)
    affine = nib.load(source / "a.nii.gz").affine
    np.testing.assert_allclose(
        found["tumor"]["centre_mm"], nib.affines.apply_affine(affine, centre), atol=1e-3
    )

    # What is missing of a finished scan is made, and the same mask with it.
    before = (output / "a.nii.gz").read_bytes()
    (output / "a" / "statistics.json").unlink()
    assert predict.run(config, tmp_path / "work") == 1
    assert json.loads((output / "a" / "statistics.json").read_text())["structures"] == found
    assert (output / "a.nii.gz").read_bytes() == before


@pytest.mark.parametrize("kind", ["nifti", "zarr"])
def test_probabilities_are_kept_as_float16_on_the_scans_grid(
    network, tmp_path, config_for, save_phantom, kind
):
    save_phantom(tmp_path / "in" / "a.nii.gz", (50, 30, 22), (1.3, 1.9, 2.5), "PIR")
    config = config_for(
        tmp_path / "in",
        tmp_path / "out",
        probabilities=("tumor", "kidney"),
        probability_format=kind,
    )
    assert predict.run(config, tmp_path / "work") == 0
    scan = nib.load(tmp_path / "in" / "a.nii.gz")
    image, affine = geometry.to_canonical(np.asanyarray(scan.dataobj), scan.affine)
    image = geometry.prepare_image(image, geometry.spacing_of(affine), (2.0, 2.0, 2.0), WINDOW)
    apply, _ = checkpoints.load_model("cell", None)
    grid = sliding_window.predict(apply, image, (16, 16, 16), skip_air=True)
    folder = tmp_path / "out" / "a" / "probabilities"
    for name, index in (("kidney", 1), ("tumor", 3)):
        expected = geometry.resample_to_shape(grid[..., index], (50, 30, 22), 1)
        expected = geometry.from_canonical(expected, scan.affine).astype(np.float16)
        if kind == "nifti":
            file = nib.load(folder / f"{name}.nii.gz")
            np.testing.assert_array_equal(file.affine, scan.affine)
            found = np.asanyarray(file.dataobj)
        else:
            spec = {"driver": "zarr3", "kvstore": f"file://{folder / name}.zarr/"}
            store = ts.open(spec, open=True).result()
            assert store.dtype == ts.float16
            found = store.read().result()
            attributes = json.loads((folder / f"{name}.zarr" / "zarr.json").read_text())
            assert attributes["attributes"]["class"] == name
            np.testing.assert_allclose(attributes["attributes"]["affine"], scan.affine)
        assert found.max() > 0.5
        np.testing.assert_array_equal(found, expected)
    assert not list(folder.glob(".*"))


def test_a_lesion_away_from_its_organ_is_removed_and_the_record_says_so(
    network, tmp_path, config_for, phantom
):
    image, labels = phantom((40, 32, 30), (2, 2, 2))
    # Tumour HU in a corner, far from liver and kidneys.
    image[2:6, 2:6, 2:6] = 200
    source = tmp_path / "in" / "a.nii.gz"
    source.parent.mkdir()
    nib.save(nib.Nifti1Image(image, np.diag([2.0, 2, 2, 1])), source)
    assert predict.run(config_for(source, tmp_path / "raw"), tmp_path / "work") == 0
    raw = np.asanyarray(nib.load(tmp_path / "raw" / "a.nii.gz").dataobj)
    assert (raw[2:6, 2:6, 2:6] == 27).all()
    config = config_for(source, tmp_path / "clean", **{"cleanup.organ_distance": 4.0})
    assert predict.run(config, tmp_path / "work2") == 0
    clean = np.asanyarray(nib.load(tmp_path / "clean" / "a.nii.gz").dataobj)
    assert not clean[:8, :8, :8].any()
    np.testing.assert_array_equal(clean[8:], raw[8:])
    record = json.loads((tmp_path / "clean" / "labels.json").read_text())
    assert record["cleanup"]["hosts"] == {"tumor": ["kidney_left", "kidney_right", "liver"]}
    with pytest.raises(UserError, match="other settings"):
        predict.run(config_for(source, tmp_path / "clean"), tmp_path / "work2")

    network.task.classes = ConfigDict({"liver_lesion": ["liver_lesion"]})
    with pytest.raises(UserError, match="knows no organ of liver_lesion"):
        predict.run(config, tmp_path / "work3")


# ---------------------------------------------------------------------------- sharing the work


def test_parts_divide_the_scans_and_share_the_list_of_rejected_ones(
    network, tmp_path, config_for, save_phantom
):
    for case in "abcd":
        save_phantom(tmp_path / "in" / f"{case}.nii.gz", (20, 16, 16))
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"no NIfTI")
    save_phantom(tmp_path / "in" / "no name.nii.gz", (20, 16, 16))

    def part(number):
        config = config_for(tmp_path / "in", tmp_path / "out", num_parts=2, part=number)
        code = predict.run(config, tmp_path / "work")
        rows = read_csv(tmp_path / "work" / "rejected.csv")
        masks = {path.name[0] for path in (tmp_path / "out").glob("*.nii.gz")}
        return code, masks, [row["case"] for row in rows]

    assert part(0) == (1, {"a", "c"}, ["no name"])
    assert part(1) == (1, {"a", "c", "d"}, ["b", "no name"])
    # The first part again: what the second one set aside stays listed.
    assert part(0) == (1, {"a", "c", "d"}, ["b", "no name"])
    (tmp_path / "in" / "no name.nii.gz").unlink()
    save_phantom(tmp_path / "in" / "b.nii.gz", (20, 16, 16))
    config = config_for(tmp_path / "in", tmp_path / "out")
    assert predict.run(config, tmp_path / "work") == 0
    assert not (tmp_path / "work" / "rejected.csv").exists()


def test_a_scan_that_another_process_works_on_is_left_to_it(
    network, tmp_path, config_for, save_phantom, capsys
):
    for case in "ab":
        save_phantom(tmp_path / "in" / f"{case}.nii.gz", (20, 16, 16))
    output = tmp_path / "out"
    output.mkdir()
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import fcntl, sys\n"
            "file = open(sys.argv[1], 'w')\n"
            "fcntl.flock(file, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\n"
            "sys.stdin.read()",
            str(output / ".a.lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        config = config_for(tmp_path / "in", output)
        assert predict.run(config, tmp_path / "work") == 0
        assert {path.name for path in output.glob("*.nii.gz")} == {"b.nii.gz"}
        assert "1 scans are being worked on by other processes" in capsys.readouterr().out
    finally:
        holder.kill()
        holder.wait()
    # Killed: its lock is free, and what it left aside goes.
    (output / ".a.nii.gz.xyz.part").write_bytes(b"half")
    (output / "a").mkdir()
    (output / "a" / ".aside-xyz").mkdir()
    assert predict.run(config, tmp_path / "work") == 0
    assert {path.name for path in output.iterdir()} == {
        *("a", "a.nii.gz", "b.nii.gz", "labels.json")
    }
    assert not list((output / "a").iterdir())


def test_names_never_lead_out_of_the_output(network, tmp_path, config_for, save_phantom):
    save_phantom(tmp_path / "in" / "..a.nii.gz", (20, 16, 16))
    save_phantom(tmp_path / "in" / "b..nii.gz", (20, 16, 16))
    save_phantom(tmp_path / "in" / "good.nii.gz", (20, 16, 16))
    save_phantom(tmp_path / "elsewhere" / "..c" / "ct.nii.gz", (20, 16, 16))
    config = config_for(tmp_path / "in", tmp_path / "out")
    config.input = str(
        (
            str(tmp_path / "in"),
            str(tmp_path / "elsewhere" / "..c" / "ct.nii.gz"),
            "../../nowhere/x.nii.gz",
        )
    )
    before = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents}
    assert predict.run(config, tmp_path / "work") == 1
    rows = {row["case"]: row["reason"] for row in read_csv(tmp_path / "work" / "rejected.csv")}
    assert "not usable as a name" in rows["..c"]
    assert "no such file" in rows["x"]
    after = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents}
    added = {path.relative_to(tmp_path).parts[0] for path in after - before}
    assert added == {"out", "work"}
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} >= {"good.nii.gz"}
