"""Whole volumes through a network that sees one patch at a time.

Tiles, weights and mirroring are nnU-Net's (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z;
inference/sliding_window_prediction.py of version 2.8), in float32 where nnU-Net sums in float16.

The network is compiled once, for a tile batch of one fixed shape, whatever the volumes' shapes are.
Tiles come row by row along x, and the device holds the sums of the planes that the present rows
touch (one and a half tiles deep at half overlap), so that its memory does not grow with a volume's
length. Finished planes go to the host while the next rows are computed. The tile loop waits for the
device only to hand over no more than the batch after the present one.

Along y and z the sums are rounded up to multiples of 32 voxels: scans of 200 to 400 voxels an axis
then share a few small programs (0.1 s each to compile) for 4 to 8 % of unused voxels an axis on
average. No tile is computed for them.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Float32, Int
from scipy.ndimage import gaussian_filter

from tumorjax import backend, parallel
from tumorjax.errors import UserError
from tumorjax.models.convolution import compiler_options, split_along_x

BUCKET = 32
MAX_WEIGHT = 10.0
# The logit of every class but background in tiles left out as air: finite, so that it can be
# interpolated, and low enough for a probability of exactly 0.
AIR_LOGIT = -1e4


def tile_starts(
    shape: Sequence[int], patch_size: Sequence[int], overlap: float = 0.5
) -> list[list[int]]:
    """Returns where tiles begin on each axis, evenly spread from one border to the other.

    Args:
        shape: the volume's shape in voxels, at least the patch's.
        patch_size: the tile's shape in voxels.
        overlap: the least share of a tile that the next one covers again, in [0, 1).

    Returns:
        One ascending list of start indices an axis, as nnU-Net's compute_steps_for_sliding_window
        gives for tile_step_size = 1 - overlap.
    """
    starts = []
    for size, patch in zip(shape, patch_size, strict=True):
        last = size - patch
        count = int(np.ceil(last / (patch * (1 - overlap)))) + 1
        step = last / (count - 1) if count > 1 else 0.0
        starts.append([int(np.round(step * i)) for i in range(count)])
    return starts


@functools.lru_cache(maxsize=8)
def gaussian_weights(patch_size: tuple[int, ...]) -> Float32[np.ndarray, "x y z"]:
    """Returns the weight of each voxel of a tile: a Gaussian of sigma = patch/8 with maximum 10.

    Voxels beyond the filter's reach get the smallest positive weight instead of zero, so that a
    voxel that only one tile covers is defined. Equal to nnU-Net's compute_gaussian.
    """
    delta = np.zeros(patch_size)
    delta[tuple(size // 2 for size in patch_size)] = 1
    weights = gaussian_filter(delta, [size / 8 for size in patch_size], mode="constant")
    weights = (weights * (MAX_WEIGHT / weights.max())).astype(np.float32)
    weights[weights == 0] = weights[weights > 0].min()
    weights.setflags(write=False)
    return weights


def predict(
    apply: Callable[[Any], Any],
    volume: Float[np.ndarray, "x y z"] | Float[Array, "x y z"],
    patch_size: Sequence[int],
    overlap: float = 0.5,
    mirror_axes: Sequence[int] = (),
    batch_size: int = 2,
    mirror_table: Sequence[int] | np.ndarray | None = None,
    skip_air: bool = False,
    output: str = "probabilities",
    mesh: Mesh | None = None,
) -> Float32[np.ndarray, "x y z classes+1"]:
    """Segments a volume tile by tile.

    Each voxel's logits are the Gaussian-weighted mean over the tiles that cover it, each tile's
    logits the mean over all flips of `mirror_axes`. A volume smaller than the patch is padded
    with 0 (air) on both sides and the result is cropped back.

    Args:
        apply: x [b, *patch_size, 1] float32 -> logits [b, *patch_size, classes+1], or a list of
            them, finest first. It is traced once. An `nnx.Module` or a `jax.tree_util.Partial` of
            (function, weights) passes its weights as arguments: other weights need no new
            compilation. Of any other callable the arrays it closes over become constants, so it
            must be the same object from volume to volume, and its weights must not change.
        volume: [x, y, z], in the units that the network was trained on.
        patch_size: the tile's shape in voxels.
        overlap: the least share of a tile that the next one covers again, in [0, 1).
        mirror_axes: the axes (0, 1, 2) whose flips are averaged: 2^len(mirror_axes) times the
            work.
        batch_size: tiles a forward pass, of each position along the mesh's "data" and "fsdp". A
            batch that is not full is filled up with a repeated tile.
        mirror_table: class index after mirroring across x, see `anatomy.mirror_table`; needed
            where the task tells left organs from right ones and 0 is in `mirror_axes`.
        skip_air: leaves out tiles that hold nothing but air (no voxel above 0). Voxels that only
            such tiles cover become background with certainty; voxels outside all of these tiles
            are what they are without this setting, up to the order of summation.
        output: "probabilities" (softmax of the mean logits) or "logits".
        mesh: devices of this process. Tiles are split over "data" and "fsdp"; over "space"
            each tile's x axis is split within the network, and the sums by class. None: the device
            that `apply`'s weights lie on.

    Returns:
        [x, y, z, classes+1] float32. The class axis is the outermost in memory, so that one
        class at a time is read without a stride.

    Raises:
        UserError: a setting makes no sense for the volume.
    """
    volume = np.asarray(volume, np.float32)
    result: np.ndarray | None = None
    tiles = (overlap, mirror_axes, batch_size, mirror_table, skip_air)
    for low, planes in predict_planes(apply, volume, patch_size, *tiles, output, mesh):
        if result is None:
            result = np.empty((len(planes), *volume.shape), np.float32)
        result[:, low : low + planes.shape[1]] = planes
    assert result is not None
    return np.moveaxis(result, 0, -1)


def predict_planes(
    apply: Callable[[Any], Any],
    volume: Float[np.ndarray, "x y z"] | Float[Array, "x y z"],
    patch_size: Sequence[int],
    overlap: float = 0.5,
    mirror_axes: Sequence[int] = (),
    batch_size: int = 2,
    mirror_table: Sequence[int] | np.ndarray | None = None,
    skip_air: bool = False,
    output: str = "probabilities",
    mesh: Mesh | None = None,
    height: int | None = None,
) -> Iterator[tuple[int, Float32[np.ndarray, "classes+1 planes y z"]]]:
    """Segments a volume and yields it in slabs of x planes, in order, as they are finished.

    Args:
        apply, volume, patch_size, overlap, mirror_axes, batch_size, mirror_table, skip_air,
            output, mesh: as for `predict`.
        height: planes a slab, at least the largest step between tiles, which is the default. It
            changes nothing in the result. The device holds sums of this and a tile's depth.

    Yields:
        (index of the first plane, the slab). No slab is written to again.

    Raises:
        UserError: a setting makes no sense for the volume.
    """
    patch = tuple(int(size) for size in patch_size)
    axes = tuple(sorted(mirror_axes))
    volume = np.asarray(volume, np.float32)
    _check(volume, patch, overlap, axes, batch_size, output, mesh)

    volume, inside = _padded(volume, patch)
    starts = list(itertools.product(*tile_starts(volume.shape, patch, overlap)))
    if skip_air:
        starts = [start for start in starts if volume[_tile(start, patch)].max() > 0]
    step = max(1, int(np.ceil(patch[0] * (1 - overlap))))
    height = max(step, height or 0)

    sides = [(False, True) if axis in axes else (False,) for axis in range(3)]
    # Without mirroring the program has no flips at all.
    flips = [np.array(flip) for flip in itertools.product(*sides)] if axes else [None]
    table = None if mirror_table is None else np.asarray(mirror_table, np.int32)
    share = gaussian_weights(patch) / np.float32(len(flips))
    forward = _forward(apply, mesh)
    lanes = 1 if mesh is None else parallel.rows(mesh)
    size = batch_size * lanes
    batch_like = jax.ShapeDtypeStruct((size, *patch, 1), jnp.float32)
    # Its own, since no compiled function with compiler options may be part of another.
    of_shapes = functools.partial(forward.func.eval_shape, *forward.args)
    channels = of_shapes(batch_like, flips[0], table, share).shape[1]
    sums_shape = (lanes, channels, patch[0] + height, *map(_bucket, volume.shape[1:]))
    sharding = None if mesh is None else parallel.by_class(mesh, sums_shape)
    sums = jnp.zeros(sums_shape, device=sharding)

    def fetched(first: int, planes: slice, slab: Array) -> tuple[int, np.ndarray]:
        return first - inside[0].start, np.asarray(slab)[:, planes, inside[1], inside[2]]

    computing: deque[Array] = deque()
    finished: deque[tuple[int, slice, Array]] = deque()
    base = 0
    for batch in [*_batches(starts, size, height), None]:
        ready = len(finished)
        if batch:
            filled = batch + batch[-1:] * (size - len(batch))
            tiles = np.stack([volume[_tile(start, patch)] for start in filled])[..., None]
            if mesh is not None:
                tiles = jax.device_put(tiles, parallel.batch_sharding(mesh))
            logits = forward(tiles, flips[0], table, share)
            for flip in flips[1:]:
                logits = logits + forward(tiles, flip, table, share)
            computing.append(logits)
        # No later tile reaches the planes before this batch's first one.
        end = batch[0][0] if batch else volume.shape[0]
        while base < end and (not batch or batch[-1][0] > base + height):
            count = min(height, end - base)
            first, last = max(base, inside[0].start), min(base + count, inside[0].stop)
            if first < last:
                slab = _mean(sums, height, output == "probabilities")
                slab.copy_to_host_async()
                finished.append((first, slice(first - base, last - base), slab))
            sums = _shift(sums, np.int32(count))
            base += count
            # Through long stretches of air: the device shall not hold them all.
            if len(finished) > 2:
                yield fetched(*finished.popleft())
                ready -= 1
        if batch:
            offsets = np.array(filled, np.int32) - np.array([base, 0, 0], np.int32)
            sums = _add(sums, logits, offsets, np.arange(size) < len(batch), mesh)
        if len(computing) > 1:
            jax.block_until_ready(computing.popleft())
        # Slabs of this batch are not done before it is; those of earlier ones are.
        for _ in range(ready if batch else len(finished)):
            yield fetched(*finished.popleft())


def _padded(
    volume: Float[np.ndarray, "x y z"], patch: tuple[int, ...]
) -> tuple[Float[np.ndarray, "x2 y2 z2"], tuple[slice, ...]]:
    """Returns the volume, with air around it where it is smaller than the patch, and its place."""
    missing = [max(size - length, 0) for size, length in zip(patch, volume.shape, strict=True)]
    before = [size // 2 for size in missing]
    inside = tuple(slice(low, low + size) for low, size in zip(before, volume.shape, strict=True))
    if any(missing):
        widths = [(low, total - low) for low, total in zip(before, missing, strict=True)]
        volume = np.pad(volume, widths)
    return volume, inside


def _batches(
    starts: Sequence[tuple[int, ...]], size: int, reach: int
) -> Iterator[list[tuple[int, ...]]]:
    """Groups tiles in order; those of one group begin within `reach` planes."""
    batch: list[tuple[int, ...]] = []
    for start in starts:
        if batch and (len(batch) == size or start[0] - batch[0][0] > reach):
            yield batch
            batch = []
        batch.append(start)
    if batch:
        yield batch


def _bucket(size: int) -> int:
    return -(-size // BUCKET) * BUCKET


def _check(
    volume: np.ndarray,
    patch: tuple[int, ...],
    overlap: float,
    axes: tuple[int, ...],
    batch_size: int,
    output: str,
    mesh: Mesh | None,
) -> None:
    if volume.ndim != 3 or len(patch) != 3 or 0 in volume.shape or min(patch) < 1:
        raise UserError(
            f"a volume of shape {volume.shape} cannot be segmented in patches of {patch}."
            " Expected three axes for both, none of them empty"
        )
    if not 0 <= overlap < 1:
        raise UserError(f"inference.overlap is {overlap}. Expected at least 0 and less than 1")
    if len(set(axes)) != len(axes) or not set(axes) <= {0, 1, 2}:
        raise UserError(f"inference.mirror_axes is {axes}. Expected some of 0, 1, 2, each once")
    if batch_size < 1:
        raise UserError(f"inference.batch_size is {batch_size}. Expected at least 1")
    if output not in ("probabilities", "logits"):
        raise UserError(f"output is {output!r}. Expected 'probabilities' or 'logits'")
    if mesh is not None and patch[0] % mesh.shape["space"]:
        raise UserError(
            f"a patch of {patch} does not divide over {mesh.shape['space']} devices along 'space'."
            " Change the mesh"
        )


def _tile(start: Sequence[int], patch: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(low, low + size) for low, size in zip(start, patch, strict=True))


def _forward(apply: Callable[[Any], Any], mesh: Mesh | None) -> Any:
    """Returns the compiled step of a network: one flip of a batch, weighted.

    It is a functools.partial of a jitted function that gives logits [b, classes+1, x, y, z].
    """
    if isinstance(apply, nnx.Module):
        apply = Partial(_apply_module, *nnx.split(apply))
    if isinstance(apply, Partial):
        if mesh is not None:
            apply = jax.device_put(apply, parallel.replicated(mesh))
        return functools.partial(compiled_forward(), mesh, apply)
    return functools.partial(_forward_of_callable(apply), mesh)


@backend.cached(8)
def _forward_of_callable(apply: Callable[[Any], Any]) -> Any:
    # jax.jit would keep every closure, with its weights, for the life of the process.
    def forward(mesh, *arguments):
        return _weighted_logits(mesh, apply, *arguments)

    return jax.jit(forward, static_argnums=0, compiler_options=compiler_options())


def _apply_module(graph: nnx.GraphDef, state: Any, x: Float[Array, "b x y z 1"]) -> Any:
    return nnx.merge(graph, state)(x)


def _weighted_logits(
    mesh: Mesh | None,
    apply: Callable[[Any], Any],
    tiles: Float[Array, "b x y z 1"],
    flip: Bool[Array, "3"] | None,
    table: Array | None,
    weights: Float32[Array, "x y z"],
) -> Float32[Array, "b classes+1 x y z"]:
    """Returns the weighted logits, and the weights as one class more."""
    # The flips are values, not code: one copy of the network serves all of them.
    with split_along_x(mesh):
        logits = apply(tiles if flip is None else _flipped(tiles, flip))
    if isinstance(logits, (list, tuple)):
        logits = logits[0]
    logits = logits.astype(jnp.float32)
    if flip is not None:
        logits = _flipped(logits, flip)
        if table is not None:
            logits = jnp.where(flip[0], logits[..., table], logits)
    logits = jnp.pad(logits, [(0, 0)] * 4 + [(0, 1)], constant_values=1)
    logits = jnp.moveaxis(logits * weights[..., None], -1, 1)
    if mesh is None:
        return logits
    return lax.with_sharding_constraint(logits, parallel.by_class(mesh, logits.shape))


@backend.cached(4)
def compiled_forward() -> Any:
    """Returns the step that `predict` takes: (mesh, apply, tiles, flip, mirror table, weights)."""
    # Not at import: which options there are depends on the backend, which starts with the question.
    return jax.jit(_weighted_logits, static_argnums=0, compiler_options=compiler_options())


def _flipped(x: Array, flip: Bool[Array, "3"]) -> Array:
    for axis in range(3):
        x = jnp.where(flip[axis], jnp.flip(x, axis + 1), x)
    return x


# ---------------------------------------------------------------------------- sums
# [lanes, classes+1, x, y, z]: each position along the mesh's rows sums tiles of its own.


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _add(
    sums: Float32[Array, "lanes c X Y Z"],
    logits: Float32[Array, "b c x y z"],
    starts: Int[Array, "b 3"],
    valid: Bool[Array, "b"],
    mesh: Mesh | None,
) -> Float32[Array, "lanes c X Y Z"]:
    """Adds those tiles of a batch that are valid, each lane its share of the batch."""

    def add(sums, logits, starts, valid):
        for values, start, is_valid in zip(logits, starts, valid, strict=True):
            at = (0, 0, *start)
            old = lax.dynamic_slice(sums, at, (1, *values.shape))
            new = old + jnp.where(is_valid, values, 0)
            sums = lax.dynamic_update_slice(sums, new, at)
        return sums

    if mesh is None:
        return add(sums, logits, starts, valid)
    spec = parallel.by_class(mesh, sums.shape).spec
    samples = parallel.sample_sharding(mesh).spec
    return jax.shard_map(add, mesh=mesh, in_specs=(spec, spec, samples, samples), out_specs=spec)(
        sums, logits, starts, valid
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mean(
    sums: Float32[Array, "lanes c X Y Z"], height: int, softmax: bool
) -> Float32[Array, "classes+1 height Y Z"]:
    """Returns the logits, or probabilities, of the first planes; of background where no tile is."""
    total = sums[:, :, :height].sum(axis=0)
    total, weight = total[:-1], total[-1]
    covered = weight > 0
    logits = total / jnp.where(covered, weight, 1)
    is_background = (jnp.arange(total.shape[0]) == 0)[:, None, None, None]
    logits = jnp.where(covered, logits, jnp.where(is_background, 0, AIR_LOGIT))
    return jax.nn.softmax(logits, axis=0) if softmax else logits


@functools.partial(jax.jit, donate_argnums=0)
def _shift(sums: Float32[Array, "lanes c X Y Z"], count: Array) -> Float32[Array, "lanes c X Y Z"]:
    """Drops the first planes and begins as many new ones."""
    depth = sums.shape[2]

    # Plane by plane, in place: the whole at once would need the memory twice.
    def move(plane, sums):
        source = lax.dynamic_slice_in_dim(sums, plane + count, 1, axis=2)
        source = jnp.where(plane + count < depth, source, 0)
        return lax.dynamic_update_slice_in_dim(sums, source, plane, axis=2)

    return lax.fori_loop(0, depth, move, sums)
