"""Masks of given scans: where they lie, what their values mean, and whether they fit the scan.

A case's masks are a folder with a file per structure (AbdomenAtlas' segmentations/NAME.nii.gz), one
file whose values are structures (a label map), or such a map that a network has just predicted.
"""

import ast
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import nibabel as nib
import numpy as np
from jaxtyping import Bool, Float, Int
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from tumorjax import anatomy
from tumorjax.errors import CaseError, UserError
from tumorjax.geometry import spacing_of, to_canonical
from tumorjax.nifti import ENDINGS

Labels = Mapping[str, tuple[int, ...]]
Mask = Bool[np.ndarray, "x y z"]

# Corners of a mask may lie this many voxels from the scan's.
_SAME_GRID = 0.1
# What tells of values beside a label map, as the job "prediction" writes it.
LABELS_FILE = "labels.json"

# The structures of `anatomy` among the classes of TotalSegmentator's task "total", version 2.
TOTALSEGMENTATOR: Labels = {
    "spleen": (1,),
    "kidney_right": (2,),
    "kidney_left": (3,),
    "gall_bladder": (4,),
    "liver": (5,),
    "stomach": (6,),
    "pancreas": (7,),
    "adrenal_gland_right": (8,),
    "adrenal_gland_left": (9,),
    "lung_left": (10, 11),
    "lung_right": (12, 13, 14),
    "esophagus": (15,),
    "intestine": (18,),
    "duodenum": (19,),
    "colon": (20,),
    "bladder": (21,),
    "prostate": (22,),
    "aorta": (52,),
    "postcava": (63,),
    "portal_vein_and_splenic_vein": (64,),
    "femur_left": (75,),
    "femur_right": (76,),
}
ANATOMY: Labels = {name: (value,) for name, value in anatomy.LABELS.items()}
PRESETS: Mapping[str, Labels] = {"totalsegmentator": TOTALSEGMENTATOR, "anatomy": ANATOMY}


class Structures(NamedTuple):
    """What of a scan tumours are put by, in RAS+.

    Attributes:
        parts: organ group -> masks of its parts (two kidneys), none of them empty.
        tumors: those that are there; None for none.
        known: all structures together, which tumours that stick out of their organ keep away
            from; None where nothing was read for it.
    """

    parts: Mapping[str, Sequence[Mask]]
    tumors: Mask | None
    known: Mask | None


