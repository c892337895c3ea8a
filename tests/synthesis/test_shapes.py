"""Shapes against the published generator's figures, the measured tumours and closed forms."""

import csv

import cc3d
import jax
import numpy as np
import pytest

from tumorjax.errors import UserError
from tumorjax.synthesis import shapes


def equivalent_radius(mask, spacing=(1, 1, 1)):
    return (mask.sum() * np.prod(spacing) * 3 / 4 / np.pi) ** (1 / 3)


def axis_ratio(mask, spacing=(1, 1, 1)):
    points = np.argwhere(mask) * np.asarray(spacing)
    return np.sqrt(np.divide(*np.linalg.eigvalsh(np.cov(points.T))[[0, 2]]))


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(7), 120)


@pytest.mark.parametrize(
    ("radius", "low", "high"), [(4, 0.75, 1.25), (8, 0.75, 1.25), (16, 0.75, 1.25), (32, 0.75, 2)]
)
def test_difftumor_volume_is_that_of_its_axes(keys, radius, low, high):
    # Before deformation the geometric mean of three axes lies in [low, high] times the radius and
    # its expected cube is the product of the axes' means. Folds of the deformation change volumes.
    found = [
        equivalent_radius(shapes.tumor_mask(k, radius, (1.0, 1.0, 1.0), "liver")) / radius
        for k in keys[:50]
    ]
    assert low * 0.85 < min(found)
    assert max(found) < high * 1.15
    assert np.mean(np.power(found, 3)) == pytest.approx(((low + high) / 2) ** 3, rel=0.15)


@pytest.mark.parametrize(
    ("size", "expected"), [("medium", (0.66, 0.78, 0.91)), ("large", (0.46, 0.62, 0.84))]
)
def test_difftumor_axes_before_deformation_have_the_published_ratios(keys, size, expected):
    axes = np.array(
        jax.vmap(lambda k: shapes.difftumor_axes(k, shapes.NOMINAL_RADIUS[size]))(
            jax.random.split(keys[0], 4000)
        )
    )
    ratio = axes.min(axis=1) / axes.max(axis=1)
    np.testing.assert_allclose(np.quantile(ratio, [0.1, 0.5, 0.9]), expected, atol=0.015)


def test_difftumor_radii_and_mixes(keys):
    early = np.asarray(shapes.sample_radius(keys[0], "liver", "difftumor", 4000, "early"))
    assert sorted(set(early.tolist())) == [4, 8]
    assert np.mean(early == 4) == pytest.approx(0.5, abs=0.03)
    paper = np.asarray(shapes.sample_radius(keys[0], "kidney", "difftumor", 7000))
    shares = [np.mean(paper == r) for r in (4, 8, 16, 32)]
    np.testing.assert_allclose(shares, [0, 4 / 7, 2 / 7, 1 / 7], atol=0.02)
    assert np.all(np.asarray(shapes.sample_radius(keys[0], "colon", "difftumor", 5, "large")) == 32)


@pytest.mark.parametrize("prior", shapes.PRIORS)
def test_one_key_is_one_shape_at_every_spacing(keys, prior):
    fine = shapes.tumor_mask(keys[3], 16, (1.0, 1.0, 1.0), "pancreas", prior)
    for spacing in ((0.7, 0.7, 2.5), (2.0, 2.0, 2.0), (3.0, 1.5, 5.0)):
        coarse = shapes.tumor_mask(keys[3], 16, spacing, "pancreas", prior)
        assert equivalent_radius(coarse, spacing) == pytest.approx(
            equivalent_radius(fine), rel=0.02
        )
        assert axis_ratio(coarse, spacing) == pytest.approx(axis_ratio(fine), abs=0.05)
        extent = np.array(coarse.shape) * spacing
        assert np.all(np.abs(extent - fine.shape) <= 2 * np.array(spacing) + 2)


@pytest.mark.parametrize("prior", shapes.PRIORS)
def test_mask_is_tight_in_one_piece_and_a_function_of_its_key(keys, prior):
    for k in keys[:15]:
        mask = shapes.tumor_mask(k, 12, (1.5, 1.5, 1.5), "liver", prior)
        assert all(mask.any(axis=others).take([0, -1]).all() for others in ((1, 2), (0, 2), (0, 1)))
        assert cc3d.connected_components(mask, connectivity=26).max() == 1
        np.testing.assert_array_equal(
            mask, shapes.tumor_mask(k, 12, (1.5, 1.5, 1.5), "liver", prior)
        )
    other = shapes.tumor_mask(keys[20], 12, (1.5, 1.5, 1.5), "liver", prior)
    assert other.shape != mask.shape or (other != mask).any()


