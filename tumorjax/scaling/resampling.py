"""Bootstrap draws of scaling curves: what the scores might have been, had chance fallen otherwise.

Two things could have fallen otherwise. The test patients could have been others: they are drawn
anew with replacement, the same draw for all cells that are tested on them, so that differences
between cells are paired. And each network could have been trained with another seed: the spread
between seeds, pooled over both arms, is drawn as normal noise with the heavy tails that its few
degrees of freedom ask for (Student's t), because drawing two or three seeds with replacement would
understate it.

Where a table has no rows per patient, its intervals stand in (normal, independent between points).
Where it has one seed only, the scatter of the points about their laws stands in for the spread
between seeds. With one seed and too few points for that, nothing is known about the spread: each
point still has its interval over patients, but nothing is claimed about plateaus and savings.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from tumorjax.evaluation.summary import GROUP_METRICS, patient_sums
from tumorjax.evaluation.summary import METRICS as RATIOS
from tumorjax.scaling import power_law
from tumorjax.scaling.results import LESS_IS_BETTER, Cases, Curve, Curves

# A normal distribution's 95 % interval is this many standard deviations wide.
_WIDTH_95 = 3.919928
_LAW_PARAMETERS = 3


@dataclass(frozen=True)
class Noise:
    """The spread of one cell's score between trainings: sd in points, degrees of freedom."""

    sd: float
    freedom: int
    source: str  # "seeds", "residuals" or "" where unknown


