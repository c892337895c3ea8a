"""What shapes are drawn from: how large tumours are, how many, how elongated and how rough.

Two priors:

"difftumor": the mask generator of DiffTumor (Chen et al., CVPR 2024; taken over from
    SyntheticTumors, Hu et al., CVPR 2023). Nominal radii of 4, 8, 16 and 32 mm, three axes along
    the grid's, each drawn evenly from 0.75 to 1.25 of the radius (large: 0.75 to 2.0), then three
    elastic deformations, one per plane, with 3x3 control points. One to three tumours a scan if
    they are tiny or small, else one. The same for every organ.
"measured": what tumours of an organ measure: radius, elongation, roughness and number as fitted
    to lesions that experts outlined in public scans (LiTS, MSD Task07 and Task10, KiTS21,
    Radboudumc; as `MEASURED` says), turned freely in space. All four are drawn independently; in
    the measured lesions the correlation of radius and elongation is -0.05 to -0.28.

As numbers a prior is a `RadiusPrior` and a `DifftumorShape` or `MeasuredShape`: pytrees of arrays,
so that those of several organs can be stacked and drawn from under jit and vmap.
"""

import functools
import logging
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tumorjax.errors import UserError

SIZES = ("tiny", "small", "medium", "large")
PRIORS = ("difftumor", "measured")

# DiffTumor's nominal radii, mm.
NOMINAL_RADIUS: dict[str, float] = {"tiny": 4.0, "small": 8.0, "medium": 16.0, "large": 32.0}

# The scaling paper's size groups by radius, mm (its section 3.2). Measured radii below 2 mm are
# about one voxel of a clinical scan and are not drawn when a group is asked for.
GROUP_RADIUS: dict[str, tuple[float, float]] = {
    "tiny": (2.0, 5.0),
    "small": (5.0, 10.0),
    "medium": (10.0, 20.0),
    "large": (20.0, 70.0),
}

# "early" is DiffTumor's mix for early tumours, "paper" the scaling paper's 4:2:1.
SIZE_MIXES: dict[str, dict[str, float]] = {
    "early": {"tiny": 1.0, "small": 1.0},
    "paper": {"small": 4.0, "medium": 2.0, "large": 1.0},
}

# DiffTumor's axes and elastic sigma by size group, both in units of the nominal radius
# (sigma there: tiny 0.5..1, small 1..2, medium 3..6, large 5..10 mm).
_AXES = {"tiny": (0.75, 1.25), "small": (0.75, 1.25), "medium": (0.75, 1.25), "large": (0.75, 2.0)}
_SIGMA = {
    "tiny": (0.125, 0.25),
    "small": (0.125, 0.25),
    "medium": (0.1875, 0.375),
    "large": (0.15625, 0.3125),
}


class Measured(NamedTuple):
    """Fit to an organ's lesions in tumour_sizes.csv (851 lesions, one row each) and to masks.

    log radius is normal (log_radius, log_radius_sd) within [smallest, largest] mm. The elongation
    e = -log(minor / major axis) is log-normal: log e is normal (log_elongation,
    log_elongation_sd). The middle axis: log(middle / major) / log(minor / major) is normal
    (middle, middle_sd) within (0, 1). Means and standard deviations of those logarithms; a
    Kolmogorov-Smirnov test rejects none of the radius or elongation fits at 5 %. The axes are those
    of the ellipsoid under the roughness, which alone would elongate a tumour. Where roughness is
    small that is nothing (less than 0.04 of log e); for the colon e is taken smaller, so that drawn
    masks have the lesions' ratios.

    The number of lesions of a scan is the whole part of a log-normal draw (log_number,
    log_number_sd), at least 1 and at most `most`: maximum likelihood on the scans of that table,
    whose case names count the lesions (liver 62 scans, pancreas 187, kidney 151, colon 64). Scans
    without lesions are not in it.

    Roughness is the standard deviation, over directions, of log(surface / ellipsoid). It is
    log-normal (log_roughness, log_roughness_sd). Fitted to 16 masks of each organ of ULS23 (the
    public expert masks of the same sources): each mask's `shape_measures.Measures.roughness`,
    which its voxels add to, was compared with that of drawn shapes of the mask's radius and
    elongation on the mask's grid; the roughness whose mean is the mask's is that mask's, and the
    logarithms' mean and standard deviation are the fit. Medians: liver 0.11, pancreas 0.13, kidney
    0.09, colon 0.38 (tumours that grow along a wall, around a lumen).
    """

    lesions: int
    log_radius: float
    log_radius_sd: float
    smallest: float
    largest: float
    log_elongation: float
    log_elongation_sd: float
    middle: float
    middle_sd: float
    log_number: float
    log_number_sd: float
    most: int
    log_roughness: float
    log_roughness_sd: float


