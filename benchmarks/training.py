"""A training step beside the same network in PyTorch, on the same cores.

    python -m benchmarks.training [--only PATTERN ...] [--rounds 3]

Networks: `default`, the study's, in steps on batches of two 32^3 crops (`lax`: with plain
lax.conv_general_dilated, compiled as it comes); `resencm`, nnU-Net's ResEncM with deep supervision,
in steps on two patches of 96^3 (`+remat`: what a stage computes is computed again in the backward
pass); `forward`, ResEncM's inference on one patch. A step is forward, Dice + cross-entropy,
backward, update, without augmentation. The peer is dynamic-network-architectures'
ResidualEncoderUNet (extra `torch`); without it only our rows are printed. `--only` takes patterns
of row names, for instance 'default/*' '*/*-float32'.

Each row is a process of its own, so that its peak memory is its own; they run in turn. Seconds are
medians; `first` counts compilation, or reading what an earlier run compiled. `CPU s` is the time of
all cores, which says more than seconds do where other programs run beside. GFLOP/s count the
convolutions' multiplications and additions, two operations each and three passes a step, however a
row computes them. `error` is the norm of the difference to the same framework's float32 row (for
`lax` that is tumorjax's own), over that row's norm: of the first step's gradient, or of the logits.
"""

import argparse
import fnmatch
import importlib.util
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from configs.scaling import get_config
from tumorjax import compilation_cache

CLASSES = 3


class Network(NamedTuple):
    """Shape of a network and of its batch."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    patch: tuple[int, ...]
    batch: int
    deep_supervision: bool
    step: bool

    @property
    def settings(self) -> dict[str, Any]:
        return {"classes": CLASSES, "widths": self.widths, "blocks": self.blocks}


def networks() -> dict[str, Network]:
    """Returns the networks by name."""
    from tumorjax.models.resenc_unet import SMALL

    training = get_config().training
    m = ((32, 64, 128, 256, 320), (1, 3, 4, 6, 6), (96, 96, 96))
    default = (SMALL["widths"], SMALL["blocks"], tuple(training.patch_size))
    return {
        "default": Network(*default, training.batch_size, training.deep_supervision, True),
        "resencm": Network(*m, 2, True, True),
        "forward": Network(*m, 1, False, False),
    }


# Each row's network, framework and arithmetic; the last is what its error is measured against.
ROWS = {
    "default/tumorjax-float32": "default/tumorjax-float32",
    "default/lax-float32": "default/tumorjax-float32",
    "default/pytorch-float32": "default/pytorch-float32",
    "resencm/tumorjax+remat-float32": "resencm/tumorjax-float32",
    **{
        f"{network}/{framework}-{dtype}": f"{network}/{framework}-float32"
        for network in ("resencm", "forward")
        for framework in ("tumorjax", "pytorch")
        for dtype in ("float32", "bfloat16")
    },
}


def batch_of(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Returns a random batch [b, x, y, z, 1] and its labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((network.batch, *network.patch, 1)).astype(np.float32)
    return x, rng.integers(0, CLASSES, x.shape[:-1]).astype(np.int32)


def ours(
    network: Network, dtype: str, *, tuned: bool = True, remat: bool = False
) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """Returns a function that does a step (or a forward pass), and one for gradient or logits.

    `tuned` compiles with the project's compiler options, `remat` keeps less for the backward pass.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from tumorjax import models
    from tumorjax.models.convolution import compiler_options
    from tumorjax.training.losses import segmentation_loss

    model = models.create(
        "resenc_unet",
        **network.settings,
        deep_supervision=network.deep_supervision,
        dtype=dtype,
        remat=remat,
    )
    apply, values = models.functional(model)
    x, y = (jnp.asarray(array) for array in batch_of(network))
    options = compiler_options() if tuned else {}
    if not network.step:
        forward = jax.jit(apply, compiler_options=options)
        return (
            lambda: jax.block_until_ready(forward(values, x)),
            lambda: np.asarray(forward(values, x), np.float32).ravel(),
        )
    update = optax.sgd(0.01, 0.9, nesterov=True)
    state = [values, update.init(values)]
    shapes = {name: value.shape for name, value in sorted(values.items())}

    def step(values, optimizer, x, y):
        gradient = jax.grad(lambda v: segmentation_loss(apply(v, x), y, batch_dice=True))(values)
        changes, optimizer = update.update(gradient, optimizer, values)
        return optax.apply_updates(values, changes), optimizer

    jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
    first: list[np.ndarray] = []

    def run() -> None:
        state[:] = jitted(*state, x, y)
        jax.block_until_ready(state)
        if not first:
            # Without weight decay the momentum after one step is its gradient.
            trace = jax.tree.leaves(state[1], is_leaf=lambda leaf: isinstance(leaf, dict))[0]
            first.append(np.concatenate([np.asarray(trace[name]).ravel() for name in shapes]))

    return run, lambda: first[0]


