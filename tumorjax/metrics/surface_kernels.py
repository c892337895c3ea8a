"""Surface metrics of batches of masks as jitted kernels.

Each is compiled once for a box's size (`boxes.bucket`), a batch's size and a window. Spacing and
tolerance are data.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8, UInt32

from tumorjax.metrics import tolerance as tolerances

_BITS = 32
# Windows that kernels are compiled for: how many voxels along x and y the tolerance spans.
_WINDOWS = (4, 16, 64, 256, 1024, 4096)


def near_counts(
    truths: Bool[Array, "b x y z"] | Bool[np.ndarray, "b x y z"],
    predictions: Bool[Array, "b x y z"] | Bool[np.ndarray, "b x y z"],
    shapes: Sequence[Sequence[int]],
    spacings: Sequence[Float[np.ndarray, "3"]],
    tolerance_mm: Sequence[float],
) -> Int[np.ndarray, "b 2 2 256"]:
    """Counts the surface elements of each code, and those near the other surface.

    Args:
        truths: masks, each at the low corner of its box, the last plane of every axis empty.
        predictions: likewise.
        shapes: the objects' own boxes [x, y, z]; only offsets that occur in them are looked at.
        spacings: (x, y, z) of each pair, mm.
        tolerance_mm: the tolerance of each pair, mm.

    Returns:
        For each pair, of truth's elements and of prediction's: how many there are of each code, and
        how many of these lie within the tolerance of the other's.
    """
    lists, spanned = [], []
    for shape, spacing, limit in zip(shapes, spacings, tolerance_mm, strict=True):
        points = tuple(size + 1 for size in shape)
        spanned.append(tolerances.spans(points, spacing, limit))
        reach = tolerances.reach_table(spacing, 0.0 if spanned[-1] else limit, points)
        lists.append(tolerances.step_list(reach))
    widest = max(int(np.abs(steps[:, :2]).max()) for steps in lists)
    window = next(size for size in _WINDOWS if size >= widest)
    # All offsets of the window, and a step for each voxel that the reach can rise by.
    length = (2 * window + 1) ** 2 + truths.shape[3]
    steps = np.zeros((len(lists), length, 4), np.int32)
    for row, each in zip(steps, lists, strict=True):
        row[: len(each)] = each
    n_steps = np.int32(max(map(len, lists)))
    counts = np.array(_near_counts(truths, predictions, steps, n_steps, window))
    for pair, limit, everything in zip(counts, tolerance_mm, spanned, strict=True):
        # Even an empty surface is within an infinite tolerance.
        if everything and (np.isinf(limit) or pair[:, 0].any(axis=1).all()):
            pair[:, 1] = pair[:, 0]
    return counts


@functools.partial(jax.jit, static_argnames="window")
def _near_counts(
    truths: Bool[Array, "b x y z"],
    predictions: Bool[Array, "b x y z"],
    steps: Int32[Array, "b steps 4"],
    n_steps: Int32[Array, ""],
    window: int,
) -> Int32[Array, "b 2 2 256"]:
    def one(
        truth: Bool[Array, "x y z"],
        prediction: Bool[Array, "x y z"],
        steps: Int32[Array, "steps 4"],
    ) -> Int32[Array, "2 2 256"]:
        corners = jnp.stack([_corners(_pack(truth)), _corners(_pack(prediction))])
        surfaces = _any(corners) & ~_every(corners)
        reached = _near(surfaces[::-1], steps, n_steps, window)
        selected = jnp.stack([surfaces, surfaces & reached], axis=1)
        return jax.vmap(_count_codes)(corners, selected)

    return jax.vmap(one)(truths, predictions, steps)


def _pack(mask: Bool[Array, "x y z"]) -> UInt32[Array, "x y words"]:
    """Puts 32 voxels along z into a word, the lowest into the lowest bit."""
    x, y, z = mask.shape
    bits = mask.reshape(x, y, z // _BITS, _BITS).astype(jnp.uint32)
    # The bits do not overlap, so the sum unites them.
    return (bits << jnp.arange(_BITS, dtype=jnp.uint32)).sum(axis=-1, dtype=jnp.uint32)


def _corners(words: UInt32[Array, "x y words"]) -> UInt32[Array, "8 x y words"]:
    """Returns for each point of the dual grid its eight voxels, in the order of the code's bits."""
    lower = [_up(words), words]  # the voxel below a point comes first
    planes = []
    for i in (0, 1):
        for j in (0, 1):
            for k in (0, 1):
                padded = jnp.pad(lower[k], ((1 - i, 0), (1 - j, 0), (0, 0)))
                planes.append(padded[: words.shape[0], : words.shape[1]])
    return jnp.stack(planes)


