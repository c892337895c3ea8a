"""Lesions stay where they touch or are near their organ, and are large enough."""

import numpy as np
import pytest
from scipy import ndimage

from tumorjax.inference.cleanup import Rules, clean

LIVER, KIDNEY, TUMOR, OTHER = 5, 3, 27, 29


@pytest.fixture
def labels():
    """Liver with a lesion inside, one at its face, one 3 voxels away, and one far away."""
    volume = np.zeros((40, 20, 20), np.uint8)
    volume[5:15, 5:15, 5:15] = LIVER
    volume[8:11, 8:11, 8:11] = TUMOR
    volume[15:17, 6:8, 6:8] = TUMOR
    volume[7:9, 7:9, 18:20] = TUMOR
    volume[35:38, 8:11, 8:11] = TUMOR
    return volume


def test_distance_is_between_centres_in_mm_and_touching_is_enough(labels):
    spacing = (1.0, 1.0, 2.5)
    # The third lesion's nearest voxel is 4 slices from the liver's last one.
    for distance, removed in ((0.0, 2), (9.9, 2), (10.0, 1), (19.9, 1), (21.0, 0)):
        result = labels.copy()
        rules = Rules(distance, 0.0, {TUMOR: (LIVER,)})
        assert clean(result, spacing, rules) == {TUMOR: removed}
        assert (result == LIVER).sum() == (labels == LIVER).sum()
        lesions = [(slice(8, 11),) * 3, (slice(15, 17), slice(6, 8), slice(6, 8))]
        lesions += [(slice(7, 9), slice(7, 9), slice(18, 20))] * (removed < 2)
        lesions += [(slice(35, 38), slice(8, 11), slice(8, 11))] * (removed < 1)
        expected = np.where(labels == TUMOR, 0, labels)
        for place in lesions:
            expected[place] = TUMOR
        np.testing.assert_array_equal(result, expected)


def test_without_a_distance_only_size_counts_and_specks_become_their_organ(labels):
    # 27, 8, 8 and 27 voxels of 2 mm^3; exactly the least volume stays.
    rules = Rules(None, 54.0, {TUMOR: (LIVER,)})
    result = labels.copy()
    assert clean(result, (1.0, 1.0, 2.0), rules) == {TUMOR: 2}
    assert (result[15:17, 6:8, 6:8] == LIVER).all()
    assert (result[7:9, 7:9, 18:20] == 0).all()
    assert (result == TUMOR).sum() == 54
    # Without a host nothing is known of organs.
    result = labels.copy()
    clean(result, (1.0, 1.0, 2.0), Rules(None, 54.0, {TUMOR: ()}))
    assert (result[15:17, 6:8, 6:8] == 0).all()


def test_only_the_tumours_own_organs_count(labels):
    labels[labels == LIVER] = KIDNEY
    result = labels.copy()
    assert clean(result, (1, 1, 1), Rules(5.0, 0.0, {TUMOR: (LIVER,)})) == {TUMOR: 4}
    assert not (result == TUMOR).any()
    assert clean(labels, (1, 1, 1), Rules(5.0, 0.0, {TUMOR: (LIVER, KIDNEY)})) == {TUMOR: 1}


def test_every_lesion_is_judged_as_by_a_distance_transform_of_the_whole_scan(rng):
    spacing = (0.8, 1.1, 2.5)
    noise = ndimage.gaussian_filter(rng.standard_normal((40, 36, 24)), 1.5)
    labels = np.zeros(noise.shape, np.uint8)
    labels[noise > np.quantile(noise, 0.85)] = LIVER
    other = ndimage.gaussian_filter(rng.standard_normal(noise.shape), 1.2)
    labels[other > np.quantile(other, 0.93)] = TUMOR
    labels[other < np.quantile(other, 0.05)] = OTHER
    away = ndimage.distance_transform_edt(labels != LIVER, sampling=spacing)
    touching = ndimage.binary_dilation(labels == LIVER, np.ones((3, 3, 3)))
    rules = Rules(3.0, 20.0, {TUMOR: (LIVER,), OTHER: ()})
    result = labels.copy()
    clean(result, spacing, rules)
    components, count = ndimage.label(labels == TUMOR, np.ones((3, 3, 3)))
    kept = 0
    for number in range(1, count + 1):
        lesion = components == number
        near = (touching & lesion).any() or away[lesion].min() <= 3.0
        stays = near and lesion.sum() * np.prod(spacing) >= 20.0
        kept += stays
        value = TUMOR if stays else (LIVER if (touching & lesion).any() else 0)
        assert (result[lesion] == value).all()
    assert 3 < kept < count - 3
    # A tumour without organs cannot be near one.
    assert not (result == OTHER).any()
    unchanged = (labels == LIVER) | (labels == 0)
    np.testing.assert_array_equal(result[unchanged], labels[unchanged])
