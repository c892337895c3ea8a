"""Building blocks of the virtual abdomen: shapes with a filling, on a canvas.

Coordinates are those of a standard adult, in mm: x to the patient's right, y forward, z up, origin
in the first lumbar vertebra.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from data_prep.virtual_shapes import (
    ellipsoid,
    ellipsoid_bounds,
    rotation,
    smooth_minimum,
    smooth_path,
    tube,
)

Volume = Float[np.ndarray, "x y z"]
Slices = tuple[slice, slice, slice]


class Canvas(NamedTuple):
    """One slab of a scan while it is painted.

    Attributes:
        points: each voxel's place in the standard adult, mm.
        axes: the slab's coordinates before the warp, for smooth fields, mm.
        wall: distance to the outer face of the abdominal muscles, mm, negative inside.
        dome: height above the diaphragm, mm, negative below.
        fields: smooth random fields "coarse", "medium" and "fine".
        organ: anatomy ids of organs, 0 elsewhere.
        overlay: anatomy ids of what lies within an organ: hepatic vessels, lesions.
        image: HU.
    """

    points: tuple[Volume, Volume, Volume]
    axes: list[Float[np.ndarray, "_"]]
    wall: Volume
    dome: Volume
    fields: dict[str, Volume]
    organ: UInt8[np.ndarray, "x y z"]
    overlay: UInt8[np.ndarray, "x y z"]
    image: Volume


Fill = Callable[[Canvas, Slices, Volume, Mapping[str, float]], Any]


class Shape(NamedTuple):
    """A distance (mm, negative inside) and the box that holds its inside."""

    lower: Float[np.ndarray, "3"]
    upper: Float[np.ndarray, "3"]
    distance: Callable[[Canvas, Slices], Volume]


class Structure(NamedTuple):
    """One thing to paint.

    Attributes:
        label: name in `tumorjax.anatomy.ORGANS`, or "" for what has no label.
        shape: where it is.
        fill: its HU, given the canvas, the part, the distance and the tissues' mean HU.
        wobble: roughness of the surface, mm.
        cuff: fat around it, mm.
        where: "any"; "cavity": only in the abdominal cavity; "fat": there, and only where no
            organ is yet; or an organ's name: only inside it, as an overlay.
    """

    label: str
    shape: Shape
    fill: Fill
    wobble: float = 0.0
    cuff: float = 0.0
    where: str = "any"


class Draw(NamedTuple):
    """A patient's random deviations; all are scaled by the setting `variation`."""

    rng: np.random.Generator
    variation: float

    def near(self, center, spread: float = 4.0) -> Float[np.ndarray, "3"]:
        """Returns a place near `center`; `spread` in mm."""
        return np.asarray(center, float) + self.rng.normal(0, 0.7 * spread * self.variation, 3)

    def size(self, radii, spread: float = 0.06) -> Float[np.ndarray, "_"]:
        """Returns radii that differ by about `spread`, together and each for itself."""
        own = self.rng.normal(0, 0.5 * spread * self.variation, len(radii))
        return np.asarray(radii, float) * np.exp(self.rng.normal(0, spread * self.variation) + own)

    def turn(self, x=0.0, y=0.0, z=0.0, spread=6.0) -> Float[np.ndarray, "3 3"]:
        """Returns a rotation near three angles in degrees."""
        return rotation(*(np.array([x, y, z]) + self.rng.normal(0, spread * self.variation, 3)))


def flat(tissue: str, texture: float = 0.0, extra: float = 0.0, coarse: float = 0.0) -> Fill:
    """Returns a filling: a tissue's mean with fine and coarse texture, HU."""

    def fill(canvas, part, distance, values):
        hu = values[tissue] + extra + texture * canvas.fields["fine"][part]
        return hu + coarse * canvas.fields["medium"][part] if coarse else hu

    return fill


def hollow(wall_mm: float, content: str, level: float) -> Fill:
    """Returns a filling for hollow organs: a wall, gas above, and fluid, stool or contrast below.

    Args:
        wall_mm: thickness of the wall.
        content: "fluid", "contrast" (taken by mouth) or "stool".
        level: y above which there is gas (patients lie on their backs), mm.
    """

    def fill(canvas, part, distance, values):
        y = canvas.points[1][part]
        fine, medium = canvas.fields["fine"][part], canvas.fields["medium"][part]
        if content == "stool":
            inside = 35 + 22 * fine - 500 * np.clip(fine + 0.6 * medium - 0.9, 0, 1)
        elif content == "contrast":
            inside = 180 + 40 * medium + 12 * fine
        else:
            inside = 14 + 10 * medium + 5 * fine
        inside = np.where(y > level + 3 * medium, -930 + 8 * fine, inside)
        return np.where(distance > -wall_mm, values["wall"] + 6 * fine, inside)

    return fill


def ball(center, radii, turn: Float[np.ndarray, "3 3"] | None = None) -> Shape:
    """Returns an ellipsoid."""
    lower, upper = ellipsoid_bounds(center, radii, turn)
    return Shape(
        lower,
        upper,
        lambda canvas, part: ellipsoid([p[part] for p in canvas.points], center, radii, turn),
    )


def pipe(path, radii, pieces: int = 4) -> Shape:
    """Returns a tube along a smooth curve."""
    curve, width = smooth_path(np.asarray(path, float), np.asarray(radii, float), pieces)
    reach = width.max()
    return Shape(
        curve.min(0) - reach,
        curve.max(0) + reach,
        lambda canvas, part: tube([p[part] for p in canvas.points], curve, width),
    )


def cut(shape: Shape, other: Shape, gap: float = 0.0) -> Shape:
    """Returns a shape without another one (grown by `gap` mm)."""
    return Shape(
        shape.lower,
        shape.upper,
        lambda c, part: np.maximum(shape.distance(c, part), gap - other.distance(c, part)),
    )


def together(shapes: list[Shape], width: float) -> Shape:
    """Returns the union of shapes, blended over `width` mm."""

    def distance(canvas, part):
        result = shapes[0].distance(canvas, part)
        for shape in shapes[1:]:
            result = smooth_minimum(result, shape.distance(canvas, part), width)
        return result

    lower = np.min([s.lower for s in shapes], axis=0)
    upper = np.max([s.upper for s in shapes], axis=0)
    return Shape(lower, upper, distance)
