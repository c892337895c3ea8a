"""FROC curves and thresholds: by hand, by going through all thresholds, and by simulation."""

import numpy as np
import pytest

from tumorjax.errors import UserError
from tumorjax.evaluation.operating_points import (
    CURVE_COLUMNS,
    Counts,
    check_thresholds,
    choose_threshold,
    curve_rows,
    gather,
)
from tumorjax.metrics.detection import froc

SETTINGS = {"seed": 0, "resamples": 500, "confidence": 0.95}


def counts_of(detected, false_positives, n_lesions, n_scans=None, thresholds=None) -> Counts:
    detected, false_positives = np.array(detected), np.array(false_positives)
    scans = np.ones(len(detected), int) if n_scans is None else np.array(n_scans)
    if thresholds is None:
        thresholds = np.linspace(0.1, 0.9, detected.shape[1])
    return Counts(np.array(thresholds), detected, false_positives, np.array(n_lesions), scans)


def random_counts(rng, patients=40, thresholds=8) -> Counts:
    """Patients of whom some have no tumour; a lesion is found up to its own score."""
    levels = np.linspace(0.1, 0.9, thresholds)
    lesions = rng.integers(0, 4, patients)
    detected = np.zeros((patients, thresholds), int)
    false = np.zeros((patients, thresholds), int)
    for patient, count in enumerate(lesions):
        detected[patient] = (rng.beta(5, 1.5, count)[:, None] >= levels).sum(0)
        false[patient] = (rng.beta(1, 3, rng.poisson(4))[:, None] >= levels).sum(0)
    return Counts(levels, detected, false, lesions, np.ones(patients, int))


def test_the_chosen_threshold_is_the_best_of_all(rng):
    for _ in range(20):
        counts = random_counts(rng)
        wanted = rng.uniform(40, 95)
        best = None
        for index, threshold in enumerate(counts.thresholds):
            sensitivity = 100 * counts.detected[:, index].sum() / counts.n_lesions.sum()
            false = counts.false_positives[:, index].sum()
            if sensitivity >= wanted and (best is None or false <= best[0]):
                best = (false, threshold, sensitivity)
        entry = choose_threshold(counts, wanted, SETTINGS)
        if best is None:
            assert entry["threshold"] is None
        else:
            assert entry["threshold"] == best[1]
            assert entry["sensitivity"] == pytest.approx(best[2])
            assert entry["false_positives_per_scan"] == pytest.approx(best[0] / 40)


def test_of_equally_good_thresholds_the_highest_is_chosen():
    entry = choose_threshold(counts_of([[2, 2, 2, 0]], [[5, 1, 1, 0]], [2]), 90, SETTINGS)
    assert entry["threshold"] == pytest.approx(0.1 + 0.8 * 2 / 3)


def test_candidates_that_grow_together_are_fewer():
    """The lowest threshold has the fewest false ones; the highest sufficient one is named too."""
    entry = choose_threshold(counts_of([[4, 4, 4, 1]], [[0, 6, 3, 1]], [4]), 90, SETTINGS)
    assert entry["threshold"] == pytest.approx(0.1)
    assert entry["highest_threshold"] == pytest.approx(0.1 + 0.8 * 2 / 3)


def test_exactly_the_wanted_sensitivity_is_enough():
    counts = counts_of([[10, 9, 8]], [[9, 5, 1]], [10])
    assert choose_threshold(counts, 90, SETTINGS)["threshold"] == pytest.approx(0.5)


def test_what_the_data_cannot_tell_is_null():
    none = choose_threshold(counts_of([[0, 0]], [[3, 1]], [0]), 90, SETTINGS)
    assert (none["threshold"], none["identifiable"]) == (None, False)
    assert none["reason"] == "no scan has a tumour of this class"
    low = choose_threshold(counts_of([[3, 2], [4, 1]], [[3, 1], [0, 0]], [6, 4]), 90, SETTINGS)
    assert low["threshold"] is None
    assert low["reason"] == "no threshold finds 90 % of the tumours: at most 70.0 %, at 0.1"
    assert low["false_positives_per_scan"] is None
    one = choose_threshold(counts_of([[2, 2], [0, 0]], [[3, 1], [2, 1]], [2, 0]), 90, SETTINGS)
    assert (one["threshold"], one["identifiable"]) == (pytest.approx(0.9), True)
    assert one["threshold_interval"] == one["sensitivity_interval"] == [None, None]
    assert one["left_out"]["sensitivity"] is None


