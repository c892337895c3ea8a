"""Samplers on distributions whose best denoiser is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax.errors import UserError
from tumorjax.synthesis import diffusion

# A mixture of two Gaussians in the plane, of unequal weights.
WEIGHTS = np.asarray([0.7, 0.3])
MEANS = np.asarray([[1.0, -0.5], [-1.2, 0.9]])
DEVIATION = 0.35
ROWS = 6000


def _share(objective, time, timesteps):
    """Factors of data and noise."""
    if objective == "flow":
        return time[:, None], 1 - time[:, None]
    level = jnp.asarray(diffusion.cosine_schedule(timesteps))[time.astype(int)][:, None]
    return jnp.sqrt(level), jnp.sqrt(1 - level)


def _best_guess(noisy, signal, scale):
    """The means of data and noise, given what is noisy: Bayes' rule for the mixture."""
    variance = signal**2 * DEVIATION**2 + scale**2
    away = noisy[:, None] - signal[..., None] * MEANS
    logits = jnp.log(WEIGHTS) - (away**2).sum(-1) / 2 / variance
    share = jax.nn.softmax(logits, axis=-1)
    data = MEANS + (signal * DEVIATION**2 / variance)[..., None] * away
    noise = (scale / variance)[..., None] * away
    return (share[..., None] * data).sum(1), (share[..., None] * noise).sum(1)


def _denoiser(objective, timesteps):
    def denoise(noisy, time):
        signal, scale = _share(objective, time, timesteps)
        data, noise = _best_guess(noisy, signal, scale)
        if objective == "flow":
            return data - noise
        return noise if objective == "noise" else signal * noise - scale * data

    return denoise


@pytest.mark.parametrize(
    ("objective", "sampler", "steps", "timesteps"),
    [
        ("flow", "euler", 64, 1000),
        ("flow", "heun", 32, 1000),
        ("noise", "ancestral", 200, 200),
        ("v", "ancestral", 200, 200),
        ("noise", "ddim", 50, 200),
        ("v", "ddim", 50, 200),
    ],
)
def test_samples_have_the_moments_of_the_data(objective, sampler, steps, timesteps):
    draw = jax.jit(
        lambda key: diffusion.sample(
            key,
            _denoiser(objective, timesteps),
            (ROWS, 2),
            objective=objective,
            sampler=sampler,
            steps=steps,
            timesteps=timesteps,
        )
    )
    x = np.asarray(draw(jax.random.key(3)), np.float64)
    mean = WEIGHTS @ MEANS
    away = MEANS - mean
    covariance = (WEIGHTS[:, None, None] * away[:, :, None] * away[:, None]).sum(0)
    covariance += DEVIATION**2 * np.eye(2)
    np.testing.assert_allclose(x.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.08)
    # Both components, each as often as it should be.
    nearest = np.argmin(((x[:, None] - MEANS) ** 2).sum(-1), axis=1)
    assert (nearest == 0).mean() == pytest.approx(WEIGHTS[0], abs=0.03)
    within = x[nearest == 0] - MEANS[0]
    assert within.std() == pytest.approx(DEVIATION, rel=0.1)


@pytest.mark.parametrize("objective", ["noise", "v"])
def test_ddim_with_all_steps_is_its_closed_form(objective):
    """Of data N(0, s^2) each step multiplies by a number, so all of them do."""
    timesteps, deviation = 40, 0.6

    def denoise(noisy, time):
        signal, scale = _share(objective, time, timesteps)
        data = signal * deviation**2 / (signal**2 * deviation**2 + scale**2) * noisy
        noise = (noisy - signal * data) / scale
        return noise if objective == "noise" else signal * noise - scale * data

    level = diffusion.cosine_schedule(timesteps).astype(np.float64)
    factor = 1.0
    for now, later in zip(level[::-1], np.append(level[:-1][::-1], 1.0), strict=True):
        variance = now * deviation**2 + 1 - now
        factor *= (
            np.sqrt(later * now) * deviation**2 / variance
            + np.sqrt((1 - later) * (1 - now)) / variance
        )
    settings = {"objective": objective, "sampler": "ddim", "timesteps": timesteps}
    key = jax.random.key(5)
    x = diffusion.sample(key, denoise, (64, 3), steps=timesteps, **settings)
    start = diffusion.sample(
        key, lambda x, time: jnp.zeros_like(x), (64, 3), objective="flow", sampler="euler", steps=1
    )
    np.testing.assert_allclose(x, factor * start, rtol=1e-4)
    assert np.asarray(x).std() == pytest.approx(deviation, rel=0.15)


