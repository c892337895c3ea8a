"""A train step on a mesh: the same as on one device, and no activations sent around.

Networks here are narrow. What matters is which operations they are made of.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from configs.segmentation import get_config
from tests.collectives import collectives, moving_whole_arrays
from tumorjax import models, parallel
from tumorjax.data import augmentation
from tumorjax.errors import UserError
from tumorjax.models import convolution
from tumorjax.training import losses, segmenter

PATCH = (16, 8, 8)
UNET = {"widths": (4, 8), "blocks": (1, 1), "deep_supervision": True}
NETWORKS = {
    "resenc_unet": UNET,
    "plain_unet": UNET,
    "stu_net": UNET,
    "segresnet": {"init_filters": 4, "groups": 2, "blocks_down": (1, 1)},
    "segresnet_ds": {
        "variant": "segresnet_ds",
        "init_filters": 4,
        "blocks_down": (1, 1),
        "deep_supervision": True,
    },
    "universal": {"width": 2},
    "suprem": {"width": 2},
}


def _config(name: str = "resenc_unet", **training):
    config = get_config()
    settings = NETWORKS[name]
    network = {key: value for key, value in settings.items() if key != "deep_supervision"}
    config.model = {"name": name.removesuffix("_ds")} | network
    config.training.deep_supervision = settings.get("deep_supervision", False)
    config.training.patch_size = PATCH
    config.training.batch_size = 4
    # Not AdamW: it makes steps of what rounding leaves of a gradient of zero.
    config.training.optimizer = "sgd"
    for key, value in training.items():
        config.training[key] = value
    return config


def _batch(rng, config) -> dict[str, np.ndarray]:
    patch = augmentation.source_patch(tuple(config.training.patch_size), config.augmentation)
    image = rng.random((config.training.batch_size, *patch, 1)).astype(np.float32)
    # Blobs instead of noise, so that coarse levels have something to learn from.
    coarse = rng.integers(0, 3, (len(image), *(-(-n // 4) for n in patch)))
    label = functools.reduce(lambda a, axis: a.repeat(4, axis), (1, 2, 3), coarse)
    return {"image": image, "label": label[:, *map(slice, patch)].astype(np.uint8)}


def _steps(config, batch, sizes, count=2):
    """Returns the parameters and the scalars after some steps, and the program's text."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    made = segmenter.make_segmenter(config, parallel.make_mesh(sizes, devices))
    state, placed = made.init(0), made.put(batch)
    text = made.step.lower(state, placed).compile().as_text()
    for _ in range(count):
        state, scalars = made.step(state, placed)
    return state, {k: float(v) for k, v in scalars.items()}, text


def _assert_same(found, expected, atol=2e-5):
    for name, value in expected[0]["parameters"].items():
        np.testing.assert_allclose(
            found[0]["parameters"][name], value, atol=atol, rtol=1e-3, err_msg=name
        )
    for name, value in expected[1].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4, nan_ok=True), name


def test_a_step_with_x_split_is_the_step_of_one_device(rng):
    config = _config()
    batch = _batch(rng, config)
    one = _steps(config, batch, {"data": 1})
    split = _steps(config, batch, {"data": 2, "space": 4})
    _assert_same(split, one)
    assert not collectives(one[2])
    assert moving_whole_arrays(split[2]) == []
    permutes = [c for c in collectives(split[2]) if c.kind == "collective-permute"]
    # Halos: planes, of one voxel where the kernel is 3 long, and nothing that is 4 voxels deep.
    assert permutes
    assert all(shape[1] <= 2 for c in permutes for shape in c.shapes if len(shape) == 5)


