"""Medical Segmentation Decathlon: TaskXX_Name/dataset.json with a list of training pairs.

Its labels are called after the task ("cancer" in the liver's and in the pancreas' task), so each
task has a table of its own. Its scans are stored in several orientations; some are 4D with one
channel.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import Found, LabelFile, ScanCase, make_case, match_table, read_patients
from data_prep.sources.nnunet import inside, label_values, read_dataset
from tumorjax.errors import CaseError, UserError

SITE = "msd"

# Word in the task's name -> its own label names in ours. Tasks with no structure of
# tumorjax.anatomy (brain, heart, hippocampus, prostate zones in MR, lung tumours) are left out.
TASKS: dict[str, dict[str, str]] = {
    "liver": {"cancer": "liver_lesion", "tumor": "liver_lesion", "tumour": "liver_lesion"},
    "pancreas": {"cancer": "pancreatic_lesion", "tumour": "pancreatic_lesion"},
    "hepaticvessel": {"vessel": "hepatic_vessel", "tumour": "liver_lesion"},
    "spleen": {},
    "colon": {"colon cancer primaries": "colon_lesion", "cancer": "colon_lesion"},
}
TASKS["pancreas"]["tumor"] = "pancreatic_lesion"
TASKS["hepaticvessel"]["tumor"] = "liver_lesion"


def find(folder: Path, settings: Mapping[str, Any], workers: int = 1) -> Found:
    """Looks up the training cases; see `data_prep.sources.find`.

    Raises:
        UserError: dataset.json is missing or damaged, the task is not one of `TASKS`, or it has
            unknown label names.
    """
    dataset = read_dataset(folder)
    path = folder / "dataset.json"
    overrides = {**TASKS[_task(folder, dataset)], **settings.get("labels", {})}
    names = match_table(label_values(dataset, path), overrides, str(path))
    pairs = dataset.get("training")
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f"{path}: no list of training cases. Give the task as it was published")
    patients = read_patients(folder)
    cases: list[ScanCase] = []
    rejected = []
    for pair in pairs:
        try:
            image, label = str(pair["image"]), str(pair["label"])
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}: a training case lacks image or label") from error
        case = image.removeprefix("./").removeprefix("imagesTr/")
        case = case.removesuffix(".gz").removesuffix(".nii")
        try:
            files = inside(folder, image, case), inside(folder, label, case)
            missing = [f"{file.parent.name}/{file.name}" for file in files if not file.is_file()]
            if missing:
                raise CaseError(case, f"{' and '.join(missing)} missing", "Copy the task again")
        except CaseError as error:
            rejected.append(error)
            continue
        cases.append(make_case(case, files[0], [LabelFile(files[1], names)], patients, SITE))
    return Found(cases, rejected)


def _task(folder: Path, dataset: Mapping[str, Any]) -> str:
    """Returns which of `TASKS` a folder holds, by the folder's name or the table's."""
    for name in (folder.resolve().name, str(dataset.get("name", ""))):
        plain = name.lower().replace("_", "").replace(" ", "")
        # The longest first: "hepaticvessel" is no task of the liver.
        for task in sorted(TASKS, key=len, reverse=True):
            if task in plain:
                return task
    raise UserError(
        f"{folder}: neither its name nor dataset.json's is a task with structures of"
        f" tumorjax.anatomy. Expected one of {', '.join(TASKS)} in it"
    )
