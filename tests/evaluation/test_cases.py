"""Rows of one case, against the metrics they are made of and counts by hand."""

import numpy as np
import pytest

from tumorjax.errors import UserError
from tumorjax.evaluation.cases import evaluate_case, label_overlap
from tumorjax.evaluation.summary import CASE_COLUMNS
from tumorjax.metrics.overlap import dice
from tumorjax.metrics.surface import normalized_surface_dice

CLASSES = {
    "liver": ("liver",),
    "liver_lesion": ("liver_lesion",),
    "pancreatic_lesion": ("pancreatic_lesion",),
}
SPACING = (1.5, 1.5, 3.0)


def ball(center, radius, shape=(40, 40, 24)):
    grid = (np.indices(shape) - np.reshape(center, (3, 1, 1, 1))) * np.reshape(
        SPACING, (3, 1, 1, 1)
    )
    return (grid**2).sum(axis=0) <= radius**2


@pytest.fixture
def masks():
    """A liver with a small and a medium lesion, a pancreatic one; one found, one false."""
    truth = ball((20, 20, 12), 28).astype(np.uint8)
    truth[ball((12, 20, 12), 6)] = 2
    truth[ball((26, 16, 12), 11)] = 2
    truth[ball((20, 32, 6), 4)] = 3
    prediction = ball((20, 20, 12), 27).astype(np.uint8)
    prediction[ball((26, 17, 12), 10)] = 2
    prediction[ball((20, 32, 6), 4)] = 2  # the pancreatic lesion under another name
    prediction[5, 5, 3] = 2  # one voxel of 6.75 mm^3
    return truth, prediction


def rows_by_class(*arguments, **names):
    return {row["class"]: row for row in evaluate_case(*arguments, **names)}


def test_each_tumour_and_their_union_have_a_row_with_all_columns(masks):
    rows = evaluate_case(*masks, SPACING, CLASSES, case="a", patient="p", split="id")
    assert [row["class"] for row in rows] == ["liver_lesion", "pancreatic_lesion", "tumor"]
    for row in rows:
        assert tuple(row) == CASE_COLUMNS
        assert (row["case"], row["patient"], row["split"]) == ("a", "p", "id")
    assert evaluate_case(*masks, SPACING, CLASSES, case="a")[0]["patient"] == "a"


def test_counts_and_scores_are_those_of_the_masks(masks):
    truth, prediction = masks
    row = rows_by_class(truth, prediction, SPACING, CLASSES)["liver_lesion"]
    lesion, found = truth == 2, prediction == 2
    assert row["dsc"] == pytest.approx(100 * dice(lesion, found), abs=1e-6)
    nsd = normalized_surface_dice(lesion, found, SPACING, 2.0)
    assert row["nsd"] == pytest.approx(100 * nsd, abs=1e-6)
    assert (row["n_lesions"], row["n_detected"], row["false_positives"]) == (2, 1, 2)
    assert (row["lesions_small"], row["detected_small"]) == (1, 0)
    assert (row["lesions_medium"], row["detected_medium"]) == (1, 1)
    assert (row["lesions_tiny"], row["lesions_large"]) == (0, 0)
    assert (row["n_early"], row["n_early_detected"]) == (1, 0)
    assert (row["has_tumor"], row["predicted_tumor"], row["score"]) == (1, 1, None)
    assert row["truth_mm3"] == lesion.sum() * 6.75
    assert row["predicted_mm3"] == found.sum() * 6.75


def test_the_union_finds_a_lesion_under_another_tumours_name(masks):
    rows = rows_by_class(*masks, SPACING, CLASSES)
    assert rows["pancreatic_lesion"]["n_detected"] == 0
    assert rows["pancreatic_lesion"]["dsc"] == 0
    assert (rows["tumor"]["n_lesions"], rows["tumor"]["n_detected"]) == (3, 2)
    assert rows["tumor"]["false_positives"] == 1
    expected = 100 * dice(masks[0] >= 2, masks[1] >= 2)
    assert rows["tumor"]["dsc"] == pytest.approx(expected, abs=1e-6)


def test_the_union_of_one_present_class_has_that_classes_numbers(masks):
    truth, prediction = masks
    truth = np.where(truth == 3, 1, truth)
    rows = rows_by_class(truth, prediction, SPACING, CLASSES)
    assert rows["tumor"] == rows["liver_lesion"] | {"class": "tumor"}
    assert rows["pancreatic_lesion"]["dsc"] is None


