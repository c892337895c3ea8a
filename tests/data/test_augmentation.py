"""How often each augmentation applies, with which parameters, and that all follows from the key."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tumorjax.data import augmentation
from tumorjax.errors import UserError

TRANSFORMS = (
    "rotation", "scaling", "noise", "blur", "brightness", "contrast", "low_resolution",
    "gamma_inverted", "gamma",
)  # fmt: skip
OFF = augmentation.without(augmentation.DEFAULT, *TRANSFORMS, "mirror")
TABLE = np.array([0, 2, 1, 3], np.uint8)
SAMPLES = 4000


def only(name: str, **settings) -> dict:
    return OFF | {name: augmentation.DEFAULT[name] | settings}


def compiled(settings, patch_size=None):
    return jax.jit(
        lambda key, image, label: augmentation.augment(
            key, image, label, settings, TABLE, patch_size
        )
    )


def run(settings, image, label=None, key=0, patch_size=None):
    if label is None:
        label = np.zeros(image.shape[:4], np.uint8)
    function = compiled(settings, patch_size)
    image, label = function(jax.random.key(key), jnp.asarray(image), jnp.asarray(label))
    return np.asarray(image), np.asarray(label)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(7).uniform(0, 1, (SAMPLES, 6, 6, 6, 1)).astype(np.float32)


def changed(before, after) -> np.ndarray:
    return np.abs(after - before).reshape(len(before), -1).max(1) > 1e-5


@pytest.mark.parametrize(
    ("name", "probability"),
    [
        # nnU-Net 2.8.1; blur and low resolution draw once more for the one channel (0.5).
        ("noise", 0.1),
        ("blur", 0.1),
        ("brightness", 0.15),
        ("contrast", 0.15),
        ("low_resolution", 0.125),
        ("gamma_inverted", 0.1),
        ("gamma", 0.3),
    ],
)
def test_intensities_change_as_often_as_in_nnunet(images, name, probability):
    after, _ = run(only(name), images)
    if name == "low_resolution":
        # Of 6 voxels a scale above 5.5/6 leaves 6: the share of scales that change nothing.
        probability *= 1 - (1 - 5.5 / 6) / 0.5
    deviation = np.sqrt(probability * (1 - probability) / SAMPLES)
    assert changed(images, after).mean() == pytest.approx(probability, abs=4 * deviation)


@pytest.mark.parametrize(
    ("names", "probability"),
    [(("rotation",), 0.2), (("scaling",), 0.2), (("rotation", "scaling"), 1 - 0.8**2)],
)
def test_space_changes_as_often_as_in_nnunet(images, names, probability):
    settings = OFF | {name: augmentation.DEFAULT[name] for name in names}
    after, _ = run(settings, images, patch_size=(4, 4, 4))
    assert after.shape == (SAMPLES, 4, 4, 4, 1)
    deviation = np.sqrt(probability * (1 - probability) / SAMPLES)
    share = changed(images[:, 1:5, 1:5, 1:5], after).mean()
    assert share == pytest.approx(probability, abs=4 * deviation)


def test_each_axis_is_mirrored_half_of_the_time(images):
    label = np.random.default_rng(1).integers(0, 4, images.shape[:4], dtype=np.uint8)
    after, classes = run(OFF | {"mirror_axes": (0, 1, 2)}, images, label)
    counts = {}
    for flips in np.ndindex(2, 2, 2):
        axes = [axis + 1 for axis in range(3) if flips[axis]]
        same = ~changed(np.flip(images, axes), after)
        counts[flips] = same.sum()
        expected = np.flip(label, axes)
        expected = TABLE[expected] if flips[0] else expected
        np.testing.assert_array_equal(classes[same], expected[same])
    assert sum(counts.values()) == SAMPLES
    deviation = np.sqrt(SAMPLES / 8 * 7 / 8)
    for count in counts.values():
        assert count == pytest.approx(SAMPLES / 8, abs=4 * deviation)


def test_axes_that_are_not_named_are_not_mirrored(images):
    after, _ = run(OFF | {"mirror_axes": (2,)}, images[:200])
    kept = ~changed(images[:200], after)
    flipped = ~changed(np.flip(images[:200], 3), after)
    assert (kept ^ flipped).all()
    assert 60 < kept.sum() < 140


@pytest.mark.parametrize(("name", "low", "high"), [("brightness", 0.75, 1.25)])
def test_factors_are_half_below_and_half_above_one(images, name, low, high):
    """batchgeneratorsv2's BGContrast."""
    settings = only(name, probability=1.0)
    settings["normalization"] = {"mean": 0.0, "std": 1.0}
    after, _ = run(settings, images)
    factors = after.reshape(SAMPLES, -1).mean(1) / images.reshape(SAMPLES, -1).mean(1)
    assert low <= factors.min() < low + 0.01
    assert high - 0.01 < factors.max() <= high + 1e-5
    assert (factors < 1).mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(SAMPLES))
    below = factors[factors < 1]
    assert np.quantile(below, [0.25, 0.5, 0.75]) == pytest.approx([0.8125, 0.875, 0.9375], abs=0.01)


