"""What a rehearsal found, as tables and as JSON."""

from typing import Any

from ml_collections import ConfigDict

from tumorjax.rehearsal import roofline
from tumorjax.rehearsal.chips import Chip
from tumorjax.rehearsal.programs import Program

_ASSUMED = (
    "Counted by the compiler: parameters, memory, FLOP, bytes to and from memory, collectives."
    " Makers' figures: the chip's peak rates. So the roofline's times are the least that are"
    " possible"
)
_GROWING = (
    "When cells, or else the batch, grow with the chips. These steps are compiled in a fifth of the"
    " time, so that their peaks compare with each other alone:"
)


def summary(
    topology: str,
    chip: Chip,
    chips: int,
    mesh: dict[str, int],
    parameters: int,
    step: Program,
    tiles: Program,
    plan: dict[str, Any],
    settings: ConfigDict,
    stand_in: str,
) -> dict[str, Any]:
    """Returns all that is known of a job on a machine.

    Args:
        topology: as given.
        chip: its chip.
        chips: how many there are.
        mesh: axis -> size.
        parameters: of one network.
        step, tiles: compiled programs.
        plan: cells, steps, tile_batches (of a cell's test).
        settings: config.rehearsal.
        stand_in: topology whose compiler's program this is; "" if the chip's own.
    """
    rows: dict[str, Any] = {
        "topology": topology,
        "chips": chips,
        "mesh": mesh,
        "parameters": parameters,
        "memory": {
            "limit": chip.memory,
            "arguments": step.arguments,
            "temporaries": step.temporaries,
            "peak": step.peak,
            "fits": not step.too_large and step.peak <= chip.memory,
            "compiler": step.too_large,
        },
        "flops": step.flops,
        "bytes": step.moved,
        "collectives": step.traffic,
        "sent": step.sent,
        "gathered_activations": list(step.gathered),
        "collectives_in_unknown_loops": step.unknown_loops,
        "compiled_for": stand_in or topology,
        "compile_seconds": step.compiling,
        "assumptions": _assumptions(stand_in, settings),
    }
    if step.too_large:
        return rows
    least = roofline.bound(step.flops, step.moved, step.sent, chip)
    test = roofline.bound(tiles.flops, tiles.moved, 0.0, chip)
    side = mesh["cell"]
    test_seconds = plan["tile_batches"] * test.seconds
    size = (plan["cells"], side, chips)
    at_best = roofline.grid(*size, least.seconds, plan["steps"], test_seconds)
    share = settings.efficiency
    expected = roofline.grid(*size, least.seconds / share, plan["steps"], test_seconds / share)
    price = settings.prices.get(chip.name, 0.0)
    rows["step"] = {"seconds": least.seconds, "bound_by": least.by, "parts": least.parts}
    rows["test"] = {
        "tile_batches": plan["tile_batches"],
        "seconds_per_batch": test.seconds,
        "bound_by": test.by,
        "memory": tiles.peak,
    }
    rows["grid"] = {"cells": plan["cells"], "side_by_side": side, "steps": plan["steps"]} | {
        "at_best": at_best._asdict(),
        "at_efficiency": expected._asdict(),
    }
    rows["price"] = {
        "per_chip_hour": price,
        "at_best": at_best.chip_hours * price,
        "at_efficiency": expected.chip_hours * price,
    }
    return rows


def _assumptions(stand_in: str, settings: ConfigDict) -> list[str]:
    lines = [
        _ASSUMED,
        f"Guessed: rehearsal.efficiency {settings.efficiency:g} of the roofline's rate, and"
        f" {settings.test_scans} test scans a cell of {tuple(settings.scan)} voxels",
        "Not in it: preparation, loading, metrics on the host, start-up, preemptions",
    ]
    if stand_in:
        lines.append(
            f"No compiler for this chip is here: FLOP, bytes and memory are those of one cell's"
            f" program as the TPU compiler makes it for {stand_in}, one chip a cell; another"
            " compiler fuses otherwise, so that memory and bytes are a guess"
        )
    return lines


