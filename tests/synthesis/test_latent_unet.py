"""The small denoiser, and what it is told of a tumour."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import diffusion as diffusion_config
from tumorjax.errors import UserError
from tumorjax.synthesis import denoisers, even_convolution, latent_unet, video_unet
from tumorjax.synthesis.latent_unet import Inputs

SETTINGS = {"name": "latent_unet", "widths": (8, 16), "blocks": 1, "attention_heads": 2}


def _inputs(rng, rows=2, channels=4, side=4):
    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return Inputs(
        draw(rows, side, side, side, channels),
        jnp.asarray([100.0, 900.0][:rows]),
        draw(rows, side, side, side, channels),
        (draw(rows, 4 * side, 4 * side, 4 * side) > 0).astype(jnp.float32),
        jnp.asarray([0, 2][:rows]),
        jnp.asarray([4.0, 20.0][:rows]),
        jnp.asarray([True, True][:rows]),
    )


@pytest.fixture
def network(rng):
    apply, parameters = denoisers.functional(SETTINGS, 4, 3)
    # The head begins with zeros; here every path is to count.
    head = parameters["head.kernel"]
    parameters["head.kernel"] = jnp.asarray(rng.standard_normal(head.shape), jnp.float32)
    return jax.jit(apply), parameters


def test_first_predictions_are_zero(rng):
    apply, parameters = denoisers.functional(SETTINGS, 4, 3)
    assert not jax.jit(apply)(parameters, _inputs(rng)).any()


def test_every_input_counts(network, rng):
    apply, parameters = network
    inputs = _inputs(rng)
    before = apply(parameters, inputs)
    assert before.shape == inputs.noisy.shape
    changes = {
        "noisy": inputs.noisy + 0.1,
        "time": inputs.time + 50,
        "latent": inputs.latent + 0.1,
        "mask": 1 - inputs.mask,
        "organ": 2 - inputs.organ,
        "radius_mm": inputs.radius_mm * 2,
        "known": ~inputs.known,
    }
    for name, value in changes.items():
        after = apply(parameters, inputs._replace(**{name: value}))
        assert np.abs(after - before).max() > 1e-3, name


def test_one_voxel_of_the_mask_counts_at_the_scans_own_resolution(network, rng):
    apply, parameters = network
    inputs = _inputs(rng, rows=1)
    results = []
    for voxel in ((5, 5, 5), (6, 5, 5), (5, 6, 5)):
        mask = jnp.zeros_like(inputs.mask).at[0, *voxel].set(1.0)
        results.append(apply(parameters, inputs._replace(mask=mask)))
    assert np.abs(results[0] - results[1]).max() > 1e-3
    assert np.abs(results[0] - results[2]).max() > 1e-3


def test_what_is_not_told_does_not_count(network, rng):
    apply, parameters = network
    inputs = _inputs(rng)._replace(known=jnp.asarray([False, False]))
    other = inputs._replace(organ=2 - inputs.organ, radius_mm=3 * inputs.radius_mm)
    np.testing.assert_array_equal(apply(parameters, inputs), apply(parameters, other))


def test_fold_lays_a_blocks_voxels_in_its_channels(rng):
    x = rng.standard_normal((2, 8, 4, 12, 3)).astype(np.float32)
    folded = np.asarray(even_convolution.fold(jnp.asarray(x), 4))
    assert folded.shape == (2, 2, 1, 3, 192)
    block = x[1, 4:8, 0:4, 8:12]
    np.testing.assert_array_equal(folded[1, 1, 0, 2], block.reshape(-1))


def test_a_hole_takes_the_tumour_and_its_margin(rng):
    image = jnp.asarray(rng.uniform(-1, 1, (1, 12, 12, 12, 1)), jnp.float32)
    mask = np.zeros((1, 12, 12, 12), bool)
    mask[0, 4:6, 5, 5] = True
    holed = np.asarray(denoisers.with_hole(image, jnp.asarray(mask), 1))[0, ..., 0]
    wanted = np.asarray(image)[0, ..., 0].copy()
    wanted[3:7, 4:7, 4:7] = denoisers.HOLE
    np.testing.assert_array_equal(holed, wanted)


def test_touched_latents_are_those_of_the_hole_and_their_neighbours():
    mask = np.zeros((1, 32, 32, 32), bool)
    mask[0, 17, 17, 20] = True
    found = np.asarray(denoisers.touched(jnp.asarray(mask), 1))[0]
    # The hole is 16..18 (latent 4), and along z 19..21 (latents 4 and 5); then one more each way.
    wanted = np.zeros((8, 8, 8), bool)
    wanted[3:6, 3:6, 3:7] = True
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "unet"}, "latent_unet, video_unet"),
        ({"name": "latent_unet", "preset": "huge"}, "small, large"),
        ({"name": "latent_unet", "heads": 3}, "no setting heads"),
        ({"name": "latent_unet", "widths": (12,)}, "multiples of 8"),
        ({"name": "latent_unet", "widths": (8, 16), "attention_heads": 3}, "divisor"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        denoisers.functional(settings, 4, 3)


def test_crops_that_cannot_be_halved_are_refused(rng):
    apply, parameters = denoisers.functional(SETTINGS, 4, 3)
    with pytest.raises(UserError, match="multiples of 8"):
        apply(parameters, _inputs(rng, side=3))


@pytest.mark.parametrize(("variant", "module"), [("virtual", latent_unet), ("paper", video_unet)])
def test_every_setting_can_be_given_on_the_command_line_and_is_the_presets_without(variant, module):
    model = diffusion_config.get_config(variant).model
    assert set(model) == {"name", "preset", *module.SETTINGS}

    def shapes(settings):
        _, parameters = denoisers.abstract(settings, 4, 3)
        return {name: leaf.shape for name, leaf in parameters.items()}

    given = {key: value for key, value in model.items() if value is not None}
    assert shapes(model) == shapes(given)
    wider = {"widths": (16, 32)} if module is latent_unet else {"width": 16}
    model.update(wider)
    assert shapes(model) == shapes(given | wider) != shapes(given)
