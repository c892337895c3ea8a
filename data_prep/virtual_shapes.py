"""Geometry of the virtual abdomen: smooth random fields, ellipsoids and tubes as distances.

Everything is a function of position, so that a volume of any size can be filled slab by slab. A
distance is in mm, negative inside, exact for tubes and nearly so for ellipsoids close to round.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Float

Volume = Float[np.ndarray, "x y z"]

# Mean of the squared cubic B-spline weights along one axis (151/315), so that a field has unit
# variance: the lattice's normal values are averaged with these weights along three axes.
_SPLINE_POWER = 151 / 315


class Field(NamedTuple):
    """A smooth random function of position, with mean 0 and variance 1, held as a lattice."""

    lattice: Float[np.ndarray, "z y x"]
    start: tuple[float, float, float]
    step: float


def smooth_field(
    rng: np.random.Generator, step: float, lower: Sequence[float], upper: Sequence[float]
) -> Field:
    """Draws a smooth field over a box.

    Args:
        rng: source of the lattice's values.
        step: distance of lattice points, mm; the field's structures are about twice as wide.
        lower, upper: corners (x, y, z) of the box, mm.
    """
    counts = [int(np.ceil((b - a) / step)) + 4 for a, b in zip(lower, upper, strict=True)]
    lattice = rng.standard_normal(counts[::-1], dtype=np.float32)
    lattice /= np.float32(_SPLINE_POWER**1.5)
    start = (lower[0] - 1.5 * step, lower[1] - 1.5 * step, lower[2] - 1.5 * step)
    return Field(lattice, start, step)


def evaluate(field: Field, axes: Sequence[Float[np.ndarray, "_"]]) -> Volume:
    """Returns the field on the grid that three coordinate axes (x, y, z in mm) span.

    Each axis is a sparse matrix of cubic B-spline weights, four a row: fast, and without threads
    whose number would change the last bits.
    """
    values = field.lattice
    for axis in (2, 1, 0):
        weights = _spline_weights(
            axes[2 - axis], field.start[2 - axis], field.step, values.shape[axis]
        )
        moved = np.moveaxis(values, axis, 0)
        flat = weights @ np.ascontiguousarray(moved).reshape(moved.shape[0], -1)
        values = np.moveaxis(flat.reshape(-1, *moved.shape[1:]), 0, axis)
    return np.ascontiguousarray(values).T


def _spline_weights(
    positions: Float[np.ndarray, "n"], start: float, step: float, count: int
) -> scipy.sparse.csr_matrix:
    place = np.clip((np.asarray(positions, np.float64) - start) / step, 1.0, count - 2.001)
    base = np.floor(place).astype(np.int64)
    t = place - base
    weights = np.stack(
        [
            (1 - t) ** 3 / 6,
            (3 * t**3 - 6 * t**2 + 4) / 6,
            (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
            t**3 / 6,
        ],
        axis=1,
    ).astype(np.float32)
    columns = base[:, None] + np.arange(-1, 3)
    rows = np.repeat(np.arange(len(place)), 4)
    return scipy.sparse.csr_matrix(
        (weights.ravel(), (rows, columns.ravel())), shape=(len(place), count)
    )


def rotation(about_x: float, about_y: float, about_z: float) -> Float[np.ndarray, "3 3"]:
    """Returns the rotation matrix of three angles in degrees, applied about x, then y, then z."""
    a, b, c = np.deg2rad([about_x, about_y, about_z])
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return (rz @ ry @ rx).astype(np.float32)


def ellipsoid(
    points: Sequence[Volume],
    center: Sequence[float],
    radii: Sequence[float],
    turn: Float[np.ndarray, "3 3"] | None = None,
) -> Volume:
    """Returns the approximate distance to an ellipsoid's surface, mm, negative inside.

    Args:
        points: the three coordinates of each voxel, mm.
        center: mm.
        radii: mm along the ellipsoid's own axes.
        turn: rotation from its own axes to the patient's; none by default.
    """
    offset = [p - np.float32(c) for p, c in zip(points, center, strict=True)]
    if turn is not None:
        offset = [sum(turn[j, i] * offset[j] for j in range(3)) for i in range(3)]
    scaled = [o / np.float32(r) for o, r in zip(offset, radii, strict=True)]
    norm = np.sqrt(scaled[0] ** 2 + scaled[1] ** 2 + scaled[2] ** 2)
    # The value over its gradient: first-order exact at the surface.
    slope = np.sqrt(sum((s / np.float32(r)) ** 2 for s, r in zip(scaled, radii, strict=True)))
    return (norm - 1) * norm / np.maximum(slope, np.float32(1e-3))


def ellipsoid_bounds(
    center: Sequence[float], radii: Sequence[float], turn: Float[np.ndarray, "3 3"] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lower and upper corner (mm) of the box about an ellipsoid."""
    matrix = np.eye(3) if turn is None else turn
    half = np.sqrt(((matrix * np.asarray(radii)) ** 2).sum(1))
    return np.asarray(center) - half, np.asarray(center) + half


def tube(
    points: Sequence[Volume],
    path: Float[np.ndarray, "n 3"],
    radii: Float[np.ndarray, "n"],
) -> Volume:
    """Returns the distance to a tube's wall, mm, negative inside.

    Args:
        points: the three coordinates of each voxel, mm.
        path: the tube's middle as a polyline, mm.
        radii: mm at each of its points, linear between them; ends are round.
    """
    best = np.full(points[0].shape, np.float32(1e6), order="F")
    for a, b, ra, rb in zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True):
        along = (b - a).astype(np.float32)
        length2 = max(float(along @ along), 1e-6)
        offset = [p - np.float32(c) for p, c in zip(points, a, strict=True)]
        t = sum(o * c for o, c in zip(offset, along, strict=True)) / np.float32(length2)
        t = np.clip(t, 0, 1)
        gap2 = sum((o - t * c) ** 2 for o, c in zip(offset, along, strict=True))
        np.minimum(best, np.sqrt(gap2) - (np.float32(ra) + t * np.float32(rb - ra)), out=best)
    return best


def smooth_path(
    path: Float[np.ndarray, "n 3"], radii: Float[np.ndarray, "n"], pieces: int
) -> tuple[Float[np.ndarray, "m 3"], Float[np.ndarray, "m"]]:
    """Returns a Catmull-Rom curve through a path's points, each leg cut into `pieces`."""
    values = np.concatenate([np.asarray(path, float), np.asarray(radii, float)[:, None]], axis=1)
    padded = np.concatenate([values[:1], values, values[-1:]])
    t = np.arange(pieces)[:, None] / pieces
    legs = []
    for p0, p1, p2, p3 in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        legs.append(
            p1
            + 0.5 * t * (p2 - p0)
            + t**2 * (p0 - 2.5 * p1 + 2 * p2 - 0.5 * p3)
            + t**3 * (-0.5 * p0 + 1.5 * p1 - 1.5 * p2 + 0.5 * p3)
        )
    curve = np.concatenate([*legs, values[-1:]])
    return curve[:, :3], curve[:, 3]


def smooth_minimum(a: Volume, b: Volume, width: float) -> Volume:
    """Returns the union of two distances, blended over `width` mm (polynomial minimum)."""
    blend = np.maximum(np.float32(width) - np.abs(a - b), 0)
    return np.minimum(a, b) - blend * blend / np.float32(4 * width)
