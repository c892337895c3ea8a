"""Blocks whose inside is computed again in the backward pass instead of being kept until then.

`jax.checkpoint` marks the second computation with optimization barriers, which XLA's CPU compiler
takes out before it looks for common subexpressions: it then finds that both computations are the
same, and keeps the first one's results. (ResEncM's training step needed 5.7 GiB of temporaries on
CPU with and without it.) There the second computation takes its weights from an expression that
depends on the incoming gradient, so that it can neither be the same nor come earlier.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tumorjax import backend


def run_block(block: nnx.Module, *inputs: Array | tuple[Array, ...], remat: bool) -> Array:
    """Applies a block; with `remat` its inside is computed again in the backward pass.

    Args:
        block: called with the inputs. It must not change its own state.
        inputs: arrays, or tuples of them.
        remat: keep the inputs alone for the backward pass.

    Returns:
        What the block returns.
    """
    if not remat:
        return block(*inputs)  # type: ignore[operator]
    if backend.platform() != "cpu":
        return nnx.remat(lambda block, *inputs: block(*inputs))(block, *inputs)
    graph, state = nnx.split(block)

    def pure(state, inputs):
        return nnx.merge(graph, state)(*inputs)

    @jax.custom_vjp
    def again(state, inputs):
        return pure(state, inputs)

    def forward(state, inputs):
        return pure(state, inputs), (state, inputs)

    def backward(residuals, gradient):
        state, inputs = residuals
        return jax.vjp(pure, _tied(state, gradient), inputs)[1](gradient)

    again.defvjp(forward, backward)
    return again(state, inputs)


def _tied(state, gradient):
    """Returns the same values, from an expression that needs the gradient."""
    first = jax.tree.leaves(gradient)[0]
    # 0 for any number, and the compiler does not know it.
    zero = jnp.minimum(jnp.abs(first[(0,) * first.ndim].astype(jnp.float32)), 0)
    return jax.tree.map(lambda value: value + zero.astype(value.dtype), state)