def test_an_interval_that_reaches_below_all_thresholds_is_open():
    """Every second patient is missed at all thresholds in a third of the resamples or so."""
    detected = [[1, 1, 1]] * 19 + [[0, 0, 0]]
    false = [[3, 2, 1]] * 20
    entry = choose_threshold(counts_of(detected, false, [1] * 20), 90, SETTINGS)
    assert entry["threshold"] == pytest.approx(0.9)
    low, high = entry["threshold_interval"]
    assert low is None
    assert high == pytest.approx(0.9)


def test_left_out_patients_are_judged_by_a_threshold_they_had_no_part_in(rng):
    counts = random_counts(rng, 25)
    entry = choose_threshold(counts, 70, SETTINGS)
    found = false = 0
    for patient in range(25):
        others = Counts(counts[0], *(np.delete(values, patient, 0) for values in counts[1:]))
        index = list(counts.thresholds).index(choose_threshold(others, 70, SETTINGS)["threshold"])
        found += counts.detected[patient, index]
        false += counts.false_positives[patient, index]
    assert entry["left_out"] == {
        "sensitivity": pytest.approx(100 * found / counts.n_lesions.sum()),
        "false_positives_per_scan": pytest.approx(false / 25),
    }


def test_the_interval_covers_the_threshold_of_endless_patients(rng):
    """Thresholds chosen on few patients scatter about that of very many."""
    many = random_counts(rng, 20000, 12)
    truth = choose_threshold(many, 80, SETTINGS | {"resamples": 2})["threshold"]
    hits = 0
    for seed in range(60):
        entry = choose_threshold(
            random_counts(rng, 60, 12), 80, SETTINGS | {"seed": seed, "resamples": 200}
        )
        low, high = entry["threshold_interval"]
        hits += (low or 0) <= truth <= (high or 0)
    assert hits >= 52


def test_curve_is_that_of_the_scans_taken_together(rng):
    thresholds = (0.2, 0.5, 0.8)
    truths = [rng.random((12, 11, 9)) < 0.01 for _ in range(6)]
    maps = [rng.random((12, 11, 9)) ** 4 for _ in range(6)]
    spacing = (1.0, 1.2, 2.0)
    scans = []
    for number, (truth, values) in enumerate(zip(truths, maps, strict=True)):
        one = froc([truth], [values], [spacing], thresholds)
        counts = {
            "n_lesions": one.n_lesions,
            "detected": one.detected.tolist(),
            "false_positives": one.false_positives.tolist(),
        }
        scans.append((f"p{number % 4}", {"liver_lesion": counts}))
    together = froc(truths, maps, [spacing] * 6, thresholds)
    counts = gather(iter(scans), thresholds)["liver_lesion"]
    rows = curve_rows("liver_lesion", counts, SETTINGS)
    assert set(rows[0]) == set(CURVE_COLUMNS)
    assert [row["sensitivity"] for row in rows] == pytest.approx(100 * together.sensitivity)
    assert [row["false_positives_per_scan"] for row in rows] == pytest.approx(
        together.false_positives_per_scan
    )
    assert (rows[0]["n_patients"], rows[0]["n_scans"]) == (4, 6)
    for row in rows:
        assert row["sensitivity_low"] <= row["sensitivity"] <= row["sensitivity_high"]


def test_a_curve_without_tumours_has_false_positives_alone():
    counts = counts_of([[0, 0], [0, 0]], [[3, 1], [2, 0]], [0, 0])
    row = curve_rows("x", counts, SETTINGS)[0]
    assert row["sensitivity"] is row["sensitivity_low"] is None
    assert row["false_positives_per_scan"] == 2.5
    assert row["false_positives_per_scan_low"] == 2


@pytest.mark.parametrize("thresholds", [(), (0.0, 0.5), (0.5, 1.2), (-0.1,)])
def test_unusable_thresholds_are_refused(thresholds):
    with pytest.raises(UserError, match=r"froc\.thresholds"):
        check_thresholds(thresholds)


def test_thresholds_are_put_in_order():
    assert check_thresholds((0.5, 0.1, 0.5, 1)) == (0.1, 0.5, 1.0)
