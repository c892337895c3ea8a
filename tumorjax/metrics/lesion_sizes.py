"""How large a lesion is: by its volume, and by its longest diameter in a slice."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.spatial.distance import pdist

from tumorjax.metrics.overlap import as_mask

# Largest radius of each size group, mm (the paper's section 3.2).
SIZE_GROUPS = {"tiny": 5.0, "small": 10.0, "medium": 20.0, "large": float("inf")}


def sphere_radius(volume_mm3: float | Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Returns the radius (mm) of the sphere that has this volume (mm^3)."""
    return np.cbrt(np.asarray(volume_mm3, dtype=np.float64) * 3 / (4 * np.pi))


def size_group(radius_mm: float) -> str:
    """Returns the size group of a lesion: tiny (radius up to 5 mm), small, medium or large."""
    return next(name for name, largest in SIZE_GROUPS.items() if radius_mm <= largest)


def longest_inplane(
    lesion: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"], spacing: Sequence[float]
) -> float:
    """Returns a lesion's longest diameter in an axial slice, as RECIST measures it.

    The largest distance between the centres of two pixels of the lesion in one slice, plus the mean
    of the in-plane pixel sizes, since centres lie half a pixel inside on either end. One pixel thus
    has its own width, and a row of n pixels is n pixels long.

    Args:
        lesion: mask [x, y, z] whose slices along z are axial.
        spacing: voxel size (x, y, z), mm.

    Returns:
        Millimetres; 0 for an empty mask.
    """
    lesion = as_mask(lesion)
    x_size, y_size = float(spacing[0]), float(spacing[1])
    longest = -1.0
    for z in np.flatnonzero(lesion.any(axis=(0, 1))):
        rows = lesion[:, :, z]
        x = np.flatnonzero(rows.any(axis=1))
        # The two ends of each row are enough: a pixel between them is nearer to any other.
        first = rows[x].argmax(axis=1)
        last = rows.shape[1] - 1 - rows[x, ::-1].argmax(axis=1)
        ends = np.concatenate([np.stack([x, first], axis=1), np.stack([x, last], axis=1)])
        ends = ends * (x_size, y_size)
        if np.hypot(*(ends.max(axis=0) - ends.min(axis=0))) > longest:
            longest = max(longest, pdist(ends).max())
    return 0.0 if longest < 0 else longest + (x_size + y_size) / 2


def longest_of_chords(
    chords: Int[np.ndarray, "lesions dx"], spacing: Sequence[float]
) -> Float[np.ndarray, " lesions"]:
    """Returns `longest_inplane` of lesions from the widest of their chords.

    Args:
        chords: for each lesion and |dx| in pixels, the largest |dy| between two pixels of one of
            its slices that are dx apart; -1 where there is no such pair.
        spacing: voxel size (x, y, z), mm.
    """
    x_size, y_size = float(spacing[0]), float(spacing[1])
    x = np.arange(chords.shape[1]) * x_size
    lengths = np.where(chords >= 0, np.sqrt(x**2 + (chords * y_size) ** 2), 0.0)
    return lengths.max(axis=1, initial=0.0) + (x_size + y_size) / 2
