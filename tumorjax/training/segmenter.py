"""Trains a segmenter: the step, and the job that trains one on a whole store."""

import functools
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict
from tqdm import tqdm

from tumorjax import backend, models, parallel, processes
from tumorjax.anatomy import mirror_table
from tumorjax.clock import Clock
from tumorjax.data import augmentation, crops, seen
from tumorjax.errors import UserError
from tumorjax.files import write_json_atomic
from tumorjax.models import convolution
from tumorjax.settings import plain
from tumorjax.training import checkpoints, finetuning, loop, losses, monitor, schedules
from tumorjax.training.side_by_side import stacked_step
from tumorjax.volumes import Store, open_store

SECTIONS = ("seed", "task", "preparation", "model", "training", "augmentation", "inference", "mesh")


# Folded into a step's key for the transform; augmentation splits the key as it is.
_TRANSFORM = 0x5EED


@dataclass(frozen=True, eq=False)
class Transform:
    """Changes the crops of marked rows on the device, before augmentation.

    Called as (key, image [b, x, y, z, 1] in [0, 1], label uint8 [b, x, y, z] class indices, where
    bool [b]) -> (image, label). Equal to itself only.

    Attributes:
        apply: (weights, and the arguments above); pure, works under jit.
        weights: arrays that it needs, on the devices of the training.
    """

    apply: Callable[..., tuple[Array, Array]]
    weights: Any = ()

    def __call__(self, key: Array, image: Array, label: Array, where: Array):
        return self.apply(self.weights, key, image, label, where)


class Segmenter(NamedTuple):
    """What training a network needs, made once for all trainings of one configuration.

    Attributes:
        init: seed -> initial state on the mesh.
        put: this process's share of a batch -> the batch on the mesh, as `step` takes it.
        step: (state, batch) -> (state, scalars); jitted, takes the state over. Of stacked cells
            (state, batch, active [cells]) -> (state, scalars [cells]): a cell that is not active,
            or whose loss is no number, keeps its state.
        apply: (parameters, x) -> logits of the finest level.
        abstract: one cell's state as shapes.
    """

    init: Callable[[int], dict[str, Any]]
    put: loop.Put
    step: Callable[..., tuple[dict[str, Any], dict[str, Array]]]
    apply: Callable[[dict[str, Array], Array], Array]
    abstract: dict[str, Any]


def section(config: ConfigDict) -> dict[str, Any]:
    """Returns the part of a job's configuration that a training depends on, as plain JSON."""
    values = plain(config)
    return {name: values[name] for name in SECTIONS}


def check_network(config: ConfigDict) -> None:
    """Refuses a network that cannot be built, trained or given the patch. Nothing is allocated.

    Args:
        config: with the sections task, model and training.

    Raises:
        UserError: a setting is unknown or does not fit the others, says which.
    """
    training = config.training
    functions = []

    def parameters() -> dict[str, Array]:
        network = checkpoints.build_model(config, deep_supervision=training.deep_supervision)
        apply, values = models.functional(network)
        functions.append(apply)
        return values

    shapes = jax.eval_shape(parameters)
    finetuning.learning_rate_factors(training, shapes)
    patch = jax.ShapeDtypeStruct((1, *training.patch_size, 1), jnp.float32)
    try:
        jax.eval_shape(functions[0], shapes, patch)
    except ValueError as error:
        raise UserError(
            f"training.patch_size {tuple(training.patch_size)}: {config.model.name} refuses {error}"
        ) from error


def make_segmenter(
    config: ConfigDict, mesh: Mesh, transform: Transform | None = None, *, stacked: bool = False
) -> Segmenter:
    """Returns the compiled pieces for a configuration; equal ones share them.

    Args:
        config: with the sections of `SECTIONS`.
        mesh: of the devices to train on.
        transform: of the batch in each step; batches then have "implant", the rows it may change.
            Only the same one shares what is compiled.
        stacked: the step is that of one cell at each position along the mesh's "cell", which share
            nothing: their states and batches have the cells in front. `init` still makes the state
            of one cell, on any mesh.
    """
    values = section(config)
    values.pop("seed")
    return _make_segmenter(json.dumps(values), mesh, transform, stacked)


