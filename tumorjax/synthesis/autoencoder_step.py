"""One training step of the autoencoder: reconstruction, latents, discriminators.

Both sides of the adversarial game take their step on the same reconstruction, so it is made once.
The discriminators' learning rate counts from their own first step.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from tumorjax import backend, parallel
from tumorjax.errors import UserError
from tumorjax.models import convolution
from tumorjax.settings import plain
from tumorjax.synthesis import autoencoder, discriminators, perceptual, vector_quantization
from tumorjax.synthesis.autoencoder import Autoencoder
from tumorjax.training import loop, schedules

SECTIONS = ("seed", "preparation", "model", "training", "evaluation", "mesh")

_OF_DISCRIMINATORS = ("discriminators", "discriminator_optimizer")
_SCORES = ("adversarial", "matching", "discriminator")


class Trainer(NamedTuple):
    """What a training needs, made once for all of one configuration.

    Attributes:
        init: seed -> initial state on the mesh.
        step: (state, batch) -> (state, scalars); takes the state over.
        model: the autoencoder's functions.
    """

    init: Callable[[int], dict[str, Any]]
    step: loop.Step
    model: Autoencoder


def section(config: ConfigDict) -> dict[str, Any]:
    """Returns the part of the job's configuration that the result depends on, as plain JSON."""
    values = plain(config)
    return {name: values[name] for name in SECTIONS}


def make_trainer(config: ConfigDict, mesh: Mesh) -> Trainer:
    """Returns the compiled pieces for a configuration; equal ones share them.

    Raises:
        UserError: a setting is wrong.
    """
    values = section(config)
    values.pop("seed")
    return _make_trainer(json.dumps(values), mesh)


@backend.cached(4)
def _make_trainer(text: str, mesh: Mesh) -> Trainer:
    config = ConfigDict(json.loads(text))
    training = config.training
    check_training(config)
    model = autoencoder.build(config)
    kind, channels = model.settings.kind, model.settings.latent_channels
    update = schedules.optimizer(training, training.steps)
    rate = schedules.learning_rate(training, training.steps)
    features: Any = None
    perceptual_parameters: dict[str, Array] = {}
    if training.perceptual:
        features, perceptual_parameters = perceptual.load(training.perceptual, config.preparation)
    critics = discriminators.create_pair(
        {"slices": training.adversarial_slices, "crops": training.adversarial_crops},
        model.settings.dtype,
    )

    def first(seed: int) -> dict[str, Any]:
        parameters = autoencoder.build(config, seed).parameters
        state = {
            "parameters": parameters,
            "optimizer": update.init(parameters),
            "step": jnp.zeros((), jnp.int32),
            "key": jax.random.key_data(jax.random.key(seed)),
        }
        if kind == "vq":
            state["codebook"] = vector_quantization.empty(training.codes, channels)
        if training.adversarial_from:
            state["discriminators"] = critics.init(seed)
            state["discriminator_optimizer"] = update.init(state["discriminators"])
        return state

    def init(seed: int) -> dict[str, Any]:
        state = first(seed)
        return jax.device_put(state, parallel.state_shardings(mesh, state))

    def step(
        active: bool, state: dict[str, Any], batch: dict[str, Array], frozen: dict[str, Array]
    ):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        # kl's noise is drawn from the key itself, whatever else is trained.
        of_slices = jax.random.fold_in(key, 1)
        image = batch["image"] * 2 - 1

        def loss_of(parameters):
            encoded = model.encode(parameters, image)
            if kind == "kl":
                (z, loss, scalars), new = _gaussian_latents(key, encoded, training), {}
            else:
                z, loss, scalars, book = _coded_latents(
                    key, encoded, state["codebook"], state["step"] == 0, training
                )
                new = {"codebook": book}
            decoded = model.decode(parameters, z)
            error, reconstruction = reconstruction_loss(image, decoded, training)
            scalars["l1"] = error
            loss = loss + reconstruction
            if features is not None:
                scalars["perceptual"] = perceptual.distance(features, frozen, image, decoded)
                loss = loss + training.perceptual_weight * scalars["perceptual"]
            if active:
                terms = critics.of_generator(state["discriminators"], of_slices, image, decoded)
                scalars |= terms
                loss = loss + terms["adversarial"]
                loss = loss + training.feature_matching * terms["matching"]
            return loss, (scalars, decoded, new)

        (loss, (scalars, decoded, new)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state["parameters"]
        )
        changes, optimizer = update.update(gradient, state["optimizer"], state["parameters"])
        new |= {
            "parameters": jax.tree.map(jnp.add, state["parameters"], changes),
            "optimizer": optimizer,
            "step": state["step"] + 1,
            "key": state["key"],
        }
        norm = optax.global_norm(gradient)
        if training.adversarial_from:
            kept = {name: state[name] for name in _OF_DISCRIMINATORS}
            if active:
                fixed = jax.lax.stop_gradient(decoded)
                kept, critic_loss, critic_norm = train_discriminators(kept, of_slices, image, fixed)
                scalars["discriminator"] = critic_loss
                norm = norm + critic_norm
            else:
                # One curve, from the first step on.
                scalars |= dict.fromkeys(_SCORES, jnp.zeros(()))
            new |= kept
        # A gradient that is no number spoils what is kept: the loss says so.
        loss = jnp.where(jnp.isfinite(norm), loss, jnp.nan)
        scalars = {"loss": loss, "learning_rate": jnp.asarray(rate(state["step"])), **scalars}
        return new, scalars

    def train_discriminators(kept, key, image, decoded):
        parameters, optimizer = (kept[name] for name in _OF_DISCRIMINATORS)
        loss, gradient = jax.value_and_grad(critics.loss)(parameters, key, image, decoded)
        changes, optimizer = update.update(gradient, optimizer, parameters)
        parameters = jax.tree.map(jnp.add, parameters, changes)
        new = dict(zip(_OF_DISCRIMINATORS, (parameters, optimizer), strict=True))
        return new, loss, optax.global_norm(gradient)

    shardings = parallel.state_shardings(mesh, jax.eval_shape(lambda: first(0)))
    jitted = jax.jit(
        step,
        static_argnums=0,
        donate_argnums=1,
        in_shardings=(shardings, parallel.batch_sharding(mesh), parallel.replicated(mesh)),
        out_shardings=(shardings, parallel.replicated(mesh)),
        compiler_options=convolution.compiler_options(),
    )

    def next_step(state: dict[str, Any], batch: dict[str, Array]):
        # Two programs, of which the host takes one: XLA computes convolutions within a conditional
        # up to 180 times slower on CPUs.
        active = False
        if training.adversarial_from:
            taken = np.asarray(state["step"].addressable_data(0))
            active = bool(taken >= training.adversarial_from)
        return jitted(active, state, batch, perceptual_parameters)

    return Trainer(init, next_step, model)


