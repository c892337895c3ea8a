"""The figures of realism, one function each: real tumours are grey, synthetic ones red.

Distributions are drawn as in Figure 5a of the scaling paper (a panel an organ, real over
synthetic), features as in its Figures 5b to 5d.
"""

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tumorjax.files import write_bytes_atomic
from tumorjax.synthesis.realism_tests import ks
from tumorjax.synthesis.realism_tumors import (
    HU_BINS,
    PICTURE_MM,
    REGIONS,
    RIM_MM,
    SURROUNDINGS_MM,
    TEXTURE_EDGES,
    Tumor,
)

# All kinds of tumour together.
ALL = "tumor"
REAL, SYNTHETIC = "#5f6368", "#c1272d"
OUTLINE = "#56b4e9"
NAMES = {False: "real", True: "synthetic"}
_COLORS = {False: REAL, True: SYNTHETIC}
_DPI = 120
_BINS = 12

# What a shape is compared by: its column, and its axis.
SHAPES = {
    "minor_to_major": "minor / major axis",
    "middle_to_major": "middle / major axis",
    "roughness": "roughness",
}
SIZES = {"radius_mm": "radius of the same volume, mm", "longest_inplane_mm": "longest diameter, mm"}

Kinds = Mapping[str, Sequence[Tumor]]


def title(kind: str) -> str:
    """Returns a tumour's name for people: "Liver lesion"."""
    return kind.replace("_", " ").capitalize()


def name_of(kind: str) -> str:
    """Returns the same, or what all kinds together are called."""
    return "All tumours" if kind == ALL else title(kind)


def distributions(
    kinds: Kinds, quantities: Mapping[str, str], numbers: Mapping[str, Mapping[bool, Sequence[int]]]
) -> Figure:
    """Returns histograms of what masks measure: a row a kind of tumour, a column a quantity.

    Args:
        kinds: kind -> its tumours.
        quantities: field of `Measures` -> axis label.
        numbers: kind -> whether synthetic -> tumours of each scan; a last column where given.
    """
    columns = [*quantities.items(), *([("number", "tumours in a scan")] if numbers else [])]
    figure, axes = _grid(list(kinds), len(columns))
    for row, (kind, tumors) in enumerate(kinds.items()):
        for column, (name, label) in enumerate(columns):
            if name == "number":
                values = {kind_: numbers[kind][kind_] for kind_ in (False, True)}
            else:
                values = {
                    made: [getattr(t.measures, name) for t in tumors if t.synthetic is made]
                    for made in (False, True)
                }
            _compare(axes[row, column], values, name)
            if row == len(kinds) - 1:
                axes[row, column].set_xlabel(label)
    _label_rows(axes, list(kinds), "% of tumours")
    if numbers:
        for axis in axes[:, -1]:
            axis.set_ylabel("% of scans")
    _legend(figure)
    return figure


