"""The machines that a rehearsal knows: makers' figures a chip.

TPUs: the makers' documentation of v4, v5e, v5p and v6e ("System architecture"), and "How to Scale
Your Model" (jax-ml.github.io/scaling-book), table of TPU specs, whose links are a tenth slower than
what the makers' sums over all ports come to. H100: NVIDIA's data sheet of the SXM module, dense
bfloat16; its link is one 400 Gbit/s adapter a GPU, as between machines (within one, NVLink is nine
times faster).
"""

import math
import os
import re
from typing import NamedTuple

from tumorjax.errors import UserError


class Chip(NamedTuple):
    """What limits a program on one chip.

    Attributes:
        name: as in prices and topologies.
        memory: bytes.
        flops: of bfloat16 a second, at best.
        memory_bandwidth: bytes a second.
        link_bandwidth: bytes a second to its neighbours, one direction, one axis of the network.
        compiled_here: whether libtpu compiles for it without having one.
        shapes: topologies of 16, 64 and 256 chips.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    compiled_here: bool = True
    shapes: tuple[str, ...] = ("4x4", "8x8", "16x16")


_CUBES = ("2x2x4", "4x4x4", "4x8x8")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32e9, 275e12, 1.2e12, 45e9, shapes=_CUBES),
        Chip("v5e", 16e9, 197e12, 819e9, 45e9),
        Chip("v5p", 95e9, 459e12, 2.765e12, 90e9, shapes=_CUBES),
        Chip("v6e", 32e9, 918e12, 1.64e12, 90e9),
        Chip("h100", 80e9, 989e12, 3.35e12, 50e9, compiled_here=False, shapes=("16", "64", "256")),
    )
}
# Of the compiler's program where a chip has no compiler here.
STAND_IN = "v5p:2x2x1"


def parse(topology: str) -> tuple[Chip, int]:
    """Returns the chip and the number of chips of "v5e:16x16" or "h100:64".

    Raises:
        UserError: it is none of those that are known.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(
            f"rehearse is {topology!r}. Expected a chip among {', '.join(CHIPS)}, a colon and a"
            " shape: v5e:16x16, v6e:8x8, v5p:4x4x4 (v5p-128 counts two cores a chip), h100:64"
        )
    sizes = [int(size) for size in shape.split("x")]
    chip = CHIPS[name]
    wanted = chip.shapes[0].count("x") + 1
    if len(sizes) != wanted:
        raise UserError(
            f"rehearse is {topology!r}. Expected {wanted} sizes for {name}, for instance"
            f" {name}:{chip.shapes[1]}"
        )
    return chip, math.prod(sizes)


def smaller(topology: str) -> list[str]:
    """Returns topologies of the chip with 16 and 64 chips, as far as they are smaller, and it."""
    chip, count = parse(topology)
    below = [f"{chip.name}:{s}" for s in chip.shapes if parse(f"{chip.name}:{s}")[1] < count]
    return [*below, topology]


def devices(topology: str) -> list:
    """Returns devices of a topology that programs can be compiled for; there need be none here.

    Raises:
        UserError: libtpu is missing, or does not know the topology.
    """
    # libtpu asks the cloud which machine it is on, and logs that it is on none.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a compiler takes no chip from anyone
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'rehearse {topology} needs the TPU compiler: pip install "tumorjax[tpu]"'
        ) from error
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chip_config_name="default"
        )
    except Exception as error:  # jaxlib's own error types differ from version to version
        known = [f"{c.name}:{s}" for c in CHIPS.values() if c.compiled_here for s in c.shapes]
        raise UserError(
            f"rehearse {topology}: libtpu knows no such topology"
            f" ({str(error).splitlines()[0]}). Known are for instance {', '.join(known)}"
        ) from error
    return list(described.devices)
