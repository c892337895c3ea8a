import itertools

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from tumorjax.metrics.components import label_components, remove_small
from tumorjax.metrics.surface import bounding_box

# scipy's connectivity: how many axes a neighbour may differ in.
RANK = {6: 1, 18: 2, 26: 3}


def same_partition(first, second):
    pairs = np.unique(first.astype(np.int64) * (second.max() + 1) + second)
    return len(pairs) == len(np.unique(first)) == len(np.unique(second))


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
def test_noise_is_split_as_scipy_splits_it(rng, connectivity, density):
    mask = rng.random((23, 17, 29)) < density
    labels, count = label_components(mask, connectivity)
    structure = ndimage.generate_binary_structure(3, RANK[connectivity])
    expected, expected_count = ndimage.label(mask, structure)
    assert count == expected_count
    assert same_partition(labels, expected)
    assert set(np.unique(labels)) == set(range(count + 1))


def test_slices_in_any_memory_order_are_split_alike(rng):
    mask = rng.random((20, 18, 16)) < 0.2
    part = mask[2:-3, 1::2, 4:].transpose(2, 0, 1)
    labels, count = label_components(part, 18)
    expected, expected_count = ndimage.label(part, ndimage.generate_binary_structure(3, 2))
    assert count == expected_count
    assert same_partition(labels, expected)


def test_two_voxels_that_share_a_corner_are_one_at_26_only():
    mask = np.zeros((4, 4, 4), bool)
    mask[1, 1, 1] = mask[2, 2, 2] = True
    assert [label_components(mask, c)[1] for c in (6, 18, 26)] == [2, 2, 1]
    mask[1, 1, 1], mask[1, 2, 2] = False, False
    mask[1, 2, 1] = True  # shares an edge
    assert [label_components(mask, c)[1] for c in (6, 18, 26)] == [2, 1, 1]


def test_a_mask_without_voxels_or_objects_has_no_component():
    assert label_components(np.zeros((3, 4, 5), bool))[1] == 0
    assert label_components(np.zeros((0, 4, 5), bool))[1] == 0


def test_real_tumours_are_split_as_scipy_splits_them(real_data):
    for name in ("case_00010", "case_00076", "case_00168"):
        mask = np.asarray(nib.load(real_data / "kits19" / f"{name}.nii.gz").dataobj) > 0
        mask = mask[bounding_box(mask)]
        labels, count = label_components(mask)
        expected, expected_count = ndimage.label(mask, np.ones((3, 3, 3)))
        assert count == expected_count
        assert same_partition(labels, expected)


@pytest.mark.parametrize("minimum", [0, 1, 2, 3.5, 20])
def test_components_below_the_minimum_go_and_no_other(rng, minimum):
    mask = rng.random((15, 15, 15)) < 0.1
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(mask, labels, np.arange(count + 1))
    expected = mask & (sizes[labels] >= minimum)
    kept = remove_small(mask, minimum)
    np.testing.assert_array_equal(kept, expected)
    assert not np.shares_memory(kept, mask)


def test_unusable_connectivity_and_shape_are_refused(rng):
    mask = rng.random((4, 4, 4)) < 0.5
    with pytest.raises(ValueError, match="connectivity is 8"):
        label_components(mask, 8)
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        label_components(mask[0])


@pytest.mark.parametrize("connectivity", [6, 18, 26])
def test_masks_of_a_few_voxels_are_split_as_scipy_splits_them(rng, connectivity):
    # A box about two lesions in one row is a line of voxels, on which cc3d itself can fail.
    structure = ndimage.generate_binary_structure(3, RANK[connectivity])
    for shape in itertools.product((1, 2, 3, 5), repeat=3):
        for _ in range(5):
            whole = rng.random((7, 8, 9)) < rng.random()
            part = whole[tuple(slice(1, 1 + size) for size in shape)]
            for mask in (part, np.ascontiguousarray(part), np.asfortranarray(part)):
                labels, count = label_components(mask, connectivity)
                expected, expected_count = ndimage.label(mask, structure)
                assert count == expected_count, (shape, mask)
                assert same_partition(labels, expected)
