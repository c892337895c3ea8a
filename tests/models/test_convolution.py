"""The planar formulation equals lax's 3D convolution, in value and in both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax.models.convolution import convolution, transposed_convolution


@pytest.mark.parametrize(
    ("shape", "size", "stride"),
    [
        ((2, 8, 8, 8, 3), (3, 3, 3), (1, 1, 1)),
        ((2, 8, 8, 8, 3), (3, 3, 3), (2, 2, 2)),
        ((1, 8, 6, 4, 2), (3, 3, 3), (1, 2, 2)),
        ((1, 7, 9, 5, 2), (3, 3, 3), (2, 2, 2)),
        ((1, 6, 5, 4, 3), (1, 1, 1), (1, 1, 1)),
        ((1, 6, 6, 6, 3), (1, 1, 1), (2, 2, 2)),
        ((1, 8, 8, 8, 2), (1, 3, 3), (1, 2, 2)),
        ((1, 9, 8, 8, 1), (5, 3, 3), (1, 1, 1)),
    ],
)
def test_planar_equals_direct(rng, shape, size, stride):
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((*size, shape[-1], 4)), jnp.float32)
    results = []
    for formulation in ("direct", "planar"):

        def f(x, kernel, formulation=formulation):
            return convolution(x, kernel, stride, formulation)

        value, pull = jax.vjp(f, x, kernel)
        gradient = jnp.asarray(np.random.default_rng(1).standard_normal(value.shape), jnp.float32)
        results.append((value, *pull(gradient)))
    for direct, planar in zip(*results, strict=True):
        assert direct.shape == planar.shape
        np.testing.assert_allclose(planar, direct, atol=2e-4 * float(jnp.abs(direct).max()))


@pytest.mark.parametrize("size", [(2, 2, 2), (1, 2, 2)])
def test_transposed_convolution_equals_lax(rng, size):
    x = jnp.asarray(rng.standard_normal((2, 3, 4, 5, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((*size, 3, 2)), jnp.float32)
    # lax's transposed convolution correlates: its kernel is mirrored.
    expected = jax.lax.conv_transpose(
        x,
        kernel[::-1, ::-1, ::-1],
        size,
        "VALID",
        dimension_numbers=("NXYZC", "XYZIO", "NXYZC"),
        transpose_kernel=False,
    )
    found = transposed_convolution(x, kernel)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4)
