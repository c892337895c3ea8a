"""Volume overlap of two masks."""

import numpy as np
from jaxtyping import Array, Bool

from tumorjax.metrics.backends import choose_by_place


def dice(
    truth: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    prediction: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"],
    backend: str = "auto",
) -> float:
    """Returns the Dice similarity coefficient 2|G and P| / (|G| + |P|).

    Args:
        truth: mask G, any shape; what is not zero is inside.
        prediction: mask P of the same shape.
        backend: host, device or auto, which is the device for masks that lie on an accelerator:
            counting on the host takes no longer than moving masks there.

    Returns:
        A fraction 0..1. Both masks empty: NaN, for there is nothing to agree on. One empty: 0.

    Raises:
        ValueError: the shapes differ, or backend is unknown.
    """
    check_shapes(truth, prediction)
    if choose_by_place(backend, truth, prediction) == "device":
        from tumorjax.metrics import volume_kernels

        first, second, both = volume_kernels.voxel_counts(truth, prediction)
    else:
        truth, prediction = as_mask(truth), as_mask(prediction)
        first, second, both = (
            int(np.count_nonzero(mask)) for mask in (truth, prediction, truth & prediction)
        )
    return 2.0 * both / (first + second) if first + second else float("nan")


def as_masks(
    truth: Array | np.ndarray, prediction: Array | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns both masks as boolean numpy arrays.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(truth, prediction)
    return as_mask(truth), as_mask(prediction)


def check_shapes(
    truth: Array | np.ndarray, prediction: Array | np.ndarray, ndim: int | None = None
) -> None:
    """Checks that two masks lie on the same grid, and that it has `ndim` axes.

    Raises:
        ValueError: they do not.
    """
    shapes = np.shape(truth), np.shape(prediction)
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"truth has shape {shapes[0]} and prediction {shapes[1]}. Both masks must lie"
            " on the same grid"
        )
    if ndim is not None and len(shapes[0]) != ndim:
        raise ValueError(f"masks have shape {shapes[0]}. Expected [x, y, z]")


def as_mask(mask: Array | np.ndarray) -> np.ndarray:
    """Returns a mask as a boolean numpy array, without a copy where it is one already."""
    mask = np.asarray(mask)
    return mask if mask.dtype == bool else mask != 0
