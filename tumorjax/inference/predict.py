"""The job "prediction": CT scans in, masks on the scans' own grids out.

A scan goes the way that training scans went (RAS+, the network's spacing and window), through the
sliding window, and back (native_grid.py). For networks that nnU-Net trained, nnunet_model.py goes
nnU-Net's way there and back.
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
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from tumorjax.anatomy import mirror_table
from tumorjax.errors import CaseError, UserError
from tumorjax.files import check_case_id, write_csv_atomic, write_json_atomic
from tumorjax.geometry import from_canonical, prepare_image, spacing_of, to_canonical
from tumorjax.inference import nnunet_model, sliding_window
from tumorjax.inference.native_grid import Structure, native_labels, structures
from tumorjax.inference.network import Network, Prepared
from tumorjax.models import nnunet_plans
from tumorjax.nifti import ENDINGS, Scan, check_hu, read_ct, write_mask
from tumorjax.settings import first_difference, plain
from tumorjax.training import checkpoints

FORMS = ("labels", "structures")

T = TypeVar("T")
R = TypeVar("R")


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
    network = open_network(config)

    waiting = {c: p for c, p in scans.items() if not mask_path(output, c, config.form).exists()}
    _check_output(output, len(scans) - len(waiting), settings_record(config, network))
    logging.info("%s: %d of %d scans to do", output, len(waiting), len(scans))
    bar = tqdm(total=len(waiting), unit="scan", disable=not sys.stderr.isatty())
    with bar:
        for case, future in _ahead(network.prepare, waiting):
            begin = time.perf_counter()
            try:
                prepared = future.result()
                scores = sliding_window.predict(
                    network.apply, prepared.image, network.patch_size, **network.window
                )
                labels = network.labels(scores, prepared)
                _write(output, case, config.form, labels, prepared.scan, network.structures)
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


# ---------------------------------------------------------------------------- networks


def open_network(config: ConfigDict) -> Network:
    """Opens the network of config.checkpoint, whether it was trained here or by nnU-Net.

    Raises:
        UserError: the folder holds neither, or what it holds does not belong together.
    """
    if nnunet_plans.is_model_folder(config.checkpoint):
        if config.step is not None:
            raise UserError(
                f"config.step is {config.step}, but {config.checkpoint} is nnU-Net's and has no"
                " steps. Leave it out"
            )
        return nnunet_model.open_network(
            config.checkpoint, config.folds, config.inference, config.form
        )
    if config.folds:
        raise UserError(
            f"config.folds is {tuple(config.folds)}, but {config.checkpoint} is no model folder of"
            " nnU-Net (no plans.json in it). Leave it out"
        )
    apply, trained = checkpoints.load_model(config.checkpoint, config.step)
    table = structures(trained.task.classes)
    window = plain(config.inference)
    window["mirror_axes"] = window["mirror_axes"] or []
    swap = mirror_table(trained.task.classes) if 0 in window["mirror_axes"] else None

    def labels(probabilities: Any, prepared: Prepared) -> Any:
        found = native_labels(probabilities, prepared.image, prepared.shape, table)
        return from_canonical(found, prepared.scan.affine)

    x, y, z = trained.training.patch_size
    record = {
        "classes": plain(trained.task.classes),
        "spacing": list(trained.preparation.spacing),
        "window": list(trained.preparation.window),
        "order": trained.preparation.get("order", 3),
    }
    return Network(
        apply,
        (x, y, z),
        window | {"mirror_table": swap},
        table,
        lambda path: prepare_scan(path, trained.preparation),
        labels,
        record,
    )


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


def prepare_scan(path: str | os.PathLike, preparation: Any) -> Prepared:
    """Reads a scan and brings it to the grid and values that the network was trained on.

    Args:
        path: NIfTI file.
        preparation: spacing (mm), window (HU that become 0 and 1) and order of the training data.

    Raises:
        CaseError: the file cannot be used.
    """
    scan = read_ct(path)
    check_hu(str(path), scan.image)
    image, affine = to_canonical(scan.image, scan.affine)
    prepared = prepare_image(
        image,
        spacing_of(affine),
        preparation.spacing,
        preparation.window,
        preparation.get("order", 3),
    )
    x, y, z = image.shape
    return Prepared(scan, (x, y, z), prepared)


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


def settings_record(config: ConfigDict, network: Network) -> dict[str, Any]:
    """Returns all that masks depend on beside the scans, for labels.json.

    Its "labels" are those of an nnU-Net dataset.json, so that the job "evaluation" can read it.
    """
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(network.apply):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    # The batch size changes nothing but the speed; the mirror table follows from the classes.
    inference = {k: v for k, v in network.window.items() if k not in ("batch_size", "mirror_table")}
    names = {structure.name: structure.value for structure in network.structures}
    return {
        "labels": {"background": 0} | names,
        "form": config.form,
        "inference": inference,
        "patch_size": list(network.patch_size),
        **network.record,
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
