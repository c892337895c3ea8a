"""Means by hand, intervals against known distributions."""

import numpy as np
import pytest

from tumorjax.errors import UserError
from tumorjax.evaluation.summary import (
    CASE_COLUMNS,
    METRICS,
    SUMMARY_COLUMNS,
    area_under_curve,
    paired_difference,
    summarize,
)
from tumorjax.files import csv_text, read_csv


def row(case, patient=None, **values):
    """A row of a scan with no tumour and none predicted, but for what is given."""
    base = dict.fromkeys(CASE_COLUMNS, 0) | {"case": case, "patient": patient or case}
    base |= {"split": "id", "class": "tumor", "score": 0.1, "dsc": None, "nsd": None}
    return base | values


def tumour(case, patient=None, *, lesions=1, detected=1, dsc=50.0, **values):
    found = {"has_tumor": 1, "predicted_tumor": int(dsc > 0), "dsc": dsc, "nsd": dsc / 2}
    counts = {"n_lesions": lesions, "n_detected": detected}
    return row(case, patient, **(found | counts | values))


SCANS = [
    tumour("a", lesions=3, detected=2, dsc=80.0, score=0.9, n_early=2, n_early_detected=1),
    tumour("b1", "b", detected=0, dsc=0.0, score=0.2, lesions_tiny=1, false_positives=1),
    tumour("b2", "b", dsc=40.0, score=0.6, lesions_large=1, detected_large=1),
    row("c", predicted_tumor=1, score=0.7, dsc=0.0, nsd=0.0, false_positives=4),
    row("d1", "d"),
    row("d2", "d", score=0.3),
    tumour("e", detected=0, dsc=0.0, score=0.05),
    row("f", score=0.5),
]


def test_means_by_hand():
    (line,) = summarize(SCANS, {"seed": 3})
    assert tuple(line) == SUMMARY_COLUMNS
    expected = {
        "class": "tumor",
        "n_patients": 6,
        "n_tumors": 6,
        "dsc": (80 + 0 + 40 + 0) / 4,  # not the healthy scan with a false tumour
        "nsd": 15.0,
        "tumor_sensitivity": 100 * 3 / 6,
        "patient_sensitivity": 100 * 2 / 3,  # b is found by its second scan
        "patient_specificity": 100 * 2 / 3,
        "early_tumor_sensitivity": 50.0,
        "false_positives_per_scan": 5 / 8,
        "sensitivity_tiny": 0.0,
        "sensitivity_small": None,
        "sensitivity_large": 100.0,
        # a 0.9, b 0.6, e 0.05 against c 0.7, d 0.3, f 0.5
        "auc": 100 * (3 + 2 + 0) / 9,
    }
    for key, value in expected.items():
        assert line[key] == (value if isinstance(value, str) else pytest.approx(value)), key


def test_rows_read_back_from_csv_give_the_same_bytes(tmp_path, rng):
    scans = [
        tumour(f"s{i}", dsc=round(rng.uniform(0, 100), 6), score=round(rng.random(), 6))
        for i in range(30)
    ] + [row(f"h{i}", score=round(rng.random(), 6)) for i in range(9)]
    path = tmp_path / "cases.csv"
    path.write_text(csv_text(scans, CASE_COLUMNS))
    fresh, back = summarize(scans, {"seed": 1}), summarize(read_csv(path), {"seed": 1})
    assert csv_text(fresh, SUMMARY_COLUMNS) == csv_text(back, SUMMARY_COLUMNS)


def test_order_of_rows_does_not_matter_and_the_seed_does(rng):
    scans = [tumour(f"s{i}", dsc=rng.uniform(0, 100)) for i in range(20)]
    (line,) = summarize(scans, {"seed": 0})
    (mixed,) = summarize([scans[i] for i in rng.permutation(20)], {"seed": 0})
    (other,) = summarize(scans, {"seed": 1})
    for key in ("dsc", "dsc_low", "dsc_high"):
        assert line[key] == pytest.approx(mixed[key], abs=1e-9)
    assert line["dsc"] == other["dsc"]
    assert line["dsc_low"] != other["dsc_low"]


