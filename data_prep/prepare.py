"""The job "preparation": scans and their labels become cases of a store.

Per case: read, check, turn to RAS+, resample, clip to the window, scale to [0, 1], write. A case
that cannot be used is set aside with its reason and the rest goes on. Run again, the job does what
is missing or changed: a case is done when its record was made from the same files (by size and
time, else by SHA-256) with the same names for their labels.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from ml_collections import ConfigDict
from tqdm import tqdm

from data_prep import sources, statistics
from data_prep.labels import read_labels, split_sides
from data_prep.sources import ScanCase
from tumorjax import anatomy
from tumorjax.errors import CaseError, UserError
from tumorjax.files import local_folder, location, write_csv_atomic
from tumorjax.geometry import (
    axis_codes,
    label_boxes,
    prepare_image,
    resample_labels,
    resampled_spacing,
    spacing_of,
    to_canonical,
)
from tumorjax.nifti import check_hu, read_ct
from tumorjax.settings import plain
from tumorjax.training import preemption
from tumorjax.volumes import Store, check_store, create_store, open_store, remove_case, write_case

REJECTED = "rejected.csv"
REJECTED_COLUMNS = ("case", "stage", "reason")

# Part of what a case was made with: raised when the same files give other volumes.
_VERSION = 1
# Bytes of scans below which starting processes takes longer than the work.
_SMALL = 20_000_000
# What one process needs for a large scan.
_WORKER_BYTES = 2_000_000_000

Row = dict[str, str]
Progress = Callable[[int, int], None]


class Task(NamedTuple):
    """One case to prepare, with all that a process elsewhere needs for it."""

    scan: ScanCase
    folder: str
    source: str
    store: str
    settings: dict[str, Any]


def run(config: ConfigDict, workdir: Path) -> int:
    """Prepares a data set; see configs/preparation.py.

    Returns:
        0, or 1 if cases were set aside (workdir/rejected.csv).

    Raises:
        UserError: the configuration cannot be run, or the store was made with other settings.
    """
    workdir = location(workdir)
    url = config.output or str(workdir / "store")
    folder = config.input or (
        str(local_folder(workdir) / "scans") if config.source == "virtual" else ""
    )
    if not folder:
        raise UserError("input is empty. Give the folder of the data set")
    virtual = config.source == "virtual"
    source_settings = config.virtual if virtual else ConfigDict({"labels": config.labels})
    settings = {
        "spacing": config.spacing,
        "window": config.window,
        "order": config.order,
        "source_settings": source_settings,
    }
    with tqdm(unit="case", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        rejected = prepare(
            config.source,
            folder,
            url,
            settings,
            workdir,
            workers=config.workers,
            scheduler=config.scheduler or None,
            progress=progress,
        )
    store = open_store(url)
    statistics.write(store, workdir)
    print(f"{url}: {len(store.cases)} cases; counts and sizes in {workdir / 'statistics.png'}")
    if rejected:
        print(f"{len(rejected)} cases were set aside, see {workdir / REJECTED}")
    return 1 if rejected else 0


def prepare(
    source: str,
    input: str | os.PathLike,
    store_url: str | os.PathLike,
    settings: Mapping[str, Any] | ConfigDict,
    workdir: str | os.PathLike,
    workers: int = 0,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Prepares the cases of a source that the store lacks.

    Args:
        source: abdomen_atlas, nnunet, msd or virtual.
        input: the data set's folder; for virtual the one to make.
        store_url: path or URL of the store; made if need be.
        settings: spacing (three mm), window (HU that become 0 and 1), order of the resampling (3
            by default), and source_settings: for virtual the cohort's, else labels (see
            `sources.find`).
        workdir: for rejected.csv.
        workers: processes; 0 for one per core. One, or little work, is done in this process.
        scheduler: address of a Dask scheduler whose workers see the same folders; None for
            processes on this machine.
        progress: called with (cases done, cases in all).

    Returns:
        The cases that were set aside: case, stage, reason. workdir/rejected.csv holds the same, and
        is absent where there is none.

    Raises:
        UserError: the source or a setting is wrong, or the store was made with other settings.
    """
    folder, workdir = Path(input), location(workdir)
    settings, source_settings = check_settings(settings)
    # Before any work; but nothing is made until there is something to prepare.
    check_store(store_url, settings)
    found = sources.find(source, folder, source_settings, workers or os.cpu_count() or 1)
    store = create_store(store_url, settings)
    rejected = [_row(error.case, "source", error) for error in found.rejected]
    done = set(store.cases)
    tasks = []
    for scan in found.cases:
        if scan.case in done:
            owner = _source_of(store, scan.case)
            if owner not in (None, source):
                rejected.append(_row(scan.case, "source", _taken(scan.case, owner)))
                continue
            if _is_current(store, scan, folder, source):
                continue
        tasks.append(Task(scan, str(folder), source, str(store_url), settings))
    total = len(found.cases) + len(found.rejected)
    finished = total - len(tasks)
    if progress:
        progress(finished, total)
    for row in _work(tasks, workers, scheduler):
        finished += 1
        if row:
            rejected.append(row)
        if progress:
            progress(finished, total)
    # A case that was good once and is not any more must not be trained on.
    for row in rejected:
        mine = row["case"] in done and _source_of(store, row["case"]) in (None, source)
        if mine and row["stage"] != "store":
            remove_case(store_url, row["case"])
    rejected.sort(key=lambda row: row["case"])
    if rejected:
        write_csv_atomic(workdir / REJECTED, rejected, REJECTED_COLUMNS)
    else:
        (workdir / REJECTED).unlink(missing_ok=True)
    return rejected