def _compare(axis: Axes, values: Mapping[bool, Sequence[float]], name: str) -> None:
    together = np.concatenate([np.asarray(v, float) for v in values.values()])
    together = together[np.isfinite(together)]
    if not len(together):
        axis.text(0.5, 0.5, "nothing to show", transform=axis.transAxes, ha="center")
        return
    low, high = float(together.min()), float(together.max())
    if name == "number":
        edges = np.arange(0.5, high + 1)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    elif name.endswith("_mm"):
        edges = np.geomspace(low * 0.98, high * 1.02, _BINS + 1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    else:
        edges = np.linspace(low, high + 1e-6, _BINS + 1)
    for made, drawn in values.items():
        if len(drawn):
            weights = np.full(len(drawn), 100 / len(drawn))
            look: dict[str, Any] = {"color": _COLORS[made], "bins": list(edges), "weights": weights}
            axis.hist(drawn, histtype="stepfilled", alpha=0.25, **look)
            axis.hist(drawn, histtype="step", lw=1.6, **look)
    found = ks(values[False], values[True])
    if found["ks"] is not None:
        _note(axis, f"KS {found['ks']:.2f}")


def histograms(kinds: Kinds, quantity: str, window: tuple[float, float]) -> Figure:
    """Returns mean histograms at lesion, rim and surroundings, each tumour with equal weight.

    Args:
        kinds: kind -> its tumours.
        quantity: "hu" or "texture".
        window: HU, of the former.
    """
    edges = np.linspace(*window, HU_BINS + 1) if quantity == "hu" else TEXTURE_EDGES
    middles = (edges[1:] + edges[:-1]) / 2
    figure, axes = _grid(list(kinds), len(REGIONS))
    where = ("", f", to {RIM_MM:g} mm", f", {RIM_MM:g} to {SURROUNDINGS_MM:g} mm")
    for row, tumors in enumerate(kinds.values()):
        for column, region in enumerate(REGIONS):
            axis = axes[row, column]
            for made in (False, True):
                drawn = mean_histogram(tumors, made, quantity, column)
                axis.plot(middles, 100 * drawn, color=_COLORS[made], lw=1.6)
                axis.fill_between(middles, 100 * drawn, color=_COLORS[made], alpha=0.2, lw=0)
            axis.set_ylim(bottom=0)
            if row == 0:
                axis.set_title(f"{region.capitalize()}{where[column]}")
            if row == len(kinds) - 1:
                axis.set_xlabel("HU" if quantity == "hu" else "gradient, HU/mm")
    _label_rows(axes, list(kinds), "% of voxels")
    _legend(figure)
    return figure


def mean_histogram(tumors: Sequence[Tumor], synthetic: bool, quantity: str, region: int):
    """Returns the mean of tumours' histograms of a region; zeros without any."""
    drawn = [getattr(t, quantity)[region] for t in tumors if t.synthetic is synthetic]
    drawn = [histogram for histogram in drawn if histogram.sum() > 0]
    return np.mean(drawn, axis=0) if drawn else np.zeros_like(getattr(tumors[0], quantity)[region])


def embedding(kinds: Kinds, places: Mapping[str, Any]) -> Figure:
    """Returns t-SNE of features, a panel a kind; `places`: kind -> [n, 2], or None."""
    shown = {kind: tumors for kind, tumors in kinds.items() if places[kind] is not None}
    figure = Figure(figsize=(max(4.0, 3.4 * len(shown)), 3.7), layout="constrained")
    axes = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
    for axis, (kind, tumors) in zip(axes, shown.items(), strict=False):
        for made, marker in ((False, "o"), (True, "s")):
            chosen = np.asarray([t.synthetic is made for t in tumors])
            axis.scatter(
                *places[kind][chosen].T,
                s=18,
                color=_COLORS[made],
                marker=marker,
                alpha=0.75,
                lw=0.4,
                edgecolor="white",
            )
        axis.set_title(title(kind))
        axis.set_xticks([])
        axis.set_yticks([])
    _legend(figure)
    return figure


def separability(rows: Sequence[tuple[str, str, Mapping[str, Any]]], confidence: float) -> Figure:
    """Returns the classifiers' AUC with their intervals; rows: (kind, classifier, result)."""
    drawn = [row for row in rows if row[2]["auc"] is not None]
    figure = Figure(figsize=(6.4, 0.9 + 0.36 * len(drawn)), layout="constrained")
    axis = figure.subplots()
    for place, (_, _, found) in enumerate(drawn):
        if found["low"] is not None:
            axis.hlines(place, found["low"], found["high"], color=SYNTHETIC, alpha=0.45, lw=3)
        axis.plot(found["auc"], place, "s", color=SYNTHETIC, mec="white", ms=6)
    axis.axvline(0.5, color=REAL, lw=1.2)
    axis.set_yticks(range(len(drawn)), [f"{name_of(kind)}, {name}" for kind, name, _ in drawn])
    axis.set_ylim(len(drawn) - 0.5, -0.5)
    ends = [f["low"] if f["low"] is not None else f["auc"] for _, _, f in drawn]
    axis.set_xlim(min([0.3, *ends]) - 0.02, 1.02)
    axis.set_xlabel(f"AUC of real against synthetic, {100 * confidence:g} % interval; 0.5 is best")
    return figure


def contact_sheet(kinds: Kinds, window: tuple[float, float], columns: int) -> Figure:
    """Returns slices of real and synthetic tumours of like size: one window, one scale.

    Of each kind as many of either are shown as there are quantiles of size; below each picture is
    the same one with the mask's outline. As radiologists look at it: the patient's right on the
    left, front up.
    """
    rows = [(kind, made) for kind in kinds for made in (False, True)]
    figure = Figure(figsize=(1.25 * columns + 0.5, 2.62 * len(rows) + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)  # type: ignore
    axes = figure.subplots(2 * len(rows), columns, squeeze=False)
    for index, (kind, made) in enumerate(rows):
        chosen = spread([t for t in kinds[kind] if t.synthetic is made], columns)
        for column in range(columns):
            plain, outlined = axes[2 * index, column], axes[2 * index + 1, column]
            for axis in (plain, outlined):
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(False)
                for side in axis.spines.values():
                    side.set_visible(False)
            if column >= len(chosen):
                continue
            tumor = chosen[column]
            for axis in (plain, outlined):
                _show(axis, tumor, window)
            if tumor.outline.any():
                _outline(outlined, tumor)
            plain.set_title(f"{tumor.measures.radius_mm:.0f} mm", fontsize=7, fontweight="normal")
        label = f"{title(kind)}\n{NAMES[made]}"
        axes[2 * index, 0].set_ylabel(label, color=_COLORS[made], fontsize=8, fontweight="bold")
    note = f"{PICTURE_MM:g} mm wide; {window[0]:g} to {window[1]:g} HU; above each its radius"
    figure.supxlabel(note, fontsize=8)
    return figure


def spread(tumors: Sequence[Tumor], count: int) -> list[Tumor]:
    """Returns up to `count` tumours at even quantiles of size, the smallest first."""
    ordered = sorted(tumors, key=lambda t: (t.measures.radius_mm, t.case, t.number))
    if len(ordered) <= count:
        return ordered
    places = np.linspace(0, len(ordered) - 1, count).round().astype(int)
    return [ordered[i] for i in places]


def _show(axis: Axes, tumor: Tumor, window: tuple[float, float]) -> None:
    x, y = (n * step for n, step in zip(tumor.picture.shape, tumor.pixel, strict=True))
    seen = tumor.picture[::-1].T
    axis.imshow(
        seen, cmap="gray", vmin=window[0], vmax=window[1], extent=(0, x, 0, y), origin="lower"
    )


def _outline(axis: Axes, tumor: Tumor) -> None:
    (x, y), (dx, dy) = tumor.outline.shape, tumor.pixel
    axis.contour(
        (np.arange(x) + 0.5) * dx,
        (np.arange(y) + 0.5) * dy,
        tumor.outline[::-1].T,
        [0.5],
        colors=[OUTLINE],
        linewidths=1,
    )


def _grid(kinds: Sequence[str], columns: int):
    rows = len(kinds)
    figure = Figure(figsize=(max(4.2, 3.1 * columns), 2.3 * rows + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _label_rows(axes: Any, kinds: Sequence[str], unit: str) -> None:
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        axis.set_ylabel(f"{title(kind)}\n{unit}")


def _note(axis: Axes, text: str) -> None:
    axis.text(0.98, 0.97, text, transform=axis.transAxes, ha="right", va="top", fontsize=8)


def _legend(figure: Figure) -> None:
    handles = [Patch(color=_COLORS[made], alpha=0.6, label=NAMES[made]) for made in (False, True)]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=8)


def save(drawn: Mapping[str, Figure], folder: Path) -> dict[str, str]:
    """Saves figures as folder/NAME.png and .pdf; returns each PNG as text for a page."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    encoded = {}
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
        write_bytes_atomic(folder / f"{name}.png", buffer.getvalue())
        encoded[name] = base64.b64encode(buffer.getvalue()).decode()
        figure.set_layout_engine("none")  # it stays as it was laid out for the PNG
        buffer = io.BytesIO()
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
        write_bytes_atomic(folder / f"{name}.pdf", buffer.getvalue())
    return encoded
