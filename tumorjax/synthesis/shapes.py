"""Shapes of hand-written tumours: how large, how elongated, how irregular.

A shape is a level set on a small lattice in millimetres, and only then a mask on a voxel grid. So
one key gives one tumour, whatever the spacing, and the jitted part has one size and one
compilation for tumours of 2 and of 60 mm.

Two priors say how large and how elongated tumours are:

"difftumor": the mask generator of DiffTumor (Chen et al., CVPR 2024; taken over from
    SyntheticTumors, Hu et al., CVPR 2023). Nominal radii of 4, 8, 16 and 32 mm, three axes along
    the grid's, each drawn evenly from 0.75 to 1.25 of the radius (large: 0.75 to 2.0), then three
    elastic deformations, one per plane, with 3x3 control points. The same for every organ.
"measured": what tumours of an organ measure: radius and elongation as fitted to
    851 lesions that experts outlined in public scans (LiTS, MSD Task07 and Task10, KiTS21,
    Radboudumc; as `MEASURED` says), turned freely in space. The mask has the volume of a ball of
    the radius asked for. Radius and elongation are drawn independently; in the measured lesions
    their correlation is -0.05 to -0.28.
"""

import functools
import logging
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from jax.scipy.stats import norm
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from tumorjax.errors import UserError
from tumorjax.metrics.components import label_components

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
# Irregularity of measured shapes, in units of the radius. Small, because it comes on top of an
# elongation that was measured on irregular tumours.
_MEASURED_SIGMA = (0.04, 0.09)


class Measured(NamedTuple):
    """Fit to an organ's lesions in tumour_sizes.csv (851 lesions, one row each).

    log radius is normal (log_radius, log_radius_sd) within [smallest, largest] mm. The elongation
    e = -log(minor / major axis) is log-normal: log e is normal (log_elongation,
    log_elongation_sd). The middle axis: log(middle / major) / log(minor / major) is normal
    (middle, middle_sd) within (0, 1). Means and standard deviations of those logarithms; a
    Kolmogorov-Smirnov test rejects none of the radius or elongation fits at 5 %.
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


MEASURED: dict[str, Measured] = {
    # LiTS
    "liver": Measured(433, 1.805, 0.698, 1.1, 45.2, -0.627, 0.598, 0.478, 0.235),
    # MSD Task07 and the Radboudumc cases of ULS23
    "pancreas": Measured(189, 2.489, 0.384, 4.8, 55.9, -0.826, 0.497, 0.519, 0.216),
    # KiTS21
    "kidney": Measured(165, 2.906, 0.578, 2.7, 69.6, -1.292, 0.494, 0.533, 0.225),
    # MSD Task10
    "colon": Measured(64, 2.875, 0.355, 6.5, 48.2, -0.474, 0.431, 0.606, 0.230),
}
# Organs whose tumours nobody measured for us. Oesophageal cancer grows along a wall as colon
# cancer does. Endometriomas are round cysts of a few centimetres; of the measured tumours those
# of the kidney are the roundest and of that size.
STAND_IN: dict[str, str] = {"esophagus": "colon", "uterus": "kidney"}

# 48 points over at most 5.5 semi-axes: linear interpolation between them is off by less than
# 0.3 % of a semi-axis, far below a voxel.
_LATTICE = 48


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
    used = prior_used(organ, prior)
    if sizes is None and prior == "measured":
        fit = MEASURED[used.removeprefix("measured:")]
        groups = jnp.asarray([[1.0, fit.smallest, fit.largest]])
        return _draw_log_normal(key, count, groups, fit.log_radius, fit.log_radius_sd)
    mix = _mix("paper" if sizes is None else sizes)
    if prior == "difftumor":
        return _draw_nominal(
            key,
            count,
            jnp.asarray([[weight, NOMINAL_RADIUS[size]] for size, weight in mix.items()]),
        )
    fit = MEASURED[used.removeprefix("measured:")]
    groups = jnp.asarray([[weight, *GROUP_RADIUS[size]] for size, weight in mix.items()])
    return _draw_log_normal(key, count, groups, fit.log_radius, fit.log_radius_sd)


def tumor_mask(
    key: PRNGKeyArray,
    radius_mm: float,
    spacing: tuple[float, float, float],
    organ: str,
    prior: str = "difftumor",
) -> Bool[np.ndarray, "x y z"]:
    """Draws one tumour's shape as a mask.

    Args:
        key: jax.random key; the same key gives the same shape at every spacing.
        radius_mm: radius in mm. "difftumor" draws the three semi-axes about it; under "measured"
            it is the radius of the ball of the mask's volume.
        spacing: (x, y, z) in mm.
        organ: organ group.
        prior: "difftumor" or "measured".

    Returns:
        Mask just large enough for the tumour: one piece (26-connected), at least one voxel.

    Raises:
        UserError: prior or organ is unknown, radius or spacing is not positive and finite.
    """
    used = prior_used(organ, prior)
    steps = np.asarray(spacing, np.float64)
    radius = float(radius_mm)
    if not (np.isfinite(radius) and radius > 0):
        raise UserError(f"tumour radius is {radius_mm} mm. Expected a positive number")
    if steps.shape != (3,) or not (np.isfinite(steps).all() and (steps > 0).all()):
        raise UserError(f"spacing is {spacing}. Expected three positive numbers in mm")
    if prior == "difftumor":
        sigma_range = jnp.asarray(_SIGMA[size_group(radius)])
        axes = difftumor_axes(jax.random.fold_in(key, 0), radius)
        level, extent, offset = _difftumor_level(
            jax.random.fold_in(key, 1), radius, axes, sigma_range
        )
    else:
        fit = MEASURED[used.removeprefix("measured:")]
        level, extent, offset = _measured_level(
            jax.random.fold_in(key, 1), radius, jnp.asarray(fit[5:])
        )
    return _voxelize(
        np.asarray(level), np.asarray(extent, np.float64), steps, np.asarray(offset, np.float64)
    )


def difftumor_axes(key: PRNGKeyArray, radius_mm: float) -> Float[Array, "3"]:
    """Draws the semi-axes (mm) of DiffTumor's ellipsoid, before its deformation."""
    return _uniform_axes(key, radius_mm, jnp.asarray(_AXES[size_group(radius_mm)]))


