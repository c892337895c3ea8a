"""The loss by its formulas, in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax.training import losses


@pytest.fixture
def batch(rng):
    logits = rng.standard_normal((2, 4, 4, 4, 3)).astype(np.float32)
    label = rng.integers(0, 3, (2, 4, 4, 4))
    return logits, label


def _softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("whole", [False, True])
def test_soft_dice(batch, whole):
    logits, label = batch
    p, t = _softmax(logits)[..., 1:], np.eye(3)[label][..., 1:]
    axes = (0, 1, 2, 3) if whole else (1, 2, 3)
    dice = (2 * (p * t).sum(axes) + 1e-5) / (p.sum(axes) + t.sum(axes) + 1e-5)
    found = losses.soft_dice(jnp.asarray(logits), jnp.asarray(label), batch=whole)
    assert float(found) == pytest.approx(1 - dice.mean(), abs=1e-6)


def test_absent_classes_can_be_left_out(batch):
    logits, label = batch
    label[label == 2] = 0
    p, t = _softmax(logits)[..., 1], label == 1
    dice = (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
    arguments = jnp.asarray(logits), jnp.asarray(label)
    found = losses.soft_dice(*arguments, batch=True, absent=False)
    assert float(found) == pytest.approx(1 - dice, abs=1e-6)
    assert float(losses.soft_dice(*arguments, batch=True)) > float(found)
    nothing = jnp.zeros_like(arguments[1])
    assert float(losses.soft_dice(arguments[0], nothing, absent=False)) == 0


def test_cross_entropy(batch):
    logits, label = batch
    expected = -np.log(np.take_along_axis(_softmax(logits), label[..., None], -1)).mean()
    found = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(label))
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_levels_halve_sum_to_one_and_the_lowest_counts_nothing():
    weights = losses.level_weights(4)
    assert weights == pytest.approx((4 / 7, 2 / 7, 1 / 7, 0))
    assert losses.level_weights(1) == (1.0,)


def test_deep_supervision_weighs_the_levels(batch, rng):
    logits, label = batch
    half = rng.standard_normal((2, 2, 2, 2, 3)).astype(np.float32)
    low = rng.standard_normal((2, 1, 1, 1, 3)).astype(np.float32)
    levels = [jnp.asarray(level) for level in (logits, half, low)]
    found = losses.segmentation_loss(levels, jnp.asarray(label), cross_entropy_weight=0.5)
    expected = 0.0
    for level, weight, truth in (
        (logits, 2 / 3, label),
        (half, 1 / 3, label[:, 1::2, 1::2, 1::2]),
    ):
        a, b = jnp.asarray(level), jnp.asarray(truth)
        expected += weight * float(losses.soft_dice(a, b) + 0.5 * losses.cross_entropy(a, b))
    assert float(found) == pytest.approx(expected, abs=1e-5)
