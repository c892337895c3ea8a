"""The residual-encoder U-Net: size, shapes, settings, and equality to its reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.models.layers import InstanceNorm, average_pool
from tumorjax.models.unet import planned_strides

TINY = {"widths": (4, 8, 16), "blocks": (1, 2, 1), "classes": 3}


def _logits(network, x):
    # Compiled as a whole: operation by operation takes five times as long.
    apply, parameters = models.functional(network)
    return jax.jit(apply)(parameters, x)


def _gradient(network, x):
    apply, parameters = models.functional(network)
    return jax.jit(jax.grad(lambda p: jnp.square(apply(p, x)).mean()))(parameters)


def test_logits_have_the_inputs_shape_and_levels_halve(rng):
    x = jnp.asarray(rng.standard_normal((2, 8, 12, 4, 1)), jnp.float32)
    finest = _logits(models.create("resenc_unet", **TINY), x)
    assert finest.shape == (2, 8, 12, 4, 3)
    levels = _logits(models.create("resenc_unet", deep_supervision=True, **TINY), x)
    assert [level.shape for level in levels] == [(2, 8, 12, 4, 3), (2, 4, 6, 2, 3)]
    np.testing.assert_allclose(levels[0], finest, atol=1e-5)


def test_remat_changes_nothing(rng):
    x = jnp.asarray(rng.standard_normal((1, 8, 8, 8, 1)), jnp.float32)
    networks = [models.create("resenc_unet", remat=r, **TINY) for r in (False, True)]
    plain, remat = (_gradient(network, x) for network in networks)
    for name, value in plain.items():
        scale = max(1, float(jnp.abs(value).max()))
        np.testing.assert_allclose(remat[name], value, atol=1e-4 * scale, err_msg=name)


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match="no setting widthz"):
        models.create("resenc_unet", widthz=(1, 2), classes=2)
    with pytest.raises(UserError, match="as many blocks as widths"):
        models.create("resenc_unet", widths=(4, 8), blocks=(1,), classes=2)
    with pytest.raises(UserError, match="resenc_unet"):
        models.create("vnet", classes=2)
    with pytest.raises(ValueError, match="each axis must divide by"):
        models.create("resenc_unet", **TINY)(jnp.ones((1, 10, 8, 8, 1)))


def test_instance_norm_and_pooling_by_their_definitions(rng):
    x = rng.standard_normal((2, 4, 6, 2, 3)).astype(np.float32)
    norm = InstanceNorm(3)
    mean, var = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(norm(jnp.asarray(x)), (x - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    pooled = average_pool(jnp.asarray(x), (2, 2, 1))
    np.testing.assert_allclose(pooled[0, 1, 2, 1], x[0, 2:4, 4:6, 1].mean((0, 1)), atol=1e-6)


def _reference(torch, *, classes, in_channels, strides, kernels=3, decoder=1, deep=True):
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    return unets.ResidualEncoderUNet(
        input_channels=in_channels,
        n_stages=3,
        features_per_stage=[4, 8, 12],
        conv_op=torch.nn.Conv3d,
        kernel_sizes=kernels,
        strides=strides,
        n_blocks_per_stage=[1, 2, 1],
        num_classes=classes,
        n_conv_per_stage_decoder=decoder,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep,
    )


@pytest.mark.parametrize(
    ("patch", "channels", "classes", "options"),
    [
        ((8, 8, 12), 1, 3, {"strides": [1, 2, 2]}),
        (
            (4, 16, 12),
            2,
            5,
            {
                # One stage changes its channels without a stride, kernels and decoder vary.
                "strides": [[1, 1, 1], [1, 2, 2], [1, 1, 1]],
                "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
                "decoder": [2, 1],
            },
        ),
    ],
)
def test_network_equals_its_reference(equals_reference, rng, patch, channels, classes, options):
    torch = pytest.importorskip("torch")
    reference = _reference(torch, classes=classes, in_channels=channels, **options)
    model = models.create(
        "resenc_unet",
        widths=(4, 8, 12),
        blocks=(1, 2, 1),
        classes=classes,
        in_channels=channels,
        strides=options["strides"],
        kernels=options.get("kernels"),
        decoder_blocks=options.get("decoder", 1),
        deep_supervision=True,
    )
    x = rng.standard_normal((2, *patch, channels)).astype(np.float32)
    equals_reference(model, reference, x)


@pytest.mark.parametrize(("stages", "millions"), [(5, 62.81), (6, 102.35)])
def test_presets_have_the_references_parameters(
    parameters_of, torch_parameters_of, stages, millions
):
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    from torch import nn as torch_nn

    def reference():
        return unets.ResidualEncoderUNet(
            input_channels=1,
            n_stages=stages,
            features_per_stage=[min(320, 32 * 2**i) for i in range(stages)],
            conv_op=torch_nn.Conv3d,
            kernel_sizes=3,
            strides=[1] + [2] * (stages - 1),
            n_blocks_per_stage=[1, 3, 4, 6, 6, 6][:stages],
            num_classes=2,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=torch_nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=torch_nn.LeakyReLU,
        )

    found = parameters_of("resenc_unet", preset="M", stages=stages, classes=2)
    assert found == torch_parameters_of(reference)
    assert found == pytest.approx(millions * 1e6, rel=1e-4)
    patch = {5: (96, 96, 96), 6: (128, 128, 128)}[stages]
    assert found == parameters_of("resenc_unet", preset="XL", patch_size=patch, classes=2)


@pytest.mark.slow
def test_full_size_equals_its_reference(equals_reference, rng):
    torch = pytest.importorskip("torch")
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    reference = unets.ResidualEncoderUNet(
        input_channels=1,
        n_stages=5,
        features_per_stage=[32, 64, 128, 256, 320],
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2, 2, 2],
        n_blocks_per_stage=[1, 3, 4, 6, 6],
        num_classes=3,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
    )
    x = rng.standard_normal((1, 48, 48, 32, 1)).astype(np.float32)
    equals_reference(
        models.create("resenc_unet", preset="M", classes=3), reference, x, full_size=True
    )


@pytest.mark.parametrize(
    "patch", [(96, 96, 96), (128, 128, 128), (48, 192, 192), (16, 320, 256), (8, 8, 32), (4, 4, 8)]
)
def test_strides_are_those_of_nnunets_planner(patch):
    topology = pytest.importorskip(
        "nnunetv2.experiment_planning.experiment_planners.network_topology"
    )
    _, strides, _, padded, _ = topology.get_pool_and_conv_props((1, 1, 1), patch, 4, 99)
    if len(strides) == 1 or padded != patch:
        with pytest.raises(UserError, match=r"model\.patch_size"):
            planned_strides(patch)
    else:
        assert planned_strides(patch) == [tuple(step) for step in strides]


def test_patches_that_cannot_be_halved_are_refused():
    with pytest.raises(
        UserError, match=r"\(100, 96, 96\): each axis must divide by \(16, 16, 16\)"
    ):
        models.create("resenc_unet", preset="M", patch_size=(100, 96, 96), classes=2)
    with pytest.raises(UserError, match="at least 8 voxels"):
        models.create("resenc_unet", preset="M", patch_size=(7, 7, 7), classes=2)


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_counts_of_classes_and_channels_are_whole_numbers(count):
    with pytest.raises(UserError, match=r"model\.classes is"):
        models.create("resenc_unet", preset="M", classes=count)
    with pytest.raises(UserError, match=r"model\.in_channels is"):
        models.create("resenc_unet", preset="M", classes=2, in_channels=count)


def test_functional_is_the_network(rng):
    model = models.create("resenc_unet", **TINY)
    apply, parameters = models.functional(model)
    x = jnp.asarray(rng.standard_normal((1, 8, 8, 8, 1)), jnp.float32)
    np.testing.assert_allclose(jax.jit(apply)(parameters, x), model(x), atol=1e-5)
    assert isinstance(model, nnx.Module)
    assert "encoder.1.blocks.0.skip.conv.kernel" in parameters
