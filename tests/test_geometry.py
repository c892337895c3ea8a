"""Orientation is exact; resampling has the properties of its kernels and keeps what is thin."""

import itertools

import cc3d
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from tumorjax.errors import UserError
from tumorjax.geometry import (
    axis_codes,
    axis_matrix,
    from_canonical,
    label_boxes,
    prepare_image,
    resample,
    resample_labels,
    resample_to_shape,
    resampled_affine,
    resampled_shape,
    resampled_spacing,
    spacing_of,
    to_canonical,
)

# Each of the 48 ways in which three axes can lie: six orders, eight signs.
ALL_CODES = [
    "".join(codes)
    for order in itertools.permutations(["LR", "PA", "IS"])
    for codes in itertools.product(*order)
]


def affine_of(codes, spacing, origin=(3.0, -7.0, 11.0)):
    ornt = nib.orientations.axcodes2ornt(codes)
    matrix = np.zeros((4, 4))
    for voxel_axis, (world_axis, flip) in enumerate(ornt):
        matrix[int(world_axis), voxel_axis] = flip * spacing[voxel_axis]
    matrix[:3, 3], matrix[3, 3] = origin, 1
    return matrix


# ------------------------------------------------------------------ orientation


@pytest.mark.parametrize("codes", ALL_CODES)
def test_every_orientation_becomes_ras_and_comes_back(codes, rng):
    array = rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    affine = affine_of(codes, (0.7, 1.1, 2.5))
    assert axis_codes(affine) == codes
    turned, turned_affine = to_canonical(array, affine)
    assert axis_codes(turned_affine) == "RAS"
    np.testing.assert_array_equal(from_canonical(turned, affine), array)
    assert np.shares_memory(turned, array)
    # A voxel keeps its place in the patient.
    values, places = {}, {}
    for source, matrix, into in ((array, affine, values), (turned, turned_affine, places)):
        for index in np.ndindex(source.shape):
            where = tuple(np.round(nib.affines.apply_affine(matrix, index), 6))
            into[where] = source[index]
    assert values == places


def test_an_oblique_grid_keeps_its_affine_through_flips(rng):
    angle = np.deg2rad(17)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0],
                     [0, 0, 1]])  # fmt: skip
    affine = affine_of("LPS", (0.8, 0.8, 5))
    affine[:3, :3] = turn @ affine[:3, :3]
    array = rng.normal(size=(4, 5, 3, 2))
    turned, turned_affine = to_canonical(array, affine)
    assert axis_codes(turned_affine) == "RAS"
    np.testing.assert_allclose(spacing_of(turned_affine), (0.8, 0.8, 5))
    np.testing.assert_array_equal(turned, array[::-1, ::-1])
    np.testing.assert_array_equal(from_canonical(turned, affine), array)


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        (np.diag([1.0, 1, 0, 1]), "singular"),
        (np.array([[1.0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]), "singular"),
        (np.diag([1.0, np.nan, 1, 1]), "not finite"),
        (np.eye(3), "4x4"),
    ],
)
def test_affines_that_are_none_are_refused(affine, words, rng):
    with pytest.raises(UserError, match=words):
        to_canonical(rng.normal(size=(3, 3, 3)), affine)


# ------------------------------------------------------------------ resampling


def reference(array, shape, order):
    """The same grid by scipy, for axes that do not shrink (linear only)."""
    grids = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(array.shape, shape, strict=True)]
    at = np.meshgrid(*grids, indexing="ij")
    return ndimage.map_coordinates(array.astype(np.float64), at, order=order, mode="reflect")


def test_linear_growth_is_scipys(rng):
    array = rng.normal(size=(7, 9, 5)).astype(np.float32)
    for shape in [(7, 9, 5), (14, 9, 5), (11, 13, 17), (8, 27, 6)]:
        ours = resample_to_shape(array, shape, 1)
        np.testing.assert_allclose(ours, reference(array, shape, 1), atol=2e-6)


