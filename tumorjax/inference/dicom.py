"""CT series in DICOM: found, checked and read (with pydicom and SimpleITK, the extra "dicom").

Of the headers only what says where the slices lie is read. Names, dates and other identifiers of
patients are neither looked at nor kept.
"""

import functools
import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float, Num

from tumorjax.errors import CaseError, UserError
from tumorjax.nifti import ENDINGS, LEAST_HU_RANGE, Scan, check_grid, check_values

# How far a slice may lie from where even spacing puts it: positions are often rounded to 0.1 mm.
_UNEVEN_MM, _UNEVEN_SHARE = 0.06, 0.01
# Objects that belong to a study and are no images to segment.
_NO_SCANS = (
    *("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "REG", "SR", "PR", "KO", "DOC"),
    *("FID", "PLAN", "STAIN", "AU", "TEXTUREMAP", "HC"),
)
_FIND_TAGS = ("SeriesInstanceUID", "Modality", "ImageType")
_GRID_TAGS = (
    *("Modality", "NumberOfFrames", "SamplesPerPixel", "Rows", "Columns", "PixelSpacing"),
    *("ImagePositionPatient", "ImageOrientationPatient", "SOPInstanceUID"),
)
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def required(name: str) -> Any:
    """Returns a package of the extra "dicom".

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f'DICOM needs the package {error.name or name}. Run pip install "tumorjax[dicom]"'
        ) from error


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


# ---------------------------------------------------------------------------- finding


def find_series(
    folder: Path,
) -> tuple[list[tuple[str, Path, tuple[Path, ...]]], list[dict[str, str]]]:
    """Returns the CT series below a folder.

    Files are told apart by the series that their header names, wherever they lie. Objects that are
    no scans (segmentations, reports, localizers and the like) are passed over.

    Returns:
        (name, folder, files) of each series of CT slices. The name is made of the folders that lead
        to it; where that is not enough, a hash of the series' UID is added to it.
        Rows (case, stage, reason) of series of other modalities and unreadable headers.

    Raises:
        UserError: there are DICOM files, and the extra "dicom" is not installed.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(ENDINGS) and is_dicom(path)
    ]
    if not files:
        return [], []
    rows = []
    groups: dict[str, list[Path]] = {}
    modality: dict[str, str] = {}
    for path in files:
        try:
            header = _header(path, _FIND_TAGS)
            uid, kind = str(header.SeriesInstanceUID), str(header.get("Modality", ""))
        except CaseError as error:
            rows.append(_row(_joined(path.relative_to(folder).with_suffix("")), str(error)))
            continue
        except AttributeError:
            reason = f"{path}: its header names no series. Export the study again"
            rows.append(_row(_joined(path.relative_to(folder).with_suffix("")), reason))
            continue
        if kind in _NO_SCANS or "LOCALIZER" in (header.get("ImageType") or ()):
            continue
        groups.setdefault(uid, []).append(path)
        modality[uid] = kind
    places = {uid: _common_folder(paths) for uid, paths in groups.items()}
    series = []
    for uid, paths in groups.items():
        place = places[uid]
        name = _joined(place.relative_to(folder)) or folder.resolve().name
        if list(places.values()).count(place) > 1:
            name += f"_{hashlib.sha256(uid.encode()).hexdigest()[:8]}"
        if modality[uid] != "CT":
            kind = modality[uid] or "no modality"
            rows.append(_row(name, f"{place}: a series of {kind}, expected CT. Leave it out"))
            continue
        series.append((name, place, tuple(paths)))
    return series, rows


def _common_folder(paths: Sequence[Path]) -> Path:
    common = paths[0].parent
    while not all(common in path.parents for path in paths):
        common = common.parent
    return common


def _joined(path: Path) -> str:
    return "_".join(path.parts)


def _row(case: str, reason: str) -> dict[str, str]:
    return {"case": case, "stage": "find", "reason": reason}


