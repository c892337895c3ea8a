"""Discriminators against PyTorch's layers, their losses by hand, and the perceptual loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.segmentation import get_config
from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.files import write_json_atomic
from tumorjax.synthesis import discriminators, perceptual
from tumorjax.training import checkpoints


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("size", [16, 18])
def test_activations_are_those_of_torch_layers(rng, dimensions, size):
    torch = pytest.importorskip("torch")
    nn = torch.nn
    apply, parameters = discriminators.create(dimensions, width=8, layers=2, seed=1)
    parameters = {
        name: jnp.asarray(value + 0.1 * rng.standard_normal(value.shape).astype(np.float32))
        for name, value in parameters.items()
    }
    shape = (2, size, size, size if dimensions == 3 else 1, 1)
    x = rng.standard_normal(shape).astype(np.float32)
    found = jax.jit(apply)(parameters, x)

    convolution = nn.Conv3d if dimensions == 3 else nn.Conv2d
    plan = [(1, 8, 2, False), (8, 16, 2, True), (16, 32, 1, True), (32, 1, 1, False)]
    y = torch.from_numpy(np.moveaxis(x, -1, 1))
    y = y if dimensions == 3 else y[..., 0]
    for stage, (inputs, outputs, stride, norm) in enumerate(plan):
        layer = convolution(inputs, outputs, 4, stride, 2)
        kernel = np.asarray(parameters[f"stages.{stage}.kernel"])
        kernel = np.moveaxis(kernel, (-1, -2), (0, 1))
        kernel = kernel if dimensions == 3 else kernel[..., 0]
        state = {"weight": kernel, "bias": parameters[f"stages.{stage}.bias"]}
        layer.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
        y = layer(y)
        if norm:
            group = nn.GroupNorm(min(32, outputs), outputs)
            names = {"weight": "scale", "bias": "bias"}
            group.load_state_dict(
                {
                    k: torch.from_numpy(np.array(parameters[f"stages.{stage}.norm.{v}"]))
                    for k, v in names.items()
                }
            )
            y = group(y)
        if stage < len(plan) - 1:
            y = nn.functional.leaky_relu(y, 0.2)
        ours = np.moveaxis(np.asarray(found[stage]), -1, 1)
        ours = ours if dimensions == 3 else ours[..., 0]
        np.testing.assert_allclose(ours, y.detach().numpy(), atol=3e-4, rtol=1e-3)


def test_difftumors_sizes():
    for dimensions, count in ((2, 64), (3, 64)):
        shapes = jax.eval_shape(lambda d=dimensions: discriminators.create(d)[1])
        assert shapes["stages.0.kernel"].shape[-1] == count
        widths = [shapes[f"stages.{i}.kernel"].shape[-1] for i in range(5)]
        assert widths == [64, 128, 256, 512, 1]


def test_hinge_loss_by_hand():
    real, fake = jnp.array([2.0, 0.5]), jnp.array([-2.0, 0.0])
    # relu(1 - real) = 0, 0.5; relu(1 + fake) = 0, 1.
    assert float(discriminators.hinge_loss(real, fake)) == pytest.approx(0.5 * (0.25 + 0.5))


def test_feature_matching_leaves_the_logits_out(rng):
    real = [rng.standard_normal((2, 3)).astype(np.float32) for _ in range(3)]
    fake = [real[0] + 1, real[1] - 2, real[2] + 100]
    assert float(discriminators.feature_matching(real, fake)) == pytest.approx(
        2 * (1 + 2), rel=1e-5
    )


def test_slices_are_the_crops_own(rng):
    x = rng.standard_normal((5, 4, 3, 7, 1)).astype(np.float32)
    found = np.asarray(discriminators.random_slices(jax.random.key(0), jnp.asarray(x)))
    assert found.shape == (5, 4, 3, 1, 1)
    chosen = [np.flatnonzero((x[i] == found[i]).all((0, 1, 3))) for i in range(5)]
    assert all(len(z) == 1 for z in chosen)
    assert len({int(z[0]) for z in chosen}) > 1


@pytest.fixture
def segmenter(tmp_path):
    config = get_config()
    config.model.widths = (4, 8)
    config.model.blocks = (1, 1)
    network = checkpoints.build_model(config, deep_supervision=False, seed=5)
    values = models.functional(network)[1]
    write_json_atomic(
        tmp_path / "config.json",
        {n: config[n].to_dict() for n in ("task", "preparation", "model", "training")},
    )
    with checkpoints.open_manager(tmp_path, write=True) as manager:
        checkpoints.save(manager, 1, {"parameters": values}, 1)
        manager.wait_until_finished()
    return tmp_path, config, network


def test_perceptual_features_are_the_encoders_own(segmenter, rng):
    folder, config, network = segmenter
    features, parameters = perceptual.load(folder, config.preparation)
    x = rng.random((2, 8, 8, 8, 1)).astype(np.float32)
    found = jax.jit(features)(parameters, x)
    y = network.stem(jnp.asarray(x))
    for stage, ours in zip(network.encoder, found, strict=True):
        y = stage(y)
        np.testing.assert_allclose(ours, y, atol=1e-4)


def test_perceptual_distance_is_zero_for_the_same_and_grows_with_blur(segmenter, rng):
    folder, config, _ = segmenter
    features, parameters = perceptual.load(folder, config.preparation)
    x = jnp.asarray(rng.uniform(-1, 1, (1, 8, 8, 8, 1)).astype(np.float32))
    measure = jax.jit(lambda a, b: perceptual.distance(features, parameters, a, b))
    blurred = (x + jnp.roll(x, 1, 1) + jnp.roll(x, 1, 2)) / 3
    values = [float(measure(x, x + share * (blurred - x))) for share in (0, 0.3, 1)]
    assert values[0] == pytest.approx(0, abs=1e-9)
    assert values[0] < values[1] < values[2]


def test_a_perceptual_network_of_another_grid_is_refused(segmenter):
    folder, config, _ = segmenter
    config.preparation.window = (-100.0, 250.0)
    with pytest.raises(UserError, match="window"):
        perceptual.load(folder, config.preparation)


def test_a_network_without_an_encoder_of_stages_is_refused(segmenter):
    folder, config, _ = segmenter
    values = {n: config[n].to_dict() for n in ("task", "preparation", "training")}
    model = {"name": "segresnet", "preset": "small", "dtype": "float32"}
    write_json_atomic(folder / "config.json", values | {"model": model})
    from ml_collections import ConfigDict

    network = checkpoints.build_model(ConfigDict(values | {"model": model}), deep_supervision=False)
    with checkpoints.open_manager(folder, write=True) as manager:
        checkpoints.save(manager, 2, {"parameters": models.functional(network)[1]}, 2)
        manager.wait_until_finished()
    with pytest.raises(UserError, match="segresnet has no encoder of stages"):
        perceptual.load(folder, config.preparation)
