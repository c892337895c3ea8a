"""Surface metrics against google-deepmind/surface-distance, closed forms and real masks."""

import nibabel as nib
import numpy as np
import pytest
import surface_distance
from surface_distance import lookup_tables

from tumorjax.metrics import surface
from tumorjax.metrics.surface import (
    bounding_box,
    element_areas,
    hausdorff,
    neighbour_codes,
    normalized_surface_dice,
)

SPACINGS = [(1.0, 1.0, 1.0), (1.5, 1.5, 1.5), (0.7, 1.3, 2.9), (0.78125, 0.78125, 5.0)]


@pytest.fixture(autouse=True)
def _numpy_1_names(monkeypatch):
    """surface-distance 0.1 uses names that numpy 2 no longer has."""
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)


def reference(truth, prediction, spacing, tolerance, percentile):
    distances = surface_distance.compute_surface_distances(truth, prediction, spacing)
    with np.errstate(invalid="ignore"):
        return (
            surface_distance.compute_surface_dice_at_tolerance(distances, tolerance),
            surface_distance.compute_robust_hausdorff(distances, percentile),
        )


def ball(shape, center, radius):
    grid = np.indices(shape) - np.reshape(center, (3, 1, 1, 1))
    return (grid**2).sum(axis=0) <= radius**2


