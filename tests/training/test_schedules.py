"""Learning rates and optimizers against their formulas."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tumorjax.errors import UserError
from tumorjax.training import schedules

NNUNET = {
    "optimizer": "sgd",
    "schedule": "poly",
    "learning_rate": 0.01,
    "momentum": 0.99,
    "weight_decay": 3e-5,
    "clip": 12.0,
    "epoch_steps": 250,
    "power": 0.9,
    "warmup": 0.1,
}


def test_poly_is_nnunets():
    rate = schedules.learning_rate(NNUNET, 1000 * 250)
    for step, epoch in ((0, 0), (249, 0), (250, 1), (999 * 250, 999)):
        assert float(rate(step)) == pytest.approx(0.01 * (1 - epoch / 1000) ** 0.9)


def test_warmup_cosine_rises_and_ends_at_zero():
    rate = schedules.learning_rate(NNUNET | {"schedule": "warmup_cosine"}, 100)
    assert float(rate(0)) == 0
    assert float(rate(10)) == pytest.approx(0.01)
    assert float(rate(100)) == pytest.approx(0, abs=1e-9)


def test_sgd_is_pytorchs_with_clipping_before_decay(rng):
    # torch.optim.SGD(nesterov=True): d = g + decay w; b = m b + d; w -= lr (d + m b)
    values = {"w": jnp.asarray(rng.standard_normal(50) * 3, jnp.float32)}
    update = schedules.optimizer(NNUNET, 1000 * 250)
    state = update.init(values)
    w, momentum = np.asarray(values["w"], np.float64), np.zeros(50)
    for _ in range(3):
        gradient = rng.standard_normal(50) * 5
        changes, state = update.update({"w": jnp.asarray(gradient, jnp.float32)}, state, values)
        values = optax.apply_updates(values, changes)
        clipped = gradient * min(1, 12 / np.linalg.norm(gradient))
        direction = clipped + 3e-5 * w
        momentum = 0.99 * momentum + direction
        w = w - 0.01 * (direction + 0.99 * momentum)
    np.testing.assert_allclose(values["w"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["schedule", "optimizer"])
def test_unknown_names_are_told(key):
    with pytest.raises(UserError, match=f"training.{key} is 'magic'"):
        schedules.optimizer(NNUNET | {key: "magic"}, 10)
