"""A training step of the default network beside the same network in PyTorch, on the same cores.

    python -m benchmarks.training [--rounds 10]

Forward, Dice + cross-entropy, backward, update; float32, without augmentation. The peer is
dynamic-network-architectures' ResidualEncoderUNet (extra `torch`); without it only our row is
printed. Seconds are medians of runs in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.scaling import get_config
from tumorjax import models
from tumorjax.training.losses import segmentation_loss


def ours(config, x: np.ndarray, y: np.ndarray) -> Callable[[], None]:
    """Returns a function that does one step of tumorjax."""
    network = models.create(
        "resenc_unet",
        classes=3,
        widths=tuple(config.model.widths),
        blocks=tuple(config.model.blocks),
    )
    apply, values = models.functional(network)
    update = optax.sgd(0.01, 0.9, nesterov=True)
    state = [values, update.init(values)]

    @jax.jit
    def step(values, optimizer, x, y):
        gradient = jax.grad(lambda v: segmentation_loss(apply(v, x), y, batch_dice=True))(values)
        changes, optimizer = update.update(gradient, optimizer, values)
        return optax.apply_updates(values, changes), optimizer

    def run() -> None:
        state[:] = step(*state, x, y)
        jax.block_until_ready(state)

    return run


def peer(config, x: np.ndarray, y: np.ndarray) -> Callable[[], None] | None:
    """Returns a function that does one step in PyTorch, or None where it is not installed."""
    try:
        import torch
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    except ImportError:
        return None
    stages = len(config.model.widths)
    network = ResidualEncoderUNet(
        input_channels=1,
        n_stages=stages,
        features_per_stage=list(config.model.widths),
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=[1] + [2] * (stages - 1),
        n_blocks_per_stage=list(config.model.blocks),
        num_classes=3,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, nesterov=True)
    image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    label = torch.from_numpy(y.astype(np.int64))
    truth = torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()

    def run() -> None:
        optimizer.zero_grad()
        logits = network(image)
        p = torch.softmax(logits, 1)[:, 1:]
        t = truth[:, 1:]
        axes = (0, 2, 3, 4)
        dice = (2 * (p * t).sum(axes) + 1e-5) / (p.sum(axes) + t.sum(axes) + 1e-5)
        loss = 1 - dice.mean() + torch.nn.functional.cross_entropy(logits, label)
        loss.backward()
        optimizer.step()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    config = get_config()
    rng = np.random.default_rng(0)
    patch = tuple(config.training.patch_size)
    x = rng.standard_normal((config.training.batch_size, *patch, 1)).astype(np.float32)
    y = np.asarray(rng.integers(0, 3, x.shape[:-1]))
    rows = {"tumorjax": ours(config, jnp.asarray(x), jnp.asarray(y)), "PyTorch": peer(config, x, y)}
    runs = {name: run for name, run in rows.items() if run is not None}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["tumorjax"])
    print(f"{'default network, step':24}{'seconds':>9}{'against tumorjax':>18}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:24}{median:9.3f}{median / base:18.2f}")
    if len(runs) == 1:
        print("PyTorch or dynamic-network-architectures is missing: install the extra `torch`")


if __name__ == "__main__":
    main()
