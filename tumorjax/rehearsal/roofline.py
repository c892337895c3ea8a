"""How long a program takes at best, and what a grid of trainings then takes and costs."""

import math
from typing import NamedTuple

from tumorjax.rehearsal.chips import Chip


class Bound(NamedTuple):
    """The least time of a program.

    Attributes:
        seconds: the longest of the three, which may overlap at best.
        by: "arithmetic", "memory" or "network".
        parts: seconds of each.
    """

    seconds: float
    by: str
    parts: dict[str, float]


def bound(flops: float, moved: float, sent: float, chip: Chip) -> Bound:
    """Returns the roofline's time (Williams et al. 2009, doi:10.1145/1498765.1498785).

    Args:
        flops: floating-point operations of one chip.
        moved: bytes to and from its memory.
        sent: bytes over its links.
        chip: which.
    """
    parts = {
        "arithmetic": flops / chip.flops,
        "memory": moved / chip.memory_bandwidth,
        "network": sent / chip.link_bandwidth,
    }
    by = max(parts, key=lambda name: parts[name])
    return Bound(parts[by], by, parts)


class Grid(NamedTuple):
    """What a grid takes.

    Attributes:
        waves: how often all positions take a cell.
        idle: positions without a cell in the last wave.
        training_hours, testing_hours, hours: of the whole machine.
        chip_hours: `hours` times the chips.
    """

    waves: int
    idle: int
    training_hours: float
    testing_hours: float
    hours: float
    chip_hours: float


def grid(
    cells: int, side_by_side: int, chips: int, step_seconds: float, steps: int, test_seconds: float
) -> Grid:
    """Returns what all cells take.

    Args:
        cells: of the grid.
        side_by_side: cells that are trained at once.
        chips: of the machine, all of which are paid for until the end.
        step_seconds: of a training step of all cells that are side by side.
        steps: of a training.
        test_seconds: for one cell's test on the chips that trained it.
    """
    waves = math.ceil(cells / side_by_side)
    training = waves * steps * step_seconds / 3600
    testing = waves * test_seconds / 3600
    hours = training + testing
    return Grid(waves, waves * side_by_side - cells, training, testing, hours, hours * chips)
