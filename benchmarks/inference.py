"""Sliding-window inference: seconds a volume, beside a plain loop and MONAI's.

    python -m benchmarks.inference
    python -m benchmarks.inference --shape 300 300 300 --patch 128 --classes 15

One network of three convolutions, with the same weights everywhere; half overlap, Gaussian weights.
"network" is the time of the forward passes alone; what a row takes beyond it is what the sliding
window costs. MONAI's row needs torch and monai.
"""

import argparse
import importlib.util
import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tumorjax.inference.sliding_window import gaussian_weights, predict, tile_starts
from tumorjax.models.convolution import convolution

WIDTHS = (1, 8, 8)


def weights(classes: int) -> list[np.ndarray]:
    """Returns the kernels [x, y, z, in, out] of the network."""
    rng = np.random.default_rng(0)
    widths = (*WIDTHS, classes)
    return [
        (rng.standard_normal((3, 3, 3, a, b)) / np.sqrt(27 * a)).astype(np.float32)
        for a, b in itertools.pairwise(widths)
    ]


def network(kernels: list[Array], x: Float[Array, "b x y z 1"]) -> Float[Array, "b x y z c"]:
    for kernel in kernels[:-1]:
        x = jax.nn.relu(convolution(x, kernel, (1, 1, 1)))
    return convolution(x, kernels[-1], (1, 1, 1))


def plain_loop(
    apply: Callable, volume: np.ndarray, patch: tuple[int, ...], classes: int
) -> np.ndarray:
    """The definition, tile by tile: what one writes first."""
    total = np.zeros((*volume.shape, classes), np.float32)
    weight_sum = np.zeros((*volume.shape, 1), np.float32)
    weight = gaussian_weights(patch)[..., None]
    for start in itertools.product(*tile_starts(volume.shape, patch)):
        at = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        logits = np.asarray(apply(volume[at][None, ..., None]))[0]
        total[at] += logits * weight
        weight_sum[at] += weight
    logits = total / weight_sum
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def monai(kernels: list[np.ndarray], patch: tuple[int, ...], batch: int) -> Callable:
    import torch
    from monai.inferers import sliding_window_inference

    layers = [torch.from_numpy(k.transpose(4, 3, 0, 1, 2).copy()) for k in kernels]

    def torch_network(x):
        for layer in layers[:-1]:
            x = torch.relu(torch.conv3d(x, layer, padding=1))
        return torch.conv3d(x, layers[-1], padding=1)

    def run(volume: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = sliding_window_inference(
                torch.from_numpy(volume)[None, None],
                patch,
                batch,
                torch_network,
                overlap=0.5,
                mode="gaussian",
            )
            return torch.softmax(logits, 1)[0].movedim(0, -1).numpy()

    return run


def seconds(function: Callable, repeats: int) -> tuple[float, float, np.ndarray]:
    """Returns the first call's time and the least of the later ones."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - begin)
    return times[0], min(times[1:]), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(200, 210, 190))
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    patch = (options.patch,) * 3
    volume = np.random.default_rng(1).random(options.shape, np.float32)
    kernels = weights(options.classes)
    apply = jax.tree_util.Partial(network, [jnp.asarray(kernel) for kernel in kernels])
    jitted = jax.jit(network)
    tiles = len(list(itertools.product(*tile_starts(volume.shape, patch))))

    def alone() -> np.ndarray:
        x = np.broadcast_to(volume[:1, :1, :1, None, None], (options.batch, *patch, 1))
        x = jnp.asarray(x)
        for _ in range(-(-tiles // options.batch)):
            jitted(apply.args[0], x).block_until_ready()
        return np.empty(0)

    rows: dict[str, Callable[[], np.ndarray]] = {
        "network": alone,
        "tumorjax, summed on the host": lambda: predict(
            apply, volume, patch, batch_size=options.batch, accumulate="host"
        ),
        "tumorjax, summed on the device": lambda: predict(
            apply, volume, patch, batch_size=options.batch, accumulate="device"
        ),
        "plain loop (JAX, numpy)": lambda: plain_loop(
            lambda x: jitted(apply.args[0], x), volume, patch, options.classes
        ),
    }
    if importlib.util.find_spec("monai") and importlib.util.find_spec("torch"):
        run = monai(kernels, patch, options.batch)
        rows["MONAI sliding_window_inference"] = lambda: run(volume)
    print(f"{volume.shape}, patch {patch}, {tiles} tiles, {options.classes} classes,"
          f" {jax.default_backend()}")  # fmt: skip
    print("| what | first, s | again, s |\n| --- | --- | --- |")
    results = {}
    for name, function in rows.items():
        first, again, results[name] = seconds(function, options.repeats)
        print(f"| {name} | {first:.2f} | {again:.2f} |", flush=True)
    ours = results["tumorjax, summed on the host"]
    for name, result in results.items():
        if result.size:
            print(f"largest difference from {name}: {np.abs(result - ours).max():.1e}")


if __name__ == "__main__":
    main()
