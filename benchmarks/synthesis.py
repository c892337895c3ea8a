"""Tumours per minute beside DiffTumor's sampler, and what synthesis costs a training.

    python -m benchmarks.synthesis [--only PATTERN ...] [--rounds 3] [--stages]

`sampler/...`: a crop of 96^3 voxels of 1 mm gets a tumour of 10 mm radius. Ours is the synthesizer
"diffusion" as the job "synthesis" runs it, from HU to HU: encode the crop, with the tumour's hole
and without, draw latents, decode both, blend. `tumorjax` has the networks of configs/diffusion.py
and the flow sampler with 4 steps, `tumorjax-large` the larger denoiser, `tumorjax-difftumor` the
layers, the sampler and the 4 steps of DiffTumor. The peer is DiffTumor's sampler of early tumours
in PyTorch (extra `torch`) with the published layers: see difftumor_sampler.py. Latents are 24^3 x 8
everywhere, weights random. Goal: 3 times as many tumours as PyTorch's in float32.

`training/...`: a step of nnU-Net's recipe for ResEncM, on two patches of 96^3, with augmentation;
and with tumours that are made within the step, in both patches, by the rules or by the networks of
`sampler/tumorjax`. Goal: at most 30 % more.

`paper/...`: a step of the variants `paper` of configs/autoencoder.py (the first, and one with
discriminators) and configs/diffusion.py, in float32 as on any CPU.

Each row is a process of its own; rows take turns, and the best time of each counts. `first` counts
compilation, or reading what an earlier run compiled. `CPU s` is the time of all cores. --stages
also times the parts of `sampler/...`, each alone.
"""

import argparse
import fnmatch
import functools
import importlib.util
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import synthesis_steps as steps
from benchmarks.untrained import (
    NETWORKS,
    RADIUS_MM,
    SIZE,
    SPACING,
    WINDOW,
    Row,
    scene,
    untrained_diffusion,
)
from tumorjax import compilation_cache

TUMOR_GOAL, ONLINE_GOAL = 3.0, 1.3
# How often a process repeats what it measures.
REPEATS = {"sampler": 3, "training": 2, "paper": 2}


# ---------------------------------------------------------------------------- one tumour


