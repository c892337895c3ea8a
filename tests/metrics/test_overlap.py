import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax.metrics.overlap import dice


def test_dice_is_twice_the_intersection_over_the_sum(rng):
    truth, prediction = rng.random((2, 7, 9, 11)) < 0.4
    expected = 2 * (truth & prediction).sum() / (truth.sum() + prediction.sum())
    assert dice(truth, prediction) == expected
    assert dice(jnp.asarray(truth), jnp.asarray(prediction)) == expected
    assert dice(truth.astype(np.uint8) * 3, prediction) == expected


def test_dice_of_shifted_cubes_has_its_closed_form():
    truth, prediction = np.zeros((2, 20, 20, 20), bool)
    truth[2:12, 2:12, 2:12] = prediction[5:15, 2:12, 2:12] = True
    assert dice(truth, prediction) == pytest.approx(0.7)


def test_dice_of_empty_masks(rng):
    empty, some = np.zeros((5, 5, 5), bool), rng.random((5, 5, 5)) < 0.5
    assert np.isnan(dice(empty, empty))
    assert dice(empty, some) == dice(some, empty) == 0
    assert dice(some, some) == 1


def test_masks_of_different_shape_are_refused(rng):
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3, 5\)"):
        dice(rng.random((2, 3, 4)) < 0.5, rng.random((2, 3, 5)) < 0.5)
