"""Overlap, surface and lesions of many pairs of masks at once: of classes, of cases, or of both.

Each pair is cropped to the box about its objects and its components are found once for all numbers.
On the device, boxes are padded to few sizes and pairs of one size go through the kernels together,
so that thousands of cases need few compiled programs. Pairs are taken one after the other, so that
they may come from a generator; no more than a batch of crops is kept.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tumorjax.metrics.backends import choose, on_accelerator
from tumorjax.metrics.boxes import bounding_box, common_box, padded_pair
from tumorjax.metrics.components import check_connectivity
from tumorjax.metrics.detection import LesionMatch, check_rule, decide
from tumorjax.metrics.lesion_tables import LesionTable, device_tables, empty_table, host_table
from tumorjax.metrics.overlap import as_masks, check_shapes
from tumorjax.metrics.surface import check_tolerance, near_counts, near_share
from tumorjax.metrics.surface_elements import check_spacing

# How many pairs go through the kernels together; a program is compiled for each, so there are few.
_BATCHES = (1, 4, 16, 64)
# Voxels of a batch's boxes at most: at some 100 bytes a voxel for the components' pointers and
# labels, a few gigabytes. A single pair may have more.
_VOXELS = 1 << 25

Mask = Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"]


class Comparison(NamedTuple):
    """Numbers of one pair of masks, after predicted components under the minimum are dropped."""

    dice: float  # as overlap.dice
    nsd: float  # as surface.normalized_surface_dice
    match: LesionMatch  # as detection.match_lesions


def compare_masks(
    truths: Iterable[Mask],
    predictions: Iterable[Mask],
    spacings: Iterable[Sequence[float]],
    tolerances: float | Iterable[float] = 2.0,
    rule: str = "any",
    threshold: float | None = None,
    connectivity: int = 26,
    minimum_mm3: float = 0.0,
    backend: str = "auto",
) -> list[Comparison]:
    """Returns Dice, normalized surface Dice and matched lesions of each pair of masks.

    Args:
        truths: masks [x, y, z]; pairs may differ in shape.
        predictions: masks, each of the shape of its truth.
        spacings: voxel size (x, y, z) of each pair, mm.
        tolerances: of normalized surface Dice, mm; one for all or one a pair.
        rule: how lesions are matched, see `detection.match_lesions`.
        threshold: the rule's share, 0..1; None takes the rule's own.
        connectivity: 6, 18 or 26.
        minimum_mm3: predicted components smaller than this are dropped first.
        backend: host, device or auto; see `backends.choose`. auto looks at the first pair.

    Returns:
        A comparison for each pair, in their order.

    Raises:
        ValueError: the four do not have equally many entries, shapes of a pair differ, or an
            argument is not usable.
    """
    threshold = check_rule(rule, threshold)
    check_connectivity(connectivity)
    pairs = _pairs(truths, predictions, spacings, tolerances, minimum_mm3)
    first = next(pairs, None)
    if first is None:
        return []
    where = choose(backend, first.truth, first.prediction)
    measure = _on_device if where == "device" else _on_host
    results: dict[int, Comparison] = {}
    for number, pair, table, nsd in measure(_chain(first, pairs), connectivity):
        match = decide(table, pair.spacing.tolist(), rule, threshold)
        results[number] = Comparison(table.dice, nsd, match)
    return [results[number] for number in range(len(results))]


def compare_labels(
    truth: Int[Array, "x y z"] | Int[np.ndarray, "x y z"],
    prediction: Int[Array, "x y z"] | Int[np.ndarray, "x y z"],
    spacing: Sequence[float],
    classes: Mapping[str, int | Sequence[int]],
    tolerance: float | Mapping[str, float] = 2.0,
    rule: str = "any",
    threshold: float | None = None,
    connectivity: int = 26,
    minimum_mm3: float = 0.0,
    backend: str = "auto",
) -> dict[str, Comparison]:
    """Returns the numbers of each class of one scan.

    Args:
        truth: labels [x, y, z], 0 is background.
        prediction: labels of the same shape.
        spacing: voxel size (x, y, z), mm.
        classes: name -> its label, or the labels that it unites.
        tolerance: of normalized surface Dice, mm; one for all, or one for each class.
        rule: see `compare_masks`, likewise the others.
        threshold: the rule's share, 0..1.
        connectivity: 6, 18 or 26.
        minimum_mm3: predicted components smaller than this are dropped first.
        backend: host, device or auto.

    Returns:
        Class name -> comparison.

    Raises:
        ValueError: shapes differ, or an argument is not usable.
    """
    check_shapes(truth, prediction, ndim=3)
    # Both are read once; classes are then told apart in what is not background.
    box = common_box(truth, prediction) or (slice(0, 0),) * 3
    truth, prediction = truth[box], prediction[box]
    limits = [tolerance[name] if isinstance(tolerance, Mapping) else tolerance for name in classes]
    results = compare_masks(
        (_is_any(truth, labels) for labels in classes.values()),
        (_is_any(prediction, labels) for labels in classes.values()),
        [spacing] * len(classes),
        limits,
        rule,
        threshold,
        connectivity,
        minimum_mm3,
        backend,
    )
    return dict(zip(classes, results, strict=True))


class _Pair(NamedTuple):
    truth: Array | np.ndarray
    prediction: Array | np.ndarray
    spacing: Float[np.ndarray, "3"]
    tolerance: float
    minimum: float  # voxels


def _pairs(
    truths: Iterable[Mask],
    predictions: Iterable[Mask],
    spacings: Iterable[Sequence[float]],
    tolerances: float | Iterable[float],
    minimum_mm3: float,
) -> Iterator[_Pair]:
    rest: list[Iterable] = [truths, predictions, spacings]
    if isinstance(tolerances, Iterable):
        rest.append(tolerances)
    for truth, prediction, spacing, *limit in zip(*rest, strict=True):
        check_shapes(truth, prediction, ndim=3)
        voxel = check_spacing(spacing)
        tolerance = check_tolerance(limit[0] if limit else tolerances)
        yield _Pair(truth, prediction, voxel, tolerance, minimum_mm3 / float(np.prod(voxel)))


def _chain(first: _Pair, others: Iterator[_Pair]) -> Iterator[tuple[int, _Pair]]:
    yield 0, first
    yield from enumerate(others, start=1)


_Measured = Iterator[tuple[int, _Pair, LesionTable, float]]


def _on_host(pairs: Iterator[tuple[int, _Pair]], connectivity: int) -> _Measured:
    for number, pair in pairs:
        truth, prediction = as_masks(pair.truth, pair.prediction)
        box = bounding_box(truth, prediction)
        if box is None:
            yield number, pair, empty_table(), float("nan")
            continue
        table, kept = host_table(
            truth[box], prediction[box], pair.spacing.tolist(), pair.minimum, connectivity
        )
        counts = near_counts(truth[box], kept, pair.spacing, pair.tolerance)
        yield number, pair, table, near_share(counts, pair.spacing)


_Crop = tuple[int, _Pair, tuple[int, int, int]]


def _on_device(pairs: Iterator[tuple[int, _Pair]], connectivity: int) -> _Measured:
    waiting: defaultdict[tuple[int, ...], list[_Crop]] = defaultdict(list)
    for number, pair in pairs:
        crop = padded_pair(pair.truth, pair.prediction)
        if crop is None:
            yield number, pair, empty_table(), float("nan")
            continue
        *masks, shape = crop
        size = masks[0].shape
        # A pair's own arrays are let go, whole volumes as they may be.
        waiting[size].append((number, pair._replace(truth=masks[0], prediction=masks[1]), shape))
        largest = max(count for count in _BATCHES if count == 1 or count * masks[0].size <= _VOXELS)
        if len(waiting[size]) == largest:
            yield from _together(waiting.pop(size), connectivity)
    for group in waiting.values():
        while group:
            count = max(count for count in _BATCHES if count <= len(group))
            yield from _together(group[:count], connectivity)
            del group[:count]


def _together(group: Sequence[_Crop], connectivity: int) -> _Measured:
    from tumorjax.metrics import surface_kernels

    numbers, pairs, shapes = zip(*group, strict=True)
    truths = _stacked([pair.truth for pair in pairs])
    predictions = _stacked([pair.prediction for pair in pairs])
    spacings, limits = [pair.spacing for pair in pairs], [pair.tolerance for pair in pairs]
    tables, kept = device_tables(
        truths, predictions, spacings, [pair.minimum for pair in pairs], connectivity
    )
    counts = surface_kernels.near_counts(truths, kept, shapes, spacings, limits)
    for number, pair, table, count in zip(numbers, pairs, tables, counts, strict=True):
        if table is None:
            yield from _on_host(iter([(number, pair)]), connectivity)
        else:
            yield number, pair, table, near_share(count, pair.spacing)


def _stacked(masks: Sequence[Array | np.ndarray]) -> Array | np.ndarray:
    if not on_accelerator(masks[0]):
        return np.stack([np.asarray(mask) for mask in masks])
    import jax.numpy as jnp

    return jnp.stack(masks)


def _is_any(
    labels: Array | np.ndarray, values: int | Sequence[int]
) -> Bool[Array, "x y z"] | Bool[np.ndarray, "x y z"]:
    first, *others = np.atleast_1d(values).tolist()
    mask = labels == first
    for value in others:
        mask = mask | (labels == value)
    return mask
