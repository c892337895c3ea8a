"""Rehearses a job: its programs are compiled for a machine that is not here, and counted.

    python -m tumorjax.main --config=configs/scaling.py:paper --config.rehearse=v5e:16x16

Nothing is allocated and no data set is read. docs/scale.md has results.
"""

import copy
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tumorjax import backend, parallel
from tumorjax.errors import UserError
from tumorjax.files import write_bytes_atomic, write_json_atomic
from tumorjax.inference.sliding_window import tile_starts
from tumorjax.rehearsal import chips, report
from tumorjax.rehearsal.advice import advise
from tumorjax.rehearsal.programs import Program, tile_batch, training_step
from tumorjax.scaling import grid


def run(config: ConfigDict, workdir: Path) -> int:
    """Rehearses a study or a segmentation job.

    Args:
        config: of the job, with `rehearse` (topology) and `rehearsal` (see settings.py).
        workdir: gets rehearsal.json and rehearsal.md.

    Returns:
        0, or 1 if the job does not fit.

    Raises:
        UserError: the topology is unknown, its compiler is missing, or the job's mesh does not
            fit it.
    """
    chip, count = chips.parse(config.rehearse)
    settings = config.rehearsal
    if not 0 < settings.efficiency <= 1:
        raise UserError(
            f"rehearsal.efficiency is {settings.efficiency}. Expected above 0 and at most 1"
        )
    # Shapes and compilers alone: no accelerator of this machine is taken.
    jax.config.update("jax_platforms", "cpu")
    cells = len(grid.cells(config.grid)) if config.job == "scaling" else 1
    plan = {
        "cells": cells,
        "steps": config.training.steps,
        "tile_batches": _tile_batches(config) if config.job == "scaling" else 0,
    }
    workdir.mkdir(parents=True, exist_ok=True)

    def write(found: dict[str, Any], scaling: list[dict[str, Any]], advice: list[str]) -> str:
        text = report.markdown(found, scaling, advice)
        values = found | {"weak_scaling": scaling, "advice": advice}
        write_json_atomic(workdir / "rehearsal.json", values)
        write_bytes_atomic(workdir / "rehearsal.md", text.encode())
        return text

    # Much of what a compiler does is on one core. Programs are traced in this thread, one after the
    # other, so that what is wrong with the settings is told at once.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, backend.target("tpu"):
        if chip.compiled_here:
            found, scaling, advice = _compiled(config, chip, plan, write, pool)
        else:
            found, scaling, advice = _estimated(config, chip, count, plan, pool)
    print(write(found, scaling, advice))
    return 0 if found["memory"]["fits"] else 1


def _compiled(
    config: ConfigDict,
    chip: chips.Chip,
    plan: dict[str, Any],
    write: Callable[..., str],
    pool: ThreadPoolExecutor,
):
    """Compiles for the topology, and how the step grows to it from smaller ones.

    Each takes minutes, so what is known is written after each of them.
    """
    whole = parallel.make_mesh(_sizes(config), devices=chips.devices(config.rehearse))
    shape = dict(whole.shape)
    # The one that was asked for first: where it does not fit, no other is needed.
    traced, parameters = training_step(config, whole)
    asked = pool.submit(traced.compile)
    testing = pool.submit(tile_batch(config, whole).compile)
    others = {}
    for name, other in _growing(config, whole) if config.rehearsal.weak_scaling else ():
        mesh = parallel.make_mesh(_sizes(other), devices=chips.devices(name))
        program = pool.submit(training_step(other, mesh)[0].compile, quick=True)
        others[program] = (name, dict(mesh.shape), other.training.batch_size)
    step = asked.result()
    if step.too_large:
        pool.shutdown(cancel_futures=True)
        others, tiles = {}, Program()
    else:
        tiles = testing.result()
    advice = advise(config, chip, step, shape, plan["cells"])
    args = (config.rehearse, chip, whole.size, shape, parameters, step, tiles, plan)
    found = report.summary(*args, config.rehearsal, "")
    rows: list[dict[str, Any]] = []
    for program in as_completed(others):
        write(found, rows, advice)
        row = _row(*others[program], program.result())
        rows = sorted([*rows, row], key=lambda row: row["chips"])
    return found, rows, advice


def _growing(config: ConfigDict, whole: Mesh) -> list[tuple[str, ConfigDict]]:
    """Returns topologies up to the one asked for, each with as much less of the job.

    With several cells at once, cells grow with the chips; else the batch does, where it lies on
    several chips. Topologies of which that makes no whole number are left out.
    """
    axis = "cell" if whole.shape["cell"] > 1 else "data"
    found = []
    for name in chips.smaller(config.rehearse):
        count = chips.parse(name)[1]
        size, rest = divmod(whole.shape[axis] * count, whole.size)
        batch, odd = divmod(config.training.batch_size * count, whole.size)
        if not size or rest or (axis == "data" and odd):
            continue
        other = copy.deepcopy(config)
        other.mesh.update(dict(whole.shape) | {axis: size})
        if axis == "data":
            other.training.batch_size = batch
        found.append((name, other))
    return found if len(found) > 1 else []


def _estimated(
    config: ConfigDict, chip: chips.Chip, count: int, plan: dict[str, Any], pool: ThreadPoolExecutor
):
    """Takes one cell's program for another chip, and this chip's figures."""
    sizes = _sizes(config)
    others = {axis: size for axis, size in sizes.items() if axis != "cell" and size not in (1, -1)}
    if others:
        raise UserError(
            f"rehearse {config.rehearse}: estimates are of cells on one chip each, and mesh has"
            f" {others}. Rehearse a TPU topology, or leave these axes at 1"
        )
    devices = chips.devices(chips.STAND_IN)[:1]
    mesh = parallel.make_mesh({}, devices=devices)
    traced, parameters = training_step(config, mesh)
    testing = pool.submit(tile_batch(config, mesh).compile)
    step = traced.compile()
    tiles = Program() if step.too_large else testing.result()
    shape = dict(mesh.shape) | {"cell": count}
    advice = advise(config, chip, step, shape, plan["cells"])
    args = (config.rehearse, chip, count, shape, parameters, step, tiles, plan)
    return report.summary(*args, config.rehearsal, chips.STAND_IN), [], advice


def _sizes(config: ConfigDict) -> dict[str, int]:
    return {axis: int(size) for axis, size in config.mesh.items()}


def _row(name: str, mesh: Mapping[str, int], batch: int, program: Program) -> dict[str, Any]:
    return {
        "topology": name,
        "chips": math.prod(mesh.values()),
        "cells": mesh["cell"],
        "batch": batch,
        "peak": program.peak,
        "sent": program.sent,
        "flops": program.flops,
        "compile_seconds": program.compiling,
        "too_large": program.too_large,
    }


def _tile_batches(config: ConfigDict) -> int:
    """Passes of the sliding window in a cell's test, mirrored ones included."""
    patch = tuple(config.training.patch_size)
    shape = [max(a, b) for a, b in zip(config.rehearsal.scan, patch, strict=True)]
    tiles = math.prod(len(s) for s in tile_starts(shape, patch, config.inference.overlap))
    passes = int(np.ceil(tiles / config.inference.batch_size)) * 2 ** len(
        config.inference.mirror_axes
    )
    return passes * config.rehearsal.test_scans
