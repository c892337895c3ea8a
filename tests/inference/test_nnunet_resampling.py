"""Splines as matrices: the numbers of scipy, of nnU-Net, and no class held at full size."""

import numpy as np
import pytest
from scipy import ndimage

from tumorjax.inference import nnunet_resampling as resampling

GRIDS = [
    # spacing, new spacing, shape, new shape, separate axis
    ((1, 1, 1), (1.5, 1.2, 0.8), (15, 16, 17), (10, 13, 21), None),
    ((5, 0.8, 0.8), (2.5, 1, 1), (6, 20, 21), (12, 16, 17), 0),
    ((1, 1, 2), (1.1, 1.1, 5), (12, 13, 15), (11, 12, 6), 2),
    ((0.2, 1, 1), (0.4, 1, 1), (20, 9, 8), (10, 9, 8), None),  # two thick axes
]


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize(("old", "new"), [(9, 14), (14, 9), (30, 31), (2, 7), (1, 3)])
def test_a_matrix_is_scipys_spline(old, new, order, rng):
    values = rng.standard_normal(old)
    expected = ndimage.zoom(values, new / old, order=order, mode="nearest", grid_mode=True)
    found = resampling.spline_matrix(old, new, order) @ values
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(resampling.spline_matrix(old, new, order).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(("spacing", "new_spacing", "shape", "new", "axis"), GRIDS)
def test_images_and_winners_are_nnunets(spacing, new_spacing, shape, new, axis, rng):
    nnunet = pytest.importorskip("nnunetv2.preprocessing.resampling.default_resampling")
    assert resampling.separate_axis(spacing, new_spacing) == axis
    arguments = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    values = rng.standard_normal((3, *shape)).astype(np.float32)
    function = nnunet.resample_data_or_seg_to_shape
    for order in (1, 3):
        expected = function(values, new, spacing, new_spacing, order=order, **arguments)
        for layout in (np.ascontiguousarray, np.asfortranarray):
            found = resampling.resample(layout(values[0]), new, axis, order)
            np.testing.assert_allclose(found, expected[0], atol=1e-5)
    linear = function(values, new, spacing, new_spacing, order=1, **arguments)
    logits = np.moveaxis(values, 0, -1)
    winners = resampling.winners(logits, new, axis)
    # Neither is right where two logits are equal to float32.
    margin = np.diff(np.sort(linear, axis=0)[1:], axis=0)[0]
    np.testing.assert_array_equal(winners[margin > 1e-5], linear.argmax(0)[margin > 1e-5])
    expected = np.zeros(new, np.uint8)
    for value, region in zip((2, 1, 3), linear, strict=True):
        expected[region > 0] = value
    found = resampling.painted(logits, (2, 1, 3), new, axis)
    sure = (np.abs(linear) > 1e-5).all(0)
    np.testing.assert_array_equal(found[sure], expected[sure])


def test_a_grid_that_stays_keeps_its_values(rng):
    values = rng.standard_normal((5, 6, 7)).astype(np.float32)
    np.testing.assert_array_equal(resampling.resample(values, (5, 6, 7), None), values)
    logits = rng.standard_normal((5, 6, 7, 4)).astype(np.float32)
    found = resampling.winners(logits, (5, 6, 7), None)
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_force_separate_z_decides_where_it_is_given():
    assert resampling.separate_axis((1, 1, 4), (1, 1, 1), separate=False) is None
    assert resampling.separate_axis((1, 1, 1.5), (1, 1, 1), separate=True) == 2
    assert resampling.separate_axis((1, 1, 1.5), (1, 1, 4)) == 2
