"""Several networks: the mean of their probabilities, on each one's own grid or on the scan's."""

import json

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from jax.tree_util import Partial
from ml_collections import ConfigDict

from tumorjax import geometry
from tumorjax.errors import UserError
from tumorjax.files import read_csv
from tumorjax.inference import ensemble, predict, sliding_window
from tumorjax.inference.native_grid import native_labels, structures
from tumorjax.training import checkpoints

WINDOW = (-175.0, 250.0)
CLASSES = {"kidney": ["kidney_left", "kidney_right"], "liver": ["liver"]}


def blurred(scale, offset, x):
    """Logits of three classes that depend on the brightness, differently for each member."""
    return jnp.concatenate(
        [jnp.zeros_like(x), (x - 0.4) * scale, (x - 0.6) * scale * 3 + offset], axis=-1
    )


MEMBERS = {
    "a": {"weights": (6.0, 0.1), "spacing": (2.0, 2.0, 2.0), "patch_size": (16, 16, 16)},
    "b": {"weights": (9.0, -0.4), "spacing": (2.0, 2.0, 2.0), "patch_size": (24, 16, 16)},
    "c": {"weights": (4.0, 0.5), "spacing": (3.0, 2.5, 2.0), "patch_size": (16, 16, 16)},
}


@pytest.fixture
def members(monkeypatch):
    """Folder -> (network, configuration), which any test may change."""
    made = {}
    for name, one in MEMBERS.items():
        trained = ConfigDict(
            {
                "task": {"classes": CLASSES},
                "training": {"patch_size": one["patch_size"]},
                "preparation": {"spacing": one["spacing"], "window": WINDOW},
            }
        )
        made[name] = (Partial(blurred, *map(jnp.float32, one["weights"])), trained)
    monkeypatch.setattr(checkpoints, "load_model", lambda folder, step: made[str(folder)])
    return made


@pytest.fixture
def scan(tmp_path, rng, turned):
    """A file of smooth noise, 1.4 x 2.1 x 2.6 mm, in LPI."""
    coarse = rng.uniform(-300, 300, (9, 8, 7))
    image = geometry.resample_to_shape(coarse, (50, 34, 24), 3).astype(np.int16)
    image[0, 0, 0] = -1000
    stored, affine = turned(image, (1.4, 2.1, 2.6), "LPI")
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "in" / "x.nii.gz")
    return tmp_path / "in" / "x.nii.gz"


def native(members, name, scan):
    """A member's probabilities on the scan's own grid [x, y, z, classes], and what it saw."""
    apply, trained = members[name]
    file = nib.load(scan)
    image, affine = geometry.to_canonical(np.asanyarray(file.dataobj), file.affine)
    seen = geometry.prepare_image(
        image, geometry.spacing_of(affine), trained.preparation.spacing, WINDOW
    )
    found = sliding_window.predict(apply, seen, trained.training.patch_size, skip_air=True)
    every = [geometry.resample_to_shape(found[..., c], image.shape, 1) for c in range(3)]
    return np.stack(every, -1), seen


@pytest.mark.parametrize("names", [("a", "b"), ("a", "c"), ("a", "b", "c"), ("c", "a", "b")])
def test_labels_are_those_of_the_mean_probability_on_the_scans_grid(
    members, scan, tmp_path, config_for, names
):
    config = config_for(scan, tmp_path / "out", probabilities=("liver",))
    config.checkpoint = str(names)
    assert predict.run(config, tmp_path / "work") == 0
    found = np.asanyarray(nib.load(tmp_path / "out" / "x.nii.gz").dataobj)
    affine = nib.load(scan).affine
    found, _ = geometry.to_canonical(found, affine)

    every = [native(members, name, scan) for name in names]
    mean = np.mean([one for one, _ in every], axis=0)
    expected = native_labels(mean, every[0][1], mean.shape[:3], structures(CLASSES))
    best = np.sort(mean, axis=-1)
    sure = best[..., -1] - best[..., -2] > 1e-4
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found[sure], expected[sure])
    assert set(np.unique(found)) == {0, 3, 4, 5}
    # None of the members alone gives these labels.
    for one, seen in every:
        alone = native_labels(one, seen, mean.shape[:3], structures(CLASSES))
        assert (alone != expected).mean() > 0.003
    saved = nib.load(tmp_path / "out" / "x" / "probabilities" / "liver.nii.gz")
    saved, _ = geometry.to_canonical(np.asanyarray(saved.dataobj), affine)
    np.testing.assert_allclose(saved, mean[..., 2], atol=6e-4)


def test_the_record_has_every_member_and_refuses_others(members, scan, tmp_path, config_for):
    config = config_for(scan, tmp_path / "out")
    config.checkpoint = "('a', 'c')"
    predict.run(config, tmp_path / "work")
    record = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert [member["spacing"] for member in record["members"]] == [[2, 2, 2], [3, 2.5, 2]]
    assert record["labels"] == {"background": 0, "kidney_left": 3, "kidney_right": 4, "liver": 5}
    config.checkpoint = "('a', 'b')"
    with pytest.raises(UserError, match="made with other settings"):
        predict.run(config, tmp_path / "work")


@pytest.mark.parametrize(
    "classes",
    [
        {"kidney": ["kidney_left", "kidney_right"]},
        {"liver": ["liver"], "spleen": ["spleen"]},
        {"kidney": ["kidney_left", "kidney_right"], "liver": ["liver", "spleen"]},
    ],
)
def test_members_that_tell_other_classes_apart_are_refused(
    members, scan, tmp_path, config_for, classes
):
    members["b"][1].task.classes = ConfigDict(classes)
    config = config_for(scan, tmp_path / "out")
    config.checkpoint = "('a', 'b')"
    with pytest.raises(UserError, match=r"a tells apart kidney .*An ensemble needs the same"):
        predict.run(config, tmp_path / "work")
    assert not (tmp_path / "out").exists()


def test_a_step_is_of_one_checkpoint(members, scan, tmp_path, config_for):
    config = config_for(scan, tmp_path / "out", step=5)
    config.checkpoint = "('a', 'b')"
    with pytest.raises(UserError, match="there are 2 checkpoints"):
        predict.run(config, tmp_path / "work")


def test_members_of_one_grid_are_run_on_one_preparation(members, config_for):
    config = config_for("x", "y")
    config.checkpoint = "('a', 'b', 'c')"
    networks = ensemble.open_networks(config)
    assert networks[0].grid == networks[1].grid != networks[2].grid
    assert [len(group) for group in ensemble._groups(networks)] == [2, 1]


def test_no_scan_is_lost_where_one_cannot_be_read(members, scan, tmp_path, config_for):
    (scan.parent / "y.nii.gz").write_bytes(b"no NIfTI")
    config = config_for(scan.parent, tmp_path / "out")
    config.checkpoint = "('a', 'c')"
    assert predict.run(config, tmp_path / "work") == 1
    assert [row["case"] for row in read_csv(tmp_path / "work" / "rejected.csv")] == ["y"]
    assert (tmp_path / "out" / "x.nii.gz").exists()
