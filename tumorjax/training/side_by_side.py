"""One step for cells that are trained side by side."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from tumorjax import parallel
from tumorjax.models import convolution
from tumorjax.training import loop


def stacked_step(
    step: Callable[..., tuple[dict[str, Any], dict[str, Array]]],
    mesh: Mesh,
    state: dict[str, Any],
    batch: dict[str, Any],
    weights: Any = None,
) -> loop.StackedStep:
    """Returns the step of one cell at each position along "cell".

    Under shard_map each position runs the program of a cell that is alone, conditionals and all
    (under vmap both sides of each would be computed), and no cell can wait for another.

    Args:
        step: of one cell.
        mesh: of all cells.
        state: one cell's, abstract.
        batch: shardings of the stacked batch.
        weights: arrays that `step` takes besides, on all devices; None if it takes none.

    Returns:
        (stacked state, stacked batch, active [cells]) -> (stacked state, scalars [cells]). A cell
        that is not active, or whose loss is no number, keeps its state bit for bit.
    """

    def of_position(state, batch, active, *more):
        one, rows = (jax.tree.map(lambda x: x[0], part) for part in (state, batch))
        new, scalars = step(one, rows, *more)
        goes_on = active[0] & jnp.isfinite(scalars["loss"])
        new = jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), new, one)
        return jax.tree.map(lambda x: x[None], (new, scalars))

    cells = parallel.CELLS
    of_all = jax.shard_map(
        of_position,
        mesh=mesh,
        in_specs=(cells, cells, cells, *[PartitionSpec()] * (weights is not None)),
        out_specs=(cells, cells),
        axis_names={"cell"},
        check_vma=False,
    )
    count = mesh.shape["cell"]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), state)
    shardings = parallel.state_shardings(mesh, like, stacked=True)
    by_cell = parallel.by_cell(mesh)
    compiled = functools.partial(
        jax.jit,
        of_all,
        donate_argnums=0,
        out_shardings=(shardings, by_cell),
        compiler_options=convolution.compiler_options(),
    )
    if weights is None:
        return compiled(in_shardings=(shardings, batch, by_cell))
    whole = parallel.replicated(mesh)
    with_weights = compiled(in_shardings=(shardings, batch, by_cell, whole))
    return lambda state, batch, active: with_weights(state, batch, active, weights)
