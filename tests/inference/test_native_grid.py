"""Labels on a scan's own grid are those of interpolating every class, and sides are sides."""

import numpy as np
import pytest

from tumorjax import geometry
from tumorjax.anatomy import LABELS
from tumorjax.errors import UserError
from tumorjax.inference.native_grid import (
    Structure,
    argmax_on_grid,
    body_middle,
    native_labels,
    structures,
)


@pytest.mark.parametrize("shape", [(23, 8, 19), (30, 30, 30), (7, 5, 12), (60, 64, 11)])
def test_argmax_equals_that_of_all_classes_at_once(rng, shape):
    blocks = rng.dirichlet(np.full(6, 0.2), (6, 6, 6)).astype(np.float32)
    probabilities = blocks.repeat(5, 0).repeat(5, 1).repeat(5, 2)
    # One class that wins nowhere, two that are only in a part of the volume, as organs are.
    probabilities[..., 3] *= 0.1
    for index, part in ((1, np.s_[5:12, 20:28, :9]), (2, np.s_[10:11, 4:22, 25:])):
        outside = np.ones((30, 30, 30), bool)
        outside[part] = False
        probabilities[outside, index] = 0
    probabilities[..., 0] += 1 - probabilities.sum(axis=-1)
    every = [geometry.resample_to_shape(probabilities[..., c], shape, 1) for c in range(6)]
    result = argmax_on_grid(probabilities, shape)
    assert set(np.unique(result)) >= {0, 4, 5}
    # The winner's probability is the highest one up to rounding.
    mine = np.take_along_axis(np.array(every), result[None].astype(int), axis=0)[0]
    np.testing.assert_allclose(mine, np.max(every, axis=0), atol=1e-6)
    background = np.zeros((4, 4, 4, 3), np.float32)
    background[..., 0] = 1
    assert not argmax_on_grid(background, shape).any()


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
