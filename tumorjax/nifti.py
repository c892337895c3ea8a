"""CT scans from NIfTI files, and masks on the same grid back into such files."""

import gzip
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import nibabel as nib
import numpy as np
from jaxtyping import Float, Num, UInt8
from nibabel.filebasedimages import ImageFileError
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError

from tumorjax.errors import CaseError, UserError
from tumorjax.files import write_bytes_atomic
from tumorjax.geometry import check_affine, spacing_of

ENDINGS = (".nii.gz", ".nii")

# Millimetres between voxels that a CT of a body can have.
SPACING_RANGE = (0.1, 20.0)
# A CT of anything spans more HU than this; images scaled to 0..1 do not.
LEAST_HU_RANGE = 50.0
# Every CT of a body has air or fat in it; images that were scaled or shifted have not.
AIR_HU = -50.0

# All of a header that says where the voxels lie. The rest describes values, or is free text that
# may name a patient.
_GRID_FIELDS = (
    *("xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


class Scan(NamedTuple):
    """A CT as its file has it.

    Attributes:
        image: HU, axes as in the file.
        affine: from voxel index to mm in RAS+.
        header: NIfTI header of the file; of a DICOM series, one made for its grid.
        name: of the file, for messages.
        slices: of a DICOM series its files, in the order of the last axis.
    """

    image: Num[np.ndarray, "i j k"]
    affine: Float[np.ndarray, "4 4"]
    header: Any
    name: str = ""
    slices: tuple[Path, ...] = ()


def read_ct(
    path: str | os.PathLike, allow_channel: bool = False, least_range: float = LEAST_HU_RANGE
) -> Scan:
    """Reads a CT scan and checks that it can be one.

    Args:
        path: of the file.
        allow_channel: accept a fourth axis of length 1, as some data sets have it.
        least_range: that values must span; 0 for images in other units than HU.

    Raises:
        CaseError: the file is not readable to its end, not a 3D image of finite HU, or its affine
            or spacing cannot be that of a scan.
    """
    path = Path(path)
    name = str(path)
    try:
        if path.stat().st_size == 0:
            raise CaseError(name, "the file is empty", "Copy or convert it again")
        file = cast(nib.Nifti1Image, nib.load(path))
        _check_kind(name, file, allow_channel)
        check_pixdim(name, file)
        stored = cast(Any, file.dataobj)
        unscaled = (stored.slope, stored.inter) == (1, 0)
        stored_as_hu = unscaled and file.get_data_dtype().kind in "iu"
        # Whole numbers stay what they are: half the memory of float32.
        image = np.asanyarray(stored, None if stored_as_hu else np.float32)
        image = image[..., 0] if image.ndim == 4 else image
        affine = np.asarray(file.affine, np.float64)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        # Only the kind of error: its text may quote the header.
        raise CaseError(
            name,
            f"not readable to its end as NIfTI ({type(error).__name__})",
            "Copy or convert it again",
        ) from error
    check_grid(name, affine)
    check_values(name, image, least_range)
    return Scan(image, affine, file.header, name)


def check_grid(name: str, affine: Float[np.ndarray, "4 4"]) -> None:
    """Checks that an affine can be that of a scan of a body.

    Raises:
        CaseError: it is singular or not finite, or the spacing is out of range.
    """
    try:
        check_affine(affine)
    except UserError as error:
        raise CaseError(name, str(error), "Convert the scan again") from error
    low, high = SPACING_RANGE
    spacing = spacing_of(affine)
    if not all(low <= size <= high for size in spacing):
        raise CaseError(
            name,
            f"spacing {' x '.join(f'{size:g}' for size in spacing)} mm, expected {low} to {high}",
            "Correct the header (are its units millimetres?)",
        )


def check_values(
    name: str, image: Num[np.ndarray, "i j k"], least_range: float = LEAST_HU_RANGE
) -> None:
    """Checks that an image is finite and not constant.

    Args:
        name: for the message.
        image: the scan's values.
        least_range: that they must span.

    Raises:
        CaseError: it is not.
    """
    if not np.isfinite(image.min()) or not np.isfinite(image.max()):
        count = int(np.sum(~np.isfinite(image)))
        raise CaseError(name, f"{count} voxels are NaN or infinite", "Convert the scan again")
    if float(image.max()) - float(image.min()) < least_range:
        raise CaseError(
            name,
            f"values run from {image.min():g} to {image.max():g}, which is no CT in HU",
            "Give the scan in Hounsfield units, not scaled",
        )


def check_hu(name: str, image: Num[np.ndarray, "x y z"]) -> None:
    """Checks that values are Hounsfield units.

    Raises:
        CaseError: there is neither air nor fat in them, or nothing denser.
    """
    low, high = float(image.min()), float(image.max())
    if low > AIR_HU or high < 0:
        raise CaseError(
            name,
            f"values from {low:g} to {high:g} are no Hounsfield units, whose air is about -1000",
            "Give the CT in HU, not scaled or shifted",
        )


def write_mask(path: str | os.PathLike, mask: UInt8[np.ndarray, "i j k"], like: Any) -> None:
    """Writes a mask onto the grid of a scan, see `write_image`."""
    write_image(path, np.asarray(mask, np.uint8), like)


def write_image(path: str | os.PathLike, image: Num[np.ndarray, "i j k"], like: Any) -> None:
    """Writes a volume onto the grid of a scan, whole or not at all, in the array's own type.

    Codes, units and both affines are the scan's to the bit. Text fields and extensions stay
    behind: they may name a patient. Equal volumes make equal files.

    Args:
        path: ending in .nii.gz.
        image: axes as in the scan's file.
        like: the scan's NIfTI header.

    Raises:
        OSError: the file cannot be written.
    """
    header = type(like)()
    header.set_data_dtype(image.dtype)
    header.set_data_shape(image.shape)
    header["pixdim"][:4] = like["pixdim"][:4]
    for field in _GRID_FIELDS:
        header[field] = like[field]
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    data = kind(image, None, header).to_bytes()
    write_bytes_atomic(path, gzip.compress(data, compresslevel=4, mtime=0))


def _check_kind(name: str, file: Any, allow_channel: bool) -> None:
    if not isinstance(file, (nib.Nifti1Image, nib.Nifti2Image)):
        raise CaseError(name, f"a {type(file).__name__}, expected NIfTI", "Convert it to NIfTI")
    kind = file.get_data_dtype()
    if kind.fields is not None or kind.kind not in "iuf":
        what = "an RGB image" if kind.fields is not None else f"an image of {kind} values"
        raise CaseError(name, f"{what}, expected one number a voxel", "Give the CT itself")
    if len(file.shape) != 3 and not (allow_channel and file.shape[3:] == (1,)):
        shape = " x ".join(map(str, file.shape))
        raise CaseError(
            name, f"{len(file.shape)}D ({shape}), expected a 3D scan", "Give one phase a file"
        )
    if 0 in file.shape:
        raise CaseError(name, f"no voxels (shape {file.shape})", "Convert the scan again")


def check_pixdim(name: str, file: Any) -> None:
    """Checks that a NIfTI file's voxel sizes are positive numbers.

    Raises:
        CaseError: they are not.
    """
    # Nibabel repairs a negative or zero voxel size while it reads, so the field is read unrepaired.
    with ImageOpener(file.get_filename()) as raw:
        header = type(file.header).from_fileobj(raw, check=False)
    sizes = np.asarray(header["pixdim"][1:4], float)
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise CaseError(
            name,
            f"voxel size {' x '.join(f'{size:g}' for size in sizes)} mm, expected positive numbers",
            "Correct pixdim in the header",
        )
