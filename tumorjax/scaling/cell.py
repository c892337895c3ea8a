"""One cell of the grid: train on its scans, segment every test scan, measure, record."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from tumorjax.anatomy import class_table, mirror_table, tumor_classes
from tumorjax.clock import Clock
from tumorjax.evaluation.evaluate import CASE_COLUMNS, evaluate_case
from tumorjax.evaluation.summary import SUMMARY_COLUMNS, summarize
from tumorjax.files import read_arrays, write_bytes_atomic, write_csv_atomic, write_json_atomic
from tumorjax.inference.sliding_window import predict
from tumorjax.scaling.grid import Cell
from tumorjax.settings import plain
from tumorjax.synthesis import online
from tumorjax.training import preemption
from tumorjax.training.segmenter import Training, Transform, train_segmenter
from tumorjax.volumes import Store

RESULT_COLUMNS = ("cell", "arm", "n_real", "n_synthetic", "seed", "split", *SUMMARY_COLUMNS)


@dataclass(frozen=True)
class Scans:
    """What a cell works on.

    Attributes:
        real: annotated scans, cases of `store`.
        synthetic: scans with synthetic tumours, cases of `synthetic_store`.
        tests: (split, case of `store`).
        hosts: healthy scans, cases of `store`, that get new tumours in every step; a scan that is
            named several times comes as often.
    """

    store: Store
    real: Sequence[str]
    synthetic_store: Store | None
    synthetic: Sequence[str]
    tests: Sequence[tuple[str, str]]
    hosts: Sequence[str] = ()


def is_done(folder: Path) -> bool:
    """Whether the results of a cell are complete; its result file is written last."""
    return (folder / "results.json").is_file()


def run_cell(
    cell: Cell,
    config: ConfigDict,
    scans: Scans,
    folder: Path,
    mesh: Mesh,
    clock: Clock,
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, row: None,
) -> None:
    """Trains and tests a cell, or goes on where that was stopped.

    Args:
        cell: which.
        config: of the study.
        scans: to train and to test on.
        folder: gets config.json, checkpoints/, metrics.csv, cases/, cases.csv, samples.npz and
            results.json.
        mesh: of the devices.
        clock: gets the phases load, train, infer and metrics.
        progress: called with each row of the training curve.
    """
    config = ConfigDict(config.to_dict())
    config.seed = cell.seed
    training = training_of(cell, scans, folder, progress)
    apply = train_segmenter(
        config,
        training.sources,
        folder,
        mesh,
        clock=clock,
        progress=progress,
        transform=transform_of(config, mesh) if scans.hosts else None,
        hosts=training.hosts,
    )
    segment_and_measure(apply, config, scans, folder, clock)
    conclude(cell, config, scans, folder, clock)


def training_of(
    cell: Cell,
    scans: Scans,
    folder: Path,
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, row: None,
) -> Training:
    """Returns what a cell's network is trained on."""
    sources = [(scans.store, case) for case in scans.real]
    if scans.synthetic_store is not None:
        sources += [(scans.synthetic_store, case) for case in scans.synthetic]
    hosts = range(len(sources), len(sources) + len(scans.hosts))
    sources += [(scans.store, case) for case in scans.hosts]
    return Training(cell.seed, sources, folder, hosts, progress)


def transform_of(config: ConfigDict, mesh: Mesh) -> Transform:
    """Returns what puts tumours into crops of `Scans.hosts`."""
    return online.from_settings(
        plain(config.synthesis), config.task.classes, config.preparation, mesh
    )


def conclude(cell: Cell, config: ConfigDict, scans: Scans, folder: Path, clock: Clock) -> None:
    """Gathers the results of a cell of which every test scan was measured."""
    rows = [
        row
        for _, case in scans.tests
        for row in json.loads((folder / "cases" / f"{case}.json").read_text())
    ]
    write_csv_atomic(folder / "cases.csv", rows, CASE_COLUMNS)
    write_bytes_atomic(folder / "samples.npz", _gather_samples(config, scans.tests, folder))
    lines = []
    with clock("metrics"):
        for split in dict.fromkeys(split for split, _ in scans.tests):
            for line in summarize([r for r in rows if r["split"] == split], config.evaluation):
                lines.append(
                    {
                        "cell": cell.id,
                        "arm": cell.arm,
                        "n_real": cell.n_real,
                        "n_synthetic": len(scans.synthetic) + len(scans.hosts),
                        "seed": cell.seed,
                        "split": split,
                    }
                    | line
                )
    write_json_atomic(folder / "results.json", lines)


