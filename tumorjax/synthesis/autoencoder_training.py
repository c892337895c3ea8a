"""The job "autoencoder": trains stage 1 of the synthesizer on unlabelled scans."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from data_prep.prepared_store import prepared_store
from tumorjax import anatomy, parallel, processes
from tumorjax.clock import Clock
from tumorjax.data import crops
from tumorjax.errors import UserError
from tumorjax.files import location, write_csv_atomic, write_json_atomic
from tumorjax.models import convolution
from tumorjax.settings import plain
from tumorjax.synthesis import leakage, reconstruction, reconstruction_figure
from tumorjax.synthesis.autoencoder import build
from tumorjax.synthesis.autoencoder_step import check_training, make_trainer, section
from tumorjax.synthesis.trained_autoencoder import decode_latents, encode_latents, latent_scale
from tumorjax.training import checkpoints, loop, monitor
from tumorjax.volumes import Store

# Crops may be centred on what a study is about: organs that tumours grow in, and tumours.
_HOSTS = tuple(
    label for organ in dict.fromkeys(anatomy.HOST.values()) for label in anatomy.organ_labels(organ)
)
CENTERS = (*_HOSTS, *anatomy.TUMORS)
# Label ids as they are, so that errors can be told by tissue.
_CLASSES = {name: (name,) for name in anatomy.LABELS}

# Sections that describe a training to whoever watches it.
_TOLD = ("seed", "preparation", "model", "training")
# What a stream of random numbers is for.
_HELD_OUT, _EVALUATION = 11, 12

Sources = Sequence[tuple[Store, str]]


def run(config: ConfigDict, workdir: Path) -> int:
    """Trains an autoencoder, see configs/autoencoder.py.

    Writes into workdir config.json, checkpoints/, metrics.csv, trained_on.json, latent.json,
    quality.json, quality.png and, last, done.json.

    Returns:
        0, or 1 where scans were set aside (workdir/rejected.csv).

    Raises:
        UserError: the config is wrong, there is nothing to train on, or the loss is no longer a
            number.
    """
    workdir = location(workdir)
    processes.start(config.processes)
    # Refused before scans are prepared.
    build(config)
    check_training(config)
    clock = Clock()
    with clock("prepare"):
        store, rejected = prepared_store(config, workdir)
    if not store.cases:
        raise UserError(f"{store.url}: no scans to train on. Prepare some")
    sources = [(store, case) for case in store.cases]
    training_sources, held_out = split_patients(sources, config.data.held_out, config.seed)
    mesh = parallel.make_mesh(config.mesh)
    with tqdm(total=config.training.steps, unit="step", disable=not sys.stderr.isatty()) as bar:

        def progress(step: int, row: Mapping[str, float]) -> None:
            bar.update(step - bar.n)
            bar.set_postfix(l1=f"{row['l1']:.4f}", refresh=False)

        quality = fit(
            config, training_sources, held_out, workdir, mesh, clock=clock, progress=progress
        )
    if rejected and jax.process_index() == 0:
        write_csv_atomic(workdir / "rejected.csv", rejected, ("case", "stage", "reason"))
    if quality is None:
        print(f"{workdir}: already finished")
        return 1 if rejected else 0
    if held_out and quality:
        print(f"held-out scans: PSNR {quality['psnr']} dB, SSIM {quality['ssim']}")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in clock.seconds.items())
    print(f"{workdir}: trained {config.training.steps} steps ({seconds})")
    return 1 if rejected else 0


def fit(
    config: ConfigDict,
    sources: Sources,
    held_out: Sources,
    folder: Path,
    mesh: Mesh,
    *,
    clock: Clock,
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, row: None,
) -> dict[str, Any] | None:
    """Trains an autoencoder on the given scans, measures it, and leaves all that `load` needs.

    Args:
        config: with the sections seed, preparation, model, training, evaluation and mesh.
        sources: (store, case) of each scan to train on.
        held_out: of each scan to measure it on; none is fine.
        folder: see `run` for what it gets.
        mesh: of the devices to train on.
        clock: gets the phases "load", "train" and "evaluate".
        progress: called with each row of the training curve.

    Returns:
        what quality.json holds, empty on other processes than the first; None where the folder
        was finished before.

    Raises:
        UserError: a setting does not fit, or the loss is no longer a number.
    """
    wanted = section(config) | {"images": leakage.record_of(sources)["images"]}
    done = folder / "done.json"
    owners = parallel.processes_of(mesh)
    finished = done.is_file() and json.loads(done.read_text()) == wanted
    # As the first found it: it removes the file next.
    if processes.gather(finished, among=owners)[0]:
        return None
    first = jax.process_index() == owners[0]
    if first:
        trained_on = _trained_on(config, sources, folder)
        done.unlink(missing_ok=True)
        write_json_atomic(folder / "trained_on.json", trained_on)
    state = train(config, sources, folder, mesh, clock=clock, progress=progress)
    state = on_host({name: state[name] for name in ("parameters", "codebook") if name in state})
    if not first:
        return {}
    with clock("evaluate"):
        quality = _evaluate(config, state, sources, held_out, folder)
    write_json_atomic(done, wanted)
    return quality


def train(
    config: ConfigDict,
    sources: Sources,
    folder: Path,
    mesh: Mesh,
    *,
    clock: Clock,
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, row: None,
) -> dict[str, Any]:
    """Trains an autoencoder on the given scans, or goes on where that was stopped.

    Args:
        config: with the sections seed, preparation, model, training, evaluation and mesh.
        sources: (store, case) of each scan.
        folder: gets config.json, checkpoints/ and metrics.csv.
        mesh: of the devices to train on.
        clock: gets the phases "load" and "train".
        progress: called with each row of the training curve.

    Returns:
        the trained state: parameters, and for kind "vq" codebook.

    Raises:
        UserError: a setting does not fit, or the loss is no longer a number.
    """
    training = config.training
    trainer = make_trainer(config, mesh)
    if jax.process_index() == parallel.processes_of(mesh)[0]:
        write_json_atomic(folder / "config.json", section(config))

    def batches_from(position: int) -> Iterator[Mapping[str, np.ndarray]]:
        batches = _loader(
            sources,
            training,
            config.seed,
            start=position,
            rows=parallel.batch_rows(mesh, training.batch_size),
        )
        with batches:
            for batch in batches:
                # Labels only say where crops lie.
                yield {"image": batch["image"]}

    try:
        return loop.train(
            folder,
            trainer.init(config.seed),
            trainer.step,
            batches_from,
            mesh=mesh,
            steps=training.steps,
            save_every=training.save_every,
            log_every=training.log_every,
            clock=clock,
            progress=progress,
            monitor=monitor.of_training(plain(config), folder, _TOLD),
        )
    except loop.Diverged as error:
        raise UserError(f"{error}. {last_checkpoint(folder)}") from error


def split_patients(
    sources: Sources, share: float, seed: int
) -> tuple[list[tuple[Store, str]], list[tuple[Store, str]]]:
    """Divides scans into those to train on and those held out, by patient.

    Args:
        sources: (store, case) pairs.
        share: of the patients to hold out, 0 to below 1; at least one unless it is 0.
        seed: decides which.

    Raises:
        UserError: none is left to train on, or the share is none.
    """
    if not 0 <= share < 1:
        raise UserError(f"data.held_out is {share}. Expected a share from 0 to below 1")
    patients = sorted({str(store.record(case)["patient"]) for store, case in sources})
    count = max(1, round(share * len(patients))) if share else 0
    if len(patients) <= count:
        raise UserError(
            f"there are scans of {len(patients)} patients, and {count} are to be held out."
            " Prepare more, or lower data.held_out"
        )
    order = np.random.default_rng([seed, _HELD_OUT]).permutation(len(patients))
    chosen = {patients[index] for index in order[:count]}
    training: list[tuple[Store, str]] = []
    held_out: list[tuple[Store, str]] = []
    for store, case in sources:
        part = held_out if str(store.record(case)["patient"]) in chosen else training
        part.append((store, case))
    return training, held_out


def _loader(sources: Sources, training: ConfigDict, seed: int, **options: Any) -> crops.CropLoader:
    """Returns batches of crops: one share anywhere, the other on an organ or a tumour."""
    return crops.loader(
        sources,
        _CLASSES,
        tuple(training.patch_size),
        training.batch_size,
        training.centered,
        seed,
        threads=training.loader_threads,
        foreground_classes=CENTERS,
        tumor_share=training.tumor_share,
        **options,
    )


def _evaluate(
    config: ConfigDict, state: dict[str, Any], training: Sources, held_out: Sources, workdir: Path
) -> dict[str, Any]:
    """Measures the latents' scale and the reconstructions' quality, and writes what it found."""
    seed = int(np.random.SeedSequence([config.seed, _EVALUATION]).generate_state(1)[0])

    def sample(sources: Sources) -> list[Mapping[str, np.ndarray]]:
        with _loader(sources, config.training, seed) as batches:
            return list(itertools.islice(batches, config.evaluation.batches))

    model = build(config)
    encoded = (batch["image"] * 2 - 1 for batch in sample(training))
    latent = latent_scale(model, state, encoded)
    write_json_atomic(workdir / "latent.json", latent)
    quality: dict[str, Any] = {"held_out_scans": len(held_out)}
    if held_out:
        given = state | {"latent": {name: np.asarray(v, np.float32) for name, v in latent.items()}}
        reconstruct = jax.jit(
            lambda given, x: decode_latents(model, given, encode_latents(model, given, x)),
            compiler_options=convolution.compiler_options(),
        )
        low, high = config.preparation.window
        batches = sample(held_out)
        quality |= reconstruction.measure(
            lambda x: np.asarray(reconstruct(given, x)), batches, (low, high)
        )
        shown = np.concatenate([batch["image"] for batch in batches[:2]])[-4:] * 2 - 1
        reconstruction_figure.write(
            workdir / "quality.png", shown, np.asarray(reconstruct(given, shown)), (low, high)
        )
    write_json_atomic(workdir / "quality.json", quality)
    return quality


def _trained_on(config: ConfigDict, sources: Sources, workdir: Path) -> dict[str, Any]:
    """Returns which scans the weights come from.

    Also those of the perceptual network, and those of an earlier run that this one goes on from.
    """
    records = [leakage.record_of(sources)]
    if config.training.perceptual:
        path = location(config.training.perceptual) / "trained_on.json"
        if not path.is_file():
            raise UserError(
                f"{path}: missing (training.perceptual), so which patients that network has seen is"
                " not known. Train it anew"
            )
        records.append(json.loads(path.read_text()))
    path = workdir / "trained_on.json"
    if path.is_file() and checkpoints.has_any(workdir):
        records.append(json.loads(path.read_text()))
    return records[0] if len(records) == 1 else leakage.union(records)


def on_host(tree: Any) -> Any:
    """Returns arrays that are spread over devices, and perhaps processes, as numpy's."""
    if not all(array.is_fully_addressable for array in jax.tree.leaves(tree)):
        tree = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
    return jax.tree.map(np.asarray, tree)


def last_checkpoint(folder: Path) -> str:
    steps = checkpoints.steps(folder)
    if not steps:
        return "There is no checkpoint from before"
    return f"The last good checkpoint is {folder / 'checkpoints' / str(steps[-1])}"
