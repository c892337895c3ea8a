"""Scaling laws: how scores grow with annotated scans, and what synthetic tumours save.

Every curve (class, split, metric, arm) gets a saturating power law a - b n^-c, a plateau and a
forecast; every pair of arms gets savings, paired differences and the annotation-equivalent of the
synthetic arm. All intervals are 95 % and rest on the same bootstrap draws (see `resampling`). When
a law counts as identifiable is said in `single_curve`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from tumorjax.errors import UserError
from tumorjax.files import location, write_json_atomic
from tumorjax.scaling import resampling
from tumorjax.scaling.resampling import Noise, Sampled
from tumorjax.scaling.results import (
    ALL_TUMORS,
    ARMS,
    LESS_IS_BETTER,
    METRICS,
    REAL,
    SPLITS,
    WITH_SYNTHETIC,
    Cases,
    Curve,
    Observation,
    curves,
    read_cases,
    read_table,
    setting,
)
from tumorjax.scaling.single_curve import (
    PERCENTILES,
    Law,
    describe,
    equivalents,
    forecast,
    interval_of,
    no_forecast,
    no_law,
    rounded,
    rounded_one,
)

MARGIN = 1.0
BOOTSTRAP = 500


def fit(
    n: Sequence[float] | np.ndarray,
    score: Sequence[float] | np.ndarray,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
) -> dict[str, Any]:
    """Fits the saturating power law a - b n^-c to one curve.

    Args:
        n: numbers of annotated scans, [points]; an n that comes several times has several seeds.
        score: percent, [points].
        bootstrap: number of bootstrap draws behind the intervals: over seeds where there are any,
            else over residuals.
        seed: seed of the draws.

    Returns:
        form, a, b, c, interval (of each, 95 %), identifiable, and reason where it is not. What the
        data cannot tell is None.

    Raises:
        UserError: the arrays do not match, or hold something else than percentages of positive n.
    """
    return describe(_single(n, score, bootstrap, seed))[0]


def plateau(
    n: Sequence[float] | np.ndarray,
    score: Sequence[float] | np.ndarray,
    margin: float = MARGIN,
    bootstrap: int = BOOTSTRAP,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns where a curve stops to gain more than the margin.

    Args:
        n: numbers of annotated scans, [points]; an n that comes several times has several seeds.
        score: percent, [points].
        margin: points of the score.
        bootstrap: number of bootstrap draws behind n_sure; see `fit`.
        seed: seed of the draws.

    Returns:
        n: the smallest whose mean is within the margin of the curve's best; margin; n_sure: the
        smallest whose distance from the best is under the margin in 95 % of the draws, None where
        there is none or the data say nothing about chance.

    Raises:
        UserError: see `fit`.
    """
    return _plateau(_single(n, score, bootstrap, seed), margin)


def savings(
    table: Any, settings: Mapping[str, Any] | None = None, cases: Cases | None = None
) -> list[dict]:
    """Returns how many annotated scans the synthetic arm saves: the `savings` of `analyse`."""
    return analyse(table, settings, cases)["savings"]