MEASURED: dict[str, Measured] = {
    # LiTS
    "liver": Measured(
        *(433, 1.805, 0.698, 1.1, 45.2, -0.627, 0.598, 0.478, 0.235),
        *(1.345, 1.297, 70, -2.251, 0.347),
    ),
    # MSD Task07 and the Radboudumc cases of ULS23
    "pancreas": Measured(
        *(189, 2.489, 0.384, 4.8, 55.9, -0.826, 0.497, 0.519, 0.216),
        *(0.215, 0.223, 2, -2.190, 0.432),
    ),
    # KiTS21
    "kidney": Measured(
        *(165, 2.906, 0.578, 2.7, 69.6, -1.292, 0.494, 0.533, 0.225),
        *(-0.119, 0.560, 3, -2.460, 0.412),
    ),
    # MSD Task10
    "colon": Measured(
        *(64, 2.875, 0.355, 6.5, 48.2, -0.800, 0.250, 0.660, 0.250),
        *(0.212, 0.223, 2, -0.973, 0.304),
    ),
}
# Organs whose tumours nobody measured for us. Oesophageal cancer grows along a wall as colon
# cancer does. Endometriomas are round cysts of a few centimetres; of the measured tumours those
# of the kidney are the roundest and of that size.
STAND_IN: dict[str, str] = {"esophagus": "colon", "uterus": "kidney"}


class RadiusPrior(NamedTuple):
    """Radii as numbers: groups, and what is drawn within one.

    Attributes:
        weight: of each group; they need not sum to 1.
        low, high: mm; a group whose limits are equal is that radius.
        mean, deviation: of log radius (mm), normal between the group's limits.
    """

    weight: Float[Array, "*b groups"]
    low: Float[Array, "*b groups"]
    high: Float[Array, "*b groups"]
    mean: Float[Array, "*b"]
    deviation: Float[Array, "*b"]


class DifftumorShape(NamedTuple):
    """DiffTumor's shapes as numbers, each [size group, (least, most)], in units of the radius."""

    axes: Float[Array, "*b 4 2"]
    sigma: Float[Array, "*b 4 2"]


class MeasuredShape(NamedTuple):
    """Measured shapes as numbers, see `Measured`."""

    log_elongation: Float[Array, "*b"]
    log_elongation_sd: Float[Array, "*b"]
    middle: Float[Array, "*b"]
    middle_sd: Float[Array, "*b"]
    log_roughness: Float[Array, "*b"]
    log_roughness_sd: Float[Array, "*b"]


def prior_used(organ: str, prior: str) -> str:
    """Returns the prior that an organ really takes, for records: "measured:colon", "difftumor".

    Args:
        organ: organ group, such as "liver" or "kidney".
        prior: one of `PRIORS`.

    Raises:
        UserError: the prior is unknown, or "measured" has neither lesions nor a stand-in.
    """
    if prior == "difftumor":
        return prior
    if prior != "measured":
        raise UserError(f"prior {prior!r} is unknown. Expected one of {', '.join(PRIORS)}")
    source = STAND_IN.get(organ, organ)
    if source not in MEASURED:
        raise UserError(
            f"prior 'measured' has no tumours of {organ!r}. Expected one of"
            f" {', '.join([*MEASURED, *STAND_IN])}; or take prior 'difftumor'"
        )
    if source != organ:
        _say_stand_in(organ, source)
    return f"measured:{source}"


def size_group(radius_mm: float) -> str:
    """Returns the paper's size group of a radius: tiny up to 5 mm, small 10, medium 20, large."""
    return next((size for size in SIZES if radius_mm <= GROUP_RADIUS[size][1]), "large")


def shape_prior(organ: str, prior: str = "difftumor") -> DifftumorShape | MeasuredShape:
    """Returns a prior's shapes as numbers, for `shapes.sample_level`.

    Raises:
        UserError: prior or organ is unknown.
    """
    used = prior_used(organ, prior)
    if prior == "difftumor":
        return DifftumorShape(*(jnp.asarray([t[size] for size in SIZES]) for t in (_AXES, _SIGMA)))
    fit = MEASURED[used.removeprefix("measured:")]
    return MeasuredShape(*(jnp.asarray(getattr(fit, name)) for name in MeasuredShape._fields))


