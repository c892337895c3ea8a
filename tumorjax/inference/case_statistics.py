"""What a label map holds, in numbers: volumes, lesions, diameters, and where they lie."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64, UInt8
from scipy import ndimage

from tumorjax.geometry import spacing_of, to_canonical
from tumorjax.metrics.components import label_components
from tumorjax.metrics.detection import longest_inplane, sphere_radius


class Extent(NamedTuple):
    """How many voxels of each value lie in each slice along each axis.

    Attributes:
        counts: one array [256, slices] an axis.
    """

    counts: tuple[Int64[np.ndarray, "values slices"], ...]

    def voxels(self, value: int) -> int:
        """Returns how many voxels have a value."""
        return int(self.counts[0][value].sum())

    def centre(self, value: int) -> Float[np.ndarray, "3"]:
        """Returns the mean index of a value's voxels along each axis."""
        return np.array([np.average(np.arange(n.shape[1]), weights=n[value]) for n in self.counts])

    def box(self, value: int) -> tuple[slice, ...]:
        """Returns the box about a value's voxels."""
        used = [np.flatnonzero(count[value]) for count in self.counts]
        return tuple(slice(int(one[0]), int(one[-1]) + 1) for one in used)


def extent_of(labels: UInt8[np.ndarray, "i j k"]) -> Extent:
    """Returns the voxel counts of a label map, one slice after the other."""
    turned = labels.transpose(order := np.argsort(np.abs(labels.strides))[::-1])
    depth, rows, columns = turned.shape
    by_slice = np.zeros((256, depth), np.int64)
    by_row = np.zeros((256, rows), np.int64)
    by_column = np.zeros((256, columns), np.int64)
    row_index = np.arange(rows)[:, None]
    column_index = np.arange(columns)[None]
    for index, part in enumerate(turned):
        found = np.bincount(part.ravel(), minlength=256)
        by_slice[:, index] = found
        if found[0] == part.size:
            by_row[0] += columns
            by_column[0] += rows
            continue
        wide = part.astype(np.int64)
        by_row += np.bincount((wide * rows + row_index).ravel(), minlength=256 * rows).reshape(
            256, rows
        )
        by_column += np.bincount(
            (wide * columns + column_index).ravel(), minlength=256 * columns
        ).reshape(256, columns)
    counts: list[Any] = [None] * 3
    for axis, count in zip(order, (by_slice, by_row, by_column), strict=True):
        counts[int(axis)] = count
    return Extent(tuple(counts))


def describe(
    labels: UInt8[np.ndarray, "i j k"],
    affine: Float[np.ndarray, "4 4"],
    structures: Sequence[tuple[str, int]],
    tumors: Sequence[str],
    world: str = "RAS",
) -> dict[str, Any]:
    """Returns the statistics of a label map, as JSON.

    Lesions are 26-connected components of a tumour's label, the largest first. Their diameters are
    that of the sphere of the same volume, and the longest in a slice along the axis nearest to the
    body's (`metrics.detection.longest_inplane`).

    Args:
        labels: of the scan, axes as in its file.
        affine: from voxel index to mm in RAS+.
        structures: names and values to describe.
        tumors: those whose lesions are counted.
        world: coordinates that centres are given in: "RAS" (NIfTI's) or "LPS" (DICOM's).

    Returns:
        {"world", "voxel_mm3", "structures": {name: {"voxels", "volume_mm3", "volume_ml",
        "centre_mm", "at_border"} and of tumours "lesion_count", "largest_diameter_mm" and
        "lesions"}}. What a structure without voxels has not is null. "at_border" says that it
        reaches the scan's border, so that its volume may not be all of it.
    """
    sign = np.array([1.0, 1.0, 1.0] if world == "RAS" else [-1.0, -1.0, 1.0])
    voxel = float(abs(np.linalg.det(affine[:3, :3])))
    extent = extent_of(labels)

    def measured(voxels: int, centre: Any, box: Sequence[slice]) -> dict[str, Any]:
        if not voxels:
            return {"voxels": 0, "volume_mm3": 0.0, "volume_ml": 0.0} | dict.fromkeys(
                ("centre_mm", "at_border")
            )
        at_border = any(
            side.start == 0 or side.stop == length
            for side, length in zip(box, labels.shape, strict=True)
        )
        return {
            "voxels": voxels,
            "volume_mm3": round(voxels * voxel, 3),
            "volume_ml": round(voxels * voxel / 1000, 6),
            "centre_mm": [
                round(float(value), 3) for value in sign * (affine[:3, :3] @ centre + affine[:3, 3])
            ],
            "at_border": at_border,
        }

    result: dict[str, Any] = {}
    for name, value in structures:
        voxels = extent.voxels(value)
        box = extent.box(value) if voxels else ()
        result[name] = measured(voxels, extent.centre(value) if voxels else None, box)
        if name not in tumors:
            continue
        lesions = []
        if voxels:
            for mask, place in _lesions(labels, value, box):
                inside = np.argwhere(mask)
                centre = inside.mean(axis=0) + [side.start for side in place]
                one = measured(len(inside), centre, place)
                lesions.append(one | _diameters(mask, affine, len(inside) * voxel))
        lesions.sort(key=lambda lesion: -lesion["voxels"])
        largest = [lesion["longest_inplane_mm"] for lesion in lesions]
        result[name] |= {
            "lesion_count": len(lesions),
            "largest_diameter_mm": max(largest) if largest else None,
            "lesions": lesions,
        }
    return {"world": f"{world}, mm", "voxel_mm3": round(voxel, 6), "structures": result}


def _lesions(labels: UInt8[np.ndarray, "i j k"], value: int, box: tuple[slice, ...]) -> Any:
    """Yields (mask, its place in the scan) of each component."""
    components, _ = label_components(labels[box] == value)
    for number, part in enumerate(ndimage.find_objects(components), start=1):
        place = tuple(
            slice(outer.start + inner.start, outer.start + inner.stop)
            for outer, inner in zip(box, part, strict=True)
        )
        yield components[part] == number, place


def _diameters(mask: np.ndarray, affine: np.ndarray, volume_mm3: float) -> dict[str, float]:
    turned, canonical = to_canonical(mask, affine)
    longest = longest_inplane(turned, spacing_of(canonical))
    return {
        "longest_inplane_mm": round(float(longest), 3),
        "sphere_diameter_mm": round(2 * float(sphere_radius(volume_mm3)), 3),
    }
