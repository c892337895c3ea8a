"""Paired tests against scipy, statsmodels and closed forms; false alarms counted by simulation."""

import json

import numpy as np
import pytest
from scipy import stats

from tumorjax.errors import UserError
from tumorjax.evaluation import comparison
from tumorjax.evaluation.comparison import compare, correct, holm, on_same_cases, signed_rank
from tumorjax.evaluation.summary import CASE_COLUMNS, METRICS, paired_difference, summarize
from tumorjax.files import write_csv_atomic

SETTINGS = {"seed": 0, "confidence": 0.95, "resamples": 2000}


def row(case, patient=None, **values):
    base = dict.fromkeys(CASE_COLUMNS, 0) | {"case": case, "patient": patient or case}
    base |= {"split": "id", "class": "liver_lesion", "score": None, "dsc": None, "nsd": None}
    return base | values


def tumour(case, dsc, found=1, **values):
    there = {"has_tumor": 1, "predicted_tumor": int(dsc > 0), "dsc": dsc, "nsd": dsc / 2}
    return row(case, **(there | {"n_lesions": 1, "n_detected": found} | values))


def model(name, rows, folder="", rejected=(), **info):
    return comparison.Model(name, folder, list(rows), frozenset(rejected), info)


def by_metric(lines):
    return {line["metric"]: line for line in lines}


# Holm


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # Wikipedia's example
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.2, None, 0.01], [0.2, None, 0.02]),
        ([None], [None]),
        ([], []),
    ],
)
def test_holm_by_hand(p, expected):
    assert holm(p) == [None if e is None else pytest.approx(e) for e in expected]


