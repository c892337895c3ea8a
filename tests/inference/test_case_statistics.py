"""Numbers of a case are those of its voxels, whatever the file's axes are."""

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from tumorjax.inference.case_statistics import describe, extent_of


@pytest.mark.parametrize("order", ["C", "F"])
def test_extents_are_those_of_a_count(rng, order):
    labels = np.asarray(rng.integers(0, 5, (11, 7, 9)) * 60, np.uint8, order=order)
    labels[:, 3] = 0
    extent = extent_of(labels)
    for value in (0, 60, 120, 180, 240):
        inside = np.argwhere(labels == value)
        assert extent.voxels(value) == len(inside)
        np.testing.assert_allclose(extent.centre(value), inside.mean(axis=0))
        box = extent.box(value)
        assert [side.start for side in box] == inside.min(axis=0).tolist()
        assert [side.stop - 1 for side in box] == inside.max(axis=0).tolist()
    assert extent.voxels(7) == 0


def ball(shape, centre, radius, spacing):
    grid = np.indices(shape).reshape(3, -1).T
    apart = np.linalg.norm((grid - centre) * spacing, axis=1)
    return (apart <= radius).reshape(shape)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL", "AIR"])
def test_a_ball_has_its_volume_diameter_and_place(codes):
    spacing = np.array([0.7, 0.9, 1.5])
    labels = np.zeros((90, 70, 40), np.uint8)
    labels[ball(labels.shape, (30, 40, 20), 15.0, spacing)] = 5
    first, second = ball(labels.shape, (60, 35, 15), 9.0, spacing), (slice(80, 82),) * 1
    labels[first] = 27
    labels[second[0], 10, 10] = 27
    labels[89, 60, 30:32] = 27
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-20, 13, 400)
    there = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    stored = nib.orientations.apply_orientation(labels, there)
    stored_affine = affine @ nib.orientations.inv_ornt_aff(there, labels.shape)
    names = [("liver", 5), ("liver_lesion", 27), ("spleen", 8)]
    found = describe(stored, stored_affine, names, ("liver_lesion",))
    assert found["world"] == "RAS, mm"
    assert found["voxel_mm3"] == pytest.approx(0.945)
    liver, lesion = found["structures"]["liver"], found["structures"]["liver_lesion"]
    assert liver["volume_ml"] == pytest.approx(4 / 3 * np.pi * 15**3 / 1000, rel=0.02)
    np.testing.assert_allclose(liver["centre_mm"], affine[:3, 3] + spacing * (30, 40, 20), atol=0.1)
    assert "lesions" not in liver
    assert not liver["at_border"]
    assert found["structures"]["spleen"] == {
        "voxels": 0, "volume_mm3": 0.0, "volume_ml": 0.0, "centre_mm": None, "at_border": None
    }  # fmt: skip

    assert lesion["lesion_count"] == 3
    assert lesion["voxels"] == (labels == 27).sum()
    big, row, column = lesion["lesions"]
    assert lesion["largest_diameter_mm"] == big["longest_inplane_mm"]
    assert big["longest_inplane_mm"] == pytest.approx(18.0, abs=1.6)
    assert big["sphere_diameter_mm"] == pytest.approx(18.0, abs=0.3)
    np.testing.assert_allclose(big["centre_mm"], affine[:3, 3] + spacing * (60, 35, 15), atol=0.1)
    # Two voxels side by side along x: centres 0.7 mm apart, plus the mean pixel size. Along z a
    # slice shows one voxel alone.
    assert {row["longest_inplane_mm"], column["longest_inplane_mm"]} == {1.5, 0.8}
    at_border = {one["longest_inplane_mm"]: one["at_border"] for one in (row, column)}
    assert at_border == {1.5: False, 0.8: True}
    assert lesion["at_border"]
    mirrored = describe(stored, stored_affine, names, (), world="LPS")
    expected = np.array(liver["centre_mm"]) * (-1, -1, 1)
    np.testing.assert_allclose(mirrored["structures"]["liver"]["centre_mm"], expected)


def test_volumes_of_a_sheared_grid_are_those_of_its_parallelepipeds(rng):
    labels = (ndimage.gaussian_filter(rng.standard_normal((20, 20, 20)), 2) > 0).astype(np.uint8)
    affine = np.array([[0.8, 0, 0, 1], [0, 0.9, 0.7, 2], [0, 0, 2.5, 3], [0, 0, 0, 1]])
    found = describe(labels, affine, [("liver", 1)], ())["structures"]["liver"]
    assert found["volume_mm3"] == pytest.approx(labels.sum() * 0.8 * 0.9 * 2.5)
