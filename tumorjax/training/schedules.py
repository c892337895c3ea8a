"""Optimizers and learning rates, by name."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from tumorjax.errors import UserError


def learning_rate(settings: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
        settings: schedule "poly" (nnU-Net's: (1 - progress)^power, constant within an epoch of
            `epoch_steps`), "warmup_cosine" (`warmup` is a share of the steps) or "drops" (x0.1 at
            each step of `drops`), and learning_rate.
        steps: length of the training.
    """
    peak, name = settings["learning_rate"], settings["schedule"]
    if name == "poly":
        epoch_steps, power = settings["epoch_steps"], settings["power"]
        epochs = max(1, -(-steps // epoch_steps))
        return lambda step: peak * (1 - (step // epoch_steps) / epochs) ** power
    if name == "warmup_cosine":
        warmup = max(1, round(steps * settings["warmup"]))
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    if name == "drops":
        return optax.piecewise_constant_schedule(peak, {int(at): 0.1 for at in settings["drops"]})
    raise UserError(f"training.schedule is {name!r}. Expected poly, warmup_cosine or drops")


def optimizer(
    settings: Mapping[str, Any], steps: int, factors: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer; the gradient's norm is clipped first.

    Args:
        settings: optimizer "sgd" (Nesterov momentum, as nnU-Net uses it), "adamw" or "adam",
            learning_rate, schedule, momentum (of sgd), weight_decay (not of adam), betas (of adam)
            and clip (global norm).
        steps: length of the training.
        factors: of each parameter's learning rate, by name; those of factor 0 stay as they are and
            count for nothing in the gradient's norm. None for 1 everywhere.
    """
    base = _optimizer(settings, steps)
    return base if factors is None else _by_layer(base, factors)


def _optimizer(settings: Mapping[str, Any], steps: int) -> optax.GradientTransformation:
    clip, rate = optax.clip_by_global_norm(settings["clip"]), learning_rate(settings, steps)
    name = settings["optimizer"]
    if name == "sgd":
        decay = optax.add_decayed_weights(settings["weight_decay"])
        return optax.chain(clip, decay, optax.sgd(rate, settings["momentum"], nesterov=True))
    if name == "adamw":
        return optax.chain(clip, optax.adamw(rate, b2=0.99, weight_decay=settings["weight_decay"]))
    if name == "adam":
        b1, b2 = settings["betas"]
        return optax.chain(clip, optax.adam(rate, b1=b1, b2=b2))
    raise UserError(f"training.optimizer is {name!r}. Expected sgd, adamw or adam")


def _by_layer(
    base: optax.GradientTransformation, factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """Returns an optimizer whose changes are scaled; its state is that of the one given."""

    def update(gradients, state, parameters=None):
        used = {k: g if factors[k] else jnp.zeros_like(g) for k, g in gradients.items()}
        changes, state = base.update(used, state, parameters)
        # Of the change, not of the gradient: weight decay is scaled too, and Adam divides any
        # factor of the gradient out again.
        scaled = {
            k: c * factors[k] if factors[k] else jnp.zeros_like(c) for k, c in changes.items()
        }
        return scaled, state

    return optax.GradientTransformation(base.init, update)