def ours(name: str, size: int = SIZE, radius: float = RADIUS_MM) -> Row:
    """Returns the row of the synthesizer "diffusion" with some of `NETWORKS`."""
    import jax
    import jax.numpy as jnp

    from tumorjax.models.convolution import compiler_options
    from tumorjax.synthesis import diffusion, diffusion_render
    from tumorjax.synthesis.latent_unet import Inputs

    trained = untrained_diffusion(*NETWORKS[name], size)
    image, organ, tumor = scene(size, radius)
    draws = iter(range(1_000_000))

    def run() -> np.ndarray:
        key = jax.random.key(next(draws))
        return diffusion_render.render(
            key, image, organ, tumor, SPACING, trained=trained, organ_index=0
        )

    denoiser, encode, decode = trained.generate.args
    settings = trained.config.diffusion
    pair = jnp.asarray(np.stack([image, image])[..., None] / 250.0)
    jit = functools.partial(jax.jit, compiler_options=compiler_options())
    call = jit(lambda function, *arguments: function(*arguments))
    latent = jnp.asarray(
        np.random.default_rng(0).standard_normal((1, *[size // 4] * 3, 8), np.float32)
    )
    told = Inputs(
        latent,
        diffusion.network_time(settings.objective, jnp.ones(1)),
        latent,
        jnp.asarray(tumor, jnp.float32)[None],
        jnp.zeros(1, jnp.int32),
        jnp.full(1, radius),
        jnp.ones(1, bool),
    )
    parts = {
        "encode": (1, encode, (pair,)),
        "denoise": (int(settings.steps), denoiser, (told,)),
        "decode": (1, decode, (jnp.concatenate([latent, latent]),)),
    }
    stages = {
        part: (count, functools.partial(_wait, call, function, *arguments))
        for part, (count, function, arguments) in parts.items()
    }
    weights = jax.tree.leaves([denoiser, encode.args[0]["parameters"]])
    return Row(run, sum(leaf.size for leaf in weights), stages)


def _wait(function: Callable, *arguments: Any) -> Any:
    import jax

    return jax.block_until_ready(function(*arguments))


def peer(dtype: str) -> Row:
    """Returns the row of DiffTumor's sampler in PyTorch; bfloat16 is its autocast."""
    import torch

    from benchmarks import difftumor_sampler

    sampler = difftumor_sampler.Sampler()
    # Faster so than without; the U-Net is not.
    for network in (sampler.encoder, sampler.decoder):
        network.to(memory_format=torch.channels_last_3d)
    hu, _, tumor = scene()
    low, high = WINDOW
    scaled = np.clip((hu - low) / (high - low), 0, 1).astype(np.float32) * 2 - 1
    image, mask = (torch.from_numpy(a)[None, None].float() for a in (scaled, tumor))

    def run(function: Callable, *arguments: Any) -> Any:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            return function(*arguments)

    condition = run(sampler.encode, image, mask)
    noise = torch.randn(1, difftumor_sampler.LATENT_CHANNELS, 24, 24, 24)
    stages = {
        "encode": (1, functools.partial(run, sampler.encode, image, mask)),
        "denoise": (
            difftumor_sampler.TIMESTEPS,
            functools.partial(run, sampler.step, noise, condition, 3),
        ),
        "decode": (1, functools.partial(run, sampler.decode, noise)),
    }
    networks = (sampler.encoder, sampler.denoiser, sampler.decoder)
    count = sum(p.numel() for network in networks for p in network.parameters())
    return Row(functools.partial(run, sampler, image, mask), count, stages)


# ---------------------------------------------------------------------------- rows

ROWS: dict[str, Callable[[], Row]] = {
    **{f"sampler/{name}": functools.partial(ours, name) for name in NETWORKS},
    **{f"sampler/pytorch-{d}": functools.partial(peer, d) for d in ("float32", "bfloat16")},
    "training/plain": functools.partial(steps.training, ""),
    "training/rules": functools.partial(steps.training, "rules"),
    "training/diffusion": functools.partial(steps.training, "diffusion"),
    "paper/autoencoder": functools.partial(steps.paper_autoencoder, False),
    "paper/autoencoder+discriminators": functools.partial(steps.paper_autoencoder, True),
    "paper/diffusion": steps.paper_diffusion,
}


def measure(name: str, stages: bool) -> dict[str, Any]:
    """Runs a row in this process; returns seconds, GiB and million parameters."""
    compilation_cache.keep(compilation_cache.default_folder())
    row = ROWS[name]()
    times = []
    for _ in range(1 + REPEATS[name.partition("/")[0]]):
        start, used = time.perf_counter(), time.process_time()
        row.run()
        times.append((time.perf_counter() - start, time.process_time() - used))
    found: dict[str, Any] = {
        "first": times[0][0],
        "seconds": min(wall for wall, _ in times[1:]),
        "cpu": min(used for _, used in times[1:]),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": row.parameters / 1e6,
    }
    for part, (count, function) in row.stages.items() if stages else ():
        function()
        alone = []
        for _ in range(3):
            start = time.perf_counter()
            function()
            alone.append(time.perf_counter() - start)
        found[part] = f"{count} x {min(alone):.3f}"
    return found


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a row's first `first`, its least seconds and its most memory."""
    row = min(rounds, key=lambda found: found["seconds"])
    return row | {
        "first": rounds[0]["first"],
        "cpu": min(found["cpu"] for found in rounds),
        "memory": max(found["memory"] for found in rounds),
    }


def report(rows: dict[str, dict[str, Any]]) -> None:
    """Prints a table a subject, and whether the goals are reached."""
    for subject in REPEATS:
        here = {name: row for name, row in rows.items() if name.startswith(f"{subject}/")}
        if not here:
            continue
        parts = [p for p in ("encode", "denoise", "decode") if any(p in r for r in here.values())]
        rates = ["tumours a minute"] if subject == "sampler" else []
        heads = ["row", "million parameters", "first, s", "best, s", "CPU s", *parts, *rates]
        print("| " + " | ".join([*heads, "peak, GiB"]) + " |")
        print("| " + " | ".join(["---"] * (len(heads) + 1)) + " |")
        for name, row in here.items():
            cells = [name, f"{row['parameters']:.1f}"]
            cells += [f"{row['first']:.1f}", f"{row['seconds']:.2f}", f"{row['cpu']:.2f}"]
            cells += [row.get(part, "") for part in parts]
            cells += [f"{60 / row['seconds']:.1f}"] * len(rates)
            print("| " + " | ".join([*cells, f"{row['memory']:.1f}"]) + " |")
        print()

    def ratio(over: str, under: str) -> float:
        return rows.get(over, {}).get("seconds", math.nan) / rows.get(under, {}).get(
            "seconds", math.nan
        )

    tumors = ratio("sampler/pytorch-float32", "sampler/tumorjax")
    if not math.isnan(tumors):
        state = "reached" if tumors >= TUMOR_GOAL else "not reached"
        print(f"{tumors:.2f} times as many tumours as PyTorch; goal {TUMOR_GOAL:g}: {state}")
    for name in ("rules", "diffusion"):
        step = ratio(f"training/{name}", "training/plain")
        if not math.isnan(step):
            state = "reached" if step <= ONLINE_GOAL else "not reached"
            print(
                f"a step with {name} takes {step:.2f} times the time; goal {ONLINE_GOAL:g}: {state}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each row")
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.stages)))
        return
    names = [n for n in ROWS if any(fnmatch.fnmatch(n, p) for p in arguments.only)]
    if not names:
        parser.error(f"no row is like {arguments.only}. Rows: {', '.join(ROWS)}")
    if not importlib.util.find_spec("torch"):
        print("PyTorch is missing: install the extra `torch`")
        names = [name for name in names if "pytorch" not in name]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.synthesis", "--one", name]
            command += ["--stages"] * arguments.stages
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rounds[name].append(json.loads(run.stdout.splitlines()[-1]))
            # Rows of full size take minutes, and the table comes last.
            print(f"{name}: {rounds[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    report({name: best(found) for name, found in rounds.items()})


if __name__ == "__main__":
    main()
