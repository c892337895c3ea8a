"""Slices that show how a prediction failed, kept with each case until it is known which are worst.

Of each case: the slice where truth and prediction of all tumours differ most, the largest tumour
that no predicted voxel lies in, and the largest predicted one that touches no annotated voxel. Kept
are cuts of the label maps, a few kilobytes; scans are read later, and only those that are shown.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

from tumorjax.evaluation.cases import has_any
from tumorjax.files import read_arrays, write_bytes_atomic
from tumorjax.metrics.boxes import bounding_box
from tumorjax.metrics.components import label_components, remove_small

# What each kind of picture shows, in the order of the page.
KINDS = ("differs", "missed", "false")
# A picture is at least this wide, and has this much around what it shows, mm.
WIDTH_MM = 120.0
MARGIN_MM = 25.0


class Snapshot(NamedTuple):
    """A cut of one axial slice.

    Attributes:
        kind: one of `KINDS`.
        tumor: name of the tumour that is shown.
        volume_mm3: of the tumour that is missed or false; of all annotated ones for "differs".
        box: x and y range and z of the cut, voxels of the RAS+ volume.
        truth: label values [x, y].
        prediction: label values [x, y].
    """

    kind: str
    tumor: str
    volume_mm3: float
    box: tuple[slice, slice, int]
    truth: UInt8[np.ndarray, "x y"]
    prediction: UInt8[np.ndarray, "x y"]


def take(
    truth: UInt8[np.ndarray, "x y z"],
    prediction: UInt8[np.ndarray, "x y z"],
    spacing: Sequence[float],
    tumors: Mapping[str, int | Sequence[int]],
    settings: Mapping[str, Any],
    within: tuple[slice, ...] | None = None,
) -> list[Snapshot]:
    """Returns the snapshots of a case, at most one of each kind.

    Args:
        truth: label values [x, y, z], RAS+.
        prediction: of the same shape.
        spacing: voxel size (x, y, z), mm.
        tumors: tumour name -> its value or values.
        settings: connectivity and minimum_mm3 as for the numbers.
        within: a box that has all labels; None for the whole scan.
    """
    values = np.unique(np.hstack(list(tumors.values())))
    voxel = float(np.prod(spacing))
    within = within or tuple(slice(0, size) for size in truth.shape)
    true, predicted = has_any(truth[within], values), has_any(prediction[within], values)
    tumor_box = bounding_box(true, predicted)
    if tumor_box is None:
        return []
    true, predicted = true[tumor_box], predicted[tumor_box]
    box = tuple(
        slice(outer.start + inner.start, outer.start + inner.stop)
        for outer, inner in zip(within, tumor_box, strict=True)
    )
    connectivity = settings["connectivity"]
    predicted = remove_small(predicted, settings["minimum_mm3"] / voxel, connectivity)
    offset = [side.start for side in box]
    found = []
    if true.any() and (true != predicted).any():
        found.append(("differs", true != predicted, truth[box], true, int(true.sum())))
    for kind, mask, other, labels in (
        ("missed", true, predicted, truth[box]),
        ("false", predicted, true, prediction[box]),
    ):
        alone = _largest_alone(mask, other, connectivity)
        if alone is not None:
            found.append((kind, alone, labels, alone, int(alone.sum())))
    return [
        Snapshot(
            kind,
            _most_common(labels[named], tumors),
            size * voxel,
            cut := _cut(shown, offset, truth.shape, spacing),
            truth[cut],
            prediction[cut],
        )
        for kind, shown, labels, named, size in found
    ]


def keep(
    workdir: Path,
    case: str,
    truth: UInt8[np.ndarray, "x y z"],
    prediction: UInt8[np.ndarray, "x y z"],
    spacing: Sequence[float],
    tumors: Mapping[str, int | Sequence[int]],
    settings: Mapping[str, Any],
    within: tuple[slice, ...] | None = None,
) -> list[dict[str, Any]]:
    """Writes a case's snapshots (see `take`), and returns what the record says of them."""
    taken = take(truth, prediction, spacing, tumors, settings, within)
    path = _path(workdir, case)
    if taken:
        arrays: dict[str, Any] = {}
        for shot in taken:
            x, y, z = shot.box
            arrays[f"{shot.kind}_box"] = np.array([x.start, x.stop, y.start, y.stop, z])
            arrays[f"{shot.kind}_truth"] = shot.truth
            arrays[f"{shot.kind}_prediction"] = shot.prediction
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_bytes_atomic(path, buffer.getvalue())
    return [
        {"kind": shot.kind, "class": shot.tumor, "volume_mm3": round(shot.volume_mm3, 3)}
        for shot in taken
    ]


def read(workdir: Path, case: str, line: Mapping[str, Any]) -> Snapshot:
    """Returns the snapshot that a line of the record (see `keep`) speaks of."""
    file = read_arrays(_path(workdir, case))
    kind = line["kind"]
    x0, x1, y0, y1, z = (int(number) for number in file[f"{kind}_box"])
    return Snapshot(
        kind,
        line["class"],
        line["volume_mm3"],
        (slice(x0, x1), slice(y0, y1), z),
        file[f"{kind}_truth"],
        file[f"{kind}_prediction"],
    )


def _largest_alone(
    mask: Bool[np.ndarray, "x y z"], other: Bool[np.ndarray, "x y z"], connectivity: int
) -> Bool[np.ndarray, "x y z"] | None:
    """Returns the largest component of a mask that another mask does not touch."""
    labels, count = label_components(mask, connectivity)
    labels = np.asarray(labels)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    sizes[np.unique(labels[other])] = 0
    return labels == sizes.argmax() if sizes.any() else None


def _most_common(values: UInt8[np.ndarray, " n"], tumors: Mapping[str, int | Sequence[int]]) -> str:
    counts = {name: np.isin(values, value).sum() for name, value in tumors.items()}
    return max(counts, key=lambda name: counts[name])


def _cut(
    shown: Bool[np.ndarray, "x y z"],
    offset: Sequence[int],
    shape: Sequence[int],
    spacing: Sequence[float],
) -> tuple[slice, slice, int]:
    """Returns the slice that has most of what is shown, cut around it."""
    z = int(shown.sum(axis=(0, 1)).argmax())
    sides = []
    for axis, found in enumerate(ndimage.find_objects(shown[:, :, z].astype(np.uint8))[0]):
        length = (found.stop - found.start) * spacing[axis] + 2 * MARGIN_MM
        half = round(max(length, WIDTH_MM) / spacing[axis] / 2)
        middle = offset[axis] + (found.start + found.stop) // 2
        # Near a border the cut is moved, not made smaller.
        start = max(min(middle - half, shape[axis] - 2 * half), 0)
        sides.append(slice(start, min(start + 2 * half, shape[axis])))
    return sides[0], sides[1], offset[2] + z


def _path(workdir: Path, case: str) -> Path:
    return workdir / "cases" / f"{case}.npz"
