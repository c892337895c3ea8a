"""The job "autoencoder": trains stage 1 of the synthesizer on unlabelled scans."""

import functools
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from tqdm import tqdm

from data_prep.prepared_store import prepared_store
from tumorjax import anatomy, parallel
from tumorjax.clock import Clock
from tumorjax.data import crops
from tumorjax.errors import UserError
from tumorjax.files import write_csv_atomic, write_json_atomic
from tumorjax.models import convolution
from tumorjax.settings import plain
from tumorjax.synthesis import autoencoder, leakage, reconstruction
from tumorjax.synthesis.autoencoder import Autoencoder
from tumorjax.training import checkpoints, loop, schedules
from tumorjax.volumes import Store

SECTIONS = ("seed", "preparation", "model", "training", "evaluation", "mesh")
# Crops may be centred on what a study is about: organs that tumours grow in, and tumours.
_HOSTS = tuple(
    label for organ in dict.fromkeys(anatomy.HOST.values()) for label in anatomy.organ_labels(organ)
)
CENTERS = (*_HOSTS, *anatomy.TUMORS)
# Label ids as they are, so that errors can be told by tissue.
_CLASSES = {name: (name,) for name in anatomy.LABELS}

# What a stream of random numbers is for.
_HELD_OUT, _EVALUATION = 11, 12

Sources = Sequence[tuple[Store, str]]


class Trainer(NamedTuple):
    """What a training needs, made once for all of one configuration.

    Attributes:
        init: seed -> initial state on the mesh.
        step: (state, batch) -> (state, scalars); jitted, takes the state over.
        model: the autoencoder's functions.
    """

    init: Any
    step: loop.Step
    model: Autoencoder


def section(config: ConfigDict) -> dict[str, Any]:
    """Returns the part of the job's configuration that the result depends on, as plain JSON."""
    values = plain(config)
    return {name: values[name] for name in SECTIONS}


def build(config: ConfigDict, seed: int = 0) -> Autoencoder:
    """Builds the autoencoder of a configuration."""
    settings = plain(config.model)
    settings["dtype"] = checkpoints.compute_dtype(settings.get("dtype") or "auto")
    return autoencoder.create(seed=seed, **settings)


def reconstruction_loss(
    truth: Float[Array, "b x y z 1"], other: Float[Array, "b x y z 1"], gradient: float
) -> tuple[Array, Array]:
    """Returns the mean absolute error, and that error with `gradient` times its slopes' added.

    The slopes are differences of neighbours along each axis: their error is what blurred edges and
    textures have, and the absolute error hardly sees.
    """
    difference = other - truth
    error = jnp.abs(difference).mean()
    if not gradient:
        return error, error
    slopes = sum(jnp.abs(jnp.diff(difference, axis=axis)).mean() for axis in (1, 2, 3)) / 3
    return error, error + gradient * slopes


def make_trainer(config: ConfigDict, mesh: Mesh) -> Trainer:
    """Returns the compiled pieces for a configuration; equal ones share them."""
    values = section(config)
    values.pop("seed")
    return _make_trainer(json.dumps(values), mesh)


@functools.lru_cache(maxsize=4)
def _make_trainer(text: str, mesh: Mesh) -> Trainer:
    config = ConfigDict(json.loads(text))
    training = config.training
    model = build(config)
    update = schedules.optimizer(training, training.steps)
    rate = schedules.learning_rate(training, training.steps)

    def init(seed: int) -> dict[str, Any]:
        parameters = build(config, seed).parameters
        state = {
            "parameters": parameters,
            "optimizer": update.init(parameters),
            "step": jnp.zeros((), jnp.int32),
            "key": jax.random.key_data(jax.random.key(seed)),
        }
        return jax.device_put(state, parallel.state_shardings(mesh, state))

    def step(state: dict[str, Any], batch: dict[str, Array]):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        image = batch["image"] * 2 - 1

        def loss_of(parameters):
            mean, log_variance = autoencoder.split_latent(model.encode(parameters, image))
            noise = jax.random.normal(key, mean.shape)
            decoded = model.decode(parameters, mean + jnp.exp(log_variance / 2) * noise)
            error, loss = reconstruction_loss(image, decoded, training.gradient)
            # Kullback-Leibler divergence from the unit Gaussian, mean over latents, in nats.
            divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
            scalars = {"l1": error, "kl": divergence}
            return loss + training.kl * divergence, scalars

        (loss, scalars), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["parameters"])
        changes, optimizer = update.update(gradient, state["optimizer"], state["parameters"])
        scalars = {"loss": loss, "learning_rate": jnp.asarray(rate(state["step"])), **scalars}
        parameters = jax.tree.map(jnp.add, state["parameters"], changes)
        new = {"parameters": parameters, "optimizer": optimizer, "step": state["step"] + 1}
        return new | {"key": state["key"]}, scalars

    state = jax.eval_shape(
        lambda: {
            "parameters": model.parameters,
            "optimizer": update.init(model.parameters),
            "step": jnp.zeros((), jnp.int32),
            "key": jax.random.key_data(jax.random.key(0)),
        }
    )
    shardings = parallel.state_shardings(mesh, state)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, parallel.batch_sharding(mesh)),
        out_shardings=(shardings, parallel.replicated(mesh)),
        compiler_options=convolution.compiler_options(),
    )
    return Trainer(init, jitted, model)


