"""The job "prediction": CT scans in, masks on the scans' own grids out.

A scan is read (scans.py), seen by each network in its own way (trained_here.py, nnunet_model.py),
the probabilities of several are averaged (ensemble.py), lesions that cannot be are removed
(cleanup.py), and what is wanted of the case is written (outputs.py).
"""

import errno
import json
import logging
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from tumorjax.errors import CaseError, UserError
from tumorjax.files import read_csv, write_bytes_atomic, write_csv_atomic, write_json_atomic
from tumorjax.geometry import spacing_of
from tumorjax.inference import cleanup, ensemble, msd, outputs
from tumorjax.inference.case_statistics import describe
from tumorjax.inference.network import Network, Prepared
from tumorjax.inference.outputs import Wanted
from tumorjax.inference.plan import Plan, check_output, check_places, check_settings, make_plan
from tumorjax.inference.preview import WINDOW, Shown, preview
from tumorjax.inference.scans import Source, find_scans, read_scan
from tumorjax.locks import claimed, locked
from tumorjax.nifti import Scan

_COLUMNS = ("case", "stage", "reason")


def run(config: ConfigDict, workdir: Path) -> int:
    """Predicts masks for all scans of a file, folder or list, see configs/prediction.py.

    Returns:
        0, or 1 where cases were set aside: they are in workdir/rejected.csv.

    Raises:
        UserError: the config is wrong, or the output holds masks made with other settings.
    """
    workdir = Path(workdir)
    check_settings(config)
    scans, rejected = find_scans(config.input)
    output = Path(config.output or workdir / "predictions")
    check_places(config, scans, output)
    plan = make_plan(config, ensemble.open_networks(config))

    mine = dict(list(scans.items())[config.part :: config.num_parts])
    waiting = {c: s for c, s in mine.items() if not outputs.is_finished(output, c, plan.wanted)}
    has_masks = any(outputs.mask_path(output, case, config.form).exists() for case in scans)
    check_output(output, has_masks, plan.record)
    logging.info("%s: %d of %d scans to do", output, len(waiting), len(mine))
    with _space_left(output):
        done, set_aside, others = _predict(waiting, output, plan)
    rejected += set_aside
    seen = {*done, *(row["case"] for row in rejected)}
    all_rejected = _list_rejected(workdir, rejected, seen, scans, output, plan.wanted)

    if others:
        print(f"{output}: {len(others)} scans are being worked on by other processes")
    if config.msd:
        with _space_left(output):
            _submit(config.msd, scans, output, plan.wanted, bool(all_rejected))
    if rejected:
        print(f"{output}: {len(rejected)} cases set aside, see {workdir / 'rejected.csv'}")
        return 1
    state = f"masks of {len(done)} scans written" if waiting else "already finished"
    print(f"{output}: {state if mine else f'none of the scans is in part {config.part}'}")
    return 0


@contextmanager
def _space_left(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"{output}: no space left on the disk. Free some and run again: what is finished stays"
        ) from error


# ---------------------------------------------------------------------------- scans


def _predict(
    waiting: Mapping[str, Source], output: Path, plan: Plan
) -> tuple[list[str], list[dict[str, str]], list[str]]:
    """Predicts the scans that no other process works on.

    Returns:
        Those done, rows of those set aside, and those that other processes hold.
    """
    done: list[str] = []
    rejected: list[dict[str, str]] = []
    bar = tqdm(total=len(waiting), unit="scan", disable=not sys.stderr.isatty())
    with bar, ThreadPoolExecutor(1) as pool:
        pending, others = list(waiting), list[str]()
        while pending:
            others = []
            before = len(done)
            ahead = _ahead(pool, pending, waiting, others, output, plan)
            with closing(ahead):
                for case, future in ahead:
                    begin = time.perf_counter()
                    try:
                        _predict_case(case, future, output, plan)
                        done.append(case)
                    except (CaseError, MemoryError, jax.errors.JaxRuntimeError) as error:
                        rejected.append(_rejected(case, error))
                        logging.warning("set aside: %s", rejected[-1]["reason"])
                    bar.update()
                    logging.info("%s: %.1f s", case, time.perf_counter() - begin)
            # Who held the others may have stopped while these were done.
            pending = others if len(done) > before else []
    return done, rejected, others


def _ahead(
    pool: ThreadPoolExecutor,
    cases: Sequence[str],
    sources: Mapping[str, Source],
    others: list[str],
    output: Path,
    plan: Plan,
) -> Generator[tuple[str, Future[Any]], None, None]:
    """Yields cases that are free, held while the caller uses them; the next is read meanwhile.

    Args:
        pool: that reads.
        cases: in order.
        sources: of the cases.
        others: gets the cases that other processes hold.
        output: where the results and the locks are.
        plan: of the run.
    """

    def free() -> Iterator[tuple[str, ExitStack, Future[Any]]]:
        for case in cases:
            hold = ExitStack()
            lock = output / f".{case}.lock"
            if not hold.enter_context(claimed(lock)):
                others.append(case)
                hold.close()
                continue
            # Whoever waits for a lock that is removed looks at what is finished first.
            hold.callback(lock.unlink, missing_ok=True)
            if outputs.is_finished(output, case, plan.wanted):
                hold.close()
                continue
            outputs.remove_leftovers(output, case)
            yield case, hold, pool.submit(_read, sources[case], plan.networks)

    rest = free()
    held = [one for one in (next(rest, None),) if one]
    try:
        while held:
            held += [one for one in (next(rest, None),) if one]
            case, hold, future = held[0]
            yield case, future
            hold.close()
            del held[0]
    finally:
        for _, hold, future in held:
            future.cancel()
            hold.close()


