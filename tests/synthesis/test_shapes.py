"""Shapes against the published generator's figures, the measured tumours and closed forms."""

import csv
import os
from pathlib import Path

import cc3d
import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy.stats import ks_2samp

from tumorjax.errors import UserError
from tumorjax.synthesis import shapes
from tumorjax.synthesis.shape_measures import measure


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


def shapes_of_stack(organs, prior="measured"):
    return jax.tree.map(lambda *n: jnp.stack(n), *[shapes.shape_prior(o, prior) for o in organs])


@pytest.mark.parametrize("prior", shapes.PRIORS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 3.0), (2.5, 1.2, 2.0)])
def test_a_level_sampled_on_a_grid_is_the_mask_of_its_key(keys, prior, spacing):
    # The mask of tumor_mask lies between voxel centres by an offset of its own.
    mask = shapes.tumor_mask(keys[4], 11, spacing, "pancreas", prior)
    offset = np.asarray(shapes._grid_offset(jax.random.fold_in(keys[4], 1 << 20)))
    numbers = shapes.shape_prior("pancreas", prior)
    shape = tuple(int(np.ceil(70 / s)) for s in spacing)
    centre = np.array(shape) // 2 - offset
    level = shapes.sample_level(keys[4], 11.0, numbers, shape, spacing, centre)
    found = np.asarray(level) < 0
    box = tuple(slice(w.min(), w.max() + 1) for w in np.nonzero(found))
    np.testing.assert_array_equal(found[box], mask)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 4.0), (3.0, 1.5, 2.0)])
@pytest.mark.parametrize("organ", shapes.MEASURED)
def test_sizes_requested_are_sizes_made(organ, spacing):
    shape = tuple(int(np.ceil(110 / s)) for s in spacing)
    numbers = shapes.shape_prior(organ, "measured")
    draw = jax.jit(
        lambda key, radius: jnp.sum(
            shapes.sample_level(key, radius, numbers, shape, spacing, np.array(shape) / 2) < 0
        )
    )
    for seed, radius in enumerate((8.0, 11.0, 16.0)):
        volume = float(draw(jax.random.key(seed), radius)) * np.prod(spacing)
        assert volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.1)


@pytest.mark.parametrize("prior", shapes.PRIORS)
def test_levels_are_equal_under_jit_and_vmap_over_organs(keys, prior):
    organs = ("liver", "colon", "kidney")
    stacked = shapes_of_stack(organs, prior)
    radius = jnp.array([6.0, 9.0, 12.0])
    spacing = jnp.array([[2.0, 2.0, 2.0], [1.0, 2.0, 3.0], [2.5, 2.0, 1.5]])
    centre = jnp.array([[12.0, 12.0, 12.0], [10.5, 13.0, 9.0], [4.0, 20.0, 12.2]])

    def level(key, radius, numbers, spacing, centre):
        return shapes.sample_level(key, radius, numbers, (24, 24, 24), spacing, centre)

    together = jax.jit(jax.vmap(level))(keys[:3], radius, stacked, spacing, centre)
    for i, organ in enumerate(organs):
        alone = level(
            keys[i], float(radius[i]), shapes.shape_prior(organ, prior), spacing[i], centre[i]
        )
        # In semi-axes: a thousandth of them is far below a voxel.
        np.testing.assert_allclose(together[i], alone, atol=1e-3)
        assert alone.min() < 0 < alone.max()
        again = level(
            keys[i], float(radius[i]), shapes.shape_prior(organ, prior), spacing[i], centre[i]
        )
        np.testing.assert_array_equal(alone, again)


def test_radii_of_several_organs_are_drawn_under_vmap(keys):
    organs = ("liver", "pancreas")
    stacked = jax.tree.map(
        lambda *n: jnp.stack(n), *[shapes.radius_prior(o, "measured", "early") for o in organs]
    )
    drawn = jax.vmap(lambda k, p: shapes.draw_radius(k, p, 50))(keys[:2], stacked)
    for i, organ in enumerate(organs):
        alone = shapes.sample_radius(keys[i], organ, "measured", 50, "early")
        np.testing.assert_allclose(drawn[i], alone, rtol=1e-5)
        assert drawn[i].min() >= 2
        assert drawn[i].max() <= 10


