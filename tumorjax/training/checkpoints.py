"""Checkpoints (Orbax), and trained networks for use.

A training's folder holds config.json (all that is needed to build the network) and
checkpoints/STEP/. Orbax writes aside and renames, so a killed save is never read. Nothing in a
checkpoint is executed when it is read.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from tumorjax import models
from tumorjax.anatomy import class_table
from tumorjax.errors import UserError


def open_manager(folder: Path, keep: int = 1, write: bool = False) -> ocp.CheckpointManager:
    """Opens the checkpoints of a training; the newest `keep` stay.

    Args:
        folder: of the training.
        keep: how many.
        write: to train. What a killed save left aside is removed first: a save of the same step
            would remove it while it writes there, and can fail over that; so would Orbax's own
            cleanup_tmp_directories, which works in the background.
    """
    if write and jax.process_index() == 0:
        for leftover in (folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    # Named handlers, so that what is saved can be looked at before anything was restored.
    handlers = {"state": ocp.StandardCheckpointHandler(), "loader": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(
        (folder / "checkpoints").absolute(), options=options, item_handlers=handlers
    )


def save(manager: ocp.CheckpointManager, step: int, state: Any, position: int) -> None:
    """Saves the state with the loader's position (batches taken), in the background."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), loader=ocp.args.JsonSave({"position": position})
        ),
    )


def has_any(folder: Path) -> bool:
    """Whether a training's folder has a checkpoint to go on from."""
    if not (folder / "checkpoints").is_dir():
        return False
    with open_manager(folder) as manager:
        return manager.latest_step() is not None


def restore_newest(manager: ocp.CheckpointManager, like: Any) -> tuple[Any, int] | None:
    """Returns the newest state, laid out as `like`, and the loader's position; None without one.

    Raises:
        UserError: the checkpoint is of another network.
    """
    step = manager.latest_step()
    if step is None:
        return None
    _check_same(manager, step, like)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), loader=ocp.args.JsonRestore()
        ),
    )
    return restored["state"], restored["loader"]["position"]


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
    folder = Path(folder)
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
        _check_same(manager, step, {"parameters": parameters})
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    loaded = {name: jnp.asarray(restored["state"]["parameters"][name]) for name in parameters}
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
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


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