def test_cubic_growth_is_within_the_spline_on_a_smooth_field(rng):
    array = ndimage.gaussian_filter(rng.normal(size=(24, 20, 22)), 2.5).astype(np.float32)
    array /= array.std()
    for shape in [(37, 20, 30), (48, 40, 44)]:
        ours, spline = resample_to_shape(array, shape, 3), reference(array, shape, 3)
        inside = (slice(4, -4),) * 3
        assert np.abs(ours - spline)[inside].max() < 0.02
        linear = resample_to_shape(array, shape, 1)
        assert np.abs(ours - spline)[inside].mean() < np.abs(linear - spline)[inside].mean() / 4


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("shape", [(12, 41, 19), (31, 23, 40), (20, 30, 7)])
def test_linear_ramps_are_reproduced(order, shape, rng):
    slope, offset = rng.normal(size=3), 4.2
    old = np.indices((20, 30, 24)).astype(np.float64)
    array = (np.tensordot(slope, old, 1) + offset).astype(np.float32)
    new = resample_to_shape(array, shape, order)
    ratio = np.array(array.shape) / shape
    at = (np.indices(shape) + 0.5) * ratio[:, None, None, None] - 0.5
    # Reflection flattens the ramp within a kernel's reach of the faces.
    reach = tuple(slice(edge, -edge) for edge in np.ceil(2 * np.maximum(1, 1 / ratio)).astype(int))
    expected = np.tensordot(slope, at, 1) + offset
    # A widened cubic kernel is sampled, so its centre of mass is off by up to 0.015 voxels.
    tolerance = 2e-5 if order == 1 else 0.02 * np.abs(slope).sum()
    np.testing.assert_allclose(new[reach], expected[reach], atol=tolerance)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_rows_of_weights_sum_to_one(order):
    for old, new in [(10, 7), (10, 25), (1, 4), (5, 1), (512, 273), (200, 333)]:
        np.testing.assert_allclose(axis_matrix(old, new, order).sum(axis=1), 1, atol=1e-5)


def test_shrinking_keeps_the_mean(rng):
    array = rng.normal(size=(24, 30, 20)).astype(np.float32) + 10
    for shape in [(12, 10, 5), (17, 29, 13), (23, 4, 20)]:
        new = resample_to_shape(array, shape, 1)
        assert new.mean() == pytest.approx(array.mean(), abs=1e-5)
        assert resample_to_shape(array, shape, 3).mean() == pytest.approx(array.mean(), abs=5e-3)


@pytest.mark.parametrize("order", [1, 3])
def test_shrinking_averages_what_would_alias(order):
    # The finest pattern that a grid can hold; at two thirds of its voxels it cannot be there.
    x = np.arange(96)
    array = np.broadcast_to(np.cos(np.pi * x)[:, None, None], (96, 6, 6)).astype(np.float32)
    shrunk = resample_to_shape(array, (48, 6, 6), order)
    assert np.abs(shrunk[4:-4]).max() < 0.02
    picked = array[::2]
    assert np.abs(picked).min() == 1
    # A slow one passes.
    slow = np.broadcast_to(np.cos(2 * np.pi * x / 32)[:, None, None], (96, 6, 6))
    kept = resample_to_shape(slow.astype(np.float32), (48, 6, 6), order)
    assert np.abs(kept).max() > (0.95 if order == 1 else 0.97)


def test_noise_becomes_smaller_when_shrinking_as_averaging_has_it(rng):
    noise = rng.normal(size=(64, 64, 64)).astype(np.float32)
    for order, low, high in ((1, 0.10, 0.30), (3, 0.2, 0.45)):
        assert low < resample_to_shape(noise, (32, 32, 32), order).std() < high


