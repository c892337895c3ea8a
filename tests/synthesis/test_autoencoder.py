"""The autoencoder's layers and its decoding in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import autoencoder as autoencoder_config
from tumorjax.errors import UserError
from tumorjax.synthesis import autoencoder, even_convolution

_DIMENSIONS = ("NXYZC", "XYZIO", "NXYZC")


def test_halving_and_its_gradients_are_those_of_a_strided_convolution(rng):
    x = rng.standard_normal((2, 8, 6, 10, 3), np.float32)
    kernel = rng.standard_normal((4, 4, 4, 3, 5), np.float32)
    weights = rng.standard_normal((2, 4, 3, 5, 5), np.float32)

    def ours(x, kernel):
        return even_convolution.halving(even_convolution.pad(x, "zeros"), kernel)

    def reference(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2, 2), [(1, 1)] * 3, dimension_numbers=_DIMENSIONS
        )

    _compare(ours, reference, x, kernel, weights)


def test_doubling_and_its_gradients_are_those_of_a_transposed_convolution(rng):
    x = rng.standard_normal((2, 4, 3, 5, 3), np.float32)
    kernel = rng.standard_normal((4, 4, 4, 3, 5), np.float32)
    weights = rng.standard_normal((2, 8, 6, 10, 5), np.float32)

    def ours(x, kernel):
        return even_convolution.doubling(even_convolution.pad(x, "zeros"), kernel)

    def reference(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel[::-1, ::-1, ::-1],
            (1, 1, 1),
            [(2, 2)] * 3,
            lhs_dilation=(2, 2, 2),
            dimension_numbers=_DIMENSIONS,
        )

    _compare(ours, reference, x, kernel, weights)


def _compare(ours, reference, x, kernel, weights):
    def both(function):
        value = function(x, kernel)

        def loss(x, kernel):
            return (function(x, kernel) * weights).sum()

        return value, *jax.grad(loss, (0, 1))(x, kernel)

    for a, b in zip(jax.jit(lambda: both(ours))(), jax.jit(lambda: both(reference))(), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("widths", "blocks"), [((8, 8), (2,)), ((8, 8), (1,)), ((4, 8, 8), (1, 1)), ((4, 8, 8), (2, 1))]
)
def test_a_part_with_its_margin_decodes_as_in_the_whole(rng, widths, blocks):
    model = autoencoder.create(widths=widths, latent_channels=3, decoder_blocks=blocks)
    margin = autoencoder.decoder_margin(model.settings)
    decode = jax.jit(model.decode)
    size = 2 * margin + 3
    z = rng.standard_normal((1, size + 4, size, size, 3), np.float32)
    whole = decode(model.parameters, z)

    def part_of(margin):
        part = decode(model.parameters, z[:, 2 : 2 * margin + 3])
        return part[:, 4 * margin : 4 * (margin + 1)]

    inside = whole[:, 4 * (2 + margin) : 4 * (3 + margin)]
    np.testing.assert_allclose(part_of(margin), inside, atol=1e-4)
    # And no margin less would do.
    shorter = whole[:, 4 * (1 + margin) : 4 * (2 + margin)]
    assert np.abs(np.asarray(part_of(margin - 1)) - shorter).max() > 1e-3


@pytest.mark.parametrize(("widths", "blocks"), [((8, 16), (1,)), ((4, 8, 16), (1, 1))])
def test_sizes(rng, widths, blocks):
    model = autoencoder.create(widths=widths, latent_channels=3, decoder_blocks=blocks)
    x = jnp.asarray(rng.standard_normal((2, 16, 12, 20, 1), np.float32))
    encoded = jax.jit(model.encode)(model.parameters, x)
    assert encoded.shape == (2, 4, 3, 5, 6)
    mean, _ = autoencoder.split_latent(encoded)
    assert jax.jit(model.decode)(model.parameters, mean).shape == x.shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "gan"}, "kl or vq"),
        ({"preset": "large"}, "small or difftumor"),
        ({"width": 3}, "no setting width"),
        ({"widths": (8,)}, "3 whole numbers"),
        ({"widths": (8, 16, 16)}, "decoder_blocks is .* Expected 2 whole numbers"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"norm": "group", "widths": (8, 16)}, "multiples of 32"),
    ],
)
def test_wrong_settings_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        autoencoder.create(**settings)


@pytest.mark.parametrize("variant", autoencoder_config.VARIANTS)
def test_every_setting_can_be_given_on_the_command_line_and_is_the_presets_without(variant):
    model = autoencoder_config.get_config(variant).model
    assert set(model) == {"preset", *autoencoder.Settings._fields}
    preset = autoencoder.check_settings({"preset": model.preset, "dtype": model.dtype})
    assert autoencoder.check_settings(model) == preset
    model.latent_channels = 16
    assert autoencoder.check_settings(model) == preset._replace(latent_channels=16)
