"""Lesions of the virtual abdomen: tumours with the sizes of real ones, and what is taken for them.

A tumour grows: a surface whose radius is a random function of direction, roughened by a smooth
field, is filled from its centre outwards until it has the volume that was drawn. Nothing here is
shared with tumorjax.synthesis, neither code nor distributions: the virtual tumours stand for real
ones, and a study of synthetic tumours would be circular if both came from one model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage
from scipy.stats import norm

from data_prep.virtual_scanner import Grid
from data_prep.virtual_shapes import evaluate, smooth_field
from tumorjax.anatomy import HOST, LABELS, TUMORS, organ_labels

Volume = Float[np.ndarray, "x y z"]

# Radius of a sphere of the lesion's volume, mm, at 10/25/50/75/90 %, and minor/major axis at
# 10/50/90 %. Measured on public expert masks (LiTS; Medical Segmentation Decathlon Task07 and
# Task10; KiTS21). There are no public masks of the last two: lengths and diameters that reviews
# of oesophageal cancer and ovarian endometriosis give (endometriomas of 3 to 5 cm).
SIZES: dict[str, dict[str, tuple[float, ...]]] = {
    "liver_lesion": {"radius": (2.5, 3.4, 5.3, 9.1, 15.0), "axes": (0.26, 0.57, 0.77)},
    "pancreatic_lesion": {"radius": (7.4, 8.7, 11.1, 13.4, 16.5), "axes": (0.46, 0.64, 0.79)},
    "kidney_lesion": {"radius": (9.4, 11.9, 18.3, 27.7, 43.5), "axes": (0.59, 0.75, 0.86)},
    "colon_lesion": {"radius": (11.0, 13.2, 17.0, 21.1, 25.7), "axes": (0.36, 0.53, 0.71)},
    "esophagus_tumor": {"radius": (7.0, 9.0, 11.5, 14.5, 18.0), "axes": (0.35, 0.5, 0.7)},
    "endometrioma_tumor": {"radius": (9.0, 13.0, 18.0, 24.0, 32.0), "axes": (0.6, 0.75, 0.88)},
}
# How likely a patient with this tumour has 1, 2, 3, ... of them.
COUNTS: dict[str, tuple[float, ...]] = {
    "liver_lesion": (0.25, 0.2, 0.17, 0.15, 0.12, 0.11),
    "pancreatic_lesion": (1.0,),
    "kidney_lesion": (0.88, 0.12),
    "colon_lesion": (0.95, 0.05),
    "esophagus_tumor": (1.0,),
    "endometrioma_tumor": (0.7, 0.3),
}


class Look(NamedTuple):
    """How a kind of tumour looks.

    Attributes:
        fit: least share of the tumour that lies in its host; the rest bulges into fat.
        largest: largest radius, as a share of the radius of a sphere of the host's volume.
        contrast: HU against the host in the phases portal, early, arterial, delayed.
        absolute: HU in those phases where the host has none of its own (bowel, uterus' side).
        spread: standard deviation of the contrast between tumours, HU.
        texture: of the heterogeneity inside, HU.
        necrosis: how often a core without uptake, in tumours of more than 9 mm radius.
        rim: how often a brighter rim.
        roughness: of the surface, as a share of the radius.
    """

    fit: float
    largest: float
    contrast: tuple[float, float, float, float]
    absolute: bool
    spread: float
    texture: float
    necrosis: float
    rim: float
    roughness: float


_PHASES = ("portal", "early", "arterial", "delayed")
LOOKS: dict[str, Look] = {
    "liver_lesion": Look(0.92, 0.65, (-74, -54, -64, -58), False, 11, 8, 0.35, 0.3, 0.16),
    "pancreatic_lesion": Look(0.5, 0.95, (-56, -58, -60, -46), False, 9, 7, 0.3, 0.1, 0.2),
    "kidney_lesion": Look(0.35, 0.95, (-85, -70, -70, -75), False, 18, 16, 0.55, 0.2, 0.12),
    "colon_lesion": Look(0.45, 1.2, (95, 80, 90, 85), True, 8, 8, 0.2, 0.0, 0.2),
    "esophagus_tumor": Look(0.4, 1.2, (85, 75, 80, 80), True, 8, 6, 0.1, 0.0, 0.15),
    "endometrioma_tumor": Look(0.1, 1.3, (28, 28, 28, 30), True, 8, 6, 0.0, 0.4, 0.08),
}


class Lesion(NamedTuple):
    """A lesion on a small grid of its own, before it has a place.

    Attributes:
        level: rises from 0 in the middle to 1 at the surface and beyond.
        voxels: how many voxels it has.
        radius_mm: of a sphere of its volume.
    """

    level: Volume
    voxels: int
    radius_mm: float


def sample_radii(
    rng: np.random.Generator, tumor: str, count: int, largest: float = np.inf
) -> Float[np.ndarray, "count"]:
    """Draws tumour radii (mm) from the table of real sizes.

    Between the table's quantiles the logarithm of the radius is linear in the normal score, and
    it goes on so to the 2nd and 98th percentile; what would lie beyond lies there.

    Args:
        rng: generator.
        tumor: name in `SIZES`.
        count: how many.
        largest: radii above this are drawn again: what cannot fit in the organ. Where hardly any
            of the table's radii fit, they lie between 0.6 and 1 of the largest that does.
    """
    scores = norm.ppf((0.1, 0.25, 0.5, 0.75, 0.9))
    logs = np.log(SIZES[tumor]["radius"])
    radii = np.full(count, np.nan)
    for _ in range(50):
        again = ~(radii <= largest)
        if not again.any():
            return radii
        z = np.clip(rng.standard_normal(again.sum()), *norm.ppf((0.02, 0.98)))
        value = np.interp(z, scores, logs)
        value += np.minimum(z - scores[0], 0) * (logs[1] - logs[0]) / (scores[1] - scores[0])
        value += np.maximum(z - scores[-1], 0) * (logs[-1] - logs[-2]) / (scores[-1] - scores[-2])
        radii[again] = np.exp(value)
    again = ~(radii <= largest)
    radii[again] = largest * rng.uniform(0.6, 1.0, again.sum())
    return radii


def grow(rng: np.random.Generator, tumor: str, radius_mm: float, spacing: tuple) -> Lesion:
    """Grows a tumour of a given volume.

    Args:
        rng: generator.
        tumor: name in `SIZES`; sets elongation and roughness.
        radius_mm: radius of a sphere of the same volume.
        spacing: voxel size, mm.
    """
    minor = float(np.clip(np.interp(norm.ppf(rng.uniform(0.03, 0.97)), norm.ppf((0.1, 0.5, 0.9)),
                                    SIZES[tumor]["axes"]), 0.25, 0.92))  # fmt: skip
    middle = minor ** rng.uniform(0.25, 0.65)
    # Lobes shorten some diameters by chance, hence the root: less is asked of the stretch.
    stretch = np.array([1.0, middle**0.8, minor**0.85])
    stretch /= np.prod(stretch) ** (1 / 3)
    frame, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    reach = radius_mm * stretch.max() * 1.5 + 1.5 * max(spacing)
    half = [int(np.ceil(reach / s)) for s in spacing]
    axes = [s * np.arange(-h, h + 1) for s, h in zip(spacing, half, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)
    own = grid @ (frame / stretch / radius_mm).astype(np.float32)
    distance = np.sqrt((own**2).sum(-1))
    direction = own / np.maximum(distance, np.float32(1e-6))[..., None]
    # Lobes: plane waves on the sphere of directions, long ones stronger.
    bumps = np.zeros_like(distance)
    for frequency in (2.5, 2.5, 4.0, 4.0, 6.0):
        wave = rng.standard_normal(3).astype(np.float32)
        wave *= frequency / np.linalg.norm(wave)
        bumps += np.cos(direction @ wave + np.float32(rng.uniform(0, 2 * np.pi))) / frequency
    rough = smooth_field(
        rng, max(0.35 * radius_mm, 1.5), [a[0] for a in axes], [a[-1] for a in axes]
    )
    level = distance * np.exp(-np.float32(1.8 * LOOKS[tumor].roughness) * bumps)
    level += LOOKS[tumor].roughness * evaluate(rough, axes) * np.minimum(distance, 1)
    voxels = max(1, round(4 / 3 * np.pi * radius_mm**3 / float(np.prod(spacing))))
    return Lesion(_normalised(level, voxels), voxels, radius_mm)


def _normalised(level: Volume, voxels: int) -> Volume:
    """Scales a level so that the wanted number of voxels lies at or below 1."""
    low = level.min()
    edge = np.partition(level, min(voxels, level.size) - 1, axis=None)[min(voxels, level.size) - 1]
    return (level - low) / max(float(edge - low), 1e-6)


def add_tumors(
    rng: np.random.Generator,
    tumor: str,
    phase: str,
    contrast: float,
    variation: float,
    scan: tuple[Volume, UInt8[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"]],
    grid: Grid,
    values: Mapping[str, float],
) -> list[float]:
    """Puts tumours of one kind into a painted patient, in place.

    A place is accepted where enough of the tumour lies in its host (`Look.fit`); the rest must be
    fat, and where it is another organ the tumour grows on the other sides instead, to the same
    volume. Thirty places are tried, then the radius shrinks by 15 %, and so on.

    Args:
        rng: the patient's generator.
        tumor: name in `SIZES`.
        phase: contrast phase.
        contrast: factor on the difference between tumour and host.
        variation: scales the differences between tumours.
        scan: image (HU), organ and overlay, see `virtual_anatomy.paint`.
        grid: voxel grid.
        values: mean HU of tissues.

    Returns:
        The radii of what was placed, mm.
    """
    image, organ, overlay = scan
    look = LOOKS[tumor]
    names = list(organ_labels(HOST[tumor]))
    if len(names) > 1:
        names = [names[rng.integers(len(names))]]
    host = LABELS[names[0]]
    part = _box(organ == host, grid.spacing, 20.0)
    if part is None:
        return []
    volume = float((organ[part] == host).sum()) * float(np.prod(grid.spacing))
    largest = look.largest * (volume * 3 / 4 / np.pi) ** (1 / 3)
    count = 1 + int(rng.choice(len(COUNTS[tumor]), p=COUNTS[tumor]))
    # One patient's tumours resemble each other.
    common = rng.normal(0, look.spread * variation)
    radii = []
    for radius in sorted(sample_radii(rng, tumor, count, largest), reverse=True):
        style = _style(rng, look, variation)
        shift = common + rng.normal(0, 0.4 * look.spread * variation)
        for _ in range(8):
            lesion = grow(rng, tumor, float(radius), grid.spacing)
            place = _find_place(rng, lesion, look, host, scan, part)
            if place is not None:
                window, level = place
                delta = look.contrast[_PHASES.index(phase)] + shift
                _fill(
                    rng, tumor, lesion, level, window, scan, grid, values, contrast * delta, style
                )
                overlay[window][level <= 1] = TUMORS[tumor]
                radii.append(float(radius))
                break
            radius *= 0.85
    return radii


def _find_place(rng, lesion, look, host, scan, part):
    """Returns the window and the level of a tumour that fits, or None."""
    image, organ, overlay = scan
    inside = organ[part] == host
    free = inside & (overlay[part] < min(TUMORS.values()))
    candidates = np.argwhere(free)
    half = np.array(lesion.level.shape) // 2
    for _ in range(30):
        center = candidates[rng.integers(len(candidates))]
        corner = center + [s.start for s in part] - half
        low = np.maximum(-corner, 0)
        high = np.minimum(np.array(image.shape) - corner, lesion.level.shape)
        window = tuple(slice(c + a, c + b) for c, a, b in zip(corner, low, high, strict=True))
        level = lesion.level[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        wanted = level <= 1
        host_here = (organ[window] == host) & (overlay[window] < min(TUMORS.values()))
        if (wanted & host_here).sum() < look.fit * lesion.voxels:
            continue
        # Fat of the abdominal cavity may be pushed aside; organs, muscles and lungs may not.
        soft = (organ[window] == 0) & (np.abs(image[window] + 100) < 50)
        allowed = host_here | soft
        if (wanted & allowed).sum() < 0.75 * lesion.voxels or allowed.sum() < lesion.voxels:
            continue
        grown = np.where(allowed, level, np.inf)
        edge = np.partition(grown, lesion.voxels - 1, axis=None)[lesion.voxels - 1]
        if not np.isfinite(edge) or edge > 1.6:
            continue
        # One piece only: what lies beyond another organ is left out.
        grown = grown / max(float(edge), 1e-6)
        pieces, _ = ndimage.label(grown <= 1, np.ones((3, 3, 3)))
        main = pieces == np.bincount(pieces[pieces > 0]).argmax()
        return window, np.where(main, grown, np.where(grown <= 1, np.inf, grown))
    return None


def _style(rng, look: Look, variation: float) -> dict[str, float]:
    return {
        "texture": look.texture * float(np.exp(rng.normal(0, 0.35 * variation))),
        "necrosis": float(rng.uniform(12, 32)) * float(rng.random() < look.necrosis),
        "core": float(rng.uniform(0.45, 0.75)),
        "rim": float(rng.uniform(15, 40)) * float(rng.random() < look.rim),
        "edge": float(rng.uniform(0.02, 0.22)) * variation,
        "grain": float(rng.uniform(2.5, 6.0)),
    }


def _fill(rng, tumor, lesion, level, window, scan, grid, values, delta, style) -> None:
    image = scan[0]
    axes = [a[w] for a, w in zip(grid.axes(), window, strict=True)]
    lower, upper = [a[0] for a in axes], [a[-1] for a in axes]
    texture = evaluate(smooth_field(rng, style["grain"], lower, upper), axes)
    lumps = evaluate(smooth_field(rng, max(0.3 * lesion.radius_mm, 2.0), lower, upper), axes)
    base = 0.0 if LOOKS[tumor].absolute else values[_TISSUE[tumor]]
    hu = base + delta + style["texture"] * (0.5 * texture + 0.7 * lumps)
    if lesion.radius_mm > 9:
        core = np.clip((style["core"] - level + 0.15 * lumps) / 0.12, 0, 1)
        hu = hu - style["necrosis"] * core
    # Rims take up the medium; a rim thinner than the scan's voxels is only a paler edge.
    hu = hu + style["rim"] * np.clip(1 - np.abs(level - 0.9) / 0.12, 0, 1)
    inside = level <= 1
    # An infiltrating border: the outer part mixes with what was there.
    mix = np.clip((1 - level) / max(style["edge"], 1e-3) + 0.35, 0, 1)
    old = np.clip(image[window], -20, 300)
    image[window] = np.where(inside, mix * hu + (1 - mix) * old, image[window])


_TISSUE = {
    "liver_lesion": "liver",
    "pancreatic_lesion": "pancreas",
    "kidney_lesion": "cortex",
}


def add_distractors(
    rng: np.random.Generator,
    rate: float,
    scan: tuple[Volume, UInt8[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"]],
    grid: Grid,
    body_scale: float,
) -> dict[str, int]:
    """Puts in what a reader must tell from a tumour, in place.

    Simple cysts (round, sharp, water) in liver, kidneys and seldom pancreas; focal fat in the
    liver; calcifications and stones.

    Args:
        rng: the patient's generator.
        rate: factor on how many there are; 1 gives about 2.5 a patient.
        scan: image (HU), organ and overlay.
        grid: voxel grid.
        body_scale: size of the body: cysts scale with it.

    Returns:
        How many of each kind.
    """
    image, organ, overlay = scan
    counts = {"cyst": 0, "focal_fat": 0, "calcification": 0}
    for name, mean in (
        ("liver", 0.6),
        ("kidney_left", 0.4),
        ("kidney_right", 0.4),
        ("pancreas", 0.08),
    ):
        part = _box(organ == LABELS[name], grid.spacing, 2.0)
        events = {
            "cyst": rng.poisson(mean * rate),
            "focal_fat": rng.poisson(0.3 * rate) if name == "liver" else 0,
            "calcification": rng.poisson(0.25 * rate),
        }
        if part is None:
            continue
        places = np.argwhere(organ[part] == LABELS[name]) + [s.start for s in part]
        for kind, number in events.items():
            for _ in range(number):
                center = places[rng.integers(len(places))]
                _add_distractor(rng, kind, center, LABELS[name], scan, grid, body_scale)
                counts[kind] += 1
    return counts


def _add_distractor(rng, kind: str, center, host: int, scan, grid: Grid, body_scale: float) -> None:
    image, organ, overlay = scan
    radius = {
        "cyst": float(np.clip(np.exp(rng.normal(1.9, 0.45)), 3, 18)) * body_scale**0.5,
        "focal_fat": float(rng.uniform(7, 16)) * body_scale,
        "calcification": float(rng.uniform(1.0, 2.6)),
    }[kind]
    half = [int(np.ceil(1.6 * radius / s)) + 1 for s in grid.spacing]
    window = tuple(
        slice(max(c - h, 0), min(c + h + 1, n))
        for c, h, n in zip(center, half, image.shape, strict=True)
    )
    axes = [
        (np.arange(w.start, w.stop) - c) * s
        for w, c, s in zip(window, center, grid.spacing, strict=True)
    ]
    x, y, z = np.meshgrid(*(a.astype(np.float32) for a in axes), indexing="ij")
    distance = np.sqrt(x**2 + y**2 + z**2) / np.float32(radius)
    free = overlay[window] < min(TUMORS.values())
    here = (organ[window] == host) & free
    if kind == "cyst":
        # A cyst may bulge into the fat; its wall is too thin to be seen.
        soft = free & (organ[window] == 0) & (np.abs(image[window] + 100) < 50)
        mask = (distance <= 1) & (here | soft)
        image[window] = np.where(mask, rng.normal(7, 4), image[window])
        overlay[window][mask] = 0
    elif kind == "focal_fat":
        # Geographic, without a border, vessels run through it unchanged.
        field = evaluate(
            smooth_field(rng, 0.6 * radius, [a[0] for a in axes], [a[-1] for a in axes]), axes
        )
        weight = np.clip((1.1 + 0.4 * field - distance) / 0.5, 0, 1) * (
            here & (overlay[window] == 0)
        )
        image[window] -= (rng.uniform(14, 30) * weight).astype(np.float32)
    else:
        # At least the voxel in the middle, thinned where the stone is smaller than it.
        share = min(1.0, radius / max(grid.spacing))
        mask = (distance <= 1) & here
        image[window] = np.where(mask, 90 + share * rng.uniform(200, 700), image[window])


def _box(mask: Bool[np.ndarray, "x y z"], spacing, margin_mm: float) -> Any:
    """Returns the slices around a mask with a margin, or None for an empty one."""
    slices = []
    for axis, step in enumerate(spacing):
        others = tuple(i for i in range(3) if i != axis)
        present = np.flatnonzero(mask.any(axis=others))
        if not len(present):
            return None
        pad = int(np.ceil(margin_mm / step))
        slices.append(slice(max(present[0] - pad, 0), min(present[-1] + 1 + pad, mask.shape[axis])))
    return tuple(slices)