def test_components_below_the_minimum_are_no_prediction(masks):
    truth, prediction = masks
    row = rows_by_class(truth, prediction, SPACING, CLASSES, {"minimum_mm3": 7.0})["liver_lesion"]
    prediction[5, 5, 3] = 0
    assert row == rows_by_class(truth, prediction, SPACING, CLASSES)["liver_lesion"]
    only_speck = np.zeros_like(truth)
    only_speck[5, 5, 3] = 2
    row = rows_by_class(truth, only_speck, SPACING, CLASSES, {"minimum_mm3": 7.0})["tumor"]
    assert (row["predicted_tumor"], row["false_positives"]) == (0, 0)


def test_a_class_can_have_its_own_tolerance(masks):
    settings = {"tolerance_mm": 1.0, "tolerances_mm": {"liver_lesion": 4.0}}
    rows = rows_by_class(*masks, SPACING, CLASSES, settings)
    expected = [
        100 * normalized_surface_dice(masks[0] == 2, masks[1] == 2, SPACING, 4.0),
        100 * normalized_surface_dice(masks[0] >= 2, masks[1] >= 2, SPACING, 1.0),
    ]
    found = [rows["liver_lesion"]["nsd"], rows["tumor"]["nsd"]]
    assert found == pytest.approx(expected, abs=1e-6)


def test_score_is_the_highest_tumour_probability(masks, rng):
    logits = rng.standard_normal((*masks[0].shape, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    rows = rows_by_class(*masks, SPACING, CLASSES, None, probabilities)
    assert rows["liver_lesion"]["score"] == pytest.approx(probabilities[..., 2].max(), abs=1e-6)
    union = probabilities[..., 2:].sum(axis=-1).max()
    assert rows["tumor"]["score"] == pytest.approx(union, abs=1e-6)


def test_a_healthy_scan_is_undefined_or_false(masks):
    healthy = np.minimum(masks[0], 1)
    row = rows_by_class(healthy, healthy, SPACING, CLASSES)["tumor"]
    assert (row["has_tumor"], row["predicted_tumor"], row["n_lesions"]) == (0, 0, 0)
    assert (row["dsc"], row["nsd"]) == (None, None)
    row = rows_by_class(healthy, masks[1], SPACING, CLASSES)["tumor"]
    assert (row["dsc"], row["nsd"], row["false_positives"]) == (0, 0, 3)


def test_a_task_without_tumours_has_no_rows(masks):
    assert evaluate_case(*masks, SPACING, {"liver": ("liver",)}) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"connectivity": 8}, "connectivity is 8"),
        ({"early_diameter": "long"}, "early_diameter is 'long'"),
        ({"lesion_rule": "most"}, "'most'"),
        ({"lesion_threshold": 3.0}, "threshold is 3"),
        ({"tolerance_mm": -1.0}, "tolerance_mm is -1"),
        ({"tolerances_mm": {"liver_lesion": -2.0}}, "liver_lesion is -2"),
        ({"resamples": 0}, "resamples is 0"),
        ({"confidence": 95}, "confidence is 95"),
    ],
)
def test_unusable_settings_are_refused(masks, settings, message):
    with pytest.raises(UserError, match=message):
        evaluate_case(*masks, SPACING, CLASSES, settings)


def test_masks_on_different_grids_are_refused(masks):
    with pytest.raises(ValueError, match="shape"):
        evaluate_case(masks[0], masks[1][1:], SPACING, CLASSES)


def test_label_overlap_counts_voxels_as_nnunet_does(rng):
    truth, prediction = rng.integers(0, 4, (2, 6, 7, 8)).astype(np.uint8)
    overlap = label_overlap(truth, prediction, {"a": 1, "b": 3, "both": (1, 3), "none": 9})
    for name, values in (("a", [1]), ("b", [3]), ("both", [1, 3])):
        t, p = np.isin(truth, values), np.isin(prediction, values)
        assert overlap[name] == {
            "Dice": pytest.approx(dice(t, p)),
            "IoU": pytest.approx((t & p).sum() / (t | p).sum()),
            "TP": (t & p).sum(),
            "FP": (~t & p).sum(),
            "FN": (t & ~p).sum(),
            "TN": (~t & ~p).sum(),
            "n_ref": t.sum(),
            "n_pred": p.sum(),
        }
    assert overlap["none"]["Dice"] is None
    assert overlap["none"]["TN"] == truth.size
