"""The job "diffusion": trains stage 2 of the synthesizer, tumours in an autoencoder's latents."""

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from ml_collections import ConfigDict
from tqdm import tqdm

from data_prep.prepared_store import prepared_store
from tumorjax import backend, parallel, processes
from tumorjax.anatomy import HOST
from tumorjax.clock import Clock
from tumorjax.errors import UserError
from tumorjax.files import location, write_csv_atomic, write_json_atomic
from tumorjax.models import convolution
from tumorjax.settings import first_difference, plain
from tumorjax.synthesis import (
    denoisers,
    diffusion,
    diffusion_quality,
    leakage,
    lesion_crops,
    trained_autoencoder,
    trained_diffusion,
)
from tumorjax.synthesis.autoencoder import FACTOR
from tumorjax.synthesis.autoencoder_training import last_checkpoint, on_host, split_patients
from tumorjax.synthesis.latent_unet import Inputs
from tumorjax.synthesis.trained_autoencoder import TrainedAutoencoder
from tumorjax.training import loop, mirror, monitor, schedules
from tumorjax.volumes import Store

SECTIONS = ("job", "seed", "data", "preparation", "model", "diffusion", "training")
# What may leave the workdir: data says where scans lie.
_TOLD = tuple(name for name in SECTIONS if name != "data")


class Trainer(NamedTuple):
    """What a training needs, made once for all of one configuration.

    Attributes:
        init: seed -> initial state on the mesh.
        step: (state, batch, encode) -> (state, scalars); jitted, takes the state over.
        denoise: (parameters, Inputs) -> prediction.
    """

    init: Callable[[int], dict[str, Any]]
    step: Callable[[dict[str, Any], dict[str, Array], jax.tree_util.Partial], Any]
    denoise: Callable[[dict[str, Array], Inputs], Array]


def section(config: ConfigDict, organs: Sequence[str]) -> dict[str, Any]:
    """Returns what a training depends on, as plain JSON, with the organs that it is about."""
    values = plain(config)
    # Where scans lie is no part of what was trained; trained_on.json says which they were.
    kept = {name: values[name] for name in SECTIONS if name != "data"}
    return kept | {"organs": list(organs), "held_out": values["data"]["held_out"]}


def make_trainer(
    config: ConfigDict, organs: Sequence[str], latent_channels: int, mesh: Mesh
) -> Trainer:
    """Returns the compiled pieces for a configuration; equal ones share them.

    Args:
        config: with the sections model, diffusion and training.
        organs: host organs that the model is to tell apart.
        latent_channels: of the autoencoder.
        mesh: of the devices.
    """
    values = section(config, organs)
    values.pop("seed")
    return _make_trainer(json.dumps(values), latent_channels, mesh)


@backend.cached(4)
def _make_trainer(text: str, latent_channels: int, mesh: Mesh) -> Trainer:
    config = ConfigDict(json.loads(text))
    training, settings = config.training, config.diffusion
    organs = len(config.organs)
    denoise, parameters = denoisers.abstract(config.model, latent_channels, organs)
    update = optimizer(training)
    rate = learning_rate(training)

    def init(seed: int) -> dict[str, Any]:
        _, values = denoisers.functional(config.model, latent_channels, organs, seed)
        state = {
            "parameters": values,
            "ema": jax.tree.map(jnp.array, values),
            "optimizer": update.init(values),
            "step": jnp.zeros((), jnp.int32),
            "key": jax.random.key_data(jax.random.key(seed)),
        }
        return jax.device_put(state, parallel.state_shardings(mesh, state))

    def step(state: dict[str, Any], batch: dict[str, Array], encode: jax.tree_util.Partial):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        mirror_key, loss_key = jax.random.split(key)
        image, mask = mirrored(
            mirror_key, 2 * batch["image"] - 1, batch["mask"], tuple(training.mirror_axes)
        )
        given = batch | {"image": image, "mask": mask}

        def loss_of(values):
            return loss_function(
                loss_key, functools.partial(denoise, values), encode, given, settings, training
            )

        loss, gradient = jax.value_and_grad(loss_of)(state["parameters"])
        changes, of_optimizer = update.update(gradient, state["optimizer"], state["parameters"])
        values = optax.apply_updates(state["parameters"], changes)
        new = {
            "parameters": values,
            "ema": moving_average(state["ema"], values, state["step"], training.ema),
            "optimizer": of_optimizer,
            "step": state["step"] + 1,
            "key": state["key"],
        }
        return new, {"loss": loss, "learning_rate": jnp.asarray(rate(state["step"]))}

    abstract = {
        "parameters": parameters,
        "ema": parameters,
        "optimizer": jax.eval_shape(update.init, parameters),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "key": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    shardings = parallel.state_shardings(mesh, abstract)
    crops, rows = parallel.batch_sharding(mesh), parallel.sample_sharding(mesh)
    batch = {"image": crops, "mask": crops, "organ": rows, "radius_mm": rows}
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch, parallel.replicated(mesh)),
        out_shardings=(shardings, parallel.replicated(mesh)),
        compiler_options=convolution.compiler_options(),
    )
    return Trainer(init, jitted, denoise)