def test_holm_equals_statsmodels(rng):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for count in (1, 2, 7, 40):
        p = rng.random(count) ** 3
        p[: count // 3] = p[0]  # ties
        assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_families_are_corrected_apart():
    def line(metric, p):
        values = dict.fromkeys(comparison.COLUMNS) | {"metric": metric}
        return values | {"p_bootstrap": p, "p_wilcoxon": p}

    lines = [line("dsc", 0.02), line("dsc", 0.03), line("nsd", 0.01), line("nsd", None)]
    apart = correct(lines, "metric")
    assert [entry["p_wilcoxon_holm"] for entry in apart] == [0.04, 0.04, 0.01, None]
    assert [entry["n_tests"] for entry in apart] == [2, 2, 1, 1]
    together = correct(lines, "all")
    assert [entry["p_bootstrap_holm"] for entry in together] == [0.04, 0.04, 0.03, None]
    with pytest.raises(UserError, match="family is 'class'"):
        correct(lines, "class")


# Tests of two models


def two_models(rng, patients=40, effect=0.0, noise=8.0):
    """Two models whose scores share what patients have in common; some patients are healthy."""
    first, second = [], []
    for number in range(patients):
        if number % 5 == 0:
            for rows in (first, second):
                rows.append(row(f"s{number}", false_positives=int(rng.integers(0, 3))))
            continue
        base = rng.uniform(30, 80)
        for rows, shift in ((first, 0.0), (second, effect)):
            dsc = float(np.clip(base + shift + rng.normal(0, noise), 0, 100))
            rows.append(tumour(f"s{number}", dsc, int(rng.random() < 0.7)))
    return model("first", first), model("second", second)


def test_wilcoxon_is_scipys_on_each_patients_value(rng):
    first, second = two_models(rng, effect=4)
    lines = by_metric(compare(second, first, SETTINGS, 100))
    pairs = [
        (a, b) for a, b in zip(first.rows, second.rows, strict=True) if a["has_tumor"]
    ]  # fmt: skip
    for metric in ("dsc", "nsd"):
        values = np.array([[a[metric], b[metric]] for a, b in pairs])
        expected = stats.wilcoxon(values[:, 1], values[:, 0]).pvalue
        assert lines[metric]["p_wilcoxon"] == pytest.approx(expected)
        assert lines[metric]["n_patients"] == 32
    found = np.array([[a["n_detected"], b["n_detected"]] for a, b in pairs]) * 100.0
    expected = stats.wilcoxon(found[:, 1], found[:, 0]).pvalue
    assert lines["tumor_sensitivity"]["p_wilcoxon"] == pytest.approx(expected)


def test_exact_signed_rank_by_hand():
    """All of n differences point one way: two of 2^n equally likely signs are so extreme."""
    assert signed_rank(np.array([1.0, 2.5, 3.1, 4.7, 5.9, 7.2])) == pytest.approx(2 / 2**6)
    assert signed_rank(np.zeros(5)) == 1
    assert signed_rank(np.array([])) is None
    assert signed_rank(np.array([1e-13, 0.0])) == 1


def test_difference_and_interval_are_those_of_paired_difference(rng):
    first, second = two_models(rng, effect=3)
    lines = by_metric(compare(second, first, SETTINGS, 2000))
    (expected,) = paired_difference(first.rows, second.rows, SETTINGS)
    for metric in METRICS:
        assert lines[metric]["difference"] == pytest.approx(expected[metric])
        assert lines[metric]["difference_low"] == pytest.approx(expected[f"{metric}_low"])
        assert lines[metric]["difference_high"] == pytest.approx(expected[f"{metric}_high"])
    (summary,) = summarize(second.rows, SETTINGS)
    assert lines["dsc"]["value"] == pytest.approx(summary["dsc"])


def test_resamples_do_not_depend_on_how_many_are_drawn_at_once(rng, monkeypatch):
    first, second = two_models(rng)
    whole = compare(second, first, SETTINGS, 500)
    monkeypatch.setattr(comparison, "_BLOCK", 40 * 37)
    assert compare(second, first, SETTINGS, 500) == whole


def test_bootstrap_p_agrees_with_the_t_test(rng):
    """For a mean of many differences all paired tests are the same."""
    for _ in range(5):
        first, second = two_models(rng, patients=200, effect=1.5)
        line = by_metric(compare(second, first, SETTINGS, 4000))["dsc"]
        pairs = zip(first.rows, second.rows, strict=True)
        differences = [b["dsc"] - a["dsc"] for a, b in pairs if a["has_tumor"]]
        expected = stats.ttest_1samp(differences, 0).pvalue
        assert line["p_bootstrap"] == pytest.approx(expected, abs=0.02)
        excludes_zero = line["difference_low"] > 0 or line["difference_high"] < 0
        assert (
            excludes_zero == (line["p_bootstrap"] < 0.05) or abs(line["p_bootstrap"] - 0.05) < 0.01
        )


def test_false_alarms_are_as_rare_as_they_should_be(rng):
    alarms = np.zeros(2)
    for seed in range(150):
        first, second = two_models(rng, patients=45)
        line = by_metric(compare(second, first, SETTINGS | {"seed": seed}, 400))["dsc"]
        alarms += [line["p_bootstrap"] < 0.05, line["p_wilcoxon"] < 0.05]
    assert (alarms <= 15).all()  # 7.5 expected; more than 15 has a chance of 0.4 %


def test_a_large_difference_is_found_and_its_sign_is_the_models(rng):
    first, second = two_models(rng, effect=15)
    line = by_metric(compare(second, first, SETTINGS, 2000))["dsc"]
    assert line["difference"] > 8
    assert line["p_bootstrap"] == pytest.approx(2 / 2001)
    assert line["p_wilcoxon"] < 1e-4
    other_way = by_metric(compare(first, second, SETTINGS, 2000))["dsc"]
    assert other_way["difference"] == pytest.approx(-line["difference"])
    assert other_way["p_wilcoxon"] == pytest.approx(line["p_wilcoxon"])


def test_equal_models_do_not_differ(rng):
    first, _ = two_models(rng)
    lines = by_metric(compare(first._replace(name="again"), first, SETTINGS, 200))
    assert (lines["dsc"]["difference"], lines["dsc"]["p_bootstrap"]) == (0, 1)
    assert lines["dsc"]["p_wilcoxon"] == 1
    early = lines["early_tumor_sensitivity"]  # no tumour is early
    assert early["p_bootstrap"] is early["difference"] is early["p_wilcoxon"] is None


def test_too_few_patients_have_no_bootstrap_p():
    first = model("a", [tumour(f"s{i}", 40.0 + i) for i in range(5)])
    second = model("b", [tumour(f"s{i}", 60.0 + 2 * i) for i in range(5)])
    line = by_metric(compare(second, first, SETTINGS, 100))["dsc"]
    assert line["p_bootstrap"] is None
    assert line["p_wilcoxon"] == pytest.approx(2 / 2**5)


def test_scans_of_a_patient_count_once(rng):
    first, second = [], []
    for number in range(12):
        for scan in range(3):
            first.append(tumour(f"s{number}-{scan}", rng.uniform(20, 80), patient=f"p{number}"))
            second.append(tumour(f"s{number}-{scan}", rng.uniform(30, 90), patient=f"p{number}"))
    line = by_metric(compare(model("b", second), model("a", first), SETTINGS, 100))["dsc"]
    means = [
        [np.mean([r["dsc"] for r in rows if r["patient"] == f"p{i}"]) for i in range(12)]
        for rows in (second, first)
    ]
    assert line["n_patients"] == 12
    assert line["p_wilcoxon"] == pytest.approx(stats.wilcoxon(*means).pvalue)


# Same cases


def test_cases_must_be_the_same_and_are_named_both_ways():
    first = model("A", [tumour("s1", 50.0), tumour("s2", 50.0)])
    second = model("B", [tumour("s2", 50.0), tumour("s3", 50.0), tumour("s4", 10.0)])
    with pytest.raises(UserError, match=r"Only A has: s1; only B has: s3, s4"):
        on_same_cases([first, second])


def test_a_case_that_one_set_aside_is_left_out_for_all():
    first = model("A", [tumour("s1", 50.0), tumour("s2", 50.0)])
    second = model("B", [tumour("s2", 40.0)], rejected=("s1",))
    chosen, left_out = on_same_cases([first, second])
    assert left_out == ["s1"]
    assert [[r["case"] for r in m.rows] for m in chosen] == [["s2"], ["s2"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_lesions": 2}, r"s1 has another truth.*n_lesions 2.0"),
        ({"patient": "p"}, "patient p"),
        ({"split": "ood"}, "split ood"),
    ],
)
def test_truths_must_be_the_same(change, message):
    first = model("A", [tumour("s1", 50.0)])
    second = model("B", [tumour("s1", 50.0) | change])
    with pytest.raises(UserError, match=message):
        on_same_cases([first, second])


def test_grids_and_rules_must_be_the_same():
    rows = [tumour("s1", 50.0)]
    on_network = model("A", rows, grid="the network's grid, 2 x 2 x 2 mm")
    with pytest.raises(UserError, match=r"A was measured on the network's grid.* B on the scans"):
        on_same_cases([on_network, model("B", rows, grid="the scans' own grids")])
    rules = [{"tolerance_mm": t, "resamples": r} for t, r in ((2.0, 1), (4.0, 1), (2.0, 9))]
    models = [model(name, rows, settings=r) for name, r in zip("ABC", rules, strict=True)]
    with pytest.raises(UserError, match=r"tolerance_mm was 2.0 and is 4.0"):
        on_same_cases(models[:2])
    on_same_cases([models[0], models[2]])  # resamples are no rule of measuring


def test_a_class_that_only_one_model_predicts_is_compared_as_absent():
    first = [tumour("s1", 50.0), tumour("s2", 30.0)]
    second = first + [
        row(case, **{"class": "kidney_lesion", "predicted_tumor": 1, "false_positives": 2})
        for case in ("s1", "s2")
    ]
    (a, b), _ = on_same_cases([model("A", first), model("B", second)])
    lines = compare(b, a, SETTINGS, 100)
    false = {
        line["class"]: line["difference"]
        for line in lines
        if line["metric"] == "false_positives_per_scan"
    }
    assert false == {"liver_lesion": 0, "kidney_lesion": 2}


def test_models_are_read_from_their_folders(tmp_path):
    rows = [tumour("s1", 50.0), tumour("s2", 70.5)]
    write_csv_atomic(tmp_path / "cases.csv", rows, CASE_COLUMNS)
    cell = comparison.read_model("cell", tmp_path)  # a study's cell has no evaluation.json
    assert (cell.info, cell.rejected) == ({}, frozenset())
    (tmp_path / "evaluation.json").write_text(json.dumps({"grid": "x"}))
    (tmp_path / "rejected.csv").write_text("case,stage,reason\ns9,evaluation,bad\n")
    whole = comparison.read_model("whole", tmp_path)
    assert (whole.info, whole.rejected) == ({"grid": "x"}, frozenset({"s9"}))
    fresh = model("fresh", rows)
    line = by_metric(compare(on_same_cases([fresh, whole])[0][0], whole, SETTINGS, 50))["dsc"]
    assert line["difference"] == pytest.approx(0)
    with pytest.raises(UserError, match=r"compare\.none: .*nowhere has no results"):
        comparison.read_model("none", tmp_path / "nowhere")
