"""What one curve's draws say: its law, its forecast, and another curve's worth in its scans.

A law is identifiable when all of this holds, else it says so and gives a reason:
- there are at least four different n, one more than the law has parameters;
- the curve rises: fewer than 2.5 % of the draws are best fitted by a flat line;
- a is known better than the curve itself rises: its interval is narrower than the law's rise from
  the smallest to the largest n, and stays below the highest possible score;
- the interval of c stays inside `power_law.EXPONENTS`.
What is not known is null; a may be known while b and c are not, for instance after a steep rise.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from tumorjax.scaling import power_law, resampling
from tumorjax.scaling.resampling import Sampled
from tumorjax.scaling.results import REAL, WITH_SYNTHETIC

FORM = "a - b*n^-c"
PERCENTILES = (2.5, 97.5)
_POINTS_NEEDED = 4
# A law is not followed further than this many times the largest n that was measured.
_REACH = 2.0

# a, b and c; each holds the fit itself and then the fit of every draw.
Law = tuple[np.ndarray, np.ndarray, np.ndarray]


def describe(curve: Sampled) -> tuple[dict[str, Any], Law | None]:
    """Returns a curve's law as laws.json has it, and its draws (the first is the fit itself)."""
    if len(curve.n) < _POINTS_NEEDED:
        reason = f"there are {len(curve.n)} different n, and three parameters need at least four"
        return no_law(reason), None
    assert curve.draws is not None  # four points or more have residuals at least
    law = _fit_draws(curve.n, curve.mean, curve.draws, curve.seeds)
    a, b, c = law
    ends = power_law.evaluate(curve.n[[0, -1]][:, None], *law)
    rise = ends[1] - ends[0]
    lowest = np.percentile(rise[1:], PERCENTILES[0])
    interval = {
        name: np.percentile(values[1:], PERCENTILES)
        for name, values in zip("abc", law, strict=True)
    }
    edge = 1e-6
    inside = power_law.EXPONENTS[0] * (1 + edge), power_law.EXPONENTS[1] * (1 - edge)
    result = no_law("")
    if b[0] <= edge or lowest <= edge:
        result["reason"] = "the curve does not rise beyond its noise"
        return result, law
    knows_a = interval["a"][1] < 100 - edge and np.ptp(interval["a"]) < rise[0]
    knows_c = inside[0] < interval["c"][0] and interval["c"][1] < inside[1]
    if knows_a:
        result["a"] = rounded_one(a[0])
        result["interval"]["a"] = rounded(interval["a"])
    if knows_a and knows_c:
        result["b"], result["c"] = significant(b[0]), significant(c[0])
        for name in "bc":
            result["interval"][name] = [significant(x) for x in interval[name]]
        result["identifiable"] = True
        result.pop("reason")
    elif knows_a:
        result["reason"] = "how steeply the curve rises is not known from so few rising points"
    else:
        result["reason"] = "where the curve ends is less well known than what it has risen so far"
    return result, law


def _fit_draws(n: np.ndarray, mean: np.ndarray, draws: np.ndarray, seeds: np.ndarray) -> Law:
    """Returns a, b and c of the mean and then of each draw; draws need no more than 0.1 %."""
    first = power_law.fit(n, mean[None], seeds)
    rest = power_law.fit(n, draws, seeds, refinements=4)
    a, b, c = (np.concatenate(pair) for pair in zip(first, rest, strict=True))
    return a, b, c


def no_law(reason: str) -> dict[str, Any]:
    """Returns the entry of a law that is not identifiable, with nothing in it but the reason."""
    unknown: dict[str, Any] = {"form": FORM, "a": None, "b": None, "c": None}
    unknown["interval"] = {name: [None, None] for name in "abc"}
    return unknown | {"identifiable": False, "reason": reason}