def test_undefined_is_none_and_one_patient_has_no_interval():
    (line,) = summarize([tumour("a", dsc=70.0)], {})
    assert line["dsc"] == pytest.approx(70.0)
    assert line["dsc_low"] is line["dsc_high"] is None
    assert line["patient_specificity"] is line["patient_specificity_low"] is None
    assert line["auc"] is None
    (line,) = summarize([row("a"), row("b")], {})
    assert line["dsc"] is line["tumor_sensitivity"] is line["early_tumor_sensitivity"] is None
    assert (line["patient_specificity"], line["patient_specificity_low"]) == (100, 100)


def test_interval_of_a_mean_is_the_normal_one(rng):
    scores = rng.normal(60, 12, 400)
    scans = [tumour(f"s{i}", dsc=score) for i, score in enumerate(scores)]
    (line,) = summarize(scans, {"resamples": 4000})
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert line["dsc"] == pytest.approx(scores.mean())
    assert line["dsc_low"] == pytest.approx(scores.mean() - half, abs=0.15)
    assert line["dsc_high"] == pytest.approx(scores.mean() + half, abs=0.15)


def test_interval_covers_the_truth_as_often_as_it_says(rng):
    hits = 0
    for trial in range(200):
        found = rng.random(60) < 0.7
        scans = [tumour(f"s{i}", detected=int(f)) for i, f in enumerate(found)]
        (line,) = summarize(scans, {"resamples": 400, "seed": trial})
        hits += line["tumor_sensitivity_low"] <= 70 <= line["tumor_sensitivity_high"]
    assert 0.89 <= hits / 200 <= 0.99


def test_scans_of_one_patient_are_drawn_together(rng):
    """Ten identical scans of each patient say no more than one."""
    scores = rng.uniform(20, 90, 25)
    once = [tumour(f"p{i}", dsc=score) for i, score in enumerate(scores)]
    tenfold = [
        tumour(f"p{i}x{k}", f"p{i}", dsc=score) for i, score in enumerate(scores) for k in range(10)
    ]
    (one,), (ten,) = summarize(once, {"seed": 5}), summarize(tenfold, {"seed": 5})
    for key in ("dsc", "dsc_low", "dsc_high", "tumor_sensitivity"):
        assert one[key] == pytest.approx(ten[key])


def test_classes_keep_their_order_and_do_not_mix():
    scans = [
        tumour("a", dsc=30.0) | {"class": "liver_lesion"},
        row("a") | {"class": "kidney_lesion"},
        tumour("b", dsc=50.0) | {"class": "liver_lesion"},
        tumour("b", dsc=90.0, lesions=2) | {"class": "kidney_lesion"},
    ]
    liver, kidney = summarize(scans, {})
    assert (liver["class"], liver["dsc"], liver["n_tumors"]) == ("liver_lesion", 40, 2)
    assert (kidney["class"], kidney["dsc"], kidney["n_tumors"]) == ("kidney_lesion", 90, 2)
    assert kidney["n_patients"] == 2


def test_a_paired_difference_is_surer_than_two_intervals(rng):
    scores = rng.uniform(20, 80, 50)
    first = [tumour(f"s{i}", dsc=score) for i, score in enumerate(scores)]
    second = [tumour(f"s{i}", dsc=score + 3 + rng.normal()) for i, score in enumerate(scores)]
    (line,) = paired_difference(first, second, {})
    assert line["dsc"] == pytest.approx(3, abs=0.5)
    assert 2.3 < line["dsc_low"] < line["dsc"] < line["dsc_high"] < 3.7
    (alone,) = summarize(first, {})
    assert alone["dsc_high"] - alone["dsc_low"] > 5
    assert set(line) == {"class", "n_patients"} | {
        f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")
    }


def test_a_paired_difference_needs_the_same_patients():
    with pytest.raises(UserError, match="same patients"):
        paired_difference([tumour("a")], [tumour("b")], {})


def test_area_under_curve_is_the_share_of_pairs_in_order(rng):
    scores = rng.integers(0, 6, 60) / 5
    positive = rng.random(60) < 0.4
    pairs = scores[positive][:, None] - scores[~positive][None]
    expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert area_under_curve(scores, positive) == pytest.approx(expected)
    assert np.isnan(area_under_curve(scores, np.ones(60, bool)))
