"""All networks at full size: parameters, FLOP, and what a training step takes on this machine.

    python -m benchmarks.networks [--measure resenc_unet-M ...] [--batch 2] [--steps 2]

One crop of 96^3 voxels, one channel, two classes. FLOP are those of the forward pass as lax counts
them, a multiplication and an addition as two. With --measure, each named network (or `all`) runs in
a process of its own: seconds from nothing to the first step's end (compilation), seconds of a step
(forward, Dice + cross-entropy, backward, SGD; the best of `--steps`), and the process' peak memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tumorjax import backend, models
from tumorjax.models.convolution import compiler_options
from tumorjax.training.losses import segmentation_loss

PATCH = (96, 96, 96)
# Row -> network and settings; the paper's parameters in millions, where its table has them.
ROWS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "resenc_unet-M": ("resenc_unet", {"preset": "M"}, 63.1),
    "resenc_unet-L": ("resenc_unet", {"preset": "L"}, None),
    "plain_unet": ("plain_unet", {"preset": "nnunet"}, 31.1),
    "stu_net-S": ("stu_net", {"preset": "S"}, None),
    "stu_net-B": ("stu_net", {"preset": "B"}, 58.3),
    "stu_net-L": ("stu_net", {"preset": "L"}, None),
    "stu_net-H": ("stu_net", {"preset": "H"}, None),
    "unetr": ("unetr", {"patch_size": PATCH}, 101.8),
    "swin_unetr": ("swin_unetr", {}, 72.8),
    "segresnet": (
        "segresnet",
        {"init_filters": 32, "blocks_down": (1, 2, 2, 4), "blocks_up": (1, 1, 1)},
        None,
    ),
    "universal": ("universal", {}, None),
    "universal, Swin": ("universal", {"backbone": "swin_unetr"}, None),
    "suprem": ("suprem", {}, None),
}


def build(row: str):
    """Returns a row's function and the shapes of its parameters, without drawing weights."""
    name, settings, _ = ROWS[row]
    functions = []

    def parameters():
        apply, values = models.functional(models.create(name, classes=2, **settings))
        functions.append(apply)
        return values

    shapes = jax.eval_shape(parameters)
    return functions[0], shapes


def count(row: str) -> tuple[float, float]:
    """Returns millions of parameters, and 10^9 FLOP of the forward pass."""
    # Counted as the plain convolutions that accelerators run, not as a CPU's formulation of them.
    with backend.target("gpu"):
        apply, shapes = build(row)
        x = jax.ShapeDtypeStruct((1, *PATCH, 1), jnp.float32)
        cost = jax.jit(apply).lower(shapes, x).cost_analysis() or {}
    size = sum(int(np.prod(value.shape)) for value in shapes.values())
    return size / 1e6, cost.get("flops", float("nan")) / 1e9


def measure(row: str, batch: int, steps: int) -> dict[str, float]:
    """Trains a step, and as many more as are told, in this process."""
    name, settings, _ = ROWS[row]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, *PATCH, 1)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 2, (batch, *PATCH)), jnp.int32)
    start = time.perf_counter()
    apply, values = models.functional(models.create(name, classes=2, **settings))
    update = optax.sgd(0.01, 0.99, nesterov=True)

    def step(values, optimizer):
        gradient = jax.grad(lambda v: segmentation_loss(apply(v, x), y))(values)
        changes, optimizer = update.update(gradient, optimizer, values)
        return optax.apply_updates(values, changes), optimizer

    compiled = jax.jit(step, donate_argnums=(0, 1), compiler_options=compiler_options())
    state = jax.block_until_ready(compiled(values, update.init(values)))
    first = time.perf_counter() - start
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(*state))
        seconds.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"first": first, "step": min(seconds), "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs="*", default=[], help="rows, or `all`")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.batch, arguments.steps)))
        return
    chosen = list(ROWS) if arguments.measure == ["all"] else arguments.measure
    if unknown := sorted(set(chosen) - set(ROWS)):
        parser.error(f"no row {', '.join(unknown)}. Expected some of {', '.join(ROWS)}")
    print(f"batch {arguments.batch}")
    print(
        f"{'network':18}{'million':>9}{'paper':>8}{'GFLOP':>8}{'first s':>9}{'step s':>8}{'GiB':>7}"
    )
    for row, (_, _, paper) in ROWS.items():
        size, flop = count(row)
        line = f"{row:18}{size:9.2f}{paper or '':>8}{flop:8.0f}"
        if row in chosen:
            command = [sys.executable, "-m", "benchmarks.networks", "--one", row]
            command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                line += f"  ended with {run.returncode}: {(run.stderr.strip() or '-')[-120:]}"
            else:
                found = json.loads(run.stdout.splitlines()[-1])
                line += f"{found['first']:9.0f}{found['step']:8.1f}{found['memory']:7.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
