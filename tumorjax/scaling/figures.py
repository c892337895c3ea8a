"""The figures of a report, from the curves of laws.json. Each function returns one figure.

Colours mean the same everywhere: real scans alone are grey circles, real and synthetic ones red
squares (two shapes and two levels of lightness, so that they are told apart without colour too).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from tumorjax import plot_style
from tumorjax.scaling import power_law
from tumorjax.scaling.results import ALL_TUMORS, LESS_IS_BETTER, METRICS, REAL, WITH_SYNTHETIC

COLORS = {REAL: "#5f6368", WITH_SYNTHETIC: "#c1272d"}
MARKERS = {REAL: "o", WITH_SYNTHETIC: "s"}
ARM_NAMES = {REAL: "real scans alone", WITH_SYNTHETIC: "real + synthetic tumours"}
SPLIT_NAMES = {"id": "In-distribution", "ood": "Out-of-distribution"}
INK = "#202124"
_NAME_WIDTH = 0.42  # of an arm's name, as a share of the axis
_HALO = [withStroke(linewidth=2.5, foreground="white")]

STYLE: dict[Any, Any] = plot_style.STYLE | {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa0a6",
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.8,
    "xtick.color": "#5f6368",
    "ytick.color": "#5f6368",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.hashsalt": "tumorjax",
}

Curves = Sequence[Mapping[str, Any]]


def select(curves: Curves, **keys: str) -> list[Mapping[str, Any]]:
    """Returns the entries of laws.json that agree with the keys."""
    return [curve for curve in curves if keys.items() <= curve.items()]


def scaling_grid(
    curves: Curves,
    rows: Sequence[tuple[str, Mapping[str, str]]],
    columns: Sequence[tuple[str, Mapping[str, str]]],
    same_scale: bool = False,
    size: tuple[float, float] = (2.9, 2.5),
) -> Figure:
    """Returns panels of score against number of real scans, one for each row and column.

    Args:
        curves: of laws.json.
        rows: (title, keys that its curves have); for instance ("In-distribution", {"split": "id"}).
        columns: the same; a panel's curves have the keys of its row and of its column.
        same_scale: one y axis for all panels; else one for each column.
        size: of one panel, inch.
    """
    # Wider figures would shrink on the page until their text is too small.
    width = min(max(size[0] * len(columns), 4.5), 12)
    figure = Figure(figsize=(width, size[1] * len(rows) + 0.35), layout="constrained")
    room = 0.35 / (width / len(columns) - 0.5)  # four digits, and an axis without its labels, inch
    axes = figure.subplots(
        len(rows), len(columns), squeeze=False, sharey="all" if same_scale else "col"
    )
    for row, (row_title, row_keys) in enumerate(rows):
        for column, (column_title, column_keys) in enumerate(columns):
            axis = axes[row, column]
            draw_curves(axis, select(curves, **{**row_keys, **column_keys}), room=room)
            if row == 0:
                axis.set_title(column_title)
            if column == 0:
                axis.set_ylabel(row_title)
            if row == len(rows) - 1:
                axis.set_xlabel("annotated real scans")
    for column, (_, keys) in enumerate(columns):
        _limit(axes[0, column], select(curves, **keys))
    _arm_legend(figure, curves)
    return figure


def headline(curves: Curves, metric: str, splits: Sequence[str], label: str = ALL_TUMORS) -> Figure:
    """Returns one metric on each split with direct labels, laws, plateaus and forecasts."""
    figure = Figure(figsize=(4.5 * len(splits), 3.7), layout="constrained")
    axes = figure.subplots(1, len(splits), squeeze=False, sharey=True)[0]
    chosen = [select(curves, **{"split": s, "metric": metric, "class": label}) for s in splits]
    for axis, split, of_split in zip(axes, splits, chosen, strict=True):
        draw_curves(axis, of_split, detailed=True)
        axis.set_title(SPLIT_NAMES[split])
        axis.set_xlabel("annotated real scans (log scale)")
    axes[0].set_ylabel(METRICS[metric] + ("" if metric in LESS_IS_BETTER else ", %"))
    low, high = axes[0].get_ylim()
    # Room for where curves level off, and for the names of the arms.
    ticks = axes[0].get_yticks()
    axes[0].set_yticks([tick for tick in ticks if 0 <= tick <= high])
    axes[0].set_ylim(low - 0.24 * (high - low), high + 0.05 * (high - low))
    for axis, of_split in zip(axes, chosen, strict=True):
        _label_curves(axis, of_split)
        _mark_plateaus(axis, of_split)
    return figure


def draw_curves(axis: Axes, curves: Curves, detailed: bool = False, room: float = 0.11) -> None:
    """Draws curves with 95 % bands.

    Args:
        axis: to draw on.
        curves: of laws.json.
        detailed: with laws and forecasts, where there are any.
        room: share of the x axis that a number needs.
    """
    numbers = sorted({n for curve in curves for n in curve["n"]})
    if not numbers:
        _leave_empty(axis)
        return
    axis.set_xscale("log")
    for curve in curves:
        color, marker = COLORS[curve["arm"]], MARKERS[curve["arm"]]
        n, mean = np.array(curve["n"]), np.array(curve["mean"])
        if None not in curve["low"]:
            axis.fill_between(n, curve["low"], curve["high"], color=color, alpha=0.14, lw=0)
            if len(n) == 1:
                axis.vlines(n, curve["low"], curve["high"], color=color, alpha=0.4, lw=3)
        axis.plot(n, mean, color=color, marker=marker, ms=4.5, lw=1.6, mec="white", mew=0.6)
        if detailed:
            _draw_law(axis, curve, color)
    if detailed:
        ahead = [c["forecast"]["n"] for c in curves if c["forecast"]["score"] is not None]
        numbers = sorted({*numbers, *ahead})
    _number_axis(axis.xaxis, numbers, room)
    axis.set_xlim(numbers[0] / 1.15, numbers[-1] * 1.15)


def _leave_empty(axis: Axes) -> None:
    # The y axis stays: it may be the one that carries the numbers of its row.
    axis.text(0.5, 0.5, "nothing measured", transform=axis.transAxes, ha="center", color="#9aa0a6")
    axis.set_xticks([])


def _limit(axis: Axes, curves: Curves) -> None:
    """Keeps a y axis to what can be: percentages, or counts from zero."""
    low, high = axis.get_ylim()
    if curves and all(curve["metric"] in LESS_IS_BETTER for curve in curves):
        axis.set_ylim(0, high)
    else:
        axis.set_ylim(max(low, -3), min(high, 103))


def gains(found: Mapping[str, Any], metric: str, splits: Sequence[str]) -> Figure:
    """Returns what synthetic tumours add, and how many real scans alone would give the same."""
    figure = Figure(figsize=(4.2 * len(splits), 6), layout="constrained")
    axes = figure.subplots(2, len(splits), squeeze=False)
    color = COLORS[WITH_SYNTHETIC]
    keys = {"metric": metric, "class": ALL_TUMORS}
    for column, split in enumerate(splits):
        upper, lower = axes[:, column]
        for entry in select(found["differences"], split=split, **keys):
            n, difference = np.array(entry["n"]), np.array(entry["difference"])
            upper.axhline(0, color="#5f6368", lw=1)
            if None not in entry["low"]:
                ends = difference - np.array(entry["low"]), np.array(entry["high"]) - difference
                upper.errorbar(
                    n, difference, np.abs(ends), fmt="none", ecolor=color, alpha=0.5, lw=1.4
                )
            upper.plot(n, difference, color=color, marker="s", ms=5, lw=0, mec="white", mew=0.6)
            upper.set_xscale("log")
            _number_axis(upper.xaxis, list(n))
            upper.set_xlim(n[0] / 1.2, n[-1] * 1.2)
        for entry in select(found["equivalents"], split=split, **keys):
            _draw_equivalents(lower, entry, color)
        upper.set_title(SPLIT_NAMES[split])
        lower.set_xlabel("annotated real scans beside synthetic ones")
    axes[0, 0].set_ylabel("gain by synthetic tumours, points")
    axes[1, 0].set_ylabel("real scans alone for the same score")
    return figure


def training_curves(cells: Sequence[tuple[str, int, Mapping[str, np.ndarray]]]) -> Figure:
    """Returns loss and mean Dice on training crops against the step, one line for each cell.

    Args:
        cells: (arm, n_real, {"step", "loss", "dice" [rows] in percent}).
    """
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    axes = figure.subplots(1, 2)
    largest = max(n for _, n, _ in cells)
    smallest = min(n for _, n, _ in cells)
    for arm, n, curve in cells:
        share = 1.0 if largest == smallest else np.log(n / smallest) / np.log(largest / smallest)
        look = {"color": COLORS[arm], "alpha": 0.25 + 0.75 * share, "lw": 0.8 + 0.7 * share}
        axes[0].plot(curve["step"], curve["loss"], **look)
        axes[1].plot(curve["step"], curve["dice"], **look)
    axes[0].set_title("Loss on training crops")
    axes[1].set_title("Mean Dice on training crops, %")
    for axis in axes:
        axis.set_xlabel("step")
    arms = list(dict.fromkeys(arm for arm, _, _ in cells))
    handles = [Line2D([], [], color=COLORS[arm], lw=1.6, label=ARM_NAMES[arm]) for arm in arms]
    if largest != smallest:
        for n, alpha in ((smallest, 0.3), (largest, 1.0)):
            handles.append(Line2D([], [], color="k", alpha=alpha, lw=1.4, label=f"{n} real scans"))
    axes[0].legend(handles=handles, fontsize=8, loc="upper right")
    return figure


def _draw_law(axis: Axes, curve: Mapping[str, Any], color: str) -> None:
    law, ahead = curve["law"], curve["forecast"]
    if law["identifiable"]:
        n = np.geomspace(curve["n"][0], 2 * curve["n"][-1], 100)
        score = power_law.evaluate(n, law["a"], law["b"], law["c"])
        axis.plot(n, score, color=color, lw=1, ls=(0, (4, 3)))
    if ahead["score"] is not None:
        low, high = ahead["interval"]
        axis.vlines(ahead["n"], low, high, color=color, lw=1, alpha=0.6)
        axis.plot(
            ahead["n"], ahead["score"], MARKERS[curve["arm"]], color=color, mfc="white", ms=4.5
        )


def _mark_plateaus(axis: Axes, curves: Curves) -> None:
    """Drops a line from where a curve levels off to the axis, with its n."""
    low, high = axis.get_ylim()
    left, right = axis.get_xlim()
    for level, curve in enumerate(c for c in curves if c["plateau"]["n"] is not None):
        n = curve["plateau"]["n"]
        if len(curve["n"]) < 2:
            continue
        color = COLORS[curve["arm"]]
        axis.vlines(n, low, curve["mean"][curve["n"].index(n)], color=color, lw=1, ls=":")
        text = f"levels off at {n}" if n < curve["n"][-1] else f"best at {n}, the most tried"
        early = np.log(n / left) < 0.5 * np.log(right / left)
        axis.annotate(
            text,
            (n, low + (0.02 + 0.065 * level) * (high - low)),
            (4 if early else -4, 0),
            textcoords="offset points",
            color=color,
            fontsize=8,
            ha="left" if early else "right",
            va="bottom",
            path_effects=_HALO,
            in_layout=False,
        )
    axis.set_ylim(low, high)


def _label_curves(axis: Axes, curves: Curves) -> None:
    """Writes each arm's name at its right end, above the higher and below the lower curve."""
    middles = [float(np.mean(curve["mean"])) for curve in curves]
    for curve, middle in zip(curves, middles, strict=True):
        upper = middle >= max(middles)
        band = curve["high"] if upper else curve["low"]
        band = np.array(
            [m if end is None else end for m, end in zip(curve["mean"], band, strict=True)]
        )
        # What the name must clear: the band from its right end to where the name begins.
        begin = curve["n"][-1] * (axis.get_xlim()[0] / axis.get_xlim()[1]) ** _NAME_WIDTH
        span = np.linspace(np.log(begin), np.log(curve["n"][-1]), 20)
        edge = np.interp(span, np.log(curve["n"]), band)
        axis.annotate(
            ARM_NAMES[curve["arm"]],
            (curve["n"][-1], edge.max() if upper else edge.min()),
            (0, 4 if upper else -4),
            textcoords="offset points",
            color=COLORS[curve["arm"]],
            fontweight="bold",
            fontsize=8.5,
            ha="right" if len(curve["n"]) > 1 else "center",
            va="bottom" if upper else "top",
            path_effects=_HALO,
            in_layout=False,
        )


