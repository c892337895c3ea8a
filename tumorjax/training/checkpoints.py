"""Checkpoints (Orbax), and trained networks for use.

A training's folder holds config.json (all that is needed to build the network) and
checkpoints/STEP/ (for buckets see mirror.py). Orbax writes aside and renames, so a killed save is
never read. Nothing in a checkpoint is executed when it is read.
"""

import hashlib
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from ml_collections import ConfigDict

from tumorjax import backend, models, processes
from tumorjax.anatomy import class_table
from tumorjax.errors import UserError
from tumorjax.files import location
from tumorjax.key_values import WRITING, is_full, open_values
from tumorjax.training.mirror import Mirror, open_mirror

_log = logging.getLogger(__name__)

# Reads of a checkpoint that wait at once when it is looked through; bounds its memory.
_READ_AT_ONCE = 16

# The newest, and one to fall back on where that turns out to be damaged.
KEEP = 2


class Manager(ocp.CheckpointManager):
    """Orbax's, which asks JAX's preemption service at every save whether a step is the last one.

    The service compares the numbers that it is asked about in all processes; here they are those of
    `preemption.requested`, and a second sequence among them would make it miss.
    """

    owners: tuple[int, ...] | None = None
    mirror: Mirror | None = None

    def close(self) -> None:
        super().close()
        if self.mirror is not None:
            self.mirror.close()

    def reached_preemption(self, step: int) -> bool:
        return False


def open_manager(
    folder: Path,
    keep: int = KEEP,
    write: bool = False,
    processes: Collection[int] | None = None,
) -> Manager:
    """Opens the checkpoints of a training; the newest `keep` stay.

    Args:
        folder: of the training.
        keep: how many; those whose save has ended.
        write: to train. What a killed save left aside is removed first: a save of the same step
            would remove it while it writes there, and can fail over that; so would Orbax's own
            cleanup_tmp_directories, which works in the background.
        processes: whose training it is, each of which calls this; None for all, or to read for
            this one alone. Only the first of them writes what is not an array.
    """
    if processes is None and not write:
        processes = [jax.process_index()]
    owners = tuple(sorted(processes)) if processes is not None else None
    mirror = open_mirror(folder / "checkpoints", keep, write, owners)
    directory = mirror.local if mirror else (folder / "checkpoints").absolute()
    first = owners[0] if owners else 0
    if write and jax.process_index() == first:
        for leftover in directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover)
    multiprocessing = ocp.options.MultiprocessingOptions()
    if owners is not None and jax.process_count() > 1:
        # Orbax does not make the folder for some of the processes.
        directory.mkdir(parents=True, exist_ok=True)
        multiprocessing = ocp.options.MultiprocessingOptions(
            primary_host=first,
            active_processes=set(owners),
            # Several trainings may save at once, each with barriers of its own.
            barrier_sync_key_prefix=hashlib.sha256(str(directory).encode()).hexdigest()[:16],
        )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=multiprocessing.active_processes is None,
        # Processes of a part of the job do not wait for the one of them that makes the folders.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=owners is None),
        multiprocessing_options=multiprocessing,
    )
    # Arrays that a few processes hold are each written by the first that has them, with their
    # description by the first of all: Orbax's own handler takes process 0 for that.
    arrays = ocp.type_handlers.ArrayHandler(primary_host=first, use_replica_parallel=owners is None)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    # Named handlers, so that what is saved can be looked at before anything was restored.
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(
            multiprocessing_options=multiprocessing, type_handler_registry=registry
        ),
        "loader": ocp.JsonCheckpointHandler(multiprocessing_options=multiprocessing),
    }
    manager = Manager(directory, options=options, item_handlers=handlers)
    manager.owners = multiprocessing.active_processes and owners
    manager.mirror = mirror
    return manager


def save(manager: Manager, step: int, state: Any, position: int) -> None:
    """Saves the state with the loader's position (batches taken), in the background.

    Raises:
        UserError: the disk is full, at this save or at the one before.
    """
    if manager.owners is not None and len(manager.owners) == 1:
        state = jax.tree.map(_seen_as_shared, state)
    if manager.mirror is not None:
        manager.mirror.wait()
    with _full_disk_told(manager):
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), loader=ocp.args.JsonSave({"position": position})
            ),
        )
    if manager.mirror is not None:
        manager.mirror.put(step, manager.is_saving_in_progress)


def finish(manager: Manager) -> None:
    """Waits until what was saved is on the disk, or in the bucket.

    Raises:
        UserError: the disk is full.
    """
    with _full_disk_told(manager):
        manager.wait_until_finished()
    if manager.mirror is not None:
        manager.mirror.wait()


