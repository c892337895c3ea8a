"""Building blocks: first weights and the leaky ReLU by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from tumorjax.models import layers


def test_first_weights_are_hes_normal():
    weights = np.asarray(layers.he_normal(jax.random.key(3), (3, 3, 3, 16, 32)))
    scale = np.sqrt(2 / ((1 + 0.01**2) * 27 * 16))
    assert weights.dtype == np.float32
    assert stats.kstest(weights.ravel() / scale, "norm").pvalue > 0.01


def test_first_weights_are_a_function_of_the_key():
    shape = (3, 3, 3, 2, 4)
    first, again, other = (layers.he_normal(jax.random.key(seed), shape) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.3


def test_layers_of_a_network_start_with_different_weights():
    rngs = nnx.Rngs(0)
    a, b = (layers.Conv(4, 4, 3, rngs=rngs).kernel[...] for _ in range(2))
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.2


def test_first_weights_have_shape_and_scale_under_tracing_too():
    shape = (3, 3, 3, 8, 16)
    abstract = jax.eval_shape(lambda key: layers.he_normal(key, shape), jax.random.key(0))
    assert (abstract.shape, abstract.dtype) == (shape, jnp.float32)
    traced = jax.jit(lambda key: layers.he_normal(key, shape))(jax.random.key(0))
    assert float(traced.std()) == pytest.approx(np.sqrt(2 / (1.0001 * 27 * 8)), rel=0.05)


def test_transposed_kernel_counts_its_fan_over_the_outputs_as_pytorch_does():
    kernel = layers.TransposedConv(64, 16, 2, rngs=nnx.Rngs(0)).kernel[...]
    assert kernel.shape == (2, 2, 2, 64, 16)
    assert float(kernel.std()) == pytest.approx(np.sqrt(2 / (1.0001 * 8 * 16)), rel=0.05)


def test_instance_norm_scales_shifts_and_forgets_the_inputs_unit(rng):
    x = jnp.asarray(rng.standard_normal((2, 5, 4, 3, 2)) * 3 + 7, jnp.float32)
    norm = layers.InstanceNorm(2)
    norm.scale[...], norm.bias[...] = jnp.asarray([2.0, 0.5]), jnp.asarray([-1.0, 3.0])
    y = np.asarray(norm(x))
    np.testing.assert_allclose(y.mean((1, 2, 3)), [[-1, 3]] * 2, atol=1e-4)
    np.testing.assert_allclose(y.std((1, 2, 3)), [[2, 0.5]] * 2, rtol=1e-3)
    np.testing.assert_allclose(norm(10 * x - 4), y, atol=1e-4)
    # Statistics are float32's also where activations are not.
    half = norm(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.05)


def test_average_pool_drops_what_fills_no_block(rng):
    x = rng.standard_normal((1, 5, 7, 4, 2)).astype(np.float32)
    pooled = layers.average_pool(jnp.asarray(x), (2, 3, 1))
    assert pooled.shape == (1, 2, 2, 4, 2)
    for i, j in np.ndindex(2, 2):
        block = x[:, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((1, 2))
        np.testing.assert_allclose(pooled[:, i, j], block, atol=1e-6)


def test_leaky_relu_has_nnunets_slope():
    found = layers.leaky_relu(jnp.asarray([-2.0, 0.0, 3.0]))
    np.testing.assert_allclose(found, [-0.02, 0, 3])