def test_tumour_below_a_voxel_is_one_voxel(keys):
    assert shapes.tumor_mask(keys[0], 1.0, (5.0, 5.0, 5.0), "liver").sum() == 1


def test_deformation_follows_its_spline(keys):
    # The basis takes the value 1 at its own control point and 0 at the others, sums to 1, and is
    # that of SciPy's mirrored cubic spline in between.
    from scipy import ndimage

    u = np.linspace(-1, 1, 41)
    basis = np.array(shapes._spline_basis(u))
    np.testing.assert_allclose(basis[:, [0, 20, 40]], np.eye(3), atol=1e-6)
    np.testing.assert_allclose(basis.sum(axis=0), 1, atol=1e-6)
    values = np.array([0.3, -1.2, 2.0])
    expected = ndimage.map_coordinates(values, [u + 1], order=3, mode="mirror")
    np.testing.assert_allclose(values @ basis, expected, atol=1e-5)


@pytest.mark.parametrize("organ", shapes.MEASURED)
def test_measured_masks_have_the_volume_of_their_radius(keys, organ):
    for k in keys[:25]:
        mask = shapes.tumor_mask(k, 15, (1.0, 1.0, 1.0), organ, "measured")
        assert equivalent_radius(mask) == pytest.approx(15, rel=0.015)


@pytest.mark.parametrize("organ", shapes.MEASURED)
def test_measured_prior_has_the_quantiles_of_the_lesions(keys, organ, real_data):
    table = real_data.parent / "reference" / "tumour_sizes.csv"
    if not table.is_file():
        pytest.skip(f"no measured sizes at {table}")
    with open(table) as file:
        rows = [row for row in csv.DictReader(file) if row["organ"] == organ]
    assert len(rows) == shapes.MEASURED[organ].lesions
    quantiles = [0.1, 0.25, 0.5, 0.75, 0.9]
    radius = np.quantile([float(row["radius_mm"]) for row in rows], quantiles)
    drawn = np.asarray(shapes.sample_radius(keys[0], organ, "measured", 5000))
    np.testing.assert_allclose(np.quantile(drawn, quantiles), radius, rtol=0.13)
    ratio = np.quantile([float(row["minor_to_major"]) for row in rows], quantiles)
    masks = [shapes.tumor_mask(k, 15, (1.0, 1.0, 1.0), organ, "measured") for k in keys]
    np.testing.assert_allclose(
        np.quantile([axis_ratio(m) for m in masks], quantiles), ratio, atol=0.09
    )


def test_measured_sizes_stay_within_their_group(keys):
    for size, (low, high) in shapes.GROUP_RADIUS.items():
        radius = np.asarray(shapes.sample_radius(keys[1], "colon", "measured", 500, size))
        assert low * 0.999 <= radius.min() < radius.max() <= high * 1.001
        assert {shapes.size_group(r) for r in radius} <= {size, shapes.size_group(low)}


def test_organs_without_measurements_say_whose_they_take():
    assert shapes.prior_used("liver", "measured") == "measured:liver"
    assert shapes.prior_used("esophagus", "measured") == "measured:colon"
    assert shapes.prior_used("uterus", "measured") == "measured:kidney"
    assert shapes.prior_used("uterus", "difftumor") == "difftumor"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: shapes.sample_radius(k, "liver", "guessed"), "prior 'guessed' is unknown"),
        (lambda k: shapes.sample_radius(k, "spleen", "measured"), "no tumours of 'spleen'"),
        (
            lambda k: shapes.sample_radius(k, "liver", "difftumor", 1, "huge"),
            "size 'huge' is unknown",
        ),
        (lambda k: shapes.sample_radius(k, "liver", "difftumor", 1, {"small": 0}), "not usable"),
        (lambda k: shapes.tumor_mask(k, -3, (1, 1, 1), "liver"), "radius is -3"),
        (lambda k: shapes.tumor_mask(k, 5, (1, 0, 1), "liver"), "spacing is"),
    ],
)
def test_wrong_use_is_said(keys, call, message):
    with pytest.raises(UserError, match=message):
        call(keys[0])
