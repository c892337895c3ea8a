"""The saturating power law a - b n^-c, fitted to many samples of one curve at once.

For a given c the law is linear in a and b, so that its best a and b under the bounds have a closed
form and a grid over c finds the global optimum: no starting values, no local minima, and hundreds
of bootstrap samples in one array operation.
"""

import numpy as np
from jaxtyping import Float

# Exponents outside are not told apart by data: below, the law is a straight line in log n over
# any range that could be measured; above, it is a step after the first point.
EXPONENTS = (0.01, 3.0)
_GRID = 64
_REFINED = 9


def evaluate(
    n: Float[np.ndarray, "*points"],
    a: Float[np.ndarray, "*samples"],
    b: Float[np.ndarray, "*samples"],
    c: Float[np.ndarray, "*samples"],
) -> Float[np.ndarray, "*points"]:
    """Returns a - b n^-c."""
    return a - b * np.asarray(n, float) ** -np.asarray(c)


def invert(
    score: Float[np.ndarray, "*samples"],
    a: Float[np.ndarray, "*samples"],
    b: Float[np.ndarray, "*samples"],
    c: Float[np.ndarray, "*samples"],
) -> Float[np.ndarray, "*samples"]:
    """Returns the n at which the law reaches a score; infinite at and above the law's ceiling a."""
    gap = np.asarray(a - score, float)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        n = (b / gap) ** (1 / c)
    return np.where(gap > 0, n, np.inf)


def fit(
    n: Float[np.ndarray, " points"],
    scores: Float[np.ndarray, "samples points"],
    weights: Float[np.ndarray, " points"] | None = None,
    ceiling: float = 100.0,
    refinements: int = 8,
) -> tuple[
    Float[np.ndarray, " samples"], Float[np.ndarray, " samples"], Float[np.ndarray, " samples"]
]:
    """Fits a - b n^-c by least squares with 0 <= a <= ceiling, b >= 0, c within `EXPONENTS`.

    Args:
        n: numbers of scans, positive.
        scores: one curve per sample, between 0 and the ceiling.
        weights: one per point, for instance the number of seeds behind it; equal by default.
        ceiling: the highest score that there can be.
        refinements: how often the grid over c is narrowed around its best value; each makes c
            four times more exact, starting from 9 %.

    Returns:
        a, b and c, each of shape [samples].
    """
    weights = np.ones(len(n)) if weights is None else np.asarray(weights, float)
    weights = weights / weights.sum()
    # Around their middle the powers of n are of the order of one whatever c is.
    middle = np.exp(weights @ np.log(n))
    log_n = np.log(np.asarray(n, float) / middle)
    low, high = np.log(EXPONENTS)
    grid = np.linspace(low, high, _GRID)[None]  # the first one is the same for all samples
    step = (high - low) / (_GRID - 1)
    offsets = np.linspace(-1, 1, _REFINED)
    for _ in range(refinements):
        best = _best(grid, log_n, scores, weights, ceiling)[0]
        grid = np.clip(best[:, None] + step * offsets, low, high)
        step *= 2 / (_REFINED - 1)
    log_c, a, b = _best(grid, log_n, scores, weights, ceiling)
    c = np.exp(log_c)
    return a, b * middle**c, c


def _best(grid, log_n, scores, weights, ceiling):
    """Returns log c, a and b of the best law on each sample's grid of log c."""
    power = np.exp(-np.exp(grid)[:, :, None] * log_n)  # [samples or 1, grid, points]
    power_mean = power @ weights
    score_mean = scores @ weights
    spread = (power - power_mean[:, :, None]) * weights
    variance = (spread * power).sum(-1)
    covariance = _product(spread, scores)
    total = ((scores - score_mean[:, None]) ** 2) @ weights
    b = np.maximum(-covariance / np.maximum(variance, 1e-300), 0)
    a = score_mean[:, None] + b * power_mean
    # The residual of the free optimum and of the bound b = 0 in one expression.
    residual = total[:, None] + b * (2 * covariance + b * variance)
    above = a > ceiling
    if above.any():
        # Where the free optimum lies above the ceiling, the best b at a = ceiling takes its place.
        gap = ceiling - scores
        gap_power = _product(power, gap * weights)
        b_ceiling = gap_power / (power**2 @ weights)
        residual_ceiling = ((gap**2) @ weights)[:, None] - gap_power * b_ceiling
        a = np.where(above, ceiling, a)
        b = np.where(above, b_ceiling, b)
        residual = np.where(above, residual_ceiling, residual)
    index = residual.argmin(1)[:, None]
    grid = np.broadcast_to(grid, residual.shape)
    return tuple(np.take_along_axis(x, index, 1)[:, 0] for x in (grid, a, b))


def _product(power, scores):
    """Returns the sum over points, [samples, grid], of powers that samples may share."""
    if len(power) == 1:
        return scores @ power[0].T
    return (power @ scores[:, :, None])[:, :, 0]