def split_patients(sources: Sources, share: float, seed: int) -> tuple[list, list]:
    """Divides scans into those to train on and those held out, by patient.

    Args:
        sources: (store, case) pairs.
        share: of the patients to hold out, 0 to below 1; at least one unless it is 0.
        seed: decides which.

    Raises:
        UserError: there is no scan, or none is left to train on.
    """
    if not 0 <= share < 1:
        raise UserError(f"data.held_out is {share}. Expected a share from 0 to below 1")
    patients = sorted({str(store.record(case)["patient"]) for store, case in sources})
    count = max(1, round(share * len(patients))) if share else 0
    if len(patients) <= count:
        raise UserError(
            f"the store has scans of {len(patients)} patients, and {count} are to be held out."
            " Prepare more, or lower data.held_out"
        )
    order = np.random.default_rng([seed, _HELD_OUT]).permutation(len(patients))
    held_out = {patients[index] for index in order[:count]}
    parts: tuple[list, list] = ([], [])
    for store, case in sources:
        parts[str(store.record(case)["patient"]) in held_out].append((store, case))
    return parts


def _loader(sources: Sources, training: ConfigDict, seed: int, batch_size: int, start: int = 0):
    """Returns batches of crops: one share anywhere, the other on an organ or a tumour."""
    return crops.loader(
        sources,
        _CLASSES,
        tuple(training.patch_size),
        batch_size,
        training.centered,
        seed,
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=training.loader_threads,
        foreground_classes=CENTERS,
        tumor_share=training.tumor_share,
    )


def latent_scale(
    model: Autoencoder, parameters: dict[str, Array], batches: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, list[float]]:
    """Returns what latents are shifted and divided by to have mean 0 and variance 1.

    Args:
        model: of kind "kl".
        parameters: trained ones.
        batches: with image [b, x, y, z, 1] in [0, 1].

    Returns:
        shift and scale, a number for each channel.
    """
    encode = jax.jit(
        lambda parameters, x: autoencoder.split_latent(model.encode(parameters, x * 2 - 1))[0],
        compiler_options=convolution.compiler_options(),
    )
    latents = [np.asarray(encode(parameters, batch["image"])) for batch in batches]
    channels = latents[0].shape[-1]
    values = np.concatenate([z.reshape(-1, channels) for z in latents]).astype(np.float64)
    scale = np.maximum(values.std(axis=0), 1e-6)
    return {"shift": values.mean(axis=0).tolist(), "scale": scale.tolist()}


def train(
    config: ConfigDict,
    sources: Sources,
    folder: Path,
    mesh: Mesh,
    *,
    clock: Clock,
    progress: Any = lambda step, row: None,
) -> tuple[Autoencoder, dict[str, Array]]:
    """Trains an autoencoder on the given scans, or goes on where that was stopped.

    Args:
        config: with the sections of `SECTIONS`.
        sources: (store, case) of each scan.
        folder: gets config.json, checkpoints/ and metrics.csv.
        mesh: of the devices to train on.
        clock: gets the phases "load" and "train".
        progress: called with each row of the training curve.

    Returns:
        the autoencoder's functions and its trained parameters.

    Raises:
        UserError: a setting does not fit, or the loss is no longer a number.
    """
    training = config.training
    patch = tuple(training.patch_size)
    if len(patch) != 3 or any(size % autoencoder.FACTOR or size < 12 for size in patch):
        raise UserError(
            f"training.patch_size is {patch}. Expected three multiples of {autoencoder.FACTOR}"
            " from 12"
        )
    trainer = make_trainer(config, mesh)
    if jax.process_index() == 0:
        write_json_atomic(folder / "config.json", section(config))
    try:
        state = loop.train(
            folder,
            trainer.init(config.seed),
            trainer.step,
            lambda position: _images(
                _loader(sources, training, config.seed, training.batch_size, position)
            ),
            mesh=mesh,
            steps=training.steps,
            save_every=training.save_every,
            log_every=training.log_every,
            clock=clock,
            progress=progress,
        )
    except loop.Diverged as error:
        raise UserError(f"{error}. {last_checkpoint(folder)}") from error
    return trainer.model, state["parameters"]


