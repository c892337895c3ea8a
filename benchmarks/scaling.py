"""What a study at scale pays beside its steps: cells side by side, loading, saving.

    python -m benchmarks.scaling [--only cells loader checkpoint] [--rounds 7] [--saved-cells 2]

    cells       eight cells of the default study in one step on eight devices that a CPU pretends to
                be, against their eight steps in turn on the same cores; interleaved, medians
    loader      crops for ResEncM's step (as large as augmentation wants them, two a step) from
                volumes of 273x273x333: processor seconds a step, so cores that keep up with a
                step of 150 ms; and what a step waits where one takes 150 ms, with as many cores
    checkpoint  how long saving ResEncM with its momentum keeps a training from its next step, as a
                share of 250 steps of 150 ms; --saved-cells are saved, eight are scaled from them

Each runs in a process of its own. A row ends with the goal and whether it was reached. On a machine
that does other work at the same time, ratios and processor seconds hold, wall times are too long.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CELLS = 8
STEP_SECONDS = 0.15
EPOCH_STEPS = 250
GOALS = {"cells": 15.0, "loader": 2.0, "checkpoint": 5.0}  # percent at most
SCANS = 2
BATCHES = 12


# ---------------------------------------------------------------------------- cells


def cells(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures eight cells in one step, and in turn."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={CELLS}"
    import jax

    from configs import segmentation
    from tumorjax import parallel
    from tumorjax.data import augmentation
    from tumorjax.training import segmenter

    config = segmentation.get_config()
    config.mesh.cell, config.mesh.data = CELLS, 1
    mesh = parallel.make_mesh(config.mesh)
    places = parallel.split_cells(mesh)
    size = augmentation.source_patch(tuple(config.training.patch_size), config.augmentation)
    rows = config.training.batch_size
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.random((CELLS, rows, *size, 1), np.float32),
        "label": rng.integers(0, 3, (CELLS, rows, *size)).astype(np.uint8),
    }
    single = segmenter.make_segmenter(config, places[0])
    in_turn = [single.init(seed) for seed in range(CELLS)]
    states = {
        place: jax.device_put(in_turn[place], parallel.state_shardings(where, in_turn[place]))
        for place, where in enumerate(places)
    }
    # Copies: both ways of stepping give their states away.
    together = parallel.stack_cells(mesh, jax.tree.map(lambda x: x + 0, states))
    stacked = segmenter.make_segmenter(config, mesh, stacked=True).step
    active = jax.device_put(np.ones(CELLS, bool), parallel.by_cell(mesh))
    alone = [{name: array[cell] for name, array in batch.items()} for cell in range(CELLS)]

    def side_by_side() -> float:
        nonlocal together
        begin = time.perf_counter()
        placed = parallel.put_batch(mesh, batch, stacked=True)
        together, scalars = stacked(together, placed, active)
        jax.block_until_ready((together, scalars))
        return time.perf_counter() - begin

    def one_by_one() -> float:
        begin = time.perf_counter()
        for cell in range(CELLS):
            placed = parallel.put_batch(places[0], alone[cell])
            in_turn[cell], scalars = single.step(in_turn[cell], placed)
            jax.block_until_ready((in_turn[cell], scalars))
        return time.perf_counter() - begin

    for way in (side_by_side, one_by_one):
        way()
        way()
    # Each round has its own ratio: what else the machine does changes more slowly.
    pairs = []
    for number in range(arguments.rounds):
        ways = (side_by_side, one_by_one) if number % 2 else (one_by_one, side_by_side)
        seconds = {way.__name__: way() for way in ways}
        pairs.append((seconds["side_by_side"], seconds["one_by_one"]))
    ratio = statistics.median(a / b for a, b in pairs)
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "value": 100 * (ratio - 1),
        "text": f"{CELLS} cells: {a:.2f} s in one step, {b:.2f} s in turn, ratio {ratio:.2f}",
    }


# ---------------------------------------------------------------------------- loader


def loader(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what crops cost, and what a step waits for them."""
    from benchmarks.crops import volumes
    from configs import segmentation
    from tumorjax.volumes import open_store, write_case

    config = segmentation.get_config("resenc_m")
    # Organs that the made-up volumes have.
    config.task.classes = {"liver": ("liver",), "liver_lesion": ("liver_lesion",)}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(SCANS):
            image, labels = volumes(number)
            write_case(Path(scratch) / "store", f"case{number}", image, labels, (1.5, 1.5, 1.5))
        store = open_store(Path(scratch) / "store")
        sources = [(store, case) for case in store.cases]
        seconds = _processor_seconds(config, sources)
        cores = seconds / STEP_SECONDS
        available = sorted(os.sched_getaffinity(0))
        given = min(len(available), int(np.ceil(cores)) + 1)
        os.sched_setaffinity(0, available[:given])
        waits = _waits(config, sources, threads=given)
    share = 100 * statistics.fmean(waits) / (STEP_SECONDS + statistics.fmean(waits))
    crops = config.training.batch_size
    return {
        "value": share,
        "text": (
            f"{crops / seconds:.0f} crops a second and core, {crops} a step of"
            f" {1000 * STEP_SECONDS:.0f} ms keep {cores:.2f} cores busy; with {given} cores a step"
            f" waits {1000 * statistics.fmean(waits):.1f} ms"
        ),
    }