def _draw_equivalents(axis: Axes, entry: Mapping[str, Any], color: str) -> None:
    points = entry["points"]
    n = [point["n_real"] for point in points]
    known = [point for point in points if point["n_real_alone"] is not None]
    bottom, top = min(n), max([*n, *(point["n_real_alone"] for point in known)])
    beyond = {"above": 1.6 * top, "below": bottom / 1.25}
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.plot([bottom, max(n)], [bottom, max(n)], color="#5f6368", lw=1)
    for point in known:
        low, high = point["interval"]
        ends = low or beyond["below"], high or beyond["above"]
        axis.vlines(point["n_real"], *ends, color=color, alpha=0.5, lw=1.4)
    equal = [point["n_real_alone"] for point in known]
    look: dict[str, Any] = {"color": color, "ls": "", "ms": 5.5}
    axis.plot([p["n_real"] for p in known], equal, marker="s", mec="white", mew=0.6, **look)
    for side, marker in (("above", "^"), ("below", "v")):
        outside = [point["n_real"] for point in points if point["beyond"] == side]
        axis.plot(outside, [beyond[side]] * len(outside), marker=marker, mfc="white", **look)
    _number_axis(axis.xaxis, n)
    _number_axis(axis.yaxis, sorted({*n, *(round(x) for x in equal if x > 1.2 * max(n))}))
    axis.set_xlim(bottom / 1.2, max(n) * 1.2)
    axis.set_ylim(bottom / 1.5, 2 * top)


def _number_axis(axis: XAxis | YAxis, numbers: Sequence[int], room: float = 0.11) -> None:
    """Puts ticks of a log axis at numbers of scans, and nowhere else."""
    ticks = _spread_ticks(numbers, room)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    axis.set_minor_locator(NullLocator())


def _spread_ticks(numbers: Sequence[int], room: float) -> list[int]:
    """Returns those of ascending numbers that can stand on a log axis without touching.

    Args:
        numbers: where ticks are wanted; the last is always kept.
        room: share of the axis that one of them needs.
    """
    span = max(np.log(numbers[-1] / numbers[0]), 1e-9)
    kept = [numbers[-1]]
    for number in reversed(numbers[:-1]):
        if np.log(kept[-1] / number) / span > room:
            kept.append(number)
    return kept[::-1]


def _arm_legend(figure: Figure, curves: Curves) -> None:
    arms = list(dict.fromkeys(curve["arm"] for curve in curves))
    handles = [
        Line2D([], [], color=COLORS[a], marker=MARKERS[a], ms=5, mec="white", label=ARM_NAMES[a])
        for a in arms
    ]
    if handles:
        figure.legend(
            handles=handles, loc="outside upper left", ncols=2, fontsize=9, labelcolor="linecolor"
        )
