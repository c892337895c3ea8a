"""Lesion matching, sizes and FROC on cases whose answers can be counted by hand."""

import csv

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import pdist

from tumorjax.metrics import component_kernels, detection, lesion_tables
from tumorjax.metrics.detection import (
    add_froc,
    is_early,
    longest_inplane,
    operating_point,
    size_group,
    sphere_radius,
)

SPACING = (1.0, 1.0, 2.0)


def match_lesions(*args, **settings):
    """As the host finds it, and the kernels the same."""
    match = detection.match_lesions(*args, **settings, backend="host")
    on_device = detection.match_lesions(*args, **settings, backend="device")
    for name, expected, found in zip(match._fields, match, on_device, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=name)
        assert found.dtype == expected.dtype
    return match


def froc(truths, probabilities, spacings, *args, **settings):
    scans = list(zip(truths, probabilities, spacings, strict=True))
    curve = detection.froc(*map(iter, zip(*scans, strict=True)), *args, **settings, backend="host")
    on_device = detection.froc(*zip(*scans, strict=True), *args, **settings, backend="device")
    for expected, found in zip(curve, on_device, strict=True):
        np.testing.assert_array_equal(found, expected)
    return curve


def volume(*boxes, shape=(40, 12, 12)):
    """A mask with boxes given by their x range; all span y and z 2..5."""
    mask = np.zeros(shape, bool)
    for start, stop in boxes:
        mask[start:stop, 2:6, 2:6] = True
    return mask


def ball(shape, center, radius, spacing):
    grid = (np.indices(shape) - np.reshape(center, (3, 1, 1, 1))) * np.reshape(
        spacing, (3, 1, 1, 1)
    )
    return (grid**2).sum(axis=0) <= radius**2


# Lesions of 10 and 4 slices; one candidate over a fifth of the first, one beside everything.
TRUTH = volume((2, 12), (20, 24))
PREDICTION = volume((10, 12), (30, 33))


def test_any_voxel_finds_a_lesion_and_what_touches_none_is_false():
    match = match_lesions(TRUTH, PREDICTION, SPACING, "any")
    assert match.detected.tolist() == [True, False]
    assert match.false_positive.tolist() == [False, True]
    np.testing.assert_allclose(match.volume_mm3, [10 * 16 * 2, 4 * 16 * 2])
    np.testing.assert_allclose(match.candidate_mm3, [2 * 16 * 2, 3 * 16 * 2])
    np.testing.assert_allclose(match.radius_mm, sphere_radius([320.0, 128.0]))


@pytest.mark.parametrize(("threshold", "found"), [(0.1, True), (0.2, True), (0.21, False)])
def test_fraction_asks_for_a_share_of_the_lesion(threshold, found):
    match = match_lesions(TRUTH, PREDICTION, SPACING, "fraction", threshold)
    assert match.detected.tolist() == [found, False]
    assert match.false_positive.tolist() == [False, True]  # it still touches a lesion


def test_fraction_adds_up_several_candidates():
    prediction = volume((2, 5), (7, 10))
    assert match_lesions(TRUTH, prediction, SPACING, "fraction", 0.6).detected.tolist() == [1, 0]
    assert match_lesions(TRUTH, prediction, SPACING, "fraction", 0.61).detected.tolist() == [0, 0]


def test_iou_pairs_one_to_one():
    bridge = volume((2, 24))  # one candidate over both lesions: IoU 10/22 and 4/22
    assert match_lesions(TRUTH, bridge, SPACING, "any").detected.tolist() == [True, True]
    match = match_lesions(TRUTH, bridge, SPACING, "iou", 0.1)
    assert match.detected.tolist() == [True, False]
    assert match.false_positive.tolist() == [False]
    match = match_lesions(TRUTH, bridge, SPACING, "iou", 0.46)
    assert match.detected.tolist() == [False, False]
    assert match.false_positive.tolist() == [True]


def test_iou_counts_a_second_hit_of_a_lesion_as_false():
    match = match_lesions(TRUTH, volume((2, 5), (7, 12)), SPACING, "iou", 0.1)
    assert match.detected.tolist() == [True, False]
    assert match.false_positive.tolist() == [True, False]  # IoU 3/10 and 5/10