def analyse(
    table: Any, settings: Mapping[str, Any] | None = None, cases: Cases | None = None
) -> dict[str, Any]:
    """Returns laws, plateaus, savings and forecasts of a results table.

    Args:
        table: data frame or rows with split, arm, n_real and at least one metric; class, seed, cell
            and METRIC_low, METRIC_high are optional. Rows of the same class, split, arm and n_real
            are seeds. See `results.curves`.
        settings: metrics, splits, margin (points), bootstrap (draws), seed; defaults where absent.
        cases: cell -> its rows of cases.csv; with them intervals are over patients.

    Returns:
        What laws.json holds: curves, savings, equivalents, differences and settings. Curves of all
        tumours together come first. Numbers, strings, lists and None only.

    Raises:
        UserError: the table or a setting is not usable.
    """
    metrics, splits, margin, bootstrap, seed = check_settings(settings)
    measured = curves(table, metrics, splits, str(setting(settings, "name", "results table")))
    patients = {} if not cases else resampling.patient_deviations(cases, measured, bootstrap, seed)
    report: dict[str, Any] = {
        "curves": [],
        "savings": [],
        "equivalents": [],
        "differences": [],
        "settings": {
            "metrics": [m for m in metrics if any(m == key[2] for key in measured)],
            "splits": list(splits),
            "margin": margin,
            "bootstrap": bootstrap,
            "seed": seed,
        },
    }
    for group in dict.fromkeys(key[:3] for key in measured):
        arms = {arm: measured[*group, arm] for arm in ARMS if (*group, arm) in measured}
        noise = resampling.training_noise(list(arms.values()))
        ceiling = math.inf if group[2] in LESS_IS_BETTER else 100.0
        sampled = {
            arm: resampling.sample(
                curve,
                noise,
                bootstrap,
                resampling.generator(seed, *group, arm),
                patients.get(group),
                ceiling,
            )
            for arm, curve in arms.items()
        }
        _analyse_group(report, group, sampled, margin, seed)
    return report


def _analyse_group(
    report: dict[str, Any],
    group: tuple[str, str, str],
    arms: dict[str, Sampled],
    margin: float,
    seed: int,
) -> None:
    """Adds one class's, split's and metric's arms to the report."""
    label, split, metric = group
    head = {"split": split, "metric": metric, "class": label}
    fitted: dict[str, tuple[dict, Law | None]] = {}
    for arm, curve in arms.items():
        entry: dict[str, Any] = {"split": split, "arm": arm, "metric": metric, "class": label}
        entry["n"] = [int(n) for n in curve.n]
        entry["mean"] = rounded(curve.mean)
        low, high = interval_of(curve.measured, len(curve.n))
        entry["low"], entry["high"] = low, high
        entry["seeds"] = [int(count) for count in curve.seeds]
        entry["interval_over"] = curve.source or None
        if metric in LESS_IS_BETTER:
            fitted[arm] = no_law("no law is fitted where less is better"), None
            entry["plateau"] = {"n": None, "margin": None, "n_sure": None}
            entry["forecast"] = no_forecast()
        else:
            fitted[arm] = describe(curve)
            entry["plateau"] = _plateau(curve, margin)
            rng = resampling.generator(seed, *group, arm, "forecast")
            entry["forecast"] = forecast(curve, fitted[arm][1], rng)
        entry["law"] = fitted[arm][0]
        report["curves"].append(entry)
    if set(ARMS) <= set(arms):
        report["differences"].append(head | _differences(arms))
        if metric not in LESS_IS_BETTER:
            report["savings"].append(head | _savings(arms, margin))
            report["equivalents"].append(head | equivalents(arms, fitted[REAL]))


# Plateau, savings, differences


def _first_within(
    scores: Float[np.ndarray, "samples points"], n: Float[np.ndarray, " points"], margin: float
) -> Float[np.ndarray, " samples"]:
    """Returns the smallest n of each sample that is within the margin of its best."""
    # A hair more than the margin, for scores such as 59.7 - 58.7 whose difference is inexact.
    return n[(scores >= scores.max(1, keepdims=True) - margin - 1e-9).argmax(1)]


def _plateau(curve: Sampled, margin: float) -> dict[str, Any]:
    n_sure = None
    if curve.draws is not None:
        missing = curve.draws.max(1, keepdims=True) - curve.draws
        sure = (missing < margin).mean(0) >= 0.95
        n_sure = int(curve.n[sure.argmax()]) if sure.any() else None
    n = int(_first_within(curve.mean[None], curve.n, margin)[0])
    return {"n": n, "margin": margin, "n_sure": n_sure}


