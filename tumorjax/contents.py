"""What a labelled volume contains: its tumours, and voxels to centre crops on."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from scipy import ndimage

from tumorjax import anatomy
from tumorjax.errors import CaseError
from tumorjax.geometry import label_boxes
from tumorjax.metrics.components import label_components
from tumorjax.metrics.detection import longest_inplane, sphere_radius

# Voxels of each label that foreground crops can be centred on.
MAX_LOCATIONS = 2000


def tumor_instances(
    label: UInt8[np.ndarray, "x y z"], spacing: Sequence[float]
) -> list[dict[str, Any]]:
    """Measures each tumour: a 26-connected component of one tumour class.

    Args:
        label: uint8 [x, y, z], ids of `anatomy`.
        spacing: voxel size (x, y, z), mm.

    Returns:
        One dictionary a tumour, by class and size (largest first): class, voxels, volume_mm3,
        radius_mm (of the sphere of that volume), longest_inplane_mm (axial, as in RECIST), center
        (voxel; mean of its voxels).
    """
    tumors: list[dict[str, Any]] = []
    voxel = float(np.prod(spacing))
    boxes = label_boxes(label)
    for name, number in anatomy.TUMORS.items():
        if number not in boxes:
            continue
        corner = [side.start for side in boxes[number]]
        components, _ = label_components(label[boxes[number]] == number)
        found: list[dict[str, Any]] = []
        for index, box in enumerate(ndimage.find_objects(components), start=1):
            mask: Bool[np.ndarray, "a b c"] = components[box] == index
            where = np.argwhere(mask)
            center = where.mean(axis=0) + [side.start for side in box] + corner
            found.append(
                {
                    "class": name,
                    "voxels": len(where),
                    "volume_mm3": round(len(where) * voxel, 3),
                    "radius_mm": round(float(sphere_radius(len(where) * voxel)), 3),
                    "longest_inplane_mm": round(float(longest_inplane(mask, spacing)), 3),
                    "center": [round(float(c), 2) for c in center],
                }
            )
        tumors += sorted(found, key=lambda tumor: (-tumor["voxels"], tumor["center"]))
    return tumors


def draw_locations(case: str, label: UInt8[np.ndarray, "x y z"]) -> Int[np.ndarray, "n 4"]:
    """Draws up to `MAX_LOCATIONS` voxels of each label, seeded by the case's id."""
    seed = int.from_bytes(hashlib.sha256(case.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    rows = []
    # Sorting all foreground once is cheaper than one pass over the volume for each label.
    flat = np.ascontiguousarray(label).ravel()
    foreground = np.flatnonzero(flat)
    numbers = flat[foreground]
    for number in np.unique(numbers):
        voxels = foreground[numbers == number]
        if len(voxels) > MAX_LOCATIONS:
            voxels = np.sort(rng.choice(voxels, MAX_LOCATIONS, replace=False))
        place = np.stack(np.unravel_index(voxels, label.shape), axis=1)
        rows.append(np.concatenate([np.full((len(place), 1), number), place], axis=1))
    return np.concatenate(rows or [np.zeros((0, 4))]).astype(np.int32)


def check_volumes(
    case: str, image: np.ndarray, label: np.ndarray, spacing: Sequence[float]
) -> None:
    if image.ndim != 3 or image.shape != label.shape or not image.size:
        raise CaseError(
            case,
            f"image has shape {image.shape} and label {label.shape}; expected both [x, y, z]",
            "Write image and label of one grid",
        )
    low, high = float(image.min()), float(image.max())
    # A NaN makes both comparisons false. Rounding may leave [0, 1] by a little.
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise CaseError(
            case, f"image values {low:g} to {high:g}; expected 0 to 1", "Clip and scale it first"
        )
    if label.dtype != np.uint8 or label.max() > max(anatomy.NAMES):
        raise CaseError(
            case,
            f"labels are {label.dtype} up to {label.max()}; expected uint8 up to"
            f" {max(anatomy.NAMES)}",
            "Map them to the ids of tumorjax.anatomy",
        )
    if len(spacing) != 3 or not (np.isfinite(spacing).all() and min(spacing) > 0):
        raise CaseError(case, f"spacing {spacing}", "Give three positive numbers in mm")
