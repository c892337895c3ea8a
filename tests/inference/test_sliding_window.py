"""The sliding window equals nnU-Net's formulas and a plain numpy loop, and compiles once."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from jax.tree_util import Partial
from scipy.ndimage import gaussian_filter
from scipy.special import softmax

from tests.collectives import collectives, moving_whole_arrays
from tumorjax import models, parallel
from tumorjax.anatomy import mirror_table
from tumorjax.errors import UserError
from tumorjax.inference import sliding_window
from tumorjax.inference.sliding_window import (
    AIR_LOGIT,
    gaussian_weights,
    predict,
    predict_planes,
    tile_starts,
)

CLASSES = 3


def random_network(rng, classes=CLASSES):
    """A fixed convolution with a nonlinearity: no symmetry, so wrong flips cannot hide."""
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 1, classes)), jnp.float32)

    def apply(x):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        return jnp.tanh(y)

    return apply


def nnunet_starts(shape, patch, step):
    """compute_steps_for_sliding_window of nnunetv2 2.8, written down from its description."""
    steps = []
    for size, tile in zip(shape, patch, strict=True):
        count = int(np.ceil((size - tile) / (tile * step))) + 1
        actual = (size - tile) / (count - 1) if count > 1 else 99999999999
        steps.append([int(np.round(actual * i)) for i in range(count)])
    return steps


def nnunet_gaussian(patch):
    delta = np.zeros(patch)
    delta[tuple(i // 2 for i in patch)] = 1
    weights = gaussian_filter(delta, [i / 8 for i in patch], 0, mode="constant", cval=0)
    weights /= weights.max() / 10
    weights = weights.astype(np.float32)
    weights[weights == 0] = weights[weights != 0].min()
    return weights


def reference_logits(apply, volume, patch, overlap, mirror_axes=(), table=None):
    """The definition, one tile and one flip at a time, summed in float64."""
    missing = [max(p - s, 0) for p, s in zip(patch, volume.shape, strict=True)]
    padded = np.pad(volume, [(m // 2, m - m // 2) for m in missing])
    weights = nnunet_gaussian(patch).astype(np.float64)
    total, weight_sum = 0.0, np.zeros(padded.shape)
    for start in itertools.product(*nnunet_starts(padded.shape, patch, 1 - overlap)):
        at = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        counts = range(len(mirror_axes) + 1)
        flips = [axes for n in counts for axes in itertools.combinations(mirror_axes, n)]
        logits = 0.0
        for axes in flips:
            out = np.asarray(apply(jnp.asarray(np.flip(padded[at], axes)[None, ..., None]))[0])
            out = np.flip(out, axes)
            if table is not None and 0 in axes:
                out = out[..., table]
            logits = logits + out.astype(np.float64) / len(flips)
        if np.isscalar(total):
            total = np.zeros((*padded.shape, logits.shape[-1]))
        total[at] += logits * weights[..., None]
        weight_sum[at] += weights
    logits = total / weight_sum[..., None]
    return logits[
        tuple(slice(m // 2, m // 2 + s) for m, s in zip(missing, volume.shape, strict=True))
    ]


@pytest.mark.parametrize(
    ("shape", "patch", "step"),
    [
        ((110, 64, 65), (64, 64, 64), 0.5),
        ((200, 213, 96), (96, 96, 96), 0.5),
        ((33, 47, 100), (32, 24, 17), 0.5),
        ((120, 100, 90), (48, 48, 32), 0.75),
        ((120, 100, 90), (48, 48, 32), 1.0),
    ],
)
def test_tile_starts_are_those_of_nnunet(shape, patch, step):
    assert tile_starts(shape, patch, 1 - step) == nnunet_starts(shape, patch, step)


def test_tile_starts_of_the_example_in_nnunets_comments():
    assert tile_starts((110,), (64,), 0.5) == [[0, 23, 46]]


@pytest.mark.parametrize("patch", [(96, 96, 96), (32, 24, 16), (7, 5, 9), (1, 2, 3)])
def test_weights_are_those_of_nnunet(patch):
    weights = gaussian_weights(patch)
    np.testing.assert_allclose(weights, nnunet_gaussian(patch), rtol=1e-6)
    assert weights.dtype == np.float32
    assert weights.max() == pytest.approx(10)
    assert weights.min() > 0


def test_tiles_and_weights_against_nnunet_itself():
    reference = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")
    torch = pytest.importorskip("torch")
    shape, patch = (133, 80, 57), (48, 32, 40)
    starts = reference.compute_steps_for_sliding_window(shape, patch, 0.5)
    assert tile_starts(shape, patch, 0.5) == starts
    weights = reference.compute_gaussian(
        patch, value_scaling_factor=10, dtype=torch.float32, device=torch.device("cpu")
    )
    np.testing.assert_allclose(gaussian_weights(patch), weights.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "patch", "overlap", "mirror_axes"),
    [
        ((25, 18, 21), (12, 8, 10), 0.5, ()),
        ((25, 18, 21), (12, 8, 10), 0.25, (0, 2)),
        ((9, 23, 7), (12, 8, 10), 0.5, (1,)),
        ((5, 4, 3), (12, 8, 10), 0.5, (0, 1, 2)),
        ((12, 8, 10), (12, 8, 10), 0.0, ()),
    ],
)
def test_equals_a_plain_loop(rng, shape, patch, overlap, mirror_axes):
    apply, volume = random_network(rng), rng.random(shape).astype(np.float32)
    expected = reference_logits(apply, volume, patch, overlap, mirror_axes)
    arguments = (apply, volume, patch, overlap, mirror_axes)
    logits = predict(*arguments, output="logits")
    assert logits.shape == (*shape, CLASSES)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    probabilities = predict(*arguments)
    np.testing.assert_allclose(probabilities, softmax(expected, axis=-1), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
def test_batch_size_changes_nothing(rng, batch_size):
    apply, volume = random_network(rng), rng.random((20, 17, 9)).astype(np.float32)
    one = predict(apply, volume, (8, 8, 8), batch_size=2)
    other = predict(apply, jnp.asarray(volume), (8, 8, 8), batch_size=batch_size)
    np.testing.assert_allclose(other, one, atol=2e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_every_voxel_is_covered_and_constant_logits_stay(rng, overlap):
    constant = np.array([0.5, -2.0, 3.25], np.float32)

    def apply(x):
        return jnp.broadcast_to(constant, (*x.shape[:4], 3))

    volume = rng.random((19, 8, 30)).astype(np.float32)
    logits = predict(apply, volume, (8, 8, 8), overlap, output="logits")
    np.testing.assert_allclose(logits, np.broadcast_to(constant, logits.shape), rtol=1e-6)
    probabilities = predict(apply, volume, (8, 8, 8), overlap)
    expected = np.broadcast_to(softmax(constant), logits.shape)
    np.testing.assert_allclose(probabilities, expected, rtol=2e-6)


def test_half_overlap_covers_inner_voxels_eight_times():
    starts = tile_starts((64, 64, 64), (16, 16, 16), 0.5)
    count = np.zeros((64, 64, 64), int)
    for x, y, z in itertools.product(*starts):
        count[x : x + 16, y : y + 16, z : z + 16] += 1
    assert count.min() == 1
    assert (count[8:-8, 8:-8, 8:-8] == 8).all()


def test_mirrored_network_swaps_left_and_right(rng):
    classes = {
        "liver": ("liver",),
        "kidney_left": ("kidney_left",),
        "kidney_right": ("kidney_right",),
    }
    table = mirror_table(classes)
    apply, volume = random_network(rng, 4), rng.random((13, 11, 9)).astype(np.float32)
    logits = predict(apply, volume, (8, 8, 8), 0.5, (0, 1), mirror_table=table, output="logits")
    expected = reference_logits(apply, volume, (8, 8, 8), 0.5, (0, 1), table)
    np.testing.assert_allclose(logits, expected, atol=2e-5)

    # Averaged over flips of x, a mirrored scan has mirrored kidneys. Tile positions of 13 and 8
    # (0, 2, 5) are not symmetric, so the property is stated for one tile.
    one_tile = volume[:8, :8, :8]
    straight = predict(apply, one_tile, (8, 8, 8), 0.5, (0,), mirror_table=table)
    mirrored = predict(apply, one_tile[::-1], (8, 8, 8), 0.5, (0,), mirror_table=table)
    # The weight map of an even patch is not symmetric, but one tile's weights cancel.
    np.testing.assert_allclose(mirrored[::-1][..., table], straight, atol=1e-5)
    assert not np.allclose(mirrored[::-1], straight, atol=1e-2)


def count_traces(apply):
    traces = []

    def counted(x):
        traces.append(x.shape)
        return apply(x)

    return counted, traces


def test_one_trace_for_volumes_of_all_shapes(rng):
    counted, traces = count_traces(random_network(rng))
    for shape in [(20, 20, 20), (31, 9, 17), (5, 6, 7), (40, 24, 12)]:
        predict(counted, rng.random(shape), (8, 8, 8), mirror_axes=(0, 1))
    assert traces == [(2, 8, 8, 8, 1)]


def test_other_weights_of_the_same_network_need_no_trace(rng):
    traces = []

    def network(kernel, x):
        traces.append(x.shape)
        return x * kernel

    volume = rng.random((12, 9, 8)).astype(np.float32)
    for _ in range(3):
        kernel = jnp.asarray(rng.standard_normal(4), jnp.float32)
        logits = predict(Partial(network, kernel), volume, (8, 8, 8), output="logits")
        np.testing.assert_allclose(logits, volume[..., None] * kernel, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_a_module_is_seen_with_its_present_weights(rng):
    class Network(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(2))

        def __call__(self, x):
            return [x * self.scale[...], x[:, ::2]]  # deep supervision: finest first

    network, volume = Network(), rng.random((9, 8, 12)).astype(np.float32)
    for scale in (1.0, -3.0):
        network.scale[...] = jnp.array([scale, 2 * scale])
        logits = predict(network, volume, (8, 8, 8), output="logits")
        expected = volume[..., None] * np.array([scale, 2 * scale])
        np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_air_is_background_and_the_rest_is_as_without_skipping(rng):
    apply = random_network(rng)
    volume = np.zeros((40, 16, 16), np.float32)
    volume[:11] = rng.random((11, 16, 16))
    full = predict(apply, volume, (8, 8, 8))
    skipped = predict(apply, volume, (8, 8, 8), skip_air=True)
    # Tiles start at 0, 4, 8, 12 ...: those from 12 on are skipped, voxels from 16 on see no other.
    np.testing.assert_allclose(skipped[:12], full[:12], atol=1e-6)
    np.testing.assert_array_equal(skipped[16:], np.broadcast_to([1, 0, 0], (24, 16, 16, 3)))

    empty = predict(apply, np.zeros((9, 9, 9)), (8, 8, 8), skip_air=True)
    np.testing.assert_array_equal(empty, np.broadcast_to([1, 0, 0], (9, 9, 9, 3)))
    logits = predict(apply, volume, (8, 8, 8), skip_air=True, output="logits")
    np.testing.assert_array_equal(logits[30, 3, 3], [0, AIR_LOGIT, AIR_LOGIT])


def test_half_precision_networks_are_averaged_in_single_precision(rng):
    def apply(x):
        return (x * jnp.array([1.0, 2.0])).astype(jnp.bfloat16)

    volume = rng.random((10, 9, 11)).astype(np.float32)
    logits = predict(apply, volume, (8, 8, 8), output="logits")
    expected = np.asarray(apply(volume[..., None]).astype(jnp.float32))
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"overlap": -0.1}, "overlap is -0.1"),
        ({"mirror_axes": (0, 3)}, "mirror_axes"),
        ({"mirror_axes": (1, 1)}, "mirror_axes"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"volume": np.ones((4, 4))}, "three axes"),
        ({"patch_size": (8, 8)}, "three axes"),
        ({"output": "masks"}, "'probabilities' or 'logits'"),
        ({"patch_size": (6, 8, 8), "mesh": {"space": 4}}, "does not divide over 4 devices"),
    ],
)
def test_senseless_settings_are_named(change, found):
    arguments = {"apply": jnp.sin, "volume": np.ones((8, 8, 8)), "patch_size": (8, 8, 8)} | change
    if "mesh" in change:
        arguments["mesh"] = parallel.make_mesh({"space": 4}, jax.devices()[:4])
    with pytest.raises(UserError, match=found):
        predict(**arguments)


def test_partial_functions_and_jitted_ones_are_networks_too(rng):
    volume = rng.random((9, 8, 8)).astype(np.float32)
    kernel = jnp.array([1.0, -1.0])
    expected = volume[..., None] * np.asarray(kernel)
    for apply in (functools.partial(jnp.multiply, kernel), jax.jit(lambda x: x * kernel)):
        logits = predict(apply, volume, (8, 8, 8), output="logits")
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "overlap", "height"),
    [((45, 12, 17), 0.5, 45), ((45, 12, 17), 0.5, 11), ((30, 9, 9), 0.0, 16), ((5, 9, 9), 0.75, 9)],
)
def test_slabs_of_any_height_are_the_whole_bit_for_bit(rng, shape, overlap, height):
    apply, volume = random_network(rng), rng.random(shape).astype(np.float32)
    volume[12:33] = 0  # some slabs of nothing but air
    arguments = (apply, volume, (8, 8, 8), overlap)
    settings = {"skip_air": True, "output": "logits"}
    found = predict(*arguments, **settings)
    slabs = list(predict_planes(*arguments, **settings, height=height))
    np.testing.assert_array_equal(
        np.concatenate([s for _, s in slabs], axis=1), found.transpose(3, 0, 1, 2)
    )
    assert [low for low, _ in slabs] == list(np.cumsum([0, *(s.shape[1] for _, s in slabs)])[:-1])
    assert max(planes.shape[1] for _, planes in slabs) <= height
    assert (len(slabs) == 1) == (height >= shape[0])


def test_long_stretches_of_air_are_handed_over_as_they_pass(rng, monkeypatch):
    taken, mean = [], sliding_window._mean

    def recorded(*arguments):
        taken.append(arguments[1])
        return mean(*arguments)

    monkeypatch.setattr(sliding_window, "_mean", recorded)
    volume = np.zeros((120, 8, 8), np.float32)
    volume[[3, -3]] = rng.random((2, 8, 8))
    planes = 0
    slabs = predict_planes(random_network(rng), volume, (8, 8, 8), skip_air=True)
    for count, (low, slab) in enumerate(slabs, start=1):
        assert low == planes
        assert len(taken) - count <= 2
        planes += slab.shape[1]
    assert planes == 120


def test_device_memory_does_not_grow_with_length(rng, monkeypatch):
    sizes = []
    zeros = jnp.zeros

    def recorded(shape, *arguments, **settings):
        sizes.append(shape)
        return zeros(shape, *arguments, **settings)

    apply = random_network(rng)
    monkeypatch.setattr(jnp, "zeros", recorded)
    for length in (9, 33, 70):
        predict(apply, rng.random((length, 20, 40)), (8, 8, 8))
    assert set(sizes) == {(1, CLASSES + 1, 12, 32, 64)}


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"space": 2}, {"data": 2, "space": 4}, {"data": 4, "fsdp": 2}]
)
@pytest.mark.parametrize(("batch_size", "classes"), [(1, 3), (3, 4)])
def test_a_mesh_gives_what_one_device_gives(rng, sizes, batch_size, classes):
    count = int(np.prod(list(sizes.values())))
    mesh = parallel.make_mesh(sizes, jax.devices()[:count])
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 1, classes)), jnp.float32)

    def network(kernel, x):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        # The mean over a tile, as in instance normalization, is one over all its devices.
        return jnp.tanh(y - y.mean((1, 2, 3), keepdims=True))

    volume = rng.random((30, 12, 17)).astype(np.float32)
    volume[21:, :, 9:] = 0
    settings = {"mirror_axes": (0, 2), "skip_air": True, "batch_size": batch_size}
    one = predict(Partial(network, kernel), volume, (8, 8, 8), **settings)
    for apply in (Partial(network, kernel), functools.partial(network, kernel)):
        several = predict(apply, volume, (8, 8, 8), **settings, mesh=mesh)
        np.testing.assert_allclose(several, one, atol=1e-6)


def test_where_x_is_split_nothing_but_halos_and_the_logits_is_sent(rng):
    settings = {"classes": 3, "widths": (4, 8), "blocks": (1, 1), "stages": 2, "seed": 3}
    apply, parameters = models.functional(models.create("resenc_unet", **settings))
    mesh = parallel.make_mesh({"data": 2, "space": 4})
    patch = (16, 8, 8)
    tiles = jax.device_put(rng.random((2, *patch, 1), np.float32), parallel.batch_sharding(mesh))
    forward = sliding_window._forward(Partial(apply, parameters), mesh)
    compiled = forward.func.lower(*forward.args, tiles, None, None, np.ones(patch, np.float32))
    sent = collectives(compiled.compile().as_text())
    assert "collective-permute" in {c.kind for c in sent}
    assert not {"all-gather", "ragged-all-to-all"} & {c.kind for c in sent}
    # From parts of x to parts of the classes, three and the weights, once.
    whole = moving_whole_arrays(compiled.compile().as_text())
    assert {c.kind for c in whole} == {"all-to-all"}
    assert sum(c.size * len(c.shapes) for c in whole) <= 4 * np.prod(patch)


def test_tiles_and_sums_lie_where_the_mesh_says():
    mesh = parallel.make_mesh({"data": 2, "space": 4})
    assert parallel.by_class(mesh, (2, 8, 5)).spec == PartitionSpec(("data", "fsdp"), "space")
    assert parallel.by_class(mesh, (2, 7, 5)).spec == PartitionSpec(("data", "fsdp"))


def test_the_loop_is_one_batch_ahead_of_the_device(rng, monkeypatch):
    events, batches = [], []
    compiled = sliding_window._forward(random_network(rng), None)
    wait = jax.block_until_ready

    def forward(*arguments):
        logits = compiled.func(*arguments)
        tiles = arguments[len(compiled.args)]
        if isinstance(tiles, np.ndarray):
            events.append(("hand over", len(batches)))
            batches.append(logits)
        return logits

    def recorded(logits):
        events.append(("wait", next(i for i, batch in enumerate(batches) if batch is logits)))
        return wait(logits)

    forward.eval_shape = compiled.func.eval_shape
    watched = functools.partial(forward, *compiled.args)
    monkeypatch.setattr(sliding_window, "_forward", lambda apply, mesh: watched)
    monkeypatch.setattr(jax, "block_until_ready", recorded)
    predict(None, rng.random((16, 12, 12)).astype(np.float32), (8, 8, 8))
    assert len(batches) == 6
    expected = [("hand over", 0)]
    for batch in range(1, 6):
        expected += [("hand over", batch), ("wait", batch - 1)]
    assert events[:11] == expected


def test_a_network_in_bfloat16_agrees_with_float32(rng):
    settings = {"classes": 3, "widths": (4, 8), "blocks": (1, 1), "stages": 2, "seed": 3}
    single = models.create("resenc_unet", **settings, deep_supervision=False)
    half = models.create("resenc_unet", **settings, deep_supervision=False, dtype="bfloat16")
    volume = rng.random((24, 16, 16)).astype(np.float32)
    expected, found = (predict(m, volume, (16, 16, 16), output="logits") for m in (single, half))
    assert found.dtype == np.float32
    spread = expected.std()
    assert 1e-5 * spread < np.abs(found - expected).mean() < 0.02 * spread
    margin = np.diff(np.sort(expected, axis=-1)[..., 1:])[..., 0]
    sure = margin > 0.1 * spread
    assert sure.mean() > 0.5
    np.testing.assert_array_equal(found.argmax(-1)[sure], expected.argmax(-1)[sure])