def test_legendre_series_of_the_roughness():
    from scipy.special import eval_legendre

    rng = np.random.default_rng(3)
    towards, unit = (x / np.linalg.norm(x, axis=0) for x in rng.normal(size=(2, 3, 16)))
    coefficients = rng.normal(size=(9, 16))
    expected = sum(
        (coefficients[degree] * eval_legendre(degree, unit.T @ towards)).sum(axis=1)
        for degree in range(9)
    )
    found = shapes._field(jnp.asarray(towards), jnp.asarray(coefficients), jnp.asarray(unit.T))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_roughness_is_the_deviation_of_the_surface(keys):
    sphere = jnp.asarray(shapes._sphere(1024))
    drawn = jax.vmap(lambda k: shapes._field(*shapes._zonal(k, 0.2), sphere))(
        jax.random.split(keys[0], 400)
    )
    assert float(jnp.sqrt(jnp.mean(drawn**2))) == pytest.approx(0.2, rel=0.05)
    # No part of it moves the tumour: the first moment over the sphere vanishes.
    assert float(jnp.abs(jnp.mean(drawn[..., None] * sphere, axis=1)).max()) < 1e-3


@pytest.fixture(scope="module")
def measured_rows(real_data_or_none):
    if real_data_or_none is None:
        pytest.skip("no measured tumours; set TUMORJAX_DATA to their folder")
    with open(real_data_or_none.parent / "reference" / "tumour_sizes.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def real_data_or_none():
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("TUMORJAX_DATA", root.parent / "shared" / "data"))
    return folder if (folder.parent / "reference" / "tumour_sizes.csv").is_file() else None


@pytest.mark.parametrize("organ", shapes.MEASURED)
def test_measured_radii_are_those_of_the_lesions_by_ks(keys, organ, measured_rows):
    real = [float(row["radius_mm"]) for row in measured_rows if row["organ"] == organ]
    drawn = np.asarray(shapes.sample_radius(keys[0], organ, "measured", 4000))
    assert ks_2samp(real, drawn).pvalue > 0.05


@pytest.mark.parametrize("organ", shapes.MEASURED)
def test_measured_numbers_are_those_of_the_scans_by_ks(keys, organ, measured_rows):
    counts = {}
    for row in measured_rows:
        if row["organ"] == organ:
            scan, _, rest = row["case"].partition("_lesion_")
            counts[scan] = max(counts.get(scan, 0), int(rest.split("_")[0]))
    drawn = np.asarray(shapes.sample_number(keys[0], organ, "measured", count=4000))
    assert drawn.min() == 1
    assert ks_2samp(list(counts.values()), drawn).pvalue > 0.05


def test_difftumor_numbers(keys):
    small = np.asarray(shapes.sample_number(keys[0], "liver", "difftumor", "small", 600))
    assert sorted(set(small.tolist())) == [1, 2, 3]
    assert set(np.asarray(shapes.sample_number(keys[0], "liver", size="large", count=50))) == {1}
    with pytest.raises(UserError, match="size 'huge' is unknown"):
        shapes.sample_number(keys[0], "liver", size="huge")


@pytest.mark.slow
@pytest.mark.parametrize("organ", shapes.MEASURED)
def test_measured_axes_are_those_of_the_lesions_by_ks(organ, measured_rows):
    rows = [row for row in measured_rows if row["organ"] == organ]
    made = [
        measure(
            shapes.tumor_mask(jax.random.key(i), 15, (1.5, 1.5, 1.5), organ, "measured"),
            (1.5, 1.5, 1.5),
        )
        for i in range(200)
    ]
    for name in ("minor_to_major", "middle_to_major"):
        real = [float(row[name]) for row in rows]
        assert ks_2samp(real, [getattr(m, name) for m in made]).pvalue > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("organ", shapes.MEASURED)
def test_measured_roughness_is_that_of_the_masks_by_ks(organ, measured_rows, real_data_or_none):
    real, made = [], []
    for file in sorted((real_data_or_none / "uls23").glob(f"{organ}_*.nii.gz")):
        image = nib.as_closest_canonical(nib.load(file))
        spacing = tuple(float(s) for s in image.header.get_zooms()[:3])
        found = measure(np.asarray(image.dataobj) > 0, spacing)
        if found.radius_mm > 45:
            continue  # Two of 64, whose masks take as long as all others.
        real.append(found.roughness)
        for seed in range(3):
            key = jax.random.key(100 * len(real) + seed)
            mask = shapes.tumor_mask(key, found.radius_mm, spacing, organ, "measured")
            made.append(measure(mask, spacing).roughness)
    assert len(real) >= 14
    assert ks_2samp(real, made).pvalue > 0.05
