"""Evaluation as a job: numbers from two folders of masks, or from a checkpoint and a store.

Each case's numbers are kept in workdir/cases/CASE.json beside what they were made from, so that a
second run does only what is missing or changed. From them come cases.csv, summary.csv and
summary.json; the last has nnU-Net's form.
"""

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from tumorjax import anatomy
from tumorjax.errors import CaseError, UserError
from tumorjax.evaluation.cases import UNION, evaluate_case, evaluate_tumors, label_overlap
from tumorjax.evaluation.masks import list_masks, read_labels, read_pair
from tumorjax.evaluation.settings import DEFAULTS, complete_settings
from tumorjax.evaluation.summary import (
    CASE_COLUMNS,
    METRICS,
    SUMMARY_COLUMNS,
    paired_difference,
    summarize,
)
from tumorjax.files import check_case_id, read_csv, write_csv_atomic, write_json_atomic
from tumorjax.settings import plain

__all__ = [
    "CASE_COLUMNS",
    "DEFAULTS",
    "METRICS",
    "SUMMARY_COLUMNS",
    "UNION",
    "evaluate_case",
    "label_overlap",
    "paired_difference",
    "run",
    "summarize",
]

Labels = Mapping[str, int | Sequence[int]]


def run(config: ConfigDict, workdir: Path) -> int:
    """Evaluates masks or a checkpoint, see configs/evaluation.py.

    Returns:
        Exit code: 0 all cases done, 1 some set aside in workdir/rejected.csv.

    Raises:
        UserError: the configuration asks for neither or both, or what it names is not there.
    """
    workdir = Path(workdir)
    masks, network = bool(config.truth or config.prediction), bool(config.checkpoint)
    if masks == network:
        raise UserError(
            "evaluation needs either config.truth and config.prediction (two folders of masks), or"
            " config.checkpoint and config.data.store"
        )
    settings = complete_settings(config.evaluation) | {"seed": config.seed}
    if masks:
        labels, results = _from_masks(config, settings, workdir)
    else:
        labels, results = _from_checkpoint(config, settings, workdir)
    done, fresh, rejected = [], 0, []
    for result, is_fresh in results:
        if isinstance(result, CaseError):
            rejected.append(result)
        else:
            done.append(result)
            fresh += is_fresh
    rejected.sort(key=lambda error: error.case)
    done.sort(key=lambda result: result["case"])
    _write_tables(done, rejected, labels, settings, workdir)
    if rejected:
        for error in rejected:
            print(f"set aside: {error}", file=sys.stderr)
        print(f"{workdir}: {len(done)} cases evaluated, {len(rejected)} in rejected.csv")
        return 1
    if not fresh:
        print(f"{workdir}: finished before, all {len(done)} cases are there")
    else:
        print(f"{workdir}: {fresh} cases evaluated, {len(done) - fresh} were there")
    return 0


# Two folders of masks


def _from_masks(
    config: ConfigDict, settings: dict[str, Any], workdir: Path
) -> tuple[Labels, Iterator[tuple[dict | CaseError, bool]]]:
    if not config.truth or not config.prediction:
        raise UserError("config.truth and config.prediction go together: set both folders")
    labels = read_labels(config.labels)
    tumors = _tumors(config, labels)
    truths, predictions = list_masks(config.truth), list_masks(config.prediction)
    patients = _patients(config.patients)
    results: list[tuple[dict | CaseError, bool]] = []
    work: list[tuple] = []
    for case in sorted(set(truths) | set(predictions)):
        try:
            files = [
                _only_file(case, found.get(case, []), folder)
                for found, folder in ((truths, config.truth), (predictions, config.prediction))
            ]
            hashes = [_hash(case, path) for path in files]
        except CaseError as error:
            results.append((error, False))
            continue
        names = {"case": case, "patient": patients.get(case, case), "split": config.split}
        made_from = {
            "names": names,
            "files": hashes,
            "labels": labels,
            "tumors": tumors,
            "settings": settings,
        }
        kept = _kept(workdir, case, made_from)
        if kept is None:
            work.append((made_from, names, *files, labels, tumors, settings, workdir))
        else:
            results.append((kept, False))
    return labels, _in_processes(_evaluate_files, work, config.workers, results)


def _evaluate_files(
    made_from: dict[str, Any],
    names: dict[str, str],
    truth: Path,
    prediction: Path,
    labels: Labels,
    tumors: Labels,
    settings: dict[str, Any],
    workdir: Path,
) -> tuple[dict | CaseError, bool]:
    try:
        true_mask, predicted_mask, spacing = read_pair(truth, prediction, labels)
    except CaseError as error:
        found = f"{error.case}: {error.found}"
        return CaseError(names["case"], found, error.action), False
    rows = evaluate_tumors(true_mask, predicted_mask, spacing, tumors, settings, None, names)
    result = {
        "case": names["case"],
        "rows": rows,
        "overlap": label_overlap(true_mask, predicted_mask, labels),
        "reference_file": str(truth),
        "prediction_file": str(prediction),
    }
    return _keep(workdir, made_from, result), True