@backend.cached(16)
def _make_segmenter(text: str, mesh: Mesh, transform: Transform | None, stacked: bool) -> Segmenter:
    config = ConfigDict(json.loads(text))
    training = config.training
    functions = []

    def build() -> dict[str, Array]:
        network = checkpoints.build_model(config, deep_supervision=training.deep_supervision)
        apply_levels, parameters = models.functional(network)
        apply, _ = models.functional(checkpoints.build_model(config, deep_supervision=False))
        functions.append(
            (
                apply_levels,
                apply,
                models.fixed_parameters(network),
                getattr(network, "divisor", None),
            )
        )
        return parameters

    # Weights are drawn where a training begins.
    parameters = jax.eval_shape(build)
    ((apply_levels, apply, fixed, divisor),) = functions
    factors = finetuning.learning_rate_factors(training, parameters)
    frozen = {name for name, factor in (factors or {}).items() if not factor}
    update = schedules.optimizer(training, training.steps, factors)
    rate = schedules.learning_rate(training, training.steps)
    transforms = augmentation.check_settings(config.augmentation)
    # Refused before anything trains where the task knows only one side of a pair.
    mirrored = mirror_table(config.task.classes) if 0 in transforms["mirror_axes"] else None
    classes = list(config.task.classes)
    patch = tuple(training.patch_size)
    # Only attention over the whole patch has no such number.
    if divisor:
        parallel.check_space(mesh, patch, divisor, config.model.name)

    def init(seed: int) -> dict[str, Any]:
        model = checkpoints.build_model(
            config, deep_supervision=training.deep_supervision, seed=seed
        )
        values = models.functional(model)[1]
        state = {
            "parameters": values,
            "optimizer": update.init(values),
            "step": jnp.zeros((), jnp.int32),
            "key": jax.random.key_data(jax.random.key(seed)),
        }
        return jax.device_put(state, parallel.state_shardings(mesh, state))

    def step(state: dict[str, Any], batch: dict[str, Array], weights: Any = ()):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        image, label = batch["image"], batch["label"]
        if transform is not None:
            here = jax.random.fold_in(key, _TRANSFORM)
            image, label = transform.apply(weights, here, image, label, batch["implant"])
        with jax.named_scope("augment"):
            image, label = augmentation.augment(key, image, label, transforms, mirrored, patch)
        image, label = (parallel.split_batch(mesh, array) for array in (image, label))
        label = label.astype(jnp.int32)

        def loss_of(values):
            if frozen:
                # No backward pass where it ends in frozen parameters alone.
                values = {
                    name: jax.lax.stop_gradient(value) if name in frozen else value
                    for name, value in values.items()
                }
            logits = apply_levels(parallel.gathered(mesh, values), image)
            loss = losses.segmentation_loss(
                logits,
                label,
                batch_dice=training.batch_dice,
                absent_dice=training.absent_dice,
                cross_entropy_weight=training.cross_entropy_weight,
            )
            return loss, logits[0] if isinstance(logits, list) else logits

        # Around the backward pass too, where blocks may be computed again.
        with convolution.split_along_x(mesh):
            (loss, logits), gradient = jax.value_and_grad(loss_of, has_aux=True)(
                state["parameters"]
            )
        changes, optimizer = update.update(gradient, state["optimizer"], state["parameters"])
        values = {
            name: value if name in fixed else value + changes[name]
            for name, value in state["parameters"].items()
        }
        scalars = {"loss": loss, "learning_rate": jnp.asarray(rate(state["step"]))}
        dice = losses.dice_per_class(logits, label)
        scalars |= {f"dice_{name}": dice[index] for index, name in enumerate(classes)}
        new = {"parameters": values, "optimizer": optimizer, "step": state["step"] + 1}
        return new | {"key": state["key"]}, scalars

    abstract = {
        "parameters": parameters,
        "optimizer": jax.eval_shape(update.init, parameters),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "key": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }

    # A rotated patch takes voxels from all along x, and so does what looks for room for a tumour:
    # then each device of "space" is given the whole crop, of one channel, and makes its own part.
    turned = transform is not None or augmentation.source_patch(patch, transforms) != patch
    volumes = parallel.sample_sharding if turned else parallel.batch_sharding
    batch = dict.fromkeys(("image", "label"), volumes(mesh, stacked=stacked))
    put = functools.partial(parallel.put_batch, mesh, stacked=stacked, whole=turned)
    whole = parallel.replicated(mesh)
    if transform is not None:
        batch["implant"] = parallel.sample_sharding(mesh, stacked=stacked)
    if stacked:
        return Segmenter(
            init,
            put,
            stacked_step(step, mesh, abstract, batch, transform and transform.weights),
            apply,
            abstract,
        )
    shardings = parallel.state_shardings(mesh, abstract)
    compiled = functools.partial(
        jax.jit,
        step,
        donate_argnums=0,
        out_shardings=(shardings, whole),
        compiler_options=convolution.compiler_options(),
    )
    if transform is None:
        return Segmenter(init, put, compiled(in_shardings=(shardings, batch)), apply, abstract)
    with_weights = compiled(in_shardings=(shardings, batch, whole))
    return Segmenter(
        init,
        put,
        lambda state, batch: with_weights(state, batch, transform.weights),
        apply,
        abstract,
    )


