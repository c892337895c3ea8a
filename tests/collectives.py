"""Reads what devices say to each other out of a compiled program."""

import math
import re
from typing import NamedTuple

_INSTRUCTION = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-gather|all-to-all|ragged-all-to-all|all-reduce"
    r"|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"[a-z]+[0-9]*\w*\[([0-9,]*)\]")
_SCOPE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One instruction.

    Attributes:
        kind: as XLA names it, for instance "all-gather".
        shapes: of its results.
        scope: the path of JAX's names that it comes from.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    scope: str

    @property
    def size(self) -> int:
        """Number of elements of the largest result."""
        return max(math.prod(shape) for shape in self.shapes)


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of an HLO text, `jax.stages.Compiled.as_text()`."""
    found = []
    for line in text.splitlines():
        if match := _INSTRUCTION.search(line):
            shapes = tuple(
                tuple(int(n) for n in shape.split(",") if n)
                for shape in _ARRAY.findall(match["result"])
            )
            scope = _SCOPE.search(line)
            found.append(Collective(match["kind"], shapes, scope[1] if scope else ""))
    return found


def moving_whole_arrays(text: str) -> list[Collective]:
    """Returns the collectives that put arrays together or lay them out anew."""
    halo = ("all-reduce", "reduce-scatter", "collective-permute")
    return [one for one in collectives(text) if one.kind not in halo]
