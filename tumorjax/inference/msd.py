"""Submissions to the Medical Segmentation Decathlon: label values, names, the archive, its check.

The challenge (Antonelli et al. 2022, doi:10.1038/s41467-022-30695-9) takes an archive of folders,
one a task under the task's name, in them a mask for each image of imagesTs under the image's own
name and on its own grid. Its leaderboard is over all ten tasks; folders of several archives can be
put into one.

    python -m tumorjax.inference.msd ARCHIVE.zip TASK/imagesTs

checks an archive that any program wrote.
"""

import gzip
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from tumorjax.errors import UserError
from tumorjax.inference.native_grid import Structure

# Affines may differ by so many mm at the scan's corners: what rounding in other programs leaves.
_SAME_GRID_MM = 1e-2


class Task(NamedTuple):
    """One of the challenge's tasks.

    Attributes:
        prefix: of its files' names.
        labels: name in its dataset.json -> value.
        anatomy: the same in the words of anatomy.py -> value.
        images: how many there are in imagesTs.
    """

    prefix: str
    labels: Mapping[str, int]
    anatomy: Mapping[str, int]
    images: int


TASKS = {
    "Task03_Liver": Task("liver", {"liver": 1, "cancer": 2}, {"liver": 1, "liver_lesion": 2}, 70),
    "Task07_Pancreas": Task(
        "pancreas", {"pancreas": 1, "cancer": 2}, {"pancreas": 1, "pancreatic_lesion": 2}, 139
    ),
}


def task_of(name: str) -> Task:
    """Returns a task by its name.

    Raises:
        UserError: it is none of TASKS.
    """
    if name not in TASKS:
        raise UserError(f"config.msd is {name!r}. Expected one of {', '.join(TASKS)}")
    return TASKS[name]


def structures_of(
    name: str,
    table: Sequence[Structure],
    anatomy: Mapping[str, Sequence[str]],
    tumors: Sequence[str],
) -> list[Structure]:
    """Returns a network's structures with the values of a task; those that it has not are left out.

    Args:
        name: of the task.
        table: what the network tells apart.
        anatomy: structure -> labels of anatomy.py, see `roles.anatomy_of`.
        tumors: structures that are tumours; one unknown to anatomy.py is taken for the task's.

    Raises:
        UserError: the network lacks one of the task's labels.
    """
    task = task_of(name)
    result = []
    for structure in table:
        values = {task.anatomy.get(label, 0) for label in anatomy[structure.name]}
        if not anatomy[structure.name]:
            name_there = "cancer" if structure.name in tumors else structure.name
            values = {task.labels.get(name_there, 0)}
        if len(values) == 1 and values != {0}:
            result.append(structure._replace(value=values.pop()))
    missing = set(task.anatomy.values()) - {structure.value for structure in result}
    if missing:
        lacks = ", ".join(label for label, value in task.anatomy.items() if value in missing)
        raise UserError(
            f"{name} wants {lacks}, which the checkpoint does not know. It tells apart"
            f" {', '.join(structure.name for structure in table)}; config.names says which of them"
            " is what"
        )
    return result


def check_cases(name: str, cases: Sequence[str]) -> None:
    """Checks that cases are named as the task's images are.

    Raises:
        UserError: one is not.
    """
    prefix = task_of(name).prefix
    wrong = [case for case in cases if not re.fullmatch(rf"{prefix}_\d+", case)]
    if wrong:
        raise UserError(
            f"{', '.join(wrong[:5])}: no image of {name}, whose names are {prefix}_NUMBER.nii.gz."
            f" Set config.input to the task's imagesTs"
        )


# ---------------------------------------------------------------------------- archive


def write_archive(path: Path, name: str, masks: Mapping[str, Path]) -> None:
    """Writes the archive of a task, whole or not at all. Equal masks make equal archives.

    Args:
        path: of the archive.
        name: of the task.
        masks: case -> file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".aside-", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        # What is in it is compressed already.
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            for case, mask in sorted(masks.items()):
                entry = zipfile.ZipInfo(f"{name}/{case}.nii.gz", (1980, 1, 1, 0, 0, 0))
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, mask.read_bytes())
        aside.replace(path)


def check_archive(path: str | Path, name: str, images: Mapping[str, Path]) -> None:
    """Checks an archive against the images that its masks are of.

    Args:
        path: of the archive.
        name: of the task.
        images: case -> file of imagesTs.

    Raises:
        UserError: a mask is missing, superfluous, not readable, on another grid than its image, or
            has values that the task does not know. All are counted and the first five said.
    """
    task = task_of(name)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry for entry in archive.namelist() if not entry.endswith("/")}
            wanted = {f"{name}/{case}.nii.gz": file for case, file in sorted(images.items())}
            problems = [f"{entry} is missing" for entry in wanted if entry not in entries]
            problems += [f"{entry} is of no image" for entry in sorted(entries - set(wanted))]
            for entry, file in wanted.items():
                if entry in entries:
                    problems += _problems(entry, archive.read(entry), file, task)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not readable as an archive ({error}). Write it again") from error
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path}: not to be submitted: {'; '.join(problems[:5])}{more}")


def _problems(entry: str, data: bytes, file: Path, task: Task) -> list[str]:
    try:
        mask = nib.Nifti1Image.from_bytes(gzip.decompress(data))
        values = np.asanyarray(mask.dataobj)
    except (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, ValueError) as error:
        return [f"{entry} is not readable ({type(error).__name__})"]
    image = cast(Any, nib.load(file))
    if values.shape != image.shape[:3]:
        return [f"{entry} has shape {values.shape}, its image {image.shape[:3]}"]
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in values.shape])).reshape(3, -1).T
    ends = [nib.affines.apply_affine(one.affine, corners) for one in (mask, image)]
    if (apart := float(np.abs(ends[0] - ends[1]).max())) > _SAME_GRID_MM:
        return [f"{entry} lies up to {apart:.2f} mm beside its image"]
    unknown = np.setdiff1d(np.unique(values), [0, *task.labels.values()])
    if len(unknown):
        known = ", ".join(str(value) for value in (0, *task.labels.values()))
        return [f"{entry} has the value {unknown[0]:g}, expected {known}"]
    return []


def main(arguments: Sequence[str]) -> int:
    """Checks the archive that the command line names; returns the exit code."""
    if len(arguments) != 2:
        print("usage: python -m tumorjax.inference.msd ARCHIVE.zip imagesTs", file=sys.stderr)
        return 2
    archive, folder = Path(arguments[0]), Path(arguments[1])
    try:
        name = archive.name.removesuffix(".zip")
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder. Give the task's imagesTs")
        files = sorted(folder.glob("[!.]*.nii.gz"))
        images = {file.name.removesuffix(".nii.gz").removesuffix("_0000"): file for file in files}
        check_cases(name, list(images))
        check_archive(archive, name, images)
    except UserError as error:
        print(f"tumorjax: {error}", file=sys.stderr)
        return 2
    print(f"{archive}: {len(images)} masks, names, grids and values as {name} wants them")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
