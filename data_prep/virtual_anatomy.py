"""One patient of the virtual abdomen: the body around the organs, painted into a voxel grid.

A patient differs from the standard adult by scale, by a smooth warp of space, by shifts, turns
and sizes of each organ, and by a wobble of each surface. A scan is filled slab by slab, so that
its memory does not grow with the number of slices beyond the arrays that are handed back.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from data_prep.virtual_organs import organs
from data_prep.virtual_scanner import Grid
from data_prep.virtual_shapes import Field, evaluate, smooth_field
from data_prep.virtual_structures import Canvas, Draw, Slices, Structure
from tumorjax.anatomy import ORGANS

Volume = Float[np.ndarray, "x y z"]

_SLAB_VOXELS = 1_500_000
_LOWER, _UPPER = (-330.0, -330.0, -480.0), (330.0, 330.0, 330.0)
_MARGIN_MM = 9.0


class Anatomy(NamedTuple):
    """One patient.

    Attributes:
        structures: organs in the order of painting.
        scale: size against the standard adult, per axis.
        warp: displacement field per axis; `warp_mm` is its standard deviation.
        fields: smooth fields for surfaces and textures.
        fat_mm: thickness of the fat under the skin.
        lordosis: how far the lumbar spine bends forward, mm.
        domes: height of the right and left dome of the diaphragm, mm.
        rib_phase: height of one rib, mm.
    """

    structures: list[Structure]
    scale: Float[np.ndarray, "3"]
    warp: list[Field]
    warp_mm: float
    fields: dict[str, Field]
    fat_mm: float
    lordosis: float
    domes: tuple[float, float]
    rib_phase: float


def draw_anatomy(
    rng: np.random.Generator, body_scale: float, variation: float, female: bool
) -> Anatomy:
    """Draws one patient.

    Args:
        rng: the patient's generator.
        body_scale: size of the body, 1 for an adult.
        variation: scales the differences between patients; 1 is lifelike.
        female: whether there is a uterus or a prostate.
    """
    draw = Draw(rng, variation)
    scale = body_scale * np.exp(rng.normal(0, 0.03 * variation))
    scale = scale * np.exp(rng.normal(0, 0.02 * variation, 3))
    lordosis = 6 + rng.normal(0, 2 * variation)
    steps = {"coarse": 26.0, "medium": 12.0, "fine": 5.0}
    return Anatomy(
        structures=organs(draw, lordosis, female),
        scale=scale,
        warp=[smooth_field(rng, 55.0, _LOWER, _UPPER) for _ in range(3)],
        warp_mm=3.0 * variation,
        fields={name: smooth_field(rng, step, _LOWER, _UPPER) for name, step in steps.items()},
        fat_mm=float(np.clip(rng.gamma(4.0, 3.5), 5, 32)),
        lordosis=lordosis,
        domes=(134 + rng.normal(0, 5 * variation), 121 + rng.normal(0, 5 * variation)),
        rib_phase=float(rng.uniform(0, 27)),
    )


def paint(
    anatomy: Anatomy, grid: Grid, values: Mapping[str, float]
) -> tuple[Volume, UInt8[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"]]:
    """Paints a patient without lesions.

    Args:
        anatomy: the patient.
        grid: voxel grid.
        values: mean HU of each tissue, see `virtual_scanner.tissue_values`.

    Returns:
        image: HU, before blur and noise, float32.
        organ: anatomy id of the organ at each voxel, 0 for none.
        overlay: id of what lies inside an organ (hepatic vessels), 0 for none.
    """
    image = np.empty(grid.shape, np.float32, order="F")
    organ = np.zeros(grid.shape, np.uint8, order="F")
    overlay = np.zeros(grid.shape, np.uint8, order="F")
    x, y, z = (a / s for a, s in zip(grid.axes(), anatomy.scale, strict=True))
    depth = max(1, _SLAB_VOXELS // (grid.shape[0] * grid.shape[1]))
    for start in range(0, grid.shape[2], depth):
        part = np.s_[:, :, start : start + depth]
        canvas = _canvas(
            anatomy, [x, y, z[start : start + depth]], image[part], organ[part], overlay[part]
        )
        _paint_body(canvas, anatomy, values)
        for structure in anatomy.structures:
            _paint_structure(canvas, structure, values)
        _paint_spine(canvas, anatomy, values)
    return image, organ, overlay


def _canvas(anatomy, axes, image, organ, overlay) -> Canvas:
    points = []
    for i, (axis, field) in enumerate(zip(axes, anatomy.warp, strict=True)):
        shape = [1, 1, 1]
        shape[i] = -1
        # Limited, so that a structure's box with a margin holds all of it.
        shift = np.clip(
            evaluate(field, axes) * np.float32(anatomy.warp_mm), -_MARGIN_MM, _MARGIN_MM
        )
        points.append(shift + axis.astype(np.float32).reshape(shape))
    px, py, pz = points
    # The muscles' outer face: a superellipse, wider than deep, a little flatter at the back.
    ax, ay, center = np.float32(148), np.float32(100), np.float32(33)
    dx, dy = np.abs(px) / ax, np.abs(py - center) / ay
    q = np.maximum((dx**2.4 + dy**2.4) ** np.float32(1 / 2.4), np.float32(1e-3))
    wall = np.sqrt(px**2 + (py - center) ** 2) * (1 - 1 / q)
    dome = np.full_like(px, -1e3)
    for side, height in zip((1, -1), anatomy.domes, strict=True):
        r2 = ((px - side * 74) / 80) ** 2 + ((py - 34) / 98) ** 2
        np.maximum(dome, height - 62 * r2 * np.sqrt(np.minimum(r2, 2.5)), out=dome)
    dome = pz - np.maximum(dome, np.where(np.abs(px) < 60, np.float32(98), -1e3))
    fields = {name: evaluate(field, axes) for name, field in anatomy.fields.items()}
    return Canvas((px, py, pz), axes, wall, dome, fields, organ, overlay, image)


def _paint_body(canvas: Canvas, anatomy: Anatomy, values: Mapping[str, float]) -> None:
    """Skin, fat, muscles, ribs, lungs, and the fat of the abdominal cavity."""
    px, py, pz = canvas.points
    wall, fine, medium = canvas.wall, canvas.fields["fine"], canvas.fields["medium"]
    # Fat lies thickest in front and at the sides, thin over the spine.
    front = np.clip((py + 40) / 120, 0, 1)
    fat = anatomy.fat_mm * (0.45 + 0.75 * front)
    # The furrow over the spinous processes.
    furrow = 9 * np.exp(-((px / 16) ** 2)) * (py < 0)
    skin = wall - fat + furrow
    image = canvas.image
    image[...] = -1000
    hu_fat = values["fat"] + 6 * fine + 4 * medium
    np.copyto(image, hu_fat, where=skin < 0)
    np.copyto(image, np.float32(10), where=(skin < 0) & (skin > -2.2))
    muscle = (wall < 0) & (skin < -3)
    # Muscle layers, with a thin film of fat between them.
    film = np.clip(1 - np.abs(wall + 6.5 + 1.5 * medium), 0, 1)
    np.copyto(image, values["muscle"] + 7 * fine - 70 * film, where=muscle)
    cavity = wall < -13.5 - 3 * np.exp(-((px / 60) ** 2)) * (py > 60)
    strands = 55 * np.clip(fine - 1.3, 0, 1) + 30 * np.clip(medium - 1.2, 0, 1)
    np.copyto(image, hu_fat + strands, where=cavity)
    # Lungs: above the diaphragm, beside the mediastinum.
    lung = cavity & (canvas.dome > 3) & (np.abs(px + 6) > 26 + 4 * medium) & (py > -62)
    texture = -840 + 35 * fine + 260 * np.clip(fine + 0.4 * medium - 1.5, 0, 1.2)
    np.copyto(image, texture, where=lung)
    canvas.organ[lung & (px < 0)] = ORGANS["lung_left"]
    canvas.organ[lung & (px > 0)] = ORGANS["lung_right"]
    diaphragm = cavity & (np.abs(canvas.dome - 1.5) < 2.0) & (wall > -60)
    np.copyto(image, np.float32(values["muscle"]), where=diaphragm)
    # Ribs: bands in the wall that fall forward; none below the costal margin.
    turn = np.arctan2(py - 33, np.abs(px))
    height = pz + 110 * (turn + np.pi / 2) / np.pi - anatomy.rib_phase
    band = np.abs(np.mod(height, 27) - 13.5)
    margin = -38 + 95 * np.clip((py - 40) / 70, 0, 1)
    shell = np.hypot(wall + 9.5, band * 0.75)
    rib = (shell < 4.6) & (pz > margin) & (np.abs(px) > 24)
    np.copyto(image, values["marrow"] + 60 + 25 * fine, where=rib)
    np.copyto(image, np.float32(620), where=rib & (shell > 3.0))


def _paint_structure(canvas: Canvas, structure: Structure, values: Mapping[str, float]) -> None:
    reach = structure.cuff + 2.5 * structure.wobble + _MARGIN_MM
    part = _part(canvas.axes, structure.shape.lower - reach, structure.shape.upper + reach)
    if part is None:
        return
    distance = structure.shape.distance(canvas, part)
    if structure.wobble:
        medium, coarse = canvas.fields["medium"][part], canvas.fields["coarse"][part]
        rough = np.clip(0.55 * medium + 0.75 * coarse, -2.5, 2.5)
        distance = distance + np.float32(structure.wobble) * rough
    organ, image = canvas.organ[part], canvas.image[part]
    inside = distance < 0
    cuff = distance < structure.cuff
    if structure.where in ("cavity", "fat"):
        allowed = (canvas.wall[part] < -15.5) & (canvas.dome[part] < -2)
        if structure.where == "fat":
            allowed &= (organ == 0) & (image < -20)
        inside &= allowed
        cuff &= allowed
    elif structure.where != "any":
        inside &= organ == ORGANS[structure.where]
        canvas.overlay[part][inside] = ORGANS[structure.label]
    if not inside.any():
        return
    if structure.cuff:
        ring = cuff & ~inside
        ring &= (organ != 0) | (image > values["fat"] + 60)
        ring &= canvas.wall[part] < -14
        # The heart and the lungs have no fat cut into them.
        ring &= canvas.dome[part] < 0
        np.copyto(image, values["fat"] + 5 * canvas.fields["fine"][part], where=ring)
        organ[ring] = 0
        canvas.overlay[part][ring] = 0
    hu = structure.fill(canvas, part, distance, values)
    np.copyto(image, np.asarray(hu, np.float32), where=inside)
    if structure.where in ("any", "cavity", "fat"):
        organ[inside] = ORGANS[structure.label] if structure.label else 0
        canvas.overlay[part][inside] = 0


def _part(axes, lower, upper) -> Slices | None:
    """Returns the slices of a box within a slab, or None where they do not meet."""
    slices = []
    for axis, a, b in zip(axes, lower, upper, strict=True):
        start, stop = int(np.searchsorted(axis, a)), int(np.searchsorted(axis, b))
        if start >= stop:
            return None
        slices.append(slice(start, stop))
    return (slices[0], slices[1], slices[2])


def _paint_spine(canvas: Canvas, anatomy: Anatomy, values: Mapping[str, float]) -> None:
    """Vertebrae with discs, canal, arches and processes."""
    part = _part(canvas.axes, (-62.0, -90.0, -1e3), (62.0, 45.0, 1e3))
    if part is None:
        return
    x, y, z = (p[part] for p in canvas.points)
    fine, image, organ = canvas.fields["fine"][part], canvas.image[part], canvas.organ[part]
    y = y - anatomy.lordosis * np.cos(z / 70)
    # One vertebra and its disc are 34 mm high; bodies have a waist.
    place = np.mod(z + 13, 34) - 13
    waist = 1 - 0.12 * np.clip(1 - (place / 13) ** 2, 0, 1)
    body = (np.sqrt((x / (23 * waist)) ** 2 + (y / (17 * waist)) ** 2) - 1) * 17
    disc = np.abs(place) > 13
    canal = np.hypot(x / 1.25, y + 25) - 8
    arch = (np.hypot(x / 1.35, y + 25) < 15) & (np.abs(place) < 11)
    spinous = (np.abs(x) < 3.6) & (y < -34) & (y > -66) & (np.abs(place + 4) < 9)
    transverse = (np.abs(x) < 46) & (np.abs(y + 20) < 4.5) & (np.abs(place) < 5)
    bone = (arch | spinous | transverse) & (body > 0)
    core = (body < 0) & ~disc
    np.copyto(image, np.float32(420) + 60 * fine, where=bone)
    np.copyto(image, values["marrow"] + 25 * fine, where=core)
    np.copyto(image, np.float32(480), where=core & ((body > -2.5) | (np.abs(place) > 11.5)))
    np.copyto(image, np.float32(85) + 6 * fine, where=(body < -0.5) & disc)
    np.copyto(image, np.float32(28) + 4 * fine, where=(canal < 0) & (body > 0))
    solid = bone | (body < 0) | (canal < 0)
    organ[solid] = 0
    canvas.overlay[part][solid] = 0
