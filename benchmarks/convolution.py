"""A 3D convolution in its formulations: forward, and the gradients of input and weights.

    python -m benchmarks.convolution

Milliseconds, the best of several runs in turn, for batches of two crops. `direct` is compiled as
lax.conv_general_dilated is without further ado, the others with the project's compiler options.
Winograd's stands only where its kernel and stride are.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from tumorjax.models.convolution import compiler_options, convolution

# Voxels an axis, channels in and out, stride: of the default study's network, and of ResEncM.
SHAPES = (
    *((32, 1, 8, 1), (32, 8, 8, 1), (16, 16, 16, 1), (32, 8, 16, 2), (16, 16, 32, 2)),
    *((48, 64, 64, 1), (24, 128, 128, 1), (12, 256, 256, 1), (48, 64, 128, 2)),
)
FORMULATIONS = ("direct", "planar", "winograd")
ROUNDS = 5


def passes(formulation: str, stride: int) -> dict[str, Callable]:
    """Returns the three passes of a convolution as jitted functions of (x, kernel, gradient)."""

    def f(x, kernel):
        return convolution(x, kernel, (stride,) * 3, formulation)

    options = {} if formulation == "direct" else compiler_options()
    jit = partial(jax.jit, compiler_options=options)
    return {
        "forward": jit(lambda x, kernel, gradient: f(x, kernel)),
        "input": jit(lambda x, kernel, gradient: jax.vjp(lambda x: f(x, kernel), x)[1](gradient)),
        "weights": jit(
            lambda x, kernel, gradient: jax.vjp(lambda kernel: f(x, kernel), kernel)[1](gradient)
        ),
    }


def main() -> None:
    rng = np.random.default_rng(0)
    heads = "".join(f"{name:>10}" for name in FORMULATIONS)
    print(f"{'crop, channels, stride':26}{'pass':10}{heads}{'direct / best':>15}")
    for size, channels, out, stride in SHAPES:
        x = rng.standard_normal((2, size, size, size, channels)).astype(np.float32)
        kernel = rng.standard_normal((3, 3, 3, channels, out)).astype(np.float32)
        coarse = size // stride
        gradient = rng.standard_normal((2, coarse, coarse, coarse, out)).astype(np.float32)
        chosen = FORMULATIONS if stride == 1 else FORMULATIONS[:2]
        functions = {name: passes(name, stride) for name in chosen}
        for part in ("forward", "input", "weights"):
            best = dict.fromkeys(functions, float("inf"))
            for turn in range(ROUNDS + 1):
                for name, parts in functions.items():
                    start = time.perf_counter()
                    jax.block_until_ready(parts[part](x, kernel, gradient))
                    if turn:  # the first compiles
                        best[name] = min(best[name], 1000 * (time.perf_counter() - start))
            label = f"{size}^3, {channels} to {out}, {stride}"
            cells = "".join(
                f"{best[name]:10.2f}" if name in best else f"{'':10}" for name in FORMULATIONS
            )
            ratio = best["direct"] / min(best.values())
            print(f"{label:26}{part:10}{cells}{ratio:15.1f}", flush=True)


if __name__ == "__main__":
    main()