def agree(truth, prediction, spacing, tolerance, percentile=95):
    expected = reference(truth, prediction, spacing, tolerance, percentile)
    found = (
        normalized_surface_dice(truth, prediction, spacing, tolerance),
        hausdorff(truth, prediction, spacing, percentile),
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("spacing", [*SPACINGS, (3.0, 0.25, 0.1)])
def test_element_areas_are_those_of_marching_cubes(spacing):
    expected = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    np.testing.assert_allclose(element_areas(spacing), expected, rtol=1e-12)


def test_neighbour_codes_are_a_correlation_with_the_published_kernel(rng):
    from scipy import ndimage

    mask = rng.random((5, 6, 7)) < 0.4
    padded = np.pad(mask, ((0, 1), (0, 1), (0, 1))).astype(np.uint8)
    kernel = lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
    expected = ndimage.correlate(padded, kernel, mode="constant", cval=0)
    np.testing.assert_array_equal(neighbour_codes(mask), expected)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("density", [0.002, 0.03, 0.3, 0.9])
def test_random_noise_agrees_with_the_reference(rng, spacing, density):
    truth, prediction = rng.random((2, 17, 12, 15)) < density
    for tolerance in (0.0, 0.7, 1.0, 1.5, 2.0, 3.3, 50.0):
        agree(truth, prediction, spacing, tolerance)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_balls_at_the_border_agree_with_the_reference(rng, spacing):
    for _ in range(6):
        centers = rng.uniform(0, 24, (2, 3))  # some reach over the border
        truth, prediction = (ball((24, 24, 24), c, rng.uniform(2, 9)) for c in centers)
        for tolerance, percentile in ((1.0, 100), (2.0, 95), (4.0, 50), (9.0, 0)):
            agree(truth, prediction, spacing, tolerance, percentile)


@pytest.mark.parametrize("multiple", range(1, 8))
@pytest.mark.parametrize("size", [0.1, 0.7, 0.78125, 1.3])
def test_a_distance_equal_to_the_tolerance_counts_as_the_reference_counts_it(multiple, size):
    truth, prediction = np.zeros((2, 20, 9, 9), bool)
    truth[3:9, 2:7, 2:7] = True
    prediction[3 : 9 + multiple, 2:7, 2:7] = True
    for tolerance in (multiple * size, round(multiple * size, 6)):
        agree(truth, prediction, (size, size, size), tolerance)


def test_tree_and_distance_transform_give_the_same_distances(rng, monkeypatch):
    truth, prediction = rng.random((2, 20, 21, 22)) < 0.02
    by_tree, by_transform = [], []
    for share, results in ((1.1, by_tree), (-1.0, by_transform)):
        monkeypatch.setattr(surface, "_DENSE", share)
        results += surface.surface_distances(truth, prediction, (0.7, 1.3, 2.9))
    for tree, transform in zip(by_tree, by_transform, strict=True):
        np.testing.assert_allclose(tree, transform, rtol=1e-12)


def test_empty_masks(rng):
    empty, some = np.zeros((9, 9, 9), bool), rng.random((9, 9, 9)) < 0.1
    assert np.isnan(normalized_surface_dice(empty, empty, (1, 1, 1)))
    assert normalized_surface_dice(empty, some, (1, 1, 1)) == 0
    assert normalized_surface_dice(some, empty, (1, 1, 1)) == 0
    assert normalized_surface_dice(some, empty, (1, 1, 1), np.inf) == pytest.approx(1)
    assert np.isnan(hausdorff(empty, empty, (1, 1, 1)))
    assert hausdorff(empty, some, (1, 1, 1)) == hausdorff(some, empty, (1, 1, 1)) == np.inf
    agree(empty, some, (1.0, 2.0, 3.0), 1.0)
    agree(some, empty, (1.0, 2.0, 3.0), 1.0)


def test_a_volume_that_is_all_object_has_its_border_as_surface():
    full, inner = np.ones((8, 8, 8), bool), np.zeros((8, 8, 8), bool)
    inner[1:-1, 1:-1, 1:-1] = True
    assert normalized_surface_dice(full, full, (1, 1, 1), 0.0) == 1
    assert hausdorff(full, inner, (2.0, 2.0, 2.0), 50) == 2.0
    agree(full, inner, (2.0, 2.0, 2.0), 2.0)


def test_concentric_balls_are_their_difference_in_radius_apart():
    inner, outer = (ball((48, 48, 48), (24, 24, 24), radius) for radius in (12, 18))
    for percentile in (5, 50, 95):
        assert hausdorff(inner, outer, (0.5, 0.5, 0.5), percentile) == pytest.approx(3.0, abs=0.5)
    assert normalized_surface_dice(inner, outer, (0.5, 0.5, 0.5), 3.7) == 1
    assert normalized_surface_dice(inner, outer, (0.5, 0.5, 0.5), 2.0) == 0


def test_surface_of_a_ball_has_about_its_area():
    radius = 20
    areas = surface.surface_distances(*[ball((48, 48, 48), (24, 24, 24), radius)] * 2, (1, 1, 1))[2]
    assert areas.sum() == pytest.approx(4 * np.pi * radius**2, rel=0.1)


def test_both_are_symmetric_and_follow_the_unit(rng):
    truth, prediction = (ball((30, 30, 30), rng.uniform(10, 20, 3), 7) for _ in range(2))
    spacing = np.array((0.7, 1.3, 2.9))
    score = normalized_surface_dice(truth, prediction, spacing, 2.0)
    distance = hausdorff(truth, prediction, spacing)
    assert normalized_surface_dice(prediction, truth, spacing, 2.0) == pytest.approx(score)
    assert hausdorff(prediction, truth, spacing) == distance
    assert normalized_surface_dice(truth, prediction, spacing * 4, 8.0) == pytest.approx(score)
    assert hausdorff(truth, prediction, spacing * 4) == pytest.approx(4 * distance)


@pytest.mark.parametrize("case", ["case_00004", "case_00070", "case_00206"])
def test_real_kidney_tumours_agree_with_the_reference(real_data, case):
    image = nib.load(real_data / "kits19" / f"{case}.nii.gz")
    truth = np.asarray(image.dataobj) == 2
    spacing = [float(size) for size in image.header.get_zooms()]
    box = tuple(slice(max(s.start - 4, 0), s.stop + 4) for s in bounding_box(truth))
    truth = truth[box]
    prediction = np.roll(truth, (1, -2, 2), axis=(0, 1, 2))
    for tolerance in (1.0, 2.0, 5.0):
        agree(truth, prediction, spacing, tolerance)


def test_the_real_lung_tumour_agrees_with_the_reference(real_data):
    image = nib.load(real_data / "lung" / "lung1_tumour.nii.gz")
    truth = np.asarray(image.dataobj) > 0
    spacing = [float(size) for size in image.header.get_zooms()]
    prediction = np.roll(truth, (3, 1, 0), axis=(0, 1, 2))
    agree(truth, prediction, spacing, 2.0)


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, -1, 1), (1, np.nan, 1), (1, 1, np.inf)])
def test_unusable_spacings_are_refused(rng, spacing):
    mask = rng.random((4, 4, 4)) < 0.5
    with pytest.raises(ValueError, match="spacing"):
        normalized_surface_dice(mask, mask, spacing)


def test_unusable_tolerance_percentile_and_shape_are_refused(rng):
    mask = rng.random((4, 4, 4)) < 0.5
    with pytest.raises(ValueError, match="tolerance is -1"):
        normalized_surface_dice(mask, mask, (1, 1, 1), -1)
    with pytest.raises(ValueError, match="percentile is 101"):
        hausdorff(mask, mask, (1, 1, 1), 101)
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        hausdorff(mask[0], mask[0], (1, 1, 1))