def _seen_as_shared(array: jax.Array) -> jax.Array:
    """Returns an array of this process's devices as one that has a copy in another process as well.

    Orbax refuses arrays that only one of several processes has, for fear that all might write their
    own to one place. The first copy, which is the one that is saved, stays this process's.
    """
    sharding = array.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise TypeError(f"array of shape {array.shape} lies on no mesh: {sharding}")
    mine = sharding.mesh.devices.ravel()
    others = [device for device in jax.devices() if device.process_index != jax.process_index()]
    devices = np.asarray([*mine, *others[: mine.size]]).reshape(2, *sharding.mesh.devices.shape)
    mesh = jax.sharding.Mesh(devices, ("process", *sharding.mesh.axis_names))
    return jax.make_array_from_single_device_arrays(
        array.shape,
        jax.sharding.NamedSharding(mesh, sharding.spec),
        [shard.data for shard in array.addressable_shards],
    )


@contextmanager
def _full_disk_told(manager: Manager) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        # A save that failed has left nothing under its step's name.
        whole = [step for step in manager.all_steps() if not damage(manager.directory / str(step))]
        raise UserError(
            f"{manager.directory}: the disk is full, and a checkpoint could not be written."
            f" {f'That of step {max(whole)} is whole' if whole else 'There is none from before'}."
            " Free some space and run the same command again"
        ) from error


def steps(folder: Path) -> list[int]:
    """Returns the steps of a training that have a checkpoint, in order."""
    there = folder / "checkpoints"
    names = [path.name for path in there.iterdir()] if there.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def has_any(folder: Path) -> bool:
    """Whether a training's folder has a checkpoint to go on from."""
    return bool(steps(folder))


def restore_newest(manager: Manager, like: Any) -> tuple[Any, int] | None:
    """Returns the newest whole state, laid out as `like`, and the loader's position; None without.

    A checkpoint of which a part is missing or cannot be read is passed over for the one before,
    with a warning, and renamed (`damaged-STEP`), so that its step can be saved anew. Mesh, devices
    and processes may be others than those that saved it.

    Args:
        manager: opened by the training's owners, all of which call this.
        like: a state of arrays with their shardings.

    Raises:
        UserError: the checkpoint is of another network.
    """
    first = jax.process_index() == (manager.owners[0] if manager.owners else 0)
    for step in sorted(manager.all_steps(), reverse=True):
        path = manager.directory / str(step)
        # One process looks and tells the others, so that all take the same.
        found = processes.gather(damage(path) if first else None, among=manager.owners)
        reason = next((reason for reason in found if reason), None)
        if reason is None:
            break
        if first:
            _log.warning("checkpoint %s is damaged and passed over: %s", path, reason)
            _set_aside(path)
    else:
        return None
    processes.barrier("damaged checkpoints", 300, among=manager.owners)
    manager.reload()
    _check_same(manager, step, like)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    layout = ocp.checkpoint_utils.construct_restore_args(abstract)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(abstract, restore_args=layout),
            loader=ocp.args.JsonRestore(),
        ),
    )
    return restored["state"], restored["loader"]["position"]