def test_flow_with_many_steps_recovers_the_target(rng):
    target = rng.standard_normal((5, 3, 2)).astype(np.float32)

    def denoise(noisy, time):
        return (target - noisy) / jnp.maximum(1 - time, 1e-3)[:, None, None]

    x = diffusion.sample(jax.random.key(0), denoise, target.shape, steps=100)
    np.testing.assert_allclose(x, target, atol=1e-4)


def test_heun_errs_less_than_euler_with_as_many_evaluations():
    denoise = _denoiser("flow", 1)
    run = jax.jit(
        lambda sampler, steps: diffusion.sample(
            jax.random.key(1), denoise, (500, 2), sampler=sampler, steps=steps
        ),
        static_argnums=(0, 1),
    )
    fine = run("euler", 1000)
    errors = {
        name: float(jnp.abs(run(name, steps) - fine).mean())
        for name, steps in (("euler", 32), ("heun", 16))
    }
    assert errors["heun"] < errors["euler"] / 2


def test_the_cosine_schedule_falls_as_published():
    level = diffusion.cosine_schedule(1000)
    assert level[0] == pytest.approx(1, abs=1e-3)
    assert (np.diff(level) < 0).all()
    # Nichol and Dhariwal's f(t) / f(0), in the middle.
    ratio = np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    assert level[499] == pytest.approx(ratio**2, rel=1e-4)
    # DiffTumor's four steps: the last one is clipped.
    four = diffusion.cosine_schedule(4)
    assert four[3] == pytest.approx(four[2] * 1e-4, rel=1e-3)


@pytest.mark.parametrize("objective", diffusion.OBJECTIVES)
def test_a_right_prediction_gives_data_and_noise_back(objective, rng):
    data, noise = rng.standard_normal((2, 6, 4)).astype(np.float32)
    time = diffusion.draw_times(jax.random.key(2), 6, objective, 50)
    noisy, target = diffusion.corrupt(objective, data, noise, time, 50)
    back = diffusion.data_and_noise(objective, target, noisy, time, 50)
    # Beside much noise little is left of the data in float32.
    keep = np.asarray(time) < 45 if objective != "flow" else slice(None)
    np.testing.assert_allclose(back[0][keep], data[keep], atol=1e-3)
    np.testing.assert_allclose(back[1][keep], noise[keep], atol=1e-3)


def test_rows_do_not_depend_on_each_other():
    denoise = _denoiser("noise", 8)
    settings = {"objective": "noise", "sampler": "ancestral", "steps": 8, "timesteps": 8}
    many = diffusion.sample(jax.random.key(4), denoise, (6, 2), **settings)
    few = diffusion.sample(jax.random.key(4), denoise, (2, 2), **settings)
    np.testing.assert_allclose(many[:2], few, atol=1e-5)
    assert len(np.unique(np.asarray(many), axis=0)) == 6


def test_clipping_keeps_the_data_in_its_range():
    x = diffusion.sample(
        jax.random.key(4),
        lambda noisy, time: -3 * noisy,
        (50, 2),
        objective="noise",
        sampler="ddim",
        steps=4,
        timesteps=4,
        clip=1.0,
    )
    assert np.abs(x).max() <= 1 + 1e-6


def test_guidance_of_one_is_the_conditions_own_prediction(rng):
    told, untold = rng.standard_normal((2, 3, 4))
    np.testing.assert_allclose(diffusion.guided(told, untold, 1.0), told)
    np.testing.assert_allclose(diffusion.guided(told, untold, 3.0) - told, 2 * (told - untold))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("flow", "ddim", 4, 10), "does not suit"),
        (("noise", "euler", 4, 10), "ancestral or ddim"),
        (("noise", "ancestral", 4, 10), "all 10 steps"),
        (("v", "ddim", 11, 10), "schedule of 10"),
        (("flow", "euler", 0, 10), "at least 1"),
        (("score", "euler", 4, 10), "unknown"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        diffusion.check_settings(*arguments)
