"""Shapes of tumours, as level sets and as masks.

A shape is a level set on a small lattice in millimetres, and only then sampled on a voxel grid. So
one key gives one tumour, whatever the spacing and the grid, and the jitted part has one size and
one compilation for tumours of 2 and of 60 mm. How large, elongated and rough tumours are is drawn
from a prior of `shape_priors`:

"difftumor": an ellipsoid along the grid's axes, deformed elastically in its three planes.
"measured": an ellipsoid turned freely, whose surface lies at exp(f) times the ellipsoid's, f a
    Gaussian field over directions. So it is one piece, and its volume is that of a ball of the
    radius asked for.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from tumorjax.errors import UserError
from tumorjax.metrics.components import label_components
from tumorjax.synthesis.shape_priors import (
    GROUP_RADIUS,
    MEASURED,
    NOMINAL_RADIUS,
    PRIORS,
    SIZE_MIXES,
    SIZES,
    STAND_IN,
    DifftumorShape,
    Measured,
    MeasuredShape,
    RadiusPrior,
    draw_radius,
    prior_used,
    radius_prior,
    sample_number,
    sample_radius,
    shape_prior,
    size_group,
)

__all__ = [
    "GROUP_RADIUS",
    "MEASURED",
    "NOMINAL_RADIUS",
    "PRIORS",
    "SIZES",
    "SIZE_MIXES",
    "STAND_IN",
    "DifftumorShape",
    "Measured",
    "MeasuredShape",
    "RadiusPrior",
    "difftumor_axes",
    "draw_radius",
    "lattice_level",
    "level_on_grid",
    "prior_used",
    "radius_prior",
    "sample_level",
    "sample_number",
    "sample_radius",
    "shape_prior",
    "size_group",
    "tumor_mask",
]

Shape = DifftumorShape | MeasuredShape

# Points an axis over at most 5.5 (difftumor) or about 3 semi-axes: linear interpolation between
# them is off by less than 0.3 % of a semi-axis, far below a voxel.
_LATTICE = {DifftumorShape: 48, MeasuredShape: 32}
# How often a measured shape's size is put right, and from how many voxels on: fewer than these
# have no volume as exact as that.
_CORRECTIONS, _CORRECTED_VOXELS = 3, 100
# What a measured shape's volume may be off by without that.
_VOLUME_ERROR = 0.04
# Degrees of the roughness over the sphere. Below 3 it would move or elongate the tumour, which the
# ellipsoid does; what is finer than the last is below the voxels of the scans that were measured.
_DEGREES = (3, 4, 5, 6, 7, 8)
# Of the roughness' variance each degree has (3 / degree) ** _DECAY, before they are made to sum
# to 1.
_DECAY = 2.0
# Random directions whose zonal functions make up the roughness.
_DIRECTIONS = 16


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
    numbers = shape_prior(organ, prior)
    steps = np.asarray(spacing, np.float64)
    radius = float(radius_mm)
    if not (np.isfinite(radius) and radius > 0):
        raise UserError(f"tumour radius is {radius_mm} mm. Expected a positive number")
    if steps.shape != (3,) or not (np.isfinite(steps).all() and (steps > 0).all()):
        raise UserError(f"spacing is {spacing}. Expected three positive numbers in mm")
    level, extent = lattice_level(key, radius, numbers)
    # Where between two voxel centres the tumour's middle lies. Far from the indices that the
    # shape's own keys are split by.
    offset = _grid_offset(jax.random.fold_in(key, 1 << 20))
    level, size, offset = np.asarray(level), np.asarray(extent, np.float64), np.asarray(offset)
    mask = _voxelize(level, size, steps, offset)
    if not isinstance(numbers, MeasuredShape):
        return mask
    # Of a rough shape loose pieces are left out: what stays grows to the volume asked for.
    wanted = 4 / 3 * np.pi * radius**3 / np.prod(steps)
    for _ in range(_CORRECTIONS if wanted >= _CORRECTED_VOXELS else 0):
        ratio = float(wanted / np.count_nonzero(mask))
        if abs(ratio - 1) <= _VOLUME_ERROR:
            break
        size = size * ratio ** (1 / 3)
        mask = _voxelize(level, size, steps, offset)
    return mask


def sample_level(
    key: PRNGKeyArray,
    radius_mm: Float[Array, ""] | float,
    prior: Shape,
    shape: tuple[int, int, int],
    spacing: Float[Array, "3"] | tuple[float, float, float],
    centre: Float[Array, "3"] | tuple[float, float, float],
) -> Float[Array, "x y z"]:
    """Samples a tumour's level set on a voxel grid; pure, for use under jit and vmap.

    All arguments but `shape` may be traced. For several organs stack their priors with
    `jax.tree.map(lambda *n: jnp.stack(n), *priors)`.

    Args:
        key: jax.random key; the same key gives the same shape on every grid, `tumor_mask`'s (but
            where that leaves loose pieces out).
        radius_mm: radius in mm, as of `tumor_mask`.
        prior: from `shape_prior`.
        shape: voxels of the grid, static.
        spacing: (x, y, z) in mm.
        centre: where the tumour's middle lies, in voxels of the grid; need not be whole.

    Returns:
        Level, negative inside the tumour, in units of its semi-axes: -1 at its middle (0 is the
        surface). `level < 0` is the mask. Where the tumour is smaller than a voxel it may have no
        voxel; `level <= jnp.minimum(0, level.min())` has at least one.
    """
    level, extent = lattice_level(key, radius_mm, prior)
    return level_on_grid(level, extent, shape, spacing, centre)


def level_on_grid(
    level: Float[Array, "n n n"],
    extent: Float[Array, "3"],
    shape: tuple[int, int, int],
    spacing: Float[Array, "3"] | tuple[float, float, float],
    centre: Float[Array, "3"] | tuple[float, float, float],
) -> Float[Array, "x y z"]:
    """Samples a shape from `lattice_level` on a voxel grid, see `sample_level`; pure.

    With the extent times a factor it is the same shape, that much larger.
    """
    last = level.shape[0] - 1
    for axis in range(3):
        place = (jnp.arange(shape[axis]) - centre[axis]) * spacing[axis] / extent[axis]
        position = jnp.clip((place + 1) / 2 * last, 0, last)
        # Linear interpolation as a product with a banded matrix, which accelerators like best.
        weight = jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(last + 1)))
        level = jnp.moveaxis(
            jnp.tensordot(weight, level, (1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis
        )
    return level


def difftumor_axes(key: PRNGKeyArray, radius_mm: float) -> Float[Array, "3"]:
    """Draws the semi-axes (mm) of DiffTumor's ellipsoid, before its deformation."""
    numbers = cast(DifftumorShape, shape_prior("liver", "difftumor"))
    return _axes(key, jnp.asarray(radius_mm), numbers)[0]