def _header(path: Path, tags: Sequence[str] | None) -> Any:
    """Reads the header of a file, of it only some elements, or all with None."""
    pydicom = _pydicom()
    try:
        return pydicom.dcmread(
            path, stop_before_pixels=True, specific_tags=None if tags is None else list(tags)
        )
    except Exception as error:  # A damaged file can raise anything there.
        # Only the kind of error: its text may quote the header.
        raise CaseError(
            str(path), f"not readable as DICOM ({type(error).__name__})", "Export the series again"
        ) from error


def headers(slices: Sequence[Path]) -> list[Any]:
    """Returns the whole headers of a series' files: for what has to name its source.

    Raises:
        CaseError: one is not readable.
    """
    return [_header(path, None) for path in slices]


# ---------------------------------------------------------------------------- reading


def read_series(name: str, slices: Sequence[Path], least_range: float = LEAST_HU_RANGE) -> Scan:
    """Reads a series of CT slices and checks that it is a whole, even stack.

    A tilted gantry's stack is taken as it is: its affine is sheared.

    Args:
        name: for messages.
        slices: the files, in any order.
        least_range: that values must span.

    Returns:
        The scan: axes are columns, rows and slices, these along the normal of the rows and columns.
        The affine is RAS+ as NIfTI's, which is DICOM's with the first two axes reversed.

    Raises:
        CaseError: slices are missing, doubled, unevenly spaced, of different sizes or directions,
            several in one file, no CT, or not readable.
    """
    found = [_header(path, _GRID_TAGS) for path in slices]
    _check_kinds(name, found)
    order, affine = _stack(name, found)
    check_grid(name, affine)
    files = tuple(slices[index] for index in order)
    image = _pixels(name, files, (int(found[0].Columns), int(found[0].Rows)))
    check_values(name, image, least_range)
    return Scan(image, affine, _nifti_header(image, affine), name, files)


def _check_kinds(name: str, found: Sequence[Any]) -> None:
    for header in found:
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise CaseError(
                name,
                f"multi-frame DICOM ({int(header.NumberOfFrames)} slices in one file)",
                "Convert it to one file a slice, or to NIfTI",
            )
        if header.get("Modality") != "CT":
            kind = header.get("Modality") or "no modality"
            raise CaseError(name, f"a slice of {kind}, expected CT", "Leave it out")
        if int(header.get("SamplesPerPixel") or 1) != 1:
            raise CaseError(
                name, "slices in colour, expected one number a pixel", "Give the CT itself"
            )
        missing = [tag for tag in _GRID_TAGS[3:] if header.get(tag) in (None, "", [])]
        if missing:
            raise CaseError(
                name, f"a slice without {', '.join(missing)}", "Export the series again"
            )
    if len(found) < 2:
        raise CaseError(name, "one slice, expected a stack of them", "Export the whole series")
    for tag in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        values = np.array([np.atleast_1d(header.get(tag)).astype(float) for header in found])
        if not np.isfinite(values).all() or np.abs(values - values[0]).max() > 1e-3:
            raise CaseError(
                name,
                f"slices differ in {tag}",
                "Split what are several stacks in one series, or convert it to NIfTI",
            )


def _stack(name: str, found: Sequence[Any]) -> tuple[list[int], Float[np.ndarray, "4 4"]]:
    """Returns the order of the slices along their normal, and the affine."""
    across, down = np.array(found[0].ImageOrientationPatient, float).reshape(2, 3)
    row_size, column_size = (float(size) for size in found[0].PixelSpacing)
    positions = np.array([header.ImagePositionPatient for header in found], float)
    normal = np.cross(across, down)
    if not np.isfinite(positions).all() or not 0.99 < np.linalg.norm(normal) < 1.01:
        raise CaseError(
            name,
            "positions or directions of its slices that are no numbers or not at right angles",
            "Export the series again",
        )
    along = positions @ normal
    order = [int(index) for index in np.argsort(along, kind="stable")]
    along, positions = along[order], positions[order]
    _check_even(name, along)
    step = (positions[-1] - positions[0]) / (len(order) - 1)
    astray = positions - positions[0] - np.arange(len(order))[:, None] * step
    spacing = along[1] - along[0]
    if np.linalg.norm(astray, axis=1).max() > _UNEVEN_MM * 2 + _UNEVEN_SHARE * spacing:
        raise CaseError(
            name,
            f"slices up to {np.linalg.norm(astray, axis=1).max():.2f} mm beside the line that the"
            " others lie on",
            "Split what are several stacks in one series, or convert it to NIfTI",
        )
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ np.stack([across * column_size, down * row_size, step], axis=1)
    affine[:3, 3] = _LPS_TO_RAS @ positions[0]
    return order, affine


