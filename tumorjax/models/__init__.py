"""Segmentation networks, found by the name of their module."""

import importlib
from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tumorjax.errors import UserError
from tumorjax.models.layers import Fixed

NETWORKS = (
    "resenc_unet",
    "plain_unet",
    "stu_net",
    "segresnet",
    "suprem",
    "swin_unetr",
    "unetr",
    "universal",
)


def create(name: str, **settings) -> nnx.Module:
    """Returns the network `name` with initial weights.

    Args:
        name: one of `NETWORKS`.
        settings: those of the network's own `create`, for instance classes, widths, blocks,
            deep_supervision, remat, seed, and dtype ("float32", "bfloat16" or a dtype).

    Returns:
        model(x [b, x, y, z, 1]) -> logits [b, x, y, z, classes], float32, or with deep
        supervision a list of them, finest first.

    Raises:
        UserError: the network or one of its settings is unknown or does not fit.
    """
    if name not in NETWORKS:
        raise UserError(f"model.name is {name!r}. Expected one of {', '.join(NETWORKS)}")
    if isinstance(settings.get("dtype"), str):
        settings["dtype"] = jnp.dtype(settings["dtype"])
    for setting in ("classes", "in_channels"):
        count = settings.get(setting, 1)
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise UserError(f"model.{setting} is {count!r}. Expected a whole number from 1")
    if "classes" not in settings:
        raise UserError(f"model {name} needs classes: the number of its output channels")
    known = setting_names(name)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise UserError(
            f"model {name} has no setting {', '.join(unknown)}. Expected some of {', '.join(known)}"
        )
    return importlib.import_module(f"tumorjax.models.{name}").create(**settings)


def setting_names(name: str) -> tuple[str, ...]:
    """Returns the names of the settings that the network `name` takes.

    Raises:
        UserError: there is no such network.
    """
    if name not in NETWORKS:
        raise UserError(f"model.name is {name!r}. Expected one of {', '.join(NETWORKS)}")
    return importlib.import_module(f"tumorjax.models.{name}").SETTINGS


def functional(
    model: nnx.Module,
) -> tuple[Callable[[dict[str, Array], Array], Any], dict[str, Array]]:
    """Splits a network into a pure function and its parameters.

    Returns:
        apply: apply(parameters, x) -> what model(x) returns.
        parameters: name -> array, for instance "encoder.0.blocks.0.conv1.conv.kernel". The names
            are those that checkpoints, sharding rules and weight import go by.
    """
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    paths = {".".join(str(part) for part in path): path for path, _ in flat}
    kinds = {name: type(variable) for name, (_, variable) in zip(paths, flat, strict=True)}
    parameters = {name: variable[...] for name, (_, variable) in zip(paths, flat, strict=True)}

    def apply(parameters: dict[str, Array], x: Array) -> Any:
        values = [(path, kinds[name](parameters[name])) for name, path in paths.items()]
        return nnx.merge(graph, nnx.from_flat_state(values))(x)

    return apply, parameters


def fixed_parameters(model: nnx.Module) -> frozenset[str]:
    """Returns the names of the parameters that training has to leave as they are.

    Their gradient is zero, but an optimizer's weight decay would shrink them.
    """
    flat = nnx.to_flat_state(nnx.state(model, Fixed))
    return frozenset(".".join(str(part) for part in path) for path, _ in flat)
