"""Laws, plateaus and savings: closed forms, coverage, the paper's Table 5, honest refusals."""

import csv
import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from tumorjax.errors import UserError
from tumorjax.scaling import laws, power_law, resampling, results, single_curve

N = np.array([60, 120, 278, 435, 750, 1125, 1500, 3159])

# The paper's Table 5: DSC and NSD of its pancreas study, one training a cell.
TABLE_5 = """split,arm,60,120,278,435,750,1125,1500,3159
id,real,40.2,51.0,52.7,54.4,55.4,56.1,59.3,59.7
ood,real,6.6,22.6,33.2,36.8,35.3,37.1,38.4,41.2
id,real+synthetic,48.2,56.5,58.1,59.1,58.1,59.9,59.2,59.3
ood,real+synthetic,42.7,45.5,51.8,52.8,54.1,53.0,52.6,53.5
"""


@pytest.fixture
def table_5() -> list[dict]:
    return [
        {"split": row["split"], "arm": row["arm"], "n_real": int(n), "dsc": float(row[str(n)])}
        for row in csv.DictReader(io.StringIO(TABLE_5))
        for n in N
    ]


def curve_of(found: dict, split: str, arm: str, metric: str = "dsc", label: str = "tumor") -> dict:
    wanted = {"split": split, "arm": arm, "metric": metric, "class": label}
    (curve,) = [c for c in found["curves"] if wanted.items() <= c.items()]
    return curve


# The law


@pytest.mark.parametrize(
    ("a", "b", "c"), [(60, 300, 0.5), (95, 50, 0.1), (60, 2000, 1.2), (99, 200, 0.3)]
)
def test_exact_law_is_recovered(a, b, c):
    law = laws.fit(N, a - b * N**-c)
    assert law["identifiable"]
    assert law["form"] == "a - b*n^-c"
    assert [law["a"], law["b"], law["c"]] == pytest.approx([a, b, c], rel=1e-4)
    for name, value in zip("abc", (a, b, c), strict=True):
        low, high = law["interval"][name]
        assert value * 0.99 < low <= high < value * 1.01


def test_grid_finds_the_global_least_squares_optimum(rng):
    scores = power_law.evaluate(N, 60, 300, 0.5) + rng.normal(0, 2, (10, len(N)))
    a, b, c = power_law.fit(N, scores)
    for sample, score in enumerate(scores):

        def residual(p, score=score):
            return p[0] - p[1] * (N / 500) ** -p[2] - score

        starts = [(60, b0, c0) for b0 in (5, 20) for c0 in (0.1, 0.5, 1.5)]
        bounds = ([0, 0, 0.01], [100, np.inf, 3])
        best = min(
            (least_squares(residual, s, bounds=bounds) for s in starts), key=lambda f: f.cost
        )
        found = power_law.evaluate(N, a[sample], b[sample], c[sample]) - score
        assert (found**2).sum() / 2 <= best.cost * (1 + 1e-6)


def test_bounds_hold_and_bounded_optimum_is_best(rng):
    rising = 40 + 12 * np.log10(N) + rng.normal(0, 0.1, (20, len(N)))  # would end above 100
    falling = 60 - 5 * np.log10(N) + rng.normal(0, 0.1, (20, len(N)))
    for scores in (rising, falling):
        a, b, c = power_law.fit(N, scores)
        assert ((a >= 0) & (a <= 100) & (b >= 0)).all()
        assert ((c > 0.0099) & (c < 3.0001)).all()
    assert (b == 0).all()
    assert a == pytest.approx(falling.mean(1))


def test_weights_equal_repeated_points(rng):
    scores = power_law.evaluate(N, 60, 300, 0.5) + rng.normal(0, 1, (1, len(N)))
    repeated = np.repeat(N, [3, 1, 1, 1, 1, 1, 1, 2])
    weighted = power_law.fit(N, scores, np.array([3, 1, 1, 1, 1, 1, 1, 2]))
    plain = power_law.fit(repeated, np.repeat(scores, [3, 1, 1, 1, 1, 1, 1, 2], axis=1))
    assert np.array(weighted) == pytest.approx(np.array(plain), rel=1e-6)


