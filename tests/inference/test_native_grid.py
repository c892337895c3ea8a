"""Labels on a scan's own grid have the ids of anatomy, and sides are sides."""

import numpy as np
import pytest

from tumorjax.anatomy import LABELS
from tumorjax.errors import UserError
from tumorjax.inference.native_grid import (
    Structure,
    body_middle,
    native_labels,
    structures,
)


def test_the_middle_is_the_bodys_not_the_volumes(rng):
    image = np.zeros((100, 20, 10), np.float32)
    image[60:80, 5:15] = rng.uniform(0.1, 1, (20, 10, 10))
    assert body_middle(image) == pytest.approx(0.7, abs=0.006)
    assert body_middle(np.zeros((5, 4, 3))) == 0.5


def test_values_are_anatomys_ids_and_pairs_have_sides():
    table = structures(
        {
            "kidney": ("kidney_right", "kidney_left"),
            "lesion": ("liver_lesion", "kidney_lesion"),
            "my_liver": ("liver",),
            "spleen": ("spleen",),
        }
    )
    assert table == [
        Structure("kidney_left", LABELS["kidney_left"], 1, "left"),
        Structure("kidney_right", LABELS["kidney_right"], 1, "right"),
        Structure("lesion", LABELS["liver_lesion"], 2, ""),
        Structure("liver", LABELS["liver"], 3, ""),
        Structure("spleen", LABELS["spleen"], 4, ""),
    ]
    with pytest.raises(UserError, match="unknown label 'livr'"):
        structures({"liver": ("livr",)})


def test_sides_are_told_by_the_middle_of_the_body(rng):
    # A body in the upper part of the field of view, both kidneys beyond the volume's own middle.
    image = np.zeros((40, 10, 10), np.float32)
    image[16:36] = rng.uniform(0.1, 1, (20, 10, 10))
    probabilities = np.zeros((40, 10, 10, 2), np.float32)
    probabilities[..., 0] = 1
    for x in (22, 30):
        probabilities[x : x + 2, 4:6, 4:6] = (0.1, 0.9)
    table = structures({"kidney": ("kidney_left", "kidney_right")})
    labels = native_labels(probabilities, image, (80, 20, 20), table)
    sides = {value: np.argwhere(labels == value)[:, 0] for value in (3, 4)}
    assert set(np.unique(labels)) == {0, 3, 4}
    assert sides[LABELS["kidney_left"]].mean() == pytest.approx(45.5)
    assert sides[LABELS["kidney_right"]].mean() == pytest.approx(61.5)
