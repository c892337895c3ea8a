"""Tumours made inside a training step: where they are, what stays, and any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from tumorjax import parallel
from tumorjax.errors import UserError
from tumorjax.synthesis import blending, online, online_texture, texture

CLASSES = {
    "kidney": ("kidney_left", "kidney_right"),
    "kidney_lesion": ("kidney_lesion",),
    "liver": ("liver",),
    "liver_lesion": ("liver_lesion",),
}
KIDNEY, KIDNEY_LESION, LIVER, LIVER_LESION = 1, 2, 3, 4
SPACING, WINDOW = (3.0, 3.0, 3.0), (-175.0, 250.0)
SETTINGS = {"spacing": SPACING, "window": WINDOW, "sizes": {"small": 1.0}}
PATCH = (24, 24, 24)


def hu(value):
    return (value + 175) / 425


def batch(rng, rows=4, patch=PATCH):
    """Crops with a liver (even rows) or a kidney (odd rows); the last has neither."""
    image = np.full((rows, *patch), 20.0)
    label = np.zeros((rows, *patch), np.uint8)
    grid = np.indices(patch)
    for row in range(rows - 1):
        centre = rng.uniform(9, 14, 3)
        radius = 9.0 if row % 2 else 10.0
        organ = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < radius**2
        label[row][organ] = KIDNEY if row % 2 else LIVER
        image[row][organ] = 170 if row % 2 else 110
    image = hu(image + rng.normal(0, 10, image.shape)).clip(0, 1).astype(np.float32)
    return jnp.asarray(image[..., None]), jnp.asarray(label)


@pytest.fixture(scope="module")
def transform_of(make_trained):
    """(synthesizer) -> its transform, compiled once for all tests here."""

    @functools.cache
    def transform(name):
        return online.make(model_of(name, make_trained), CLASSES, SETTINGS | {"synthesizer": name})

    return transform


def model_of(name, make_trained):
    if name == "rules":
        return None
    return make_trained(crop=(16, 16, 16), organs=("pancreas", "liver", "kidney"))


@pytest.mark.parametrize("name", ["rules", "diffusion"])
def test_marked_rows_get_a_tumour_in_their_organ_and_nothing_else_changes(rng, transform_of, name):
    image, label = batch(rng)
    where = jnp.asarray([True, True, False, True])
    transform = transform_of(name)
    made, beside = 0, []
    for seed in range(4):
        new_image, new_label = transform(jax.random.key(seed), image, label, where)
        assert new_image.dtype == image.dtype
        assert new_label.dtype == np.uint8
        before, after = np.asarray(image)[..., 0], np.asarray(new_image)[..., 0]
        names, new_names = np.asarray(label), np.asarray(new_label)
        # Row 2 is not marked, row 3 has no organ.
        np.testing.assert_array_equal(after[2:], before[2:])
        np.testing.assert_array_equal(new_names[2:], names[2:])
        for row, (organ, lesion, level) in enumerate(
            ((LIVER, LIVER_LESION, 37.5), (KIDNEY, KIDNEY_LESION, 58.75))
        ):
            tumor = new_names[row] != names[row]
            made += tumor.any()
            if not tumor.any():
                np.testing.assert_array_equal(after[row], before[row])
                continue
            assert set(new_names[row][tumor]) == {lesion}
            assert set(names[row][tumor]) == {organ}
            assert ndimage.label(tumor, np.ones((3, 3, 3)))[1] == 1
            # "small" has a nominal radius of 8 mm; the third and fourth try are smaller.
            radius = (tumor.sum() * 27 * 3 / 4 / np.pi) ** (1 / 3)
            assert 0.75 * 4 <= radius <= 8 * 1.25
            changed = after[row] != before[row]
            assert changed[tumor].mean() > 0.95
            assert not changed[names[row] != organ].any()
            far = ndimage.distance_transform_edt(~tumor, sampling=SPACING) > 7
            assert not changed[far].any()
            assert after[row].min() >= 0
            assert after[row].max() <= 1
            core = ndimage.binary_erosion(tumor)
            # Against the stand-in's level, or how much the rules may leave of the organ.
            expected = level if name == "diffusion" else (110 if row == 0 else 170) - 15
            beside.append(after[row][core] * 425 - 175 - expected)
    assert made >= 6
    mean = np.concatenate(beside).mean()
    assert abs(mean) < 6 if name == "diffusion" else mean < 0


@pytest.mark.parametrize("name", ["rules", "diffusion"])
def test_two_devices_make_what_one_makes(rng, make_trained, transform_of, name):
    image, label = batch(rng)
    where = np.ones(4, bool)
    key = jax.random.key(5)
    mesh = parallel.make_mesh({"data": 2}, jax.devices()[:2])
    settings = SETTINGS | {"synthesizer": name}
    on_two = online.make(model_of(name, make_trained), CLASSES, settings, mesh)
    rows = {"image": np.asarray(image), "label": np.asarray(label), "implant": where}
    given = parallel.put_batch(mesh, rows)
    image_two, label_two = on_two(key, given["image"], given["label"], given["implant"])
    assert len(image_two.sharding.device_set) == 2
    image_one, label_one = transform_of(name)(key, image, label, jnp.asarray(where))
    assert (np.asarray(label_one) != np.asarray(label)).any(axis=(1, 2, 3)).sum() >= 2
    np.testing.assert_array_equal(label_one, label_two)
    np.testing.assert_allclose(image_one, image_two, atol=2e-5)


def test_the_key_decides_and_rows_differ(rng, transform_of):
    image, label = batch(rng)
    # The same crop twice.
    image, label = image.at[1].set(image[0]), label.at[1].set(label[0])
    transform = transform_of("rules")
    where = jnp.ones(4, bool)
    first = transform(jax.random.key(0), image, label, where)
    again = transform(jax.random.key(0), image, label, where)
    other = transform(jax.random.key(1), image, label, where)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[1] != other[1]).any()
    assert (first[1][0] != first[1][1]).any()


def test_patches_of_another_size_than_the_crop_of_the_model(rng, transform_of):
    # Smaller along x, larger along y, equal along z.
    image, label = batch(rng, patch=(12, 22, 16))
    transform = transform_of("diffusion")
    made = 0
    for seed in range(3):
        new_image, new_label = transform(jax.random.key(seed), image, label, jnp.ones(4, bool))
        assert new_image.shape == image.shape
        changed = np.asarray(new_label != label)
        made += changed.any()
        assert set(np.asarray(label)[changed]) <= {LIVER, KIDNEY}
    assert made


def test_tumours_keep_away_from_those_that_are_there(rng, transform_of):
    image, label = batch(rng)
    label = np.array(label)
    there = np.zeros(PATCH, bool)
    there[11:13, 11:13, 11:13] = True
    label[0][there & (label[0] == LIVER)] = LIVER_LESION
    transform = transform_of("rules")
    old = label[0] == LIVER_LESION
    made = 0
    for seed in range(8):
        _, new = transform(jax.random.key(seed), image, jnp.asarray(label), jnp.ones(4, bool))
        added = (np.asarray(new)[0] == LIVER_LESION) & ~old
        made += added.any()
        assert not (added & ndimage.binary_dilation(old, np.ones((3, 3, 3)))).any()
    assert made >= 3


def test_equal_settings_share_one_function(make_trained):
    preparation = {"spacing": SPACING, "window": WINDOW, "order": 1}
    settings = {"synthesizer": "rules", "sizes": {"small": 1.0}, "per_real": 3}
    first = online.from_settings(settings, CLASSES, preparation)
    assert online.from_settings(dict(settings), dict(CLASSES), dict(preparation)) is first
    assert (
        online.from_settings(settings | {"sizes": {"tiny": 1}}, CLASSES, preparation) is not first
    )


def test_what_cannot_be_made_is_said(make_trained):
    trained = make_trained()
    with pytest.raises(UserError, match=r"needs a tumour and its organ.*liver_lesion"):
        online.make(None, {"liver_lesion": ("liver_lesion",)}, SETTINGS)
    diffusion = SETTINGS | {"synthesizer": "diffusion"}
    with pytest.raises(UserError, match="was trained with"):
        online.make(trained, CLASSES, diffusion | {"spacing": (4.0, 4.0, 4.0)})
    with pytest.raises(UserError, match="window"):
        online.make(trained, CLASSES, diffusion | {"window": (-100.0, 250.0)})
    with pytest.raises(UserError, match="trained on tumours of colon"):
        online.make(trained._replace(organs=("colon",)), CLASSES, diffusion)
    with pytest.raises(UserError, match="'dreams' is unknown"):
        online.make(None, CLASSES, SETTINGS | {"synthesizer": "dreams"})
    with pytest.raises(UserError, match="no mass effect"):
        online.make(None, CLASSES, SETTINGS | {"texture": {"liver": {"mass_effect": 0.2}}})
    with pytest.raises(UserError, match="colour are unknown"):
        online.make(None, CLASSES, SETTINGS | {"texture": {"liver": {"colour": 1}}})


def test_united_organs_have_no_place_of_their_own():
    classes = {"organs": ("liver", "pancreas"), "liver_lesion": ("liver_lesion",)}
    assert online.find_hosts(classes) == []
    merged = {"liver": ("liver", "hepatic_vessel"), "pancreas": ("pancreas",)} | {
        "tumor": ("liver_lesion", "pancreatic_lesion")
    }
    hosts = online.find_hosts(merged)
    assert [(host.organ, host.classes, host.tumor) for host in hosts] == [
        ("liver", (1,), 3),
        ("pancreas", (2,), 3),
    ]


# ---------------------------------------------------------------------------- against the host's


def test_edges_are_those_of_the_host(rng):
    organ = rng.random((18, 17, 16)) < 0.9
    organ[:, :, :3] = False
    tumor = np.zeros_like(organ)
    tumor[5:11, 6:12, 2:9] = True
    tumor &= organ
    spacing = (1.0, 1.5, 2.0)
    expected = blending.edge_weight(tumor, organ, np.asarray(spacing), 1.4)
    weight = online_texture.edge_weight(jnp.asarray(tumor), jnp.asarray(organ), 1.4, spacing)
    # SciPy mirrors what lies beyond the crop; that is felt only near its border.
    inner = (slice(4, -4),) * 3
    np.testing.assert_allclose(np.asarray(weight)[inner], expected[inner], atol=2e-3)


def test_grain_has_the_deviation_of_the_host_and_no_vessels(rng):
    shape, steps = (26, 26, 26), (1.5, 1.5, 1.5)
    host = sum((np.indices(shape)[i] - 12.5) ** 2 for i in range(3)) < 11**2
    image = np.where(host, 110.0, 20.0) + rng.normal(0, 12, shape)
    vessel = np.zeros(shape, bool)
    vessel[12:14, 12:14] = True
    image[vessel & host] += 90
    normal, spread = online_texture.organ_statistics(
        jnp.asarray(image), jnp.asarray(host), (-np.inf, np.inf)
    )
    expected = blending.organ_statistics(image, host)
    assert float(normal) == pytest.approx(expected[0], abs=2)
    assert float(spread) == pytest.approx(expected[1], rel=0.15)
    ours = online_texture.grain(
        jax.random.key(0), jnp.asarray(image), jnp.asarray(host), normal, spread, [2.5 / 1.5] * 3
    )
    theirs = blending.grain(
        np.random.default_rng(0), image.astype(np.float32), host, np.asarray(steps), *expected
    )
    inner = ndimage.binary_erosion(host, iterations=2)
    # Beside outliers both have noise of their own making, which no two programs draw alike.
    outlier = np.abs(image - expected[0]) > 0.9 * max(3 * expected[1], 25)
    plain = inner & ~ndimage.maximum_filter(outlier | vessel, 5)
    assert plain.sum() > 200
    assert float(np.asarray(ours)[plain].std()) == pytest.approx(theirs[plain].std(), rel=0.1)
    np.testing.assert_allclose(np.asarray(ours)[plain], theirs[plain], atol=6)
    assert abs(np.asarray(ours)[vessel & inner].mean()) < 8


def test_noise_of_hand_written_lesions_has_their_variation():
    look = texture.TEXTURES["liver"]
    stacked = online_texture.stack_textures(
        [look, texture.TEXTURES["uterus"]], (40, 40, 40), (3.0,) * 3
    )
    noise = tuple(n[0] for n in stacked.noise)
    keys = jax.random.split(jax.random.key(0), 24)
    white = jax.vmap(lambda key: jax.random.normal(key, (3, 40, 40, 40)))(keys)
    drawn = jax.vmap(lambda w: jnp.sum(jax.vmap(online_texture.smooth)(w, noise), axis=0))(white)
    # Unit variance, at the crop's border as well as in its middle.
    assert float(drawn.std()) == pytest.approx(1, abs=0.05)
    assert float(drawn[:, 0].std()) == pytest.approx(1, abs=0.1)


def test_voxels_are_drawn_evenly(rng):
    mask = jnp.asarray(rng.random((5, 6, 7)) < 0.1)
    keys = jax.random.split(jax.random.key(0), 20000)
    voxels = np.asarray(jax.vmap(lambda key: online._draw_voxel(key, mask))(keys))
    counts = np.zeros(mask.shape)
    np.add.at(counts, tuple(voxels.T), 1)
    assert not counts[~np.asarray(mask)].any()
    expected = 20000 / int(mask.sum())
    assert np.abs(counts[np.asarray(mask)] - expected).max() < 5 * np.sqrt(expected)
