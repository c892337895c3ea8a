"""Tumours of a diffusion model on the scans' own grids: what changes, and what does not."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from tumorjax.errors import CaseError, UserError
from tumorjax.synthesis import diffusion_render
from tumorjax.synthesis.implant import TumorTooLarge, implant
from tumorjax.synthesis.synthesizers import create, of_model, rule_based

# HU of the stand-in's tumours, by the window -175..250: level 0 is 37.5 HU, a unit 212.5 HU.
LEVEL = {"liver": 37.5 - 0.1 * 212.5, "pancreas": 37.5, "kidney": 37.5 + 0.1 * 212.5}


def scan(rng, shape, spacing, radius=50.0, organ_hu=110.0, noise=12.0):
    grid = np.meshgrid(
        *[(np.arange(n) - n / 2) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij"
    )
    mask = sum((g / radius) ** 2 for g in grid) < 1
    image = np.where(mask, organ_hu, -100.0)
    image = ndimage.gaussian_filter(image, 0.5) + rng.normal(0, noise, shape)
    return image.astype(np.float32), mask


def of(trained, organ="liver"):
    return of_model(organ, "difftumor", diffusion_render.make_model(trained))


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((48, 48, 48), (3.0, 3.0, 3.0)),  # the model's own
        ((90, 90, 40), (1.5, 1.5, 5.0)),
        ((60, 50, 90), (2.1, 3.4, 1.0)),
        ((24, 24, 24), (6.0, 6.0, 6.0)),
    ],
)
def test_nothing_changes_beyond_the_tumour_and_its_soft_rim(rng, make_trained, shape, spacing):
    image, mask = scan(rng, shape, spacing)
    before = image.copy()
    synthesizer = of(make_trained())
    out, tumor = implant(jax.random.key(3), image, mask, spacing, 14.0, synthesizer)
    np.testing.assert_array_equal(image, before)
    assert out.dtype == np.float32
    assert not (tumor & ~mask).any()
    changed = out != image
    assert changed[tumor].mean() > 0.99
    assert not changed[~mask].any()
    # 1.5 mm times 2.75 is the edge's reach along an axis; a voxel where that is more.
    reach = max(6.0, float(np.linalg.norm(spacing)))
    beyond = ndimage.distance_transform_edt(~tumor, sampling=spacing) > reach + 1e-3
    assert not changed[beyond].any()
    inside = ndimage.binary_erosion(tumor) if tumor.sum() > 200 else tumor
    level = LEVEL["liver"] - 0.001 * 14 * 212.5
    assert np.mean(out[inside]) == pytest.approx(level, abs=6)
    assert out[tumor].max() < 250
    # The same place as every other synthesizer's: only the texture is another.
    _, by_rules = implant(jax.random.key(3), image, mask, spacing, 14.0, rule_based("liver"))
    np.testing.assert_array_equal(tumor, by_rules)


def test_the_key_decides(rng, make_trained):
    spacing = (3.0, 3.0, 3.0)
    image, mask = scan(rng, (48, 48, 48), spacing)
    made = [
        implant(jax.random.key(seed), image, mask, spacing, 12.0, of(make_trained()))
        for seed in (5, 5, 6)
    ]
    np.testing.assert_array_equal(made[0][0], made[1][0])
    np.testing.assert_array_equal(made[0][1], made[1][1])
    assert (made[0][0] != made[2][0]).any()


@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (1.5, 1.5, 2.5)])
def test_the_grain_of_the_scan_stays_and_its_vessels_go(rng, make_trained, spacing):
    shape = tuple(int(130 / s) for s in spacing)
    image, mask = scan(rng, shape, spacing)
    vessel = np.zeros_like(mask)
    for y in range(0, shape[1], 10):
        vessel[:, y : y + 2, shape[2] // 2 - 1 : shape[2] // 2 + 1] = True
    image[vessel & mask] += 90
    synthesizer = of(make_trained(texture=0.0))
    after, before, on_vessel = [], [], []
    for seed in range(5):
        out, tumor = implant(jax.random.key(seed), image, mask, spacing, 22.0, synthesizer)
        inside = ndimage.binary_erosion(tumor, iterations=2)
        near = ndimage.binary_dilation(vessel, iterations=2)
        after.append(out[inside & ~near].std())
        before.append(image[inside & ~near].std())
        if (inside & vessel).any():
            on_vessel.append(out[inside & vessel].mean() - out[inside & ~near].mean())
    assert np.mean(after) == pytest.approx(np.mean(before), rel=0.25)
    assert len(on_vessel) >= 2
    assert np.max(np.abs(on_vessel)) < 15


def test_what_the_model_gets_wrong_of_the_organ_is_no_part_of_the_tumour(rng, make_trained):
    spacing = (3.0, 3.0, 3.0)
    image, mask = scan(rng, (48, 48, 48), spacing)
    trained = make_trained(texture=0.0)

    def brighter(generate, *arguments):
        return tuple(picture + 0.1 for picture in generate(*arguments))

    biased = trained._replace(generate=jax.tree_util.Partial(brighter, trained.generate))
    key = jax.random.key(2)
    out, tumor = implant(key, image, mask, spacing, 16.0, of(trained))
    other, _ = implant(key, image, mask, spacing, 16.0, of(biased))
    # 0.1 are 21 HU.
    assert np.abs(other - out)[tumor].max() < 1


def test_edges_are_as_sharp_as_the_scan_and_not_as_the_model(rng, make_trained):
    # A model of 4 mm, a scan of 1 mm: the edge is blurred by 0.5 to 1.5 mm.
    spacing = (1.0, 1.0, 1.0)
    image, organ = scan(rng, (80, 80, 80), spacing, radius=38.0, noise=0.0)
    grid = np.indices(image.shape) - 40
    ball = np.sqrt((grid**2).sum(axis=0)) < 13
    render = of(make_trained(spacing=(4.0, 4.0, 4.0), texture=0.0)).render
    out = render(jax.random.key(0), image, organ, ball, spacing)
    line = out[40, 40, 40:]
    low, high = line[:6].mean(), 110.0
    assert low == pytest.approx(13, abs=5)
    np.testing.assert_allclose(line[:8], low, atol=4)
    np.testing.assert_array_equal(line[19:], image[40, 40, 59:])
    # From a tenth to nine tenths of the way within 4 mm.
    way = (line - low) / (high - low)
    assert np.argmax(way > 0.9) - np.argmax(way > 0.1) <= 4


def test_values_outside_the_window_stay_outside_the_tumour(rng, make_trained):
    spacing = (3.0, 3.0, 3.0)
    image, mask = scan(rng, (48, 48, 48), spacing)
    image[:6] = -1024
    image[-6:] = 2800
    image[24, 24, 24] = 900.0  # a clip in the organ
    out, tumor = implant(jax.random.key(1), image, mask, spacing, 20.0, of(make_trained()))
    assert set(np.unique(out[:6])) == {-1024}
    assert set(np.unique(out[-6:])) == {2800}
    assert out[tumor].max() < 250
    assert out[tumor].min() > -175


def test_organs_at_the_border_of_the_scan_are_continued(rng, make_trained):
    # 30 slices of 3 mm are less than the 96 mm that the model looks at.
    spacing = (3.0, 3.0, 3.0)
    image, mask = scan(rng, (48, 48, 20), spacing)
    seen = []
    trained = make_trained()

    def generate(key, crop, hole, organ, radius):
        seen.append(crop.shape)
        return crop, crop

    trained = trained._replace(generate=jax.tree_util.Partial(generate))
    out, tumor = implant(jax.random.key(2), image, mask, spacing, 12.0, of(trained))
    assert seen == [(1, 32, 32, 32, 1)]
    assert tumor.any()
    # This model gives back what it is given: noise apart, nothing is new.
    assert np.abs(np.mean(out[tumor] - image[tumor])) < 3


def test_the_model_is_given_the_scan_on_its_own_grid(rng, make_trained):
    given = {}

    def generate(key, crop, hole, organ, radius):
        jax.debug.callback(
            lambda *a: given.update(zip("ihor", a, strict=True)), crop, hole, organ, radius
        )
        return crop, crop

    trained = make_trained(spacing=(4.0, 4.0, 4.0), organs=("kidney", "pancreas", "liver"))
    trained = trained._replace(generate=jax.tree_util.Partial(generate))
    spacing = (2.0, 2.0, 4.0)
    shape = (90, 90, 45)
    image, mask = scan(rng, shape, spacing, noise=0.0)
    _, tumor = implant(jax.random.key(2), image, mask, spacing, 16.0, of(trained))
    jax.effects_barrier()
    assert given["o"].tolist() == [2]
    volume = 4 / 3 * np.pi * float(given["r"][0]) ** 3
    assert volume == pytest.approx(tumor.sum() * 16, rel=1e-3)
    assert given["h"].sum() * 64 == pytest.approx(volume, rel=0.1)
    # Organ and fat, scaled by the window to [-1, 1].
    crop = given["i"][0, ..., 0]
    assert crop.max() == pytest.approx((110 - 37.5) / 212.5, abs=0.02)
    assert crop.min() == pytest.approx((-100 - 37.5) / 212.5, abs=0.02)
    assert crop[given["h"][0] > 0].mean() == pytest.approx((110 - 37.5) / 212.5, abs=0.1)


def test_tumours_beyond_the_crop_of_the_model_are_refused(rng, make_trained):
    spacing = (3.0, 3.0, 3.0)
    image, mask = scan(rng, (64, 64, 64), spacing, radius=80.0)
    small = of(make_trained(crop=(16, 16, 16)))
    # 16 voxels less one of the latents on each side, of 3 mm.
    assert small.largest_mm == (24.0, 24.0, 24.0)
    with pytest.raises(TumorTooLarge, match="draws up to 24 x 24 x 24 mm"):
        implant(jax.random.key(0), image, mask, spacing, 40.0, small, case="BDMAP_1")
    _, tumor = implant(jax.random.key(0), image, mask, spacing, "tiny", small)
    assert tumor.any()


def test_models_that_draw_no_numbers_are_named(rng, make_trained):
    spacing = (3.0, 3.0, 3.0)
    image, mask = scan(rng, (48, 48, 48), spacing)
    with pytest.raises(UserError, match="NaN or infinite"):
        implant(
            jax.random.key(0), image, mask, spacing, 12.0, of(make_trained(level=(np.nan,) * 3))
        )


def test_organs_that_the_model_has_not_seen_are_refused(make_trained):
    with pytest.raises(UserError, match=r"no tumours of 'colon'.*liver, pancreas, kidney"):
        of(make_trained(), "colon")
    with pytest.raises(UserError, match="has no checkpoint"):
        create("diffusion", "liver")
    with pytest.raises(UserError, match="no settings colour"):
        create("diffusion", "liver", colour=3)


def test_fingerprints_tell_weights_and_grids_apart(make_trained):
    first = diffusion_render.fingerprint(make_trained())
    assert first == diffusion_render.fingerprint(make_trained())
    others = [
        make_trained(level=(-0.1, 0.0, 0.2)),
        make_trained(spacing=(3.0, 3.0, 4.0)),
        make_trained(window=(-160.0, 250.0)),
        make_trained(crop=(32, 32, 16)),
    ]
    assert len({first, *map(diffusion_render.fingerprint, others)}) == 5


def test_real_organs_get_tumours(make_trained, real_data):
    import nibabel as nib

    folder = real_data / "totalsegmentator"
    file = nib.load(folder / "example_ct_sm.nii.gz")
    image = np.asarray(file.dataobj, np.float32)
    organs = np.asarray(nib.load(folder / "example_seg.nii.gz").dataobj)
    for organ, values, size in (
        ("liver", (5,), 12.5),
        ("pancreas", (7,), 6.0),
        ("kidney", (2,), 9.0),
    ):
        mask = np.isin(organs, values)
        synthesizer = of(make_trained(spacing=(4.0, 4.0, 4.0)), organ)
        out, tumor = implant(jax.random.key(1), image, mask, (3.0, 3.0, 3.0), size, synthesizer)
        volume = tumor.sum() * 27
        assert 0.75**3 <= volume / (4 / 3 * np.pi * size**3) <= 1.4
        far = ndimage.distance_transform_edt(~tumor, sampling=(3.0,) * 3) > 6
        np.testing.assert_array_equal(out[far], image[far])
        assert np.median(out[tumor]) == pytest.approx(LEVEL[organ], abs=15)


def test_a_scan_without_the_organ_is_a_case_error(rng, make_trained):
    image, mask = scan(rng, (48, 48, 48), (3.0, 3.0, 3.0))
    with pytest.raises(CaseError, match="no liver in the scan"):
        implant(jax.random.key(0), image, np.zeros_like(mask), (3.0,) * 3, 8.0, of(make_trained()))
