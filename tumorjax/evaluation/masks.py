"""Folders of masks as other programs write them: one NIfTI file a case, labels as values."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
from jaxtyping import Float, Int, UInt8
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from tumorjax.anatomy import LABELS
from tumorjax.errors import CaseError, UserError
from tumorjax.geometry import check_affine, spacing_of, to_canonical
from tumorjax.nifti import ENDINGS, check_pixdim

# Two grids are the same when their corners are no farther apart than this share of a voxel:
# programs write affines with single precision and by way of quaternions.
_SAME_GRID = 0.05
# Voxels whose values are counted at once.
_CHUNK = 1 << 15


def list_masks(folder: str | Path) -> dict[str, list[Path]]:
    """Returns the NIfTI files of a folder by case: the file's name without its ending.

    Raises:
        UserError: there is no such folder, or no NIfTI file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Expected one NIfTI file per case in it")
    masks: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        ending = next((e for e in ENDINGS if path.name.endswith(e)), None)
        if ending and not path.name.startswith("."):
            masks.setdefault(path.name.removesuffix(ending), []).append(path)
    if not masks:
        raise UserError(f"{folder}: no .nii.gz or .nii file in it. Expected one per case")
    return masks


def read_labels(path: str) -> dict[str, int | tuple[int, ...]]:
    """Returns label names with their values: anatomy's, or those of an nnU-Net dataset.json.

    Args:
        path: of a dataset.json; empty for the ids of anatomy.py.

    Returns:
        Name -> value, or values where nnU-Net has a region. Background is left out.

    Raises:
        UserError: the file is missing, has no labels, or asks for voxels to be ignored.
    """
    if not path:
        return dict(LABELS)
    try:
        entries = json.loads(Path(path).read_text())["labels"]
        # Data sets before nnU-Net v2 (and the Decathlon) have value -> name.
        if all(str(key).isdigit() for key in entries):
            entries = {name: int(value) for value, name in entries.items()}
        labels = {
            name: int(value) if isinstance(value, int) else tuple(int(part) for part in value)
            for name, value in entries.items()
            if name != "background" and value != 0
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: no labels to read ({error!r}). Expected an nnU-Net dataset.json with"
            ' "labels": {"background": 0, "name": value, ...}'
        ) from error
    if "ignore" in labels:
        raise UserError(
            f"{path}: has the label ignore, and surfaces and lesions need the whole truth. Leave"
            " it out, and those cases too"
        )
    out_of_range = {n: v for n, v in labels.items() if not (0 < np.min(v) <= np.max(v) <= 255)}
    if out_of_range:
        raise UserError(f"{path}: label values {out_of_range}. Expected values from 1 to 255")
    return labels


def read_pair(
    truth: Path, prediction: Path, labels: Mapping[str, int | Sequence[int]]
) -> tuple[UInt8[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"], tuple[float, float, float]]:
    """Reads a case's two masks, which must lie on the same grid.

    Args:
        truth: NIfTI file of the true labels.
        prediction: NIfTI file of the predicted ones.
        labels: label name -> value or values that the files may hold beside 0.

    Returns:
        Both masks [x, y, z] with axes as close to RAS+ as flips and swaps can bring them (so that
        slices along z are axial), and the spacing (x, y, z) in mm.

    Raises:
        CaseError: a file is not readable, not a mask of known labels, or the grids differ.
    """
    known = np.unique(np.hstack([0, *labels.values()]))
    true_mask, affine = _read_mask(truth, known)
    predicted_mask, other = _read_mask(prediction, known)
    if true_mask.shape != predicted_mask.shape:
        raise CaseError(
            str(prediction),
            f"shape {predicted_mask.shape}, where the truth has {true_mask.shape}",
            "Bring the prediction back to the scan's own grid",
        )
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in true_mask.shape])).reshape(3, -1)
    ends = nib.affines.apply_affine(affine, corners.T), nib.affines.apply_affine(other, corners.T)
    apart = np.linalg.norm(ends[0] - ends[1], axis=1).max()
    if apart > _SAME_GRID * min(spacing_of(affine)):
        raise CaseError(
            str(prediction),
            f"its corners lie up to {apart:.2f} mm away from the truth's (affines differ)",
            "Bring the prediction back to the scan's own grid",
        )
    true_mask, turned = to_canonical(true_mask, affine)
    predicted_mask, _ = to_canonical(predicted_mask, affine)
    return true_mask, predicted_mask, spacing_of(turned)


def _read_mask(
    path: Path, known: np.ndarray
) -> tuple[UInt8[np.ndarray, "i j k"], Float[np.ndarray, "4 4"]]:
    try:
        image = cast(nib.Nifti1Image, nib.load(path))
        check_pixdim(str(path), image)
        data = np.asanyarray(image.dataobj)
        affine = np.asarray(image.affine, dtype=np.float64)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        # Only the kind of error: its text may quote the header.
        raise CaseError(
            str(path),
            f"not readable to its end as NIfTI ({type(error).__name__})",
            "Write or copy the file again",
        ) from error
    if data.dtype.fields is not None or data.ndim != 3:
        what = "an RGB image" if data.dtype.fields is not None else f"{data.ndim}D {data.shape}"
        raise CaseError(str(path), f"it is {what}, expected a 3D mask", "Give one label map a case")
    if not data.size:
        raise CaseError(str(path), f"it has no voxels ({data.shape})", "Write the file again")
    try:
        check_affine(affine)
    except UserError as error:
        raise CaseError(str(path), str(error), "Correct the file's header") from error
    with np.errstate(invalid="ignore"):
        mask = data.astype(np.uint8, copy=False)
    if mask is not data and not np.array_equal(mask, data):
        raise CaseError(
            str(path),
            f"values from {data.min()} to {data.max()} that are not whole numbers 0 to 255",
            "Give label maps, not probabilities",
        )
    unknown = np.setdiff1d(_values(mask), known)
    if len(unknown):
        raise CaseError(
            str(path),
            f"unknown label values {', '.join(map(str, unknown))}; known are"
            f" {', '.join(map(str, known))}",
            "Set config.labels to the data set's dataset.json",
        )
    return mask, affine


def _values(mask: UInt8[np.ndarray, "i j k"]) -> Int[np.ndarray, " values"]:
    """Returns the values that a mask has."""
    flat = mask.ravel(order="K")  # as it lies in memory
    counts = np.zeros(256, np.int64)
    for start in range(0, flat.size, _CHUNK):  # numpy counts in eight-byte integers
        part = flat[start : start + _CHUNK]
        if part.max():  # most of a scan is background, and finding that out is cheap
            counts += np.bincount(part, minlength=256)
        else:
            counts[0] += part.size
    return np.flatnonzero(counts)
