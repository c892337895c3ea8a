"""A network that knows classes by their HU alone, and phantoms for it: so the truth is known."""

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from jax.tree_util import Partial
from ml_collections import ConfigDict

from configs.prediction import get_config
from tumorjax.anatomy import LABELS
from tumorjax.training import checkpoints

CLASSES = {
    "kidney": ["kidney_left", "kidney_right"],
    "liver": ["liver"],
    "tumor": ["liver_lesion", "kidney_lesion"],
}
# Class -> the HU that the network takes for it.
HU = {"kidney": 60.0, "liver": 120.0, "tumor": 200.0}
WINDOW = (-175.0, 250.0)


def _by_brightness(centres, x):
    return -jnp.square((x - centres) * 40)


@pytest.fixture
def by_brightness():
    """(brightness of each class in [0, 1], x) -> logits."""
    return _by_brightness


@pytest.fixture
def network(monkeypatch):
    """The configuration of the network that any checkpoint's folder then holds."""
    trained = ConfigDict(
        {
            "task": {"classes": CLASSES},
            "training": {"patch_size": (16, 16, 16)},
            "preparation": {"spacing": (2.0, 2.0, 2.0), "window": WINDOW},
        }
    )
    values = np.array([-175.0, *(HU[name] for name in CLASSES)])
    centres = jnp.asarray((values - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), jnp.float32)
    apply = Partial(_by_brightness, centres)
    monkeypatch.setattr(checkpoints, "load_model", lambda folder, step: (apply, trained))
    return trained


def _phantom(shape, spacing):
    x, y, z = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij")
    labels = np.zeros(shape, np.uint8)
    middle = (abs(y - 0.5) < 0.25) & (abs(z - 0.5) < 0.3)
    labels[(abs(x - 0.2) < 0.12) & middle] = LABELS["kidney_left"]
    labels[(abs(x - 0.8) < 0.12) & middle] = LABELS["kidney_right"]
    labels[(abs(x - 0.5) < 0.12) & middle] = LABELS["liver"]
    labels[(abs(x - 0.5) < 0.06) & (abs(y - 0.5) < 0.12) & (abs(z - 0.5) < 0.15)] = LABELS[
        "liver_lesion"
    ]
    image = np.full(shape, -1000.0)
    for name, hu in {
        "kidney_left": HU["kidney"],
        "kidney_right": HU["kidney"],
        "liver": HU["liver"],
        "liver_lesion": HU["tumor"],
    }.items():
        image[labels == LABELS[name]] = hu
    return image.astype(np.int16), labels


@pytest.fixture
def phantom():
    """(shape, spacing) -> a RAS+ volume in HU and its label map: organs and a tumour in air."""
    return _phantom


def _turned(array, spacing, codes):
    start = nib.orientations.axcodes2ornt("RAS")
    there = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-100, -50, 30)
    stored = nib.orientations.apply_orientation(array, there)
    return stored, affine @ nib.orientations.inv_ornt_aff(there, array.shape)


@pytest.fixture
def turned():
    """(array in RAS+, spacing, codes) -> the array stored as `codes`, and its affine."""
    return _turned


@pytest.fixture
def save_phantom():
    """(path, shape, spacing, codes) -> labels of the phantom that it saves, as stored."""

    def save(path, shape=(40, 32, 30), spacing=(2.0, 2.0, 2.0), codes="RAS"):
        image, labels = _phantom(shape, spacing)
        stored, affine = _turned(image, spacing, codes)
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(stored, affine), path)
        return _turned(labels, spacing, codes)[0]

    return save


@pytest.fixture
def config_for():
    """(input, output, changes) -> configuration of the prediction job; masks alone are wanted."""

    def make(source, output, variant="nifti", **changes):
        config = get_config(variant)
        config.checkpoint = "cell"
        config.input, config.output = str(source), str(output)
        config.statistics = config.preview = False
        config.update_from_flattened_dict(changes)
        return config

    return make
