"""Where each parameter of each network lies, as tests/golden/parameter_shardings.json has it.

A change of `parallel.RULES`, or of a network's names and shapes, shows there line by line. To write
the file anew and look at what changed:

    TUMORJAX_WRITE_GOLDEN=1 pytest tests/test_parameter_shardings.py
    git diff tests/golden
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tumorjax import models, parallel

GOLDEN = Path(__file__).parent / "golden" / "parameter_shardings.json"
# Each with the cells that are stacked on it, 0 for a state that is not.
MESHES = {
    "data 8": ({"data": 8}, 0),
    "data 2, fsdp 4": ({"data": 2, "fsdp": 4}, 0),
    "fsdp 8": ({"fsdp": 8}, 0),
    "cell 2, fsdp 2, space 2, of 4 cells": ({"cell": 2, "fsdp": 2, "space": 2}, 4),
}


def _found(name: str) -> dict[str, str]:
    """Returns for each parameter its shape and, mesh by mesh, the axes it is split over."""

    def parameters(cells: int):
        network = models.create(name, classes=3, preset="small", **_patch(name))
        values = models.functional(network)[1]
        return {n: jnp.stack([v] * cells) for n, v in values.items()} if cells else values

    lines: dict[str, list[str]] = {}
    for sizes, cells in MESHES.values():
        shapes = jax.eval_shape(lambda cells=cells: parameters(cells))
        mesh = parallel.make_mesh(sizes)
        shardings = parallel.state_shardings(mesh, shapes, stacked=cells > 0)
        for key, sharding in shardings.items():
            axes = " ".join(str(axis or "-") for axis in sharding.spec) or "whole"
            lines.setdefault(key, ["x".join(map(str, shapes[key].shape))]).append(axes)
    return {key: " | ".join(parts) for key, parts in sorted(lines.items())}


def _patch(name: str) -> dict:
    return {"patch_size": (32, 32, 32)} if models.has_fixed_patch(name) else {}


@pytest.mark.parametrize("name", models.NETWORKS)
def test_each_parameter_lies_where_the_golden_file_says(name):
    found = _found(name)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("TUMORJAX_WRITE_GOLDEN"):
        golden = {"shape": list(MESHES)} | golden | {name: found}
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    assert golden["shape"] == list(MESHES)
    assert found == golden[name], (
        "parameters lie elsewhere than tests/golden/parameter_shardings.json says. If that is"
        " wanted, write it anew: see the head of this file"
    )


@pytest.mark.parametrize("name", models.NETWORKS)
def test_fsdp_leaves_little_of_a_network_whole(name):
    """Not for a golden file to forget: what lies whole is a small part of the parameters."""
    whole = total = 0
    for line in _found(name).values():
        shape, _, split, *_ = line.split(" | ")
        size = 1
        for part in shape.split("x"):
            size *= int(part or 1)
        total += size
        whole += size if split == "whole" else 0
    assert whole < 0.1 * total