def peer(network: Network, dtype: str) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """Returns the same of PyTorch; bfloat16 is its autocast, with channels last."""
    import torch
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    torch.manual_seed(0)
    stages = len(network.widths)
    model = ResidualEncoderUNet(
        input_channels=1,
        n_stages=stages,
        features_per_stage=list(network.widths),
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=[1] + [2] * (stages - 1),
        n_blocks_per_stage=list(network.blocks),
        num_classes=CLASSES,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=network.deep_supervision,
    )
    x, y = batch_of(network)
    image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    label = torch.from_numpy(y.astype(np.int64))
    half = dtype == "bfloat16"
    if half:
        model = model.to(memory_format=torch.channels_last_3d)
        image = image.to(memory_format=torch.channels_last_3d)

    def logits_of() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(image)

    if not network.step:

        def forward() -> Any:
            with torch.inference_mode():
                return logits_of()

        return forward, lambda: forward().float().numpy().ravel()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True)
    first: list[np.ndarray] = []

    def level_loss(logits: Any, truth: Any) -> Any:
        p = torch.softmax(logits, 1)[:, 1:]
        t = torch.nn.functional.one_hot(truth, CLASSES).movedim(-1, 1).float()[:, 1:]
        axes = (0, 2, 3, 4)
        dice = (2 * (p * t).sum(axes) + 1e-5) / (p.sum(axes) + t.sum(axes) + 1e-5)
        return 1 - dice.mean() + torch.nn.functional.cross_entropy(logits, truth)

    def run() -> None:
        optimizer.zero_grad()
        levels = logits_of()
        levels = levels if isinstance(levels, list) else [levels]
        weights = [0.5**i for i in range(len(levels))]
        if len(levels) > 1:
            weights[-1] = 0
        loss = 0
        for level, (logits, weight) in enumerate(zip(levels, weights, strict=True)):
            if weight:
                step, start = 2**level, 2**level // 2
                truth = label[:, start::step, start::step, start::step]
                loss = loss + weight / sum(weights) * level_loss(logits.float(), truth)
        loss.backward()  # type: ignore[attr-defined]
        if not first:
            gradients = (p.grad for p in model.parameters() if p.grad is not None)
            first.append(np.concatenate([g.numpy().ravel() for g in gradients]))
        optimizer.step()

    return run, lambda: first[0]


def work(name: str, folder: str, pipe: Connection) -> None:
    """Runs a row: a step for each message that asks for one; saves what its error is told from."""
    compilation_cache.keep(compilation_cache.default_folder())
    network_name, _, row = name.partition("/")
    framework, _, dtype = row.partition("-")
    network = networks()[network_name]
    if framework == "pytorch":
        run, result = peer(network, dtype)
    else:
        from tumorjax.models import convolution

        plain = mock.patch.object(convolution, "choose", return_value="direct")
        if framework == "lax":
            plain.start()
        tuned, remat = framework != "lax", framework.endswith("+remat")
        run, result = ours(network, dtype, tuned=tuned, remat=remat)
    pipe.send("ready")
    while pipe.recv() == "run":
        start, used = time.perf_counter(), time.process_time()
        run()
        pipe.send((time.perf_counter() - start, time.process_time() - used))
    # Before the result is copied.
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    np.save(Path(folder) / name.replace("/", "_"), result())
    pipe.send("saved")