def read(manager: Manager, step: int, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns a whole state as it was saved, on this process's first device.

    Args:
        manager: of the training.
        step: which.
        like: has the parameters that it should have; None for any.

    Raises:
        UserError: it is of another network, or damaged.
    """
    try:
        if like is not None:
            _check_same(manager, step, like)
        saved = manager.item_metadata(step)["state"]
        saved = getattr(saved, "tree", saved)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        layout = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=here), saved)
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=layout))
        )
    except UserError:
        raise
    except Exception as error:
        path = manager.directory / str(step)
        reason = damage(path)
        if reason is None:
            raise
        others = ", ".join(str(other) for other in manager.all_steps() if other != step)
        raise UserError(
            f"{path}: damaged, {reason}. Start its training again, which goes on from the one"
            f" before, or use another step ({others or 'there is none'})"
        ) from error
    return restored["state"]


def damage(path: Any) -> str | None:
    """Says what is wrong with the files of a checkpoint, None if nothing is.

    All of them are read, once. Each process that saved has written a part of its own; a part that
    is missing is found by what refers to it.

    Args:
        path: of the step, a Path or Orbax's for a URL.
    """
    for name in ("loader/metadata", "state/_METADATA", "state/manifest.ocdbt"):
        if not (path / name).exists():
            return f"{name} is missing"
    try:
        json.loads((path / "loader" / "metadata").read_text())
        tree = json.loads((path / "state" / "_METADATA").read_text())["tree_metadata"].values()
        base = open_values(str(path / "state")).spec().to_json()
        values = ts.KvStore.open({"driver": "ocdbt", "base": base}, context=WRITING).result()
        keys = [key.decode() for key in values.list().result()]
        for start in range(0, len(keys), _READ_AT_ONCE):
            some = keys[start : start + _READ_AT_ONCE]
            for key, read in [(key, values.read(key)) for key in some]:
                if not _is_there(read):
                    return f"{key} is listed, and its file is missing"
        chunks = Counter(key.rpartition("/")[0] for key in keys if not key.endswith("/.zarray"))
        arrays = [leaf for leaf in tree if leaf["value_metadata"]["value_type"] == "jax.Array"]
        for name in (".".join(part["key"] for part in leaf["key_metadata"]) for leaf in arrays):
            layout = json.loads(values.read(f"{name}/.zarray").result().value or b"null")
            if layout is None:
                return f"array {name} is missing"
            sizes = zip(layout["shape"], layout["chunks"], strict=True)
            expected = math.prod(-(-size // chunk) for size, chunk in sizes)
            if chunks[name] != expected:
                return f"array {name} has {chunks[name]} of {expected} parts"
    except (OSError, ValueError, KeyError) as error:
        return f"not readable ({str(error).splitlines()[0][:300]})"
    return None


def _is_there(read: ts.Future) -> bool:
    """Whether the file is there that holds a value which is being read."""
    try:
        # A file that is gone reads as an empty value, or as an error if its size was known.
        return bool(read.result().value)
    except ValueError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return False


def _set_aside(path: Any) -> None:
    target = path.parent / f"damaged-{path.name}"
    if target.exists():
        target.rmtree()
    path.rename(target)


def load_model(folder: str | Path, step: int | None = None) -> tuple[jax.tree_util.Partial, Any]:
    """Loads a trained network.

    Args:
        folder: of a cell or of a segmentation job: config.json and checkpoints/.
        step: which checkpoint; None for the newest.

    Returns:
        apply: apply(x [b, x, y, z, 1]) -> logits [b, x, y, z, classes + 1]. It is a pytree that
            holds the weights, so a jitted function that takes it is compiled once for all
            networks of one architecture.
        config: of the training, for the task, the patch size and the grid.

    Raises:
        UserError: the folder has no configuration or no checkpoint, or they do not belong
            together.
    """
    folder = location(folder)
    try:
        config = ConfigDict(json.loads((folder / "config.json").read_text()))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no config.json. Give the folder of a cell or of a segmentation job (or,"
            " for predictions, a model folder of nnU-Net's, which has plans.json)"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: not readable ({error})") from error
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: no checkpoints. Was its training finished?")
    apply, parameters = abstract_model(config)
    with open_manager(folder) as manager:
        step = manager.latest_step() if step is None else step
        if step is None or step not in manager.all_steps():
            raise UserError(f"{folder}: no checkpoint {'' if step is None else step}. Train first")
        state = read(manager, step, {"parameters": parameters})
    loaded = {name: jnp.asarray(state["parameters"][name]) for name in parameters}
    return jax.tree_util.Partial(apply, loaded), config


def build_model(config: Any, *, deep_supervision: bool, seed: int = 0) -> Any:
    """Builds the network of a training's configuration."""
    class_table(config.task.classes)
    settings = {
        key: value for key, value in config.model.items() if key != "name" and value is not None
    }
    settings["dtype"] = compute_dtype(settings.get("dtype", "auto"))
    if "class_names" in models.setting_names(config.model.name):
        settings.setdefault("class_names", tuple(config.task.classes))
    if models.has_fixed_patch(config.model.name):
        settings.setdefault("patch_size", tuple(config.training.patch_size))
    return models.create(
        config.model.name,
        classes=len(config.task.classes) + 1,
        deep_supervision=deep_supervision,
        seed=seed,
        **settings,
    )


def abstract_model(config: Any) -> tuple[Callable[..., Any], dict[str, jax.ShapeDtypeStruct]]:
    """Returns a network's function and the shapes of its parameters, see `models.functional`.

    The function gives the finest level's logits, also where the training has several levels.
    First weights are not drawn: that takes seconds, and a checkpoint replaces them.
    """
    # Some networks have more heads when trained with deep supervision.
    levels = bool(config.get("training", {}).get("deep_supervision", False))
    functions = []

    def build() -> dict[str, Any]:
        apply, parameters = models.functional(build_model(config, deep_supervision=levels))
        functions.append(apply)
        return parameters

    parameters = jax.eval_shape(build)
    (apply,) = functions
    return (lambda values, x: apply(values, x)[0]) if levels else apply, parameters


def compute_dtype(name: str) -> str:
    """bfloat16 on accelerators and float32 on CPU, unless the config names one."""
    if name != "auto":
        return name
    return "float32" if backend.platform() == "cpu" else "bfloat16"


def _check_same(manager: ocp.CheckpointManager, step: int, like: Mapping[str, Any]) -> None:
    saved = manager.item_metadata(step)["state"]
    saved = getattr(saved, "tree", saved)["parameters"]
    wanted = like["parameters"]
    differences = [
        f"{name} {'x'.join(map(str, _shape(saved, name))) or 'missing'} in the checkpoint,"
        f" {'x'.join(map(str, _shape(wanted, name))) or 'missing'} in the config"
        for name in sorted(set(saved) | set(wanted))
        if _shape(saved, name) != _shape(wanted, name)
    ]
    if differences:
        raise UserError(
            f"{manager.directory}: checkpoint of another network ({len(differences)} parameters"
            f" differ, first {differences[0]}). Use its own config, or another workdir"
        )


def _shape(tree: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = tree.get(name)
    return () if value is None else tuple(np.shape(value) or value.shape)
