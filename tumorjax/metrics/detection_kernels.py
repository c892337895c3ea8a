"""Lesions, candidates and what they share, for batches of masks, as jitted kernels."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt

from tumorjax.metrics import component_kernels as components


@functools.partial(jax.jit, static_argnames="connectivity")
def label_pairs(
    truths: Bool[Array, "b x y z"],
    predictions: Bool[Array, "b x y z"],
    minimum: Int32[Array, " b"],
    connectivity: int,
    steps: Int32[Array, ""],
) -> tuple[
    Int32[Array, "b x y z"],
    Int32[Array, "b x y z"],
    Bool[Array, "b x y z"],
    Int32[Array, "b 2"],
    Bool[Array, " b"],
]:
    """Numbers the components of truths and of predictions, small ones of the latter dropped.

    Args:
        truths: masks.
        predictions: masks.
        minimum: predicted components of fewer voxels are dropped.
        connectivity: 6, 18 or 26.
        steps: how many the components may take.

    Returns:
        Lesions and candidates as labels, the predictions that are left, the counts of both, and
        whether the steps were enough.
    """

    def one(
        truth: Array, prediction: Array, minimum: Array
    ) -> tuple[Array, Array, Array, Array, Array]:
        lesion, lesions_done = components.first_voxels(truth, connectivity, steps)
        candidate, candidates_done = components.first_voxels(prediction, connectivity, steps)
        prediction = _without_small(prediction, candidate, minimum)
        lesions, n_lesions = components.numbered(truth, lesion)
        candidates, n_candidates = components.numbered(prediction, candidate)
        counts = jnp.stack([n_lesions, n_candidates])
        return lesions, candidates, prediction, counts, lesions_done & candidates_done

    return jax.vmap(one)(truths, predictions, minimum)


@functools.partial(jax.jit, static_argnames="capacity")
def tables(
    lesions: Int32[Array, "b x y z"], candidates: Int32[Array, "b x y z"], capacity: int
) -> tuple[
    Int32[Array, "b capacity capacity"], Int32[Array, "b 2 capacity"], Int32[Array, "b capacity x"]
]:
    """Counts what lesions and candidates share.

    Args:
        lesions: labels 1, 2, ...
        candidates: likewise.
        capacity: how many of either there may be.

    Returns:
        Voxels of each lesion in each candidate; voxels of lesions and of candidates; and each
        lesion's widest chords, see `lesion_sizes.longest_of_chords`.
    """

    def one(lesions: Array, candidates: Array) -> tuple[Array, Array, Array]:
        # What is outside of either has an index beyond the table and is dropped.
        both = jnp.where(
            (lesions > 0) & (candidates > 0),
            (lesions - 1) * capacity + candidates - 1,
            capacity * capacity,
        )
        overlap = _histogram(both, capacity * capacity).reshape(capacity, capacity)
        sizes = [
            _histogram(jnp.where(labels > 0, labels - 1, capacity), capacity)
            for labels in (lesions, candidates)
        ]
        return overlap, jnp.stack(sizes), _chords(lesions, capacity)

    return jax.vmap(one)(lesions, candidates)


def _histogram(index: Int32[Array, "x y z"], length: int) -> Int32[Array, " length"]:
    return jnp.zeros(length, jnp.int32).at[index.ravel()].add(1, mode="drop")


def _chords(lesions: Int32[Array, "x y z"], capacity: int) -> Int32[Array, "capacity x"]:
    """Returns for each lesion and |dx| the largest |dy| of two pixels in a slice; -1 for none."""
    x_size, y_size, z_size = lesions.shape
    none = 4 * y_size  # so far outside that a chord with it is negative
    x = lax.broadcasted_iota(jnp.int32, lesions.shape, 0)
    y = lax.broadcasted_iota(jnp.int32, lesions.shape, 1)
    z = lax.broadcasted_iota(jnp.int32, lesions.shape, 2)
    rows = capacity * z_size * x_size
    row = jnp.where(lesions > 0, ((lesions - 1) * z_size + z) * x_size + x, rows).ravel()
    # The two ends of a row are enough: a pixel between them is nearer to any other.
    first = jnp.full(rows, none, jnp.int32).at[row].min(y.ravel(), mode="drop")
    last = jnp.full(rows, -none, jnp.int32).at[row].max(y.ravel(), mode="drop")
    first, last = (ends.reshape(capacity, z_size, x_size) for ends in (first, last))
    beside = ((0, 0), (0, 0), (0, x_size))
    first_beyond = jnp.pad(first, beside, constant_values=none)
    last_beyond = jnp.pad(last, beside, constant_values=-none)

    def chord(dx: Int32[Array, ""]) -> Int32[Array, " capacity"]:
        other_first = lax.dynamic_slice_in_dim(first_beyond, dx, x_size, axis=2)
        other_last = lax.dynamic_slice_in_dim(last_beyond, dx, x_size, axis=2)
        wide = jnp.maximum(other_last - first, last - other_first)
        return jnp.maximum(wide.max(axis=(1, 2)), -1)

    return lax.map(chord, jnp.arange(x_size)).T


@functools.partial(jax.jit, static_argnames=("connectivity", "length"))
def froc_counts(
    truth: Bool[Array, "x y z"],
    levels: UInt[Array, "x y z"],
    n_levels: Int32[Array, ""],
    minimum: Int32[Array, ""],
    connectivity: int,
    steps: Int32[Array, ""],
    length: int,
) -> tuple[Int32[Array, "2 length"], Int32[Array, ""], Bool[Array, ""]]:
    """Counts the lesions found and the false candidates of one scan at each threshold.

    Args:
        truth: tumour mask.
        levels: how many thresholds each voxel's probability reaches.
        n_levels: how many thresholds there are, `length` at most.
        minimum: candidates of fewer voxels are dropped.
        connectivity: 6, 18 or 26.
        steps: how many the components may take.
        length: of the result; thresholds beyond `n_levels` have zeros.

    Returns:
        Lesions found and false candidates, the number of lesions, and whether the steps were
        enough at every threshold.
    """
    index = jnp.arange(truth.size, dtype=jnp.int32).reshape(truth.shape)
    lesion, done = components.first_voxels(truth, connectivity, steps)

    def level(number: Int32[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        counts, done = state
        mask = levels.astype(jnp.int32) > number
        candidate, candidates_done = components.first_voxels(mask, connectivity, steps)
        mask = _without_small(mask, candidate, minimum)
        both = mask & truth
        found = (components.voxel_counts(both, lesion) > 0).sum()
        true = (components.voxel_counts(both, candidate) > 0).sum()
        false = (mask & (candidate == index)).sum() - true
        column = jnp.stack([found, false]).astype(jnp.int32)
        return counts.at[:, number].set(column), done & candidates_done

    start = jnp.zeros((2, length), jnp.int32), done
    counts, done = lax.fori_loop(jnp.int32(0), n_levels, level, start)
    return counts, (truth & (lesion == index)).sum(), done


def _without_small(
    mask: Bool[Array, "x y z"], first: Int32[Array, "x y z"], minimum: Int32[Array, ""]
) -> Bool[Array, "x y z"]:
    large = components.voxel_counts(mask, first) >= minimum
    return mask & large[first.ravel()].reshape(mask.shape)
