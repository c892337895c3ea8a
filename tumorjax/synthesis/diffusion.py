"""Diffusion in few words: schedules, what a denoiser is trained on, and how it is sampled from.

Everything here is pure and knows nothing of CT. Data and noise are arrays [b, ...] of about unit
variance. A denoiser is any function (noisy [b, ...], time [b]) -> prediction [b, ...]. There are
three objectives:

- "flow": rectified flow (Liu et al., ICLR 2023). The time runs from 0 (noise) to 1 (data), between
  them noisy = time * data + (1 - time) * noise, and the prediction is data - noise.
- "noise": DDPM (Ho et al., NeurIPS 2020). The time counts the schedule's steps from 0 (nearly
  data) to timesteps - 1 (nearly noise), and the prediction is the noise.
- "v": the same with Salimans and Ho's target (ICLR 2022), sqrt(a) * noise - sqrt(1 - a) * data.

a is the share of the data's variance in what is noisy, by Nichol and Dhariwal's cosine schedule
(ICML 2021), with steps clipped as in DiffTumor.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from tumorjax.errors import UserError

Denoise = Callable[[Array, Array], Array]

OBJECTIVES = ("flow", "noise", "v")
SAMPLERS: dict[str, tuple[str, ...]] = {
    "euler": ("flow",),
    "heun": ("flow",),
    "ancestral": ("noise", "v"),
    "ddim": ("noise", "v"),
}
# What a denoiser's embedding of time is made for: steps of a schedule, hundreds of them.
_FLOW_TIME = 1000.0
# Up to so many steps a sampler is written out: XLA:CPU runs the inside of a loop on one core.
# Outside of jit it always is: only the denoiser is compiled then, once for all numbers of steps.
_WRITTEN_OUT = 8


def cosine_schedule(timesteps: int) -> Float[np.ndarray, " t"]:
    """Returns the share of the data's variance after each step, of the cosine schedule.

    Args:
        timesteps: number of steps.

    Returns:
        float32, falling from nearly 1 to nearly 0. A step takes away at most 0.9999 of what the
        step before has left.
    """
    offset = 0.008
    position = np.linspace(0, 1, timesteps + 1)
    level = np.cos((position + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.cumprod(1 - np.clip(1 - level[1:] / level[:-1], 0, 0.9999)).astype(np.float32)


def check_settings(objective: str, sampler: str, steps: int, timesteps: int) -> None:
    """Checks that a sampler suits an objective.

    Args:
        objective: one of `OBJECTIVES`.
        sampler: one of `SAMPLERS`.
        steps: of the sampler.
        timesteps: of the schedule.

    Raises:
        UserError: it does not, or a name is unknown, or a number is out of range.
    """
    if objective not in OBJECTIVES:
        raise UserError(f"objective {objective!r} is unknown. Expected {', '.join(OBJECTIVES)}")
    suited = [name for name, objectives in SAMPLERS.items() if objective in objectives]
    if sampler not in suited:
        raise UserError(
            f"sampler {sampler!r} does not suit the objective {objective!r}."
            f" Expected {' or '.join(suited)}"
        )
    if steps < 1 or timesteps < 1:
        raise UserError(
            f"sampling in {steps} steps, schedule of {timesteps}. Expected at least 1 of each"
        )
    if sampler == "ancestral" and steps != timesteps:
        raise UserError(
            f"sampler 'ancestral' goes through all {timesteps} steps of the schedule, and steps is"
            f" {steps}. Set steps to {timesteps}, or take the sampler 'ddim'"
        )
    if sampler == "ddim" and steps > timesteps:
        raise UserError(
            f"sampler 'ddim' has {steps} steps of a schedule of {timesteps}. Take no more than that"
        )


def draw_times(
    key: PRNGKeyArray, count: int, objective: str, timesteps: int, distribution: str = "uniform"
) -> Float[Array, " b"]:
    """Draws the times that a batch is trained on.

    Args:
        key: jax.random key.
        count: size of the batch.
        objective: one of `OBJECTIVES`.
        timesteps: of the schedule.
        distribution: of flow's times: "uniform", or "logit_normal", which dwells on the middle
            (Esser et al., ICML 2024).

    Returns:
        0 to 1 for "flow", else steps of the schedule, all equally likely.
    """
    if objective != "flow":
        return jax.random.randint(key, (count,), 0, timesteps).astype(jnp.float32)
    if distribution == "logit_normal":
        return jax.nn.sigmoid(jax.random.normal(key, (count,)))
    # Spread evenly over the batch: the loss of a step then depends less on its times.
    first, order = jax.random.split(key)
    even = (jnp.arange(count) + jax.random.uniform(first, (count,))) / count
    return jax.random.permutation(order, even)


def corrupt(
    objective: str,
    data: Float[Array, "b *n"],
    noise: Float[Array, "b *n"],
    time: Float[Array, " b"],
    timesteps: int,
) -> tuple[Float[Array, "b *n"], Float[Array, "b *n"]]:
    """Mixes data with noise.

    Returns:
        What a denoiser is given at these times, and what it should predict.
    """
    if objective == "flow":
        share = _along(time, data)
        return share * data + (1 - share) * noise, data - noise
    signal, scale = _levels(time, data, timesteps)
    noisy = signal * data + scale * noise
    return noisy, noise if objective == "noise" else signal * noise - scale * data


def network_time(objective: str, time: Float[Array, " b"]) -> Float[Array, " b"]:
    """Returns times as networks embed them: flow's in thousandths."""
    return time * _FLOW_TIME if objective == "flow" else time


