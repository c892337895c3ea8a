"""Compiles a job's programs for chips that are not here, from shapes alone."""

import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict

from tumorjax import parallel
from tumorjax.anatomy import mirror_table
from tumorjax.data import augmentation
from tumorjax.errors import UserError
from tumorjax.inference.sliding_window import compiled_forward
from tumorjax.rehearsal import collectives
from tumorjax.training.segmenter import make_segmenter

# XLA's ExecutionOptions: from -1, the fastest compilation, to 1, the fastest program.
_QUICK = {"exec_time_optimization_effort": -1.0}


class Program(NamedTuple):
    """What the compiler says of a program, on each chip and in each run.

    Attributes:
        arguments, temporaries, peak: bytes. Temporaries are activations, gradients and copies;
            the peak is arguments, results that take no argument's place, and temporaries.
        flops, moved: operations, and bytes to and from memory.
        traffic: kind -> see `collectives.totals`.
        gathered: all-gathers of activations, in words.
        unknown_loops: whether collectives stand in loops of unknown length, counted once.
        compiling: seconds that it took.
        too_large: what the compiler says where the program does not fit; the rest is then 0.
    """

    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    flops: float = 0.0
    moved: float = 0.0
    traffic: dict[str, dict[str, float]] = {}  # noqa: RUF012
    gathered: tuple[str, ...] = ()
    unknown_loops: bool = False
    compiling: float = 0.0
    too_large: str = ""

    @property
    def sent(self) -> float:
        """Bytes that a chip sends over its links."""
        return sum(row["sent"] for row in self.traffic.values())


class Traced(NamedTuple):
    """A program before it is compiled, which takes minutes.

    Attributes:
        lowered: of `jax.jit(...).lower`.
        chips: that it runs on.
        arrays: numbers of elements of the state's arrays, which may be gathered.
    """

    lowered: Any
    chips: int
    arrays: set[int]

    def compile(self, quick: bool = False) -> Program:
        """Compiles it and reads off what it takes; any thread may.

        Args:
            quick: spend a fifth of the time. What is computed and what is sent are the same; how
                operations are fused, and so memory and the bytes to and from it, differ, and
                compare with those of programs that were compiled like this alone.
        """
        start = time.perf_counter()
        try:
            compiled = self.lowered.compile(compiler_options=_QUICK if quick else None)
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
            if "RESOURCE_EXHAUSTED" not in text:
                raise
            needed = re.search(r"Used [\d.]+\w of [\d.]+\w hbm[^\n]*", text)
            what = needed.group(0) if needed else text.splitlines()[0]
            return Program(too_large=what, compiling=time.perf_counter() - start)
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        found = collectives.parse(compiled.as_text(), self.chips)
        gathered = collectives.gathered_activations(found, self.arrays)
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return Program(
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            peak=memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
            flops=cost["flops"],
            moved=cost["bytes accessed"],
            traffic=collectives.totals(found),
            gathered=tuple(f"{one.shapes} over {one.group} chips" for one in gathered),
            unknown_loops=any(one.unknown_loop for one in found),
            compiling=time.perf_counter() - start,
        )


def training_step(config: ConfigDict, mesh: Mesh) -> tuple[Traced, int]:
    """Traces the training step, augmentation and optimizer included.

    Args:
        config: of a study or a segmentation job.
        mesh: of the chips. With several along "cell" it is the step of as many cells.

    Returns:
        the program, and the number of parameters of a network.

    Raises:
        UserError: the batch does not divide over the mesh.
    """
    cells, training = mesh.shape["cell"], config.training
    stacked = cells > 1
    parallel.batch_rows(mesh, training.batch_size)
    patch = tuple(training.patch_size)
    if patch[0] % mesh.shape["space"]:
        raise UserError(
            f"training.patch_size {patch}: {patch[0]} voxels along x do not divide over"
            f" {mesh.shape['space']} chips along 'space'. Change one of them"
        )
    segmenter = make_segmenter(config, mesh, stacked=stacked)
    one = segmenter.abstract
    front = (cells,) if stacked else ()
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*front, *x.shape), x.dtype), one)
    size = (training.batch_size, *augmentation.source_patch(patch, config.augmentation))
    batch = {
        "image": jax.ShapeDtypeStruct((*front, *size, 1), jnp.float32),
        "label": jax.ShapeDtypeStruct((*front, *size), jnp.uint8),
    }
    active = [jax.ShapeDtypeStruct(front, bool)] if stacked else []
    arrays = {int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(one)}
    step: Any = segmenter.step
    traced = Traced(step.lower(state, batch, *active), mesh.size, arrays)
    return traced, sum(int(np.prod(x.shape)) for x in one["parameters"].values())


def tile_batch(config: ConfigDict, mesh: Mesh) -> Traced:
    """Traces one pass of the sliding window on one chip, as a cell's test runs it.

    Args:
        config: of a study or a segmentation job.
        mesh: whose first chip it is for.
    """
    place = Mesh(mesh.devices[:1, :1, :1, :1], mesh.axis_names)
    here = parallel.replicated(place)

    def shaped(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    segmenter = make_segmenter(config, place)
    weights = jax.tree.map(lambda x: shaped(x.shape, x.dtype), segmenter.abstract["parameters"])
    patch, mirrored = tuple(config.training.patch_size), tuple(config.inference.mirror_axes)
    flip = shaped((3,), bool) if mirrored else None
    table = mirror_table(config.task.classes) if 0 in mirrored else None
    sides = None if table is None else shaped((len(table),), jnp.int32)
    tiles = shaped((config.inference.batch_size, *patch, 1), jnp.float32)
    arguments = (Partial(segmenter.apply, weights), tiles, flip, sides, shaped(patch, jnp.float32))
    return Traced(compiled_forward().lower(None, *arguments), 1, set())
