"""Where a tumour goes: a place inside its organ, away from other tumours.

DiffTumor's conventions: the centre lies in the organ, first in the middle 40 % of its height, then
wider; in the liver not at its very border; large tumours of organs other than liver and kidney sit
at the organ's middle; the mask is cut to the organ, except that half of the medium and large
kidney tumours may stick out of it. What is ours: a tumour that the organ cuts below its size's
group is refused and another place is tried, and so is one that leaves less than 40 % of the organ
or has less than 40 % of itself in it; what sticks out replaces only soft tissue and fat; nothing of
a solid organ's tumour lies in air, where an organ's mask may reach beyond the body; tumours of
hollow organs have their centre in the wall or in what it holds, not in gas. On request tumours keep
away from the organ's border, or touch it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray
from scipy import ndimage

from tumorjax.errors import CaseError, UserError
from tumorjax.metrics.components import label_components
from tumorjax.synthesis import shapes
from tumorjax.synthesis.texture import generator

Box = tuple[slice, slice, slice]

# How a tumour lies to its organ's border: as it comes, with organ all around, or touching it.
POSITIONS = ("anywhere", "inside", "border")

# Places that are tried before an organ counts as too small, and how many of them share one shape.
_ATTEMPTS = 16
_SAME_SHAPE = 4
# A tumour may take this much of its organ's voxels.
_MOST_OF_ORGAN = 0.6
# Of a tumour that sticks out of its organ at least this part lies in it.
_LEAST_INSIDE = 0.4
# Between two tumours stays this much, so that they are two in the mask as well.
_GAP_MM = 3.0
# A tumour asked for in mm keeps at least this part of its radius when the organ cuts it.
_KEPT_RADIUS = 0.75
# Organs with a lumen: their tumours start in the wall, not in the gas.
_HOLLOW = ("colon", "esophagus")
# What a tumour may replace outside its organ, HU: fat and soft tissue, no air and no bone. Air is
# -175 in images that were clipped to the usual window.
_SOFT_TISSUE = (-150.0, 240.0)


class OrganTooSmall(CaseError):
    """The organ has no place for a tumour of the size; a smaller one may fit."""


class Lesion(NamedTuple):
    """A placed tumour: its mask within `box` of the volume, and the radius of its volume, mm."""

    box: Box
    mask: Bool[np.ndarray, "x y z"]
    radius_mm: float


def organ_box(mask: Bool[np.ndarray, "x y z"]) -> Box | None:
    """Returns the bounding box of a mask, None if the mask is empty."""
    # Reducing along the last axis first reads the large array once.
    flat = np.any(mask, axis=2)
    x, y = np.flatnonzero(flat.any(axis=1)), np.flatnonzero(flat.any(axis=0))
    if not x.size:
        return None
    within = mask[x[0] : x[-1] + 1, y[0] : y[-1] + 1]
    z = np.flatnonzero(within.any(axis=(0, 1)))
    return (
        slice(int(x[0]), int(x[-1]) + 1),
        slice(int(y[0]), int(y[-1]) + 1),
        slice(int(z[0]), int(z[-1]) + 1),
    )


def place(
    key: PRNGKeyArray,
    image: Float[np.ndarray, "x y z"],
    organ_mask: Bool[np.ndarray, "x y z"],
    taken: Bool[np.ndarray, "x y z"],
    blocked: Bool[np.ndarray, "x y z"] | None,
    spacing: tuple[float, float, float],
    size: str | float,
    organ: str,
    prior: str,
    case: str,
    position: str = "anywhere",
    margin_mm: float = 3.0,
) -> Lesion:
    """Draws a tumour's shape and finds a place for it.

    Args:
        key: jax.random key.
        image: HU.
        organ_mask: the host organ.
        taken: existing tumours; the new one keeps a gap of 3 mm from them.
        blocked: what a tumour that sticks out of its organ must not cover either, such as other
            organs; None for nothing.
        spacing: (x, y, z) in mm.
        size: "tiny", "small", "medium", "large", or a radius in mm.
        organ: organ group.
        prior: "difftumor" or "measured".
        case: named in errors.
        position: "anywhere" in the organ; "inside": at least `margin_mm` of organ lie between the
            tumour and all that is not organ, along each axis; "border": the tumour touches what is
            not organ (a scan's end is no border).
        margin_mm: see `position`.

    Returns:
        The placed tumour, in one piece.

    Raises:
        CaseError: the organ is absent.
        OrganTooSmall: no place was found.
        UserError: the position is unknown, or the margin not a positive number.
    """
    check_position(position, margin_mm)
    box = organ_box(organ_mask)
    if box is None:
        raise CaseError(
            case,
            f"there is no {organ} in the scan, so no tumour can be put into it",
            f"Leave the case out, or give a scan with a {organ} mask",
        )
    steps = np.asarray(spacing, np.float64)
    group = size if isinstance(size, str) else shapes.size_group(size)
    lowest = shapes.GROUP_RADIUS[size][0] if isinstance(size, str) else _KEPT_RADIUS * size
    # Folded in rather than split: one compilation of jax.random serves all.
    random = generator(jax.random.fold_in(key, 0))
    may_protrude = (
        bool(random.random() < 0.5) and organ == "kidney" and group in ("medium", "large")
    )
    may_protrude = may_protrude and position != "inside"
    voxels = int(np.count_nonzero(organ_mask[box]))
    # What a tumour may lie in.
    room = _inner(organ_mask, box, steps, margin_mm) if position == "inside" else organ_mask
    wanted = room[box]
    if organ in _HOLLOW:
        tissue = wanted & _soft_tissue(image[box], steps)
        wanted = tissue if tissue.any() else wanted
    reach = lowest if position == "border" else None
    centres = _centres(random, wanted, taken[box], steps, group, organ, reach)
    best = 0.0
    shape = np.zeros((0, 0, 0), bool)
    for attempt, centre in zip(range(_ATTEMPTS), centres, strict=False):
        if attempt % _SAME_SHAPE == 0:
            draw_key = jax.random.fold_in(key, 1 + attempt // _SAME_SHAPE)
            if isinstance(size, str):
                radius_key = jax.random.fold_in(draw_key, 0)
                radius = float(shapes.sample_radius(radius_key, organ, prior, 1, size)[0])
            else:
                radius = float(size)
            shape_key = jax.random.fold_in(draw_key, 1)
            shape = shapes.tumor_mask(shape_key, radius, spacing, organ, prior)
        where = tuple(c + b.start for c, b in zip(centre, box, strict=True))
        placed = _cut(
            *(shape, where, image, room, taken, blocked, steps, may_protrude),
            solid=organ not in _HOLLOW,
        )
        if placed is None or (position == "border" and not _touches(placed, organ_mask)):
            continue
        kept, inside = placed.radius_mm, np.count_nonzero(organ_mask[placed.box] & placed.mask)
        if inside < _LEAST_INSIDE * np.count_nonzero(placed.mask):
            continue
        best = max(best, kept)
        if kept >= lowest and inside <= _MOST_OF_ORGAN * voxels:
            return placed
    text = size if isinstance(size, str) else f"{size:g} mm"
    where_ = {
        "anywhere": "",
        "inside": f" with {margin_mm:g} mm of organ around it",
        "border": " that touches its border",
    }[position]
    raise OrganTooSmall(
        case,
        f"the {organ} ({voxels * np.prod(steps) / 1000:.0f} ml) has no place for a {text} tumour"
        f"{where_}: it needs a radius of {lowest:.1f} mm and at most 60 % of the organ, and the"
        f" largest of {_ATTEMPTS} tries had {best:.1f} mm",
        "Ask for a smaller size or leave the case out",
    )


def check_position(position: str, margin_mm: float) -> None:
    """Raises a UserError where `place` could not take these."""
    if position not in POSITIONS:
        raise UserError(f"position {position!r} is unknown. Expected {', '.join(POSITIONS)}")
    if not (np.isfinite(margin_mm) and margin_mm > 0):
        raise UserError(f"margin is {margin_mm} mm. Expected a positive number")


def _inner(
    organ_mask: Bool[np.ndarray, "x y z"],
    box: Box,
    steps: Float[np.ndarray, "3"],
    margin_mm: float,
) -> Bool[np.ndarray, "x y z"]:
    """The organ's voxels that have at least `margin_mm` of it around them along each axis."""
    reach = np.ceil(margin_mm / steps)
    # Measured in the axes' own reaches, so that thick slices do not count as deep tissue. The
    # scan's end may be the organ's: what is beyond it counts as outside.
    depth = ndimage.distance_transform_edt(np.pad(organ_mask[box], 1), sampling=1 / reach)
    inner = np.zeros_like(organ_mask)
    inner[box] = depth[1:-1, 1:-1, 1:-1] > 1 + 1e-6
    return inner


def _touches(lesion: Lesion, organ_mask: Bool[np.ndarray, "x y z"]) -> bool:
    """Whether a voxel of the lesion is outside the organ or shares a face with what is."""
    wide = tuple(
        slice(max(b.start - 1, 0), min(b.stop + 1, n))
        for b, n in zip(lesion.box, organ_mask.shape, strict=True)
    )
    inner = tuple(
        slice(b.start - w.start, b.stop - w.start) for b, w in zip(lesion.box, wide, strict=True)
    )
    beside = ndimage.binary_dilation(~organ_mask[wide])[inner]
    return bool((beside & lesion.mask).any())


def _centres(
    random: np.random.Generator,
    organ: Bool[np.ndarray, "x y z"],
    taken: Bool[np.ndarray, "x y z"],
    steps: Float[np.ndarray, "3"],
    group: str,
    organ_name: str,
    reach: float | None,
) -> Iterator[tuple[int, ...]]:
    """Yields centres inside the organ, the most wanted first; coordinates within `organ`.

    With `reach` they lie at most so many mm (and a point of the lattice) from its border.
    """
    # The distance transform of a large organ takes seconds; at most 32 points an axis are plenty
    # to know how deep a place lies.
    stride = np.maximum(1, np.ceil(np.asarray(organ.shape) / 32)).astype(int)
    lattice = tuple(slice(s // 2, None, s) for s in stride)
    free = organ & ~taken
    coarse = free[lattice]
    points = np.argwhere(coarse)
    if not len(points):
        # The organ is thinner than the lattice.
        points, stride, lattice = np.argwhere(free), np.ones(3, int), (slice(None),) * 3
        coarse = free
    if not len(points):
        return
    depth = ndimage.distance_transform_edt(np.pad(coarse, 1), sampling=steps * stride)
    depth = depth[1:-1, 1:-1, 1:-1][tuple(points.T)]
    points = points * stride + np.array([s.start or 0 for s in lattice])
    height = points[:, 2] / max(organ.shape[2] - 1, 1)

    if reach is not None:
        near = depth <= max(reach, depth.min())
        points, depth, height = points[near], depth[near], height[near]
    elif group == "large" and organ_name not in ("liver", "kidney"):
        middle = (np.asarray(organ.shape) - 1) / 2
        yield tuple(points[np.argmin((((points - middle) * steps) ** 2).sum(axis=1))])
    # DiffTumor erodes liver slices by 5x5 voxels of 1 mm.
    allowed = depth > 2.5 if organ_name == "liver" and reach is None else depth > 0
    for half in (0.2, 0.3, 0.4, 0.5):
        band = points[allowed & (np.abs(height - 0.5) <= half + 1e-9)]
        for _ in range(3 if len(band) else 0):
            point = band[random.integers(len(band))]
            # The lattice is coarse; a centre may lie anywhere around its points.
            moved = point + random.integers(-(stride // 2), stride - stride // 2)
            moved = np.clip(moved, 0, np.asarray(organ.shape) - 1)
            yield tuple(moved if free[tuple(moved)] else point)
    # Last the places with the most room around them.
    for index in np.argsort(-depth, kind="stable")[: 2 * _ATTEMPTS : 4]:
        yield tuple(points[index])


def _cut(
    shape, centre, image, organ_mask, taken, blocked, steps, may_protrude, solid
) -> Lesion | None:
    """Puts a shape's middle at a centre and cuts it to what it may cover; None if not allowed."""
    start = [c - n // 2 for c, n in zip(centre, shape.shape, strict=True)]
    box = tuple(
        slice(max(s, 0), min(s + n, size))
        for s, n, size in zip(start, shape.shape, organ_mask.shape, strict=True)
    )
    mask = shape[tuple(slice(b.start - s, b.stop - s) for b, s in zip(box, start, strict=True))]
    allowed = organ_mask[box]
    if solid:
        # By the majority of each voxel's neighbours: noise in fat must not punch holes, and tissue
        # beside a lung is tissue.
        dense = (image[box] > _SOFT_TISSUE[0]).astype(np.float32)
        allowed = allowed & (ndimage.uniform_filter(dense, 3) > 0.5)
    if may_protrude:
        tissue = _soft_tissue(image[box], steps)
        allowed = allowed | (tissue if blocked is None else tissue & ~blocked[box])
    mask = mask & allowed
    if not mask.any():
        return None
    labels, pieces = label_components(mask)
    if pieces > 1:
        # The organ cut it into pieces: the one that has most of the organ is the tumour.
        mask = labels == 1 + np.argmax(np.bincount(labels[organ_mask[box]], minlength=2)[1:])
    inner = organ_box(mask)
    if inner is None:
        return None
    box = tuple(slice(b.start + i.start, b.start + i.stop) for b, i in zip(box, inner, strict=True))
    mask = mask[inner]
    if _too_close(box, mask, taken, steps):
        return None
    radius = (np.count_nonzero(mask) * np.prod(steps) * 3 / 4 / np.pi) ** (1 / 3)
    return Lesion((box[0], box[1], box[2]), np.ascontiguousarray(mask), float(radius))


def _soft_tissue(image, steps):
    """Fat and soft tissue, by HU averaged over a few millimetres, or noise would punch holes."""
    smooth = ndimage.uniform_filter(image, np.maximum(1, np.round(4 / steps)).astype(int))
    return (smooth > _SOFT_TISSUE[0]) & (smooth < _SOFT_TISSUE[1])


def _too_close(box, mask, taken, steps) -> bool:
    """Whether an existing tumour lies in the mask or within the gap around it."""
    reach = np.maximum(1, np.ceil(_GAP_MM / steps)).astype(int)
    wide = tuple(
        slice(max(b.start - r, 0), min(b.stop + r, size))
        for b, r, size in zip(box, reach, taken.shape, strict=True)
    )
    others = taken[wide]
    if not others.any():
        return False
    grown = ndimage.maximum_filter(others, size=tuple(2 * reach + 1))
    inner = tuple(
        slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, wide, strict=True)
    )
    return bool((grown[inner] & mask).any())
