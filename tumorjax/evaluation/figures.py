"""The FROC figure: sensitivity against false positives per scan, with the chosen thresholds."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from tumorjax.evaluation.paper_tables import tumor_title
from tumorjax.files import write_bytes_atomic
from tumorjax.plot_style import STYLE

# Okabe and Ito's colours, told apart by all kinds of colour vision; the first is this model's.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Up to this many false positives a scan the axis is linear, beyond it is logarithmic.
_LINEAR = 1.0
_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

Curves = Sequence[tuple[str, Sequence[Mapping[str, Any]]]]


def froc_figure(
    curves: Curves, points: Mapping[str, Mapping[str, Any]], wanted: float, note: str = ""
) -> Figure:
    """Returns a panel for each class with a curve for each model.

    Args:
        curves: (model, rows as `operating_points.curve_rows` returns them); the first model's
            intervals are drawn.
        points: class -> its entry in thresholds.json, of the first model.
        wanted: the sensitivity that was asked for, percent.
        note: below the panels: which grid the numbers are on.
    """
    classes = list(dict.fromkeys(row["class"] for _, rows in curves for row in rows))
    columns = 2 if len(classes) == 4 else min(len(classes), 3)
    lines = -(-len(classes) // columns)
    figure = Figure(figsize=(4.1 * columns + 0.3, 3.5 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(classes) :]:
        axis.set_visible(False)
    for index, name in enumerate(classes):
        axis = axes.flat[index]
        largest = 0.0
        for number, (model, rows) in enumerate(curves):
            chosen = [row for row in rows if row["class"] == name]
            largest = max(largest, _draw_curve(axis, model, chosen, number))
        axis.axhline(wanted, color="#5f6368", lw=0.9, ls=(0, (4, 3)))
        _mark_point(axis, points.get(name, {}))
        counts = next((row for _, rows in curves for row in rows if row["class"] == name), {})
        axis.set_title(
            f"{tumor_title(name)}: {counts['n_tumors']} tumours, {counts['n_scans']} scans",
            fontsize=9,
        )
        axis.set_ylim(-3, 103)
        _count_axis(axis, largest)
        axis.set_xlabel("false positives per scan")
        if index % columns == 0:
            axis.set_ylabel("tumours found, %")
    if len(curves) > 1:
        axes.flat[0].legend(loc="lower right", fontsize=8)
    if note:
        figure.supxlabel(note, fontsize=8, color="#5f6368")
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Writes PATH.png and PATH.pdf."""
    for ending in ("png", "pdf"):
        buffer = io.BytesIO()
        # No date in the file, so that the same numbers give the same bytes.
        dateless = {"CreationDate": None} if ending == "pdf" else {}
        figure.savefig(buffer, format=ending, dpi=150, metadata=dateless)
        write_bytes_atomic(f"{path}.{ending}", buffer.getvalue())


def style() -> Any:
    """Returns the context in which figures are made."""
    return matplotlib.rc_context(STYLE)


def _draw_curve(axis: Axes, model: str, rows: Sequence[Mapping[str, Any]], number: int) -> float:
    """Draws one curve, and returns how far to the right it goes."""
    known = [row for row in rows if row["sensitivity"] is not None]
    if not known:
        axis.text(
            0.5, 0.5, "no tumour of this class", transform=axis.transAxes, ha="center", fontsize=8
        )
        return 0.0
    x = np.array([row["false_positives_per_scan"] for row in known])
    y = np.array([row["sensitivity"] for row in known])
    color = COLORS[number % len(COLORS)]
    if number == 0:
        ends = [(row["sensitivity_low"], row["sensitivity_high"]) for row in known]
        if not any(None in pair for pair in ends):
            low, high = np.array(ends).T
            axis.vlines(x, low, high, color=color, alpha=0.25, lw=2.5)
    marker = MARKERS[number % len(MARKERS)]
    axis.plot(x, y, color=color, marker=marker, ms=4, lw=1.5, mec="white", mew=0.5, label=model)
    return float(x.max())


def _mark_point(axis: Axes, point: Mapping[str, Any]) -> None:
    if point.get("threshold") is None:
        return
    place = (point["false_positives_per_scan"], point["sensitivity"])
    axis.plot(*place, "o", ms=10, mfc="none", mec="#202124", mew=1.4)
    text = (
        f"threshold {point['threshold']:g}\n{point['sensitivity']:.1f} % found,\n"
        f"{point['false_positives_per_scan']:.2f} false a scan"
    )
    # In the lower right, where curves are not.
    axis.annotate(
        text,
        place,
        (0.97, 0.26),
        textcoords="axes fraction",
        fontsize=8,
        ha="right",
        arrowprops={"arrowstyle": "-", "color": "#9aa0a6", "lw": 0.8, "shrinkB": 6},
        bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "none"},
    )


def _count_axis(axis: Axes, largest: float) -> None:
    right = max(1.15 * largest, _LINEAR)
    axis.set_xscale("symlog", linthresh=_LINEAR, linscale=0.6)
    axis.set_xlim(-0.06, right)
    ticks = [tick for tick in _TICKS if tick <= right]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    axis.xaxis.set_minor_locator(NullLocator())