def test_inverse_undoes_the_law():
    n = power_law.invert(power_law.evaluate(N, 60.0, 300.0, 0.5), 60.0, 300.0, 0.5)
    assert n == pytest.approx(N)
    assert power_law.invert(np.array([60.0, 61.0]), 60.0, 300.0, 0.5).tolist() == [np.inf, np.inf]


@pytest.mark.parametrize(
    ("n", "sd", "seeds"), [(N, 0.8, 1), (np.array([4, 8, 16, 32]), 0.8, 3)], ids=["one", "three"]
)
def test_intervals_cover_the_truth(n, sd, seeds):
    truth = (60, 300, 0.5) if len(n) == 8 else (65, 60, 0.8)
    rng = np.random.default_rng(7)
    covered, forecast = [], []
    for trial in range(100):
        repeated = np.repeat(n, seeds)
        score = power_law.evaluate(repeated, *truth) + rng.normal(0, sd, len(repeated))
        curve = laws._single(repeated, score, 300, trial)
        _, law = single_curve.describe(curve)
        ends = [np.percentile(draws[1:], (2.5, 97.5)) for draws in law]
        covered.append([low <= t <= high for t, (low, high) in zip(truth, ends, strict=True)])
        ahead = single_curve.forecast(curve, law, np.random.default_rng(trial))
        seen = power_law.evaluate(2 * n[-1], *truth) + rng.normal(0, sd / np.sqrt(seeds))
        forecast.append(ahead["interval"][0] <= seen <= ahead["interval"][1])
    assert min(np.mean(covered, 0)) >= 0.87
    assert max(np.mean(covered, 0)) <= 0.99
    assert 0.85 <= np.mean(forecast) <= 1.0


def test_noisy_law_is_close_and_identifiable(rng):
    law = laws.fit(np.repeat(N, 3), 60 - 300 * np.repeat(N, 3) ** -0.5 + rng.normal(0, 0.5, 24))
    assert law["identifiable"]
    assert law["a"] == pytest.approx(60, abs=1.5)
    assert law["c"] == pytest.approx(0.5, abs=0.08)


# What data cannot tell


@pytest.mark.parametrize("points", [1, 2, 3])
def test_fewer_than_four_points_identify_nothing(points):
    law = laws.fit(N[:points], 60 - 300 * N[:points] ** -0.5)
    assert not law["identifiable"]
    assert law["a"] is law["b"] is law["c"] is None
    assert law["interval"] == {name: [None, None] for name in "abc"}
    assert "at least four" in law["reason"]
    assert laws.plateau(N[:points], 60 - 300 * N[:points] ** -0.5)["n_sure"] is None


def test_flat_falling_and_noise_are_not_identifiable():
    rng = np.random.default_rng(3)
    for seeds in (1, 3):
        n = np.repeat(N, seeds)
        false_alarms = [
            laws.fit(n, 60 + rng.normal(0, 1, len(n)), bootstrap=200)["identifiable"]
            for _ in range(40)
        ]
        assert sum(false_alarms) <= 1
    assert not laws.fit(N, np.full(8, 60.0))["identifiable"]
    falling = laws.fit(N, 60 - 4 * np.log10(N))
    assert not falling["identifiable"]
    assert "does not rise" in falling["reason"]


def test_straight_line_in_log_n_has_no_known_end():
    law = laws.fit(N, 10 + 15 * np.log10(N) + np.tile([0.5, -0.5], 4))
    assert not law["identifiable"]
    assert law["a"] is None


def test_step_knows_its_end_but_not_its_steepness():
    law = laws.fit(
        np.repeat(N, 3), np.where(np.repeat(N, 3) < 100, 40, 60) + np.tile([0, 1, -1], 8)
    )
    assert not law["identifiable"]
    assert law["a"] == pytest.approx(60, abs=1)
    assert law["c"] is None


# Plateau, savings, equivalents