@jax.jit
def _uniform_axes(key, radius, axes_range):
    return radius * jax.random.uniform(key, (3,), minval=axes_range[0], maxval=axes_range[1])


def _voxelize(
    level: Float[np.ndarray, "n n n"],
    extent: Float[np.ndarray, "3"],
    spacing: Float[np.ndarray, "3"],
    offset: Float[np.ndarray, "3"],
) -> Bool[np.ndarray, "x y z"]:
    """Samples a level set at voxel centres, linearly along each axis, and takes its inside."""
    inside = level < 0
    sampled = level
    last = level.shape[0] - 1
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        found = np.flatnonzero(inside.any(axis=others))
        span = (found[[0, -1]] + [-1, 1]) if found.size else np.array([0, last])
        low, high = (span / last * 2 - 1) * extent[axis]
        # Voxel centres lie at (k + offset) * spacing; at least one of them is kept.
        first = int(np.floor(low / spacing[axis] - offset[axis]))
        stop = int(np.ceil(high / spacing[axis] - offset[axis])) + 1
        centres = (np.arange(first, stop) + offset[axis]) * spacing[axis]
        position = np.clip((centres / extent[axis] + 1) / 2 * last, 0, last)
        cell = np.minimum(position.astype(np.int64), last - 1)
        part = (position - cell).astype(np.float32)
        part = part.reshape([-1 if a == axis else 1 for a in range(3)])
        sampled = (1 - part) * np.take(sampled, cell, axis) + part * np.take(
            sampled, cell + 1, axis
        )
    mask = sampled < 0
    if not mask.any():
        # Smaller than a voxel: it still is a tumour of one voxel.
        mask[np.unravel_index(np.argmin(sampled), sampled.shape)] = True
    labels, pieces = label_components(mask)
    if pieces > 1:
        mask = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    box = tuple(
        slice(found[0], found[-1] + 1)
        for found in (np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1)))
    )
    return np.ascontiguousarray(mask[box])


@jax.jit
def _difftumor_level(key, radius, axes, sigma_range):
    """DiffTumor's deformed ellipsoid: level set (negative inside), extent and grid offset."""
    sigma_key, deform_key, offset_key = jax.random.split(key, 3)
    sigma = radius * jax.random.uniform(sigma_key, minval=sigma_range[0], maxval=sigma_range[1])
    # DiffTumor's array is four semi-axes wide, with control points at its ends and its middle.
    extent = 1.25 * axes + 4 * sigma
    level = _deformed_ellipsoid(deform_key, axes, jnp.eye(3), sigma, 2 * axes, extent)
    return level, extent, _grid_offset(offset_key)


