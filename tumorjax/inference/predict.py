"""The job "prediction": CT scans in, masks on the scans' own grids out.

A scan goes the way that training scans went (RAS+, the network's spacing and window), through the
sliding window, and back: class by class, with a running best, so that no more than one class is
ever held at the scan's own resolution.
"""

import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Num, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from tumorjax.anatomy import LABELS, PAIRS, class_table, mirror_table
from tumorjax.errors import CaseError, UserError
from tumorjax.files import check_case_id, write_csv_atomic, write_json_atomic
from tumorjax.geometry import from_canonical, resample, resample_to_shape, spacing_of, to_canonical
from tumorjax.inference import sliding_window
from tumorjax.nifti import ENDINGS, Scan, read_ct, write_mask
from tumorjax.settings import first_difference, plain
from tumorjax.training import checkpoints

FORMS = ("labels", "structures")

T = TypeVar("T")
R = TypeVar("R")


class Structure(NamedTuple):
    """One value of the output.

    Attributes:
        name: of the label, or of the task's class where that unites several.
        value: in a label map.
        class_index: of the class in the network's output.
        side: "left" or "right" where the class unites both sides of a pair, else "".
    """

    name: str
    value: int
    class_index: int
    side: str


class Prepared(NamedTuple):
    """A scan, and its image as the network wants it.

    Attributes:
        scan: as its file has it.
        shape: of the scan in RAS+.
        image: [0, 1] at the network's spacing, RAS+.
    """

    scan: Scan
    shape: tuple[int, int, int]
    image: Float[np.ndarray, "x y z"]


def run(config: ConfigDict, workdir: Path) -> int:
    """Predicts masks for all scans of a file or folder, see configs/prediction.py.

    Returns:
        0, or 1 where cases were set aside: they are in workdir/rejected.csv.

    Raises:
        UserError: the config is wrong, or the output holds masks made with other settings.
    """
    workdir = Path(workdir)
    if config.form not in FORMS:
        raise UserError(f"config.form is {config.form!r}. Expected one of {', '.join(FORMS)}")
    for key in ("checkpoint", "input"):
        if not config[key]:
            raise UserError(f"config.{key} is empty. Set it with --config.{key}=...")
    scans, rejected = find_scans(config.input)
    output = Path(config.output or workdir / "predictions")
    if output.resolve() in (Path(config.input).resolve(), Path(config.input).resolve().parent):
        raise UserError(f"{output}: config.output is where the scans are. Choose another folder")
    apply, trained = checkpoints.load_model(config.checkpoint, config.step)
    table = structures(trained.task.classes)
    flips = None
    if 0 in tuple(config.inference.mirror_axes):
        flips = mirror_table(trained.task.classes)

    waiting = {c: p for c, p in scans.items() if not mask_path(output, c, config.form).exists()}
    _check_output(output, len(scans) - len(waiting), settings_record(config, trained, apply, table))
    logging.info("%s: %d of %d scans to do", output, len(waiting), len(scans))
    spacing, window = trained.preparation.spacing, trained.preparation.window
    bar = tqdm(total=len(waiting), unit="scan", disable=not sys.stderr.isatty())
    with bar:
        for case, future in _ahead(lambda path: prepare_scan(path, spacing, window), waiting):
            begin = time.perf_counter()
            try:
                prepared = future.result()
                probabilities = sliding_window.predict(
                    apply,
                    prepared.image,
                    trained.training.patch_size,
                    mirror_table=flips,
                    **plain(config.inference),
                )
                labels = native_labels(probabilities, prepared.image, prepared.shape, table)
                labels = from_canonical(labels, prepared.scan.affine)
                _write(output, case, config.form, labels, prepared.scan, table)
            except (CaseError, MemoryError, jax.errors.JaxRuntimeError) as error:
                rejected.append(_rejected(case, error))
                logging.warning("set aside: %s", rejected[-1]["reason"])
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise UserError(
                    f"{output}: no space left on the disk. Free some and run again: what is"
                    " finished stays"
                ) from error
            bar.update()
            logging.info("%s: %.1f s", case, time.perf_counter() - begin)

    workdir.mkdir(parents=True, exist_ok=True)
    if rejected:
        rejected.sort(key=lambda row: row["case"])
        write_csv_atomic(workdir / "rejected.csv", rejected, ("case", "stage", "reason"))
        print(f"{output}: {len(rejected)} cases set aside, see {workdir / 'rejected.csv'}")
        return 1
    (workdir / "rejected.csv").unlink(missing_ok=True)
    state = f"masks of {len(waiting)} scans written" if waiting else "already finished"
    print(f"{output}: {state}")
    return 0


# ---------------------------------------------------------------------------- scans


