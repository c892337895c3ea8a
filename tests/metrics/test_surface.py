"""Surface metrics against google-deepmind/surface-distance, closed forms and real masks."""

import nibabel as nib
import numpy as np
import pytest
import surface_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from surface_distance import lookup_tables

from tumorjax.metrics import surface
from tumorjax.metrics.surface import (
    bounding_box,
    element_areas,
    hausdorff,
    neighbour_codes,
    normalized_surface_dice,
)

BACKENDS = ["host", "device"]
SPACINGS = [(1.0, 1.0, 1.0), (1.5, 1.5, 1.5), (0.7, 1.3, 2.9), (0.78125, 0.78125, 5.0)]


@pytest.fixture(autouse=True, scope="module")
def _numpy_1_names():
    """surface-distance 0.1 uses names that numpy 2 no longer has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "Inf", np.inf, raising=False)
        yield


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


def agree(truth, prediction, spacing, tolerance, percentile=95, backends=BACKENDS):
    """Both ways are within 1e-6 of the reference, and equal to each other to the last bit."""
    expected = reference(truth, prediction, spacing, tolerance, percentile)
    results = [
        (
            normalized_surface_dice(truth, prediction, spacing, tolerance, backend),
            hausdorff(truth, prediction, spacing, percentile, backend),
        )
        for backend in backends
    ]
    np.testing.assert_allclose(results[0], expected, rtol=0, atol=1e-6, equal_nan=True)
    for result in results[1:]:
        np.testing.assert_array_equal(result[0], results[0][0])
        np.testing.assert_allclose(result[1], results[0][1], rtol=1e-14, equal_nan=True)


@st.composite
def masks(draw):
    """Two masks: blobs, thin lines, single voxels, boxes up to the border, full or empty ones."""
    shape = draw(st.tuples(*[st.integers(1, 15)] * 2, st.integers(1, 31)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pair = []
    for _ in range(2):
        mask = np.zeros(shape, bool)
        match draw(st.sampled_from(["blob", "line", "voxel", "box", "full", "empty", "noise"])):
            case "blob":
                smooth = ndimage.gaussian_filter(rng.standard_normal(shape), rng.uniform(0.5, 3))
                mask = smooth > rng.uniform(-0.5, 2) * smooth.std()
            case "line":
                at = [rng.integers(size) for size in shape]
                at[rng.integers(3)] = slice(None)
                mask[tuple(at)] = True
            case "voxel":
                mask[tuple(rng.integers(size) for size in shape)] = True
            case "box":
                ends = [sorted(rng.integers(0, size + 1, 2)) for size in shape]
                mask[tuple(slice(*end) for end in ends)] = True
            case "full":
                mask[:] = True
            case "noise":
                mask = rng.random(shape) < rng.random()
        pair.append(mask)
    return pair


# Sizes whose squares are exact in double precision: two offsets of equal length then have equal
# rounded lengths, and it does not matter which of them the reference finds.
EXACT_SIZES = st.sampled_from([0.5, 0.75, 0.78125, 1.0, 1.5, 2.5, 3.0, 5.0])


@given(
    masks(),
    st.tuples(EXACT_SIZES, EXACT_SIZES, EXACT_SIZES),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)),
    st.sampled_from([0.0, 0.0, 1e-9, -1e-9, 0.3]),
    st.sampled_from([0, 13, 47, 93.7, 100]),  # no share that equal areas add up to
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_masks_and_tolerances_agree_with_the_reference(
    pair, spacing, offset, beside, percentile
):
    # A length that occurs between voxels, or a little beside it.
    length = float(np.sqrt(sum((n * size) ** 2 for n, size in zip(offset, spacing, strict=True))))
    tolerance = max(length + beside, 0.0)
    if not pair[0].any() and not pair[1].any():
        assert np.isnan(normalized_surface_dice(*pair, spacing, tolerance, "device"))
        return
    agree(*pair, spacing, tolerance, percentile)


@pytest.mark.parametrize("spacing", [*SPACINGS, (3.0, 0.25, 0.1)])
def test_element_areas_are_those_of_marching_cubes(spacing):
    expected = lookup_tables.create_table_neighbour_code_to_surface_area(spacing)
    np.testing.assert_allclose(element_areas(spacing), expected, rtol=1e-12)


def test_neighbour_codes_are_a_correlation_with_the_published_kernel(rng):
    mask = rng.random((5, 6, 7)) < 0.4
    padded = np.pad(mask, ((0, 1), (0, 1), (0, 1))).astype(np.uint8)
    kernel = lookup_tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
    expected = ndimage.correlate(padded, kernel, mode="constant", cval=0)
    np.testing.assert_array_equal(neighbour_codes(mask), expected)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("density", [0.002, 0.03, 0.3, 0.9])
def test_random_noise_agrees_with_the_reference(rng, spacing, density):
    truth, prediction = rng.random((2, 15, 12, 21)) < density
    for tolerance in (0.0, 0.7, 1.0, 1.5, 2.0, 2.9, 50.0, np.inf):
        agree(truth, prediction, spacing, tolerance)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_balls_at_the_border_agree_with_the_reference(rng, spacing):
    for _ in range(6):
        centers = rng.uniform(0, (15, 15, 24), (2, 3))  # some reach over the border
        truth, prediction = (ball((15, 15, 24), c, rng.uniform(2, 9)) for c in centers)
        for tolerance, percentile in ((1.0, 100), (2.0, 95), (4.0, 50), (9.0, 0)):
            agree(truth, prediction, spacing, tolerance, percentile)


@pytest.mark.parametrize("multiple", range(1, 8))
@pytest.mark.parametrize("size", [0.1, 0.7, 0.78125, 1.3])
def test_a_distance_equal_to_the_tolerance_counts_as_the_reference_counts_it(multiple, size):
    truth, prediction = np.zeros((2, 9, 9, 20), bool)
    truth[2:7, 2:7, 3:9] = True
    prediction[2:7, 2:7, 3 : 9 + multiple] = True
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_masks(rng, backend):
    empty, some = np.zeros((9, 9, 9), bool), rng.random((9, 9, 9)) < 0.1

    def nsd(truth, prediction, tolerance=2.0):
        return normalized_surface_dice(truth, prediction, (1, 1, 1), tolerance, backend)

    def distance(truth, prediction):
        return hausdorff(truth, prediction, (1, 1, 1), backend=backend)

    assert np.isnan(nsd(empty, empty))
    assert nsd(empty, some) == nsd(some, empty) == nsd(some, empty, 1e9) == 0
    assert nsd(some, empty, np.inf) == 1
    assert np.isnan(distance(empty, empty))
    assert distance(empty, some) == distance(some, empty) == np.inf
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


def real_pair(case, least):
    """A real mask and the same moved, cropped, and its spacing."""
    labels, spacing = case
    box = tuple(slice(max(s.start - 4, 0), s.stop + 4) for s in bounding_box(labels >= least))
    truth = labels[box] >= least
    return truth, np.roll(truth, (1, -2, 2), axis=(0, 1, 2)), spacing


def test_all_real_kidney_tumours_agree_with_the_reference(kits19):
    for number, case in enumerate(kits19):
        tolerance = (1.0, 2.0, 5.0, 12.0)[number % 4]
        agree(*real_pair(case, least=2), tolerance, backends=["host"])


@pytest.mark.slow
@pytest.mark.parametrize("least", [1, 2])
def test_all_real_kidneys_and_tumours_agree_on_both_backends(kits19, least):
    for case in kits19:
        agree(*real_pair(case, least), 2.0)


def test_a_real_tumour_agrees_on_both_backends(kits19):
    smallest = min(kits19, key=lambda case: np.count_nonzero(case[0] == 2))
    agree(*real_pair(smallest, least=2), 2.0)


@pytest.mark.parametrize("size", [0.1, 0.7, 0.3])
def test_equal_lengths_that_round_differently_count_alike_everywhere(rng, size):
    # Five steps along an axis are as long as three and four along two, but for rounding; a
    # tolerance of that length includes an element if one of its nearest counts.
    truth, prediction = np.zeros((2, 15, 15, 15), bool)
    truth[tuple(rng.integers(0, 15, (3, 12)))] = True
    prediction[tuple(rng.integers(0, 15, (3, 12)))] = True
    for steps in (5, 10, 13):
        few, many = (
            normalized_surface_dice(truth, prediction, (size,) * 3, steps * size, backend)
            for backend in BACKENDS
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(surface, "_WORDS_PER_ELEMENT", -1)  # distances are looked up instead
            looked_up = normalized_surface_dice(
                truth, prediction, (size,) * 3, steps * size, "host"
            )
        assert few == many == looked_up


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.5)])
def test_monai_with_subvoxels_agrees(rng, spacing):
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    for tolerance in (1.0, 2.0, 4.0):
        smooth = ndimage.gaussian_filter(rng.standard_normal((2, 28, 26, 24)), (0, 3, 3, 3))
        truth, prediction = np.pad(smooth > 0.01, ((0, 0), (2, 2), (2, 2), (2, 2)))
        expected = monai.compute_surface_dice(
            torch.from_numpy(prediction[None, None]),
            torch.from_numpy(truth[None, None]),
            [tolerance],
            include_background=True,
            spacing=spacing,
            use_subvoxels=True,
        )
        found = normalized_surface_dice(truth, prediction, spacing, tolerance)
        assert found == pytest.approx(float(expected), abs=1e-6)


def test_the_real_lung_tumour_agrees_with_the_reference(real_data):
    image = nib.load(real_data / "lung" / "lung1_tumour.nii.gz")
    truth = np.asarray(image.dataobj) > 0
    spacing = [float(size) for size in image.header.get_zooms()]
    prediction = np.roll(truth, (3, 1, 0), axis=(0, 1, 2))
    agree(truth, prediction, spacing, 2.0, backends=["host"])


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, -1, 1), (1, np.nan, 1), (1, 1, np.inf)])
def test_unusable_spacings_are_refused(rng, spacing):
    mask = rng.random((4, 4, 4)) < 0.5
    with pytest.raises(ValueError, match="spacing"):
        normalized_surface_dice(mask, mask, spacing)


def test_unusable_tolerance_percentile_and_shape_are_refused(rng):
    mask = rng.random((4, 4, 4)) < 0.5
    with pytest.raises(ValueError, match="tolerance is -1"):
        normalized_surface_dice(mask, mask, (1, 1, 1), -1)
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        normalized_surface_dice(mask, mask, (1, 1, 1), backend="gpu")
    with pytest.raises(ValueError, match="percentile is 101"):
        hausdorff(mask, mask, (1, 1, 1), 101)
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        hausdorff(mask[0], mask[0], (1, 1, 1))
