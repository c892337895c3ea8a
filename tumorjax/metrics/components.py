"""Connected components of a mask: which voxels make up one lesion."""

from typing import Literal, cast

import cc3d
import numpy as np
from jaxtyping import Array, Bool, Int32

from tumorjax.metrics.overlap import as_mask

CONNECTIVITIES = (6, 18, 26)


def label_components(
    mask: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"], connectivity: int = 26
) -> tuple[Int32[np.ndarray, "x y z"], int]:
    """Numbers the connected components of a mask.

    Args:
        mask: [x, y, z]; what is not zero is inside.
        connectivity: voxels are neighbours that share a face (6), also an edge (18), also a
            corner (26).

    Returns:
        Labels [x, y, z], 0 outside and 1..count inside, and the count.

    Raises:
        ValueError: the mask is not 3D or the connectivity is not one of the three.
    """
    mask = as_mask(mask)
    if mask.ndim != 3:
        raise ValueError(f"mask has shape {mask.shape}. Expected [x, y, z]")
    if connectivity not in CONNECTIVITIES:
        raise ValueError(f"connectivity is {connectivity}. Expected 6, 18 or 26")
    if not mask.size:
        return np.zeros(mask.shape, np.int32), 0
    neighbours = cast(Literal[6, 18, 26], connectivity)
    # cc3d 4.1's way for booleans counts too few labels on a line of voxels, such as the box about
    # two small lesions in one row, and fails; its way for integers does not, where nothing lies
    # between the voxels in memory.
    line = sum(size == 1 for size in mask.shape) >= 2
    voxels = np.ascontiguousarray(mask).view(np.uint8) if line else mask
    labels, count = cc3d.connected_components(voxels, connectivity=neighbours, return_N=True)
    return labels.astype(np.int32), int(count)


def remove_small(
    mask: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"], minimum: float, connectivity: int = 26
) -> Bool[np.ndarray, "x y z"]:
    """Returns a mask without its components of fewer than `minimum` voxels.

    Args:
        mask: [x, y, z].
        minimum: smallest size that stays, voxels; a fraction is allowed, since it usually is a
            volume in mm^3 divided by a voxel's.
        connectivity: 6, 18 or 26.

    Returns:
        The mask that is left, a new array.
    """
    if minimum <= 1:
        return as_mask(mask).copy()
    labels, count = label_components(mask, connectivity)
    large = np.bincount(labels.ravel(), minlength=count + 1) >= minimum
    large[0] = False
    return large[labels]
