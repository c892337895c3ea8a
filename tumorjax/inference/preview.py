"""A picture of a case: three planes through what was found, as radiologists look at them."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from tumorjax.geometry import spacing_of, to_canonical
from tumorjax.inference.case_statistics import Extent, extent_of
from tumorjax.metrics.components import label_components

# HU from black to white: soft tissue.
WINDOW = (-160.0, 240.0)
_TUMOR_COLORS = ("#f0a30a", "#ff5c5c", "#ff7ad9", "#ffe14d")
# Rows up and columns to the right of each plane, as axes of a RAS+ volume, with the letters of the
# left, right, upper and lower border. Patients face the reader: their right is on the left.
_PLANES = (
    ("axial", 2, (0, True), (1, False), "RLAP"),
    ("coronal", 1, (0, True), (2, False), "RLSI"),
    ("sagittal", 0, (1, True), (2, False), "APSI"),
)
_DPI = 110


class Shown(NamedTuple):
    """A structure and how it is drawn.

    Attributes:
        name: for the legend.
        value: in the label map.
        is_tumor: drawn stronger, and looked for first.
        volume_ml: for the legend.
    """

    name: str
    value: int
    is_tumor: bool
    volume_ml: float


def preview(
    case: str,
    image: Num[np.ndarray, "i j k"],
    labels: UInt8[np.ndarray, "i j k"],
    affine: Float[np.ndarray, "4 4"],
    structures: Sequence[Shown],
    window: tuple[float, float] | None = WINDOW,
) -> bytes:
    """Returns a case's picture as PNG.

    The planes go through the largest lesion of the largest tumour, or without one through the
    largest structure, where it has most voxels; with nothing found through the scan's middle.
    Outlines are colours, letters say where the body's sides are, and the bar is 50 mm.

    Args:
        case: for the title.
        image: HU, axes as in the file.
        labels: on the same grid.
        affine: from voxel index to mm in RAS+.
        structures: to draw, of those that there are.
        window: values that are black and white; None: the 1st and 99th percentile of the slices.
    """
    image, turned = to_canonical(image, affine)
    labels, _ = to_canonical(labels, affine)
    spacing = spacing_of(turned)
    extent = extent_of(labels)
    found = [one for one in structures if extent.voxels(one.value)]
    target = _target(found, extent)
    at = [length // 2 for length in image.shape]
    if target is not None:
        at = _thickest(labels, target.value, extent)
    colors = _colors(structures)

    sizes = [length * size for length, size in zip(image.shape, spacing, strict=True)]
    widths = [sizes[plane[2][0]] for plane in _PLANES]
    heights = [sizes[plane[3][0]] for plane in _PLANES]
    # One scale for all three, in a picture of 12 inches.
    inches = 11.6 / (sum(widths) + 20)
    legend_rows = -(-max(1, len(found)) // 4)
    height = np.clip(max(heights) * inches, 2.0, 14.0) + 0.75 + 0.22 * legend_rows
    figure = Figure(figsize=(12, height), facecolor="black", layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=widths)
    for axis, plane in zip(axes, _PLANES, strict=True):
        _draw(axis, image, labels, spacing, at, plane, found, colors, window)
    what = "nothing found" if target is None else f"slices through {target.name}"
    figure.suptitle(f"{case}: {what}", color="white", fontsize=11, x=0.01, ha="left")
    if found:
        handles = [
            Line2D([], [], color=colors[one.name], lw=2.2 if one.is_tumor else 1.4,
                   label=f"{one.name}, {_volume(one.volume_ml)}")
            for one in found
        ]  # fmt: skip
        figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=4,
            fontsize=8.5,
            labelcolor="white",
            facecolor="black",
            edgecolor="black",
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": "tumorjax"})
    return buffer.getvalue()


def _target(found: Sequence[Shown], extent: Extent) -> Shown | None:
    if not found:
        return None
    return max(found, key=lambda one: (one.is_tumor, extent.voxels(one.value)))


def _thickest(labels: UInt8[np.ndarray, "x y z"], value: int, extent: Extent) -> list[int]:
    """Returns the slices in which a structure's largest component has most voxels."""
    box = extent.box(value)
    components, _ = label_components(labels[box] == value)
    counts = np.bincount(components.ravel())
    largest = components == 1 + counts[1:].argmax()
    return [
        side.start + int(largest.sum(axis=others).argmax())
        for side, others in zip(box, ((1, 2), (0, 2), (0, 1)), strict=True)
    ]


