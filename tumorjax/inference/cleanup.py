"""Predicted tumours that cannot be: away from their organ, or too small.

DiffTumor (Chen et al., CVPR 2024) limits predicted tumours to a mask of the organ that another
network drew. Here the organ is the prediction's own. It has holes where its tumours are, so a
lesion is judged as a whole: it stays where any of it touches the organ or is near to it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

from tumorjax.metrics.components import label_components


class Rules(NamedTuple):
    """When a predicted lesion stays.

    Attributes:
        organ_distance: of its nearest voxel from a voxel of its organ, mm between centres; a lesion
            that touches its organ stays at any distance asked for. None: wherever it lies.
        minimum_mm3: its least volume.
        hosts: value of a tumour -> values of the organs that it may lie in.
    """

    organ_distance: float | None
    minimum_mm3: float
    hosts: Mapping[int, tuple[int, ...]]

    @property
    def change_anything(self) -> bool:
        """Whether there is any rule."""
        return self.organ_distance is not None or self.minimum_mm3 > 0


def clean(
    labels: UInt8[np.ndarray, "i j k"], spacing: Sequence[float], rules: Rules
) -> dict[int, int]:
    """Removes lesions from a label map that the rules do not allow.

    A lesion is a 26-connected component of a tumour's label. What is removed becomes the organ that
    it touches (most of), if it may lie in it, else background: a speck in the liver is liver.

    Args:
        labels: changed in place.
        spacing: of its axes, mm.
        rules: that lesions have to meet.

    Returns:
        Value of each tumour -> number of lesions that were removed.
    """
    voxel = float(np.prod(spacing))
    removed = {}
    for tumor, organs in rules.hosts.items():
        removed[tumor] = 0
        box = _box(labels == tumor)
        if box is None:
            continue
        lesions, _ = label_components(labels[box] == tumor)
        voxels = np.bincount(lesions.ravel())
        # All are judged before any is changed: a lesion is no neighbour of one that became organ.
        verdicts = []
        for number, part in enumerate(ndimage.find_objects(lesions), start=1):
            lesion = lesions[part] == number
            place = tuple(
                slice(outer.start + inner.start, outer.start + inner.stop)
                for outer, inner in zip(box, part, strict=True)
            )
            touched, near = _organ_at(labels, lesion, place, organs, spacing, rules.organ_distance)
            if not near or voxels[number] * voxel < rules.minimum_mm3:
                verdicts.append((place, lesion, touched))
        for place, lesion, value in verdicts:
            labels[place][lesion] = value
        removed[tumor] = len(verdicts)
    return removed


def _organ_at(
    labels: UInt8[np.ndarray, "i j k"],
    lesion: Bool[np.ndarray, "a b c"],
    place: tuple[slice, ...],
    organs: Sequence[int],
    spacing: Sequence[float],
    distance: float | None,
) -> tuple[int, bool]:
    """Returns the organ that a lesion touches most (0 for none), and whether it may stay there."""
    reach = max(distance or 0.0, 0.0)
    margins = [max(1, int(np.ceil(reach / size))) for size in spacing]
    wide = tuple(
        slice(max(0, side.start - margin), min(length, side.stop + margin))
        for side, margin, length in zip(place, margins, labels.shape, strict=True)
    )
    around = labels[wide]
    inner = tuple(
        slice(side.start - outer.start, side.stop - outer.start)
        for side, outer in zip(place, wide, strict=True)
    )
    whole = np.zeros(around.shape, bool)
    whole[inner] = lesion
    organ = np.isin(around, organs)
    rim = ndimage.binary_dilation(whole, np.ones((3, 3, 3), bool)) & organ
    if rim.any():
        counts = np.bincount(around[rim], minlength=256)
        return int(counts.argmax()), True
    if distance is None:
        return 0, True
    if not organ.any():
        return 0, False
    apart = ndimage.distance_transform_edt(~organ, sampling=spacing)[whole].min()
    return 0, bool(apart <= distance)


def _box(mask: Bool[np.ndarray, "i j k"]) -> tuple[slice, ...] | None:
    box = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(used):
            return None
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)