def segment_and_measure(
    apply: jax.tree_util.Partial,
    config: ConfigDict,
    scans: Scans,
    folder: Path,
    clock: Clock,
    mesh: Mesh | None = None,
    part: slice = slice(None),
) -> None:
    """Segments and measures test scans; those already measured are not done again.

    Args:
        apply: the trained network.
        config: of the study.
        scans: with the tests.
        folder: of the cell; gets cases/.
        clock: gets the phases load, infer and metrics.
        mesh: devices of this process to segment on; None for that on which the weights lie.
        part: of the tests, where several processes share them.
    """
    table = class_table(config.task.classes)
    mirrored = None
    if 0 in tuple(config.inference.mirror_axes):
        mirrored = mirror_table(config.task.classes)
    samples = sample_cases(config, scans.tests)
    for split, case in scans.tests[part]:
        preemption.stop_if_told(f"testing {folder.name}")
        path = folder / "cases" / f"{case}.json"
        picture = folder / "cases" / f"{case}.npz"
        if path.is_file() and (case not in samples or picture.is_file()):
            continue
        with clock("load"):
            image = scans.store.read(case, "image")
            truth = table[scans.store.read(case, "label")]
            record = scans.store.record(case)
        with clock("infer"):
            probabilities = predict(
                apply,
                image,
                tuple(config.training.patch_size),
                overlap=config.inference.overlap,
                mirror_axes=tuple(config.inference.mirror_axes),
                batch_size=config.inference.batch_size,
                mirror_table=mirrored,
                skip_air=config.inference.skip_air,
                mesh=mesh,
            )
            prediction = probabilities.argmax(-1).astype(np.uint8)
        with clock("metrics"):
            measured = evaluate_case(
                truth,
                prediction,
                record["spacing"],
                config.task.classes,
                config.evaluation,
                probabilities,
                case=case,
                patient=record["patient"],
                split=split,
            )
        if case in samples:
            tumors = list(tumor_classes(config.task.classes).values())
            _save_sample(picture, image, truth, prediction, tumors)
        write_json_atomic(path, measured)


def sample_cases(config: ConfigDict, tests: Sequence[tuple[str, str]]) -> set[str]:
    """The test scans that the report shows: the first `report.samples` of each split."""
    chosen = set()
    for split in dict.fromkeys(split for split, _ in tests):
        chosen |= set([case for s, case in tests if s == split][: config.report.samples])
    return chosen


def _save_sample(
    path: Path,
    image: Float[np.ndarray, "x y z"],
    truth: UInt8[np.ndarray, "x y z"],
    prediction: UInt8[np.ndarray, "x y z"],
    tumors: Sequence[int],
) -> None:
    # The slice with most tumour shows most; without any, the one with most foreground.
    area = np.isin(truth, tumors).sum((0, 1))
    z = int((area if area.any() else (truth > 0).sum((0, 1))).argmax())
    _write_npz(path, image=image[:, :, z], truth=truth[:, :, z], prediction=prediction[:, :, z])


def _gather_samples(config: ConfigDict, tests: Sequence[tuple[str, str]], folder: Path) -> bytes:
    chosen = [(split, case) for split, case in tests if case in sample_cases(config, tests)]
    slices = [read_arrays(folder / "cases" / f"{case}.npz") for _, case in chosen]
    arrays: dict[str, Any] = {}
    if slices:
        # Scans differ in shape; pictures are padded to one, with air and background.
        shape = np.max([s["image"].shape for s in slices], axis=0)
        for name in ("image", "truth", "prediction"):
            arrays[name] = np.stack(
                [
                    np.pad(s[name], [(0, n - m) for n, m in zip(shape, s[name].shape, strict=True)])
                    for s in slices
                ]
            )
    arrays["case"] = np.array([case for _, case in chosen])
    arrays["split"] = np.array([split for split, _ in chosen])
    arrays["class_names"] = np.array(list(config.task.classes))
    return _npz_bytes(**arrays)


def _write_npz(path: Path, **arrays: np.ndarray) -> None:
    write_bytes_atomic(path, _npz_bytes(**arrays))


def _npz_bytes(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
