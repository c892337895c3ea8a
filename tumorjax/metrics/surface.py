"""Distances between the surfaces of two masks: normalized surface Dice and Hausdorff.

The definitions are those of google-deepmind/surface-distance (see `surface_elements`). The distance
from an element to the other surface is that to its nearest element. How it is found is another way:

- Normalized surface Dice only asks which elements are near. That is decided in whole numbers on
  packed masks (`tolerance`), by numpy or by a kernel (`surface_kernels`); where the tolerance spans
  so many voxels that this is slow, the host looks distances up instead.
- Hausdorff's distances come from a k-d tree over surface elements on the host, since a box has many
  more voxels than surface elements; where elements fill the box (noise), from scipy's distance
  transform. On accelerators a separable transform of the whole box is fastest.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import ndimage
from scipy.spatial import cKDTree

from tumorjax.metrics import tolerance as tolerances
from tumorjax.metrics.backends import choose
from tumorjax.metrics.boxes import bounding_box, padded_pair
from tumorjax.metrics.overlap import as_masks, check_shapes
from tumorjax.metrics.surface_elements import (
    check_spacing,
    element_areas,
    is_surface,
    neighbour_codes,
)

__all__ = [
    "bounding_box",
    "element_areas",
    "hausdorff",
    "near_counts",
    "near_share",
    "neighbour_codes",
    "normalized_surface_dice",
    "surface_distances",
]

# Share of the box's points that may be surface elements before the distance transform is cheaper:
# measured on random noise, where both take the same time at 14 % for boxes of 30^3 to 100^3.
_DENSE = 0.15

# How many words the packed way may touch for each surface element before looking up distances is
# cheaper: measured on kidneys, where both take the same time at a tolerance of some 30 voxels.
_WORDS_PER_ELEMENT = 1000


def normalized_surface_dice(
    truth: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    prediction: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    spacing: Sequence[float],
    tolerance: float = 2.0,
    backend: str = "auto",
) -> float:
    """Returns the share of both surfaces' area that lies within a tolerance of the other surface.

    Source: Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and
    neck anatomy for radiotherapy", 2018; equals surface-distance's
    `compute_surface_dice_at_tolerance`.

    Args:
        truth: mask [x, y, z]; an object at the volume's border ends there.
        prediction: mask of the same shape.
        spacing: voxel size (x, y, z), mm.
        tolerance: largest distance that counts as agreement, mm; the bound itself included.
        backend: host, device or auto; see `backends.choose`.

    Returns:
        A fraction 0..1. Both masks empty: NaN. One empty: 0.

    Raises:
        ValueError: shapes differ, a mask is not 3D, spacing, tolerance or backend is not usable.
    """
    tolerance, voxel = check_tolerance(tolerance), check_spacing(spacing)
    check_shapes(truth, prediction, ndim=3)
    if choose(backend, truth, prediction) == "device":
        from tumorjax.metrics import surface_kernels

        pair = padded_pair(truth, prediction)
        if pair is None:
            return float("nan")
        *masks, shape = pair
        counts = surface_kernels.near_counts(
            *(mask[None] for mask in masks), [shape], [voxel], [tolerance]
        )[0]
    else:
        truth, prediction = as_masks(truth, prediction)
        box = bounding_box(truth, prediction)
        if box is None:
            return float("nan")
        counts = near_counts(truth[box], prediction[box], voxel, tolerance)
    return near_share(counts, voxel)


def check_tolerance(tolerance: float) -> float:
    """Returns a tolerance as a number.

    Raises:
        ValueError: it is negative or not a number.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}. Expected millimetres, 0 or more")
    return float(tolerance)


def near_counts(
    truth: Bool[np.ndarray, "x y z"],
    prediction: Bool[np.ndarray, "x y z"],
    spacing: Float[np.ndarray, "3"],
    tolerance: float,
) -> Int[np.ndarray, "2 2 256"]:
    """Counts the surface elements of each code, and those near the other surface, on the host.

    Args:
        truth: mask [x, y, z], best cropped to the objects.
        prediction: mask of the same shape.
        spacing: (x, y, z), mm.
        tolerance: mm.

    Returns:
        Of truth's elements and of prediction's: how many there are of each code, and how many of
        these lie within the tolerance of the other's.
    """
    codes = neighbour_codes(truth), neighbour_codes(prediction)
    surfaces = is_surface(codes[0]), is_surface(codes[1])
    elements = [code[where] for code, where in zip(codes, surfaces, strict=True)]
    near = _near(surfaces, spacing, tolerance)
    return np.array(
        [
            [np.bincount(code, minlength=256), np.bincount(code[at], minlength=256)]
            for code, at in zip(elements, near, strict=True)
        ]
    )