def test_against_simpleitk_on_the_same_physical_grid(rng):
    sitk = pytest.importorskip("SimpleITK")
    array = ndimage.gaussian_filter(rng.normal(size=(18, 22, 16)), 1.5).astype(np.float32)
    affine = np.diag([0.9, 1.3, 3.0, 1])
    shape = resampled_shape(array.shape, spacing_of(affine), (0.8, 1.0, 1.5))
    new_affine = resampled_affine(affine, array.shape, shape)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(spacing_of(affine))
    grid = sitk.ResampleImageFilter()
    grid.SetSize(shape)
    grid.SetOutputSpacing(spacing_of(new_affine))
    grid.SetOutputOrigin(tuple(new_affine[:3, 3]))
    grid.SetInterpolator(sitk.sitkLinear)
    theirs = sitk.GetArrayFromImage(grid.Execute(image)).transpose(2, 1, 0)
    ours = resample(array, spacing_of(affine), (0.8, 1.0, 1.5), 1)
    inside = (slice(2, -2),) * 3
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-5)


def test_grids_cover_the_same_extent(rng):
    for _ in range(20):
        shape = rng.integers(1, 60, 3)
        spacing, wanted = rng.uniform(0.4, 5, 3), rng.uniform(0.5, 3, 3)
        new = resampled_shape(shape, spacing, wanted)
        true = resampled_spacing(shape, spacing, new)
        np.testing.assert_allclose(np.multiply(new, true), shape * spacing)
        affine = np.diag([*spacing, 1.0])
        moved = resampled_affine(affine, shape, new)
        np.testing.assert_allclose(spacing_of(moved), true)
        for corner, other in ((-0.5, -0.5), (np.array(shape) - 0.5, np.array(new) - 0.5)):
            np.testing.assert_allclose(
                nib.affines.apply_affine(affine, np.broadcast_to(corner, 3)),
                nib.affines.apply_affine(moved, np.broadcast_to(other, 3)),
            )


def test_memory_layout_type_and_slabs_do_not_matter(rng, monkeypatch):
    array = rng.integers(-1000, 2000, (30, 21, 26)).astype(np.int16)
    expected = resample_to_shape(array.astype(np.float32), (17, 33, 40), 3)
    for source in (np.asfortranarray(array), array[::-1][::-1], array.astype(np.float64),
                   np.ascontiguousarray(array.transpose(1, 2, 0)).transpose(2, 0, 1)):  # fmt: skip
        ours = resample_to_shape(source, (17, 33, 40), 3)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=0.02)
    monkeypatch.setattr("tumorjax.resampling._SLAB_VOXELS", 900)
    monkeypatch.setattr("tumorjax.resampling._BAND", 3)
    np.testing.assert_allclose(resample_to_shape(array, (17, 33, 40), 3), expected, atol=0.02)
    array[...] = 7
    assert resample_to_shape(array, array.shape, 3).mean() == 7


def test_wrong_use_is_refused(rng):
    array = rng.normal(size=(4, 4, 4))
    with pytest.raises(UserError, match="order is 2"):
        resample_to_shape(array, (3, 3, 3), 2)
    with pytest.raises(UserError, match="positive"):
        resample(array, (1, 0, 1), (1, 1, 1))
    with pytest.raises(UserError, match="three positive"):
        resample_to_shape(array, (3, 0, 3))
    with pytest.raises(UserError, match="cannot be resampled"):
        resample_to_shape(array[0], (3, 3, 3))


def test_prepared_image_is_the_window_and_metal_does_not_ring(rng):
    image = rng.normal(40, 5, (20, 20, 20)).astype(np.float32)
    image[8:10, 8:10, 8:10] = 30000
    image[:3] = -32768
    ready = prepare_image(image, (1.0, 1.0, 1.0), (1.5, 1.5, 1.5), (-175, 250))
    assert ready.min() >= 0
    assert ready.max() <= 1
    plain = resample(image.clip(-1024, 3071), (1.0, 1.0, 1.0), (1.5, 1.5, 1.5), 3)
    np.testing.assert_allclose(ready, (plain.clip(-175, 250) + 175) / 425, atol=1e-6)
    # Three voxels from the metal, tissue is tissue.
    assert ready[9:, 9:, 9:].mean() == pytest.approx((40 + 175) / 425, abs=0.01)


