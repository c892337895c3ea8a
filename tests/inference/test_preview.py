"""The picture shows the right slices, the patient's right on the left, and a scale."""

import io

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest

from tumorjax.inference.preview import Shown, preview

LIVER, TUMOR = 5, 27
STRUCTURES = [Shown("liver", LIVER, False, 3.2), Shown("liver_lesion", TUMOR, True, 0.4)]
ORANGE = np.array([0xF0, 0xA3, 0x0A]) / 255


def picture(data):
    return matplotlib.image.imread(io.BytesIO(data))[..., :3]


def parts(shown, color):
    """Where a colour is, as (rows, columns), above the legend."""
    near = np.abs(shown[: int(shown.shape[0] * 0.85)] - color).max(axis=-1) < 0.08
    return np.nonzero(near)


@pytest.fixture
def case(rng):
    """A body with a liver on the patient's right, a tumour in front of it and one speck."""
    image = np.full((120, 90, 60), -1000, np.int16)
    image[10:110, 10:80, 5:55] = rng.integers(-20, 20, (100, 70, 50))
    labels = np.zeros(image.shape, np.uint8)
    labels[70:100, 30:60, 20:45] = LIVER
    labels[80:90, 62:74, 30:40] = TUMOR
    labels[20, 20, 50] = TUMOR
    image[labels == LIVER] = 100
    return image, labels, np.diag([1.5, 1.5, 2.0, 1.0])


def test_the_patients_right_is_on_the_left_in_every_orientation(case):
    image, labels, affine = case
    pictures = []
    for codes in ("RAS", "LPS", "SPL"):
        there = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
        )
        stored = [nib.orientations.apply_orientation(one, there) for one in (image, labels)]
        turned = affine @ nib.orientations.inv_ornt_aff(there, image.shape)
        pictures.append(preview("a", *stored, turned, STRUCTURES))
    shown = picture(pictures[0])
    for other in pictures[1:]:
        np.testing.assert_array_equal(picture(other), shown)
    height, width = shown.shape[:2]
    assert width == 1320
    assert 300 < height < 1000
    rows, columns = parts(shown, ORANGE)
    # Widths of the planes: 180 mm (x), 180 mm (x), 135 mm (y).
    axial = columns < 0.36 * width
    sagittal = columns > 0.73 * width
    assert axial.any()
    assert sagittal.any()
    # x 80..90 of 120 lies on the patient's right: in the left third of the axial plane.
    assert 0.04 * width < columns[axial].min()
    assert columns[axial].max() < 0.36 / 2 * width
    # In front: in the axial plane's upper part, in the sagittal plane's left half.
    assert rows[axial].max() < height / 2
    assert columns[sagittal].max() < (0.73 + 0.27 / 2) * width


def test_outlines_are_to_scale(case):
    image, labels, affine = case
    shown = picture(preview("a", image, labels, affine, STRUCTURES))
    rows, columns = parts(shown, ORANGE)
    axial = columns < 0.36 * shown.shape[1]
    wide = np.ptp(columns[axial])
    high = np.ptp(rows[axial])
    # 10 voxels of 1.5 mm across, 12 up; lines are about 3 pixels wide.
    assert (high - 2) / (wide - 2) == pytest.approx(12 / 10, abs=0.12)
    white = (np.abs(shown - 1).max(axis=-1) < 0.02)[:, : int(0.36 * shown.shape[1])]
    runs = [len(run) for row in white for run in "".join("x" if p else " " for p in row).split()]
    # The bar of 50 mm against the tumour's 15 mm.
    assert max(runs) / (wide - 2) == pytest.approx(50 / 15, rel=0.12)


def test_planes_go_through_the_largest_lesion(case):
    image, labels, affine = case
    # A thin plate has fewer voxels than the block, and more of them in its own sagittal slice.
    labels[20, 12:42, 10:45] = TUMOR
    assert (labels[20] == TUMOR).sum() > (labels[85] == TUMOR).sum()
    shown = picture(preview("a", image, labels, affine, STRUCTURES))
    _, columns = parts(shown, ORANGE)
    sagittal = columns > 0.73 * shown.shape[1]
    wide = np.ptp(columns[sagittal]) / (0.27 * shown.shape[1])
    # The block is 12 of 90 voxels wide there, the plate would be 30.
    assert 10 / 90 < wide < 15 / 90


def test_nothing_found_is_shown_without_outlines(case):
    image, labels, affine = case
    nothing = picture(preview("a", image, np.zeros_like(labels), affine, STRUCTURES))
    assert not len(parts(nothing, ORANGE)[0])
    without_tumour = np.where(labels == TUMOR, 0, labels)
    shown = picture(preview("a", image, without_tumour, affine, STRUCTURES))
    assert not len(parts(shown, ORANGE)[0])
    assert not np.array_equal(shown, nothing)
