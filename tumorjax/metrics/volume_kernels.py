"""Whole volumes on an accelerator: where objects lie, the crop about them, counts and thresholds.

These programs are small, and compiled for each shape of a volume; all others of the metrics are
compiled for few sizes of boxes.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped


def extent(mask: Array | np.ndarray) -> Int[np.ndarray, "2 3"]:
    """Returns the first voxel on each axis that has something, and the one after the last.

    Of an empty mask the first is the volume's size and the last 0.
    """
    return np.asarray(_extent(mask))


@jax.jit
def _extent(mask: Shaped[Array, "x y z"]) -> Int[Array, "2 3"]:
    inside = mask != 0
    first, last = [], []
    for axis, size in enumerate(mask.shape):
        line = inside.any(axis=tuple(other for other in range(3) if other != axis))
        index = jnp.arange(size)
        first.append(jnp.where(line, index, size).min(initial=size))
        last.append(jnp.where(line, index + 1, 0).max(initial=0))
    return jnp.array([first, last])


def crop(
    volume: Array | np.ndarray,
    start: Sequence[int],
    shape: Sequence[int],
    size: tuple[int, int, int],
) -> Shaped[Array, "bx by bz"]:
    """Returns the box of `shape` that begins at `start`, in an array of `size`, zeros after it."""
    return _crop(volume, jnp.array([start, shape], jnp.int32), size)


@functools.partial(jax.jit, static_argnames="size")
def _crop(
    volume: Shaped[Array, "x y z"], box: Int[Array, "2 3"], size: tuple[int, int, int]
) -> Shaped[Array, "bx by bz"]:
    for axis in range(3):
        offset = jnp.arange(size[axis])
        index = jnp.where(offset < box[1, axis], box[0, axis] + offset, volume.shape[axis])
        volume = jnp.take(volume, index, axis=axis, mode="fill", fill_value=0)
    return volume


def voxel_counts(first: Array | np.ndarray, second: Array | np.ndarray) -> tuple[int, int, int]:
    """Returns how many voxels are not zero in the first, in the second, and in both."""
    one, two, both = np.asarray(_voxel_counts(first, second)).tolist()
    return one, two, both


@jax.jit
def _voxel_counts(
    first: Shaped[Array, "*shape"], second: Shaped[Array, "*shape"]
) -> Int[Array, "3"]:
    one, two = first != 0, second != 0
    return jnp.stack([jnp.count_nonzero(mask) for mask in (one, two, one & two)])


def probability_levels(
    probability: Array | np.ndarray, thresholds: Float[np.ndarray, " thresholds"]
) -> Int[Array, "x y z"]:
    """Returns how many thresholds each probability reaches; the thresholds ascend."""
    if probability.dtype != np.float64:
        # Rounded up, so that what reaches them stays the same.
        single = thresholds.astype(np.float32)
        up = np.nextafter(single, np.float32(np.inf))
        thresholds = np.where(single < thresholds, up, single)
    return _probability_levels(probability, thresholds)


@jax.jit
def _probability_levels(
    probability: Float[Array, "x y z"], thresholds: Float[Array, " thresholds"]
) -> Int[Array, "x y z"]:
    reached = jnp.zeros(probability.shape, jnp.int32)
    wide = probability.astype(thresholds.dtype)
    return lax.fori_loop(
        0, len(thresholds), lambda n, count: count + (wide >= thresholds[n]), reached
    )
