"""Swin UNETR against MONAI's: size, weights, logits, gradients; windows; and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.models import swin_unetr

# One block a stage, and two in the first, so that one has shifted windows.
TINY = {"feature_size": 12, "depths": (2, 1, 1, 1), "window_size": 5}
# MONAI's order until its version 1.5.
OLD_MERGING = (
    *([0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]),
    *([1, 0, 1], [0, 1, 0], [0, 0, 1], [1, 1, 1]),
)


@pytest.mark.parametrize(("version", "millions"), [(1, 62.2), (2, 72.8)])
def test_48_features_have_monais_parameters(
    parameters_of, torch_parameters_of, swin_reference, version, millions
):
    count = parameters_of("swin_unetr", classes=14, version=version)
    assert count == torch_parameters_of(
        lambda: swin_reference(1, 14, feature_size=48, use_v2=version == 2)
    )
    # The paper's table has 72.8 million: that is version 2.
    assert round(count / 1e6, 1) == millions


def _both(swin_reference, in_channels, classes, version, merging):
    model = models.create(
        "swin_unetr",
        classes=classes,
        in_channels=in_channels,
        version=version,
        merging=merging,
        **TINY,
    )
    settings = {"downsample": merging} if "_" not in merging else {"order": OLD_MERGING}
    reference = swin_reference(in_channels, classes, use_v2=version == 2, **TINY, **settings)
    return model, reference


@pytest.mark.parametrize(
    ("shape", "in_channels", "classes", "version", "merging"),
    [
        ((64, 32, 32), 1, 3, 1, "merging"),
        # Windows are whole, padded, cut short and shifted along one axis alone.
        ((96, 32, 32), 2, 2, 2, "mergingv2"),
        ((32, 32, 64), 1, 2, 1, "merging_repeated"),
    ],
)
def test_logits_and_weights_equal_monais(
    rng, equals_reference, swin_reference, shape, in_channels, classes, version, merging
):
    x = rng.standard_normal((1, *shape, in_channels)).astype(np.float32)
    both = _both(swin_reference, in_channels, classes, version, merging)
    equals_reference(*both, x, gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "version", "merging"),
    [((64, 64, 32), 1, "merging"), ((64, 32, 64), 2, "mergingv2")],
)
def test_gradients_equal_monais(
    rng, equals_reference, without_kinks, swin_reference, shape, version, merging
):
    # Four voxels at the coarsest level: the instance norm of two is so ill-conditioned that
    # PyTorch's own gradients are 4e-4 off in float32.
    x = rng.standard_normal((1, *shape, version)).astype(np.float32)
    model, reference = _both(swin_reference, version, 4 - version, version, merging)
    equals_reference(model, without_kinks(reference), x)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_full_size_equals_monais(rng, equals_reference, swin_reference, version):
    model = models.create("swin_unetr", classes=2, version=version)
    x = rng.standard_normal((1, 96, 96, 96, 1)).astype(np.float32)
    reference = swin_reference(1, 2, feature_size=48, use_v2=version == 2)
    equals_reference(model, reference, x, gradients=False)


def test_relative_positions_have_a_row_each():
    window = (2, 3, 4)
    index = swin_unetr.relative_position_index(window)
    places = np.stack(np.unravel_index(np.arange(24), window), -1)
    offsets = (places[:, None] - places[None]).reshape(-1, 3)
    rows = {}
    for offset, row in zip(map(tuple, offsets), index.ravel(), strict=True):
        assert rows.setdefault(offset, row) == row
    assert sorted(rows.values()) == list(range(3 * 5 * 7))


def test_regions_are_what_lay_together_before_the_shift():
    shape, window, shift = (8, 5, 6), (4, 5, 3), (2, 0, 1)
    regions = swin_unetr.shifted_regions(shape, window, shift)
    # Where each voxel lay: those of one window see each other where the roll kept their distance.
    origin = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    origin = np.roll(origin, [-s for s in shift], (0, 1, 2))
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)

    def windows(values):
        values = values.reshape(2, 4, 1, 5, 2, 3, 3).transpose(0, 2, 4, 1, 3, 5, 6)
        return values.reshape(4, 60, 3)

    moved = windows(origin - place)
    together = (moved[:, :, None] == moved[:, None]).all(-1)
    np.testing.assert_array_equal(regions[:, :, None] == regions[:, None], together)


@pytest.mark.slow
def test_remat_changes_nothing_and_bfloat16_little(rng, run_once, without_kinks):
    x = jnp.asarray(rng.standard_normal((1, 64, 64, 32, 1)), jnp.float32)
    results = []
    for settings in ({}, {"remat": True}, {"dtype": "bfloat16"}):
        model = models.create("swin_unetr", classes=2, **TINY, **settings)
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
        ({"feature_size": 10}, "do not divide over 3"),
        ({"version": 3}, "Expected 1 or 2"),
        ({"merging": "pooling"}, "mergingv2"),
        ({"depths": (2, 2, 2)}, "four stages"),
        ({"window_size": 1}, "at least 2 voxels"),
        ({"deep_supervision": True}, "no deep supervision"),
    ):
        with pytest.raises(UserError, match=message):
            models.create("swin_unetr", classes=2, **settings)
    model = models.create("swin_unetr", classes=2, **TINY)
    assert model.divisor == (32, 32, 32)
    with pytest.raises(ValueError, match="each axis must divide by"):
        model(jnp.ones((1, 32, 48, 32, 1)))