def markdown(found: dict[str, Any], scaling: list[dict[str, Any]], advice: list[str]) -> str:
    """Returns the tables that are printed and kept."""
    memory = found["memory"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    lines = [
        f"# Rehearsal for {found['topology']}",
        "",
        "| | |",
        "| --- | --- |",
        f"| chips, mesh | {found['chips']}: {mesh} |",
        f"| parameters of a network | {found['parameters']:,} |",
    ]
    if memory["compiler"]:
        lines.append(f"| memory a chip | does not fit: {memory['compiler']} |")
    else:
        lines += _fitting_rows(found)
    if advice:
        lines += ["", "What to change:", "", *[f"- {line}" for line in advice]]
    if scaling:
        lines += ["", _GROWING, "", *_scaling_rows(scaling)]
    lines += ["", *[f"- {line}." for line in found["assumptions"]]]
    return "\n".join(lines) + "\n"


def _fitting_rows(found: dict[str, Any]) -> list[str]:
    memory, step, test, grid = (found[name] for name in ("memory", "step", "test", "grid"))
    parts = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in step["parts"].items())
    best, expected = grid["at_best"], grid["at_efficiency"]
    fits = "fits" if memory["fits"] else "does not fit"
    lines = [
        f"| state and batch a chip | {memory['arguments'] / 1e9:.2f} GB |",
        f"| activations and other temporaries | {memory['temporaries'] / 1e9:.2f} GB |",
        f"| peak | {memory['peak'] / 1e9:.2f} of {memory['limit'] / 1e9:.0f} GB, {fits} |",
        f"| a step, each chip | {found['flops'] / 1e12:.2f} TFLOP,"
        f" {found['bytes'] / 1e9:.1f} GB to and from memory |",
    ]
    for kind, row in found["collectives"].items():
        lines.append(
            f"| {kind} | {row['count']:.0f} a step, {row['bytes'] / 1e6:.3f} MB a chip,"
            f" {row['sent'] / 1e6:.3f} MB sent |"
        )
    if not found["collectives"]:
        lines.append("| collectives | none |")
    gathered = len(found["gathered_activations"])
    lines += [
        f"| all-gathers of activations | {gathered or 'none'} |",
        f"| step at best | {1e3 * step['seconds']:.1f} ms, by {step['bound_by']} ({parts}) |",
        f"| test of a cell at best | {test['tile_batches']:,} batches of tiles,"
        f" {1e3 * test['seconds_per_batch']:.1f} ms each, by {test['bound_by']} |",
        f"| grid | {grid['cells']} cells, {grid['side_by_side']} at once, {best['waves']} waves,"
        f" {best['idle']} places idle in the last, {grid['steps']:,} steps |",
        f"| at best | {_hours(best)} |",
        f"| at the efficiency assumed | {_hours(expected)} |",
    ]
    price = found["price"]
    if price["per_chip_hour"]:
        lines.append(
            f"| price at {price['per_chip_hour']:g} a chip-hour | {price['at_best']:,.0f} at best,"
            f" {price['at_efficiency']:,.0f} at the efficiency assumed |"
        )
    else:
        lines.append(
            f"| price | give a chip-hour's: --config.rehearsal.prices."
            f"{found['topology'].partition(':')[0]}=... |"
        )
    return lines


def _hours(grid: dict[str, Any]) -> str:
    return (
        f"{grid['hours']:.1f} h ({grid['training_hours']:.1f} training,"
        f" {grid['testing_hours']:.1f} tests), {grid['chip_hours']:,.0f} chip-hours"
    )


def _scaling_rows(scaling: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| topology | chips | cells at once | crops a cell's step | peak a chip, GB |"
        " sent a chip and step, MB | TFLOP a chip |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in scaling:
        takes = f"{row['peak'] / 1e9:.3f} | {row['sent'] / 1e6:.3f} | {row['flops'] / 1e12:.3f}"
        if row["too_large"]:  # a program made in less time may need more memory than the asked one
            takes = "does not fit | |"
        lines.append(
            f"| {row['topology']} | {row['chips']} | {row['cells']} | {row['batch']} | {takes} |"
        )
    return lines
