"""Predictions lie on the scans' own grids, whatever those are; bad scans do not stop the others."""

import json

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
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


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL", "PIR"])
def test_the_networks_own_grid_gives_the_truth_in_every_orientation(
    network, tmp_path, codes, config_for, save_phantom
):
    truth = save_phantom(tmp_path / "in" / "case_1_0000.nii.gz", codes=codes)
    config = config_for(tmp_path / "in", tmp_path / "out")
    assert predict.run(config, tmp_path / "work") == 0
    written = nib.load(tmp_path / "out" / "case_1.nii.gz")
    scan = nib.load(tmp_path / "in" / "case_1_0000.nii.gz")
    np.testing.assert_array_equal(written.affine, scan.affine)
    assert nib.aff2axcodes(written.affine) == tuple(codes)
    # The class "tumor" unites labels: it has the id of the first, liver_lesion's.
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
    network, tmp_path, capsys, config_for, phantom, save_phantom
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
    assert predict.run(config_for(source, tmp_path / "out"), tmp_path / "work") == 1
    written = {path.name for path in (tmp_path / "out").iterdir()}
    masks = {f"{case}.nii.gz" for case in ("a", "z", "f_0001")}
    assert written == masks | {"a", "z", "f_0001", "labels.json"}
    rows = {row["case"]: row for row in read_csv(tmp_path / "work" / "rejected.csv")}
    assert {case: row["stage"] for case, row in rows.items()} == {
        "b": "read", "c": "read", "d": "find", "e e": "find", "g": "read"
    }  # fmt: skip
    assert "b_0000.nii.gz: not readable to its end" in rows["b"]["reason"]
    assert "4D" in rows["c"]["reason"]
    assert "no Hounsfield units" in rows["g"]["reason"]
    assert "2 files of one case (d_0000.nii.gz, d_0001.nii.gz)" in rows["d"]["reason"]
    assert "rejected.csv" in capsys.readouterr().out

    for name in ("b_0000", "c_0000", "d_0001", "e e", "g"):
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
    ],
)
def test_wrong_configs_are_named(network, tmp_path, change, message, config_for, save_phantom):
    save_phantom(tmp_path / "in" / "a.nii.gz")
    config = config_for(tmp_path / "in", tmp_path / "out", **change)
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