@jax.jit
def _grid_offset(key):
    return jax.random.uniform(key, (3,), minval=-0.5, maxval=0.5)


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
def lattice_level(
    key: PRNGKeyArray, radius: Float[Array, ""] | float, prior: Shape
) -> tuple[Float[Array, "n n n"], Float[Array, "3"]]:
    """Returns a shape's level on a lattice over +-extent (mm) about its middle, and that extent."""
    radius = jnp.asarray(radius, jnp.float32)
    if isinstance(prior, DifftumorShape):
        return _difftumor_level(key, radius, prior)
    return _measured_level(key, radius, prior)


def _lattice(extent: Float[Array, "3"], points: int) -> list[Float[Array, "n n n"]]:
    return list(jnp.meshgrid(*[jnp.linspace(-e, e, points) for e in extent], indexing="ij"))


@jax.jit
def _axes(key, radius, prior: DifftumorShape):
    """DiffTumor's semi-axes, and the range of its deformation's sigma, mm."""
    limits = jnp.asarray([GROUP_RADIUS[size][1] for size in SIZES[:-1]])
    group = jnp.searchsorted(limits, radius)
    low, high = prior.axes[group]
    return radius * jax.random.uniform(key, (3,), minval=low, maxval=high), (
        radius * prior.sigma[group]
    )


def _difftumor_level(key, radius, prior: DifftumorShape):
    """DiffTumor's deformed ellipsoid: level set (negative inside) and extent."""
    axes_key, sigma_key, deform_key = jax.random.split(key, 3)
    axes, (low, high) = _axes(axes_key, radius, prior)
    sigma = jax.random.uniform(sigma_key, minval=low, maxval=high)
    extent = 1.25 * axes + 4 * sigma
    # DiffTumor's array is four semi-axes wide, with control points at its ends and its middle.
    control = 2 * axes
    shifts = sigma * jax.random.normal(deform_key, (3, 2, 3, 3))
    p = _lattice(extent, _LATTICE[DifftumorShape])
    # A mask that was deformed in xy first and xz last is looked up in the opposite order.
    for shift, (a, b) in zip(shifts[::-1], ((0, 2), (1, 2), (0, 1)), strict=True):
        in_a, in_b = _spline_basis(p[a] / control[a]), _spline_basis(p[b] / control[b])
        moved_a = sum(shift[0, i, j] * in_a[i] * in_b[j] for i in range(3) for j in range(3))
        moved_b = sum(shift[1, i, j] * in_a[i] * in_b[j] for i in range(3) for j in range(3))
        p[a], p[b] = p[a] + moved_a, p[b] + moved_b
    return jnp.sqrt(sum((p[k] / axes[k]) ** 2 for k in range(3))) - 1, extent


def _spline_basis(u):
    """The three functions of the mirrored cubic spline through values at u = -1, 0 and 1."""
    # Beyond the last control point the spline goes on mirrored.
    t = 2 * jnp.clip(u, -1, 1) - jnp.clip(u, -1.5, 1.5)
    # The spline through 0, 1, 0 is even and flat at 0 and 1; the one through -1, 0, 1 is odd and
    # flat at 1; the one through 1, 1, 1 is 1.
    even = 1 - t * t * (3 - 2 * jnp.abs(t))
    odd = t * (3 - t * t) / 2
    return (1 - even - odd) / 2, even, (1 - even + odd) / 2


