import itertools
import logging

import cc3d
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tumorjax.metrics import component_kernels
from tumorjax.metrics.components import label_components, remove_small

# scipy's connectivity: how many axes a neighbour may differ in.
RANK = {6: 1, 18: 2, 26: 3}


def same_partition(first, second):
    pairs = np.unique(first.astype(np.int64) * (second.max() + 1) + second)
    return len(pairs) == len(np.unique(first)) == len(np.unique(second))


BACKENDS = ["host", "device"]


def maze(rng, cells):
    """A random tree of corridors one voxel wide that visits every cell, and every third wall."""
    mask = np.zeros(tuple(2 * n + 1 for n in cells), bool)
    path, seen = [(0, 0, 0)], {(0, 0, 0)}
    mask[1, 1, 1] = True
    while path:
        here = path[-1]
        steps = [(axis, sign) for axis in range(3) for sign in (1, -1)]
        beside = [tuple(here[a] + sign * (a == axis) for a in range(3)) for axis, sign in steps]
        fresh = [
            cell
            for cell in beside
            if cell not in seen and all(0 <= c < n for c, n in zip(cell, cells, strict=True))
        ]
        if not fresh:
            path.pop()
            continue
        there = fresh[rng.integers(len(fresh))]
        seen.add(there)
        path.append(there)
        mask[tuple(2 * c + 1 for c in there)] = True
        mask[tuple(a + b + 1 for a, b in zip(here, there, strict=True))] = True
    return mask


def spiral(size):
    """Two arms that wind about each other without touching, in one slice."""
    angle = np.linspace(0, size * 0.5, 40 * size)
    mask = np.zeros((size, size, 3), bool)
    for turn in (0, np.pi):
        radius = angle * 6 / (2 * np.pi)
        x = np.round(size / 2 + radius * np.cos(angle + turn)).astype(int)
        y = np.round(size / 2 + radius * np.sin(angle + turn)).astype(int)
        inside = (x >= 0) & (x < size) & (y >= 0) & (y < size) & (radius > 2)
        mask[x[inside], y[inside], 1] = True
    return mask


def snake(size):
    """Rows joined at alternating ends: a path through half of a plane's voxels."""
    mask = np.zeros((size, size, 2), bool)
    mask[::2, :, 0] = True
    mask[1::4, -1, 0] = mask[3::4, 0, 0] = True
    return mask


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("kind", ["maze", "spiral", "snake", "snake turned", "noise"])
def test_winding_paths_are_followed_to_their_end_in_few_steps(rng, connectivity, kind):
    mask = {
        "maze": lambda: maze(rng, (15, 15, 15)),
        "spiral": lambda: spiral(31),
        "snake": lambda: snake(31),
        "snake turned": lambda: np.ascontiguousarray(snake(31)[::-1, ::-1]),
        "noise": lambda: rng.random((31, 31, 31)) < 0.3,
    }[kind]()
    expected, expected_count = cc3d.connected_components(
        mask, connectivity=connectivity, return_N=True
    )
    for backend in BACKENDS:
        labels, count = label_components(mask, connectivity, backend)
        assert count == expected_count
        assert same_partition(labels, expected)
    # A label that only spread from neighbour to neighbour would take hundreds of steps in a maze.
    padded = np.zeros((32, 32, 32), bool)
    padded[: mask.shape[0], : mask.shape[1], : mask.shape[2]] = mask
    assert component_kernels.number(padded[None], connectivity, np.int32(14))[2][0]


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 15), st.integers(1, 15), st.integers(1, 31)),
    st.floats(0, 1),
    st.floats(0, 2),
    st.sampled_from([6, 18, 26]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_both_backends_give_the_same_labels(seed, shape, share, smoothness, connectivity):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), smoothness)
    mask = noise <= np.quantile(noise, share)
    labels, count = label_components(mask, connectivity, "host")
    expected, _ = ndimage.label(mask, ndimage.generate_binary_structure(3, RANK[connectivity]))
    np.testing.assert_array_equal(labels, expected)  # scipy numbers by first voxels too
    on_device, count_on_device = label_components(jnp.asarray(mask), connectivity, "device")
    np.testing.assert_array_equal(on_device, labels)
    assert count_on_device == count
    assert on_device.dtype == labels.dtype


def test_where_the_steps_are_not_enough_the_host_takes_over_and_says_so(rng, monkeypatch, caplog):
    mask = maze(rng, (7, 7, 7))
    monkeypatch.setattr(component_kernels, "STEPS", 2)
    with caplog.at_level(logging.WARNING):
        labels, count = label_components(mask, 6, "device")
    assert count == 1
    np.testing.assert_array_equal(labels, mask)
    assert "2 steps" in caplog.text
    assert "host" in caplog.text


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_without_voxels_or_objects_has_no_component(backend):
    assert label_components(np.zeros((3, 4, 5), bool), backend=backend)[1] == 0
    assert label_components(np.zeros((0, 4, 5), bool), backend=backend)[1] == 0


def test_all_real_tumours_are_split_as_scipy_splits_them(kits19):
    for case, _ in kits19:
        mask = case == 2
        labels, count = label_components(mask)
        expected, expected_count = ndimage.label(mask, np.ones((3, 3, 3)))
        assert count == expected_count
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.slow
@pytest.mark.parametrize("connectivity", [6, 26])
def test_all_real_kidneys_are_split_alike_on_both_backends(kits19, connectivity):
    for case, _ in kits19:
        expected, expected_count = label_components(case > 0, connectivity, "host")
        labels, count = label_components(case > 0, connectivity, "device")
        assert count == expected_count
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("minimum", [0, 1, 2, 3.5, 20])
def test_components_below_the_minimum_go_and_no_other(rng, minimum):
    mask = rng.random((15, 15, 15)) < 0.1
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(mask, labels, np.arange(count + 1))
    expected = mask & (sizes[labels] >= minimum)
    np.testing.assert_array_equal(remove_small(mask, minimum, backend="device"), expected)
    kept = remove_small(mask, minimum)
    np.testing.assert_array_equal(kept, expected)
    assert not np.shares_memory(kept, mask)


def test_unusable_connectivity_and_shape_are_refused(rng):
    mask = rng.random((4, 4, 4)) < 0.5
    with pytest.raises(ValueError, match="connectivity is 8"):
        label_components(mask, 8)
    with pytest.raises(ValueError, match="backend is 'tpu'"):
        label_components(mask, backend="tpu")
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
