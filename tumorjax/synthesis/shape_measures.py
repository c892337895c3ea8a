"""What a tumour's mask measures: radius, axes, longest diameter, roughness."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from tumorjax.metrics.lesion_sizes import longest_inplane, sphere_radius


class Measures(NamedTuple):
    """Of one tumour's mask.

    Attributes:
        volume_mm3: voxels times their volume.
        radius_mm: of the ball of that volume.
        longest_inplane_mm: longest diameter in a slice, see `metrics.lesion_sizes`.
        minor_to_major, middle_to_major: ratios of the principal axes (square roots of the second
            moments; a voxel is a box with moments of its own, not a point).
        roughness: standard deviation over the surface (the area of its voxels' faces) of
            log(distance from the middle / that of the ellipsoid with the mask's second moments).
            It includes the voxels' own steps, about 0.3 voxels over the radius.
    """

    volume_mm3: float
    radius_mm: float
    longest_inplane_mm: float
    minor_to_major: float
    middle_to_major: float
    roughness: float


def measure(mask: Bool[np.ndarray, "x y z"], spacing: tuple[float, float, float]) -> Measures:
    """Measures a tumour.

    Args:
        mask: one tumour, at least a voxel.
        spacing: (x, y, z) in mm.

    Raises:
        ValueError: the mask is empty.
    """
    mask = np.asarray(mask, bool)
    steps = np.asarray(spacing, np.float64)
    points = np.argwhere(mask) * steps
    if not len(points):
        raise ValueError("the mask is empty: there is nothing to measure")
    volume = len(points) * float(np.prod(steps))
    radius = float(sphere_radius(volume))
    longest = float(longest_inplane(mask, spacing))
    middle = points.mean(axis=0)
    moments = (points - middle).T @ (points - middle) / len(points) + np.diag(steps**2 / 12)
    deviations = np.sqrt(np.linalg.eigvalsh(moments))
    ratios = deviations[:2] / deviations[2]
    rough = _roughness(mask, steps, middle, moments)
    return Measures(volume, radius, longest, float(ratios[0]), float(ratios[1]), rough)


def _roughness(mask, steps, middle, moments) -> float:
    padded = np.pad(mask, 1)
    places, areas = [], []
    for axis in range(3):
        before, after = (
            padded[tuple(cut if a == axis else slice(1, -1) for a in range(3))]
            for cut in (slice(None, -1), slice(1, None))
        )
        faces = np.argwhere(before != after).astype(np.float64)
        faces[:, axis] -= 0.5
        places.append(faces * steps)
        areas.append(np.full(len(faces), np.prod(np.delete(steps, axis))))
    place, area = np.concatenate(places) - middle, np.concatenate(areas)
    # An ellipsoid's second moments are a fifth of its squared semi-axes.
    squared = np.einsum("ni,ij,nj->n", place, np.linalg.inv(5 * moments), place)
    logarithm = 0.5 * np.log(np.maximum(squared, 1e-12))
    mean = np.average(logarithm, weights=area)
    return float(np.sqrt(np.average((logarithm - mean) ** 2, weights=area)))
