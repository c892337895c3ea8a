"""Offsets within a tolerance, and what is near a surface, against all offsets one by one."""

import itertools

import numpy as np
import pytest

from tumorjax.metrics.tolerance import near, pack, reach_table, spans, step_list, unpack

CASES = [
    ((1.0, 1.0, 1.0), 2.0),
    ((0.7, 1.3, 2.9), 3.5),
    ((0.78125, 0.78125, 5.0), 4.0),
    ((0.1, 0.1, 0.1), 0.5),  # 0.5 is 5 steps, and 3 and 4: one rounds to the bound, one above it
    ((3.0, 0.25, 0.4), 1.7),
    ((1.0, 1.0, 1.0), 0.0),
    ((1.0, 2.0, 3.0), np.inf),
]


@pytest.mark.parametrize(("spacing", "tolerance"), CASES)
def test_reach_is_that_of_every_offset_in_double_precision(spacing, tolerance):
    shape = (9, 11, 13)
    reach = reach_table(np.array(spacing), tolerance, shape)
    for dx, dy in itertools.product(range(shape[0]), range(shape[1])):
        within = [
            dz
            for dz in range(shape[2])
            if np.sqrt((dx * spacing[0]) ** 2 + (dy * spacing[1]) ** 2 + (dz * spacing[2]) ** 2)
            <= tolerance
        ]
        inside = dx < reach.shape[0] and dy < reach.shape[1]
        assert (reach[dx, dy] if inside else -1) == max(within, default=-1)


@pytest.mark.parametrize(("spacing", "tolerance"), CASES)
def test_steps_reach_each_offset_once_with_its_own_thickness(spacing, tolerance):
    reach = reach_table(np.array(spacing), tolerance, (6, 7, 8))
    thickness, seen = 0, {}
    for dx, dy, thicken, unite in step_list(reach):
        thickness += thicken
        if unite:
            assert (dx, dy) not in seen
            seen[dx, dy] = thickness
    x, y = np.nonzero(reach >= 0)
    expected = {
        (sx * dx, sy * dy): reach[dx, dy]
        for dx, dy in zip(x, y, strict=True)
        for sx in (1, -1)
        for sy in (1, -1)
    }
    assert seen == expected


@pytest.mark.parametrize("depth", [5, 63, 64, 65, 130])
def test_packing_keeps_every_point(rng, depth):
    points = rng.random((4, 5, depth)) < 0.3
    words = pack(points)
    assert words.shape == (4, 5, -(-depth // 64))
    np.testing.assert_array_equal(unpack(words, depth), points)


@pytest.mark.parametrize(("spacing", "tolerance"), CASES)
def test_what_is_near_is_found_by_trying_every_pair(rng, spacing, tolerance):
    shape = (7, 8, 70)  # more than a word along z
    points = rng.random(shape) < 0.004
    found = unpack(near(pack(points), reach_table(np.array(spacing), tolerance, shape)), shape[2])
    offsets = (np.indices(shape).reshape(3, -1).T[:, None] - np.argwhere(points)) * spacing
    distances = np.sqrt((offsets[..., 0] ** 2 + offsets[..., 1] ** 2) + offsets[..., 2] ** 2)
    np.testing.assert_array_equal(found, (distances.min(axis=1) <= tolerance).reshape(shape))


def test_a_box_is_spanned_from_its_diagonal_on():
    assert spans((3, 4, 12), np.ones(3), 13.1)
    assert not spans((3, 4, 12), np.ones(3), 12.9)
    assert spans((3, 4, 12), np.ones(3), np.inf)
