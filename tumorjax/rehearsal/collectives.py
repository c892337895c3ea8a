"""What chips say to each other in a compiled program, read from its HLO text."""

import math
import re
from collections import defaultdict
from collections.abc import Collection
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = re.compile(r"^(?:[a-z]+?)(\d+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
    r"= (\(.*?\)|\S+) (" + "|".join(KINDS) + r")(-start)?\((?P<operands>[^)]*)\)"
)
_CALLED = re.compile(
    r"(body|condition|to_apply|calls|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One instruction.

    Attributes:
        kind: one of `KINDS`.
        shapes: of its results.
        bytes: of its results, on each chip.
        group: chips that talk with each other.
        times: how often a run of the program executes it; of a loop whose length the compiler
            does not know, once.
        unknown_loop: whether it is within such a loop.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    group: int
    times: int
    unknown_loop: bool

    @property
    def sent(self) -> float:
        """Bytes that a chip sends over its links each time, by the ring algorithms."""
        others = (self.group - 1) / self.group if self.group else 0.0
        return (
            self.bytes
            * {
                "all-gather": others,
                "all-reduce": 2 * others,
                "reduce-scatter": float(self.group - 1),
                "all-to-all": others,
                "collective-permute": 1.0,
                "collective-broadcast": 1.0,
            }[self.kind]
        )


def parse(text: str, chips: int) -> list[Collective]:
    """Returns all collectives that a program may run.

    Args:
        text: of a compiled program, as `Compiled.as_text()` gives it.
        chips: that it runs on, for groups that are not spelled out.
    """
    computations, entry = _computations(text)
    runs = _times(computations, entry)
    found = []
    for name, lines in computations.items():
        times, unknown = runs.get(name, (0, False))
        if not times:
            continue
        for line in lines:
            match = _INSTRUCTION.search(line)
            if not match:
                continue
            shape, kind, start = match.group(1), match.group(2), match.group(3)
            arrays = _ARRAY.findall(shape)
            if start and kind != "all-reduce":
                arrays = _results_of_start(arrays, kind)
            shapes = tuple(_sizes(sizes) for _, sizes in arrays)
            size = sum(_bytes(of) * math.prod(s) for (of, _), s in zip(arrays, shapes, strict=True))
            group = 2 if kind == "collective-permute" else _group(line, chips)
            found.append(Collective(kind, shapes, int(size), group, times, unknown))
    # Groups of one chip are left behind by the partitioner and move nothing.
    return [one for one in found if one.group > 1]


def totals(found: Collection[Collective]) -> dict[str, dict[str, float]]:
    """Returns kind -> count, bytes of results and bytes sent, on each chip and in each run."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(_COLUMNS, 0.0))
    for one in found:
        for column, value in zip(_COLUMNS, (1, one.bytes, one.sent), strict=True):
            sums[one.kind][column] += value * one.times
    return dict(sorted(sums.items()))


_COLUMNS = ("count", "bytes", "sent")


def gathered_activations(
    found: Collection[Collective], parameters: Collection[int]
) -> list[Collective]:
    """Returns the all-gathers of volumes that are no parameter.

    Args:
        found: a program's.
        parameters: numbers of elements of the state's arrays. Sharded weights are gathered before
            they are used, which is what "fsdp" is for.
    """
    known = set(parameters)
    return [
        one
        for one in found
        if one.kind == "all-gather"
        and any(len(s) >= 4 and math.prod(s) > 1 and math.prod(s) not in known for s in one.shapes)
    ]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header.group(1)
            computations[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif current:
            computations[current].append(line)
    return computations, entry


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, tuple[int, bool]]:
    """Returns how often each computation runs, and whether within a loop of unknown length."""
    edges: dict[str, list[tuple[str, int, bool]]] = {}
    for name, lines in computations.items():
        edges[name] = []
        for line in lines:
            trips = _TRIPS.search(line)
            for role, called in _CALLED.findall(line):
                loop = role in ("body", "condition")
                count = int(trips.group(1)) if loop and trips else 1
                for other in re.findall(r"[\w.\-]+", called):
                    edges[name].append((other, count, loop and not trips))
    runs: dict[str, tuple[int, bool]] = {}

    def visit(name: str, times: int, unknown: bool) -> None:
        before = runs.get(name, (0, False))
        runs[name] = (before[0] + times, before[1] or unknown)
        for other, count, is_unknown in edges.get(name, ()):
            visit(other, times * count, unknown or is_unknown)

    visit(entry, 1, False)
    return runs


def _results_of_start(arrays: list[tuple[str, str]], kind: str) -> list[tuple[str, str]]:
    """An asynchronous start gives (operands, results, contexts)."""
    if kind == "collective-permute":
        return arrays[1:2]
    return arrays[len(arrays) // 2 :] if len(arrays) > 1 else arrays


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _bytes(dtype: str) -> float:
    if dtype == "pred":
        return 1
    match = _BITS.match(dtype)
    return int(match.group(1)) / 8 if match else 4


def _group(line: str, chips: int) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(_sizes(listed.group(1)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    return int(iota.group(2)) if iota else chips