def check_training(config: ConfigDict) -> None:
    """Refuses settings of the section training that do not fit.

    Raises:
        UserError: says which.
    """
    training = config.training
    patch = tuple(training.patch_size)
    if len(patch) != 3 or any(size % autoencoder.FACTOR or size < 12 for size in patch):
        raise UserError(
            f"training.patch_size is {patch}. Expected three multiples of {autoencoder.FACTOR}"
            " from 12"
        )
    positive = ("steps", "batch_size", "save_every", "log_every")
    not_negative = (
        *("reconstruction", "gradient", "kl", "commitment", "perceptual_weight"),
        *("adversarial_from", "adversarial_slices", "adversarial_crops", "feature_matching"),
    )
    for name in (*positive, *not_negative):
        if training[name] < (name in positive):
            raise UserError(
                f"training.{name} is {training[name]}. Expected {'1' if name in positive else '0'}"
                " or more"
            )
    vq = autoencoder.settings_of(config).kind == "vq"
    if vq and (training.codes < 2 or not 0 <= training.codebook_decay < 1):
        raise UserError(
            f"training.codes is {training.codes} and codebook_decay {training.codebook_decay}."
            " Expected 2 or more, and 0 to below 1"
        )


def reconstruction_loss(
    truth: Float[Array, "b x y z 1"], other: Float[Array, "b x y z 1"], weights: ConfigDict
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the mean absolute error, and what a training minimises of it.

    Args:
        truth: images.
        other: their reconstructions.
        weights: reconstruction, of that error; gradient, of the error of slopes: the differences of
            neighbours along each axis, which blurred edges and textures get wrong, and of which
            the error itself hardly tells.
    """
    difference = other - truth
    error = jnp.abs(difference).mean()
    loss = weights.reconstruction * error
    if weights.gradient:
        slopes = [jnp.abs(jnp.diff(difference, axis=axis)).mean() for axis in (1, 2, 3)]
        loss = loss + weights.gradient * sum(slopes[1:], start=slopes[0]) / 3
    return error, loss


def _gaussian_latents(
    key: Array, encoded: Float[Array, "b x y z 2*c"], weights: ConfigDict
) -> tuple[Array, Array, dict[str, Array]]:
    """Returns latents drawn from their distributions, the term of the loss, and scalars."""
    mean, log_variance = autoencoder.split_latent(encoded)
    noise = jax.random.normal(key, mean.shape)
    # Kullback-Leibler divergence from the unit Gaussian, mean over latents, in nats.
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
    z = mean + jnp.exp(log_variance / 2) * noise
    return z, weights.kl * divergence, {"kl": divergence}


def _coded_latents(
    key: Array,
    encoded: Float[Array, "b x y z c"],
    codebook: vector_quantization.Codebook,
    is_first: Array,
    weights: ConfigDict,
) -> tuple[Array, Array, dict[str, Array], vector_quantization.Codebook]:
    """Returns the nearest codes, the term of the loss, scalars, and the codebook that follows."""
    of_first, of_restarts = jax.random.split(key)
    fixed = jax.lax.stop_gradient(encoded)
    codebook = jax.lax.cond(
        is_first,
        lambda book: vector_quantization.initialise(of_first, book, fixed),
        lambda book: book,
        codebook,
    )
    indices = vector_quantization.nearest(codebook["embeddings"], fixed)
    codes = codebook["embeddings"][indices]
    commitment = jnp.square(encoded - codes).mean()
    following = vector_quantization.update(
        of_restarts,
        codebook,
        fixed,
        indices,
        decay=weights.codebook_decay,
        least_use=weights.least_use,
    )
    scalars = {
        "commitment": commitment,
        "perplexity": vector_quantization.perplexity(indices, weights.codes),
    }
    # The gradient passes the codes as if they were the latents.
    z = encoded + jax.lax.stop_gradient(codes - encoded)
    return z, weights.commitment * commitment, scalars, following