def loss_function(
    key: PRNGKeyArray,
    denoise: Callable[[Inputs], Array],
    encode: jax.tree_util.Partial,
    batch: Mapping[str, Array],
    settings: ConfigDict,
    training: ConfigDict,
) -> Float[Array, ""]:
    """Returns the loss of a batch.

    The error counts in the latent voxels that a tumour may change, and by `far_weight` in the
    others, which the condition tells anyway. Each crop counts the same: a small tumour as much as a
    large one.

    Args:
        key: of times, noise and dropped conditions.
        denoise: (Inputs) -> prediction.
        encode: of the autoencoder.
        batch: of `lesion_crops.loader`, but the image in [-1, 1].
        settings: the config's section diffusion.
        training: the config's section training.
    """
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    image, mask = batch["image"], batch["mask"]
    rows = image.shape[0]
    holed = denoisers.with_hole(image, mask, settings.hole_margin)
    latents = encode(jnp.concatenate([image, holed]))
    data, condition = jnp.split(jax.lax.stop_gradient(latents), 2)
    time = diffusion.draw_times(
        time_key, rows, settings.objective, settings.timesteps, settings.time_distribution
    )
    noise = jax.random.normal(noise_key, data.shape)
    noisy, target = diffusion.corrupt(settings.objective, data, noise, time, settings.timesteps)
    inputs = Inputs(
        noisy,
        diffusion.network_time(settings.objective, time),
        condition,
        mask.astype(jnp.float32),
        batch["organ"],
        batch["radius_mm"],
        told(drop_key, rows, training.condition_dropout),
    )
    error = denoise(inputs) - target
    error = jnp.abs(error) if training.loss == "l1" else jnp.square(error)
    near = denoisers.touched(mask, settings.hole_margin)
    weight = jnp.where(near, 1.0, training.far_weight)[..., None]
    size = data.shape[-1] * weight.sum(axis=(1, 2, 3, 4))
    return ((error * weight).sum(axis=(1, 2, 3, 4)) / size).mean()


def told(key: PRNGKeyArray, rows: int, dropout: float) -> Bool[Array, " b"]:
    """Draws which crops of a batch are trained with their organ and radius, all but `dropout`."""
    return jax.random.uniform(key, (rows,)) >= dropout


def mirrored(
    key: PRNGKeyArray,
    image: Float[Array, "b x y z 1"],
    mask: Bool[Array, "b x y z"],
    axes: tuple[int, ...],
) -> tuple[Float[Array, "b x y z 1"], Bool[Array, "b x y z"]]:
    """Mirrors each crop along each of the axes (0 to 2) with a chance of one half."""
    for axis in axes:
        flip = jax.random.bernoulli(jax.random.fold_in(key, axis), shape=image.shape[:1])
        image = jnp.where(flip[:, None, None, None, None], jnp.flip(image, axis + 1), image)
        mask = jnp.where(flip[:, None, None, None], jnp.flip(mask, axis + 1), mask)
    return image, mask


