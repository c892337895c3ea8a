"""Tumours in scans without masks: organs are those that a network finds."""

import json

import nibabel as nib
import numpy as np
import pytest

from configs.synthesis import get_config
from tumorjax.anatomy import LABELS
from tumorjax.errors import UserError
from tumorjax.inference import organs


@pytest.fixture
def scan(tmp_path, phantom):
    """A scan without masks, with axes of its own; and the true labels in it, as in the file."""
    image, labels = phantom((48, 44, 40), (3.0, 3.0, 3.0))
    affine = np.diag([-3.0, -3.0, 3.0, 1.0])
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(image[::-1, ::-1], affine), path)
    return path, labels[::-1, ::-1]


def config_of(tmp_path, path, **changes):
    config = get_config()
    config.input = str(path)
    config.output = str(tmp_path / "out")
    config.checkpoint_organs = "runs/organs"
    for key, value in changes.items():
        config[key] = value
    return config


@pytest.mark.parametrize("organ", ["liver", "kidney"])
def test_tumours_lie_in_the_organ_that_the_network_finds(tmp_path, network, scan, organ):
    path, labels = scan
    config = config_of(tmp_path, path, organ=organ, size="4")
    assert organs.run(config, tmp_path / "work") == 0
    mask = nib.load(tmp_path / "out" / "scan" / "segmentations" / f"{organ}_lesion.nii.gz")
    tumor = np.asanyarray(mask.dataobj) > 0
    names = [name for name in LABELS if name.startswith(organ)]
    inside = np.isin(labels[tumor], [LABELS[name] for name in names])
    # The network works at 2 mm: at the organ's border it may be a voxel off.
    assert inside.mean() > 0.9
    record = json.loads((tmp_path / "out" / "scan" / "synthesis.json").read_text())
    assert len(record["request"]["organs_from"]["weights_sha256"]) == 64


def test_a_network_without_the_organ_is_refused(tmp_path, network, scan):
    with pytest.raises(UserError, match=r"finds no pancreas: it tells apart kidney_left"):
        organs.run(config_of(tmp_path, scan[0], organ="pancreas"), tmp_path / "work")
    config = config_of(tmp_path, scan[0], masks=str(scan[0]))
    with pytest.raises(UserError, match="both given"):
        organs.run(config, tmp_path / "work")