def read_labels(given: str | Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Returns structure -> values of a label map, as config.labels says it.

    Args:
        given: the name of a preset ("totalsegmentator", "anatomy"); a mapping from names of
            `anatomy`, or "kidney" for both, to a value or several, also as a command line has it,
            "{'liver': 5}"; or nothing.

    Returns:
        None for nothing.

    Raises:
        UserError: it is none of these.
    """
    if not given:
        return None
    if isinstance(given, str) and given in PRESETS:
        return dict(PRESETS[given])
    parsed: Any = given
    if isinstance(given, str):
        try:
            parsed = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            parsed = None
    if not isinstance(parsed, Mapping) or not parsed:
        raise UserError(
            f"config.labels is {given!r}. Expected {', '.join(PRESETS)}, or names with values, such"
            " as \"{'liver': 5}\""
        )
    labels: dict[str, tuple[int, ...]] = {}
    for name, values in parsed.items():
        several = tuple(values) if isinstance(values, Sequence) else (values,)
        if not _is_known(name):
            raise UserError(
                f"config.labels: structure {name!r} is unknown. Expected some of"
                f" {', '.join(anatomy.LABELS)}, or kidney"
            )
        if not several or not all(type(value) is int and value > 0 for value in several):
            raise UserError(f"config.labels: {name} is {values!r}. Expected whole numbers above 0")
        labels[name] = several
    return labels


def labels_beside(path: Path) -> dict[str, tuple[int, ...]] | None:
    """Returns what a labels.json beside a label map says of its values; None where there is none.

    Structures that `anatomy` does not know are left out.

    Raises:
        CaseError: the file is not such as the job "prediction" writes.
    """
    file = path.parent / LABELS_FILE
    try:
        found = json.loads(file.read_text())["labels"]
        values = {
            name: tuple(value) if isinstance(value, list) else (int(value),)
            for name, value in found.items()
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CaseError(
            str(file), "not readable as a table of labels", "Remove it, or give config.labels"
        ) from error
    return {name: value for name, value in values.items() if _is_known(name)}


def find_masks(case: str, beside: Path, given: Path | None) -> Path:
    """Returns a case's masks: a folder with a file per structure, or a label map.

    Args:
        case: its id.
        beside: the folder segmentations that belongs to the scan, which need not be there.
        given: config.masks: a label map; a folder with CASE.nii.gz, CASE/segmentations or CASE; or
            None for those beside the scan.

    Raises:
        CaseError: there are none.
    """
    if given is None:
        if not beside.is_dir():
            raise CaseError(
                case,
                f"no masks: there is no folder {beside}",
                "Add it, with a mask per structure, or give config.masks or"
                " config.checkpoint_organs",
            )
        return beside
    if given.is_file():
        return given
    choices = [given / f"{case}{ending}" for ending in ENDINGS]
    choices += [given / case / "segmentations", given / case]
    for path in choices:
        if path.is_file() or (path.is_dir() and any(path.glob("*.nii*"))):
            return path
    raise CaseError(
        case,
        f"no masks: {given} has neither {case}.nii.gz nor {case}/segmentations",
        "Add them, or leave the case out",
    )


def from_folder(
    case: str,
    folder: Path,
    organs: Sequence[str],
    shape: tuple[int, ...],
    canonical_affine: Float[np.ndarray, "4 4"],
) -> Structures:
    """Reads the masks of a folder with a file per structure: NAME.nii.gz.

    Read are the organs', tumours, and for a kidney all others: its tumours may stick out.

    Args:
        case: for messages.
        folder: of the masks.
        organs: organ groups.
        shape: of the scan in RAS+.
        canonical_affine: of the scan in RAS+.

    Raises:
        CaseError: a mask is missing, empty, not readable, or on another grid than the scan.
    """
    present = {
        path.name.removesuffix(ending): path
        for ending in ENDINGS
        for path in (folder.glob(f"*{ending}") if folder.is_dir() else ())
    }
    wanted = set(anatomy.LABELS if "kidney" in organs else anatomy.TUMORS)
    for organ in organs:
        names = _parts(organ)
        wanted |= set(names)
        if not set(names) & set(present):
            raise CaseError(
                case,
                f"no mask of the {organ}: {folder} has none of"
                f" {', '.join(f'{name}.nii.gz' for name in names)}",
                "Add the organ's mask",
            )
    masks = {
        name: _read_volume(path, shape, canonical_affine) > 0
        for name, path in sorted(present.items())
        if name in wanted
    }
    return _structures(case, organs, masks, None)


def from_map(
    case: str,
    values: Int[np.ndarray, "x y z"],
    labels: Labels,
    organs: Sequence[str],
) -> Structures:
    """Takes the structures of a label map apart.

    Args:
        case: for messages.
        values: the label map on the scan's grid in RAS+.
        labels: structure -> values.
        organs: organ groups.

    Raises:
        CaseError: an organ has no voxel.
        UserError: the labels do not have an organ.
    """
    masks = {}
    for organ in organs:
        names = [name for name in _parts(organ) if name in labels]
        if not names:
            raise UserError(
                f"the labels of the masks have no {organ}: they are {', '.join(labels)}. Say by"
                " config.labels which value it has"
            )
        for name in names:
            # What lies inside an organ and has a value of its own is the organ to a tumour.
            inside = [v for one in anatomy.INSIDE.get(organ, ()) for v in labels.get(one, ())]
            masks[name] = np.isin(values, [*labels[name], *inside])
    for name in set(labels) & set(anatomy.TUMORS):
        masks[name] = np.isin(values, labels[name])
    return _structures(case, organs, masks, values > 0)


def read_map(
    path: Path, shape: tuple[int, ...], canonical_affine: Float[np.ndarray, "4 4"]
) -> Int[np.ndarray, "x y z"]:
    """Reads a label map; see `from_folder` for arguments and errors."""
    values = _read_volume(path, shape, canonical_affine)
    if values.dtype.kind == "f":
        rounded = np.rint(values)
        if not (np.isfinite(values).all() and (rounded == values).all()):
            raise CaseError(
                str(path), "values are no whole numbers", "Give a label map, or binary masks"
            )
        values = rounded.astype(np.int32)
    return values


def _structures(
    case: str, organs: Sequence[str], masks: Mapping[str, Mask], known: Mask | None
) -> Structures:
    parts = {}
    for organ in organs:
        there = [masks[name] for name in _parts(organ) if name in masks]
        parts[organ] = [mask for mask in there if mask.any()]
        if not parts[organ]:
            raise CaseError(
                case,
                f"its {organ} mask is empty: there is no {organ} in the scan",
                "Leave the case out",
            )
    tumors = [mask for name, mask in masks.items() if name in anatomy.TUMORS]
    if known is None and masks:
        known = np.logical_or.reduce(list(masks.values()))
    return Structures(parts, np.logical_or.reduce(tumors) if tumors else None, known)


def _parts(organ: str) -> tuple[str, ...]:
    """Names of the masks that an organ may have: kidney_left, kidney_right, or kidney for both."""
    sides = anatomy.organ_labels(organ)
    return sides if len(sides) == 1 else (*sides, organ)


def _is_known(name: Any) -> bool:
    if name in anatomy.LABELS:
        return True
    return any(name == left.removesuffix("_left") for left, _ in anatomy.PAIRS)


def _read_volume(
    path: Path, shape: tuple[int, ...], canonical_affine: Float[np.ndarray, "4 4"]
) -> np.ndarray:
    """Reads a mask and brings it to RAS+; it must lie on the scan's grid."""
    try:
        file = cast(nib.Nifti1Image, nib.load(path))
        mask = np.asanyarray(file.dataobj)
        affine = np.asarray(file.affine, np.float64)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise CaseError(
            str(path),
            f"not readable to its end as NIfTI ({type(error).__name__})",
            "Copy or convert it again",
        ) from error
    try:
        turned, affine = to_canonical(mask, affine) if mask.ndim == 3 else (mask, affine)
    except UserError as error:
        raise CaseError(str(path), str(error), "Write the mask with the scan's header") from error
    if turned.shape != tuple(shape):
        raise CaseError(
            str(path),
            f"its shape is {turned.shape}, the scan's {tuple(shape)} (axes in RAS+)",
            "Give masks on the scan's grid",
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1).T
    apart = nib.affines.apply_affine(affine, corners) - nib.affines.apply_affine(
        canonical_affine, corners
    )
    distance = float(np.linalg.norm(apart, axis=1).max())
    if distance > _SAME_GRID * min(spacing_of(canonical_affine)):
        raise CaseError(
            str(path),
            f"its corners lie up to {distance:.2f} mm away from the scan's (affines differ)",
            "Give masks on the scan's grid",
        )
    return turned