def _tumors(config: ConfigDict, labels: Labels) -> Labels:
    wanted = list(config.tumors) or [name for name in labels if name in anatomy.TUMORS]
    missing = [name for name in wanted if name not in labels]
    if missing:
        raise UserError(
            f"config.tumors has {', '.join(missing)}, which is no label. Labels are"
            f" {', '.join(labels)}"
        )
    if not wanted:
        print(
            f"none of the labels {', '.join(labels)} is known as a tumour: only summary.json will"
            " say something. Name the tumours in config.tumors"
        )
    return {name: labels[name] for name in wanted}


def _only_file(case: str, paths: list[Path], folder: str) -> Path:
    try:
        check_case_id(case)
    except UserError as error:
        raise CaseError(case, str(error), "Rename both files") from error
    if len(paths) != 1:
        found = "no file" if not paths else " and ".join(path.name for path in paths)
        raise CaseError(
            case, f"{found} in {folder}, expected {case}.nii.gz or {case}.nii", "Give one file each"
        )
    return paths[0]


def _in_processes(
    function: Any, work: list[tuple], workers: int, results: list[tuple[dict | CaseError, bool]]
) -> Iterator[tuple[dict | CaseError, bool]]:
    yield from results
    workers = min(workers or os.cpu_count() or 1, len(work))
    progress = tqdm(total=len(work), unit="case", disable=not sys.stderr.isatty())
    with progress:
        if workers <= 1:
            for arguments in work:
                yield function(*arguments)
                progress.update()
            return
        # Spawned, for a forked process inherits threads' locks without the threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = [pool.submit(function, *arguments) for arguments in work]
            try:
                for future in as_completed(futures):
                    yield future.result()
                    progress.update()
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process was killed, most often for want of memory. Set"
                    f" --config.workers below {workers} and run again: finished cases are kept"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


# A checkpoint and a store


def _from_checkpoint(
    config: ConfigDict, settings: dict[str, Any], workdir: Path
) -> tuple[Labels, Iterator[tuple[dict | CaseError, bool]]]:
    # JAX starts here and not in the processes that only compare masks.
    from tumorjax.training.checkpoints import load_model
    from tumorjax.volumes import open_store

    if not config.data.store:
        raise UserError("config.checkpoint needs config.data.store, the scans to test on")
    apply, trained = load_model(config.checkpoint)
    store = open_store(config.data.store)
    missing = sorted(set(config.data.cases) - set(store.cases))
    if missing:
        raise UserError(
            f"{config.data.store}: has no case {', '.join(missing[:5])}. It has {len(store.cases)}"
            " cases; correct config.data.cases"
        )
    window = (store.settings or {}).get("window")
    if window is not None and not np.allclose(window, trained.preparation.window):
        raise UserError(
            f"{config.data.store}: made with the window {tuple(window)} HU, but the network was"
            f" trained with {tuple(trained.preparation.window)}. Prepare the store with that"
        )
    cases = list(config.data.cases) or store.cases
    labels = {name: index for index, name in enumerate(trained.task.classes, start=1)}
    return labels, _predict_cases(config, settings, workdir, apply, trained, store, cases)


def _predict_cases(
    config: ConfigDict,
    settings: dict[str, Any],
    workdir: Path,
    apply: Any,
    trained: ConfigDict,
    store: Any,
    cases: Sequence[str],
) -> Iterator[tuple[dict | CaseError, bool]]:
    from tumorjax.inference.sliding_window import predict

    classes = trained.task.classes
    table = anatomy.class_table(classes)
    axes = tuple(config.inference.mirror_axes)
    mirrored = anatomy.mirror_table(classes) if 0 in axes else None
    weights = _hash_weights(apply)
    for case in tqdm(cases, unit="case", disable=not sys.stderr.isatty()):
        try:
            record = store.record(case)
            names = {"case": case, "patient": record["patient"], "split": config.split}
            made_from = {
                "names": names,
                "weights": weights,
                "scan": record["checksum"],
                "inference": plain(config.inference),
                "classes": plain(classes),
                "settings": settings,
            }
            kept = _kept(workdir, case, made_from)
            if kept is not None:
                yield kept, False
                continue
            spacing = record["spacing"]
            if not np.allclose(spacing, trained.preparation.spacing, rtol=1e-3):
                raise CaseError(
                    case,
                    f"spacing {tuple(spacing)} mm, but the network was trained at"
                    f" {tuple(trained.preparation.spacing)}",
                    "Prepare the store with that spacing",
                )
            truth = table[store.read(case, "label")]
            probabilities = predict(
                apply,
                store.read(case, "image"),
                tuple(trained.training.patch_size),
                overlap=config.inference.overlap,
                mirror_axes=axes,
                batch_size=config.inference.batch_size,
                mirror_table=mirrored,
                # As the study that trained it tests it.
                skip_air=bool(trained.get("inference", {}).get("skip_air", False)),
            )
        except CaseError as error:
            yield error, False
            continue
        prediction = np.argmax(probabilities, axis=-1).astype(np.uint8)
        rows = evaluate_case(truth, prediction, spacing, classes, settings, probabilities, **names)
        result = {
            "case": case,
            "rows": rows,
            "overlap": label_overlap(
                truth, prediction, {name: index for index, name in enumerate(classes, start=1)}
            ),
            "reference_file": f"{config.data.store}: {case}",
            "prediction_file": f"{config.checkpoint}: {case}",
        }
        yield _keep(workdir, made_from, result), True


