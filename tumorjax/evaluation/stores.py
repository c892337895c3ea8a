"""Evaluation of a checkpoint on a store, on the network's grid.

The next scan is read while the network computes on this one, and processes of their own measure
what it has finished.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from tumorjax import anatomy
from tumorjax.errors import CaseError, UserError
from tumorjax.evaluation import workers
from tumorjax.evaluation.cases import tumor_scores
from tumorjax.evaluation.folders import check_name, chosen_tumors, read_patients
from tumorjax.evaluation.measure import Task, measure, tumor_region
from tumorjax.evaluation.records import Outcome, hash_weights, is_kept
from tumorjax.evaluation.settings import case_settings
from tumorjax.inference import sliding_window
from tumorjax.settings import plain
from tumorjax.training import checkpoints
from tumorjax.volumes import Store, open_store


class Model(NamedTuple):
    """A checkpoint with the scans that it is tested on.

    Attributes:
        apply: see `checkpoints.load_model`.
        trained: configuration of its training.
        store: prepared scans.
        cases: of the store.
    """

    apply: jax.tree_util.Partial
    trained: ConfigDict
    store: Store
    cases: list[str]

    @property
    def grid(self) -> str:
        """Says which grid the numbers are on."""
        size = " x ".join(f"{length:g}" for length in self.trained.preparation.spacing)
        return f"the network's grid, {size} mm"

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(self.apply))


class _Scan(NamedTuple):
    names: dict[str, str]
    made_from: dict[str, Any]
    image: Float[np.ndarray, "x y z"]
    truth: UInt8[np.ndarray, "x y z"]
    spacing: tuple[float, ...]


def open_model(config: ConfigDict) -> Model:
    """Opens config.checkpoint and config.data.store.

    Raises:
        UserError: one is missing, or they do not belong together.
    """
    if not config.data.store:
        raise UserError("config.checkpoint needs config.data.store, the scans to test on")
    apply, trained = checkpoints.load_model(config.checkpoint)
    store = open_store(config.data.store)
    cases = store.cases
    missing = sorted(set(config.data.cases) - set(cases))
    if missing:
        raise UserError(
            f"{config.data.store}: has no case {', '.join(missing[:5])}. It has {len(cases)}"
            " cases; correct config.data.cases"
        )
    window = (store.settings or {}).get("window")
    if window is not None and not np.allclose(window, trained.preparation.window):
        raise UserError(
            f"{config.data.store}: made with the window {tuple(window)} HU, but the network was"
            f" trained with {tuple(trained.preparation.window)}. Prepare the store with that"
        )
    return Model(apply, trained, store, list(config.data.cases) or cases)


def task_of_model(
    config: ConfigDict,
    settings: dict[str, Any],
    thresholds: tuple[float, ...],
    workdir: Path,
    model: Model,
) -> Task:
    """Returns what the cases of a store share.

    Raises:
        UserError: config.tumors has a class that the network does not know.
    """
    classes = model.trained.task.classes
    labels = {name: index for index, name in enumerate(classes, start=1)}
    tumors = chosen_tumors(config.tumors, labels, list(anatomy.tumor_classes(classes)))
    return Task(workdir, labels, tumors, settings, thresholds, config.worst > 0, labels)


def outcomes(config: ConfigDict, task: Task, model: Model) -> Iterator[Outcome]:
    """Segments and measures the cases of a store.

    Args:
        config: of the job; inference, patients, split and workers are read.
        task: what all cases share.
        model: the network and its scans.
    """
    # One of them is the network's.
    processes = workers.count_of(config.workers) - 1
    work = _segmented(config, task, model)
    return workers.in_processes(measure, work, processes, len(model.cases))


def _segmented(config: ConfigDict, task: Task, model: Model) -> Iterator[Outcome | tuple]:
    """Yields what is to be measured, one scan at a time."""
    trained = model.trained
    classes = trained.task.classes
    table = anatomy.class_table(classes)
    axes = tuple(config.inference.mirror_axes)
    mirrored = anatomy.mirror_table(classes) if 0 in axes else None
    people = read_patients(config.patients)
    common = {
        "weights": hash_weights(model.apply),
        "inference": plain(config.inference),
        "classes": plain(classes),
        "tumors": plain(task.tumors),
        "settings": case_settings(task.settings),
        "thresholds": list(task.thresholds),
        "pictures": task.pictures,
    }
    indices = {name: index for index, name in enumerate(classes, start=1)}
    tumors = {name: indices[name] for name in task.tumors}
    lowest = min(task.thresholds, default=1.0)

    def read(case: str) -> Outcome | _Scan:
        try:
            check_name(case)
            record = model.store.record(case)
            names = {"case": case, "patient": record["patient"], "split": config.split}
            names |= people.get(case, {})
            made_from = {"names": names, "scan": record["checksum"], **common}
            if is_kept(task.workdir, case, made_from):
                return Outcome(case)
            _check_spacing(case, record, trained)
            image, label = model.store.read(case, "image"), model.store.read(case, "label")
        except CaseError as error:
            return Outcome(case, error=error)
        return _Scan(names, made_from, image, table[label], tuple(record["spacing"]))

    for case, future in workers.ahead(read, model.cases):
        scan = future.result()
        if isinstance(scan, Outcome):
            yield scan
            continue
        try:
            probabilities = sliding_window.predict(
                model.apply,
                scan.image,
                tuple(trained.training.patch_size),
                overlap=config.inference.overlap,
                mirror_axes=axes,
                batch_size=config.inference.batch_size,
                mirror_table=mirrored,
                # As the study that trained it tests it.
                skip_air=bool(trained.get("inference", {}).get("skip_air", False)),
            )
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = "not enough memory for this scan"
            action = "Lower inference.batch_size, or use a larger machine"
            yield Outcome(case, error=CaseError(case, found, action))
            continue
        prediction = np.argmax(probabilities, axis=-1).astype(np.uint8)
        region = None
        if tumors:
            scores = tumor_scores(probabilities, tumors)
            region = tumor_region(scan.truth, prediction, probabilities, tumors, lowest, scores)
        files = f"{config.data.store}: {case}", f"{config.checkpoint}: {case}"
        del probabilities
        yield (
            task,
            scan.names,
            scan.made_from,
            scan.truth,
            prediction,
            scan.spacing,
            region,
            files,
        )


def _check_spacing(case: str, record: Mapping[str, Any], trained: ConfigDict) -> None:
    """Refuses a scan whose spacing is not what its training's becomes in whole voxels.

    The grid keeps the scan's extent, so an axis of n voxels is up to half a voxel in n off.
    """
    wanted, shape = trained.preparation.spacing, np.array(record["shape"])
    off = np.abs(shape * np.array(record["spacing"]) / wanted - shape)
    if (off > 0.5 + 1e-6).any():
        raise CaseError(
            case,
            f"spacing {tuple(record['spacing'])} mm, but the network was trained at"
            f" {tuple(wanted)}",
            "Prepare the store with that spacing",
        )