def test_table_5_gives_the_papers_figures(table_5):
    found = laws.analyse(table_5)
    assert curve_of(found, "id", "real")["plateau"]["n"] == 1500
    assert curve_of(found, "id", "real+synthetic")["plateau"]["n"] == 435
    saved = {s["split"]: s for s in laws.savings(table_5)}
    assert saved["id"]["n_real_alone"] == 1500
    assert saved["id"]["n_real_with_synthetic"] == 435
    assert saved["id"]["saved_percent"] == 71.0
    assert saved["ood"]["n_real_alone"] == 3159
    assert saved["id"]["same_score"]["n_real"] == 435
    # One training a cell: whether the plateaus lie there, the table cannot tell.
    assert curve_of(found, "id", "real")["plateau"]["n_sure"] is None
    low, high = saved["id"]["interval"]
    assert low < 0 < 71 < high <= 100


def test_plateau_by_its_definition():
    n, score = [10, 20, 40, 80], [50, 58.7, 59.7, 59.2]
    assert laws.plateau(n, score)["n"] == 20  # 59.7 - 58.7 is 1 but for rounding
    assert laws.plateau(n, score, margin=0.9)["n"] == 40
    assert laws.plateau(n[::-1], score[::-1]) == laws.plateau(n, score)
    assert laws.plateau(n, [50, 60, 50, 40])["n"] == 20


def test_plateau_is_sure_with_many_seeds_and_never_before_its_mean(rng):
    n = np.repeat([10, 20, 40, 80], 6)
    level = {10: 50, 20: 59.6, 40: 60, 80: 60}
    score = np.array([level[x] for x in n]) + rng.normal(0, 0.1, len(n))
    assert laws.plateau(n, score)["n_sure"] == 20
    noisy = np.array([level[x] for x in n]) + rng.normal(0, 5, len(n))
    assert laws.plateau(n, noisy)["n_sure"] is None


def two_arms(real, both, n=N, **more) -> list[dict]:
    return [
        {"split": "id", "arm": arm, "n_real": int(x), "dsc": float(y)} | more
        for arm, curve in (("real", real), ("real+synthetic", both))
        for x, y in zip(n, curve, strict=True)
    ]


def test_equivalents_invert_the_real_law():
    # A synthetic arm that is worth exactly twice its real scans.
    found = laws.analyse(two_arms(60 - 300 * N**-0.5, 60 - 300 * (2.0 * N) ** -0.5))
    (entry,) = found["equivalents"]
    assert entry["method"] == "law"
    for point in entry["points"][:-1]:  # the last is at the limit of what is extrapolated
        assert point["n_real_alone"] == pytest.approx(2 * point["n_real"], rel=1e-3)
        low, high = point["interval"]
        assert low * 0.999 <= point["n_real_alone"] <= high * 1.001


def test_equivalents_interpolate_within_the_data_only():
    found = laws.analyse(two_arms([30, 40, 50], [20, 45, 60], n=[100, 200, 400]))
    (entry,) = found["equivalents"]
    assert entry["method"] == "interpolation"
    below, within, above = entry["points"]
    assert (below["n_real_alone"], below["beyond"]) == (None, "below")
    assert within["n_real_alone"] == pytest.approx(math.sqrt(200 * 400), rel=1e-4)
    assert (above["n_real_alone"], above["beyond"]) == (None, "above")


def test_forecast_and_its_check():
    score = 60 - 300 * N**-0.5
    (curve,) = laws.analyse([row for row in two_arms(score, score) if row["arm"] == "real"])[
        "curves"
    ]
    ahead = curve["forecast"]
    assert ahead["n"] == 2 * 3159
    assert ahead["score"] == pytest.approx(60 - 300 * 6318**-0.5, abs=1e-3)
    assert ahead["left_out"]["n"] == 3159
    assert ahead["left_out"]["predicted"] == pytest.approx(score[-1], abs=1e-3)
    assert ahead["left_out"]["observed"] == pytest.approx(score[-1], abs=1e-4)


def test_ending_lower_is_told_apart_from_saving():
    (saved,) = laws.savings(two_arms(60 - 300 * N**-0.5, np.linspace(49.5, 50, 8)))
    assert saved["n_real_with_synthetic"] == 60
    assert saved["saved_percent"] > 90
    assert saved["best_difference"] < -4
    assert saved["same_score"]["n_real"] is saved["same_score"]["saved_percent"] is None
    assert saved["same_score"]["interval"] == [None, None]


