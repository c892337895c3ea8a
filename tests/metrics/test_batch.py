"""Many pairs of masks in one go against each metric alone, and how few programs that takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from tumorjax import parallel
from tumorjax.metrics import backends, surface_kernels, volume_kernels
from tumorjax.metrics.batch import compare_labels, compare_masks
from tumorjax.metrics.boxes import bounding_box, bucket, padded_pair
from tumorjax.metrics.components import remove_small
from tumorjax.metrics.detection import match_lesions
from tumorjax.metrics.lesion_tables import device_tables
from tumorjax.metrics.overlap import dice
from tumorjax.metrics.surface import normalized_surface_dice

BACKENDS = ["host", "device"]
SPACINGS = [(1.0, 1.0, 1.0), (0.7, 1.3, 2.9), (0.78125, 0.78125, 5.0)]


def pairs(rng, count, largest=(15, 15, 31)):
    """Blobs of many shapes and sizes, empty ones among them, and predictions near them."""
    found = []
    for number in range(count):
        shape = tuple(rng.integers(3, size + 1) for size in largest)
        noise = ndimage.gaussian_filter(rng.standard_normal((2, *shape)), (0, 1, 1, 1))
        truth = noise[0] > noise[0].std()
        prediction = truth ^ (noise[1] > 1.5 * noise[1].std())
        if number % 7 == 3:
            truth[:] = False
        if number % 7 in (3, 5):
            prediction[:] = False
        found.append((truth, prediction, SPACINGS[number % 3], (0.0, 1.0, 2.0, np.inf)[number % 4]))
    return found


def same(first, second):
    np.testing.assert_array_equal(first.dice, second.dice)
    np.testing.assert_array_equal(first.nsd, second.nsd)
    for one, other in zip(first.match, second.match, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("rule", ["any", "iou"])
@pytest.mark.parametrize("minimum_mm3", [0.0, 7.0])
def test_many_pairs_have_the_numbers_of_each_alone(rng, rule, minimum_mm3):
    cases = pairs(rng, 25)
    results = [
        compare_masks(*zip(*cases, strict=True), rule, minimum_mm3=minimum_mm3, backend=backend)
        for backend in BACKENDS
    ]
    for (truth, prediction, spacing, tolerance), host, device in zip(cases, *results, strict=True):
        same(host, device)
        kept = remove_small(prediction, minimum_mm3 / np.prod(spacing))
        np.testing.assert_array_equal(host.dice, dice(truth, kept))
        np.testing.assert_array_equal(
            host.nsd, normalized_surface_dice(truth, kept, spacing, tolerance)
        )
        alone = match_lesions(truth, prediction, spacing, rule, minimum_mm3=minimum_mm3)
        for one, other in zip(host.match, alone, strict=True):
            np.testing.assert_array_equal(one, other)


def test_pairs_come_from_generators_and_tolerance_may_be_one_for_all(rng):
    cases = pairs(rng, 6)
    truths, predictions, spacings, _ = zip(*cases, strict=True)
    expected = compare_masks(truths, predictions, spacings, [2.0] * 6)
    found = compare_masks(iter(truths), iter(predictions), iter(spacings), 2.0, backend="device")
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    assert compare_masks([], [], []) == []
    with pytest.raises(ValueError, match=r"longer|shorter"):
        compare_masks(truths, predictions[:-1], spacings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_of_labels_have_the_numbers_of_their_masks(rng, backend):
    truth, prediction = rng.integers(0, 4, (2, 13, 14, 30)).astype(np.uint8)
    truth[truth == 3] = 0
    classes = {"organ": (1, 2), "tumor": 2, "absent": 9}
    tolerance = {"organ": 1.0, "tumor": 2.0, "absent": 2.0}
    found = compare_labels(truth, prediction, SPACINGS[1], classes, tolerance, backend=backend)
    assert list(found) == list(classes)
    for name, values in classes.items():
        masks = np.isin(truth, values), np.isin(prediction, values)
        (expected,) = compare_masks(*[[mask] for mask in masks], [SPACINGS[1]], tolerance[name])
        same(found[name], expected)
    assert np.isnan(found["absent"].dice)
    empty = np.zeros((5, 5, 5), np.uint8)
    assert np.isnan(compare_labels(empty, empty, SPACINGS[0], {"organ": 1})["organ"].nsd)


def test_cases_of_many_sizes_take_few_compiled_programs(rng):
    compiled = []

    def count(name: str, *_, **__) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    cases = pairs(rng, 40)
    shapes = {padded[2] for t, p, *_ in cases if (padded := padded_pair(t, p)) is not None}
    assert len(shapes) > 25
    jax.clear_caches()  # what other tests compiled does not count
    jax.monitoring.register_event_duration_secs_listener(count)
    for truth, prediction, spacing, tolerance in cases:
        compare_masks([truth], [prediction], [spacing], [tolerance], backend="device")
    # One size of boxes. Labels and surfaces are a program each, tables one for each capacity.
    assert 3 <= len(compiled) <= 5
    one_by_one = len(compiled)
    compare_masks(*zip(*cases, strict=True), backend="device")
    # In batches of 16 and 4 and one by one.
    assert len(compiled) - one_by_one <= 2 * one_by_one
    together = len(compiled)
    for truth, prediction, spacing, tolerance in pairs(rng, 40):
        compare_masks([truth], [prediction], [spacing], [tolerance], backend="device")
    assert len(compiled) - together <= 1  # a capacity that had not occurred


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.float32])
def test_bounding_boxes_hold_all_that_is_not_zero_and_no_more(rng, order, dtype):
    for shape in ((16, 24, 8), (5, 7, 3), (1, 1, 9)):
        volume = np.zeros(shape, dtype, order=order)
        assert bounding_box(volume) is None
        for point in zip(*[rng.integers(0, size, 3) for size in shape], strict=True):
            volume[point] = dtype(-1) if dtype is not np.uint8 else 255
        at = np.argwhere(volume)
        expected = tuple(slice(a, b + 1) for a, b in zip(at.min(0), at.max(0), strict=True))
        assert bounding_box(volume) == expected
        assert bounding_box(volume[::-1, :, ::2]) == bounding_box(volume[::-1, :, ::2].copy())


def test_boxes_are_padded_to_few_sizes_with_room_for_the_dual_grid():
    assert bucket((1, 15, 31)) == (16, 16, 32)
    assert bucket((16, 40, 32)) == (32, 64, 64)
    assert len({bucket((n, n, n)) for n in range(1, 1001)}) == 7


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "space": 4}])
def test_masks_on_eight_devices_have_the_numbers_of_one(rng, sizes):
    """Pairs over "data", each mask's x over "space", as predictions on a mesh lie."""
    crops = [crop for pair in pairs(rng, 30) if (crop := padded_pair(*pair[:2])) is not None][:16]
    truths, predictions, shapes = zip(*crops, strict=True)
    truths, predictions = np.stack(truths), np.stack(predictions)
    spacings = [np.array(SPACINGS[number % 3]) for number in range(16)]
    limits = [(0.0, 1.0, 2.0, np.inf)[number % 4] for number in range(16)]
    minimum = [0.0, 3.0] * 8

    def measured(truths, predictions):
        tables, kept = device_tables(truths, predictions, spacings, minimum, 26)
        return tables, kept, surface_kernels.near_counts(truths, kept, shapes, spacings, limits)

    mesh = parallel.make_mesh(sizes)
    lies = parallel.sample_sharding(mesh) if "space" not in sizes else parallel.batch_sharding(mesh)
    placed = [jax.device_put(masks, lies) for masks in (truths, predictions)]
    assert all(len(masks.addressable_shards[0].data) == 16 // sizes["data"] for masks in placed)
    (one, kept, counts), (found, left, near) = measured(truths, predictions), measured(*placed)
    np.testing.assert_array_equal(left, kept)
    np.testing.assert_array_equal(near, counts)
    for table, expected in zip(found, one, strict=True):
        for array, other in zip(table, expected, strict=True):
            np.testing.assert_array_equal(array, other)


def test_crops_on_an_accelerator_are_those_of_the_host(rng):
    volume = np.zeros((20, 30, 40), np.int16)
    volume[3:17, 11:30, 5:38] = rng.integers(-3, 4, (14, 19, 33))
    box = bounding_box(volume)
    low, high = volume_kernels.extent(jnp.asarray(volume))
    assert box == tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    shape = [side.stop - side.start for side in box]
    crop = volume_kernels.crop(jnp.asarray(volume), low, shape, (32, 32, 64))
    expected = np.zeros((32, 32, 64), np.int16)
    expected[: shape[0], : shape[1], : shape[2]] = volume[box]
    np.testing.assert_array_equal(crop, expected)
    inner = volume_kernels.crop(jnp.asarray(volume), (4, 12, 6), (5, 6, 7), (16, 16, 32))
    np.testing.assert_array_equal(inner[:5, :6, :7], volume[4:9, 12:18, 6:13])
    assert int((np.asarray(inner) != 0).sum()) == int((volume[4:9, 12:18, 6:13] != 0).sum())
    low, high = volume_kernels.extent(jnp.zeros((4, 5, 6), bool))
    assert (low >= high).all()


def test_levels_on_an_accelerator_round_no_probability_over_a_threshold(rng):
    thresholds = np.array([0.1, 0.3, 0.6, 0.7])
    at = thresholds.astype(np.float32)
    values = np.concatenate([at, np.nextafter(at, np.float32(0)), np.nextafter(at, np.float32(1))])
    probability = rng.choice(values, (5, 6, 7))
    levels = volume_kernels.probability_levels(jnp.asarray(probability), thresholds)
    expected = (probability[..., None].astype(np.float64) >= thresholds).sum(axis=-1)
    np.testing.assert_array_equal(levels, expected)


def test_auto_means_the_host_on_a_cpu_and_the_device_where_masks_are(rng):
    class OnAccelerator:
        def devices(self):
            return {type("Device", (), {"platform": "gpu"})}

    mask = rng.random((3, 4, 5)) < 0.5
    assert backends.choose("auto", mask, jnp.asarray(mask)) == "host"
    assert backends.choose("auto", mask, OnAccelerator()) == "device"
    assert backends.choose_by_place("auto", OnAccelerator()) == "device"
    assert backends.choose("host", OnAccelerator()) == "host"
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        backends.choose("cuda")


def real_pairs(kits19):
    truths = [labels == 2 for labels, _ in kits19]
    predictions = [np.roll(truth, (0, 2, -1), axis=(0, 1, 2)) for truth in truths]
    return truths, predictions, [spacing for _, spacing in kits19]


def test_all_real_tumours_in_one_go_have_the_numbers_of_each_alone(kits19):
    cases = real_pairs(kits19)
    for *pair, spacing, result in zip(*cases, compare_masks(*cases), strict=True):
        assert result.dice == dice(*pair)
        assert result.nsd == normalized_surface_dice(*pair, spacing)
        for one, other in zip(result.match, match_lesions(*pair, spacing), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_all_real_tumours_are_compared_alike_on_both_backends(kits19):
    cases = real_pairs(kits19)
    results = [compare_masks(*cases, backend=backend) for backend in BACKENDS]
    for host, device in zip(*results, strict=True):
        same(host, device)