def find_scans(source: str | os.PathLike) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """Returns the scans of a file or folder by case id, and those that no id fits.

    Args:
        source: a NIfTI file; a folder of them; or a folder of folders with a ct.nii.gz.

    Returns:
        Case id -> file, in alphabetical order. nnU-Net's channel suffix _0000 is no part of the id.
        Rows (case, stage, reason) of what is set aside: unsafe ids, two files of one id, several
        channels.

    Raises:
        UserError: there is no such file, or no scan in the folder.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder (config.input)")
    if source.is_file():
        if not source.name.endswith(ENDINGS):
            raise UserError(f"{source}: expected a .nii.gz or .nii file, or a folder of them")
        files = [source]
    else:
        files = sorted(
            path
            for path in [*source.iterdir(), *source.glob("*/ct.nii.gz")]
            if path.is_file() and path.name.endswith(ENDINGS) and path.name[0] != "."
        )
    if not files:
        raise UserError(
            f"{source}: no .nii.gz or .nii file in it, and no CASE/ct.nii.gz. Give the folder that"
            " holds the scans (nnU-Net: imagesTs)"
        )
    stems = {path: _stem(path, source) for path in files}
    # A file ..._0001 is a second channel only beside a first one: else numbers end many a name.
    first_channels = {s.removesuffix("_0000") for s in stems.values() if s.endswith("_0000")}
    found: dict[str, list[Path]] = {}
    for path, stem in stems.items():
        base = stem[:-5]
        is_channel = stem[-5:-4] == "_" and stem[-4:].isdigit() and base in first_channels
        found.setdefault(base if is_channel else stem, []).append(path)

    scans, rejected = {}, []
    for case, paths in sorted(found.items()):
        try:
            check_case_id(case)
            if len(paths) > 1:
                names = ", ".join(str(path.relative_to(source)) for path in paths)
                raise CaseError(case, f"{len(paths)} files of one case ({names})", "Keep one CT")
            scans[case] = paths[0]
        except (UserError, CaseError) as error:
            rejected.append({"case": case, "stage": "find", "reason": str(error)})
    return scans, rejected


def prepare_scan(
    path: str | os.PathLike, spacing: Sequence[float], window: Sequence[float]
) -> Prepared:
    """Reads a scan and brings it to the grid and values that the network was trained on.

    Raises:
        CaseError: the file cannot be used.
    """
    scan = read_ct(path)
    image, affine = to_canonical(scan.image, scan.affine)
    low, high = window
    resampled = resample(image, spacing_of(affine), spacing)
    np.clip(resampled, low, high, out=resampled)
    resampled -= low
    resampled /= high - low
    x, y, z = image.shape
    return Prepared(scan, (x, y, z), resampled)


def _stem(path: Path, source: Path) -> str:
    if path.parent != source and path != source:
        return path.parent.name
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _ahead(function: Callable[[T], R], items: Mapping[str, T]) -> Iterator[tuple[str, Future[R]]]:
    """Yields results in order; the next one is worked on while the caller uses this one."""
    with ThreadPoolExecutor(1) as pool:
        rest = iter(items.items())
        waiting = [(c, pool.submit(function, item)) for c, item in itertools.islice(rest, 1)]
        while waiting:
            current = waiting.pop()
            waiting = [(c, pool.submit(function, item)) for c, item in itertools.islice(rest, 1)]
            yield current


def _rejected(case: str, error: BaseException) -> dict[str, str]:
    if isinstance(error, CaseError):
        return {"case": case, "stage": "read", "reason": str(error)}
    memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    if not memory:
        raise error
    reason = "not enough memory for this scan. Lower inference.batch_size, or use a larger machine"
    return {"case": case, "stage": "predict", "reason": f"{case}: {reason}"}


# ---------------------------------------------------------------------------- masks


def structures(classes: Mapping[str, Sequence[str]]) -> list[Structure]:
    """Returns what the output tells apart, for a task's classes.

    A class of one label has that label's name and id. A class that unites the two sides of a pair
    (kidney) becomes both again, by the side of the body's middle that a voxel lies on. Any other
    union keeps the class's name and takes the id of its first label.

    Raises:
        UserError: a label is unknown or in two classes.
    """
    class_table(classes)
    table = []
    for index, (name, labels) in enumerate(classes.items(), start=1):
        pair = next((pair for pair in PAIRS if set(pair) == set(labels)), None)
        if pair:
            left, right = pair
            table.append(Structure(left, LABELS[left], index, "left"))
            table.append(Structure(right, LABELS[right], index, "right"))
        else:
            alone = len(labels) == 1
            table.append(Structure(labels[0] if alone else name, LABELS[labels[0]], index, ""))
    return table


def native_labels(
    probabilities: Float[np.ndarray, "x y z classes+1"],
    image: Float[np.ndarray, "x y z"],
    shape: tuple[int, int, int],
    table: Sequence[Structure],
) -> UInt8[np.ndarray, "x2 y2 z2"]:
    """Returns the label map on another grid of the same extent.

    Args:
        probabilities: of background and the task's classes.
        image: that they are of, [0, 1], to find the middle of the body in.
        shape: of the grid wanted.
        table: what the output tells apart.

    Returns:
        The most probable class of each voxel, after linear interpolation of the probabilities,
        as the values of `table`.
    """
    winner = argmax_on_grid(probabilities, shape)
    labels = np.zeros(shape, np.uint8)
    middle = body_middle(image) * shape[0]
    is_right = (np.arange(shape[0]) + 0.5 >= middle)[:, None, None]
    sides = {"": np.array(True), "left": ~is_right, "right": is_right}
    for structure in table:
        where = (winner == structure.class_index) & sides[structure.side]
        labels[where] = structure.value
    return labels


def argmax_on_grid(
    probabilities: Float[np.ndarray, "x y z classes"], shape: tuple[int, int, int]
) -> UInt8[np.ndarray, "x2 y2 z2"]:
    """Returns the most probable class on another grid, with one class there at a time."""
    classes = probabilities.shape[-1]
    best = resample_to_shape(probabilities[..., 0], shape, 1)
    winner = np.zeros(shape, np.uint8)
    for index in range(1, classes):
        # Interpolation never exceeds the values it lies between, and the best of n
        # probabilities is at least 1/n: below that a class wins nowhere.
        if probabilities[..., index].max() * classes < 0.999:
            continue
        one = resample_to_shape(probabilities[..., index], shape, 1)
        better = one > best
        winner[better] = index
        np.copyto(best, one, where=better)
    return winner


def body_middle(image: Num[np.ndarray, "x y z"]) -> float:
    """Returns where half of the body lies on either side, as a share of the x axis.

    Args:
        image: [0, 1]; the body is what is above 0 (air).
    """
    across = np.cumsum(np.count_nonzero(image > 0, axis=(1, 2)))
    if across[-1] == 0:
        return 0.5
    return (int(np.searchsorted(across, across[-1] / 2)) + 0.5) / len(across)


# ---------------------------------------------------------------------------- files


def mask_path(output: Path, case: str, form: str) -> Path:
    """Returns the file or folder that stands for a finished case."""
    return output / f"{case}.nii.gz" if form == "labels" else output / case / "segmentations"


def _write(
    output: Path,
    case: str,
    form: str,
    labels: UInt8[np.ndarray, "i j k"],
    scan: Scan,
    table: Sequence[Structure],
) -> None:
    target = mask_path(output, case, form)
    if form == "labels":
        write_mask(target, labels, scan.header)
        return
    # All files of a case appear at once.
    target.parent.mkdir(parents=True, exist_ok=True)
    for left_over in target.parent.glob(".segmentations-*"):
        shutil.rmtree(left_over)
    aside = Path(tempfile.mkdtemp(prefix=".segmentations-", dir=target.parent))
    try:
        for structure in table:
            mask = (labels == structure.value).astype(np.uint8)
            write_mask(aside / f"{structure.name}.nii.gz", mask, scan.header)
        aside.chmod(target.parent.stat().st_mode)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def settings_record(
    config: ConfigDict, trained: Any, apply: Any, table: Sequence[Structure]
) -> dict[str, Any]:
    """Returns all that masks depend on beside the scans, for labels.json.

    Its "labels" are those of an nnU-Net dataset.json, so that the job "evaluation" can read it.
    """
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(apply):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return {
        "labels": {"background": 0} | {structure.name: structure.value for structure in table},
        "form": config.form,
        "classes": plain(trained.task.classes),
        # The batch size changes nothing but the speed.
        "inference": {k: v for k, v in plain(config.inference).items() if k != "batch_size"},
        "patch_size": list(trained.training.patch_size),
        "spacing": list(trained.preparation.spacing),
        "window": list(trained.preparation.window),
        "weights_sha256": hashed.hexdigest(),
    }


def _check_output(output: Path, finished: int, record: dict[str, Any]) -> None:
    """Writes labels.json, or compares with the one that is there: masks must not be mixed."""
    path = output / "labels.json"
    if not path.is_file():
        if finished:
            raise UserError(
                f"{output}: holds masks of {finished} of the scans, but no labels.json that says"
                " how they were made. Choose another config.output"
            )
        write_json_atomic(path, record)
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}). Remove it") from error
    difference = first_difference(before, record, "labels.json")
    if difference:
        raise UserError(
            f"{output}: holds masks made with other settings ({difference}). Choose another"
            " config.output, or remove it"
        )