@jax.jit
def _measured_level(key, radius, fit):
    """A turned, slightly deformed ellipsoid of a ball's volume: level set, extent, offset."""
    log_elongation, log_elongation_sd, middle, middle_sd = fit
    keys = jax.random.split(key, 6)
    elongation = jnp.exp(log_elongation + log_elongation_sd * jax.random.normal(keys[0]))
    # Beyond 1:7 lie 1 in 200 of the measured lesions, all of a few voxels.
    elongation = jnp.minimum(elongation, jnp.log(7.0))
    share = middle + middle_sd * jax.random.truncated_normal(
        keys[1], -middle / middle_sd, (1 - middle) / middle_sd
    )
    ratios = jnp.exp(-elongation * jnp.stack([0.0, share, 1.0]))
    axes = radius * ratios / jnp.prod(ratios) ** (1 / 3)
    # The Q of a Gaussian matrix, with the signs of R taken out, is uniform over rotations.
    q, r = jnp.linalg.qr(jax.random.normal(keys[2], (3, 3)))
    rotation = q * jnp.sign(jnp.diagonal(r))
    sigma = radius * jax.random.uniform(
        keys[3], minval=_MEASURED_SIGMA[0], maxval=_MEASURED_SIGMA[1]
    )
    half = jnp.sqrt((rotation**2) @ axes**2)
    extent = 1.25 * half + 4 * sigma
    level = _deformed_ellipsoid(keys[4], axes, rotation, sigma, 2 * half, extent)
    # A voxel of the lattice counts by the part of it that the linear level says is inside.
    step = 2 * extent / (_LATTICE - 1)
    slope = jnp.sqrt(sum((g / s) ** 2 for g, s in zip(jnp.gradient(level), step, strict=True)))
    share_inside = jnp.clip(0.5 - level / (slope * jnp.min(step) + 1e-9), 0, 1)
    volume = jnp.sum(share_inside) * jnp.prod(step)
    extent = extent * (4 / 3 * jnp.pi * radius**3 / volume) ** (1 / 3)
    return level, extent, _grid_offset(keys[5])


def _grid_offset(key):
    """Where between two voxel centres the tumour's middle lies, in voxels."""
    return jax.random.uniform(key, (3,), minval=-0.5, maxval=0.5)


def _deformed_ellipsoid(key, axes, rotation, sigma, control, extent):
    """|q| - 1 on the lattice, q the deformed position in units of the semi-axes.

    The deformations in xy, yz and xz follow one another as in DiffTumor, each with Gaussian
    displacements of `sigma` mm at 3x3 control points at -control, 0 and control of its plane,
    between which a cubic spline runs.
    """
    shifts = sigma * jax.random.normal(key, (3, 2, 3, 3))
    grid = [jnp.linspace(-e, e, _LATTICE) for e in extent]
    p = list(jnp.meshgrid(*grid, indexing="ij"))
    # A mask that was deformed in xy first and xz last is looked up in the opposite order.
    for shift, (a, b) in zip(shifts[::-1], ((0, 2), (1, 2), (0, 1)), strict=True):
        in_a, in_b = _spline_basis(p[a] / control[a]), _spline_basis(p[b] / control[b])
        moved_a = sum(shift[0, i, j] * in_a[i] * in_b[j] for i in range(3) for j in range(3))
        moved_b = sum(shift[1, i, j] * in_a[i] * in_b[j] for i in range(3) for j in range(3))
        p[a], p[b] = p[a] + moved_a, p[b] + moved_b
    squared = sum((sum(rotation[i, k] * p[i] for i in range(3)) / axes[k]) ** 2 for k in range(3))
    return jnp.sqrt(squared) - 1


def _spline_basis(u):
    """The three functions of the mirrored cubic spline through values at u = -1, 0 and 1."""
    # Beyond the last control point the spline goes on mirrored.
    t = 2 * jnp.clip(u, -1, 1) - jnp.clip(u, -1.5, 1.5)
    # The spline through 0, 1, 0 is even and flat at 0 and 1; the one through -1, 0, 1 is odd and
    # flat at 1; the one through 1, 1, 1 is 1.
    even = 1 - t * t * (3 - 2 * jnp.abs(t))
    odd = t * (3 - t * t) / 2
    return (1 - even - odd) / 2, even, (1 - even + odd) / 2


@functools.partial(jax.jit, static_argnums=1)
def _draw_nominal(key, count, groups):
    """Draws the second column of `groups` by the weights in the first."""
    weights = groups[:, 0] / groups[:, 0].sum()
    return groups[jax.random.choice(key, len(groups), (count,), p=weights), 1]


@functools.partial(jax.jit, static_argnums=1)
def _draw_log_normal(key, count, groups, mean, deviation):
    """Draws a group (weight, low, high), then exp of a normal draw between log low and log high."""
    group_key, radius_key = jax.random.split(key)
    weights = groups[:, 0] / groups[:, 0].sum()
    chosen = groups[jax.random.choice(group_key, len(groups), (count,), p=weights)]
    low, high = (norm.cdf((jnp.log(chosen[:, i]) - mean) / deviation) for i in (1, 2))
    u = jax.random.uniform(radius_key, (count,))
    return jnp.exp(mean + deviation * ndtri(low + u * (high - low)))


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
        "no measured tumours of the %s: sizes and elongations of %s tumours are taken",
        organ,
        source,
    )
