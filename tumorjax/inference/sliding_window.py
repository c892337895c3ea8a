"""Whole volumes through a network that sees one patch at a time.

Tiles, weights and mirroring are nnU-Net's (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z;
inference/sliding_window_prediction.py of version 2.8), in float32 where nnU-Net sums in float16.
The network is compiled once for a tile batch of one fixed shape, whatever the volumes' shapes are.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Float32
from scipy.ndimage import gaussian_filter

from tumorjax.errors import UserError

# On an accelerator the sums stay on the device, in buffers whose axes are rounded up to this many
# voxels: scans of 200 to 400 voxels an axis then share a few small compiled programs (0.1 s each)
# for 4 to 8 % of unused voxels an axis on average.
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
    accumulate: str | None = None,
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
        batch_size: tiles a forward pass. The last batch is filled up with a repeated tile.
        mirror_table: class index after mirroring across x, see `anatomy.mirror_table`; needed
            where the task tells left organs from right ones and 0 is in `mirror_axes`.
        skip_air: leaves out tiles that hold nothing but air (no voxel above 0). Voxels that only
            such tiles cover become background with certainty; voxels outside all of these tiles
            are what they are without this setting, up to the order of summation.
        output: "probabilities" (softmax of the mean logits) or "logits".
        accumulate: "host" or "device", where tiles are summed; by default the host when the
            network runs on a CPU (see benchmarks/inference.py), else the device.

    Returns:
        [x, y, z, classes+1] float32. The class axis is the outermost in memory, so that one
        class at a time is read without a stride.

    Raises:
        UserError: a setting makes no sense for the volume.
    """
    patch = tuple(int(size) for size in patch_size)
    axes = tuple(sorted(mirror_axes))
    volume = np.asarray(volume, np.float32)
    _check(volume, patch, overlap, axes, batch_size, output)
    accumulate = accumulate or ("host" if jax.default_backend() == "cpu" else "device")

    missing = [max(size - length, 0) for size, length in zip(patch, volume.shape, strict=True)]
    before = [size // 2 for size in missing]
    inside = tuple(slice(low, low + size) for low, size in zip(before, volume.shape, strict=True))
    if any(missing):
        volume = np.pad(
            volume, [(low, total - low) for low, total in zip(before, missing, strict=True)]
        )

    starts = list(itertools.product(*tile_starts(volume.shape, patch, overlap)))
    if skip_air:
        starts = [start for start in starts if volume[_tile(start, patch)].max() > 0]
    forward = _forward(apply)
    sides = [(False, True) if axis in axes else (False,) for axis in range(3)]
    flips = np.array(list(itertools.product(*sides)))
    table = None if mirror_table is None else np.asarray(mirror_table, np.int32)
    weights = gaussian_weights(patch)
    share = jnp.asarray(weights / len(flips))

    sums = _HostSums(volume.shape) if accumulate == "host" else _DeviceSums(volume.shape)
    weight_sum = np.zeros(volume.shape, np.float32)
    for first in range(0, len(starts), batch_size):
        batch_starts = starts[first : first + batch_size]
        filled = batch_starts + batch_starts[-1:] * (batch_size - len(batch_starts))
        tiles = np.stack([volume[_tile(start, patch)] for start in filled])[..., None]
        logits = forward(tiles, flips[0], table, share)
        for flip in flips[1:]:
            logits = logits + forward(tiles, flip, table, share)
        sums.add(logits, batch_starts, patch)
        for start in batch_starts:
            weight_sum[_tile(start, patch)] += weights
    if not starts:
        shape = jax.eval_shape(
            forward,
            jax.ShapeDtypeStruct((batch_size, *patch, 1), jnp.float32),
            flips[0],
            table,
            share,
        ).shape
        sums.allocate(shape[1])
    return sums.finish(weight_sum, output)[inside]


def _check(
    volume: np.ndarray,
    patch: tuple[int, ...],
    overlap: float,
    axes: tuple[int, ...],
    batch_size: int,
    output: str,
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


def _tile(start: Sequence[int], patch: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(low, low + size) for low, size in zip(start, patch, strict=True))


def _forward(apply: Callable[[Any], Any]) -> Callable[..., Float32[Array, "b c x y z"]]:
    """Returns the compiled step of a network: one flip's weighted logits of a tile batch."""
    if isinstance(apply, nnx.Module):
        return functools.partial(_forward_with_weights, Partial(_apply_module, *nnx.split(apply)))
    if isinstance(apply, Partial):
        return functools.partial(_forward_with_weights, apply)
    return _forward_of_callable(apply)


@functools.lru_cache(maxsize=8)
def _forward_of_callable(apply: Callable[[Any], Any]) -> Callable[..., Any]:
    # jax.jit would keep every closure, with its weights, for the life of the process.
    return jax.jit(functools.partial(_weighted_logits, apply))


def _apply_module(graph: nnx.GraphDef, state: Any, x: Float[Array, "b x y z 1"]) -> Any:
    return nnx.merge(graph, state)(x)


def _weighted_logits(
    apply: Callable[[Any], Any],
    tiles: Float[Array, "b x y z 1"],
    flip: Bool[Array, "3"],
    table: Array | None,
    weights: Float32[Array, "x y z"],
) -> Float32[Array, "b c x y z"]:
    # The flips are values, not code: one copy of the network serves all of them.
    logits = apply(_flipped(tiles, flip))
    if isinstance(logits, (list, tuple)):
        logits = logits[0]
    logits = _flipped(logits.astype(jnp.float32), flip)
    if table is not None:
        logits = jnp.where(flip[0], logits[..., table], logits)
    return jnp.moveaxis(logits * weights[..., None], -1, 1)


_forward_with_weights = jax.jit(_weighted_logits)


def _flipped(x: Array, flip: Bool[Array, "3"]) -> Array:
    for axis in range(3):
        x = jnp.where(flip[axis], jnp.flip(x, axis + 1), x)
    return x


class _HostSums:
    """Weighted logits summed in the host's memory."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.total: np.ndarray | None = None

    def allocate(self, classes: int) -> None:
        self.total = np.zeros((classes, *self.shape), np.float32)

    def add(self, logits: Any, starts: Sequence[Sequence[int]], patch: tuple[int, ...]) -> None:
        logits = np.asarray(logits)
        if self.total is None:
            self.allocate(logits.shape[1])
        assert self.total is not None
        for values, start in zip(logits, starts, strict=False):
            self.total[(slice(None), *_tile(start, patch))] += values

    def finish(self, weight_sum: np.ndarray, output: str) -> Float32[np.ndarray, "x y z c"]:
        assert self.total is not None
        # One slab at a time, in place: no second array of classes x voxels.
        for x in range(self.shape[0]):
            slab = self.total[:, x]
            covered = weight_sum[x] > 0
            np.divide(slab, weight_sum[x], out=slab, where=covered)
            slab[0][~covered], slab[1:, ~covered] = 0, AIR_LOGIT
            if output == "probabilities":
                slab -= slab.max(axis=0)
                np.exp(slab, out=slab)
                slab /= slab.sum(axis=0)
        return np.moveaxis(self.total, 0, -1)


class _DeviceSums:
    """Weighted logits summed in the device's memory, in one donated buffer."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.bucket = tuple(-(-size // BUCKET) * BUCKET for size in shape)
        self.total: Any = None

    def allocate(self, classes: int) -> None:
        self.total = jnp.zeros((classes, *self.bucket), jnp.float32)

    def add(self, logits: Any, starts: Sequence[Sequence[int]], patch: tuple[int, ...]) -> None:
        if self.total is None:
            self.allocate(logits.shape[1])
        for index, start in enumerate(starts):
            self.total = _add_tile(self.total, logits, np.int32(index), np.array(start, np.int32))

    def finish(self, weight_sum: np.ndarray, output: str) -> Float32[np.ndarray, "x y z c"]:
        padding = [(0, b - s) for b, s in zip(self.bucket, self.shape, strict=True)]
        result = _normalized(
            self.total, np.pad(weight_sum, padding), softmax=output == "probabilities"
        )
        inside = tuple(slice(0, size) for size in self.shape)
        return np.moveaxis(np.asarray(result), 0, -1)[inside]


@functools.partial(jax.jit, donate_argnums=0)
def _add_tile(
    total: Float32[Array, "c X Y Z"],
    logits: Float32[Array, "b c x y z"],
    index: Array,
    start: Array,
) -> Float32[Array, "c X Y Z"]:
    values = jax.lax.dynamic_index_in_dim(logits, index, keepdims=False)
    at = (0, *start)
    old = jax.lax.dynamic_slice(total, at, values.shape)
    return jax.lax.dynamic_update_slice(total, old + values, at)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="softmax")
def _normalized(
    total: Float32[Array, "c X Y Z"], weight_sum: Float32[Array, "X Y Z"], softmax: bool
) -> Float32[Array, "c X Y Z"]:
    covered = weight_sum > 0
    logits = total / jnp.where(covered, weight_sum, 1)
    is_background = (jnp.arange(total.shape[0]) == 0)[:, None, None, None]
    logits = jnp.where(covered, logits, jnp.where(is_background, 0, AIR_LOGIT))
    return jax.nn.softmax(logits, axis=0) if softmax else logits