def _savings(arms: dict[str, Sampled], margin: float) -> dict[str, Any]:
    """Returns the savings between the two plateaus, and those at the same score.

    The latter compare where real scans alone level off with the smallest n at which the synthetic
    arm comes within the margin of the best that real scans alone reach (null: it never does).
    """
    alone, both = arms[REAL], arms[WITH_SYNTHETIC]
    n_alone = _first_within(alone.mean[None], alone.n, margin)[0]
    n_both = _first_within(both.mean[None], both.n, margin)[0]
    result: dict[str, Any] = {
        "n_real_alone": int(n_alone),
        "n_real_with_synthetic": int(n_both),
        "saved_percent": rounded_one(100 * (1 - n_both / n_alone)),
        "interval": None,
        "best_alone": rounded_one(alone.mean.max()),
        "best_with_synthetic": rounded_one(both.mean.max()),
        "best_difference": rounded_one(both.mean.max() - alone.mean.max()),
        "best_difference_interval": None,
    }
    # A curve that ends lower may well end sooner, and one that ends higher later: whether scans are
    # saved for the same score is another question than where the two plateaus begin.
    n_same = _first_reaching(both.mean[None], both.n, alone.mean[None].max(1) - margin)[0]
    same: dict[str, Any] = {"n_real": None, "saved_percent": None, "interval": None}
    if np.isfinite(n_same):
        same["n_real"] = int(n_same)
        same["saved_percent"] = rounded_one(100 * (1 - n_same / n_alone))
    if alone.draws is not None and both.draws is not None:
        drawn_alone = _first_within(alone.draws, alone.n, margin)
        saved = 100 * (1 - _first_within(both.draws, both.n, margin) / drawn_alone)
        result["interval"] = rounded(np.percentile(saved, PERCENTILES))
        drawn = both.draws.max(1) - alone.draws.max(1)
        result["best_difference_interval"] = rounded(np.percentile(drawn, PERCENTILES))
        drawn_same = _first_reaching(both.draws, both.n, alone.draws.max(1) - margin)
        # Percentiles that are draws themselves: none lies halfway to "never".
        ends = np.percentile(100 * (1 - drawn_same / drawn_alone), PERCENTILES, method="nearest")
        same["interval"] = [rounded_one(end) if np.isfinite(end) else None for end in ends]
    return result | {"same_score": same}


def _first_reaching(
    scores: Float[np.ndarray, "samples points"],
    n: Float[np.ndarray, " points"],
    goal: Float[np.ndarray, " samples"],
) -> Float[np.ndarray, " samples"]:
    """Returns the smallest n of each sample that reaches its goal, infinite where none does."""
    reaching = scores >= goal[:, None] - 1e-9
    return np.where(reaching.any(1), n[reaching.argmax(1)], np.inf)


def _differences(arms: dict[str, Sampled]) -> dict[str, Any]:
    """Returns real+synthetic minus real at each n that both arms have, on the same patients."""
    alone, both = arms[REAL], arms[WITH_SYNTHETIC]
    n, at_alone, at_both = np.intersect1d(alone.n, both.n, return_indices=True)
    drawn = None
    if alone.draws is not None and both.draws is not None:
        drawn = both.draws[:, at_both] - alone.draws[:, at_alone]
    elif alone.measured is not None and both.measured is not None:
        drawn = both.measured[:, at_both] - alone.measured[:, at_alone]
    low, high = interval_of(drawn, len(n))
    difference = rounded(both.mean[at_both] - alone.mean[at_alone])
    return {"n": [int(x) for x in n], "difference": difference, "low": low, "high": high}


# Small things


def _single(n: Any, score: Any, bootstrap: int, seed: int) -> Sampled:
    numbers, scores = np.asarray(n, float).ravel(), np.asarray(score, float).ravel()
    if len(numbers) != len(scores) or not len(numbers):
        raise UserError(f"{len(numbers)} n and {len(scores)} scores. Expected as many of each")
    if not (numbers > 0).all() or not ((scores >= 0) & (scores <= 100)).all():
        raise UserError("n must be positive and scores percentages from 0 to 100")
    curve: Curve = {}
    for number, value in sorted(zip(numbers, scores, strict=True), key=lambda pair: pair[0]):
        curve.setdefault(number, []).append(Observation("", float(value), math.nan, math.nan))
    noise: Noise = resampling.training_noise([curve])
    return resampling.sample(curve, noise, bootstrap, resampling.generator(seed))


