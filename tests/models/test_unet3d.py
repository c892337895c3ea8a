"""Batch norm and pooling of the U-Net of Models Genesis, against PyTorch's and by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax import models
from tumorjax.models import unet3d


def _norm(rng, statistics):
    norm = unet3d.BatchNorm(3, statistics=statistics)
    norm.scale[...], norm.bias[...] = jnp.asarray(rng.uniform(0.5, 2, (2, 3)), jnp.float32)
    norm.mean[...] = jnp.asarray(rng.standard_normal(3), jnp.float32)
    norm.variance[...] = jnp.asarray(rng.uniform(0.5, 2, 3), jnp.float32)
    return norm


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_batch_norm_equals_pytorchs(rng, statistics):
    torch = pytest.importorskip("torch")
    norm = _norm(rng, statistics)
    reference = torch.nn.BatchNorm3d(3).train(statistics == "batch")
    with torch.no_grad():
        for name, value in (
            *(("weight", norm.scale), ("bias", norm.bias)),
            *(("running_mean", norm.mean), ("running_var", norm.variance)),
        ):
            getattr(reference, name).copy_(torch.from_numpy(np.array(value[...])))
    x = (2 + 3 * rng.standard_normal((2, 4, 5, 6, 3))).astype(np.float32)
    expected = reference(torch.from_numpy(np.moveaxis(x, -1, 1))).detach().numpy()
    np.testing.assert_allclose(norm(jnp.asarray(x)), np.moveaxis(expected, 1, -1), atol=1e-5)


def test_statistics_of_a_sample_are_those_of_a_batch_of_one(rng):
    x = jnp.asarray(rng.standard_normal((3, 4, 2, 4, 3)) * rng.uniform(1, 9, 3), jnp.float32)
    of_batch, of_sample = (
        _norm(np.random.default_rng(1), statistics) for statistics in ("batch", "sample")
    )
    expected = jnp.concatenate([of_batch(x[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(of_sample(x), expected, atol=1e-5)
    assert float(jnp.abs(of_batch(x) - expected).max()) > 1e-2


def test_running_statistics_are_fixed_and_get_no_gradient(rng):
    model = models.create("suprem", classes=2, width=2, statistics="running")
    apply, parameters = models.functional(model)
    fixed = models.fixed_parameters(model)
    assert {name for name in parameters if name.endswith((".mean", ".variance"))} == fixed
    assert len(fixed) == 2 * 14
    x = jnp.asarray(rng.standard_normal((1, 8, 8, 8, 1)), jnp.float32)
    gradients = jax.jit(jax.grad(lambda p: jnp.square(apply(p, x)).mean()))(parameters)
    assert all(float(jnp.abs(gradients[name]).max()) == 0 for name in fixed)
    assert float(jnp.abs(gradients["backbone.down_tr64.ops.0.conv1.kernel"]).max()) > 0


def test_max_pool_by_its_definition(rng):
    x = rng.standard_normal((1, 4, 6, 2, 3)).astype(np.float32)
    pooled = unet3d.max_pool(jnp.asarray(x))
    assert pooled.shape == (1, 2, 3, 1, 3)
    np.testing.assert_array_equal(pooled[0, 1, 2, 0], x[0, 2:4, 4:6].max((0, 1, 2)))