def operations(network: Network) -> float:
    """Returns the GFLOP of a step, or of a forward pass, counted in the network's convolutions."""
    voxels = math.prod(network.patch)
    widths, blocks = network.widths, network.blocks
    count = 27 * widths[0] * voxels
    for level, (width, number) in enumerate(zip(widths, blocks, strict=True)):
        before = widths[max(level - 1, 0)]
        here = voxels / 8**level
        count += here * (27 * width * (before + (2 * number - 1) * width))
        if before != width:
            count += here * before * width
        if level + 1 < len(widths):
            # Upsampling, the decoder's convolution of both halves, and the head.
            count += here * (widths[level + 1] * width + 27 * 2 * width * width)
            if level == 0 or network.deep_supervision:
                count += here * width * CLASSES
    return 2 * count * network.batch * (3 if network.step else 1) / 1e9


def measure(names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Returns first, seconds, cpu (s), memory (GiB) and error of each row of one network."""
    spawn = multiprocessing.get_context("spawn")
    rows: dict[str, dict[str, float]] = {}
    pipes, processes = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            pipes[name], other = spawn.Pipe()
            process = spawn.Process(target=work, args=(name, folder, other), daemon=True)
            process.start()
            other.close()
            processes.append(process)
            pipes[name].recv()
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(rounds + 1):
            for name, pipe in pipes.items():
                pipe.send("run")
                seconds[name].append(pipe.recv())
        for name, pipe in pipes.items():
            pipe.send("stop")
            rows[name] = {"first": seconds[name][0][0], "memory": pipe.recv()}
            rows[name]["seconds"] = statistics.median(wall for wall, _ in seconds[name][1:])
            rows[name]["cpu"] = statistics.median(cpu for _, cpu in seconds[name][1:])
            pipe.recv()
        for process in processes:
            process.join()
        for name in names:
            if ROWS[name] in names and ROWS[name] != name:
                exact, found = (
                    np.load(Path(folder) / f"{n.replace('/', '_')}.npy") for n in (ROWS[name], name)
                )
                error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
                rows[name]["error"] = float(error)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    names = [n for n in ROWS if any(fnmatch.fnmatch(n, p) for p in arguments.only)]
    if not names:
        parser.error(f"no row is like {arguments.only}. Rows: {', '.join(ROWS)}")
    needed = ("torch", "dynamic_network_architectures")
    if not all(importlib.util.find_spec(module) for module in needed):
        print("PyTorch or dynamic-network-architectures is missing: install the extra `torch`")
        names = [name for name in names if "pytorch" not in name]
    print(
        f"{'row':28}{'first s':>9}{'seconds':>9}{'CPU s':>9}{'GFLOP/s':>9}{'GiB':>7}{'error':>9}"
        f"{'PyTorch float32 / it':>22}"
    )
    for network_name, network in networks().items():
        chosen = [name for name in names if name.startswith(f"{network_name}/")]
        rows = measure(chosen, arguments.rounds)
        base = rows.get(f"{network_name}/pytorch-float32", {}).get("seconds", math.nan)
        for name, row in rows.items():
            rate = operations(network) / row["seconds"]
            error = f"{row['error']:9.1e}" if "error" in row else f"{'':9}"
            print(
                f"{name:28}{row['first']:9.2f}{row['seconds']:9.3f}"
                f"{row['cpu']:9.3f}{rate:9.0f}"
                f"{row['memory']:7.2f}{error}{base / row['seconds']:22.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