@dataclass(frozen=True)
class Training:
    """What one segmenter is trained on, and where.

    Attributes:
        seed: decides weights, crops and augmentation.
        sources: (store, case) of each training scan.
        folder: gets config.json, trained_on.json, checkpoints/ and metrics.csv.
        hosts: positions in `sources` of the scans whose crops a transform may change.
        progress: called with each row of the training curve.
    """

    seed: int
    sources: Sequence[tuple[Store, str]]
    folder: Path
    hosts: Collection[int] = ()
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, row: None


def train_segmenter(
    config: ConfigDict,
    sources: Sequence[tuple[Store, str]],
    folder: Path,
    mesh: Mesh,
    *,
    clock: Clock,
    progress: Callable[[int, Mapping[str, float]], None] = lambda step, row: None,
    transform: Transform | None = None,
    hosts: Collection[int] = (),
) -> jax.tree_util.Partial:
    """Trains a network on the given scans, or goes on where that was stopped.

    Args:
        config: with the sections of `SECTIONS`; config.seed decides weights, crops and
            augmentation.
        sources, folder, hosts, progress: see `Training`.
        mesh: of the devices to train on.
        clock: gets the phases "load" and "train".
        transform: changes crops of `hosts` on the device, see `make_segmenter`.

    Returns:
        apply(x [b, x, y, z, 1]) -> logits, as `checkpoints.load_model` gives it.
    """
    segmenter = make_segmenter(config, mesh, transform)
    training = Training(config.seed, sources, folder, hosts, progress)
    run = _run(config, training, mesh, segmenter, transform is not None)
    plan = _plan(config, clock)
    state = loop.train(
        folder,
        run.state,
        segmenter.step,
        run.batches_from,
        mesh=mesh,
        put=segmenter.put,
        steps=plan.steps,
        save_every=plan.save_every,
        log_every=plan.log_every,
        clock=clock,
        progress=progress,
        monitor=run.monitor,
    )
    return jax.tree_util.Partial(segmenter.apply, state["parameters"])


def train_side_by_side(
    config: ConfigDict,
    trainings: Mapping[int, Training],
    mesh: Mesh,
    *,
    clock: Clock,
    transform: Transform | None = None,
) -> tuple[dict[int, jax.tree_util.Partial], dict[int, Exception]]:
    """Trains networks of one configuration, one at each position along the mesh's "cell".

    Args:
        config: of all of them, but for the seed.
        trainings: position along "cell" -> training, of those positions that this process has
            devices at. A position without a training stays idle.
        mesh: of the devices of all processes, which call this together.
        clock: gets the phases "load" and "train".
        transform: on the whole mesh, for those with `hosts`.

    Returns:
        trained: position -> apply, with weights on the cell's own part of the mesh.
        failed: position -> `loop.Diverged`.
    """
    places = parallel.split_cells(mesh)
    own = parallel.own_cells(mesh)
    single = {position: make_segmenter(config, places[position]) for position in own}
    online = transform is not None
    runs = {
        position: _run(config, training, places[position], single[position], online)
        for position, training in trainings.items()
    }
    rows = len(parallel.batch_rows(places[own[0]], config.training.batch_size))
    size = augmentation.source_patch(tuple(config.training.patch_size), config.augmentation)
    batch: dict[str, np.ndarray] = {
        "image": np.zeros((rows, *size, 1), np.float32),
        "label": np.zeros((rows, *size), np.uint8),
    }
    if online:
        batch["implant"] = np.zeros(rows, bool)
    stacked = make_segmenter(config, mesh, transform, stacked=True)
    states, failed = loop.train_side_by_side(
        runs,
        stacked.step,
        (lambda position: single[position].init(0), batch),
        mesh=mesh,
        put=stacked.put,
        plan=_plan(config, clock),
    )
    trained = {
        position: jax.tree_util.Partial(single[position].apply, state["parameters"])
        for position, state in states.items()
        if position not in failed
    }
    return trained, failed


