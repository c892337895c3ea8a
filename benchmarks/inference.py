"""Sliding-window inference of one network with the same weights: ours, MONAI's and nnU-Net's.

    python -m benchmarks.inference
    python -m benchmarks.inference --shape 150 130 130 --rounds 3
    python -m benchmarks.inference --rows tumorjax --folder DIR    # one row; DIR keeps what is done

A ResEncUNet of 5 M parameters in float32, patches of 96^3 with half overlap and Gaussian weights,
no mirroring, over 300 x 250 x 250 voxels (a trunk at 1.5 mm). The network has been trained for a
minute to tell regions by their shade, so that its labels are about as sure as a trained network's.
With --devices a CPU counts as several devices of a mesh, over which ours splits tiles. Rows take
turns, each time in a process of its own; the best time of each counts. Networks have run once
before the clock starts: "first" is what that takes (compilation, for ours). "network" is the time
of as many forward passes alone; what our row takes beyond it is what the sliding window costs.
Goals: 1.5 times as fast as either peer, and nnU-Net's label on 99.9 % of the voxels. Peers need the
extra `torch`; both take one tile at a time, which on a CPU is the fastest.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scipy.ndimage import gaussian_filter

from tumorjax import models, parallel
from tumorjax.inference.sliding_window import predict, tile_starts
from tumorjax.models import torch_weights
from tumorjax.training.losses import segmentation_loss

STAGES = 5
SETTINGS = {
    "widths": (16, 32, 64, 128, 128),
    "blocks": (1, 2, 2, 2, 2),
    "stages": STAGES,
    "deep_supervision": False,
}
STEPS, CROP = 250, 32
GOAL, AGREEMENT = 1.5, 99.9


def network(options):
    """Returns the function of the network and its weights, trained if they are not there yet."""
    apply, parameters = models.functional(
        models.create("resenc_unet", classes=options.classes, **SETTINGS)
    )
    path = options.folder / "weights.npz"
    if not path.exists():
        np.savez(path, **train(apply, parameters, options.classes))
    with np.load(path) as weights:
        return apply, {name: jnp.asarray(weights[name]) for name in parameters}


def train(apply, parameters, classes: int) -> dict[str, np.ndarray]:
    optimizer = optax.adam(2e-3)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, state, x, y):
        gradient = jax.grad(lambda p: segmentation_loss(apply(p, x), y))(parameters)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(parameters, updates), state

    volume, labels = scene((160, 160, 160), classes, seed=0)
    rng, state = np.random.default_rng(0), optimizer.init(parameters)
    for _ in range(STEPS):
        corners = rng.integers(0, 160 - CROP, (2, 3))
        boxes = [tuple(slice(low, low + CROP) for low in corner) for corner in corners]
        x = np.stack([volume[box] for box in boxes])[..., None]
        y = np.stack([labels[box] for box in boxes])
        parameters, state = step(parameters, state, x, y)
    return {name: np.asarray(value) for name, value in parameters.items()}


def torch_network(options):
    """Returns the same network as PyTorch's reference implementation, with our weights."""
    import torch
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    _, parameters = network(options)
    model = models.create("resenc_unet", classes=options.classes, **SETTINGS)
    graph, state = nnx.split(model)
    values = [
        (path, nnx.Param(parameters[".".join(map(str, path))]))
        for path, _ in nnx.to_flat_state(state)
    ]
    model = nnx.merge(graph, nnx.from_flat_state(values))
    weights = torch_weights.export_state_dict(model)
    net = ResidualEncoderUNet(
        *(1, STAGES, SETTINGS["widths"], torch.nn.Conv3d, 3, [1] + [2] * (STAGES - 1)),
        *(SETTINGS["blocks"], options.classes, [1] * (STAGES - 1), True),
        *(torch.nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None),
        *(torch.nn.LeakyReLU, {"inplace": True}),
    )
    net.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()})
    return net.eval()


