"""Surface elements of a mask on its dual grid: the codes of their voxels and their areas.

The points of the dual grid lie where eight voxels meet. The eight that are inside form a code;
every code but "none" and "all" is a surface element, with the area that marching cubes would give
it. The method is that of google-deepmind/surface-distance; the areas are closed forms of the
spacing instead of a table of 256 lists of triangles.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8


def neighbour_codes(mask: Bool[np.ndarray, "x y z"]) -> UInt8[np.ndarray, "x+1 y+1 z+1"]:
    """Returns the code of the eight voxels around each point of the dual grid.

    Outside of the mask there is nothing, so an object at the border has a surface there. The voxel
    at offset (i, j, k) of the eight has bit 7 - (4i + 2j + k).
    """
    voxels = np.pad(mask, 1).astype(np.uint8)
    pairs = (voxels[:, :, :-1] << 1) | voxels[:, :, 1:]
    squares = (pairs[:, :-1] << 2) | pairs[:, 1:]
    return (squares[:-1] << 4) | squares[1:]


def is_surface(codes: UInt8[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    """Says which points are surface elements: those with any code but 0 and 255."""
    return (codes + np.uint8(1)) > 1  # one added, both are below 2 in a byte


def element_areas(spacing: Sequence[float]) -> Float[np.ndarray, "256"]:
    """Returns the area (mm^2) of each neighbour code's surface element at a spacing (mm).

    Marching cubes puts the surface halfway between inside and outside. Of a code's inside corners
    those that touch along edges form a group with a surface of its own, and at most four corners
    need be looked at: the rest has the same surface seen from behind. With a, b, c the areas of the
    cell's faces across x, y, z, all groups have closed forms:

    - one corner, a triangle: |(a, b, c)| / 8
    - two corners along x, a rectangle: |(0, b, c)| / 2
    - three corners in a plane across z, half a plane and a trapezoid: c / 2 + 3 |(a, b, c)| / 8
    - four in a plane across x: a
    - a corner and its three neighbours, a hexagon: 3 |(a, b, c)| / 4
    - a chain of four with its middle edge along x, two triangles of half a rectangle each and two
      in the middle: |(a, b, c)| / 2 + |(a, b, 0)| / 4 + |(a, 0, c)| / 4
    """
    x, y, z = check_spacing(spacing)
    faces = np.array([y * z, x * z, x * y])
    return np.sqrt(_element_normals() ** 2 @ faces**2).sum(axis=1)


def check_spacing(spacing: Sequence[float]) -> Float[np.ndarray, "3"]:
    """Returns a voxel's size as an array.

    Raises:
        ValueError: it is not three positive numbers.
    """
    values = np.asarray(spacing, dtype=np.float64)
    if values.shape != (3,) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"spacing is {spacing}. Expected three positive numbers (x, y, z) in mm")
    return values


@functools.cache
def _element_normals() -> Float[np.ndarray, "256 6 3"]:
    """Returns the absolute normals of each code's polygons, their length the area at 1 mm."""
    corners = np.array([(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    normals = np.zeros((256, 6, 3))
    for code in range(1, 255):
        inside = np.array([code >> (7 - index) & 1 for index in range(8)], bool)
        if inside.sum() > 4:
            inside = ~inside
        polygons = [n for group in _groups(corners[inside]) for n in _group_normals(group)]
        normals[code, : len(polygons)] = polygons
    return normals


def _groups(corners: Int[np.ndarray, "n 3"]) -> list[Int[np.ndarray, "m 3"]]:
    """Splits a cube's corners into those that hang together along edges."""
    touching = np.abs(corners[:, None] - corners[None]).sum(axis=-1) <= 1
    reachable = np.linalg.matrix_power(touching.astype(int), 4) > 0
    return [corners[row] for row in np.unique(reachable, axis=0)]


def _group_normals(corners: Int[np.ndarray, "n 3"]) -> list[Float[np.ndarray, "3"]]:
    """Returns the absolute normals of one group's polygons; see `element_areas`."""
    steps = np.abs(corners[:, None] - corners[None])
    is_edge = steps.sum(axis=-1) == 1
    across = (~(steps * is_edge[..., None]).any(axis=(0, 1))).astype(float)  # axes without an edge
    degree = is_edge.sum(axis=1)
    diagonal = np.ones(3)
    match len(corners), is_edge.sum() // 2, degree.max():
        case 1, _, _:
            return [diagonal / 8]
        case 2, _, _:
            return [across / 2]
        case 3, _, _:
            return [across / 2, diagonal * 3 / 8]
        case 4, 4, _:
            return [across]
        case 4, 3, 3:
            return [diagonal * 3 / 4]
        case _:
            first, second = np.flatnonzero(degree == 2)
            middle = steps[first, second]
            ends = [middle + axis for axis in np.eye(3) if not axis @ middle]
            return [diagonal / 2, *(normal / 4 for normal in ends)]