# Results


def _write_tables(
    done: list[dict],
    rejected: list[CaseError],
    labels: Labels,
    settings: dict[str, Any],
    workdir: Path,
) -> None:
    rows = [row for result in done for row in result["rows"]]
    # Of anatomy's 32 labels most data sets have a few: a tumour that no mask has is left out.
    seen = {row["class"] for row in rows if row["has_tumor"] or row["predicted_tumor"]} | {UNION}
    rows = [row for row in rows if row["class"] in seen]
    write_csv_atomic(workdir / "cases.csv", rows, CASE_COLUMNS)
    summary: list[dict[str, Any]] = []
    for split in dict.fromkeys(row["split"] for row in rows):
        part = [row for row in rows if row["split"] == split]
        summary += [{"split": split} | line for line in summarize(part, settings)]
    write_csv_atomic(workdir / "summary.csv", summary, ("split", *SUMMARY_COLUMNS))
    write_json_atomic(workdir / "summary.json", _nnunet_summary(done, labels))
    reasons = workdir / "rejected.csv"
    if rejected:
        lines = [
            {"case": e.case, "stage": "evaluation", "reason": f"{e.found}. {e.action}"}
            for e in rejected
        ]
        write_csv_atomic(reasons, lines, ("case", "stage", "reason"))
    else:
        reasons.unlink(missing_ok=True)


def _nnunet_summary(done: list[dict], labels: Labels) -> dict[str, Any]:
    """Returns what nnU-Net's evaluation writes: per case, means per label, mean of the means.

    As there, a label that a case has neither in truth nor in prediction is left out of the means;
    labels that no case has are left out entirely. "labels" says what each key means.
    """
    overlap = {result["case"]: result["overlap"] for result in done}
    present = [
        name
        for name in labels
        if any(o[name]["n_ref"] or o[name]["n_pred"] for o in overlap.values())
    ]
    keys = {
        name: str(value) if isinstance(value := labels[name], int) else str(tuple(value))
        for name in present
    }
    metrics = ("Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref")

    def mean(values: list[float | None]) -> float | None:
        defined = [value for value in values if value is not None]
        return float(np.mean(defined)) if defined else None

    means = {
        keys[name]: {m: mean([o[name][m] for o in overlap.values()]) for m in metrics}
        for name in present
    }
    return {
        "foreground_mean": {m: mean([means[key][m] for key in means]) for m in metrics},
        "mean": means,
        "metric_per_case": [
            {
                "metrics": {keys[name]: result["overlap"][name] for name in present},
                "prediction_file": result["prediction_file"],
                "reference_file": result["reference_file"],
            }
            for result in done
        ],
        "labels": {keys[name]: name for name in present},
    }


def _kept(workdir: Path, case: str, made_from: Mapping[str, Any]) -> dict | None:
    """Returns a case's kept result if it was made from the same, else None."""
    try:
        kept = json.loads((workdir / "cases" / f"{case}.json").read_text())
    except FileNotFoundError:
        return None
    return kept["result"] if kept["made_from"] == plain(made_from) else None


def _keep(workdir: Path, made_from: Mapping[str, Any], result: dict) -> dict:
    path = workdir / "cases" / f"{result['case']}.json"
    write_json_atomic(path, {"made_from": plain(made_from), "result": result})
    return result


def _hash(case: str, path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CaseError(case, f"{path}: {error.strerror}", "Check the file") from error


def _hash_weights(apply: Any) -> str:
    import jax

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(apply):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _patients(path: str) -> dict[str, str]:
    if not path:
        return {}
    try:
        return {row["case"]: row["patient"] for row in read_csv(path)}
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: no patients to read ({error!r}). Expected a CSV file with the columns case"
            " and patient"
        ) from error
