"""The residual-encoder U-Net: size, shapes, settings, and equality to its reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.models.layers import InstanceNorm, average_pool

TINY = {"widths": (4, 8, 16), "blocks": (1, 2, 1), "classes": 3}


def _logits(network, x):
    # Compiled as a whole: operation by operation takes five times as long.
    apply, parameters = models.functional(network)
    return jax.jit(apply)(parameters, x)


def _gradient(network, x):
    apply, parameters = models.functional(network)
    return jax.jit(jax.grad(lambda p: jnp.square(apply(p, x)).mean()))(parameters)


def test_preset_m_has_the_references_parameters():
    # dynamic-network-architectures' ResidualEncoderUNet, 5 stages, 2 classes: 62.81 million.
    def parameters():
        return models.functional(models.create("resenc_unet", preset="M", classes=2))[1]

    shapes = jax.eval_shape(parameters)
    count = sum(int(np.prod(value.shape)) for value in shapes.values())
    # The reference keeps a head at each of the four levels, as this network does.
    assert count == pytest.approx(62.81e6, rel=1e-3)


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


def test_logits_equal_the_references_with_the_same_weights(rng):
    torch = pytest.importorskip("torch")
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    reference = unets.ResidualEncoderUNet(
        input_channels=1,
        n_stages=3,
        features_per_stage=[4, 8, 16],
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2],
        n_blocks_per_stage=[1, 2, 1],
        num_classes=3,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    ).eval()
    with torch.no_grad():
        for value in reference.parameters():
            value.copy_(torch.from_numpy(0.3 * rng.standard_normal(value.shape)))
    model = models.create("resenc_unet", deep_supervision=True, **TINY)
    apply, ours = models.functional(model)
    loaded = {name: _ours_from(reference.state_dict(), name, ours[name]) for name in ours}
    x = rng.standard_normal((2, 8, 8, 12, 1)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(np.moveaxis(x, -1, 1)))
    for found, level in zip(jax.jit(apply)(loaded, jnp.asarray(x)), expected, strict=True):
        scale = float(level.abs().max())
        np.testing.assert_allclose(found, np.moveaxis(level.numpy(), 1, -1), atol=1e-4 * scale)


def _ours_from(weights, name: str, like: jax.Array) -> jax.Array:
    """Finds a parameter of this network in the reference's state_dict."""
    parts = name.split(".")
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}[parts[-1]]
    if parts[0] == "stem":
        key = f"encoder.stem.convs.0.{parts[1]}.{leaf}"
    elif parts[0] == "encoder":
        _, stage, _, block, layer, kind, _ = parts
        # Where a block is strided the skip's first entry is the pool.
        layer = {"skip": "skip.1"}.get(layer, layer)
        key = f"encoder.stages.{stage}.blocks.{block}.{layer}.{kind}.{leaf}"
        if key not in weights:
            key = key.replace("skip.1", "skip.0")
    elif parts[0] == "transposed":
        key = f"decoder.transpconvs.{parts[1]}.{leaf}"
    elif parts[0] == "decoder":
        key = f"decoder.stages.{parts[1]}.convs.{parts[3]}.{parts[4]}.{leaf}"
    else:
        key = f"decoder.seg_layers.{parts[1]}.{leaf}"
    value = weights[key].numpy()
    if parts[-1] == "kernel":
        # PyTorch: [out, in, x, y, z], transposed convolutions [in, out, x, y, z].
        order = (2, 3, 4, 0, 1) if parts[0] == "transposed" else (2, 3, 4, 1, 0)
        value = value.transpose(order)
    assert value.shape == like.shape, (name, key)
    return jnp.asarray(value)


def test_functional_is_the_network(rng):
    model = models.create("resenc_unet", **TINY)
    apply, parameters = models.functional(model)
    x = jnp.asarray(rng.standard_normal((1, 8, 8, 8, 1)), jnp.float32)
    np.testing.assert_allclose(jax.jit(apply)(parameters, x), model(x), atol=1e-5)
    assert isinstance(model, nnx.Module)
    assert "encoder.1.blocks.0.skip.conv.kernel" in parameters