@dataclass(frozen=True)
class Sampled:
    """A curve with its bootstrap draws.

    Attributes:
        n: numbers of real scans, ascending, [points].
        mean: score, mean over seeds, [points].
        seeds: number of seeds of each point, [points].
        draws: the curve as it might have been, [draws, points]; None where nothing is known about
            the spread between trainings.
        measured: the same from measured spread alone (patients, seeds), for the interval of each
            point; from residuals only where nothing was measured; None where nothing is known.
        noise: spread of a further cell's score between trainings.
        source: what the draws rest on, for instance "patients and seeds".
    """

    n: Float[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    seeds: Float[np.ndarray, " points"]
    draws: Float[np.ndarray, "draws points"] | None
    measured: Float[np.ndarray, "draws points"] | None
    noise: Noise
    source: str


def generator(seed: int, *names: str) -> np.random.Generator:
    """Returns a random generator that depends on the seed and on the names alone."""
    return np.random.default_rng([seed, zlib.crc32("\0".join(names).encode())])


def training_noise(curves: Sequence[Curve]) -> Noise:
    """Returns the spread of one cell's score between trainings, pooled over curves of one kind.

    Args:
        curves: the curves to pool, for instance both arms of one metric on one split.

    Returns:
        From seeds where any point has two; else from the points' scatter about their curves'
        laws, where a curve has more points than the law has parameters; else unknown.
    """
    square, freedom = 0.0, 0
    for curve in curves:
        for observations in curve.values():
            scores = np.array([observation.score for observation in observations])
            square += float(((scores - scores.mean()) ** 2).sum())
            freedom += len(scores) - 1
    if freedom:
        return Noise(float(np.sqrt(square / freedom)), freedom, "seeds")
    for curve in curves:
        if len(curve) > _LAW_PARAMETERS:
            n = np.array(list(curve), float)
            mean = _means(curve)
            law = power_law.fit(n, mean[None])
            square += float(((power_law.evaluate(n, *law) - mean) ** 2).sum())
            freedom += len(curve) - _LAW_PARAMETERS
    if freedom:
        return Noise(float(np.sqrt(square / freedom)), freedom, "residuals")
    return Noise(0.0, 0, "")


def draw_noise(noise: Noise, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draws training noise, [draws, ...]: all values of one draw share the uncertain sd."""
    values = rng.standard_normal(shape)
    scale = np.sqrt(noise.freedom / rng.chisquare(noise.freedom, shape[0]))
    return noise.sd * values * scale.reshape(-1, *[1] * (len(shape) - 1))


def sample(
    curve: Curve,
    noise: Noise,
    count: int,
    rng: np.random.Generator,
    patients: Mapping[str, Float[np.ndarray, " draws"]] | None = None,
    ceiling: float = 100.0,
) -> Sampled:
    """Draws a curve `count` times.

    Args:
        curve: n_real -> observations.
        noise: spread between trainings; see `training_noise`.
        count: number of draws.
        rng: random generator for what is drawn for this curve alone.
        patients: cell -> deviation of its score when patients are drawn anew; see
            `patient_deviations`. None or a missing cell: the observation's interval stands in.
        ceiling: highest possible score.
    """
    n = np.array(list(curve), float)
    mean = _means(curve)
    seeds = np.array([len(observations) for observations in curve.values()], float)
    deviation = np.zeros((count, len(n)))
    by_patient = by_interval = 0
    for point, observations in enumerate(curve.values()):
        known = [patients[o.cell] for o in observations if patients and o.cell in patients]
        widths = [o.high - o.low for o in observations if np.isfinite(o.high - o.low)]
        if len(known) == len(observations):
            deviation[:, point] = np.mean(known, 0)
            by_patient += 1
        elif widths:
            # All seeds are tested on the same patients: their mean is as uncertain as each.
            sd = np.sqrt(np.mean(np.square(widths))) / _WIDTH_95
            deviation[:, point] = sd * rng.standard_normal(count)
            by_interval += 1
    trainings = draw_noise(noise, (count, len(n)), rng) if noise.freedom else 0.0
    if noise.source == "seeds":
        trainings = trainings / np.sqrt(seeds)
    tested = by_patient + by_interval == len(n)
    sources = []
    if tested:
        sources.append("patients" if by_patient == len(n) else "intervals")
    if noise.source:
        sources.append(noise.source)

    def finish(change):
        return np.clip(mean + change, 0, ceiling)

    measured = finish(deviation + trainings) if sources else None
    draws = measured if noise.freedom else None
    if tested and noise.source == "residuals":
        measured = finish(deviation)
    return Sampled(n, mean, seeds, draws, measured, noise, " and ".join(sources))


def patient_deviations(
    cases: Cases, curves: Curves, count: int, seed: int
) -> dict[tuple[str, str, str], dict[str, Float[np.ndarray, " draws"]]]:
    """Draws test patients anew and returns how much each cell's scores change.

    Args:
        cases: cell -> its rows of cases.csv.
        curves: the curves that are wanted.
        count: number of draws.
        seed: the draws' seed.

    Returns:
        (class, split, metric) -> cell -> change of the score, [draws]. Metrics that fewer than two
        patients have anything to say on are left out.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    patients: dict[str, set[str]] = {}
    for cell, lines in cases.items():
        for row in lines:
            key = str(row["split"]), str(row["class"]), cell
            groups.setdefault(key, []).append(row)
            patients.setdefault(key[0], set()).add(str(row["patient"]))
    wanted = {(label, split, metric) for label, split, metric, _ in curves}
    result: dict[tuple[str, str, str], dict[str, np.ndarray]] = {}
    for split in sorted(patients):
        names = sorted(patients[split])
        drawn = generator(seed, "patients", split).multinomial(
            len(names), np.full(len(names), 1 / len(names)), size=count
        )
        drawn = drawn.astype(float)
        for (in_split, label, cell), rows in sorted(groups.items()):
            if in_split != split or not any((label, split) == key[:2] for key in wanted):
                continue
            changes = _ratio_changes(rows, names, drawn) | _auc_change(rows, names, drawn)
            for metric, change in changes.items():
                if (label, split, metric) in wanted:
                    result.setdefault((label, split, metric), {})[cell] = change
    return result


def _ratio_changes(rows, patients, drawn):
    """Returns metric -> change of one cell's score in each draw of patients."""
    above, below = patient_sums(rows, patients)
    with np.errstate(invalid="ignore", divide="ignore"):
        change = (drawn @ above) / (drawn @ below) - above.sum(0) / below.sum(0)
    # A draw without anybody who counts for a metric leaves its score undefined: no change.
    change = np.nan_to_num(change)
    return {
        metric: change[:, index] * (1 if metric in LESS_IS_BETTER else 100)
        for index, metric in enumerate(RATIOS + GROUP_METRICS)
        if np.isfinite(above[:, index]).all() and (below[:, index] > 0).sum() >= 2
    }


def _auc_change(rows, patients, drawn):
    has, score = np.full(len(patients), False), np.full(len(patients), -np.inf)
    place = {patient: index for index, patient in enumerate(patients)}
    for row in rows:
        patient = place[str(row["patient"])]
        has[patient] |= bool(float(row["has_tumor"]))
        value = row.get("score")
        value = np.nan if value in (None, "") else float(value)
        score[patient] = np.nan if np.isnan(value) else max(score[patient], value)
    seen = np.isfinite(score)
    sick, healthy = np.flatnonzero(has & seen), np.flatnonzero(~has & seen)
    if np.isnan(score).any() or len(sick) < 2 or len(healthy) < 2:
        return {}
    wins = np.sign(score[sick][:, None] - score[healthy][None]) / 2 + 0.5
    positive, negative = drawn[:, sick], drawn[:, healthy]
    with np.errstate(invalid="ignore"):
        auc = ((positive @ wins) * negative).sum(1) / (positive.sum(1) * negative.sum(1))
    return {"auc": np.nan_to_num(100 * (auc - wins.mean()))}


def _means(curve: Curve) -> np.ndarray:
    return np.array([np.mean([o.score for o in seeds]) for seeds in curve.values()])