def moving_average(
    average: dict[str, Array], values: dict[str, Array], step: Array, decay: float
) -> dict[str, Array]:
    """Returns the exponential moving average of the weights.

    Over the first steps it forgets faster, by (1 + step) / (10 + step): the first weights are
    random, and would stay in it for long.
    """
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, average, values)


def learning_rate(training: ConfigDict) -> optax.Schedule:
    """Returns the learning rate as a function of the step; "constant", or see `schedules`."""
    if training.schedule == "constant":
        return optax.constant_schedule(training.learning_rate)
    return schedules.learning_rate(training, training.steps)


def optimizer(training: ConfigDict) -> optax.GradientTransformation:
    """Returns Adam, after clipping of the gradient's norm; it steps every `accumulation` batches.

    Args:
        training: learning_rate, schedule, clip (0: none), accumulation.
    """
    # The schedule counts batches, Adam's own counter the steps that it makes.
    every = int(training.accumulation)
    rate = learning_rate(training)
    adam = optax.adam(lambda count: rate(count * every))
    if training.clip:
        adam = optax.chain(optax.clip_by_global_norm(training.clip), adam)
    if every == 1:
        return adam
    multiple = optax.MultiSteps(adam, every)
    return optax.GradientTransformation(multiple.init, multiple.update)


def run(config: ConfigDict, workdir: Path) -> int:
    """Trains a synthesizer of tumours, see configs/diffusion.py.

    Writes into workdir config.json, autoencoder/ (a copy), checkpoints/, metrics.csv,
    trained_on.json, quality.json, quality.png and, last, done.json.

    Returns:
        0, or 1 where scans were set aside (workdir/rejected.csv).

    Raises:
        UserError: the config is wrong, there is nothing to train on, or the loss is no number.
    """
    workdir = location(workdir)
    processes.start(config.processes)
    _check(config)
    clock = Clock()
    autoencoder = _own_autoencoder(config, workdir)
    with clock("prepare"):
        store, rejected = prepared_store(config, workdir)
    _check_grid(autoencoder, store)
    sources = [(store, case) for case in store.cases]
    lesions = lesion_crops.find_lesions(sources)
    organs = _organs(config, store, lesions)
    with_tumor = {lesion.case for lesion in lesions if lesion.organ in organs}
    sources = [(store, case) for store, case in sources if case in with_tumor]
    seen, held_out = split_patients(sources, config.data.held_out, config.seed)
    mesh = parallel.make_mesh(config.mesh)
    fresh = fit(config, seen, held_out, organs, autoencoder, workdir, mesh, clock=clock)
    if rejected and jax.process_index() == 0:
        write_csv_atomic(workdir / "rejected.csv", rejected, ("case", "stage", "reason"))
    if not fresh:
        print(f"{workdir}: already finished")
        return 1 if rejected else 0
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in clock.seconds.items())
    print(f"{workdir}: trained {config.training.steps} steps ({seconds})")
    return 1 if rejected else 0