def radius_prior(
    organ: str, prior: str = "difftumor", sizes: str | Mapping[str, float] | None = None
) -> RadiusPrior:
    """Returns a prior's radii as numbers, for `draw_radius`; arguments as of `sample_radius`.

    Those of several organs with one `sizes` have equal shapes and can be stacked.

    Raises:
        UserError: prior, organ or size is unknown.
    """
    used = prior_used(organ, prior)
    if prior == "difftumor":
        mix = _mix("paper" if sizes is None else sizes)
        nominal = jnp.asarray([NOMINAL_RADIUS[size] for size in mix])
        weight = jnp.asarray(list(mix.values()))
        return RadiusPrior(weight, nominal, nominal, jnp.log(jnp.mean(nominal)), jnp.asarray(1.0))
    fit = MEASURED[used.removeprefix("measured:")]
    if sizes is None:
        groups = jnp.asarray([[1.0, fit.smallest, fit.largest]])
    else:
        mix = _mix(sizes)
        groups = jnp.asarray([[weight, *GROUP_RADIUS[size]] for size, weight in mix.items()])
    weight, low, high = groups.T
    return RadiusPrior(
        weight, low, high, jnp.asarray(fit.log_radius), jnp.asarray(fit.log_radius_sd)
    )


@functools.partial(jax.jit, static_argnames="count")
def draw_radius(key: PRNGKeyArray, prior: RadiusPrior, count: int = 1) -> Float[Array, " count"]:
    """Draws `count` radii in mm; pure, for use under jit and vmap."""
    group_key, radius_key = jax.random.split(key)
    share = prior.weight / prior.weight.sum()
    chosen = jax.random.choice(group_key, share.shape[0], (count,), p=share)
    low, high = prior.low[chosen], prior.high[chosen]
    below, above = (norm.cdf((jnp.log(r) - prior.mean) / prior.deviation) for r in (low, high))
    u = jax.random.uniform(radius_key, (count,))
    drawn = jnp.exp(prior.mean + prior.deviation * ndtri(below + u * (above - below)))
    return jnp.clip(drawn, low, high)


def sample_radius(
    key: PRNGKeyArray,
    organ: str,
    prior: str = "difftumor",
    count: int = 1,
    sizes: str | Mapping[str, float] | None = None,
) -> Float[Array, " count"]:
    """Draws tumour radii.

    Args:
        key: jax.random key.
        organ: organ group, such as "liver" or "kidney".
        prior: "difftumor" (nominal radii) or "measured" (log-normal, see `MEASURED`).
        count: how many radii.
        sizes: a size ("small"), a mix by name ("early", "paper") or as {size: weight}. Without
            it "difftumor" draws from the paper's mix, and "measured" from all that was measured;
            with it "measured" draws within each size's group.

    Returns:
        Radii in mm.

    Raises:
        UserError: prior, organ or size is unknown.
    """
    return draw_radius(key, radius_prior(organ, prior, sizes), count)


def sample_number(
    key: PRNGKeyArray, organ: str, prior: str = "difftumor", size: str = "small", count: int = 1
) -> Int[Array, " count"]:
    """Draws how many tumours scans have.

    Args:
        key: jax.random key.
        organ: organ group.
        prior: "difftumor" (1 to 3 if tiny or small, else 1) or "measured" (see `Measured`).
        size: the tumours' size group; only "difftumor" heeds it.
        count: how many scans.

    Raises:
        UserError: prior, organ or size is unknown.
    """
    used = prior_used(organ, prior)
    if size not in SIZES:
        raise UserError(f"tumour size {size!r} is unknown. Expected one of {', '.join(SIZES)}")
    if prior == "difftumor":
        return jax.random.randint(key, (count,), 1, 4 if size in ("tiny", "small") else 2)
    fit = MEASURED[used.removeprefix("measured:")]
    drawn = jnp.exp(fit.log_number + fit.log_number_sd * jax.random.normal(key, (count,)))
    return jnp.clip(jnp.floor(drawn), 1, fit.most).astype(int)


def _mix(sizes: str | Mapping[str, float]) -> dict[str, float]:
    if isinstance(sizes, str):
        if sizes in SIZES:
            return {sizes: 1.0}
        if sizes in SIZE_MIXES:
            return SIZE_MIXES[sizes]
        raise UserError(
            f"tumour size {sizes!r} is unknown. Expected one of {', '.join([*SIZES, *SIZE_MIXES])}"
        )
    unknown = [name for name in sizes if name not in SIZES]
    weights = [float(weight) for weight in sizes.values()]
    if unknown or not weights or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(
            f"size mix {dict(sizes)} is not usable. Expected non-negative weights, not all zero,"
            f" of some of {', '.join(SIZES)}"
        )
    return {name: float(weight) for name, weight in sizes.items() if weight > 0}


@functools.cache
def _say_stand_in(organ: str, source: str) -> None:
    """Says once a process that an organ takes another's measurements."""
    logging.getLogger(__name__).info(
        "no measured tumours of the %s: the measurements of %s tumours are taken",
        organ,
        source,
    )