def _images(batches: crops.CropLoader):
    """Leaves the labels out: they only say where crops lie."""
    for batch in batches:
        yield {"image": batch["image"]}


def last_checkpoint(folder: Path) -> str:
    with checkpoints.open_manager(folder) as manager:
        step = manager.latest_step()
    if step is None:
        return "There is no checkpoint from before"
    return f"The last good checkpoint is {folder / 'checkpoints' / str(step)}"


def run(config: ConfigDict, workdir: Path) -> int:
    """Trains an autoencoder, see configs/autoencoder.py.

    Writes into workdir config.json, checkpoints/, metrics.csv, trained_on.json, latent.json,
    quality.json and, last, done.json.

    Returns:
        0, or 1 where scans were set aside (workdir/rejected.csv).

    Raises:
        UserError: the config is wrong, or there is nothing to train on.
    """
    workdir = Path(workdir)
    parallel.start_processes(config.processes)
    build(config)  # Refuses wrong settings before scans are prepared.
    clock = Clock()
    with clock("prepare"):
        store, rejected = prepared_store(config, workdir)
    if not store.cases:
        raise UserError(f"{store.url}: no scans to train on. Prepare some, see rejected.csv")
    sources = [(store, case) for case in store.cases]
    training_sources, held_out = split_patients(sources, config.data.held_out, config.seed)
    trained_on = leakage.record_of(training_sources)
    wanted = section(config) | {"images": trained_on["images"]}
    done = workdir / "done.json"
    if done.is_file() and json.loads(done.read_text()) == wanted:
        print(f"{workdir}: already finished")
        return 1 if rejected else 0
    done.unlink(missing_ok=True)
    mesh = parallel.make_mesh(config.mesh)
    write_json_atomic(workdir / "trained_on.json", trained_on)
    with tqdm(total=config.training.steps, unit="step", disable=not sys.stderr.isatty()) as bar:

        def progress(step: int, row: Mapping[str, float]) -> None:
            bar.update(step - bar.n)
            bar.set_postfix(l1=f"{row['l1']:.4f}", refresh=False)

        model, parameters = train(
            config, training_sources, workdir, mesh, clock=clock, progress=progress
        )
    with clock("evaluate"):
        batch_size, count = config.training.batch_size, config.evaluation.batches

        def sample(of: Sources) -> list[Mapping[str, np.ndarray]]:
            seed = int(np.random.SeedSequence([config.seed, _EVALUATION]).generate_state(1)[0])
            with _loader(of, config.training, seed, batch_size) as batches:
                return list(itertools.islice(batches, count))

        latent = latent_scale(model, parameters, sample(training_sources))
        quality: dict[str, Any] = {"held_out_scans": len(held_out)}
        if held_out:
            reconstruct = jax.jit(
                functools.partial(_reconstruct, model),
                compiler_options=convolution.compiler_options(),
            )
            window = (float(store.settings["window"][0]), float(store.settings["window"][1]))
            quality |= reconstruction.measure(
                lambda x: np.asarray(reconstruct(parameters, x)), sample(held_out), window
            )
    if jax.process_index() == 0:
        write_json_atomic(workdir / "latent.json", latent)
        write_json_atomic(workdir / "quality.json", quality)
        if rejected:
            write_csv_atomic(workdir / "rejected.csv", rejected, ("case", "stage", "reason"))
        write_json_atomic(done, wanted)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in clock.seconds.items())
    print(f"{workdir}: trained {config.training.steps} steps ({seconds})")
    if held_out:
        print(f"held-out scans: PSNR {quality['psnr']} dB, SSIM {quality['ssim']}")
    return 1 if rejected else 0


def _reconstruct(model: Autoencoder, parameters: dict[str, Array], x: Array) -> Array:
    return model.decode(parameters, autoencoder.split_latent(model.encode(parameters, x))[0])
