"""Label files of one scan: read, checked, mapped to the ids of anatomy and united."""

import zlib
from collections.abc import Iterable, Mapping
from typing import cast

import nibabel as nib
import numpy as np
from jaxtyping import Float, Num, UInt8
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage

from data_prep.sources import IGNORED, PAIRED, LabelFile
from tumorjax import anatomy
from tumorjax.errors import CaseError
from tumorjax.geometry import spacing_of
from tumorjax.metrics.components import label_components

# Two grids are the same when their corners lie no farther apart than this share of a voxel:
# programs write affines with single precision and by way of quaternions.
_SAME_GRID = 0.05
# A pair whose sides are not told apart yet ("kidney") has an id from here on.
_FIRST_PAIR = 200
_PAIR_IDS = {name: _FIRST_PAIR + index for index, name in enumerate(PAIRED)}
# Which label hides another: the larger id, but pairs count as organs.
_STRENGTH = np.arange(256, dtype=np.uint8)
_STRENGTH[_FIRST_PAIR:] = 1
# HU above which a voxel is body rather than air.
_BODY_HU = -300


def read_labels(
    files: Iterable[LabelFile],
    shape: tuple[int, ...],
    affine: Float[np.ndarray, "4 4"],
    allow_channel: bool = False,
) -> UInt8[np.ndarray, "i j k"]:
    """Reads a scan's label files into one volume.

    Where files overlap, the larger id wins: vessels over the organ that they run through, tumours
    over all organs. Pairs without a side get ids of their own, see `split_sides`.

    Args:
        files: with the names of their values.
        shape: of the image, as in its file.
        affine: of the image.
        allow_channel: accept [i, j, k, 1].

    Returns:
        uint8 [i, j, k], axes as in the files.

    Raises:
        CaseError: a file is not readable, not a volume of whole numbers, on another grid than the
            image, or has unknown values.
    """
    united = np.zeros(shape, np.uint8, order="F")
    for file in files:
        labels = _read(file, shape, affine, allow_channel)
        # Few voxels of most files are not 0, so the rest is not touched.
        where = np.flatnonzero(labels.ravel(order="F"))
        values = labels.ravel(order="F")[where]
        counts = np.bincount(values, minlength=256)
        unknown = [int(value) for value in np.flatnonzero(counts) if value not in file.names]
        if unknown:
            raise CaseError(
                file.path.name,
                f"unknown label values {', '.join(map(str, unknown))}; known are"
                f" {', '.join(map(str, [0, *sorted(file.names)]))}",
                "Correct the file, or name the values in the source's table of labels",
            )
        new = _table(file.names)[values]
        flat = united.ravel(order="F")
        old = flat[where]
        flat[where] = np.where(_STRENGTH[new] > _STRENGTH[old], new, old)
    return united


def split_sides(
    label: UInt8[np.ndarray, "x y z"], image: Num[np.ndarray, "x y z"]
) -> UInt8[np.ndarray, "x y z"]:
    """Gives each part of a pair without sides its side, left or right of the body's middle.

    A part is a 26-connected component; its side is that of its centre. The middle is the mean of
    the body's voxels.

    Args:
        label: from `read_labels`, RAS+.
        image: HU, same grid.

    Returns:
        Labels with the ids of anatomy only.
    """
    pairs = [name for name, number in _PAIR_IDS.items() if (label == number).any()]
    if not pairs:
        return label
    label = label.copy()
    # Every fourth voxel is enough for a mean.
    counts = (image[:, ::4, ::4] > _BODY_HU).sum(axis=(1, 2))
    middle = float(np.average(np.arange(len(counts)), weights=counts if counts.any() else None))
    for name in pairs:
        left, right = (anatomy.LABELS[f"{name}_{side}"] for side in ("left", "right"))
        components, count = label_components(label == _PAIR_IDS[name])
        sides = np.zeros(count + 1, np.uint8)
        for number, box in enumerate(ndimage.find_objects(components), start=1):
            inside = (components[box] == number).sum(axis=(1, 2))
            center = np.average(np.arange(len(inside)), weights=inside) + box[0].start
            # In RAS+ x grows from the patient's left to the right.
            sides[number] = right if center > middle else left
        label += sides[components] - np.uint8(_PAIR_IDS[name]) * (components > 0)
    return label


def _table(names: Mapping[int, str]) -> UInt8[np.ndarray, "256"]:
    table = np.zeros(256, np.uint8)
    for value, name in names.items():
        if name != IGNORED:
            table[value] = _PAIR_IDS[name] if name in _PAIR_IDS else anatomy.LABELS[name]
    return table


def _read(
    file: LabelFile, shape: tuple[int, ...], affine: Float[np.ndarray, "4 4"], allow_channel: bool
) -> UInt8[np.ndarray, "i j k"]:
    name = file.path.name
    try:
        if file.path.stat().st_size == 0:
            raise CaseError(name, "the file is empty", "Copy it again")
        volume = cast(nib.Nifti1Image, nib.load(file.path))
        if volume.get_data_dtype().kind not in "iuf":
            raise CaseError(
                name, f"values of type {volume.get_data_dtype()}", "Give one label a voxel"
            )
        there = volume.shape
        if allow_channel and len(there) == 4 and there[3] == 1:
            there = there[:3]
        if there != shape:
            raise CaseError(
                name,
                f"its grid differs from the image's: shape {_by(there)}, image {_by(shape)}",
                "Resample the labels to the image's grid",
            )
        data = np.asanyarray(volume.dataobj).reshape(shape, order="A")
        own = np.asarray(volume.affine, np.float64)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        # Only the kind of error: its text may quote the header.
        raise CaseError(
            name, f"not readable to its end as NIfTI ({type(error).__name__})", "Copy it again"
        ) from error
    ends = np.array(np.meshgrid(*[(0, size - 1) for size in shape])).reshape(3, -1).T
    there_mm = nib.affines.apply_affine(own, ends)
    apart = np.linalg.norm(there_mm - nib.affines.apply_affine(affine, ends), axis=1).max()
    if not apart <= _SAME_GRID * min(spacing_of(affine)):
        raise CaseError(
            name,
            f"its grid differs from the image's: corners lie up to {apart:.2f} mm apart",
            "Resample the labels to the image's grid",
        )
    with np.errstate(invalid="ignore"):
        labels = data if data.dtype == np.uint8 else data.astype(np.uint8)
    if labels is not data and not np.array_equal(labels, data):
        raise CaseError(
            name, "values that are not whole numbers from 0 to 255", "Give labels, one a voxel"
        )
    return labels


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