def fit(
    config: ConfigDict,
    seen: Sequence[tuple[Store, str]],
    held_out: Sequence[tuple[Store, str]],
    organs: Sequence[str],
    autoencoder: TrainedAutoencoder,
    folder: Path,
    mesh: Mesh,
    *,
    clock: Clock,
) -> bool:
    """Trains a denoiser on given scans, measures it, and leaves all that `load` needs but stage 1.

    Args:
        config: with the sections of `SECTIONS`.
        seen: (store, case) of each scan to train on.
        held_out: of each scan to measure it on; none is fine.
        organs: whose tumours.
        autoencoder: stage 1, of which the folder has a copy (`autoencoder/`).
        folder: see `run` for what it gets.
        mesh: of the devices to train on.
        clock: gets the phases "load", "train" and "quality".

    Returns:
        False where the folder was finished before.

    Raises:
        UserError: the folder is of another training, an organ has no tumours, or the loss is no
            longer a number.
    """
    trained_on = leakage.record_of(seen)
    wanted = section(config, organs) | {"images": trained_on["images"]}
    done = folder / "done.json"
    owners = parallel.processes_of(mesh)
    first = jax.process_index() == owners[0]
    finished = done.is_file() and json.loads(done.read_text()) == wanted
    if processes.gather(finished, among=owners)[0]:
        return False
    _keep_config(folder, section(config, organs), first)
    if first:
        record = leakage.union([trained_on, autoencoder.trained_on])
        write_json_atomic(folder / "trained_on.json", record)
    state, denoise = train(config, seen, organs, autoencoder, folder, mesh, clock=clock)
    # Measured by one process, which computes with its own devices alone.
    weights = on_host(state["ema"])
    if first:
        if held_out:
            with clock("quality"):
                _measure(config, weights, denoise, autoencoder, held_out, organs, folder)
        write_json_atomic(done, wanted)
    return True


def _measure(
    config: ConfigDict,
    weights: Mapping[str, Any],
    denoise: Callable[[dict[str, Array], Inputs], Array],
    autoencoder: TrainedAutoencoder,
    held_out: Sequence[tuple[Store, str]],
    organs: Sequence[str],
    folder: Path,
) -> None:
    """Compares generated tumours with real ones of held-out scans, by number of steps."""
    options = convolution.compiler_options()
    denoiser, encode, decode = (
        jax.tree_util.Partial(jax.jit(part.func, compiler_options=options), *part.args)
        for part in (
            jax.tree_util.Partial(denoise, weights),
            autoencoder.encode,
            autoencoder.decode,
        )
    )

    def make(steps: int | None) -> jax.tree_util.Partial:
        return trained_diffusion.make_generate(
            config.diffusion,
            denoiser,
            encode,
            decode,
            autoencoder.latent_channels,
            sampler=_sampler(config.diffusion, steps),
            steps=steps,
        )

    lesions = lesion_crops.find_lesions(held_out)
    diffusion_quality.write(folder, make, lesions, organs, config, autoencoder.window)


def _sampler(settings: ConfigDict, steps: int | None) -> str:
    """Returns the sampler for a number of steps: ancestral sampling has but one."""
    own = settings.sampler == "ancestral" and steps not in (None, settings.timesteps)
    return "ddim" if own else settings.sampler