def test_ending_higher_and_later_still_saves_at_the_same_score():
    (saved,) = laws.savings(two_arms(60 - 300 * N**-0.5, 80 - 300 * N**-0.5))
    assert saved["n_real_with_synthetic"] >= saved["n_real_alone"] == 3159
    assert saved["same_score"]["n_real"] == 278  # 120 give 52.6, short of 54.7 less the margin
    assert saved["same_score"]["saved_percent"] == pytest.approx(100 * (1 - 278 / 3159), abs=1e-3)


# The table


def cases_of(cell_scores: dict, rng, patients: int = 60) -> dict:
    """Rows per patient whose scores share each patient's own difficulty."""
    difficulty = rng.normal(0, 15, patients)
    empty = {
        f"{kind}_{group}": 0 for group in results.SIZE_GROUPS for kind in ("lesions", "detected")
    }
    cases = {}
    for cell, mean in cell_scores.items():
        score = np.clip(mean + difficulty + rng.normal(0, 1, patients), 0, 100)
        cases[cell] = [
            {"case": f"c{i}", "patient": f"p{i}", "split": "id", "class": "tumor", "has_tumor": 1}
            | {"predicted_tumor": int(s > 20), "score": s / 100, "dsc": s, "nsd": s}
            | {"n_lesions": 1, "n_detected": int(s > 20), "n_early": 0, "n_early_detected": 0}
            | {"false_positives": 0}
            | empty
            for i, s in enumerate(score)
        ]
    return cases


def test_intervals_over_patients_are_paired_between_arms(rng):
    scores = {
        (arm, n): 40 + 4 * i + 6 * (arm != "real")
        for arm in results.ARMS
        for i, n in enumerate((10, 20, 40))
    }
    cells = {results.cell_name(arm, n, 0): score for (arm, n), score in scores.items()}
    cases = cases_of(cells, rng)
    table = [
        {"cell": cell, "split": "id", "arm": arm, "n_real": n, "seed": 0, "class": "tumor"}
        | {"dsc": np.mean([row["dsc"] for row in cases[cell]])}
        for (arm, n), cell in zip(scores, cells, strict=True)
    ]
    found = laws.analyse(table, {"bootstrap": 1000}, cases)
    (real, _) = found["curves"]
    assert real["interval_over"] == "patients"
    (difference,) = found["differences"]
    for point in range(3):
        values = np.array(
            [row["dsc"] for row in cases[results.cell_name("real", real["n"][point], 0)]]
        )
        half = 1.96 * values.std() / np.sqrt(len(values))
        width = real["high"][point] - real["low"][point]
        assert width == pytest.approx(2 * half, rel=0.2)
        # Difficulty is common to both arms and cancels in the difference.
        assert difference["high"][point] - difference["low"][point] < width / 3
        assert (
            difference["low"][point] < difference["difference"][point] < difference["high"][point]
        )


def test_seeds_and_patients_add_up(rng):
    n = np.repeat([10, 20, 40, 80], 4)
    score = 60 - 40 * n**-0.5 + rng.normal(0, 2, 16)
    curve = {}
    for x, s in zip(n, score, strict=True):
        curve.setdefault(int(x), []).append(results.Observation("", float(s), s - 4, s + 4))
    noise = resampling.training_noise([curve])
    assert (noise.source, noise.freedom) == ("seeds", 12)
    sampled = resampling.sample(curve, noise, 20_000, rng)
    t_variance = 12 / 10  # of Student's t
    expected = math.sqrt(noise.sd**2 / 4 * t_variance + (8 / 3.92) ** 2)
    assert sampled.draws.std(0) == pytest.approx(expected, rel=0.03)
    assert sampled.source == "intervals and seeds"


def test_repeated_rows_are_seeds_and_order_does_not_matter(table_5, rng):
    seeds = [
        row | {"seed": seed, "dsc": row["dsc"] + seed - 1} for seed in range(3) for row in table_5
    ]
    found = laws.analyse(seeds)
    curve = curve_of(found, "id", "real")
    assert curve["seeds"] == [3] * 8
    assert curve["mean"] == pytest.approx([40.2, 51.0, 52.7, 54.4, 55.4, 56.1, 59.3, 59.7])
    assert curve["interval_over"] == "seeds"
    assert found == laws.analyse(
        [seeds[i] for i in np.argsort([r["n_real"] for r in seeds], kind="stable")]
    )


