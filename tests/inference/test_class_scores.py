"""Labels and probabilities on a scan's own grid are those of interpolating every class."""

import tracemalloc

import numpy as np
import pytest
from scipy.special import softmax

from tumorjax import geometry
from tumorjax.inference import class_scores, nnunet_resampling
from tumorjax.inference.native_grid import argmax_on_grid, native_probabilities

CLASSES = 6
OLD = (30, 34, 28)
# Growing, staying, shrinking, and all three at once.
SHAPES = [(71, 66, 60), OLD, (7, 5, 12), (60, 34, 11), (23, 80, 19)]


def organs(rng, noise=0.3):
    """Logits of blocks that are sure of themselves, as a network's are, and rare classes."""
    labels = rng.integers(0, CLASSES, (4, 4, 4)).repeat(9, 0).repeat(9, 1).repeat(9, 2)
    labels = labels[tuple(slice(0, size) for size in OLD)]
    labels[labels == 3] = 0
    labels[4:6, 7:9, 20:22] = 3
    logits = 10.0 * (labels == np.arange(CLASSES)[:, None, None, None])
    logits[2] += 6 * rng.random(OLD)  # often the second best: it may win between two others
    return (logits + noise * rng.standard_normal(logits.shape)).astype(np.float32)


def every(scores, shape):
    return np.array([geometry.resample_to_shape(score, shape, 1) for score in scores])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["organs", "noise", "probabilities"])
def test_labels_are_those_of_all_classes_at_once(rng, shape, kind):
    scores = organs(rng) if kind != "noise" else rng.standard_normal((CLASSES, *OLD), np.float32)
    if kind == "probabilities":
        scores = softmax(scores, axis=0)
    all_classes = every(scores, shape)
    found = argmax_on_grid(scores.transpose(1, 2, 3, 0), shape)
    assert found.dtype == np.uint8
    # Two scores that differ by less than float32 can tell have no order.
    margin = np.diff(np.sort(all_classes, axis=0)[-2:], axis=0)[0]
    sure = margin > 1e-5 * np.abs(all_classes).max()
    np.testing.assert_array_equal(found[sure], all_classes.argmax(0)[sure])
    assert sure.mean() > 0.999
    assert set(np.unique(found)) >= {0, 1, 2, 4, 5}


@pytest.mark.parametrize("block", [5, 32, 100])
def test_block_size_and_memory_layout_change_nothing(rng, monkeypatch, block):
    scores = organs(rng)
    expected = argmax_on_grid(scores.transpose(1, 2, 3, 0), (71, 20, 60))
    monkeypatch.setattr(class_scores, "BLOCK", block)
    channels_last = np.ascontiguousarray(scores.transpose(1, 2, 3, 0))
    fortran = np.asfortranarray(channels_last)
    for layout in (channels_last, fortran):
        found = argmax_on_grid(layout, (71, 20, 60))
        assert (found != expected).mean() < 1e-4
    half = scores.astype(np.float16)
    expected = argmax_on_grid(half.astype(np.float32).transpose(1, 2, 3, 0), (71, 20, 60))
    np.testing.assert_array_equal(
        argmax_on_grid(half.transpose(1, 2, 3, 0), (71, 20, 60)), expected
    )


def test_labels_are_those_of_torchs_interpolation(rng):
    functional = pytest.importorskip("torch.nn.functional")
    torch = pytest.importorskip("torch")
    scores, shape = organs(rng), (71, 66, 60)
    values = functional.interpolate(torch.from_numpy(scores)[None], shape, mode="trilinear")[0]
    values = values.numpy()
    sure = np.diff(np.sort(values, axis=0)[-2:], axis=0)[0] > 1e-4
    found = argmax_on_grid(scores.transpose(1, 2, 3, 0), shape)
    np.testing.assert_array_equal(found[sure], values.argmax(0)[sure])
    assert sure.mean() > 0.999


def test_of_equal_scores_the_first_class_wins(rng):
    scores = organs(rng, noise=0).astype(np.float32)
    twice = np.concatenate([scores, scores])
    one, two = (argmax_on_grid(s.transpose(1, 2, 3, 0), (40, 41, 42)) for s in (scores, twice))
    np.testing.assert_array_equal(one, two)


def test_most_blocks_of_a_scan_need_no_interpolation(rng, monkeypatch):
    scores = np.full((CLASSES, 120, 90, 90), -4.0, np.float32)
    scores[0] = 4
    scores[:2, 50:60, 30:60, 30:60] *= -1
    scores += rng.normal(0, 0.2, scores.shape).astype(np.float32)
    interpolated, count = class_scores._interpolated, []

    def counting(*arguments):
        count.append(1)
        return interpolated(*arguments)

    monkeypatch.setattr(class_scores, "_interpolated", counting)
    found = argmax_on_grid(scores.transpose(1, 2, 3, 0), (240, 180, 180))
    assert 0 < len(count) <= 2 * 3**3
    assert np.mean(found == 1) == pytest.approx(10 * 30 * 30 / (120 * 90 * 90), rel=0.1)
    assert set(np.unique(found)) == {0, 1}


def test_memory_is_that_of_the_result_and_some_blocks(rng):
    scores, shape = rng.standard_normal((24, 40, 40, 40), np.float32), (160, 160, 160)
    tracemalloc.start()
    result = argmax_on_grid(scores.transpose(1, 2, 3, 0), shape)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    slabs = [
        (rows, slab.shape)
        for rows, slab in native_probabilities(
            scores.transpose(1, 2, 3, 0), shape, [3, 7], logits=True
        )
    ]
    _, peak_of_slabs = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    all_classes = 4 * 24 * result.size
    assert peak < result.nbytes + 0.05 * all_classes
    assert peak_of_slabs < result.nbytes + 0.15 * all_classes
    assert [rows.start for rows, _ in slabs] == [0, 32, 64, 96, 128]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("logits", [True, False])
def test_probabilities_of_chosen_classes(rng, shape, logits):
    scores = organs(rng)
    if not logits:
        scores = softmax(scores, axis=0)
    expected = every(scores, shape)
    if logits:
        expected = softmax(expected, axis=0)
    found = np.full((3, *shape), np.nan, np.float16)
    end = 0
    for rows, slab in native_probabilities(scores.transpose(1, 2, 3, 0), shape, [3, 0, 5], logits):
        assert rows.start == end
        end = rows.stop
        found[:, rows] = slab
    assert end == shape[0]
    np.testing.assert_allclose(found, expected[[3, 0, 5]], rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize("axis", [None, 2])
def test_probabilities_the_way_of_nnunet(rng, axis):
    scores, shape = organs(rng), (40, 50, 60)
    resampled = np.array([nnunet_resampling.resample(s, shape, axis, 1, 0) for s in scores])
    found = np.concatenate(
        [
            slab
            for _, slab in nnunet_resampling.probabilities(
                scores.transpose(1, 2, 3, 0), shape, axis, [1, 4]
            )
        ],
        axis=1,
    )
    expected = softmax(resampled, axis=0)[[1, 4]]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-7)
    sure = np.diff(np.sort(resampled, axis=0)[-2:], axis=0)[0] > 1e-4
    labels = nnunet_resampling.winners(scores.transpose(1, 2, 3, 0), shape, axis)
    np.testing.assert_array_equal(labels[sure], resampled.argmax(0)[sure])


def test_weights_that_overshoot_are_refused():
    matrix = nnunet_resampling.spline_matrix(9, 14, 3)
    scores = np.ones((9, 9, 9, 2), np.float32)
    with pytest.raises(AssertionError, match="go beyond"):
        class_scores.best_classes(scores, [matrix] * 3)