def _plan(config: ConfigDict, clock: Clock) -> loop.Plan:
    training = config.training
    return loop.Plan(training.steps, training.save_every, training.log_every, clock)


def _run(
    config: ConfigDict, training: Training, mesh: Mesh, segmenter: Segmenter, online: bool
) -> loop.Run:
    """Returns a training as the loop takes it, with its first state on the mesh."""
    settings, folder = config.training, training.folder
    if jax.process_index() == parallel.first_process(mesh):
        write_json_atomic(folder / "config.json", section(config) | {"seed": training.seed})
        write_json_atomic(folder / "trained_on.json", seen.record_of(training.sources))
    state = segmenter.init(training.seed)
    if settings.get("start_from") and not checkpoints.has_any(folder):
        start = finetuning.starting_parameters(settings.start_from, config, state["parameters"])
        state |= jax.device_put(
            {"parameters": start}, parallel.state_shardings(mesh, {"parameters": start})
        )

    def batches_from(position: int):
        return crops.loader(
            training.sources,
            config.task.classes,
            augmentation.source_patch(tuple(settings.patch_size), config.augmentation),
            settings.batch_size,
            settings.foreground,
            training.seed,
            start=position,
            rows=parallel.batch_rows(mesh, settings.batch_size),
            threads=settings.loader_threads,
            final_patch_size=tuple(settings.patch_size),
            tumor_share=settings.tumor_share,
            hosts=training.hosts if online else None,
        )

    watched = monitor.of_training(plain(config), folder, SECTIONS)
    return loop.Run(folder, state, batches_from, training.progress, watched)


def check_grid_of(store: Store, preparation: ConfigDict) -> None:
    """Checks that a store was made with the spacing and window that a training assumes.

    A network remembers them from its configuration: prediction would resample to another grid.

    Raises:
        UserError: they differ.
    """
    for name in ("spacing", "window"):
        wanted = [float(value) for value in preparation[name]]
        found = [float(value) for value in store.settings[name]]
        if wanted != found:
            raise UserError(
                f"{store.url}: made with {name} {found}, and preparation.{name} is {wanted}."
                f" Set --config.preparation.{name} to the store's, or prepare it anew"
            )


def run(config: ConfigDict, workdir: Path) -> int:
    """The job "segmentation": trains one segmenter on the cases of a store."""
    done = workdir / "done.json"
    processes.start(config.processes)
    if not config.data.store:
        raise UserError("data.store is empty. Give the store that the preparation job wrote")
    store = open_store(config.data.store)
    check_grid_of(store, config.preparation)
    processes.agree_on_store(store)
    cases = list(config.data.cases) or store.cases
    missing = sorted(set(cases) - set(store.cases))
    if missing or not cases:
        raise UserError(
            f"{config.data.store}: {len(store.cases)} cases, without {', '.join(missing[:5])}."
            " Prepare them, or correct data.cases"
        )
    if done.is_file() and json.loads(done.read_text()) == section(config) | {"cases": cases}:
        print(f"{workdir}: already finished")
        return 0
    check_network(config)
    monitor.check_settings(config.get("monitor", {}))
    clock = Clock()
    mesh = parallel.make_mesh(config.mesh)
    with tqdm(total=config.training.steps, unit="step", disable=not sys.stderr.isatty()) as bar:

        def progress(step: int, row: Mapping[str, float]) -> None:
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)

        sources = [(store, case) for case in cases]
        try:
            train_segmenter(config, sources, workdir, mesh, clock=clock, progress=progress)
        except loop.Diverged as error:
            raise UserError(str(error)) from error
    if jax.process_index() == 0:
        write_json_atomic(done, section(config) | {"cases": cases})
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in clock.seconds.items())
    print(f"{workdir}: trained {config.training.steps} steps ({seconds})")
    return 0
