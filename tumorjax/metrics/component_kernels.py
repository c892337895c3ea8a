"""Connected components as a jitted kernel.

Every voxel points at another of its component, at first at the start of its run along z, and
pointers only ever move to earlier voxels. A step looks at the neighbours, moves what a voxel points
at to the earliest voxel that any neighbour's pointer leads to, and then skips along pointers. So
components merge in trees instead of growing by a voxel a step, and the number of steps grows with
the logarithm of a path's length: mazes and spirals take little more than balls. (Zhang, Azad and
Hu, "FastSV: a distributed-memory connected component algorithm with fast convergence", 2020.)
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32

# Noise, mazes and spirals of 256^3 voxels take fewer than 20.
STEPS = 64


@functools.partial(jax.jit, static_argnames="connectivity")
def number(
    masks: Bool[Array, "b x y z"], connectivity: int, steps: int
) -> tuple[Int32[Array, "b x y z"], Int32[Array, " b"], Bool[Array, " b"]]:
    """Numbers the components of each mask, in the order of their first voxels (z fastest).

    Args:
        masks: one or several, each in its box.
        connectivity: 6, 18 or 26.
        steps: how many to take at most.

    Returns:
        Labels, 0 outside and 1..count inside; the counts; and whether the steps were enough.
    """

    def one(mask: Bool[Array, "x y z"]) -> tuple[Array, Array, Array]:
        first, done = first_voxels(mask, connectivity, steps)
        labels, count = numbered(mask, first)
        return labels, count, done

    return jax.vmap(one)(masks)


def first_voxels(
    mask: Bool[Array, "x y z"], connectivity: int, steps: int | Int32[Array, ""]
) -> tuple[Int32[Array, "x y z"], Bool[Array, ""]]:
    """Returns the index of the first voxel of each voxel's component, and whether all are found.

    An index counts along z, then y, then x. Voxels outside of the mask have their own.
    """
    index = jnp.arange(mask.size, dtype=jnp.int32).reshape(mask.shape)
    is_start = mask & ~jnp.pad(mask, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
    run = lax.cummax(jnp.where(is_start, index, -1), axis=2)
    pointers = jnp.where(mask, run, index)

    def follow(pointers: Int32[Array, "x y z"], to: Int32[Array, "x y z"]) -> Array:
        return pointers.ravel()[to.ravel()].reshape(to.shape)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, pointers, _ = state
        leads_to = follow(pointers, pointers)
        inside = jnp.where(mask, leads_to, mask.size)
        earliest = jnp.where(mask, least_neighbour(inside, connectivity, mask.size), index)
        flat = jnp.where(mask, pointers, mask.size).ravel()  # nothing outside is written to
        hooked = pointers.ravel().at[flat].min(earliest.ravel(), mode="drop")
        merged = jnp.minimum(hooked.reshape(mask.shape), earliest)
        merged = follow(merged, merged)
        return count + 1, merged, (merged != pointers).any()

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return state[2] & (state[0] < steps)

    start = jnp.int32(0), pointers, mask.any()
    _, pointers, changed = lax.while_loop(unfinished, step, start)
    return pointers, ~changed


def numbered(
    mask: Bool[Array, "x y z"], first: Int32[Array, "x y z"]
) -> tuple[Int32[Array, "x y z"], Int32[Array, ""]]:
    """Returns labels 1, 2, ... by the components' first voxels, 0 outside, and their number."""
    index = jnp.arange(mask.size, dtype=jnp.int32).reshape(mask.shape)
    rank = jnp.cumsum((mask & (first == index)).ravel(), dtype=jnp.int32)
    labels = jnp.where(mask, rank[first.ravel()].reshape(mask.shape), 0)
    return labels, rank[-1]


def voxel_counts(
    mask: Bool[Array, "x y z"], first: Int32[Array, "x y z"]
) -> Int32[Array, " voxels"]:
    """Returns for each voxel how many voxels of the mask have it as their component's first."""
    return jnp.zeros(mask.size, jnp.int32).at[first.ravel()].add(mask.ravel().astype(jnp.int32))


def least_neighbour(
    values: Int32[Array, "x y z"], connectivity: int, outside: int
) -> Int32[Array, "x y z"]:
    """Returns the least of a voxel and its neighbours.

    A neighbour at 18 shares an edge and lies in one of three planes, at 26 in the cube; planes and
    cubes are taken one axis after the other.
    """
    along = functools.partial(_least_of_three, outside=outside)
    x, y, z = (along(values, axis) for axis in range(3))
    if connectivity == 6:
        return _least([x, y, z])
    if connectivity == 18:
        return _least([along(x, 1), along(y, 2), along(z, 0)])
    return along(along(x, 1), 2)


def _least_of_three(
    values: Int32[Array, "x y z"], axis: int, outside: int
) -> Int32[Array, "x y z"]:
    margin = [(1, 1) if other == axis else (0, 0) for other in range(3)]
    padded = jnp.pad(values, margin, constant_values=outside)
    size = values.shape[axis]
    return _least([lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(3)])


def _least(arrays: Sequence[Int32[Array, "x y z"]]) -> Int32[Array, "x y z"]:
    return functools.reduce(jnp.minimum, arrays)


def label_on_device(
    mask: Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"], connectivity: int, steps: int
) -> tuple[Int32[np.ndarray, "x y z"], int] | None:
    """Returns labels and count of one mask in its box, or None if the steps were not enough."""
    labels, counts, done = number(mask[None], connectivity, np.int32(steps))
    return (np.asarray(labels[0]), int(counts[0])) if done[0] else None