def test_iou_takes_the_pairing_with_the_largest_total():
    # The first candidate overlaps both lesions and fits the second better; the second candidate
    # fits only the second lesion. Pairing greedily would leave the first lesion out.
    truth = volume((2, 6), (7, 13))
    prediction = volume((4, 9))
    prediction[11:13, 2:6, 2:6] = True
    match = match_lesions(truth, prediction, SPACING, "iou", 0.1)
    assert match.detected.tolist() == [True, True]
    assert not match.false_positive.any()


def test_small_candidates_are_dropped_before_matching():
    match = match_lesions(TRUTH, PREDICTION, SPACING, "any", minimum_mm3=65.0)
    assert match.detected.tolist() == [False, False]
    assert match.candidate_mm3.tolist() == [96.0]


def test_connectivity_decides_how_many_lesions_there_are():
    truth = np.zeros((6, 6, 6), bool)
    truth[1, 1, 1] = truth[2, 2, 2] = True
    for connectivity, count in ((6, 2), (26, 1)):
        match = match_lesions(truth, truth, SPACING, connectivity=connectivity)
        assert match.detected.tolist() == [True] * count


@pytest.mark.parametrize("rule", ["any", "fraction", "iou"])
def test_empty_masks_have_no_lesions_and_no_candidates(rule):
    empty = np.zeros(TRUTH.shape, bool)
    assert not len(match_lesions(empty, empty, SPACING, rule).detected)
    assert match_lesions(TRUTH, empty, SPACING, rule).detected.tolist() == [False, False]
    assert match_lesions(empty, TRUTH, SPACING, rule).false_positive.tolist() == [True, True]


@pytest.mark.parametrize("rule", ["any", "fraction", "iou"])
def test_a_perfect_prediction_finds_all_in_noise(rng, rule):
    mask = rng.random((20, 20, 20)) < 0.03
    match = match_lesions(mask, mask, SPACING, rule)
    assert match.detected.all()
    assert not match.false_positive.any()
    assert match.volume_mm3.sum() == pytest.approx(mask.sum() * 2)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="'most'"):
        match_lesions(TRUTH, PREDICTION, SPACING, "most")
    with pytest.raises(ValueError, match="threshold is 50"):
        match_lesions(TRUTH, PREDICTION, SPACING, "iou", 50)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.5)])
