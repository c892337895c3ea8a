"""Where tumours go: inside, at the border, beside one another, never in air."""

import cc3d
import jax
import numpy as np
import pytest
from scipy import ndimage

from tumorjax.errors import CaseError, UserError
from tumorjax.synthesis.placement import OrganTooSmall, place

SPACING = (2.0, 1.5, 4.0)


@pytest.fixture
def organ(rng):
    """HU and mask of an ellipsoid organ in a body of soft tissue, on an anisotropic grid."""
    shape = (56, 70, 24)
    grid = np.meshgrid(
        *[(np.arange(n) - n / 2) * s for n, s in zip(shape, SPACING, strict=True)], indexing="ij"
    )
    mask = sum((g / r) ** 2 for g, r in zip(grid, (44, 40, 36), strict=True)) < 1
    image = np.where(mask, 110, 20) + rng.normal(0, 12, shape)
    return image.astype(np.float32), mask


def put(key, image, mask, size=8.0, taken=None, host="liver", **settings):
    lesion = place(
        jax.random.key(key),
        image,
        mask,
        np.zeros_like(mask) if taken is None else taken,
        None,
        SPACING,
        size,
        host,
        "measured",
        "case",
        **settings,
    )
    tumor = np.zeros_like(mask)
    tumor[lesion.box] = lesion.mask
    return tumor


def gaps(tumor, mask):
    """Least number of organ voxels between the tumour and what is not organ, along each axis."""
    found = []
    for axis in range(3):
        reach = 0
        grown = tumor
        line = np.zeros((3, 3, 3), bool)
        line[tuple(slice(None) if a == axis else 1 for a in range(3))] = True
        while True:
            grown = ndimage.binary_dilation(grown, line)
            if (grown & ~mask).any():
                break
            reach += 1
        found.append(reach)
    return found


@pytest.mark.parametrize("margin", [1.0, 5.0, 9.0])
def test_inside_leaves_the_margin_of_organ_along_each_axis(organ, margin):
    image, mask = organ
    for key in range(6):
        left = gaps(put(key, image, mask, 7.0, position="inside", margin_mm=margin), mask)
        assert all(n * s >= margin for n, s in zip(left, SPACING, strict=True))


def test_border_tumours_touch_the_border_and_anywhere_ones_need_not(organ):
    image, mask = organ
    touching = dict.fromkeys(("anywhere", "border"), 0)
    for position in touching:
        for key in range(12):
            tumor = put(key, image, mask, 7.0, position=position)
            assert not (tumor & ~mask).any()
            touching[position] += min(gaps(tumor, mask)) == 0
            assert (tumor.sum() * np.prod(SPACING) * 3 / 4 / np.pi) ** (1 / 3) >= 0.75 * 7.0
    assert touching["border"] == 12
    assert touching["anywhere"] <= 9


def test_kidney_tumours_inside_do_not_stick_out(organ):
    image, mask = organ
    for key in range(8):
        tumor = put(key, image, mask, 12.0, host="kidney", position="inside")
        assert not (tumor & ~mask).any()


def test_of_kidney_tumours_that_stick_out_a_good_part_is_in_the_kidney(organ):
    image, mask = organ
    small = mask.copy()
    small[:18], small[38:] = False, False
    shares = []
    for key in range(16):
        tumor = put(key, image, small, 17.0, host="kidney")
        shares.append((tumor & small).sum() / tumor.sum())
    assert min(shares) >= 0.4
    assert min(shares) < 0.9


def test_several_do_not_overlap_and_keep_their_gap(organ):
    image, mask = organ
    taken = np.zeros_like(mask)
    for key in range(5):
        tumor = put(key, image, mask, 6.0, taken)
        away = ndimage.distance_transform_edt(~taken, sampling=SPACING) if taken.any() else None
        assert away is None or away[tumor].min() > 3
        taken |= tumor
    assert cc3d.connected_components(taken, connectivity=26).max() == 5


def test_nothing_of_a_solid_organ_s_tumour_lies_in_air(organ, rng):
    image, mask = organ
    # A mask that reaches beyond the body: air from the organ's middle on.
    image[28:] = -1000 + rng.normal(0, 12, image[28:].shape)
    for clip in (False, True):
        seen = np.clip(image, -175, 250) if clip else image
        for key in range(6):
            tumor = put(key, seen, mask)
            assert tumor.any()
            assert not tumor[28:].any()


def test_noise_in_fat_leaves_no_holes(organ, rng):
    image, mask = organ
    image = (-100 + rng.normal(0, 30, image.shape)).astype(np.float32)
    assert (image[mask] < -150).any()
    tumor = put(0, image, mask, position="inside")
    assert (ndimage.binary_fill_holes(tumor) == tumor).all()
    assert (tumor.sum() * np.prod(SPACING) * 3 / 4 / np.pi) ** (1 / 3) == pytest.approx(8, rel=0.05)


def test_too_small_an_organ_is_said_with_what_was_asked_for(organ):
    image, mask = organ
    with pytest.raises(OrganTooSmall, match=r"8 mm tumour with 30 mm of organ around it: it needs"):
        put(0, image, mask, position="inside", margin_mm=30.0)
    with pytest.raises(OrganTooSmall, match=r"no place for a 45 mm tumour that touches its border"):
        put(0, image, mask, 45.0, position="border")
    with pytest.raises(CaseError, match="there is no liver"):
        put(0, image, np.zeros_like(mask))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": "outside"}, "position 'outside' is unknown. Expected anywhere, inside"),
        ({"position": "inside", "margin_mm": -1.0}, "margin is -1.0 mm"),
        ({"margin_mm": float("nan")}, "margin is nan mm"),
    ],
)
def test_wrong_use_is_said(organ, settings, message):
    with pytest.raises(UserError, match=message):
        put(0, *organ, **settings)