def check_settings(
    settings: Mapping[str, Any] | None,
) -> tuple[tuple[str, ...], tuple[str, ...], float, int, int]:
    """Returns metrics, splits, margin, draws and seed, with defaults where absent.

    Raises:
        UserError: a setting is not usable.
    """
    metrics = tuple(setting(settings, "metrics", tuple(METRICS)))
    splits = tuple(setting(settings, "splits", SPLITS))
    margin = float(setting(settings, "margin", MARGIN))
    bootstrap = int(setting(settings, "bootstrap", BOOTSTRAP))
    seed = int(setting(settings, "seed", 0))
    for kind, values, known in (("metrics", metrics, METRICS), ("splits", splits, SPLITS)):
        wrong = [value for value in values if value not in known]
        if wrong or not values:
            raise UserError(
                f"{kind} has {', '.join(map(repr, wrong)) or 'nothing'}."
                f" Expected some of {', '.join(known)}"
            )
    if not margin > 0 or not math.isfinite(margin):
        raise UserError(f"margin is {margin:g}. Expected points of the score, more than 0")
    if not 100 <= bootstrap <= 100_000:
        raise UserError(f"bootstrap is {bootstrap}. Expected 100 to 100000 draws")
    if seed < 0:
        raise UserError(f"seed is {seed}. Expected 0 or more")
    return metrics, splits, margin, bootstrap, seed


# The job


def run(config: ConfigDict, workdir: Path) -> int:
    """Laws, plateaus, savings and report of any results table: the job of configs/laws.py.

    Where the table lies in a study's folder, the study's rows per patient are used too.

    Args:
        config: results (CSV), metrics, splits, margin, bootstrap, seed.
        workdir: gets laws.json and report/.

    Returns:
        0.

    Raises:
        UserError: the table or a setting is not usable.
    """
    # Plots are loaded here, so that whoever only fits a law need not wait for them.
    from tumorjax.scaling import report

    if not config.get("results"):
        raise UserError("no results table. Set --config.results to a CSV file")
    path, workdir = location(config.results), location(workdir)
    table, cases = read_table(path), read_cases(path.parent)
    digest = hashlib.sha256(path.read_bytes())
    if cases:
        digest.update(json.dumps(cases).encode())
    digest.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    out = workdir / "laws.json"
    if _is_done(out, digest.hexdigest()) and (workdir / "report" / "index.html").is_file():
        print(f"laws: {out} and {workdir / 'report' / 'index.html'} are up to date")
        return 0
    found = analyse(table, config.to_dict() | {"name": str(path)}, cases)
    found["settings"]["inputs_sha256"] = digest.hexdigest()
    write_json_atomic(out, found)
    report.write(workdir, config)
    for line in summary(found):
        print(line)
    print(f"laws: {out}, report: {workdir / 'report' / 'index.html'}")
    return 0


def summary(found: Mapping[str, Any]) -> list[str]:
    """Returns the plateaus and savings of all tumours together, one line per split and metric."""
    lines = []
    for saved in found["savings"]:
        if saved["class"] == ALL_TUMORS:
            interval = saved["interval"]
            between = f" (95 % {interval[0]:.0f} to {interval[1]:.0f})" if interval else ""
            lines.append(
                f"{saved['split']} {saved['metric']}: plateau at {saved['n_real_alone']} real scans"
                f" alone, at {saved['n_real_with_synthetic']} with synthetic ones:"
                f" {saved['saved_percent']:.1f} % saved{between}"
            )
    return lines


def _is_done(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text())["settings"].get("inputs_sha256") == digest
    except (ValueError, KeyError, AttributeError, TypeError):
        return False  # somebody else's file: made anew
