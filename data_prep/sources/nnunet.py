"""nnU-Net's raw data sets: imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz and dataset.json.

Both of nnU-Net's forms of dataset.json are read: name -> value (v2) and value -> name (v1).
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import (
    ENDINGS,
    Found,
    LabelFile,
    ScanCase,
    make_case,
    match_table,
    read_patients,
    stem,
)
from tumorjax.errors import CaseError, UserError

SITE = "nnunet"


def find(folder: Path, settings: Mapping[str, Any], workers: int = 1) -> Found:
    """Looks up the training cases; see `data_prep.sources.find`.

    Raises:
        UserError: dataset.json is missing or damaged, has several channels, regions, an ignore
            label or unknown label names, or the files are not NIfTI.
    """
    dataset = read_dataset(folder)
    table = folder / "dataset.json"
    channels = dataset.get("channel_names", dataset.get("modality", {"0": "CT"}))
    if len(channels) != 1:
        raise UserError(f"{table}: {len(channels)} channels. Expected one, the CT")
    ending = dataset.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        raise UserError(f"{table}: file_ending is {ending!r}. Expected {' or '.join(ENDINGS)}")
    names = match_table(label_values(dataset, table), settings.get("labels", {}), str(table))
    patients = read_patients(folder)
    cases: list[ScanCase] = []
    rejected = []
    for case, images, label in _files(folder, dataset):
        try:
            image = _only(folder, case, images, f"imagesTr/{case}_0000{ending}")
            mask = _only(folder, case, label, f"labelsTr/{case}{ending}")
        except CaseError as error:
            rejected.append(error)
            continue
        cases.append(make_case(case, image, [LabelFile(mask, names)], patients, SITE))
    if not cases and not rejected:
        raise UserError(f"{folder}: no cases. Expected imagesTr/CASE_0000{ending}")
    return Found(cases, rejected)


def read_dataset(folder: Path) -> dict[str, Any]:
    """Reads dataset.json.

    Raises:
        UserError: it is missing, or no JSON object.
    """
    path = folder / "dataset.json"
    try:
        dataset = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. Give the folder that holds it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON. Mend it") from error
    if not isinstance(dataset, dict) or not isinstance(dataset.get("labels"), dict):
        raise UserError(f"{path}: no labels. Expected a JSON object with labels and their values")
    return dataset


def label_values(dataset: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Returns value -> name of a dataset.json, without background.

    Raises:
        UserError: there are regions, an ignore label, or values that are not whole numbers.
    """
    labels = dataset["labels"]
    if "ignore" in labels or "ignore" in labels.values():
        raise UserError(
            f"{path}: has the label ignore, and this store has no voxels without truth. Give the"
            " cases that are annotated as a whole, without that label"
        )
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    if regions:
        raise UserError(
            f"{path}: labels {', '.join(regions)} are regions (several values). Give each value a"
            " name of its own"
        )
    if all(str(name).isdigit() for name in labels):
        values = {int(value): str(name) for value, name in labels.items()}
    else:
        try:
            values = {int(value): str(name) for name, value in labels.items()}
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: label values must be whole numbers") from error
    return {value: name for value, name in values.items() if value != 0}


def _files(folder: Path, dataset: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields case, its images and its labels: as dataset.json lists them, or as they lie there."""
    if dataset.get("dataset"):
        for case, files in sorted(dataset["dataset"].items()):
            yield case, list(files["images"]), [files["label"]]
        return
    images: dict[str, list[str]] = {}
    labels: dict[str, list[str]] = {}
    for place, group in (("imagesTr", images), ("labelsTr", labels)):
        for path in sorted((folder / place).iterdir()) if (folder / place).is_dir() else []:
            name = stem(path)
            if name and place == "imagesTr":
                name = re.sub(r"_\d{4}$", "", name)
            if name:
                group.setdefault(name, []).append(f"{place}/{path.name}")
    for case in sorted(set(images) | set(labels)):
        yield case, images.get(case, []), labels.get(case, [])


def _only(folder: Path, case: str, files: list[str], expected: str) -> Path:
    """Returns the one file that there has to be."""
    paths = [path for path in (inside(folder, file, case) for file in files) if path.is_file()]
    if len(paths) != 1:
        raise CaseError(
            case,
            f"{len(paths)} files for {expected}, expected one",
            "Add what is missing, or remove what is too much",
        )
    return paths[0]


def inside(folder: Path, path: str, case: str) -> Path:
    """Returns a path of a data set's table, which must not lead out of its folder.

    Raises:
        CaseError: it does.
    """
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise CaseError(case, f"the file {path!r} lies outside the data set", "Correct the table")
    return folder / path