def test_classes_come_after_all_tumours_and_data_frames_equal_rows(table_5):
    rows = [row | {"class": label} for label in ("liver_lesion", "tumor") for row in table_5]
    found = laws.analyse(pd.DataFrame(rows))
    assert [c["class"] for c in found["curves"]] == ["tumor"] * 4 + ["liver_lesion"] * 4
    assert found == laws.analyse(rows)


def test_undefined_is_left_out_and_json_has_no_nan(table_5):
    for row in table_5:
        row["nsd"] = "" if row["n_real"] != 435 else 50
        row["false_positives_per_scan"] = 100 / row["n_real"]
        row["auc"] = math.nan
    found = laws.analyse(table_5)
    assert curve_of(found, "id", "real", "nsd")["n"] == [435]
    assert "auc" not in found["settings"]["metrics"]
    alarms = curve_of(found, "id", "real", "false_positives_per_scan")
    assert alarms["mean"][0] == pytest.approx(100 / 60, abs=1e-3)
    assert alarms["law"]["a"] is None
    assert not any(s["metric"] == "false_positives_per_scan" for s in found["savings"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_schema(table_5):
    found = laws.analyse(table_5)
    for curve in found["curves"]:
        assert {
            "split",
            "arm",
            "metric",
            "n",
            "mean",
            "low",
            "high",
            "law",
            "plateau",
            "forecast",
        } <= set(curve)
        assert {"form", "a", "b", "c", "interval", "identifiable"} <= set(curve["law"])
        assert set(curve["plateau"]) == {"n", "margin", "n_sure"}
        assert {"n", "score", "interval", "left_out"} == set(curve["forecast"])
        assert {"n", "predicted", "observed"} <= set(curve["forecast"]["left_out"])
        assert len(curve["n"]) == len(curve["mean"]) == len(curve["low"]) == len(curve["high"])
    for saved in found["savings"]:
        names = {
            "split",
            "metric",
            "n_real_alone",
            "n_real_with_synthetic",
            "saved_percent",
            "interval",
        }
        assert names <= set(saved)


def test_same_seed_same_result_other_seed_other_draws(table_5):
    first, again, other = (laws.analyse(table_5, {"seed": seed}) for seed in (0, 0, 1))
    assert first == again
    assert curve_of(first, "id", "real")["low"] != curve_of(other, "id", "real")["low"]
    assert curve_of(first, "id", "real")["mean"] == curve_of(other, "id", "real")["mean"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "synthetic"}, "row 3: arm is 'synthetic'"),
        ({"split": "test"}, "row 3: split is 'test'"),
        ({"n_real": 0}, "row 3: n_real is 0"),
        ({"n_real": 1.5}, "row 3: n_real is 1.5"),
        ({"n_real": ""}, "row 3: n_real is ''"),
        ({"dsc": "high"}, "row 3: dsc is 'high'"),
        ({"dsc": 101}, "row 3: dsc is 101"),
        ({"dsc": math.inf}, "row 3: dsc is infinite"),
    ],
)
def test_bad_values_name_their_row(table_5, change, message):
    table_5[1] |= change
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        laws.analyse(table_5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": 0}, "margin is 0"),
        ({"metrics": ("dice",)}, "metrics has 'dice'"),
        ({"splits": ()}, "splits has nothing"),
        ({"bootstrap": 5}, "bootstrap is 5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings(table_5, settings, message):
    with pytest.raises(UserError, match=message):
        laws.analyse(table_5, settings)


def test_bad_arrays():
    with pytest.raises(UserError, match="2 n and 3 scores"):
        laws.fit([1, 2], [1, 2, 3])
    with pytest.raises(UserError, match="positive"):
        laws.fit([0, 1, 2, 3], [1, 2, 3, 4])
    with pytest.raises(UserError, match="percentages"):
        laws.fit([1, 2, 3, 4], [1, 2, 3, math.nan])
