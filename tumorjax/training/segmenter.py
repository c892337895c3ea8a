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
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict
from tqdm import tqdm

from tumorjax import models, parallel, processes
from tumorjax.anatomy import mirror_table
from tumorjax.clock import Clock
from tumorjax.data import augmentation, crops, seen
from tumorjax.errors import UserError
from tumorjax.files import write_json_atomic
from tumorjax.models import convolution
from tumorjax.settings import plain
from tumorjax.training import checkpoints, finetuning, loop, losses, schedules
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
        step: (state, batch) -> (state, scalars); jitted, takes the state over.
        apply: (parameters, x) -> logits of the finest level.
    """

    init: Callable[[int], dict[str, Any]]
    step: loop.Step
    apply: Callable[[dict[str, Array], Array], Array]


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


def make_segmenter(config: ConfigDict, mesh: Mesh, transform: Transform | None = None) -> Segmenter:
    """Returns the compiled pieces for a configuration; equal ones share them.

    Args:
        config: with the sections of `SECTIONS`.
        mesh: of the devices to train on.
        transform: of the batch in each step; batches then have "implant", the rows it may change.
            Only the same one shares what is compiled.
    """
    values = section(config)
    values.pop("seed")
    return _make_segmenter(json.dumps(values), mesh, transform)


@functools.lru_cache(maxsize=16)
def _make_segmenter(text: str, mesh: Mesh, transform: Transform | None) -> Segmenter:
    config = ConfigDict(json.loads(text))
    training = config.training
    network = checkpoints.build_model(config, deep_supervision=training.deep_supervision)
    apply_levels, parameters = models.functional(network)
    fixed = models.fixed_parameters(network)
    apply, _ = models.functional(checkpoints.build_model(config, deep_supervision=False))
    factors = finetuning.learning_rate_factors(training, parameters)
    frozen = {name for name, factor in (factors or {}).items() if not factor}
    update = schedules.optimizer(training, training.steps, factors)
    rate = schedules.learning_rate(training, training.steps)
    transforms = augmentation.check_settings(config.augmentation)
    # Refused before anything trains where the task knows only one side of a pair.
    mirrored = mirror_table(config.task.classes) if 0 in transforms["mirror_axes"] else None
    classes = list(config.task.classes)
    patch = tuple(training.patch_size)

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
        image, label = augmentation.augment(key, image, label, transforms, mirrored, patch)
        label = label.astype(jnp.int32)

        def loss_of(values):
            if frozen:
                # No backward pass where it ends in frozen parameters alone.
                values = {
                    name: jax.lax.stop_gradient(value) if name in frozen else value
                    for name, value in values.items()
                }
            logits = apply_levels(values, image)
            loss = losses.segmentation_loss(
                logits,
                label,
                batch_dice=training.batch_dice,
                absent_dice=training.absent_dice,
                cross_entropy_weight=training.cross_entropy_weight,
            )
            return loss, logits[0] if isinstance(logits, list) else logits

        (loss, logits), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["parameters"])
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

    def abstract() -> dict[str, Any]:
        return {
            "parameters": parameters,
            "optimizer": jax.eval_shape(update.init, parameters),
            "step": jax.ShapeDtypeStruct((), jnp.int32),
            "key": jax.ShapeDtypeStruct((2,), jnp.uint32),
        }

    shardings = parallel.state_shardings(mesh, abstract())
    batch = dict.fromkeys(("image", "label"), parallel.batch_sharding(mesh))
    whole = parallel.replicated(mesh)
    compiled = functools.partial(
        jax.jit,
        step,
        donate_argnums=0,
        out_shardings=(shardings, whole),
        compiler_options=convolution.compiler_options(),
    )
    if transform is None:
        return Segmenter(init, compiled(in_shardings=(shardings, batch)), apply)
    batch["implant"] = parallel.sample_sharding(mesh)
    with_weights = compiled(in_shardings=(shardings, batch, whole))
    return Segmenter(
        init, lambda state, batch: with_weights(state, batch, transform.weights), apply
    )


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
        sources: (store, case) of each training scan.
        folder: gets config.json, trained_on.json, checkpoints/ and metrics.csv.
        mesh: of the devices to train on.
        clock: gets the phases "load" and "train".
        progress: called with each row of the training curve.
        transform: changes crops of `hosts` on the device, see `make_segmenter`.
        hosts: positions in `sources` of the scans whose crops it may change.

    Returns:
        apply(x [b, x, y, z, 1]) -> logits, as `checkpoints.load_model` gives it.
    """
    training = config.training
    if training.batch_size % jax.process_count():
        raise UserError(
            f"training.batch_size {training.batch_size} does not divide over"
            f" {jax.process_count()} processes. Choose a multiple"
        )
    if jax.process_index() == 0:
        write_json_atomic(folder / "config.json", section(config))
        write_json_atomic(folder / "trained_on.json", seen.record_of(sources))
    segmenter = make_segmenter(config, mesh, transform)
    state = segmenter.init(config.seed)
    if training.get("start_from") and not checkpoints.has_any(folder):
        start = finetuning.starting_parameters(training.start_from, config, state["parameters"])
        state |= jax.device_put(
            {"parameters": start}, parallel.state_shardings(mesh, {"parameters": start})
        )

    def batches_from(position: int):
        return crops.loader(
            sources,
            config.task.classes,
            augmentation.source_patch(tuple(training.patch_size), config.augmentation),
            training.batch_size,
            training.foreground,
            config.seed,
            start=position,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=training.loader_threads,
            final_patch_size=tuple(training.patch_size),
            tumor_share=training.tumor_share,
            hosts=None if transform is None else hosts,
        )

    state = loop.train(
        folder,
        state,
        segmenter.step,
        batches_from,
        mesh=mesh,
        steps=training.steps,
        save_every=training.save_every,
        log_every=training.log_every,
        clock=clock,
        progress=progress,
    )
    return jax.tree_util.Partial(segmenter.apply, state["parameters"])


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