def _read(source: Source, networks: Sequence[Network]) -> tuple[Scan, list[Prepared]]:
    scan = read_scan(source, max(network.least_range for network in networks))
    return scan, ensemble.prepare(networks, scan)


def _predict_case(
    case: str, read: Future[tuple[Scan, list[Prepared]]], output: Path, plan: Plan
) -> None:
    """Predicts a scan and writes what is wanted of it, the mask first."""
    scan, prepared = read.result()
    answered = ensemble.answers(plan.networks, prepared)
    labels = ensemble.labels(answered)
    if plan.rules.change_anything:
        labels = labels if labels.flags.writeable else labels.copy()
        removed = cleanup.clean(labels, spacing_of(scan.affine), plan.rules)
        logging.info("%s: %d lesions removed", case, sum(removed.values()))
    paths = outputs.paths_of(output, case, plan.wanted)
    outputs.write_masks(
        paths["mask"],
        plan.wanted.form,
        _as_written(labels, plan),
        scan,
        plan.written,
        plan.segments,
        json.dumps(plan.record, sort_keys=True),
    )
    kept = [paths[f"probability of {name}"] for name in plan.wanted.probabilities]
    if kept:
        volumes = ensemble.probabilities(answered, plan.probabilities)
        outputs.write_probabilities(kept, volumes, plan.wanted.probabilities, scan)
    # The scores are the largest of all that is held.
    del answered
    named = [(one.name, one.value) for one in plan.table]
    if plan.wanted.statistics or plan.wanted.preview:
        world = "LPS" if scan.slices else "RAS"
        found = describe(labels, scan.affine, named, plan.tumors, world)
        if plan.wanted.statistics:
            write_json_atomic(paths["statistics"], {"case": case} | found)
        if plan.wanted.preview:
            shown = [
                Shown(n, v, n in plan.tumors, found["structures"][n]["volume_ml"]) for n, v in named
            ]
            window = WINDOW if plan.networks[0].least_range else None
            picture = preview(case, scan.image, labels, scan.affine, shown, window)
            write_bytes_atomic(paths["preview"], picture)


def _as_written(labels: UInt8[np.ndarray, "i j k"], plan: Plan) -> UInt8[np.ndarray, "i j k"]:
    if plan.written == plan.table:
        return labels
    values = {one.name: one.value for one in plan.written}
    table = np.zeros(256, np.uint8)
    for one in plan.table:
        table[one.value] = values.get(one.name, 0)
    return table[labels]


# ---------------------------------------------------------------------------- after


def _rejected(case: str, error: BaseException) -> dict[str, str]:
    if isinstance(error, CaseError):
        return {"case": case, "stage": "read", "reason": str(error)}
    memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    if not memory:
        raise error
    reason = "not enough memory for this scan. Lower inference.batch_size, or use a larger machine"
    return {"case": case, "stage": "predict", "reason": f"{case}: {reason}"}


def _list_rejected(
    workdir: Path,
    rejected: Sequence[dict[str, str]],
    seen: set[str],
    scans: Mapping[str, Source],
    output: Path,
    wanted: Wanted,
) -> list[dict[str, str]]:
    """Writes rejected.csv: this run's cases, and others' that are still unfinished.

    Returns:
        All of its rows.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "rejected.csv"
    if not rejected and not path.is_file():
        return []
    with locked(workdir / ".rejected.lock"):
        rows = {row["case"]: row for row in (read_csv(path) if path.is_file() else [])}
        others = {
            case: row
            for case, row in rows.items()
            if case in scans and case not in seen and not outputs.is_finished(output, case, wanted)
        }
        rows = others | {row["case"]: row for row in rejected}
        if rows:
            write_csv_atomic(path, [rows[case] for case in sorted(rows)], _COLUMNS)
        else:
            path.unlink(missing_ok=True)
    return list(rows.values())


def _submit(
    name: str, scans: Mapping[str, Source], output: Path, wanted: Wanted, rejected: bool
) -> None:
    """Writes and checks the archive of a task of the Decathlon, once all its masks are there."""
    path = output / f"{name}.zip"
    missing = [case for case in scans if not outputs.is_finished(output, case, wanted)]
    if missing or rejected:
        print(f"{output}: no {path.name} yet, since not all masks are there")
        return
    masks = {case: outputs.mask_path(output, case, wanted.form) for case in scans}
    msd.write_archive(path, name, masks)
    msd.check_archive(path, name, {case: source.path for case, source in scans.items()})
    expected = msd.task_of(name).images
    note = "" if len(scans) == expected else f" (the challenge has {expected} test images)"
    print(f"{path}: {len(scans)} masks, checked against their images{note}")
