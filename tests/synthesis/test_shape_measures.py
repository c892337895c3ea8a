"""Measures of masks against closed forms and against the table of real tumours."""

import csv

import nibabel as nib
import numpy as np
import pytest

from tumorjax.synthesis.shape_measures import measure


def ellipsoid(axes, spacing, bump=0.0):
    """An ellipsoid along the grid, its surface moved by the share `bump` of cos(3 phi)."""
    shape = [int(2 * a * 1.4 / s) + 4 for a, s in zip(axes, spacing, strict=True)]
    grid = np.meshgrid(
        *[(np.arange(n) - n / 2 + 0.3) * s for n, s in zip(shape, spacing, strict=True)],
        indexing="ij",
    )
    q = [g / a for g, a in zip(grid, axes, strict=True)]
    radius = np.sqrt(sum(part**2 for part in q))
    return radius < np.exp(bump * np.cos(3 * np.arctan2(q[1], q[0])))


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (0.4, 0.6, 1.0)])
def test_ellipsoids(spacing):
    axes = (12.0, 8.0, 6.0)
    found = measure(ellipsoid(axes, spacing), spacing)
    assert found.volume_mm3 == pytest.approx(4 / 3 * np.pi * np.prod(axes), rel=0.01)
    assert found.radius_mm == pytest.approx(np.prod(axes) ** (1 / 3), rel=0.005)
    assert found.minor_to_major == pytest.approx(0.5, abs=0.01)
    assert found.middle_to_major == pytest.approx(8 / 12, abs=0.01)
    assert found.longest_inplane_mm == pytest.approx(24, abs=0.7)
    # Nothing but the voxels' own steps.
    assert found.roughness < 0.03


def test_roughness_of_a_known_surface():
    found = [
        measure(ellipsoid((14.0, 14.0, 14.0), (0.5,) * 3, bump), (0.5,) * 3) for bump in (0.1, 0.2)
    ]
    # cos has a deviation of 1 / sqrt(2); area and moments follow the bumps by some per cent.
    assert [m.roughness for m in found] == pytest.approx([0.0707, 0.1414], rel=0.1)


def test_a_voxel_is_a_box():
    found = measure(np.ones((1, 1, 1), bool), (1.0, 2.0, 4.0))
    assert (found.minor_to_major, found.middle_to_major) == pytest.approx((0.25, 0.5))
    assert found.volume_mm3 == 8
    with pytest.raises(ValueError, match="empty"):
        measure(np.zeros((2, 2, 2), bool), (1.0, 1.0, 1.0))


def test_real_masks_measure_what_the_table_says(real_data):
    with open(real_data.parent / "reference" / "tumour_sizes.csv") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    seen = 0
    for file in sorted((real_data / "uls23").glob("pancreas_*.nii.gz")):
        row = rows.get(file.name.removesuffix(".nii.gz").split("_", 1)[1])
        if row is None:
            continue
        image = nib.as_closest_canonical(nib.load(file))
        spacing = tuple(float(s) for s in image.header.get_zooms()[:3])
        found = measure(np.asarray(image.dataobj) > 0, spacing)
        assert found.radius_mm == pytest.approx(float(row["radius_mm"]), abs=0.02)
        assert found.longest_inplane_mm == pytest.approx(float(row["longest_inplane_mm"]), abs=0.02)
        assert found.minor_to_major == pytest.approx(float(row["minor_to_major"]), abs=0.02)
        assert found.middle_to_major == pytest.approx(float(row["middle_to_major"]), abs=0.02)
        seen += 1
    assert seen >= 8