# ------------------------------------------------------------------ labels


def nearest(labels, shape):
    index = [
        np.minimum(((np.arange(m) + 0.5) * n / m).astype(int), n - 1)
        for n, m in zip(labels.shape, shape, strict=True)
    ]
    return labels[np.ix_(*index)]


def components(mask):
    return cc3d.connected_components(mask, connectivity=26, return_N=True)[1]


def ball(shape, center, radius, spacing=(1, 1, 1)):
    at = np.indices(shape).transpose(1, 2, 3, 0)
    return (((at - center) * spacing) ** 2).sum(axis=-1) < radius**2


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, bool])
def test_labels_keep_their_values_and_type(dtype, rng):
    labels = ndimage.zoom(rng.integers(0, 2 if dtype is bool else 5, (5, 5, 5)), 4, order=0)
    labels = labels.astype(dtype)
    new = resample(labels, (1, 1, 1), (1.5, 0.7, 1), 0)
    assert new.dtype == dtype
    assert set(np.unique(new)) <= set(np.unique(labels))
    np.testing.assert_array_equal(resample_labels(labels, labels.shape), labels)


def test_whole_ratios_of_thick_labels_are_exact(rng):
    coarse = np.zeros((10, 9, 8), np.uint8)
    coarse[2:6, 2:7, 1:5], coarse[6:9, 2:7, 1:5] = 3, 27
    fine = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    np.testing.assert_array_equal(resample_labels(fine, coarse.shape), coarse)
    np.testing.assert_array_equal(resample_labels(coarse, fine.shape)[1::4, 1::4, 1::4], coarse)


@pytest.mark.parametrize("spacing", [(0.8, 0.8, 2.5), (0.7, 0.7, 5.0), (3.0, 3.0, 3.0)])
def test_volumes_of_balls_are_kept(spacing):
    shape = tuple(int(90 / s) for s in spacing)
    center = np.array(shape) / 2 - 0.3
    for radius, tolerance in ((30, 0.02), (12, 0.03)):
        labels = ball(shape, center, radius, spacing).astype(np.uint8)
        new = resample(labels, spacing, (1.5, 1.5, 1.5), 0)
        before = labels.sum() * np.prod(spacing)
        after = new.sum() * np.prod(resampled_spacing(shape, spacing, new.shape))
        assert after == pytest.approx(before, rel=tolerance)


@pytest.mark.parametrize("ratio", [2.0, 1.875, 1.3])
def test_thin_plates_and_vessels_survive_better_than_by_nearest(ratio, rng):
    shape = tuple(round(60 / ratio) for _ in range(3))
    at = np.indices((60, 60, 60)).transpose(1, 2, 3, 0)
    pieces, holes = {"ours": [], "nearest": []}, {"ours": [], "nearest": []}
    for _ in range(6):
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        offset = at - rng.uniform(28, 32, 3)
        along = offset @ direction
        plate = np.abs(along) < 0.6
        vessel = ((offset - along[..., None] * direction) ** 2).sum(axis=-1) < 0.8**2
        for thin, into in ((plate, holes), (vessel, pieces)):
            labels = thin.astype(np.uint8) * 19
            for name, new in (("ours", resample_labels(labels, shape)),
                              ("nearest", nearest(labels, shape))):  # fmt: skip
                into[name].append(components(new > 0))
    assert max(holes["ours"]) == 1
    assert np.mean(pieces["ours"]) < 0.6 * np.mean(pieces["nearest"]) + 0.5


