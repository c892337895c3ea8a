"""Every formulation equals lax's 3D convolution, in value and in both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax.models import winograd
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
        # Winograd's tiles of 4 and of 2 planes, whole and not.
        ((2, 12, 5, 3, 2), (3, 3, 3), (1, 1, 1)),
        ((1, 6, 4, 7, 3), (3, 3, 3), (1, 1, 1)),
        ((1, 7, 5, 6, 2), (3, 1, 3), (1, 1, 1)),
        ((1, 1, 4, 4, 2), (3, 3, 5), (1, 1, 1)),
    ],
)
def test_formulations_equal_direct(rng, shape, size, stride):
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((*size, shape[-1], 4)), jnp.float32)
    results = []
    for formulation in ("direct", "planar", "winograd"):

        def f(x, kernel, formulation=formulation):
            return convolution(x, kernel, stride, formulation)

        value, pull = jax.vjp(f, x, kernel)
        gradient = jnp.asarray(np.random.default_rng(1).standard_normal(value.shape), jnp.float32)
        results.append((value, *pull(gradient)))
    direct, *others = results
    for other in others:
        for expected, found in zip(direct, other, strict=True):
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


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


def test_winograds_gradient_of_the_kernel_is_the_same_in_slabs(rng, monkeypatch):
    x = jnp.asarray(rng.standard_normal((2, 8, 5, 4, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 3, 2)), jnp.float32)

    def gradient():
        return jax.grad(lambda kernel: jnp.square(winograd.convolve(x, kernel)).sum())(kernel)

    whole = gradient()
    monkeypatch.setattr(winograd, "_SLAB_IMAGES", 3)
    monkeypatch.setattr(winograd, "_SLAB_PIXELS", 1)
    np.testing.assert_allclose(gradient(), whole, atol=1e-5 * float(jnp.abs(whole).max()))


def test_bfloat16_operands_are_summed_in_float32(rng):
    x = jnp.asarray(rng.standard_normal((1, 8, 6, 6, 64)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 64, 8)), jnp.bfloat16)
    exact = convolution(x.astype(jnp.float32), kernel.astype(jnp.float32), formulation="direct")
    found = convolution(x, kernel, formulation="winograd")
    assert found.dtype == jnp.bfloat16
    # One rounding, of the result: 2^-9 of each value.
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-2)


def test_a_networks_formulation_follows_its_width(rng):
    x = jnp.asarray(rng.standard_normal((1, 4, 4, 4, 32)), jnp.float32)
    for width, products in ((1, 1), (8, 6)):
        kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 32, width)), jnp.float32)
        text = str(jax.make_jaxpr(convolution)(x, kernel))
        assert text.count("conv_general_dilated[") == products