def test_augmentation_moves_nothing_but_the_image_where_x_is_split(rng):
    config = _config()
    config.augmentation = {
        name: {"probability": 0.9} for name in ("rotation", "scaling", "blur", "low_resolution")
    }
    batch = _batch(rng, config)
    # The crops are larger than the patch, and so that they do not divide.
    assert batch["image"].shape[1] % 4
    _assert_same(
        split := _steps(config, batch, {"data": 2, "space": 4}),
        _steps(config, batch, {"data": 1}),
    )
    moved = moving_whole_arrays(split[2])
    # Blur and low resolution mix all of x: of the image, which has one channel, in its patch.
    assert {c.scope.split("/")[1] for c in moved} == {"augment"}
    assert max(c.size for c in moved) <= config.training.batch_size * np.prod(PATCH)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "segresnet" else pytest.mark.slow)
        for name in NETWORKS
    ],
)
def test_logits_and_gradients_of_each_network_with_x_split(rng, name):
    settings = {"name": name.removesuffix("_ds"), "classes": 3} | NETWORKS[name]
    apply, parameters = models.functional(models.create(**settings))
    parameters = {
        name: value + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
        for name, value in parameters.items()
    }
    patch = (32, 8, 8) if name in ("universal", "suprem") else PATCH
    x = rng.random((2, *patch, 1)).astype(np.float32)
    label = rng.integers(0, 3, x.shape[:4])

    def loss(parameters, x, label):
        logits = apply(parameters, x)
        finest = logits[0] if isinstance(logits, list) else logits
        return losses.segmentation_loss(logits, label), finest

    (_, expected), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters, x, label)
    mesh = parallel.make_mesh({"data": 2, "space": 4})
    whole, split = parallel.replicated(mesh), parallel.batch_sharding(mesh)

    def on_mesh(parameters, x, label):
        with convolution.split_along_x(mesh):
            return jax.value_and_grad(loss, has_aux=True)(parameters, x, label)

    compiled = (
        jax.jit(
            on_mesh,
            in_shardings=(whole, split, split),
            out_shardings=((whole, split), whole),
        )
        .lower(parameters, x, label)
        .compile()
    )
    text = compiled.as_text()
    placed = (jax.device_put(parameters, whole), *(jax.device_put(a, split) for a in (x, label)))
    (_, logits), found = compiled(*placed)
    assert moving_whole_arrays(text) == []
    assert any(c.kind == "collective-permute" for c in collectives(text))
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(logits, expected, atol=2e-5 * scale)
    # A bias before a norm has a gradient of zero, of which rounding leaves some of the others'.
    largest = max(float(jnp.abs(value).max()) for value in gradient.values())
    for key, value in gradient.items():
        atol = 1e-3 * float(jnp.abs(value).max()) + 1e-5 * max(1.0, largest)
        np.testing.assert_allclose(found[key], value, atol=atol, err_msg=key)


def test_fsdp_holds_a_share_of_the_state_and_gathers_weights_alone(rng):
    config = _config(batch_size=8)
    config.model.widths = (8, 16)
    batch = _batch(rng, config)
    one = _steps(config, batch, {"data": 1})
    shared = _steps(config, batch, {"data": 2, "fsdp": 4})
    _assert_same(shared, one)

    def held(state) -> int:
        arrays = jax.tree.leaves(state)
        return sum(array.addressable_shards[0].data.nbytes for array in arrays)

    kernels = sum(v.nbytes for n, v in one[0]["parameters"].items() if n.endswith(".kernel"))
    # Kernels and their momenta by four; biases and norms are whole.
    assert held(shared[0]) <= held(one[0]) - 2 * kernels * 0.74
    shapes = {value.shape for value in one[0]["parameters"].values()}
    for c in moving_whole_arrays(shared[2]):
        for shape in c.shapes:
            assert {shape, (*shape[:3], *shape[:-3:-1])} & shapes or len(shape) < 4, c
    assert "all-gather" in {c.kind for c in collectives(shared[2])}


def test_a_step_over_all_axes_is_the_step_of_one_device(rng):
    config = _config(batch_size=4)
    batch = _batch(rng, config)
    mixed = _steps(config, batch, {"data": 2, "fsdp": 2, "space": 2})
    _assert_same(mixed, _steps(config, batch, {"data": 1}))


def test_a_space_that_leaves_devices_without_planes_is_refused():
    config = _config(patch_size=(24, 8, 8))
    mesh = parallel.make_mesh({"space": 8})
    with pytest.raises(UserError, match=r"12 planes at resenc_unet.*\[1, 2, 3, 4, 6, 12\].* 16$"):
        segmenter.make_segmenter(config, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_tpus_compiler_sends_planes_and_no_activations_either(name, rng, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    config = _config(name, patch_size=(32, 16, 16))
    made = segmenter.make_segmenter(config, parallel.make_mesh({"data": 2, "space": 4}, chips))
    state = jax.eval_shape(lambda: made.init(0))
    text = made.step.lower(state, _batch(rng, config)).compile().as_text()
    assert moving_whole_arrays(text) == []
    assert any(c.kind == "collective-permute" for c in collectives(text))