def test_a_vessel_inside_an_organ_stays_on_top_of_it():
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[5:35, 5:35, 5:35] = 5
    labels[17, 22, 5:35] = 19
    for ratio in (2.0, 1.875, 1.5):
        shape = (round(40 / ratio),) * 3
        new = resample_labels(labels, shape)
        vessel = new == 19
        assert components(vessel) == 1
        length = vessel.any(axis=(0, 1)).sum()
        assert length >= round(30 / ratio) - 1
        # As a share of the organ it stays a vessel.
        assert vessel.sum() <= 2 * length


def test_single_voxels_are_not_lost(rng):
    labels = np.zeros((40, 40, 40), np.uint8)
    places = [tuple(p) for p in rng.integers(2, 38, (12, 3))]
    for number, place in enumerate(places, start=1):
        labels[place] = number
    new = resample_labels(labels, (21, 21, 20))
    lost = set(range(1, 13)) - set(np.unique(new))
    # Two in one new voxel cannot both be there.
    assert len(lost) <= 1
    assert len(np.unique(nearest(labels, (21, 21, 20)))) < 6


def test_boxes_of_labels(rng):
    labels = np.zeros((9, 8, 7), np.uint8)
    labels[2:4, 3:8, 1:2], labels[5, 5, 5] = 200, 3
    boxes = label_boxes(labels)
    assert boxes == {
        200: (slice(2, 4), slice(3, 8), slice(1, 2)),
        3: (slice(5, 6), slice(5, 6), slice(5, 6)),
    }
    assert label_boxes(labels.astype(np.int32) - 200) != {}
    assert label_boxes(np.zeros((3, 3, 3), np.uint8)) == {}


# ------------------------------------------------------------------ real scans and masks


def test_real_kidneys_and_their_tumours_keep_their_volume(real_data):
    files = sorted((real_data / "kits19").glob("*.nii.gz"))[::6]
    assert len(files) == 4
    for path in files:
        image = nib.load(path)
        labels, affine = to_canonical(np.asanyarray(image.dataobj).astype(np.uint8), image.affine)
        spacing = spacing_of(affine)
        box = label_boxes((labels > 0).astype(np.uint8))[1]
        labels = np.pad(labels[box], 4)
        new = resample(labels, spacing, (1.5, 1.5, 1.5), 0)
        voxel = np.prod(resampled_spacing(labels.shape, spacing, new.shape))
        for value, tolerance in ((1, 0.01), (2, 0.04)):
            before = (labels == value).sum() * np.prod(spacing)
            assert (new == value).sum() * voxel == pytest.approx(before, rel=tolerance), path.name


def test_real_tumours_keep_their_volume_better_than_by_nearest(real_data):
    ours, by_nearest = [], []
    for path in sorted((real_data / "uls23").glob("*.nii.gz"))[::2]:
        image = nib.load(path)
        mask = np.pad(np.asanyarray(image.dataobj).astype(np.uint8), 8)
        spacing = spacing_of(image.affine)
        new = resample(mask, spacing, (1.5, 1.5, 1.5), 0)
        voxel = np.prod(resampled_spacing(mask.shape, spacing, new.shape))
        before = mask.sum() * np.prod(spacing)
        ours.append(new.sum() * voxel / before)
        by_nearest.append(nearest(mask, new.shape).sum() * voxel / before)
    assert np.median(np.abs(np.log(ours))) < 0.02
    assert np.mean(np.abs(np.log(ours))) < np.mean(np.abs(np.log(by_nearest)))


def test_real_ct_keeps_its_mean_and_comes_back(real_data):
    image = nib.load(real_data / "totalsegmentator" / "example_ct_sm.nii.gz")
    volume = np.asanyarray(image.dataobj)
    fine = resample(volume, spacing_of(image.affine), (1.5, 1.5, 1.5), 3)
    assert fine.shape == (244, 202, 60)
    assert fine.mean() == pytest.approx(volume.mean(), abs=0.5)
    back = resample_to_shape(fine, volume.shape, 3)
    inside = (slice(3, -3),) * 3
    assert np.abs(back - volume)[inside].mean() < 0.04 * volume.std()
