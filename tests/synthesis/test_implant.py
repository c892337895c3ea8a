"""Implanted tumours: where they are, what they leave alone, and that the key decides."""

import time

import cc3d
import jax
import numpy as np
import pytest
from scipy import ndimage

from tumorjax.errors import CaseError, UserError
from tumorjax.synthesis import shapes
from tumorjax.synthesis.implant import create, implant, rule_based
from tumorjax.synthesis.placement import OrganTooSmall, place

SPACING = (3.0, 3.0, 3.0)
# HU of an enhanced organ, and of a hollow one's wall.
ORGAN_HU = {
    "liver": 110,
    "pancreas": 95,
    "kidney": 170,
    "colon": 60,
    "esophagus": 50,
    "uterus": 100,
}


def scan(rng, organ="liver", shape=(80, 64, 56), spacing=SPACING, radii=(60.0, 48.0, 42.0)):
    """A noisy body of soft tissue in air with one ellipsoid organ."""
    grid = np.meshgrid(
        *[(np.arange(n) - n / 2) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij"
    )
    half = np.array(shape) * spacing / 2
    body = sum((g / (0.95 * h)) ** 2 for g, h in zip(grid[:2], half[:2], strict=True)) < 1
    mask = sum((g / r) ** 2 for g, r in zip(grid, radii, strict=True)) < 1
    image = np.where(body, 20.0, -1000.0)
    image[mask] = ORGAN_HU[organ]
    image = ndimage.gaussian_filter(image, 0.5) + rng.normal(0, 12, shape)
    return image.astype(np.float32), mask


@pytest.mark.parametrize("organ", ORGAN_HU)
@pytest.mark.parametrize("size", ["tiny", "small", "medium"])
def test_tumours_lie_in_the_organ_and_nothing_else_changes(rng, organ, size):
    image, mask = scan(rng, organ)
    before = image.copy()
    out, tumor = implant(jax.random.key(1), image, mask, SPACING, size, rule_based(organ))
    np.testing.assert_array_equal(image, before)
    assert out.dtype == np.float32
    assert tumor.dtype == bool
    assert tumor.any()
    if organ != "kidney" or size != "medium":
        assert not (tumor & ~mask).any()
    reach = ndimage.distance_transform_edt(~tumor, sampling=SPACING)
    changed = out != image
    assert changed[tumor].all()
    assert not changed[reach > 9].any()
    if not (tumor & ~mask).any():
        assert not changed[~mask].any()
    low, high = shapes.GROUP_RADIUS[size]
    labels, count = cc3d.connected_components(tumor, connectivity=26, return_N=True)
    assert 1 <= count <= (1 if size == "medium" else 3)
    for voxels in np.bincount(labels.ravel())[1:]:
        assert low <= (voxels * 27 * 3 / 4 / np.pi) ** (1 / 3) <= high * 1.3


def test_the_key_decides(rng):
    image, mask = scan(rng)
    first = implant(jax.random.key(5), image, mask, SPACING, "small", rule_based("liver"))
    again = implant(jax.random.key(5), image, mask, SPACING, "small", create("rules", "liver"))
    named = implant(jax.random.key(5), image, mask, SPACING, "small", "rules", organ="liver")
    other = implant(jax.random.key(6), image, mask, SPACING, "small", rule_based("liver"))
    for array, same, by_name in zip(first, again, named, strict=True):
        np.testing.assert_array_equal(array, same)
        np.testing.assert_array_equal(array, by_name)
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize(
    ("organ", "low", "high"),
    # The contrasts in texture.TEXTURES, half a noise deviation wider; lesion means are limited to
    # 115 HU in hollow organs and to 130 HU in the kidney.
    [
        ("liver", -95, -25),
        ("pancreas", -75, -8),
        ("kidney", -130, -30),
        ("colon", 5, 48),
        ("esophagus", 5, 48),
        ("uterus", -85, -15),
    ],
)
def test_lesions_are_darker_or_brighter_as_their_organ_says(rng, organ, low, high):
    image, mask = scan(rng, organ)
    means = []
    for seed in range(12):
        # Without the darker core, which comes on top of the contrast.
        plain = rule_based(organ, core_share=0.0)
        out, tumor = implant(jax.random.key(seed), image, mask, SPACING, 14.0, plain)
        core = ndimage.binary_erosion(tumor & mask)
        means.append(float(np.mean(out[core] - image[core])))
    assert low <= min(means)
    assert max(means) <= high
    # Lesions differ from one another, by what was drawn.
    assert np.std(means) > 3


def test_lesions_keep_the_grain_of_the_scan_and_lose_its_vessels(rng):
    image, mask = scan(rng)
    vessel = np.zeros_like(mask)
    vessel[:, 31:33, 27:29] = True
    image[vessel & mask] += 80
    grain = {"before": [], "after": [], "vessel": []}
    for seed in range(6):
        changes = {"variation": (0.0, 0.0), "core_share": 0.0, "rim_share": 0.0}
        out, tumor = implant(
            jax.random.key(seed), image, mask, SPACING, 24.0, rule_based("liver", **changes)
        )
        inside = ndimage.binary_erosion(tumor, iterations=2)
        plain, on_vessel = inside & ~ndimage.binary_dilation(vessel, iterations=2), inside & vessel
        grain["before"].append(image[plain].std())
        grain["after"].append(out[plain].std())
        if on_vessel.sum() > 5:
            grain["vessel"].append(out[on_vessel].mean() - out[plain].mean())
    assert np.mean(grain["after"]) == pytest.approx(np.mean(grain["before"]), rel=0.25)
    assert len(grain["vessel"]) >= 1
    assert max(grain["vessel"]) < 30


def test_edges_are_blurred_by_the_millimetres_asked_for(rng):
    # A ball of 20 mm in an even organ: the HU across its border follow an error function.
    from scipy.special import erf

    spacing, sigma = (1.0, 1.0, 1.0), 2.0
    image, mask = scan(rng, "liver", (90, 90, 90), spacing, (40.0, 40.0, 40.0))
    image[:] = 100
    grid = np.indices(image.shape) - 45
    ball = np.sqrt((grid**2).sum(axis=0)) < 20
    render = rule_based(
        "liver",
        contrast=(-50.0, -50.0),
        variation=(0.0, 0.0),
        edge_mm=(sigma, sigma),
        rim_share=0.0,
        core_share=0.0,
    ).render
    out = render(jax.random.key(0), image, mask, ball, spacing)
    line = out[45, 45, 45 + 14 : 45 + 27]
    expected = 100 - 50 * 0.5 * (1 + erf((19.7 - np.arange(14, 27)) / sigma / np.sqrt(2)))
    np.testing.assert_allclose(line, expected, atol=3.5)


def test_mass_effect_moves_the_surroundings_outwards_within_the_organ(rng):
    image, mask = scan(rng, "liver", (90, 90, 90), (1.0, 1.0, 1.0), (42.0, 42.0, 42.0))
    image[:] = 100
    # A vessel that passes the lesion at 14 mm.
    image[44:46, :, 58:61] = 180
    grid = np.indices(image.shape) - 45
    ball = np.sqrt((grid**2).sum(axis=0)) < 10
    quiet = {"variation": (0.0, 0.0), "rim_share": 0.0, "edge_mm": (0.5, 0.5)}
    pushed = rule_based("liver", mass_effect=0.3, **quiet).render(
        jax.random.key(0), image, mask, ball, (1.0, 1.0, 1.0)
    )
    column = np.clip(pushed[45, 45, 55:75] - 100, 0, None)
    centre = 55 + (column * np.arange(20)).sum() / column.sum()
    assert 60 < centre < 63
    np.testing.assert_array_equal(pushed[~mask], image[~mask])


def test_new_tumours_keep_away_from_existing_ones_and_from_one_another(rng):
    image, mask = scan(rng)
    existing = np.zeros_like(mask)
    existing[30:50, 22:42, 18:38] = True
    existing &= mask
    counts = []
    for seed in range(12):
        out, tumor = implant(
            jax.random.key(seed),
            image,
            mask,
            SPACING,
            "small",
            rule_based("liver"),
            exclude=existing,
        )
        gap = ndimage.distance_transform_edt(~existing, sampling=SPACING)[tumor].min()
        assert gap > 3
        np.testing.assert_array_equal(out[existing], image[existing])
        counts.append(cc3d.connected_components(tumor, connectivity=26).max())
    assert {1, 2, 3} == set(counts)
    _, four = implant(
        jax.random.key(0), image, mask, SPACING, "small", rule_based("liver"), count=4
    )
    assert cc3d.connected_components(four, connectivity=26).max() == 4


def test_half_of_medium_kidney_tumours_stick_out_but_not_of_the_body(rng):
    image, mask = scan(rng, "kidney", radii=(24.0, 24.0, 45.0))
    # The kidney lies close to the skin: air begins 6 mm beside it.
    image[50:] = -1000 + rng.normal(0, 12, image[50:].shape)
    liver = np.zeros_like(mask)
    liver[:, :22] = True
    outside = []
    for seed in range(24):
        _, tumor = implant(
            jax.random.key(seed),
            image,
            mask,
            SPACING,
            "medium",
            rule_based("kidney"),
            blocked=liver,
        )
        assert not tumor[50:].any()
        assert not (tumor & liver & ~mask).any()
        outside.append(bool((tumor & ~mask).any()))
    assert 6 <= sum(outside) <= 18


@pytest.mark.parametrize("organ", ["liver", "pancreas"])
def test_centres_lie_in_the_organ_first_in_its_middle(rng, organ):
    # A bent organ, whose bounding box has its middle outside.
    image, mask = scan(rng, organ)
    bent = mask & ~(np.indices(mask.shape)[0] > 36)
    heights = []
    for seed in range(30):
        lesion = place(
            jax.random.key(seed),
            image,
            bent,
            np.zeros_like(bent),
            None,
            SPACING,
            6.0,
            organ,
            "difftumor",
            "case",
        )
        assert not (lesion.mask & ~bent[lesion.box]).any()
        heights.append((lesion.box[2].start + lesion.box[2].stop) / 2)
    z = np.flatnonzero(bent.any(axis=(0, 1)))
    share = (np.array(heights) - z[0]) / (z[-1] - z[0])
    assert np.mean((share > 0.24) & (share < 0.76)) > 0.9


def test_no_organ_and_too_small_an_organ_are_case_errors(rng):
    image, mask = scan(rng)
    with pytest.raises(CaseError, match="BDMAP_1: there is no liver in the scan"):
        implant(
            jax.random.key(0),
            image,
            np.zeros_like(mask),
            SPACING,
            "small",
            rule_based("liver"),
            case="BDMAP_1",
        )
    small = np.zeros_like(mask)
    small[38:43, 30:35, 26:31] = True
    with pytest.raises(OrganTooSmall, match=r"liver \(3 ml\) has no place for a large tumour"):
        implant(jax.random.key(0), image, small, SPACING, "large", rule_based("liver"))
    _, tumor = implant(jax.random.key(0), image, small, SPACING, "tiny", rule_based("liver"))
    assert 0 < tumor.sum() <= 0.6 * small.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "huge"}, "size 'huge' is unknown"),
        ({"size": -2.0}, "radius is -2.0 mm"),
        ({"synthesizer": "dreams", "organ": "liver"}, "synthesizer 'dreams' is unknown"),
        ({"synthesizer": "rules"}, "give organ too"),
        ({"count": 0}, "Expected at least 1"),
        ({"exclude": np.zeros((2, 2, 2), bool)}, "exclude has shape"),
    ],
)
def test_wrong_use_is_said(rng, change, message):
    image, mask = scan(rng)
    call = {"size": "small", "synthesizer": rule_based("liver")} | change
    with pytest.raises(UserError, match=message):
        implant(jax.random.key(0), image, mask, SPACING, **call)


def test_images_that_are_not_in_hu_are_refused(rng):
    image, mask = scan(rng)
    with pytest.raises(UserError, match="Expected HU"):
        implant(
            jax.random.key(0), rng.random(image.shape), mask, SPACING, "small", rule_based("liver")
        )
    image[40, 32, 28] = np.nan
    with pytest.raises(CaseError, match="NaN"):
        implant(jax.random.key(0), image, mask, SPACING, "small", rule_based("liver"))


def test_unknown_organs_and_settings_are_said():
    with pytest.raises(UserError, match="no tumours of 'spleen'"):
        rule_based("spleen")
    with pytest.raises(UserError, match="settings colour are unknown"):
        rule_based("liver", colour=3)


@pytest.mark.parametrize("size", ["tiny", "small", "medium"])
def test_one_implant_in_a_small_volume_takes_under_a_tenth_of_a_second(rng, size):
    image, mask = scan(rng)
    synthesizer = rule_based("liver")
    implant(jax.random.key(99), image, mask, SPACING, size, synthesizer)
    best = np.inf
    for seed in range(5):
        start = time.perf_counter()
        implant(jax.random.key(seed), image, mask, SPACING, size, synthesizer)
        best = min(best, time.perf_counter() - start)
    assert best < 0.1