def equivalents(
    arms: dict[str, Sampled], real_law: tuple[dict[str, Any], Law | None]
) -> dict[str, Any]:
    """Returns how many real scans alone give the score of each point of the synthetic arm.

    By the real arm's law where it is identifiable, up to `_REACH` times the largest n; else by
    interpolation in log n between the points, made to never fall. Outside of that it is null, with
    `beyond` "above" or "below" what real scans alone were seen to give.
    """
    alone, both = arms[REAL], arms[WITH_SYNTHETIC]
    described, law = real_law
    by_law = described["identifiable"] and law is not None
    largest = alone.n[-1] * (_REACH if by_law else 1)

    def equivalent(scores, curves, law):
        """Scans of real data alone, [samples]; infinite above and 0 below what can be told."""
        n = power_law.invert(scores, *law) if by_law else _interpolated(scores, alone.n, curves)
        return np.where(n > largest, np.inf, np.where(n < alone.n[0], 0, n))

    first = tuple(x[:1] for x in law) if law is not None else None
    rest = tuple(x[1:] for x in law) if law is not None else None
    points = []
    for index, n_real in enumerate(both.n):
        n = float(equivalent(both.mean[index : index + 1], alone.mean[None], first)[0])
        interval: list[float | None] = [None, None]
        if alone.draws is not None and both.draws is not None:
            drawn = equivalent(both.draws[:, index], alone.draws, rest)
            # Percentiles that are draws themselves: none lies halfway to infinity.
            ends = np.percentile(drawn, PERCENTILES, method="nearest")
            interval = [None if x in (0, np.inf) else significant(x) for x in ends]
        known = 0 < n < np.inf
        points.append(
            {
                "n_real": int(n_real),
                "score": rounded_one(both.mean[index]),
                "n_real_alone": significant(n) if known else None,
                "interval": interval,
                "beyond": None if known else ("above" if n > 0 else "below"),
            }
        )
    return {"method": "law" if by_law else "interpolation", "points": points}


def _interpolated(
    scores: Float[np.ndarray, " samples"],
    n: Float[np.ndarray, " points"],
    curves: Float[np.ndarray, "samples points"],
) -> Float[np.ndarray, " samples"]:
    """Returns the n at which curves, made to never fall, reach scores; 0 or inf outside."""
    rising = np.maximum.accumulate(curves, axis=1)
    sample = np.arange(len(scores))
    after = np.maximum((rising >= scores[:, None]).argmax(1), 1 if len(n) > 1 else 0)
    before = np.maximum(after - 1, 0)
    rise = rising[sample, after] - rising[sample, before]
    share = np.clip((scores - rising[sample, before]) / np.where(rise > 0, rise, 1), 0, 1)
    log_n = np.log(n)
    result = np.exp(log_n[before] + share * (log_n[after] - log_n[before]))
    outside = np.where(scores > rising[:, -1], np.inf, 0)
    return np.where((scores >= rising[:, 0]) & (scores <= rising[:, -1]), result, outside)


def forecast(curve: Sampled, law: Law | None, rng: np.random.Generator) -> dict[str, Any]:
    """Returns the score that the law expects at twice the largest n, and how the law fares there.

    The interval is for what would be measured: with the training noise of as many seeds as the
    largest n has. The check repeats it without the largest n, where at least three points remain.
    Given only where the interval is narrower than the curve's own range or 10 points.
    """
    result = no_forecast()
    if law is None or curve.draws is None:
        return result
    n = 2 * int(curve.n[-1])
    seeds = curve.seeds[-1] if curve.noise.source == "seeds" else 1.0

    def predict(at, parameters):
        expected = power_law.evaluate(at, *parameters)
        drawn = expected[1:]
        if curve.noise.freedom:
            drawn = drawn + resampling.draw_noise(curve.noise, drawn.shape, rng) / np.sqrt(seeds)
        return expected[0], np.percentile(np.clip(drawn, 0, 100), PERCENTILES)

    score, interval = predict(n, law)
    result["n"] = n
    if np.ptp(interval) < max(10.0, np.ptp(curve.mean)):
        result["score"], result["interval"] = rounded_one(score), rounded(interval)
    rest = _fit_draws(curve.n[:-1], curve.mean[:-1], curve.draws[:, :-1], curve.seeds[:-1])
    predicted, interval = predict(curve.n[-1], rest)
    result["left_out"] = {
        "n": int(curve.n[-1]),
        "predicted": rounded_one(predicted),
        "observed": rounded_one(curve.mean[-1]),
        "interval": rounded(interval),
        "inside": bool(interval[0] <= curve.mean[-1] <= interval[1]),
    }
    return result


def no_forecast() -> dict[str, Any]:
    """Returns the entry of a forecast that cannot be made."""
    left_out = {"n": None, "predicted": None, "observed": None, "interval": None, "inside": None}
    return {"n": None, "score": None, "interval": None, "left_out": left_out}


def interval_of(draws: np.ndarray | None, points: int) -> tuple[list, list]:
    """Returns lower and upper ends of the 95 % interval of each point, None without draws."""
    if draws is None:
        return [None] * points, [None] * points
    low, high = np.percentile(draws, PERCENTILES, axis=0)
    return rounded(low), rounded(high)


def rounded_one(value: Any) -> float:
    """Returns a score as JSON has it, to 4 decimals."""
    return round(float(value), 4) + 0.0  # no -0.0


def rounded(values: Any) -> list[float]:
    """Returns scores as JSON has them, to 4 decimals."""
    return [rounded_one(value) for value in values]


def significant(value: Any) -> float:
    """Returns a number as JSON has it, to 6 digits, where its size is not known beforehand."""
    return float(f"{float(value):.6g}")
