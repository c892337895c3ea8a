"""A 3D convolution in its two formulations: forward, and the gradients of input and weights.

    python -m benchmarks.convolution

Milliseconds, the best of several runs in turn, for batches of two crops.
"""

import time
from collections.abc import Callable

import jax
import numpy as np

from tumorjax.models.convolution import convolution

# Voxels an axis, channels in and out, stride.
SHAPES = ((32, 1, 8, 1), (32, 8, 8, 1), (16, 16, 16, 1), (32, 8, 16, 2), (16, 16, 32, 2))
ROUNDS = 10


def passes(formulation: str, stride: int) -> dict[str, Callable]:
    """Returns the three passes of a convolution as jitted functions of (x, kernel, gradient)."""

    def f(x, kernel):
        return convolution(x, kernel, (stride,) * 3, formulation)

    return {
        "forward": jax.jit(lambda x, kernel, gradient: f(x, kernel)),
        "input": jax.jit(
            lambda x, kernel, gradient: jax.vjp(lambda x: f(x, kernel), x)[1](gradient)
        ),
        "weights": jax.jit(
            lambda x, kernel, gradient: jax.vjp(lambda kernel: f(x, kernel), kernel)[1](gradient)
        ),
    }


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"{'crop, channels, stride':26}{'pass':10}{'direct ms':>10}{'planar ms':>10}{'ratio':>8}")
    for size, channels, out, stride in SHAPES:
        x = rng.standard_normal((2, size, size, size, channels)).astype(np.float32)
        kernel = rng.standard_normal((3, 3, 3, channels, out)).astype(np.float32)
        coarse = size // stride
        gradient = rng.standard_normal((2, coarse, coarse, coarse, out)).astype(np.float32)
        functions = {name: passes(name, stride) for name in ("direct", "planar")}
        for part in ("forward", "input", "weights"):
            best = dict.fromkeys(functions, float("inf"))
            for turn in range(ROUNDS + 1):
                for name, parts in functions.items():
                    start = time.perf_counter()
                    jax.block_until_ready(parts[part](x, kernel, gradient))
                    if turn:  # the first compiles
                        best[name] = min(best[name], 1000 * (time.perf_counter() - start))
            label = f"{size}^3, {channels} to {out}, {stride}"
            ratio = best["direct"] / best["planar"]
            row = f"{best['direct']:10.2f}{best['planar']:10.2f}{ratio:8.1f}"
            print(f"{label:26}{part:10}{row}", flush=True)


if __name__ == "__main__":
    main()