def _measured_level(key, radius, prior: MeasuredShape):
    """A turned, rough ellipsoid of a ball's volume: level set (negative inside) and extent."""
    keys = jax.random.split(key, 5)
    elongation = jnp.exp(
        prior.log_elongation + prior.log_elongation_sd * jax.random.normal(keys[0])
    )
    # Beyond 1:7 lie 1 in 200 of the measured lesions, all of a few voxels.
    elongation = jnp.minimum(elongation, jnp.log(7.0))
    share = prior.middle + prior.middle_sd * jax.random.truncated_normal(
        keys[1], -prior.middle / prior.middle_sd, (1 - prior.middle) / prior.middle_sd
    )
    ratios = jnp.exp(-elongation * jnp.stack([jnp.zeros_like(share), share, jnp.ones_like(share)]))
    # The Q of a Gaussian matrix, with the signs of R taken out, is uniform over rotations.
    q, r = jnp.linalg.qr(jax.random.normal(keys[2], (3, 3)))
    rotation = q * jnp.sign(jnp.diagonal(r))
    roughness = jnp.exp(prior.log_roughness + prior.log_roughness_sd * jax.random.normal(keys[3]))
    towards, coefficients = _zonal(keys[4], roughness)
    field = functools.partial(_field, towards, coefficients)
    on_sphere = jnp.exp(field(jnp.asarray(_sphere(1024))))
    axes = radius * ratios / (jnp.prod(ratios) * jnp.mean(on_sphere**3)) ** (1 / 3)
    # A few per cent beyond the farthest that any direction can reach.
    extent = 1.05 * jnp.max(on_sphere) * jnp.sqrt((rotation**2) @ axes**2)
    grid = jnp.stack(_lattice(extent, _LATTICE[MeasuredShape]), axis=-1)
    position = jnp.matmul(grid, rotation, precision=jax.lax.Precision.HIGHEST) / axes
    distance = jnp.sqrt(jnp.sum(position**2, axis=-1))
    unit = position / jnp.maximum(distance, 1e-6)[..., None]
    level = distance * jnp.exp(-field(unit)) - 1
    # Linear interpolation between the points makes a rough, long tumour smaller by some per cent.
    # A point of the lattice counts by the part of its cell that the linear level says is inside.
    step = 2 * extent / (_LATTICE[MeasuredShape] - 1)
    slope = jnp.sqrt(sum((g / s) ** 2 for g, s in zip(jnp.gradient(level), step, strict=True)))
    inside = jnp.clip(0.5 - level / (slope * jnp.min(step) + 1e-9), 0, 1)
    volume = jnp.sum(inside) * jnp.prod(step)
    return level, extent * (4 / 3 * jnp.pi * radius**3 / volume) ** (1 / 3)


def _zonal(key, roughness):
    """Directions [3, n] and Legendre coefficients [degree + 1, n] of a Gaussian field.

    sqrt((2 l + 1) / n) sum_k g_k P_l(u . n_k), g_k normal, has the covariance P_l(u . v): the
    isotropic field of degree l with variance 1, for any n.
    """
    direction_key, weight_key = jax.random.split(key)
    towards = jax.random.normal(direction_key, (3, _DIRECTIONS))
    towards = towards / jnp.linalg.norm(towards, axis=0)
    degrees = np.asarray(_DEGREES)
    variance = (3.0 / degrees) ** _DECAY
    scale = np.sqrt(variance / variance.sum() * (2 * degrees + 1) / _DIRECTIONS)
    weights = scale[:, None] * jax.random.normal(weight_key, (len(degrees), _DIRECTIONS))
    return towards, roughness * jnp.zeros((degrees[-1] + 1, _DIRECTIONS)).at[degrees].set(weights)


def _field(towards, coefficients, unit: Float[Array, "... 3"]) -> Float[Array, "..."]:
    """Value of a sum of Legendre series at unit vectors."""
    t = jnp.tensordot(unit, towards, 1, precision=jax.lax.Precision.HIGHEST)
    # Clenshaw's recurrence for Legendre polynomials.
    later, after = jnp.zeros_like(t), jnp.zeros_like(t)
    for degree in range(_DEGREES[-1], -1, -1):
        now = coefficients[degree] + (2 * degree + 1) / (degree + 1) * t * later
        later, after = now - (degree + 1) / (degree + 2) * after, later
    return jnp.sum(later, axis=-1)


@functools.cache
def _sphere(points: int) -> Float[np.ndarray, "points 3"]:
    """Directions spread evenly over the sphere, along a golden spiral."""
    z = 1 - (2 * np.arange(points) + 1) / points
    angle = np.pi * (3 - np.sqrt(5)) * np.arange(points)
    width = np.sqrt(1 - z**2)
    return np.stack([width * np.cos(angle), width * np.sin(angle), z], axis=1).astype(np.float32)