def _check_even(name: str, along: Float[np.ndarray, " slices"]) -> None:
    steps = np.diff(along)
    usual = float(np.median(steps))
    if steps.min() < max(0.1 * usual, 1e-3):
        index = int(steps.argmin())
        raise CaseError(
            name,
            f"two slices at {along[index]:.2f} mm of its axis",
            "Give one phase, without copies",
        )
    allowed = _UNEVEN_MM + _UNEVEN_SHARE * usual
    # Small differences of one sign add up, and rounding alone gives twice its error in a step.
    numbers = np.arange(len(along))
    astray = along - np.polyval(np.polyfit(numbers, along, 1), numbers)
    if np.abs(steps - usual).max() <= 2 * allowed and np.abs(astray).max() <= allowed:
        return
    index = int(np.abs(steps - usual).argmax())
    where = f"between {along[index]:.2f} and {along[index + 1]:.2f} mm of its axis"
    count = round(steps[index] / usual) - 1
    if count > 0 and abs(steps[index] - (count + 1) * usual) <= 0.1 * usual:
        what = f"{count} missing slice{'s' if count > 1 else ''} {where}"
        raise CaseError(
            name,
            f"{what} (a gap of {steps[index]:.2f} mm, where others are {usual:.2f} mm apart)",
            "Export the whole series",
        )
    raise CaseError(
        name,
        f"uneven spacing: {steps[index]:.2f} mm {where}, where others are {usual:.2f} mm apart",
        "Give an evenly spaced series, or resample it and give NIfTI",
    )


def _pixels(
    name: str, files: Sequence[Path], shape: tuple[int, int]
) -> Num[np.ndarray, "columns rows slices"]:
    """Reads HU: each file's own slope and intercept are applied by SimpleITK."""
    itk = _simple_itk()
    slices = []
    for path in files:
        try:
            pixels = itk.GetArrayFromImage(itk.ReadImage(str(path)))
        except RuntimeError as error:
            raise CaseError(
                str(path), "its pixels are not readable to their end", "Export the series again"
            ) from error
        if pixels.shape != (1, *shape[::-1]):
            raise CaseError(
                name, f"a slice of {pixels.shape} pixels, expected {shape[::-1]}", "Export it again"
            )
        # Whole numbers stay what they are: half the memory of float32.
        small = pixels.astype(np.int16)
        slices.append(small[0] if np.array_equal(small, pixels) else pixels[0].astype(np.float32))
    return np.stack(slices).transpose(2, 1, 0)


@functools.cache
def _pydicom() -> Any:
    pydicom = required("pydicom")
    config = importlib.import_module("pydicom.config")
    # Its warnings quote headers.
    config.settings.reading_validation_mode = config.IGNORE
    return pydicom


@functools.cache
def _simple_itk() -> Any:
    itk = required("SimpleITK")
    # Its warnings quote headers.
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    return itk


def _nifti_header(image: np.ndarray, affine: Float[np.ndarray, "4 4"]) -> nib.Nifti1Header:
    header = nib.Nifti1Header()
    header.set_data_shape(image.shape)
    header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    header.set_xyzt_units("mm")
    header.set_sform(affine, code=1)
    # A quaternion holds no shear.
    sheared = np.abs(np.triu(affine[:3, :3].T @ affine[:3, :3], 1)).max() > 1e-4
    header.set_qform(affine, code=0 if sheared else 1, strip_shears=True)
    return header
