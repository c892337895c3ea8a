"""Which surface elements lie within a tolerance of another surface, by whole numbers alone.

Whether an offset of (dx, dy, dz) voxels is within the tolerance is decided once, in double
precision and with the rounding of scipy's distance transform, which surface-distance uses. For each
(dx, dy) that gives a reach: the largest |dz| that still counts. An element is then near a surface
when it lies in the union of the surface's copies, shifted by (dx, dy) and thickened along z by the
reach. Masks are packed along z, so that shifting, thickening and uniting take one operation for 32
or 64 voxels, and no number is compared that could be rounded: the result is exact on every device,
also where a distance equals the tolerance.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

_BITS = 64


def reach_table(
    spacing: Float[np.ndarray, "3"], tolerance: float, shape: tuple[int, ...]
) -> Int[np.ndarray, "dx dy"]:
    """Returns the largest |dz| within the tolerance for each |dx| and |dy|; -1 where there is none.

    Args:
        spacing: (x, y, z), mm.
        tolerance: mm; infinity is allowed.
        shape: the box's number of points on each axis: larger offsets do not occur in it.
    """
    squares = [
        (np.arange(size, dtype=np.float64) * step) ** 2
        for size, step in zip(shape, spacing, strict=True)
    ]
    x, y = (square[np.sqrt(square) <= tolerance] for square in squares[:2])
    plane = x[:, None] + y[None]
    # Distances do not fall with dz, rounded or not, so the largest that counts is found by halving.
    reach = np.where(np.sqrt(plane + squares[2][0]) <= tolerance, 0, -1)
    beyond = np.where(reach < 0, 0, shape[2])
    while (beyond - reach > 1).any():
        middle = np.where(reach < 0, 0, (reach + beyond) // 2)
        within = (np.sqrt(plane + squares[2][middle]) <= tolerance) & (reach >= 0)
        reach, beyond = np.where(within, middle, reach), np.where(within, beyond, middle)
    return reach


def step_list(reach: Int[np.ndarray, "dx dy"]) -> Int[np.ndarray, "steps 4"]:
    """Returns a reach table as what a kernel does one after the other.

    A step is (dx, dy, thicken, unite): first the surface is thickened by one voxel along z where
    `thicken` is 1, then its copy shifted by (dx, dy) joins the union where `unite` is 1.
    """
    x, y = np.nonzero(reach >= 0)
    signed = np.concatenate(
        [np.stack([sx * x, sy * y, reach[x, y]], axis=1) for sx in (1, -1) for sy in (1, -1)]
    )
    signed = np.unique(signed, axis=0)
    signed = signed[np.argsort(signed[:, 2], kind="stable")]
    steps = np.concatenate([signed, np.ones((len(signed), 1), int)], axis=1)
    rise = np.diff(signed[:, 2], prepend=0)
    steps[:, 2] = rise > 0
    # A rise by several voxels takes steps that only thicken.
    extra = np.maximum(rise - 1, 0)
    return np.insert(steps, np.repeat(np.arange(len(steps)), extra), (0, 0, 1, 0), axis=0)


def spans(shape: tuple[int, ...], spacing: Float[np.ndarray, "3"], tolerance: float) -> bool:
    """Says whether any two points of a box are within the tolerance."""
    return bool(np.sqrt(((np.array(shape) * spacing) ** 2).sum()) < tolerance)


def pack(points: Bool[np.ndarray, "x y z"]) -> UInt64[np.ndarray, "x y words"]:
    """Puts 64 points along z into a word, the lowest into the lowest bit."""
    x, y, z = points.shape
    padded = np.zeros((x, y, -(-z // _BITS) * _BITS), bool)
    padded[..., :z] = points
    return np.packbits(padded, axis=-1, bitorder="little").view("<u8")


def unpack(words: UInt64[np.ndarray, "x y words"], size: int) -> Bool[np.ndarray, "x y z"]:
    """Returns the first `size` points along z of packed words."""
    bits = np.unpackbits(words.view(np.uint8), axis=-1, count=size, bitorder="little")
    return bits.view(bool)


def near(
    target: UInt64[np.ndarray, "x y words"], reach: Int[np.ndarray, "dx dy"]
) -> UInt64[np.ndarray, "x y words"]:
    """Returns the points from which `target` is within reach."""
    out = np.zeros_like(target)
    thick = target
    for level in range(int(reach.max(initial=-1)) + 1):
        if level:
            thick = thick | _up(thick) | _down(thick)
        for dx, dy in zip(*np.nonzero(reach == level), strict=True):
            for to_x, from_x in _both_ways(int(dx)):
                for to_y, from_y in _both_ways(int(dy)):
                    out[to_x, to_y] |= thick[from_x, from_y]
    return out


def _up(words: UInt64[np.ndarray, "x y words"]) -> UInt64[np.ndarray, "x y words"]:
    """Moves every bit one voxel up along z."""
    out = words << np.uint64(1)
    out[..., 1:] |= words[..., :-1] >> np.uint64(_BITS - 1)
    return out


def _down(words: UInt64[np.ndarray, "x y words"]) -> UInt64[np.ndarray, "x y words"]:
    """Moves every bit one voxel down along z."""
    out = words >> np.uint64(1)
    out[..., :-1] |= words[..., 1:] << np.uint64(_BITS - 1)
    return out


def _both_ways(offset: int) -> Iterator[tuple[slice, slice]]:
    """Yields where to and where from when an axis is shifted by an offset, and by its opposite."""
    yield slice(offset, None), slice(None, -offset or None)
    if offset:
        yield slice(None, -offset), slice(offset, None)