def test_gamma_exponents_are_half_below_and_half_above_one(images):
    settings = only("gamma", probability=1.0)
    after, _ = run(settings, images)
    # Bending upwards (exponent below 1) lifts the middle against the line from min to max.
    flat = after.reshape(SAMPLES, -1)
    scaled = (flat - flat.min(1, keepdims=True)) / np.ptp(flat, axis=1, keepdims=True)
    before = images.reshape(SAMPLES, -1)
    start = (before - before.min(1, keepdims=True)) / np.ptp(before, axis=1, keepdims=True)
    inner = (start > 0.2) & (start < 0.8)
    exponents = np.array(
        [
            np.median(np.log(s[i]) / np.log(b[i]))
            for s, b, i in zip(scaled, start, inner, strict=True)
        ]
    )
    assert 0.7 - 1e-3 < exponents.min() < 0.72
    assert 1.48 < exponents.max() < 1.5 + 1e-3
    assert (exponents < 1).mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(SAMPLES))


def test_noise_is_in_units_of_the_patchs_std_or_of_a_given_one(rng):
    images = rng.uniform(0, 1, (300, 8, 8, 8, 1)).astype(np.float32) * 0.5
    axes = (1, 2, 3, 4)
    after, _ = run(only("noise", probability=1.0), images)
    strength = (after - images).std(axes) / images.std(axes)
    assert 0 < strength.min() < 0.005
    assert 0.09 < strength.max() < 0.11
    assert strength.mean() == pytest.approx(0.05, abs=4 * 0.1 / np.sqrt(12 * 300))
    given = only("noise", probability=1.0) | {"normalization": {"mean": None, "std": 0.2}}
    after, _ = run(given, images)
    strength = (after - images).std(axes) / 0.2
    assert strength.mean() == pytest.approx(0.05, abs=4 * 0.1 / np.sqrt(12 * 300))


def test_scaling_covers_its_range_evenly():
    z, y, x = np.mgrid[:31, :31, :31] - 15
    ball = (x**2 + y**2 + z**2 <= 8**2).astype(np.uint8)
    label = np.repeat(ball[None], 300, 0)
    _, classes = run(only("scaling", probability=1.0), label[..., None].astype(np.float32), label)
    scales = 8 / (classes.reshape(300, -1).sum(1) * 3 / 4 / np.pi) ** (1 / 3)
    assert 0.68 < scales.min() < 0.73
    assert 1.36 < scales.max() < 1.45
    assert np.median(scales) == pytest.approx(1.05, abs=0.08)


def test_rotation_stays_within_its_range():
    label = np.zeros((300, 33, 33, 33), np.uint8)
    label[:, 16, 16, 26:30] = 1  # a mark on the z axis
    settings = only("rotation", probability=1.0)
    _, classes = run(settings, label[..., None].astype(np.float32), label)
    tilts = []
    for sample in classes:
        x, y, z = np.argwhere(sample).mean(0) - 16
        tilts.append(np.degrees(np.arctan2(np.hypot(x, y), z)))
    # Two rotations of up to 30 degrees tilt the z axis by at most acos(cos(30)^2) = 41.4.
    assert 30 < max(tilts) < 43
    assert min(tilts) < 6


def test_nothing_changes_when_all_is_off(images):
    label = np.ones(images.shape[:4], np.uint8)
    after, classes = run(OFF, images, label)
    np.testing.assert_array_equal(after, images)
    np.testing.assert_array_equal(classes, label)


def program(settings) -> str:
    return str(
        jax.make_jaxpr(
            lambda key, image, label: augmentation.augment(key, image, label, settings, TABLE)
        )(
            jax.random.key(0),
            jnp.zeros((2, 8, 8, 8, 1)),
            jnp.zeros((2, 8, 8, 8), jnp.uint8),
        )
    )


def test_what_is_off_is_not_in_the_program():
    assert "cond" not in program(OFF)
    assert "dot_general" not in program(augmentation.CHEAP)
    assert "gather" not in program(augmentation.CHEAP)
    for name in TRANSFORMS:
        assert program(only(name)).count("cond[") == 1
    assert "dot_general" in program(augmentation.DEFAULT)


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    image = rng.uniform(0, 1, (8, 15, 15, 15, 1)).astype(np.float32)
    return image, rng.integers(0, 4, image.shape[:4], dtype=np.uint8)


