"""Upsampling: equality to PyTorch's operations, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tumorjax import models
from tumorjax.models.upsampling import (
    OverlappingTransposedConv,
    upsample_linear,
    upsample_nearest,
)


def _first(x):
    return np.moveaxis(x, -1, 1).copy()


@pytest.mark.parametrize("factor", [(2, 2, 2), (1, 2, 1), (2, 1, 2)])
@pytest.mark.parametrize(
    ("ours", "mode"), [(upsample_nearest, "nearest"), (upsample_linear, "trilinear")]
)
def test_interpolation_is_pytorchs(rng, factor, ours, mode):
    torch = pytest.importorskip("torch")
    x = rng.standard_normal((2, 3, 1, 4, 5)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(_first(x)), scale_factor=[float(f) for f in factor], mode=mode
    )
    found = ours(jnp.asarray(x), factor)
    np.testing.assert_allclose(_first(found), theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("stride", [(2, 2, 2), (2, 1, 2)])
def test_overlapping_transposed_convolution_is_pytorchs(rng, stride):
    torch = pytest.importorskip("torch")
    size = tuple(2 * s - 1 for s in stride)
    x = rng.standard_normal((2, 4, 3, 5, 3)).astype(np.float32)
    kernel = rng.standard_normal((*size, 3, 2)).astype(np.float32)
    tx = torch.from_numpy(_first(x)).requires_grad_()
    tk = torch.from_numpy(kernel.transpose(3, 4, 0, 1, 2).copy()).requires_grad_()
    theirs = torch.nn.functional.conv_transpose3d(
        *(tx, tk),
        stride=stride,
        padding=[k // 2 for k in size],
        output_padding=[s - 1 for s in stride],
    )
    draw = rng.standard_normal(tuple(theirs.shape)).astype(np.float32)
    (theirs * torch.from_numpy(draw)).sum().backward()

    apply, _ = models.functional(OverlappingTransposedConv(3, 2, stride, rngs=nnx.Rngs(0)))

    def loss(kernel, x):
        y = apply({"kernel": kernel}, x)
        return jnp.sum(y * np.moveaxis(draw, 1, -1)), y

    found_gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, found), (of_kernel, of_x) = found_gradients(jnp.asarray(kernel), jnp.asarray(x))
    np.testing.assert_allclose(_first(found), theirs.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(of_kernel, tk.grad.numpy().transpose(2, 3, 4, 0, 1), atol=1e-4)
    np.testing.assert_allclose(_first(of_x), tx.grad.numpy(), atol=1e-4)