def _near(
    surfaces: tuple[Bool[np.ndarray, "x y z"], Bool[np.ndarray, "x y z"]],
    spacing: Float[np.ndarray, "3"],
    tolerance: float,
) -> list[Bool[np.ndarray, " elements"]]:
    """Says which elements of either surface are within the tolerance of the other."""
    counts = [np.count_nonzero(surface) for surface in surfaces]
    if tolerances.spans(surfaces[0].shape, spacing, tolerance):
        # Even an empty surface is within an infinite tolerance.
        return [
            np.full(counts[side], counts[1 - side] > 0 or np.isinf(tolerance)) for side in (0, 1)
        ]
    reach = tolerances.reach_table(spacing, tolerance, surfaces[0].shape)
    words = 4 * np.count_nonzero(reach >= 0) * (surfaces[0].size // 32)
    if words > _WORDS_PER_ELEMENT * sum(counts):
        return [
            _distances(surfaces[side], surfaces[1 - side], spacing, tolerance) <= tolerance
            for side in (0, 1)
        ]
    packed = [tolerances.pack(surface) for surface in surfaces]
    depth = surfaces[0].shape[2]
    return [
        tolerances.unpack(tolerances.near(packed[1 - side], reach), depth)[surfaces[side]]
        for side in (0, 1)
    ]


def near_share(counts: Int[np.ndarray, "2 2 256"], spacing: Float[np.ndarray, "3"]) -> float:
    """Returns normalized surface Dice from the counts of `near_counts`; NaN without elements."""
    areas = (counts * element_areas(spacing.tolist())).sum(axis=-1)
    total = areas[:, 0].sum()
    return float(areas[:, 1].sum() / total) if total else float("nan")


def hausdorff(
    truth: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    prediction: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    spacing: Sequence[float],
    percentile: float = 95.0,
    backend: str = "auto",
) -> float:
    """Returns the distance that a given share of each surface's area keeps from the other surface.

    The larger of both directions. Equals surface-distance's `compute_robust_hausdorff`: the
    percentile is of surface area, not of voxels.

    Args:
        truth: mask [x, y, z].
        prediction: mask of the same shape.
        spacing: voxel size (x, y, z), mm.
        percentile: 0..100; 100 is the Hausdorff distance itself.
        backend: host, device or auto; see `backends.choose`.

    Returns:
        Millimetres. One mask empty: infinity. Both empty: NaN, for there is no surface at all
        (surface-distance has infinity there as well).

    Raises:
        ValueError: shapes differ, a mask is not 3D, spacing, percentile or backend is not usable.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile is {percentile}. Expected 0 to 100")
    distances = surface_distances(truth, prediction, spacing, backend=backend)
    truth_to_prediction, prediction_to_truth, truth_areas, prediction_areas = distances
    if not len(truth_areas) and not len(prediction_areas):
        return float("nan")
    if not len(truth_areas) or not len(prediction_areas):
        return float("inf")
    return max(
        _area_percentile(truth_to_prediction, truth_areas, percentile),
        _area_percentile(prediction_to_truth, prediction_areas, percentile),
    )


def surface_distances(
    truth: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    prediction: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    spacing: Sequence[float],
    bound: float = np.inf,
    backend: str = "auto",
) -> tuple[
    Float[np.ndarray, " truth_elements"],
    Float[np.ndarray, " prediction_elements"],
    Float[np.ndarray, " truth_elements"],
    Float[np.ndarray, " prediction_elements"],
]:
    """Returns every surface element's distance to the other surface, and its area.

    Args:
        truth: mask [x, y, z].
        prediction: mask of the same shape.
        spacing: voxel size (x, y, z), mm.
        bound: distances beyond it (mm) need not be known and may come as infinity; saves time.
        backend: host, device or auto; see `backends.choose`. Elements come in the same order.

    Returns:
        Distances from truth to prediction and from prediction to truth (mm), areas of truth's and
        prediction's elements (mm^2). A distance to an empty mask is infinity.

    Raises:
        ValueError: shapes differ, a mask is not 3D, spacing is not three positive numbers.
    """
    voxel = check_spacing(spacing)
    check_shapes(truth, prediction, ndim=3)
    areas = element_areas(voxel.tolist())
    empty = np.zeros(0)
    if choose(backend, truth, prediction) == "device":
        from tumorjax.metrics import surface_kernels

        pair = padded_pair(truth, prediction)
        if pair is None:
            return empty, empty, empty, empty
        *masks, shape = pair
        batch = surface_kernels.element_distances(*(mask[None] for mask in masks), [shape], [voxel])
        codes, squared = batch[0][0], batch[1][0]
        surfaces = is_surface(codes)
        return (
            np.sqrt(squared[0][surfaces[0]]),
            np.sqrt(squared[1][surfaces[1]]),
            areas[codes[0][surfaces[0]]],
            areas[codes[1][surfaces[1]]],
        )
    truth, prediction = as_masks(truth, prediction)
    box = bounding_box(truth, prediction)
    if box is None:
        return empty, empty, empty, empty
    truth_codes = neighbour_codes(truth[box])
    prediction_codes = neighbour_codes(prediction[box])
    truth_surface = is_surface(truth_codes)
    prediction_surface = is_surface(prediction_codes)
    return (
        _distances(truth_surface, prediction_surface, voxel, bound),
        _distances(prediction_surface, truth_surface, voxel, bound),
        areas[truth_codes[truth_surface]],
        areas[prediction_codes[prediction_surface]],
    )


def _distances(
    source: Bool[np.ndarray, "x y z"],
    target: Bool[np.ndarray, "x y z"],
    spacing: Float[np.ndarray, "3"],
    bound: float,
) -> Float[np.ndarray, " elements"]:
    """Returns the distance of each source element to the nearest target element, mm."""
    if not target.any():
        return np.full(np.count_nonzero(source), np.inf)
    elements, targets = np.argwhere(source), np.argwhere(target)
    if len(targets) > _DENSE * target.size:
        distances = ndimage.distance_transform_edt(~target, sampling=spacing)[source]
        tree = None
    else:
        distances = np.zeros(len(elements))
        # The others coincide, as most of a good prediction do.
        apart = np.flatnonzero(~target[source])
        tree = _tree(targets, spacing)
        # A little beyond the bound, so that rounding inside the tree decides nothing.
        reach = bound * (1 + 1e-6) + 1e-6
        _, nearest = tree.query(elements[apart] * spacing, distance_upper_bound=reach)
        found = nearest < len(targets)
        distances[apart] = np.inf
        offsets = elements[apart[found]] - targets[nearest[found]]
        distances[apart[found]] = _lengths(offsets, spacing)
    # Two targets may be equally far but for rounding; one of them at the bound is enough.
    for index in np.flatnonzero((distances > bound) & (distances <= bound * (1 + 1e-9))):
        tree = tree or _tree(targets, spacing)
        equal = tree.query_ball_point(elements[index] * spacing, bound * (1 + 1e-8))
        distances[index] = _lengths(elements[index] - targets[equal], spacing).min()
    return distances


def _tree(points: Int[np.ndarray, "n 3"], spacing: Float[np.ndarray, "3"]) -> cKDTree:
    return cKDTree(points * spacing, balanced_tree=False, compact_nodes=False)


def _lengths(
    offsets: Int[np.ndarray, "n 3"], spacing: Float[np.ndarray, "3"]
) -> Float[np.ndarray, " n"]:
    # Summed in the order of scipy's distance transform: the same rounding at the tolerance.
    return np.sqrt(((offsets * spacing) ** 2).T.copy().sum(axis=0))


def _area_percentile(
    distances: Float[np.ndarray, " n"], areas: Float[np.ndarray, " n"], percentile: float
) -> float:
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / areas[order].sum()
    index = int(np.searchsorted(share, percentile / 100.0))
    return float(distances[order[min(index, len(order) - 1)]])