def _volume(millilitres: float) -> str:
    return f"{millilitres:.1f} ml" if millilitres < 100 else f"{millilitres:.0f} ml"


def _colors(structures: Sequence[Shown]) -> dict[str, str]:
    """Returns colours: warm ones for tumours, greens to violets for the rest."""
    tumors = [one.name for one in structures if one.is_tumor]
    others = [one.name for one in structures if not one.is_tumor]
    colors = {name: _TUMOR_COLORS[i % len(_TUMOR_COLORS)] for i, name in enumerate(tumors)}
    hues = np.linspace(0.33, 0.83, max(len(others), 2))
    for index, name in enumerate(others):
        # Neighbours in the list are apart in hue.
        hue = hues[(index * 7) % len(hues)] if len(hues) % 7 else hues[index]
        colors[name] = to_hex(tuple(hsv_to_rgb((hue, 0.45, 0.95))))
    return colors


def _draw(
    axis: Axes,
    image: np.ndarray,
    labels: np.ndarray,
    spacing: Sequence[float],
    at: Sequence[int],
    plane: tuple[str, int, tuple[int, bool], tuple[int, bool], str],
    found: Sequence[Shown],
    colors: dict[str, str],
    window: tuple[float, float] | None,
) -> None:
    name, through, (across, reverse), (up, _), letters = plane
    where: list[Any] = [slice(None)] * 3
    where[through] = at[through]
    step = -1 if reverse else 1
    # [across, up]; rows of a picture are `up`.
    shown = image[tuple(where)][::step].T.astype(np.float32)
    drawn = labels[tuple(where)][::step].T
    low, high = window or (float(v) for v in np.percentile(shown, (1, 99)))
    width, height = shown.shape[1] * spacing[across], shown.shape[0] * spacing[up]
    axis.imshow(
        shown,
        cmap="gray",
        vmin=low,
        vmax=max(high, low + 1e-6),
        origin="lower",
        extent=(0, width, 0, height),
        interpolation="bilinear",
    )
    x = (np.arange(shown.shape[1]) + 0.5) * spacing[across]
    y = (np.arange(shown.shape[0]) + 0.5) * spacing[up]
    for one in sorted(found, key=lambda one: one.is_tumor):
        mask = drawn == one.value
        if not mask.any() or min(mask.shape) < 2:
            continue
        # A border of background closes outlines at the scan's edge.
        closed = np.pad(mask, 1).astype(np.float32)
        axis.contour(
            np.concatenate([[x[0] - spacing[across]], x, [x[-1] + spacing[across]]]),
            np.concatenate([[y[0] - spacing[up]], y, [y[-1] + spacing[up]]]),
            closed,
            [0.5],
            colors=[colors[one.name]],
            linewidths=1.9 if one.is_tumor else 1.1,
        )
    axis.set_xlim(0, width)
    axis.set_ylim(0, height)
    axis.set_axis_off()
    # Dark rims keep letters readable on bone.
    rim = [withStroke(linewidth=2.5, foreground="black")]
    style: dict[str, Any] = {"color": "white", "fontsize": 9, "path_effects": rim}
    style["transform"] = axis.transAxes
    left, right, top, bottom = tuple(letters)
    axis.text(0.01, 0.5, left, ha="left", va="center", **style)
    axis.text(0.99, 0.5, right, ha="right", va="center", **style)
    axis.text(0.5, 0.99, top, ha="center", va="top", **style)
    axis.text(0.5, 0.01, bottom, ha="center", va="bottom", **style)
    index = f"{name} {at[through] + 1}/{image.shape[through]}"
    axis.set_title(index, color="white", fontsize=9, loc="left")
    bar = 50.0 if width > 100 else 10.0
    end = width * 0.97
    axis.plot(
        [end - bar, end],
        [height * 0.07] * 2,
        color="white",
        lw=2,
        solid_capstyle="butt",
        path_effects=[withStroke(linewidth=4, foreground="black")],
    )
    style |= {"fontsize": 8, "ha": "center", "transform": axis.transData}
    axis.text(end - bar / 2, height * 0.085, f"{bar:g} mm", **style)
