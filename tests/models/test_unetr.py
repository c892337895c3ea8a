"""UNETR against MONAI's: size, weights, logits, gradients; and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax import models
from tumorjax.errors import UserError

TINY = {"feature_size": 4, "hidden_size": 12, "mlp_width": 20, "heads": 3}


def _reference(in_channels, classes, patch_size):
    nets = pytest.importorskip("monai.networks.nets")
    sizes = {"feature_size": 4, "hidden_size": 12, "mlp_dim": 20, "num_heads": 3}
    return nets.UNETR(in_channels, classes, patch_size, **sizes)


def test_default_has_monais_parameters(parameters_of, torch_parameters_of):
    nets = pytest.importorskip("monai.networks.nets")
    count = parameters_of("unetr", classes=14)
    assert count == torch_parameters_of(lambda: nets.UNETR(1, 14, 96, feature_size=32))
    # The paper's table: 101.8 million.
    assert round(count / 1e6, 1) == 101.8


@pytest.mark.parametrize(
    ("patch_size", "in_channels", "classes"), [((32, 16, 16), 1, 3), ((16, 16, 48), 2, 2)]
)
def test_logits_and_weights_equal_monais(rng, equals_reference, patch_size, in_channels, classes):
    model = models.create(
        "unetr", classes=classes, in_channels=in_channels, patch_size=patch_size, **TINY
    )
    x = rng.standard_normal((2, *patch_size, in_channels)).astype(np.float32)
    reference = _reference(in_channels, classes, patch_size)
    equals_reference(model, reference, x, gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch_size", "in_channels", "classes"), [((32, 16, 16), 1, 3), ((16, 16, 48), 2, 2)]
)
def test_gradients_equal_monais(
    rng, equals_reference, without_kinks, patch_size, in_channels, classes
):
    model = models.create(
        "unetr", classes=classes, in_channels=in_channels, patch_size=patch_size, **TINY
    )
    x = rng.standard_normal((1, *patch_size, in_channels)).astype(np.float32)
    equals_reference(model, without_kinks(_reference(in_channels, classes, patch_size)), x)


@pytest.mark.slow
def test_full_size_equals_monais(rng, equals_reference):
    nets = pytest.importorskip("monai.networks.nets")
    model = models.create("unetr", classes=14)
    x = rng.standard_normal((1, 96, 96, 96, 1)).astype(np.float32)
    equals_reference(model, nets.UNETR(1, 14, 96, feature_size=32), x, gradients=False)


@pytest.mark.slow
def test_remat_changes_nothing_and_bfloat16_little(rng, run_once, without_kinks):
    x = jnp.asarray(rng.standard_normal((1, 32, 16, 16, 1)), jnp.float32)
    results = []
    for settings in ({}, {"remat": True}, {"dtype": "bfloat16"}):
        model = models.create("unetr", classes=2, patch_size=(32, 16, 16), **TINY, **settings)
        apply, parameters = models.functional(model)
        if "dtype" in settings:
            results.append(run_once(apply, parameters, x))
            continue

        def loss(parameters, apply=apply):
            logits = apply(parameters, x)
            return jnp.square(logits).sum(), logits

        results.append(run_once(jax.value_and_grad(loss, has_aux=True), parameters))
    ((_, logits), plain), ((_, again), remat), half = results
    np.testing.assert_allclose(again, logits, atol=1e-5)
    largest = max(float(jnp.abs(value).max()) for value in plain.values())
    for name, value in plain.items():
        scale = max(float(jnp.abs(value).max()), 1e-2 * largest)
        np.testing.assert_allclose(remat[name], value, atol=1e-3 * scale, err_msg=name)
    # bfloat16 has eight bits: it is used, and no more is lost than its roundings.
    assert half.dtype == jnp.float32
    error = float(jnp.abs(half - logits).max() / jnp.abs(logits).max())
    assert 1e-4 < error < 0.1


def test_wrong_settings_and_patches_are_told():
    for settings, message in (
        ({"patch_size": (96, 90, 96)}, "multiples of 16"),
        ({"patch_size": 16, "hidden_size": 16, "heads": 3}, "do not divide over 3"),
        ({"patch_size": 16, "deep_supervision": True}, "no deep supervision"),
    ):
        with pytest.raises(UserError, match=message):
            models.create("unetr", classes=2, **settings)
    model = models.create("unetr", classes=2, patch_size=(16, 32, 16), **TINY)
    assert (model.patch_size, model.divisor) == ((16, 32, 16), (16, 16, 16))
    with pytest.raises(ValueError, match=r"made for \(16, 32, 16\)"):
        model(jnp.ones((1, 32, 32, 16, 1)))
    with pytest.raises(ValueError, match="each axis must divide by"):
        model(jnp.ones((1, 16, 30, 16, 1)))