def data_and_noise(
    objective: str,
    prediction: Float[Array, "b *n"],
    noisy: Float[Array, "b *n"],
    time: Float[Array, " b"],
    timesteps: int,
) -> tuple[Float[Array, "b *n"], Float[Array, "b *n"]]:
    """Returns the data and the noise that a prediction stands for."""
    if objective == "flow":
        share = _along(time, noisy)
        return noisy + (1 - share) * prediction, noisy - share * prediction
    signal, scale = _levels(time, noisy, timesteps)
    if objective == "noise":
        return (noisy - scale * prediction) / signal, prediction
    return signal * noisy - scale * prediction, scale * noisy + signal * prediction


def guided(
    with_condition: Float[Array, "b *n"], without: Float[Array, "b *n"], guidance: float
) -> Float[Array, "b *n"]:
    """Classifier-free guidance (Ho and Salimans, 2022): 1 is the condition's own prediction."""
    return without + guidance * (with_condition - without)


def sample(
    key: PRNGKeyArray,
    denoise: Denoise,
    shape: tuple[int, ...],
    *,
    objective: str = "flow",
    sampler: str = "euler",
    steps: int = 4,
    timesteps: int = 1000,
    clip: float | None = None,
) -> Float[Array, "b *n"]:
    """Draws data. Each row has random numbers of its own, whatever the others are.

    Args:
        key: jax.random key.
        denoise: (noisy [b, ...], time [b]) -> prediction.
        shape: of the data, [b, ...].
        objective: what `denoise` predicts.
        sampler: "euler" or "heun" (second order, two evaluations a step) for flow; "ancestral"
            (DDPM's, through all steps of the schedule) or "ddim" (Song et al., ICLR 2021, eta 0).
        steps: of the sampler.
        timesteps: of the schedule.
        clip: data is taken to lie within -clip and clip at each step of the schedule (DiffTumor
            does so with 1); None for no limits.

    Raises:
        UserError: the settings do not suit each other.
    """
    check_settings(objective, sampler, steps, timesteps)
    # Rows' keys by their number: a batch that is cut short keeps its first rows.
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(shape[0]))
    noise = _noise(keys, 0, shape)
    if objective == "flow":
        times = jnp.linspace(0.0, 1.0, steps + 1)

        def flow_step(index, x):
            return _flow_step(denoise, x, times[index], times[index + 1], sampler == "heun")

        return _repeat(flow_step, noise, steps)

    visited = np.round(np.linspace(timesteps - 1, 0, steps)).astype(np.int32)
    if sampler == "ddim" and steps == 1:
        visited = np.asarray([timesteps - 1], np.int32)
    levels = cosine_schedule(timesteps)[visited]
    now = jnp.asarray(levels)
    later = jnp.asarray(np.append(levels[1:], np.float32(1.0)))
    timestep = jnp.asarray(visited)

    def schedule_step(index, x):
        time = jnp.full(shape[0], timestep[index], jnp.float32)
        data, of_noise = data_and_noise(objective, denoise(x, time), x, time, timesteps)
        if clip is not None:
            data = jnp.clip(data, -clip, clip)
            of_noise = (x - jnp.sqrt(now[index]) * data) / jnp.sqrt(1 - now[index])
        if sampler == "ddim":
            return jnp.sqrt(later[index]) * data + jnp.sqrt(1 - later[index]) * of_noise
        return _posterior(x, data, now[index], later[index], _noise(keys, index + 1, shape))

    return _repeat(schedule_step, noise, steps)


def _flow_step(denoise: Denoise, x: Array, time: Array, end: Array, second_order: bool) -> Array:
    rows = x.shape[0]
    velocity = denoise(x, jnp.full(rows, time))
    moved = x + (end - time) * velocity
    if not second_order:
        return moved
    return x + (end - time) / 2 * (velocity + denoise(moved, jnp.full(rows, end)))


def _posterior(x: Array, data: Array, now: Array, later: Array, noise: Array) -> Array:
    """DDPM's step (Ho et al., equations 6 and 7): no noise where `later` is all data."""
    kept = now / later
    mean = jnp.sqrt(later) * (1 - kept) / (1 - now) * data
    mean = mean + jnp.sqrt(kept) * (1 - later) / (1 - now) * x
    return mean + jnp.sqrt((1 - kept) * (1 - later) / (1 - now)) * noise


def _repeat(step: Callable[[Array, Array], Array], x: Array, count: int) -> Array:
    if count > _WRITTEN_OUT and isinstance(x, jax.core.Tracer):
        return jax.lax.fori_loop(0, count, step, x)
    for index in range(count):
        x = step(jnp.asarray(index), x)
    return x


def _noise(keys: Array, number: Array | int, shape: tuple[int, ...]) -> Array:
    def of_row(key):
        return jax.random.normal(jax.random.fold_in(key, number), shape[1:])

    return jax.vmap(of_row)(keys)


def _levels(time: Array, like: Array, timesteps: int) -> tuple[Array, Array]:
    """Returns the factors of data and noise at steps of the schedule."""
    level = jnp.asarray(cosine_schedule(timesteps))[time.astype(jnp.int32)]
    return _along(jnp.sqrt(level), like), _along(jnp.sqrt(1 - level), like)


def _along(values: Float[Array, " b"], like: Array) -> Array:
    return values.reshape(-1, *(1 for _ in like.shape[1:]))