def test_a_ball_has_its_own_radius_and_diameter(spacing):
    shape = tuple(int(2 * 14 / size) + 3 for size in spacing)
    mask = ball(shape, np.array(shape) // 2, 12.0, spacing)
    match = match_lesions(mask, mask, spacing)
    assert match.radius_mm[0] == pytest.approx(12.0, rel=0.02)
    assert match.longest_inplane_mm[0] == pytest.approx(24.0, abs=1.0)


def test_sphere_radius_inverts_the_volume_of_a_ball(rng):
    radius = rng.uniform(0.1, 60, 100)
    np.testing.assert_allclose(sphere_radius(4 / 3 * np.pi * radius**3), radius, rtol=1e-12)


def test_longest_inplane_counts_pixels_whole():
    mask = np.zeros((9, 9, 9), bool)
    assert longest_inplane(mask, (2.0, 2.0, 5.0)) == 0
    mask[4, 4, 1:8] = True  # a column through slices is one pixel wide in each
    assert longest_inplane(mask, (2.0, 2.0, 5.0)) == 2.0
    mask[1:8, 4, 3] = True
    assert longest_inplane(mask, (2.0, 2.0, 5.0)) == 14.0
    mask[8, 8, 6] = True  # 4 pixels away on either axis, in another slice than the row
    assert longest_inplane(mask, (2.0, 2.0, 5.0)) == 14.0
    mask[0, 0, 6] = True
    assert longest_inplane(mask, (2.0, 2.0, 5.0)) == pytest.approx(16 * np.sqrt(2) + 2)


def test_longest_inplane_is_the_largest_of_all_distances(rng):
    spacing = (0.7, 1.1, 3.0)
    mask = rng.random((14, 15, 6)) < 0.03
    expected = 0.0
    for z in range(mask.shape[2]):
        points = np.argwhere(mask[:, :, z]) * spacing[:2]
        if len(points):
            expected = max(expected, np.max(pdist(points), initial=0) + 0.9)
    assert longest_inplane(mask, spacing) == pytest.approx(expected)


def test_sizes_of_real_lesions_are_those_of_the_published_table(real_data):
    table = real_data.parent / "reference" / "tumour_sizes.csv"
    if not table.is_file():
        pytest.skip(f"no table of real sizes at {table}")
    with open(table, newline="") as file:
        rows = {f"{row['organ']}_{row['case']}": row for row in csv.DictReader(file)}
    checked = 0
    for path in sorted((real_data / "uls23").glob("*.nii.gz")):
        row = rows.get(path.name.removesuffix(".nii.gz"))
        if row is None:
            continue
        image = nib.as_closest_canonical(nib.load(path))
        mask = np.asarray(image.dataobj) > 0
        spacing = [float(size) for size in image.header.get_zooms()]
        volume_mm3 = mask.sum() * np.prod(spacing)
        assert sphere_radius(volume_mm3) == pytest.approx(float(row["radius_mm"]), abs=0.01)
        assert longest_inplane(mask, spacing) == pytest.approx(
            float(row["longest_inplane_mm"]), abs=0.01
        )
        checked += 1
    assert checked >= 20


@pytest.mark.parametrize(
    ("radius", "group"),
    [
        (0.5, "tiny"),
        (5.0, "tiny"),
        (5.01, "small"),
        (10.0, "small"),
        (20.0, "medium"),
        (20.01, "large"),
        (200.0, "large"),
    ],
)
def test_size_groups_include_their_upper_bound(radius, group):
    assert size_group(radius) == group


def test_early_follows_the_diameter_that_is_asked_for():
    needle = np.zeros((40, 10, 10), bool)
    needle[5:30, 4:6, 4:6] = True  # 25 mm long, but of the volume of a ball of 5.8 mm
    match = match_lesions(needle, needle, (1.0, 1.0, 1.0))
    assert is_early(match, "sphere").tolist() == [True]
    assert is_early(match, "recist").tolist() == [False]
    exact = np.zeros((40, 10, 10), bool)
    exact[5:25, 4, 4] = True
    match = match_lesions(exact, exact, (1.0, 1.0, 1.0))
    assert match.longest_inplane_mm[0] == 20.0
    assert is_early(match, "recist", 20.0).tolist() == [False]
    assert is_early(match, "recist", 20.1).tolist() == [True]


def hand_made_scans():
    """Two scans: lesions found at 0.8 and 0.4, false candidates at 0.9, 0.6 and 0.3."""
    first, second = np.zeros((2, *TRUTH.shape), np.float32)
    first[volume((10, 14))] = 0.8  # touches the first lesion
    first[volume((22, 23))] = 0.4  # lies in the second
    first[volume((30, 33))] = 0.6
    second[volume((5, 7))] = 0.9
    second[volume((20, 22))] = 0.3
    return [TRUTH, np.zeros_like(TRUTH)], [first, second], [SPACING, SPACING]


def test_froc_counts_by_hand():
    curve = froc(*hand_made_scans(), thresholds=(0.95, 0.2, 0.35, 0.5, 0.7, 0.85))
    assert curve.thresholds.tolist() == [0.2, 0.35, 0.5, 0.7, 0.85, 0.95]
    assert curve.sensitivity.tolist() == [1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
    assert curve.false_positives_per_scan.tolist() == [1.5, 1.0, 1.0, 0.5, 0.5, 0.0]
    assert (curve.n_lesions, curve.n_scans) == (2, 2)
    assert operating_point(curve, 0.9) == 1
    assert operating_point(curve, 0.5) == 3
    assert operating_point(curve, 0.0) == 5


def test_froc_counts_a_voxel_at_the_threshold():
    truths, probabilities, spacings = hand_made_scans()
    curve = froc(truths, probabilities, spacings, thresholds=(0.5, 0.6))
    assert curve.false_positives.tolist() == [2, 2]
    assert curve.detected.tolist() == [1, 1]


def test_froc_of_scans_one_at_a_time_adds_up():
    truths, probabilities, spacings = hand_made_scans()
    whole = froc(iter(truths), iter(probabilities), iter(spacings))
    parts = [froc([t], [p], [s]) for t, p, s in zip(truths, probabilities, spacings, strict=True)]
    together = add_froc(*parts)
    for one, other in zip(whole, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_froc_agrees_with_matching_at_every_threshold(rng):
    truth = ndimage.gaussian_filter(rng.standard_normal((24, 24, 24)), 2) > 0.08
    noise = ndimage.gaussian_filter(rng.standard_normal((24, 24, 24)), 1.5)
    probability = (noise - noise.min()) / (noise.max() - noise.min())
    curve = froc([truth], [probability], [SPACING], minimum_mm3=30.0)
    for threshold, found, false in zip(
        curve.thresholds, curve.detected, curve.false_positives, strict=True
    ):
        match = match_lesions(truth, probability >= threshold, SPACING, minimum_mm3=30.0)
        assert match.detected.sum() == found
        assert match.false_positive.sum() == false
    assert (np.diff(curve.sensitivity) <= 0).all()


def test_froc_without_lesions_has_no_sensitivity_and_no_operating_point():
    _, probabilities, _ = hand_made_scans()
    curve = froc([np.zeros_like(TRUTH)], probabilities[:1], [SPACING])
    assert np.isnan(curve.sensitivity).all()
    assert operating_point(curve) is None
    with pytest.raises(ValueError, match="shape"):
        froc([TRUTH[1:]], probabilities[:1], [SPACING])


@pytest.mark.parametrize("rule", ["any", "fraction", "iou"])
@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_hundreds_of_lesions_are_matched_alike_on_both_backends(rng, rule, connectivity):
    noise = ndimage.gaussian_filter(rng.standard_normal((2, 15, 15, 31)), (0, 0.6, 0.6, 0.6))
    truth, prediction = noise > 1.6 * noise.std()
    prediction |= truth & (rng.random(truth.shape) < 0.4)
    match = match_lesions(
        truth, prediction, (0.7, 1.1, 3.0), rule, None, connectivity, minimum_mm3=5.0
    )
    assert len(match.detected) > 20
    assert 0 < match.detected.sum() < len(match.detected)
    assert match.false_positive.any()


def test_more_lesions_than_any_table_holds_are_counted_on_the_host(rng, monkeypatch):
    truth, prediction = rng.random((2, 15, 15, 31)) < 0.03
    expected = match_lesions(truth, prediction, SPACING)
    monkeypatch.setattr(lesion_tables, "_CAPACITIES", (4,))
    for one, other in zip(match_lesions(truth, prediction, SPACING), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_where_the_steps_are_not_enough_the_host_takes_over(rng, monkeypatch, caplog):
    truth = ndimage.gaussian_filter(rng.standard_normal((15, 15, 31)), 1) > 0
    monkeypatch.setattr(component_kernels, "STEPS", 0)
    match = match_lesions(truth, truth, SPACING)
    assert match.detected.all()
    assert "not all found in 0 steps" in caplog.text
    caplog.clear()
    probability = rng.random(truth.shape).astype(np.float32)
    assert froc([truth], [probability], [SPACING]).n_lesions == len(match.detected)
    assert "not all found in 0 steps" in caplog.text


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_froc_reads_probabilities_of_any_precision_alike(rng, dtype):
    # Probabilities at the thresholds, and one step of the precision above and below them.
    thresholds = (0.1, 0.3, 0.6, 0.7)
    at = np.array(thresholds, dtype)
    values = np.concatenate([at, np.nextafter(at, dtype(0)), np.nextafter(at, dtype(1))])
    probability = rng.choice(values, (15, 15, 31))
    probability[rng.random(probability.shape) < 0.9] = 0
    truth = ndimage.gaussian_filter(rng.standard_normal(probability.shape), 1) > 0.2
    curve = froc([truth], [probability], [SPACING], thresholds)
    for threshold, false in zip(curve.thresholds, curve.false_positives, strict=True):
        match = match_lesions(truth, probability.astype(np.float64) >= threshold, SPACING)
        assert match.false_positive.sum() == false