def check_settings(
    settings: Mapping[str, Any] | ConfigDict,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the store's settings and the source's as plain values.

    Raises:
        UserError: a key is unknown or missing, or a value cannot be used.
    """
    given = {
        key: value.to_dict() if isinstance(value, ConfigDict) else value
        for key, value in settings.items()
    }
    values = {"order": 3, "source_settings": {}, **plain(given)}
    unknown = sorted(set(values) - {"spacing", "window", "order", "source_settings"})
    if unknown:
        raise UserError(
            f"preparation: unknown settings {', '.join(unknown)}. Expected spacing, window, order"
        )
    source_settings = values.pop("source_settings")
    numbers = {"spacing": 3, "window": 2}
    for key, count in numbers.items():
        try:
            values[key] = [float(value) for value in values[key]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"preparation.{key}: expected {count} numbers") from error
        if len(values[key]) != count or not np.isfinite(values[key]).all():
            raise UserError(f"preparation.{key} is {values[key]}. Expected {count} numbers")
    if min(values["spacing"]) <= 0:
        raise UserError(f"preparation.spacing is {values['spacing']}. Expected positive mm")
    if values["window"][0] >= values["window"][1]:
        raise UserError(f"preparation.window is {values['window']}. Expected low, then high HU")
    if values["order"] not in (1, 3):
        raise UserError(f"preparation.order is {values['order']}. Expected 1 or 3")
    return values, source_settings


# ---------------------------------------------------------------------------- one case


def prepare_case(task: Task) -> Row | None:
    """Prepares one case.

    Returns:
        None, or the row that sets the case aside.
    """
    case, folder = task.scan.case, Path(task.folder)
    stage = "read"
    try:
        files = {_relative(path, folder): path for path in _files(task.scan)}
        # Size and time before reading: if a file changes under way, the next run sees it.
        stat = {name: _stat(path) for name, path in files.items()}
        hashes = {name: _sha256(path) for name, path in files.items()}
        channel = task.source == "msd"
        scan = read_ct(task.scan.image, allow_channel=channel)
        stage = "check"
        header = scan.header
        check_hu(task.scan.image.name, scan.image)
        if not header["sform_code"] and not header["qform_code"]:
            raise CaseError(
                task.scan.image.name,
                "sform_code and qform_code are 0, so left and right are unknown",
                "Convert the scan again with its orientation",
            )
        label = read_labels(task.scan.labels, scan.image.shape, scan.affine, channel)
        if task.source != "scans":
            _check_structures(case, label, task.scan)
        original = {
            "shape": list(scan.image.shape),
            "affine": scan.affine.tolist(),
            "spacing": spacing_of(scan.affine),
            "orientation": axis_codes(scan.affine),
            "sform_code": int(header["sform_code"]),
            "qform_code": int(header["qform_code"]),
        }
        stage = "resample"
        image, affine = to_canonical(scan.image, scan.affine)
        label, _ = to_canonical(label, scan.affine)
        del scan
        label = split_sides(label, image)
        settings, spacing = task.settings, spacing_of(affine)
        shape = image.shape
        image = prepare_image(
            image, spacing, settings["spacing"], settings["window"], settings["order"]
        )
        label = resample_labels(label, image.shape)
        stage = "store"
        write_case(
            task.store,
            case,
            image,
            label,
            resampled_spacing(shape, spacing, image.shape),
            {
                "patient": task.scan.patient,
                "site": task.scan.site,
                "source": task.source,
                "original": original,
                "source_hash": hashes,
                "source_stat": stat,
                "recipe": _recipe(task.scan, folder, task.source),
            },
        )
    except CaseError as error:
        return _row(case, stage, error)
    except MemoryError:
        return _row(
            case,
            stage,
            CaseError(case, "not enough memory for this scan", "Use fewer workers"),
        )
    except OSError as error:
        # A file that went away or may not be read; its number says which, and no path is given.
        what = os.strerror(error.errno) if error.errno else type(error).__name__
        return _row(case, stage, CaseError(case, what, "Check the case's files"))
    return None


def _check_structures(case: str, label: np.ndarray, scan: ScanCase) -> None:
    present = label_boxes(label)
    tumors = set(anatomy.TUMORS.values())
    named = {name for file in scan.labels for name in file.names.values() if name}
    if named and named <= set(anatomy.TUMORS):
        # A data set of tumours alone.
        if not present:
            raise CaseError(case, "no tumour is labelled", "Leave the case out")
    elif not set(present) - tumors:
        raise CaseError(case, "no organ is labelled", "Add its organs, or leave the case out")


def _row(case: str, stage: str, error: CaseError) -> Row:
    where = "" if error.case == case else f"{Path(error.case).name}: "
    return {"case": case, "stage": stage, "reason": f"{where}{error.found}. {error.action}"}


# ---------------------------------------------------------------------------- what is done


def _source_of(store: Store, case: str) -> str | None:
    """Returns the source that a stored case came from; None if its record is damaged."""
    try:
        return store.record(case)["source"]
    except CaseError:
        return None


def _taken(case: str, owner: str | None) -> CaseError:
    return CaseError(
        case,
        f"the store has a case of this id from the source {owner}",
        "Rename the case, or give another store",
    )


def _is_current(store: Store, scan: ScanCase, folder: Path, source: str) -> bool:
    """Says whether a case's record was made from its files as they are now."""
    try:
        record = store.record(scan.case)
    except CaseError:
        return False
    if record.get("recipe") != _recipe(scan, folder, source):
        return False
    try:
        files = {_relative(path, folder): path for path in _files(scan)}
        if set(files) != set(record["source_hash"]):
            return False
        # A file that was only touched or copied is hashed; one that is as it was is not.
        return all(
            _stat(path) == record["source_stat"].get(name)
            or _sha256(path) == record["source_hash"][name]
            for name, path in files.items()
        )
    except OSError:
        return False


def _recipe(scan: ScanCase, folder: Path, source: str) -> str:
    """Returns a hash of all beside files and settings that a case depends on."""
    labels = {
        _relative(file.path, folder): {str(value): name for value, name in file.names.items()}
        for file in scan.labels
    }
    text = json.dumps([_VERSION, source, scan.patient, scan.site, labels], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(scan: ScanCase) -> list[Path]:
    return [scan.image, *(file.path for file in scan.labels)]


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------- engine


def _work(tasks: Sequence[Task], workers: int, scheduler: str | None) -> Iterator[Row | None]:
    """Prepares cases, here or by Dask, and yields each one's row as it is finished."""
    room = int(psutil.virtual_memory().available // _WORKER_BYTES)
    count = min(workers or os.cpu_count() or 1, len(tasks), max(1, room))
    size = sum(path.stat().st_size for task in tasks for path in _files(task.scan) if path.exists())
    if not scheduler and (count <= 1 or size < _SMALL):
        for task in tasks:
            preemption.stop_if_told("preparing scans")
            yield prepare_case(task)
        return
    if not tasks:
        return
    # Imported here: a run in one process need not wait for it.
    from distributed import Client, LocalCluster

    if scheduler:
        try:
            client = Client(scheduler, timeout="30s")
        except (OSError, ValueError) as error:
            raise UserError(
                f"scheduler {scheduler!r} does not answer. Start it, or leave scheduler empty"
            ) from error
        with client:
            yield from _gather(client, tasks)
        return
    with (
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            dashboard_address=None,
            silence_logs="ERROR",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield from _gather(client, tasks)


def _gather(client: Any, tasks: Sequence[Task]) -> Iterator[Row | None]:
    from distributed import KilledWorker, as_completed

    futures = {
        client.submit(prepare_case, task, pure=False, retries=1): task.scan.case for task in tasks
    }
    for future in as_completed(futures):
        case = futures.pop(future)
        error = future.exception()
        # Asked first: the signal may have ended the worker as well.
        preemption.stop_if_told("preparing scans")
        if isinstance(error, KilledWorker):
            yield _row(
                case,
                "resample",
                CaseError(case, "its process died, most likely of memory", "Use fewer workers"),
            )
        elif error is not None:
            raise error
        else:
            yield future.result()
        future.release()
