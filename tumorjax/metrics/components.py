"""Connected components of a mask: which voxels make up one lesion."""

import logging
from typing import Literal, cast

import cc3d
import numpy as np
from jaxtyping import Array, Bool, Int32

from tumorjax.metrics.backends import choose_by_place
from tumorjax.metrics.boxes import common_box, padded_pair
from tumorjax.metrics.overlap import as_mask

CONNECTIVITIES = (6, 18, 26)


def label_components(
    mask: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    connectivity: int = 26,
    backend: str = "auto",
) -> tuple[Int32[np.ndarray, "x y z"], int]:
    """Numbers the connected components of a mask, in the order of their first voxels (z fastest).

    On the host cc3d does it, on the device a kernel that takes a bounded number of steps; where
    they are not enough, the host takes over and the log says so.

    Args:
        mask: [x, y, z]; what is not zero is inside.
        connectivity: voxels are neighbours that share a face (6), also an edge (18), also a
            corner (26).
        backend: host, device or auto, which is the device for masks that lie on an accelerator:
            cc3d is through with another one before it would have arrived there.

    Returns:
        Labels [x, y, z], 0 outside and 1..count inside, and the count.

    Raises:
        ValueError: the mask is not 3D or connectivity or backend is unknown.
    """
    if np.ndim(mask) != 3:
        raise ValueError(f"mask has shape {np.shape(mask)}. Expected [x, y, z]")
    check_connectivity(connectivity)
    if choose_by_place(backend, mask) == "device":
        return _on_device(mask, connectivity)
    return _on_host(as_mask(mask), connectivity)


def remove_small(
    mask: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    minimum: float,
    connectivity: int = 26,
    backend: str = "auto",
) -> Bool[np.ndarray, "x y z"]:
    """Returns a mask without its components of fewer than `minimum` voxels.

    Args:
        mask: [x, y, z].
        minimum: smallest size that stays, voxels; a fraction is allowed, since it usually is a
            volume in mm^3 divided by a voxel's.
        connectivity: 6, 18 or 26.
        backend: as for `label_components`.

    Returns:
        The mask that is left, a new array.
    """
    if minimum <= 1:
        return as_mask(mask).copy()
    labels, count = label_components(mask, connectivity, backend)
    large = np.bincount(labels.ravel(), minlength=count + 1) >= minimum
    large[0] = False
    return large[labels]


def check_connectivity(connectivity: int) -> None:
    """Checks that a connectivity is one of the three.

    Raises:
        ValueError: it is not.
    """
    if connectivity not in CONNECTIVITIES:
        raise ValueError(f"connectivity is {connectivity}. Expected 6, 18 or 26")


def warn_of_bound(steps: int) -> None:
    """Logs that a kernel did not finish a mask's components, and that the host takes over."""
    logging.warning(
        "components: not all found in %d steps on the device; found on the host instead", steps
    )


def _on_host(
    mask: Bool[np.ndarray, "x y z"], connectivity: int
) -> tuple[Int32[np.ndarray, "x y z"], int]:
    if not mask.size:
        return np.zeros(mask.shape, np.int32), 0
    # cc3d numbers by the first voxels in Fortran's order, so it is given the axes the other way
    # round. Its way for booleans (4.1) counts too few labels on a line of voxels, such as the box
    # about two small lesions in one row, and fails; its way for integers does not.
    voxels = np.ascontiguousarray(mask).T
    if sum(size == 1 for size in mask.shape) >= 2:
        voxels = voxels.view(np.uint8)
    neighbours = cast(Literal[6, 18, 26], connectivity)
    labels, count = cc3d.connected_components(voxels, connectivity=neighbours, return_N=True)
    return labels.T.astype(np.int32), int(count)


def _on_device(
    mask: Array | np.ndarray, connectivity: int
) -> tuple[Int32[np.ndarray, "x y z"], int]:
    from tumorjax.metrics import component_kernels

    labels = np.zeros(np.shape(mask), np.int32)
    box, pair = common_box(mask), padded_pair(mask, mask)
    if box is None or pair is None:
        return labels, 0
    crop, _, (x, y, z) = pair
    steps = component_kernels.STEPS
    found = component_kernels.label_on_device(crop, connectivity, steps)
    if found is None:
        warn_of_bound(steps)
        return _on_host(as_mask(mask), connectivity)
    labels[box] = found[0][:x, :y, :z]
    return labels, found[1]
