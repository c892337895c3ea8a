"""Evaluation of two folders of masks, on the scans' own grids."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tumorjax import anatomy
from tumorjax.errors import CaseError, UserError
from tumorjax.evaluation import workers
from tumorjax.evaluation.masks import list_masks, read_labels
from tumorjax.evaluation.measure import Labels, Task, measure_files
from tumorjax.evaluation.records import Outcome, hash_file, is_kept
from tumorjax.evaluation.settings import case_settings
from tumorjax.files import check_case_id, read_csv
from tumorjax.settings import plain

GRID = "the scans' own grids"


def outcomes(config: ConfigDict, task: Task, prediction: str) -> Iterator[Outcome]:
    """Measures the cases of two folders, side by side in processes.

    Args:
        config: of the job; truth, patients, split and workers are read.
        task: what all cases share.
        prediction: folder of predicted masks.

    Raises:
        UserError: a folder is not there or empty, or the two have no name in common.
    """
    truths, predictions = list_masks(config.truth), list_masks(prediction)
    only_true, only_predicted = set(truths) - set(predictions), set(predictions) - set(truths)
    if only_true or only_predicted:
        text = (
            f"the names do not match. Only in {config.truth}: {_some(only_true)}; only in"
            f" {prediction}: {_some(only_predicted)}"
        )
        if not set(truths) & set(predictions):
            raise UserError(f"{text}. A case's two masks must have the same name")
        print(text)
    people = read_patients(config.patients)
    cases = sorted(set(truths) | set(predictions))

    def work() -> Iterator[Outcome | tuple]:
        for case in cases:
            try:
                check_name(case)
                files = [
                    _only_file(case, found.get(case, []), folder)
                    for found, folder in ((truths, config.truth), (predictions, prediction))
                ]
                hashes = [hash_file(case, path) for path in files]
            except CaseError as error:
                yield Outcome(case, error=error)
                continue
            names = {"case": case} | people.get(case, {"patient": case})
            names = {"split": config.split} | names
            made_from = made_from_files(task, names, hashes)
            if is_kept(task.workdir, case, made_from):
                yield Outcome(case)
            else:
                yield task, names, made_from, *files

    processes = min(workers.count_of(config.workers), len(cases))
    alone = processes == 1
    return workers.in_processes(measure_files, work(), 0 if alone else processes, len(cases))


def made_from_files(task: Task, names: Mapping[str, str], hashes: list[str]) -> dict[str, Any]:
    """Returns all that the numbers of two masks depend on."""
    return {
        "names": dict(names),
        "files": hashes,
        "labels": plain(task.labels),
        "tumors": plain(task.tumors),
        "settings": case_settings(task.settings),
        "pictures": task.pictures,
        "table": None if task.table is None else task.table.tobytes().hex(),
    }


def task_of_folders(config: ConfigDict, settings: dict[str, Any], workdir: Path) -> Task:
    """Returns what the cases of two folders share.

    Values are those of config.labels. Without it, a labels.json beside the predictions counts, as
    the prediction job writes it: with the classes of a task, masks and truth are brought to these,
    just as when the network itself is evaluated; else (nnU-Net's networks, challenges) the values
    in it are those of both folders. Without either, values are the ids of `anatomy`.

    Raises:
        UserError: labels or tumours are not usable.
    """
    beside = Path(config.prediction) / "labels.json"
    classes: dict[str, list[str]] | None = None
    values: str = config.labels
    if not config.labels and beside.is_file():
        classes, values = _written_by_prediction(beside)
    file_labels = read_labels(values)
    if classes and not config.tumors:
        print(
            f"{beside}: masks of a network that knows {', '.join(classes)}; whatever else the truth"
            " has counts as background (config.labels or config.tumors say otherwise)"
        )
        labels = {name: index for index, name in enumerate(classes, start=1)}
        table = anatomy.class_table(classes)
        tumors: Labels = anatomy.tumor_classes(classes)
        return Task(workdir, labels, tumors, settings, (), config.worst > 0, file_labels, table)
    if values and not config.labels:
        print(f"{beside}: says what the values of both folders are (config.labels says otherwise)")
    known = [name for name in file_labels if name in anatomy.TUMORS]
    tumors = chosen_tumors(config.tumors, file_labels, known)
    return Task(workdir, file_labels, tumors, settings, (), config.worst > 0, file_labels)


def chosen_tumors(wanted: tuple[str, ...], labels: Labels, known: list[str]) -> Labels:
    """Returns the labels that are tumours, with their values.

    Args:
        wanted: config.tumors.
        labels: all labels.
        known: those that are known to be tumours, for where none is wanted.

    Raises:
        UserError: one that is wanted is no label.
    """
    names = list(wanted) or known
    missing = [name for name in names if name not in labels]
    if missing:
        raise UserError(
            f"config.tumors has {', '.join(missing)}, which is no label. Labels are"
            f" {', '.join(labels)}"
        )
    if not names:
        print(
            f"none of the labels {', '.join(labels)} is known as a tumour: only summary.json will"
            " say something. Name the tumours in config.tumors"
        )
    return {name: labels[name] for name in names}


def check_name(case: str) -> None:
    """Refuses a case whose name could lead out of the folder that its record goes to.

    Raises:
        CaseError: the name is not safe.
    """
    try:
        check_case_id(case)
    except UserError as error:
        raise CaseError(case, str(error), "Rename its files") from error


def read_patients(path: str) -> dict[str, dict[str, str]]:
    """Returns case -> patient, and split where the table has that column.

    Raises:
        UserError: there is no such table.
    """
    if not path:
        return {}
    try:
        return {
            row["case"]: {"patient": row["patient"]}
            | ({"split": row["split"]} if row.get("split") else {})
            for row in read_csv(path)
        }
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: no patients to read ({error!r}). Expected a CSV file with the columns case"
            " and patient, and split if there are several test sets"
        ) from error


def _written_by_prediction(path: Path) -> tuple[dict[str, list[str]] | None, str]:
    """Returns the task's classes that a labels.json speaks of, or where to read the values.

    Raises:
        UserError: it is not of the prediction job.
    """
    try:
        found = json.loads(path.read_text())
        # An ensemble's members tell the same apart.
        members: list[dict[str, Any]] = found.get("members", [])
        classes = found.get("classes") or (members[0].get("classes") if members else None)
        table = anatomy.class_table(classes or {})
        labels = {name: value for name, value in found["labels"].items() if name != "background"}
        of_task = bool(classes) and all(table[value] for value in labels.values())
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        UserError,
    ) as error:
        raise UserError(
            f"{path}: not what the prediction job writes ({error!r}). Set config.labels to say what"
            " the values are, or remove the file"
        ) from error
    if of_task:
        return classes, ""
    anatomys = all(anatomy.LABELS.get(name) == value for name, value in labels.items())
    return None, "" if anatomys else str(path)


def _only_file(case: str, paths: list[Path], folder: str) -> Path:
    if len(paths) != 1:
        found = "no file" if not paths else " and ".join(path.name for path in paths)
        raise CaseError(
            case, f"{found} in {folder}, expected {case}.nii.gz or {case}.nii", "Give one file each"
        )
    return paths[0]


def _some(names: set[str], most: int = 5) -> str:
    shown = ", ".join(sorted(names)[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