def _any(corners: UInt32[Array, "b 8 x y words"]) -> UInt32[Array, "b x y words"]:
    return functools.reduce(jnp.bitwise_or, [corners[:, index] for index in range(8)])


def _every(corners: UInt32[Array, "b 8 x y words"]) -> UInt32[Array, "b x y words"]:
    return functools.reduce(jnp.bitwise_and, [corners[:, index] for index in range(8)])


def _near(
    targets: UInt32[Array, "two x y words"],
    steps: Int32[Array, "steps 4"],
    n_steps: Int32[Array, ""],
    window: int,
) -> UInt32[Array, "two x y words"]:
    """Returns the points from which each target is within reach; see `tolerance.step_list`."""
    margin = ((0, 0), (window, window), (window, window), (0, 0))

    def step(index: Int32[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        thick, union = state
        dx, dy, thicken, unite = steps[index]
        thick = jnp.where(thicken == 1, thick | _up(thick) | _down(thick), thick)
        shifted = lax.dynamic_slice(thick, (0, window + dx, window + dy, 0), targets.shape)
        return thick, jnp.where(unite == 1, union | shifted, union)

    start = jnp.pad(targets, margin), jnp.zeros_like(targets)
    return lax.fori_loop(0, n_steps, step, start)[1]


def _up(words: UInt32[Array, "*xy words"]) -> UInt32[Array, "*xy words"]:
    """Moves every bit one voxel up along z."""
    carry = _moved(words >> (_BITS - 1), 1)
    return (words << 1) | carry


def _down(words: UInt32[Array, "*xy words"]) -> UInt32[Array, "*xy words"]:
    """Moves every bit one voxel down along z."""
    carry = _moved(words << (_BITS - 1), -1)
    return (words >> 1) | carry


def _moved(words: UInt32[Array, "*xy words"], by: int) -> UInt32[Array, "*xy words"]:
    margin = [(0, 0)] * (words.ndim - 1) + [(max(by, 0), max(-by, 0))]
    padded = jnp.pad(words, margin)
    return padded[..., : words.shape[-1]] if by > 0 else padded[..., -words.shape[-1] :]


def _count_codes(
    corners: UInt32[Array, "8 x y words"], selected: UInt32[Array, "n x y words"]
) -> Int32[Array, "n 256"]:
    """Counts the points of each code among the selected ones: an AND of bits and a popcount."""
    high, low = _patterns(corners[:4]), _patterns(corners[4:])

    def count(high: UInt32[Array, "x y words"]) -> Int32[Array, "n 16"]:
        both = (high & low)[None] & selected[:, None]
        return lax.population_count(both).astype(jnp.int32).sum(axis=(2, 3, 4))

    return lax.map(count, high).transpose(1, 0, 2).reshape(len(selected), 256)


def _patterns(corners: UInt32[Array, "4 x y words"]) -> UInt32[Array, "16 x y words"]:
    """Returns for each of the 16 patterns of four corners the points that have it."""
    patterns = []
    for pattern in range(16):
        bits = [corners[n] if pattern >> (3 - n) & 1 else ~corners[n] for n in range(4)]
        patterns.append(functools.reduce(jnp.bitwise_and, bits))
    return jnp.stack(patterns)


def element_distances(
    truths: Bool[Array, "b x y z"] | Bool[np.ndarray, "b x y z"],
    predictions: Bool[Array, "b x y z"] | Bool[np.ndarray, "b x y z"],
    shapes: Sequence[Sequence[int]],
    spacings: Sequence[Float[np.ndarray, "3"]],
) -> tuple[UInt8[np.ndarray, "b 2 x y z"], Float[np.ndarray, "b 2 x y z"]]:
    """Returns the surface codes of each pair, and the squared distance to the other's surface.

    Args:
        truths: masks, each at the low corner of its box, the last plane of every axis empty.
        predictions: likewise.
        shapes: the objects' own boxes [x, y, z].
        spacings: (x, y, z) of each pair, mm.

    Returns:
        Codes (0..255) of truth's points and of prediction's, and from every point of each the
        squared distance to the other's nearest surface element, mm^2, in double precision.
    """
    size = truths.shape[1:]
    squares = [
        np.stack([(np.arange(points, dtype=np.float64) * step) ** 2 for step in steps])
        for points, steps in zip(size, np.array(spacings).T, strict=True)
    ]
    limits = np.max(shapes, axis=0).astype(np.int32) + 1
    with _double_precision():
        codes, distances = _element_distances(truths, predictions, squares, limits)
        return np.asarray(codes), np.asarray(distances)


def _double_precision() -> AbstractContextManager:
    """Returns a context in which programs may compute in double precision."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # type: ignore[attr-defined]  # before JAX 0.8

    return enable_x64(True)


@jax.jit
def _element_distances(
    truths: Bool[Array, "b x y z"],
    predictions: Bool[Array, "b x y z"],
    squares: list[Float[Array, "b points"]],
    limits: Int32[Array, "3"],
) -> tuple[UInt8[Array, "b 2 x y z"], Float[Array, "b 2 x y z"]]:
    def one(
        truth: Bool[Array, "x y z"],
        prediction: Bool[Array, "x y z"],
        squares: list[Float[Array, " points"]],
    ) -> tuple[UInt8[Array, "2 x y z"], Float[Array, "2 x y z"]]:
        codes = jnp.stack([_codes(truth), _codes(prediction)])
        is_target = (codes[::-1] != 0) & (codes[::-1] != 255)
        # x, y, z: sums round as scipy's do. A sum does not fall where a term rises, rounded or
        # not, so that the least over one axis after the other is the least of all.
        steps = _steps_to_nearest(is_target)
        size = truth.shape[0]
        distances = jnp.where(steps < size, squares[0][jnp.minimum(steps, size - 1)], jnp.inf)
        for axis in (1, 2):
            distances = _least_along(distances, squares[axis], axis + 1, limits[axis])
        return codes, distances

    return jax.vmap(one)(truths, predictions, squares)


def _codes(mask: Bool[Array, "x y z"]) -> UInt8[Array, "x y z"]:
    """Returns the code of the eight voxels around each point; the last planes must be empty."""
    voxels = jnp.pad(mask, ((1, 0), (1, 0), (1, 0))).astype(jnp.uint8)
    pairs = (voxels[:, :, :-1] << 1) | voxels[:, :, 1:]
    fours = (pairs[:, :-1] << 2) | pairs[:, 1:]
    return (fours[:-1] << 4) | fours[1:]


def _steps_to_nearest(is_target: Bool[Array, "two x y z"]) -> Int32[Array, "two x y z"]:
    """Returns how many points along x the nearest target is away; many where there is none."""
    index = lax.broadcasted_iota(jnp.int32, is_target.shape, 1)
    many = is_target.shape[1]
    before = lax.cummax(jnp.where(is_target, index, -many), axis=1)
    after = lax.cummin(jnp.where(is_target, index, 2 * many), axis=1, reverse=True)
    return jnp.minimum(index - before, after - index)


def _least_along(
    values: Float[Array, "two x y z"],
    squares: Float[Array, " points"],
    axis: int,
    limit: Int32[Array, ""],
) -> Float[Array, "two x y z"]:
    """Returns the least of `values` + the squared offset over all offsets along an axis."""
    size = values.shape[axis]
    margin = [(size, size) if other == axis else (0, 0) for other in range(values.ndim)]
    padded = jnp.pad(values, margin, constant_values=jnp.inf)

    def step(offset: Int32[Array, ""], least: Array) -> Array:
        below = lax.dynamic_slice_in_dim(padded, size - offset, size, axis)
        above = lax.dynamic_slice_in_dim(padded, size + offset, size, axis)
        return jnp.minimum(least, jnp.minimum(below, above) + squares[offset])

    return lax.fori_loop(jnp.int32(1), limit, step, values)
