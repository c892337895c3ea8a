"""Fine-tuning: weights to start from, parts that stay as they are, learning rates by layer."""

import importlib
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.files import location
from tumorjax.models import nnunet_plans, torch_weights
from tumorjax.training import checkpoints

_LISTED = 5


def learning_rate_factors(
    settings: Mapping[str, Any], names: Iterable[str]
) -> dict[str, float] | None:
    """Returns what each parameter's learning rate is multiplied with; 0 where it is frozen.

    Args:
        settings: a training's. freeze: patterns. layer_learning_rates: pairs (pattern, factor), of
            which the first that matches counts. A pattern is a regular expression that a
            parameter's name begins with: "encoder", r"encoder\\.[01]\\.", ".*bias$".
        names: of the parameters.

    Returns:
        None where nothing is frozen and every factor is 1.

    Raises:
        UserError: a pattern matches nothing or is no regular expression, a factor is no number
            from 0, or nothing is left to train.
    """
    names = list(names)
    frozen = _texts(settings.get("freeze") or ())
    pairs = _pairs(settings.get("layer_learning_rates") or ())
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in reversed(pairs):
        factors |= dict.fromkeys(_matching(pattern, names, "training.layer_learning_rates"), factor)
    for pattern in frozen:
        factors |= dict.fromkeys(_matching(pattern, names, "training.freeze"), 0.0)
    if not any(factors.values()):
        raise UserError(
            "training.freeze and training.layer_learning_rates leave no parameter to train."
            " Leave out some pattern"
        )
    return None if all(factor == 1 for factor in factors.values()) else factors


def starting_parameters(
    source: str, config: Any, initial: Mapping[str, Array]
) -> dict[str, np.ndarray | Array]:
    """Returns the parameters that a training starts from.

    Heads keep the initial weights where the classes are others, which the log says. nnU-Net's
    kernels are turned from its order of axes to x, y, z; whether its scans ran from left to right
    or the other way is not known, and a network that learned from mirrored copies does not care.

    Args:
        source: folder of a cell or of a segmentation job; a model folder of nnU-Net's, of which
            the first fold is taken; or a file of PyTorch weights (see `torch_weights`).
        config: of the training, with model and task.
        initial: its first parameters, from its seed.

    Raises:
        UserError: the source is none of these, or of another network (names are listed).
    """
    path = location(source)
    if path.is_dir() and nnunet_plans.is_model_folder(path):
        return _from_nnunet(path, config, initial)
    if (path / "config.json").is_file():
        return _from_ours(path, config, initial)
    if path.is_file():
        content = torch_weights.read_checkpoint(path)
        if nnunet_plans.is_fold(content) and "plans" in content["init_args"]:
            arguments = content["init_args"]
            dataset = arguments.get("dataset_json") or {}
            return _from_fold(path, content, arguments["plans"], dataset, config, initial)
        return _from_state_dict(path, torch_weights.read_state_dict(path), config, initial)
    raise UserError(
        f"{source}: training.start_from is no folder of a cell or segmentation job (config.json),"
        " no model folder of nnU-Net's (plans.json), and no file of PyTorch weights"
    )


def _from_ours(path: Path, config: Any, initial: Mapping[str, Array]) -> dict[str, Any]:
    apply, trained = checkpoints.load_model(path)
    if trained.model.name != config.model.name:
        raise UserError(
            f"{path}: a {trained.model.name}, and model.name is {config.model.name}. Set"
            " model.* as in its config.json"
        )
    loaded = dict(apply.args[0])
    heads = _heads(config, initial)
    # Deep supervision may have heads that a training without it has not.
    loaded = {n: v for n, v in loaded.items() if n in initial or n not in _heads(config, loaded)}
    if _classes(trained.task.classes) != _classes(config.task.classes):
        _say_remade(path, list(trained.task.classes), list(config.task.classes))
        loaded |= {name: initial[name] for name in heads}
    elif new := sorted(heads - set(loaded)):
        logging.warning("%s: has no %s: made with initial weights", path, ", ".join(new))
        loaded |= {name: initial[name] for name in new}
    differences = [
        f"{name} {_shape(loaded, name)} there, {_shape(initial, name)} in the config"
        for name in sorted(set(loaded) | set(initial))
        if _shape(loaded, name) != _shape(initial, name)
    ]
    if differences:
        raise UserError(
            f"{path}: weights of another network ({len(differences)} parameters differ:"
            f" {', '.join(differences[:_LISTED])}). Set model.* as in its config.json"
        )
    return loaded


