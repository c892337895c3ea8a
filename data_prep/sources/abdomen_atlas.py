"""AbdomenAtlas: a folder per scan, one binary mask per structure.

    BDMAP_00000001/ct.nii.gz              or   ct/BDMAP_00000001/ct.nii.gz
    BDMAP_00000001/segmentations/*.nii.gz      label/BDMAP_00000001/segmentations/*.nii.gz
    patients.csv (case,patient,site), if there is one

The names of the masks are those of tumorjax.anatomy. Structures that a scan does not show may be
missing or empty.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import (
    ENDINGS,
    Found,
    LabelFile,
    ScanCase,
    make_case,
    match_label,
    read_patients,
    stem,
)
from tumorjax.errors import CaseError, UserError

SITE = "abdomen_atlas"


def find(folder: Path, settings: Mapping[str, Any], workers: int = 1, site: str = SITE) -> Found:
    """Looks up the cases in either layout; see `data_prep.sources.find`."""
    patients = read_patients(folder)
    split = (folder / "ct").is_dir() and (folder / "label").is_dir()
    places = []
    for place in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if not (split and place.name in ("ct", "label")):
            places.append((place.name, place, place))
    if split:
        images = {p.name for p in (folder / "ct").iterdir() if p.is_dir()}
        masks = {p.name for p in (folder / "label").iterdir() if p.is_dir()}
        for name in sorted(images | masks):
            if not name.startswith("."):
                places.append((name, folder / "ct" / name, folder / "label" / name))
    if not places:
        raise UserError(
            f"{folder}: no cases. Expected CASE/ct.nii.gz and CASE/segmentations/, or"
            " ct/CASE/ct.nii.gz and label/CASE/segmentations/"
        )
    cases: list[ScanCase] = []
    rejected = []
    for name, image, masks_of in places:
        try:
            cases.append(_case(name, image, masks_of, patients, settings.get("labels", {}), site))
        except CaseError as error:
            rejected.append(error)
    return Found(cases, rejected)


def _case(
    name: str,
    image: Path,
    masks: Path,
    patients: Mapping[str, tuple[str, str]],
    overrides: Mapping[str, str],
    site: str,
) -> ScanCase:
    scans = [image / f"ct{ending}" for ending in ENDINGS if (image / f"ct{ending}").is_file()]
    if len(scans) != 1:
        raise CaseError(
            name, f"{len(scans)} files ct.nii.gz or ct.nii, expected one", "Copy the scan again"
        )
    segmentations = masks / "segmentations"
    files = sorted(segmentations.iterdir()) if segmentations.is_dir() else []
    named = [(path, stem(path)) for path in files if stem(path)]
    if not named:
        raise CaseError(
            name,
            "no masks: its folder segmentations is missing or empty",
            "Add a NIfTI mask per structure",
        )
    matched = [(path, match_label(str(label), overrides)) for path, label in named]
    unknown = [path.name for path, label in matched if label is None]
    if unknown:
        raise CaseError(
            name,
            f"unknown structures {', '.join(unknown)}",
            "Map each to a structure of tumorjax.anatomy, or to '' to drop it, in the config's"
            " labels",
        )
    # Masks are written with 1 or, by some tools, 255.
    labels = [LabelFile(path, {1: str(label), 255: str(label)}) for path, label in matched if label]
    return make_case(name, scans[0], labels, patients, site)