def scene(shape: tuple[int, ...], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns nested regions of `classes` shades in [0, 1] under noise, and which is which."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.random(shape, np.float32), 5)
    smooth = (smooth - smooth.mean()) / smooth.std()
    levels = [NormalDist().inv_cdf(i / classes) for i in range(1, classes)]
    labels = np.digitize(smooth, levels).astype(np.int32)
    noise = 0.03 * rng.standard_normal(shape, np.float32)
    return np.clip(0.1 + 0.8 * labels / (classes - 1) + noise, 0, 1).astype(np.float32), labels


def ours(options) -> Callable[[np.ndarray], np.ndarray]:
    apply = jax.tree_util.Partial(*network(options))
    patch, mesh = (options.patch,) * 3, parallel.make_mesh({"data": -1})

    def run(volume: np.ndarray) -> np.ndarray:
        settings = {"batch_size": options.batch, "output": "logits", "mesh": mesh}
        logits = predict(apply, volume, patch, **settings)
        return np.moveaxis(logits, -1, 0)

    return run


def alone(options) -> Callable[[np.ndarray], np.ndarray]:
    apply, parameters = network(options)
    compiled, patch = jax.jit(apply), (options.patch,) * 3
    mesh = parallel.make_mesh({"data": -1})
    parameters = jax.device_put(parameters, parallel.replicated(mesh))
    size = options.batch * mesh.shape["data"]

    def run(volume: np.ndarray) -> np.ndarray:
        count = len(list(itertools.product(*tile_starts(volume.shape, patch))))
        tile = volume[tuple(slice(0, size) for size in patch)]
        x = parallel.put_batch(mesh, {"x": np.stack([tile] * size)[..., None]})["x"]
        for _ in range(-(-count // size)):
            compiled(parameters, x).block_until_ready()
        return np.zeros((1, 1, 1, 1))

    return run


def monai(options) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from monai.inferers import SlidingWindowInferer

    net = torch_network(options)
    inferer = SlidingWindowInferer((options.patch,) * 3, 1, overlap=0.5, mode="gaussian")

    def run(volume: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return inferer(torch.from_numpy(volume)[None, None], net)[0].numpy()

    return run


def nnunet(options) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=0.5,
        use_gaussian=True,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    # All that the sliding window reads of a model folder.
    predictor.network = torch_network(options)
    predictor.configuration_manager = SimpleNamespace(patch_size=(options.patch,) * 3)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=options.classes)

    def run(volume: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(volume)[None]
        return predictor.predict_sliding_window_return_logits(image).numpy()

    return run


ROWS = {"network": alone, "tumorjax": ours, "MONAI": monai, "nnU-Net": nnunet}


def measure(row: str, options, folder: Path) -> None:
    """Runs one row in this process and leaves its times and labels in the folder."""
    run, volume = ROWS[row](options), scene(tuple(options.shape), options.classes, seed=1)[0]
    begin = time.perf_counter()
    run(np.ascontiguousarray(volume[tuple(slice(0, options.patch) for _ in range(3))]))
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    logits = run(volume)
    seconds = time.perf_counter() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    path = folder / f"{row}.json"
    found = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*found, {"first": first, "seconds": seconds, "memory": memory}]))
    np.save(folder / f"{row}.npy", logits.argmax(0).astype(np.uint8))


def report(folder: Path) -> None:
    """Prints the rows of a folder, and whether the goals are reached."""
    found = {r: json.loads(p.read_text()) for r in ROWS if (p := folder / f"{r}.json").exists()}
    labels = {row: np.load(folder / f"{row}.npy") for row in found if row != "network"}
    best = {row: min(entry["seconds"] for entry in entries) for row, entries in found.items()}
    print("| what | first, s | best, s | all, s | peak memory, GiB | labels as tumorjax', % |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row, entries in found.items():
        times = " ".join(f"{entry['seconds']:.1f}" for entry in entries)
        memory = max(entry["memory"] for entry in entries)
        equal = ""
        if row in labels and "tumorjax" in labels:
            equal = f"{100 * (labels[row] == labels['tumorjax']).mean():.3f}"
        print(
            f"| {row} | {entries[0]['first']:.1f} | {best[row]:.1f} | {times} | {memory:.1f}"
            f" | {equal} |"
        )
    if "tumorjax" not in best:
        return
    for peer in ("MONAI", "nnU-Net"):
        if peer in best:
            ratio = best[peer] / best["tumorjax"]
            state = "reached" if ratio >= GOAL else "not reached"
            print(f"{ratio:.2f} times as fast as {peer}; goal {GOAL}: {state}")
    if "nnU-Net" in labels:
        equal = 100 * (labels["nnU-Net"] == labels["tumorjax"]).mean()
        state = "reached" if equal > AGREEMENT else "not reached"
        print(f"{equal:.3f} % of labels are nnU-Net's; goal {AGREEMENT}: {state}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 250, 250))
    parser.add_argument("--patch", type=int, default=96)
    parser.add_argument("--classes", type=int, default=7)
    parser.add_argument(
        "--batch", type=int, default=1, help="tiles a forward pass and device, ours"
    )
    parser.add_argument("--devices", type=int, default=1, help="of a CPU, ours")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--folder", type=Path, help="keeps times and labels; else forgotten")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    parallel.split_cpu(options.devices)
    if options.one:
        measure(options.one, options, options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        options.folder = folder
        network(options)
        settings = ["--patch", options.patch, "--classes", options.classes]
        settings += ["--batch", options.batch, "--devices", options.devices]
        settings += ["--folder", folder, "--shape", *options.shape]
        for _, row in itertools.product(range(options.rounds), options.rows):
            command = [sys.executable, "-m", "benchmarks.inference", "--one", row]
            subprocess.run([*command, *map(str, settings)], check=True)
        print(f"{tuple(options.shape)}, patch {options.patch}, {options.classes} classes")
        report(folder)


if __name__ == "__main__":
    main()
