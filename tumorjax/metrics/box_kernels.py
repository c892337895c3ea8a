"""Volumes on an accelerator: where the objects in them lie, the crop about them, their voxels.

These programs are small, and compiled for each shape of a volume; all others of the metrics are
compiled for few sizes of boxes.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


def extent(mask: Shaped[Array, "x y z"]) -> Int[np.ndarray, "2 3"]:
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
    volume: Shaped[Array, "x y z"],
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


def voxel_counts(
    first: Shaped[Array, "*shape"], second: Shaped[Array, "*shape"]
) -> tuple[int, int, int]:
    """Returns how many voxels are not zero in the first, in the second, and in both."""
    one, two, both = np.asarray(_voxel_counts(first, second)).tolist()
    return one, two, both


@jax.jit
def _voxel_counts(
    first: Shaped[Array, "*shape"], second: Shaped[Array, "*shape"]
) -> Int[Array, "3"]:
    one, two = first != 0, second != 0
    return jnp.stack([jnp.count_nonzero(mask) for mask in (one, two, one & two)])
