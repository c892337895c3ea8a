"""Label files are united by a fixed order, and sides are told apart by the body's middle."""

import nibabel as nib
import numpy as np
import pytest

from data_prep.labels import read_labels, split_sides
from data_prep.sources import LabelFile
from tumorjax.anatomy import LABELS
from tumorjax.errors import CaseError

AFFINE = np.diag([-0.8, 0.8, 2.5, 1.0])
SHAPE = (12, 10, 8)


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def binary(folder, name, mask, value=1):
    path = save(folder / f"{name}.nii.gz", mask.astype(np.uint8) * np.uint8(value))
    return LabelFile(path, {1: name, 255: name})


def test_tumours_hide_organs_and_vessels_hide_the_organ_around_them(tmp_path, rng):
    masks = {name: rng.random(SHAPE) < 0.4 for name in
             ("liver", "hepatic_vessel", "liver_lesion", "spleen")}  # fmt: skip
    expected = np.zeros(SHAPE, np.uint8)
    for name in ("liver", "spleen", "hepatic_vessel", "liver_lesion"):
        expected[masks[name]] = LABELS[name]
    for order in (list(masks), list(masks)[::-1]):
        files = [binary(tmp_path, name, masks[name], 255) for name in order]
        np.testing.assert_array_equal(read_labels(files, SHAPE, AFFINE), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_values_are_mapped_whatever_their_type(tmp_path, rng, dtype):
    labels = rng.integers(0, 4, SHAPE)
    path = save(tmp_path / "l.nii.gz", labels.astype(dtype))
    names = {1: "pancreas", 2: "pancreatic_lesion", 3: ""}
    united = read_labels([LabelFile(path, names)], SHAPE, AFFINE)
    np.testing.assert_array_equal(united, np.array([0, 6, 28, 0])[labels])
    assert united.dtype == np.uint8


def test_pairs_become_sides_about_the_bodys_middle(tmp_path, rng):
    image = np.full((60, 20, 20), -1000.0)
    image[18:58] = 40  # the body lies to the right of the grid's middle
    label = np.zeros(image.shape, np.uint8)
    label[20:26, 5:9, 5:9] = 1
    label[50:55, 5:9, 5:9] = 1
    label[33:36, 5:9, 14:18] = 1  # left of the body's middle (37.5), right of the grid's (29.5)
    label[52, 7, 7] = 2
    affine = np.eye(4)
    path = save(tmp_path / "l.nii.gz", label, affine)
    files = [LabelFile(path, {1: "kidney", 2: "kidney_lesion"})]
    united = split_sides(read_labels(files, image.shape, affine), image)
    expected = np.where(label == 2, LABELS["kidney_lesion"], 0)
    expected[(label == 1) & (np.arange(60)[:, None, None] < 37.5)] = LABELS["kidney_left"]
    expected[(label == 1) & (np.arange(60)[:, None, None] > 37.5)] = LABELS["kidney_right"]
    np.testing.assert_array_equal(united, expected)


def test_a_tumour_hides_a_pair(tmp_path):
    both = np.ones(SHAPE, bool)
    files = [binary(tmp_path, "kidney_lesion", both), binary(tmp_path, "kidney", both)]
    assert (read_labels(files, SHAPE, AFFINE) == LABELS["kidney_lesion"]).all()


def moved(x):
    affine = AFFINE.copy()
    affine[0, 3] += x
    return affine


@pytest.mark.parametrize(
    ("array", "affine", "words"),
    [
        (np.full(SHAPE, 7, np.uint8), AFFINE, "unknown label values 7; known are 0, 1"),
        (np.full(SHAPE, 1.5, np.float32), AFFINE, "not whole numbers"),
        (np.full(SHAPE, -1, np.int16), AFFINE, "not whole numbers"),
        (np.full(SHAPE, 300, np.int16), AFFINE, "not whole numbers"),
        (np.full(SHAPE, np.nan, np.float32), AFFINE, "not whole numbers"),
        (np.ones((12, 10, 9), np.uint8), AFFINE, "shape 12x10x9, image 12x10x8"),
        (np.ones((12, 10, 8, 1), np.uint8), AFFINE, "shape 12x10x8x1"),
        (np.ones(SHAPE, np.uint8), moved(0.5), "corners lie up to 0.50 mm apart"),
        (np.ones(SHAPE, np.uint8), np.diag([0.8, 0.8, 2.5, 1]), "corners lie up to 17.60 mm"),
        (np.ones(SHAPE, np.complex64), AFFINE, "values of type complex64"),
    ],
)
def test_label_files_that_do_not_fit(tmp_path, array, affine, words):
    path = save(tmp_path / "liver.nii.gz", array, affine)
    with pytest.raises(CaseError, match=words) as error:
        read_labels([LabelFile(path, {1: "liver"})], SHAPE, AFFINE)
    assert error.value.case == "liver.nii.gz"


def test_label_files_that_cannot_be_read(tmp_path, rng):
    whole = save(tmp_path / "liver.nii.gz", rng.integers(0, 2, SHAPE).astype(np.uint8))
    data = whole.read_bytes()
    for content, words in ((b"", "empty"), (data[: len(data) // 2], "not readable to its end"),
                           (b"patient", "not readable to its end")):  # fmt: skip
        whole.write_bytes(content)
        with pytest.raises(CaseError, match=words) as error:
            read_labels([LabelFile(whole, {1: "liver"})], SHAPE, AFFINE)
        assert "patient" not in str(error.value)


def test_rounding_of_affines_is_no_other_grid(tmp_path, rng):
    labels = rng.integers(0, 2, SHAPE).astype(np.uint8)
    path = save(tmp_path / "l.nii.gz", labels, moved(0.01))
    read_labels([LabelFile(path, {1: "liver"})], SHAPE, AFFINE)
    path = save(tmp_path / "m.nii.gz", labels[..., None], AFFINE)
    united = read_labels([LabelFile(path, {1: "liver"})], SHAPE, AFFINE, allow_channel=True)
    np.testing.assert_array_equal(united, labels * 5)
