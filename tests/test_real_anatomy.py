"""The loop learns real anatomy: a real CT with organ labels, from an nnU-Net data set to masks.

Run with `pytest -m slow tests/test_real_anatomy.py`; some minutes on 2 cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tumorjax.anatomy import LABELS
from tumorjax.metrics.overlap import dice

ROOT = Path(__file__).resolve().parents[1]
# TotalSegmentator's class numbers (version 2) of organs that tumorjax knows.
ORGANS = {
    "spleen": 1,
    "kidney_right": 2,
    "kidney_left": 3,
    "gall_bladder": 4,
    "liver": 5,
    "stomach": 6,
    "pancreas": 7,
    "aorta": 52,
    "postcava": 63,
}


def write_nnunet_dataset(source: Path, folder: Path) -> None:
    """Writes example_ct_sm and example_seg in nnU-Net's layout, organs numbered from 1."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    image = nib.load(source / "example_ct_sm.nii.gz")
    nib.save(image, folder / "imagesTr" / "torso_0000.nii.gz")
    seg = nib.load(source / "example_seg.nii.gz")
    values = np.asarray(seg.dataobj)
    label = np.zeros(values.shape, np.uint8)
    for number, value in enumerate(ORGANS.values(), start=1):
        label[values == value] = number
    nib.save(nib.Nifti1Image(label, seg.affine), folder / "labelsTr" / "torso.nii.gz")
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {name: i for i, name in enumerate(ORGANS, start=1)},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))


def _run(workdir: Path, config: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "tumorjax.main", f"--config=configs/{config}"]
    environment = os.environ | {"XLA_FLAGS": ""}
    subprocess.run(
        [*command, f"--workdir={workdir}", *arguments], cwd=ROOT, env=environment, check=True
    )


@pytest.mark.slow
def test_liver_and_spleen_of_a_real_scan_are_learned(real_data, tmp_path):
    write_nnunet_dataset(real_data / "totalsegmentator", tmp_path / "Dataset001_Torso")
    spacing = "(3.0,3.0,3.0)"
    store = tmp_path / "store"
    _run(
        tmp_path / "preparation",
        "preparation.py:nnunet",
        f"--config.input={tmp_path / 'Dataset001_Torso'}",
        f"--config.output={store}",
        f"--config.spacing={spacing}",
    )
    classes = {name: (name,) for name in ORGANS if not name.startswith("kidney")}
    classes["kidney"] = ("kidney_left", "kidney_right")
    _run(
        tmp_path / "training",
        "segmentation.py",
        f"--config.data.store={store}",
        f"--config.preparation.spacing={spacing}",
        f"--config.task.classes={classes}",
        "--config.training.steps=500",
        "--config.training.cross_entropy_weight=1.0",
        "--config.training.learning_rate=0.01",
        # One scan is to be learned by heart: mirrored ones are seven more to learn.
        "--config.augmentation.mirror_axes=()",
    )
    _run(
        tmp_path / "prediction",
        "prediction.py",
        f"--config.checkpoint={tmp_path / 'training'}",
        f"--config.input={tmp_path / 'Dataset001_Torso' / 'imagesTr'}",
        f"--config.output={tmp_path / 'masks'}",
    )
    (path,) = (tmp_path / "masks").glob("*.nii.gz")
    prediction = nib.load(path)
    truth = nib.load(real_data / "totalsegmentator" / "example_seg.nii.gz")
    assert np.allclose(prediction.affine, truth.affine)
    predicted, true = np.asarray(prediction.dataobj), np.asarray(truth.dataobj)
    for organ in ("liver", "spleen"):
        score = 100 * dice(true == ORGANS[organ], predicted == LABELS[organ])
        print(organ, round(float(score), 1))
        assert score > 90