# Each transform in half of the samples.
OFTEN = {
    name: value | {"probability": 0.5} if name in TRANSFORMS else value
    for name, value in augmentation.DEFAULT.items()
}


@pytest.fixture(scope="module")
def often():
    return compiled(OFTEN, (9, 9, 9))


def test_the_result_is_a_function_of_the_key(often, batch):
    first, again, other = (often(jax.random.key(key), *batch) for key in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert changed(np.asarray(first[0]), np.asarray(other[0])).all()
    assert len({image.tobytes() for image in np.asarray(first[0])}) == 8


def test_samples_do_not_depend_on_their_neighbours(often, batch):
    image, label = batch
    whole = often(jax.random.key(4), image, label)
    neighbours = image.copy()
    neighbours[1:] = 0.5
    alone = often(jax.random.key(4), neighbours, label)
    np.testing.assert_allclose(whole[0][0], alone[0][0], atol=1e-6)


def test_eight_devices_do_what_one_does(often, batch):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = [jax.device_put(array, sharding) for array in batch]
    program = often.lower(jax.random.key(5), *sharded).compile().as_text()
    # All that devices tell each other is whether a transform applies anywhere.
    assert not re.search("all-gather|all-to-all|collective-permute", program)
    split = often(jax.random.key(5), *sharded)
    whole = often(jax.random.key(5), *batch)
    assert len(split[0].sharding.device_set) == 8
    np.testing.assert_allclose(split[0], whole[0], atol=1e-5)
    np.testing.assert_array_equal(split[1], whole[1])


def test_switching_one_transform_off_leaves_the_others_draws(images):
    few = images[:500]
    both = run(OFF | {n: augmentation.DEFAULT[n] for n in ("brightness", "contrast")}, few)[0]
    alone = run(only("contrast"), few)[0]
    brightened = changed(few, run(only("brightness"), few)[0])
    assert 40 < brightened.sum() < 110
    np.testing.assert_allclose(both[~brightened], alone[~brightened], atol=1e-6)


def test_the_papers_patch_reads_what_nnunet_reads():
    assert augmentation.source_patch((96, 96, 96), augmentation.DEFAULT) == (154, 154, 154)
    assert augmentation.source_patch((96, 96, 96), augmentation.CHEAP) == (96, 96, 96)
    turned = augmentation.without(augmentation.DEFAULT, "rotation")
    assert augmentation.source_patch((96, 96, 96), turned) == (112, 112, 112)


def test_settings_may_come_from_a_config_and_name_only_what_differs():
    config = ConfigDict({"noise": {"probability": 0.0}, "mirror_axes": (1,)})
    settings = augmentation.check_settings(config)
    assert settings["noise"] == {"probability": 0.0, "std": (0.0, 0.1)}
    assert settings["mirror_axes"] == (1,)
    assert settings["gamma"] == augmentation.DEFAULT["gamma"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharpen": {}}, "augmentation.sharpen is not a setting"),
        ({"noise": {"sigma": 1}}, "augmentation.noise.sigma is not a setting"),
        ({"noise": {"probability": 1.2}}, "augmentation.noise.probability is 1.2"),
        ({"blur": {"sigma": (1.0, 0.5)}}, "augmentation.blur.sigma"),
        ({"blur": {"sigma": (0.0, 0.5)}}, "augmentation.blur.sigma"),
        ({"low_resolution": {"scale": (0.5, 2.0)}}, "low_resolution.scale .* at most 1"),
        ({"gamma": {"range": (0.0, 2.0)}}, "gamma.range"),
        ({"noise": {"std": (-0.1, 2.0)}}, "noise.std"),
        ({"mirror_axes": (0, 3)}, "mirror_axes"),
        ({"mirror_axes": (1, 1)}, "mirror_axes"),
        ({"source_scale": 0}, "source_scale"),
        ({"normalization": {"std": 0.0}}, "normalization.std"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        augmentation.check_settings(settings)


def test_mirroring_x_needs_the_table_of_sides():
    with pytest.raises(UserError, match="mirror_table"):
        augmentation.augment(
            jax.random.key(0), jnp.ones((1, 4, 4, 4, 1)), jnp.ones((1, 4, 4, 4), jnp.uint8)
        )
    with pytest.raises(UserError, match="no transform 'sharpen'"):
        augmentation.without(augmentation.DEFAULT, "sharpen")