def _batches(config: Any, sources: Any, threads: int) -> Iterator[Any]:
    from tumorjax.data import augmentation, crops

    training = config.training
    return crops.loader(
        sources,
        config.task.classes,
        augmentation.source_patch(tuple(training.patch_size), config.augmentation),
        training.batch_size,
        training.foreground,
        threads=threads,
        final_patch_size=tuple(training.patch_size),
        tumor_share=training.tumor_share,
    )


def _processor_seconds(config: Any, sources: Any) -> float:
    """Returns the processor time of one step's crops, all threads together."""
    batches = _batches(config, sources, threads=0)
    next(batches)
    begin = time.process_time()
    for _ in itertools.islice(batches, BATCHES):
        pass
    return (time.process_time() - begin) / BATCHES


def _waits(config: Any, sources: Any, threads: int) -> list[float]:
    """Returns how long steps wait for their crops where a device computes in between."""
    batches = _batches(config, sources, threads)
    for _ in range(4):
        next(batches)
    waits = []
    for _ in range(3 * BATCHES):
        time.sleep(STEP_SECONDS)
        begin = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - begin)
    return waits


# ---------------------------------------------------------------------------- checkpoint


def checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures how long saving keeps a training from its next step."""
    import jax

    from configs import segmentation
    from tumorjax import parallel
    from tumorjax.training import checkpoints, segmenter

    config = segmentation.get_config("resenc_m")
    mesh = parallel.make_mesh({"data": 1}, jax.devices()[:1])
    made = segmenter.make_segmenter(config, mesh)
    states = [made.init(seed) for seed in range(arguments.saved_cells)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(states))
    blocked, written = [], []
    with tempfile.TemporaryDirectory() as scratch:
        managers = [
            checkpoints.open_manager(Path(scratch) / f"cell{cell}", write=True)
            for cell in range(len(states))
        ]
        # The first save makes folders and threads that later ones find.
        for step in range(1, 4):
            begin = time.perf_counter()
            for manager, state in zip(managers, states, strict=True):
                checkpoints.save(manager, step, state, step)
            blocked.append(time.perf_counter() - begin)
            for manager in managers:
                manager.wait_until_finished()
            written.append(time.perf_counter() - begin)
        for manager in managers:
            manager.close()
    scale = CELLS / len(states)
    seconds = scale * statistics.median(blocked[1:])
    return {
        "value": 100 * seconds / (EPOCH_STEPS * STEP_SECONDS),
        "text": (
            f"{len(states)} cells of {size / len(states) / 1e6:.0f} MB: save() returns after"
            f" {statistics.median(blocked[1:]):.2f} s (the first time {blocked[0]:.2f}), written"
            f" after {statistics.median(written[1:]):.1f} s; {CELLS} cells scaled: {seconds:.2f} s"
        ),
    }


# ---------------------------------------------------------------------------- the table


ROWS = {"cells": cells, "loader": loader, "checkpoint": checkpoint}
MEANING = {
    "cells": "more time than in turn",
    "loader": "of a step waits for crops",
    "checkpoint": "of 250 steps blocked by a save",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--saved-cells", type=int, default=2)
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(ROWS[arguments.row](arguments)))
        return
    print(f"{'':<11} {'measured':>9} {'goal':>7}")
    for name in arguments.only:
        command = [sys.executable, "-m", "benchmarks.scaling", "--row", name]
        command += ["--rounds", str(arguments.rounds)]
        command += ["--saved-cells", str(arguments.saved_cells)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        row = json.loads(output.splitlines()[-1])
        reached = "reached" if row["value"] <= GOALS[name] else "not reached"
        print(
            f"{name:<11} {row['value']:8.1f}% {GOALS[name]:6.0f}%  {reached}: % {MEANING[name]}."
            f" {row['text']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