def _from_nnunet(folder: Path, config: Any, initial: Mapping[str, Array]) -> dict[str, Any]:
    plans = nnunet_plans.read_json(folder / "plans.json")
    dataset = nnunet_plans.read_json(folder / "dataset.json")
    path = nnunet_plans.find_folds(folder)[0]
    content = nnunet_plans.read_fold(path)
    return _from_fold(path, content, plans, dataset, config, initial)


def _from_fold(
    path: Path,
    content: Mapping[str, Any],
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    config: Any,
    initial: Mapping[str, Array],
) -> dict[str, Any]:
    read = nnunet_plans.read_plans(str(path), plans, dataset, content["init_args"]["configuration"])
    # Array axis k of nnU-Net's is our axis read.axes[k].
    order = (0, 1, *(2 + axis for axis in np.argsort(read.axes)))
    weights = {
        name: value.permute(order) if value.ndim == 5 else value
        for name, value in content["network_weights"].items()
    }
    labels = sorted(read.labels.values.items(), key=lambda item: item[1])
    return _from_state_dict(path, weights, config, initial, [name for name, _ in labels])


def _from_state_dict(
    path: Path,
    weights: Mapping[str, Any],
    config: Any,
    initial: Mapping[str, Array],
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    levels = bool(config.get("training", {}).get("deep_supervision", False))
    model = checkpoints.build_model(config, deep_supervision=levels, seed=config.seed)
    try:
        loaded = models.functional(torch_weights.import_state_dict(model, weights))[1]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    wanted = list(config.task.classes)
    # Of another number of classes, the import has said it.
    renamed = classes is not None and [n.lower() for n in classes] != [n.lower() for n in wanted]
    if classes is not None and renamed and len(classes) == len(wanted):
        _say_remade(path, classes, wanted)
        loaded |= {name: initial[name] for name in _heads(config, initial)}
    return loaded


def _heads(config: Any, parameters: Mapping[str, Array]) -> set[str]:
    module = importlib.import_module(f"tumorjax.models.{config.model.name}")
    return module.torch_heads(parameters) if hasattr(module, "torch_heads") else set()


def _say_remade(path: Path, there: Sequence[str], here: Sequence[str]) -> None:
    logging.warning(
        "%s: trained for %s, and the task is %s: its heads are re-made with initial weights",
        *(path, ", ".join(there), ", ".join(here)),
    )


def _classes(classes: Mapping[str, Sequence[str]]) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, tuple(labels)) for name, labels in classes.items()]


def _shape(parameters: Mapping[str, Any], name: str) -> list[int] | str:
    return list(np.shape(parameters[name])) if name in parameters else "missing"


def _texts(patterns: Any) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UserError(f"training.freeze has {pattern!r}. Expected patterns of names")
    return patterns


def _pairs(pairs: Any) -> list[tuple[str, float]]:
    entries = list(pairs.items()) if isinstance(pairs, Mapping) else list(pairs)
    result = []
    for entry in entries:
        try:
            pattern, factor = entry
            sound = isinstance(pattern, str) and math.isfinite(factor) and factor >= 0
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise UserError(
                f"training.layer_learning_rates has {entry!r}. Expected pairs of a pattern and a"
                " factor from 0, for instance (('encoder', 0.1),)"
            )
        result.append((pattern, float(factor)))
    return result


def _matching(pattern: str, names: Sequence[str], key: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression ({error})") from error
    found = [name for name in names if expression.match(name)]
    if not found:
        parts = sorted({name.split(".")[0] for name in names})
        raise UserError(
            f"{key}: no parameter's name begins with {pattern!r}. Names begin with"
            f" {', '.join(parts)}, for instance {names[len(names) // 2]}"
        )
    return found