def train(
    config: ConfigDict,
    sources: Sequence[tuple[Store, str]],
    organs: Sequence[str],
    autoencoder: TrainedAutoencoder,
    folder: Path,
    mesh: Mesh,
    *,
    clock: Clock,
) -> tuple[dict[str, Any], Callable[[dict[str, Array], Inputs], Array]]:
    """Trains a denoiser on the tumours of given scans, or goes on where that was stopped.

    Args:
        config: with the sections of `SECTIONS`.
        sources: (store, case) of each scan.
        organs: whose tumours.
        autoencoder: stage 1.
        folder: gets checkpoints/ and metrics.csv.
        mesh: of the devices to train on.
        clock: gets the phases "load" and "train".

    Returns:
        the trained state ("parameters", "ema", ...) and denoise(parameters, Inputs).

    Raises:
        UserError: an organ has no tumours, or the loss is no longer a number.
    """
    training = config.training
    trainer = make_trainer(config, organs, autoencoder.latent_channels, mesh)
    lesions = lesion_crops.find_lesions(sources)
    encode = parallel.replicate(mesh, autoencoder.encode)
    owners = parallel.processes_of(mesh)

    def batches_from(position: int):
        return lesion_crops.loader(
            lesions,
            organs,
            tuple(training.crop),
            training.batch_size,
            training.jitter,
            config.seed,
            start=position,
            process_index=owners.index(jax.process_index()),
            process_count=len(owners),
            threads=training.loader_threads,
        )

    with tqdm(total=training.steps, unit="step", disable=not sys.stderr.isatty()) as bar:

        def progress(step: int, row: Mapping[str, float]) -> None:
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)

        try:
            state = loop.train(
                folder,
                trainer.init(config.seed),
                lambda state, batch: trainer.step(state, batch, encode),
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
    return state, trainer.denoise


def _check(config: ConfigDict) -> None:
    settings, training = config.diffusion, config.training
    diffusion.check_settings(
        settings.objective, settings.sampler, settings.steps, settings.timesteps
    )
    if settings.time_distribution not in ("uniform", "logit_normal"):
        raise UserError(
            f"diffusion.time_distribution is {settings.time_distribution!r}. Expected uniform or"
            " logit_normal"
        )
    if training.loss not in ("l1", "l2"):
        raise UserError(f"training.loss is {training.loss!r}. Expected l1 or l2")
    if len(training.crop) != 3 or any(size % FACTOR or size < FACTOR for size in training.crop):
        raise UserError(
            f"training.crop is {tuple(training.crop)}. Expected three multiples of {FACTOR}"
        )
    for name in ("condition_dropout", "far_weight", "ema"):
        if not 0 <= training[name] <= 1:
            raise UserError(f"training.{name} is {training[name]}. Expected 0 to 1")
    if any(axis not in (0, 1, 2) for axis in training.mirror_axes):
        raise UserError(
            f"training.mirror_axes is {tuple(training.mirror_axes)}. Expected some of 0, 1, 2"
        )
    if not config.autoencoder:
        raise UserError(
            "autoencoder is empty. Give the workdir of a finished job"
            ' "autoencoder": --config.autoencoder=DIR'
        )
    denoisers.abstract(config.model, 1, 1)


def _own_autoencoder(config: ConfigDict, workdir: Path) -> TrainedAutoencoder:
    """Copies the autoencoder into the workdir, which then needs no other folder."""
    own = workdir / "autoencoder"
    is_there = (own / "config.json").is_file()
    if not is_there and jax.process_index() == 0:
        loaded = trained_autoencoder.load(config.autoencoder)
        # Its own scans, where it made any, stay behind.
        mirror.copy_training(location(config.autoencoder), own, without=("store", "scans"))
        return loaded
    return trained_autoencoder.load(own if is_there else config.autoencoder)


def _check_grid(autoencoder: TrainedAutoencoder, store: Store) -> None:
    """Refuses scans that the autoencoder was not made for."""
    for name in ("spacing", "window"):
        wanted = [float(value) for value in getattr(autoencoder, name)]
        found = [float(value) for value in store.settings[name]]
        if wanted != found:
            raise UserError(
                f"{store.url}: made with {name} {found}, and the autoencoder was trained with"
                f" {wanted}. Train one on this store, or prepare a store for that one"
            )


def _organs(
    config: ConfigDict, store: Store, lesions: Sequence[lesion_crops.Lesion]
) -> tuple[str, ...]:
    """Returns the organs that the config asks for, or all that the store has tumours of."""
    there = lesion_crops.organs_of(lesions)
    unknown = sorted(set(config.data.organs) - set(HOST.values()))
    if unknown:
        raise UserError(
            f"data.organs has {', '.join(unknown)}. Expected some of {', '.join(HOST.values())}"
        )
    missing = [organ for organ in config.data.organs if organ not in there]
    if missing or not there:
        raise UserError(
            f"{store.url}: no tumours of {', '.join(missing) or 'any organ'} in its"
            f" {len(store.cases)} scans. A synthesizer learns from annotated tumours: give a store"
            " that has some, or correct data.organs"
        )
    return tuple(organ for organ in there if not config.data.organs or organ in config.data.organs)


def _keep_config(workdir: Path, wanted: dict[str, Any], first: bool) -> None:
    """Keeps what is trained; the workdir of another training is refused."""
    path = workdir / "config.json"
    if path.is_file():
        difference = first_difference(json.loads(path.read_text()), wanted)
        if difference:
            raise UserError(
                f"{workdir} holds a training with other settings: {difference}. Use its settings,"
                " or another --workdir"
            )
    elif first:
        write_json_atomic(path, wanted)
