"""A picture of a scan before and after it got tumours, to judge them by eye."""

import io
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tumorjax import anatomy
from tumorjax.contents import tumor_instances

# HU from black to white: soft tissue.
_WINDOW = (-160.0, 240.0)
# Side of the close-ups, mm; at least three diameters of the tumour.
_CLOSE_UP_MM = 110.0
_DPI = 100
# Matplotlib's fonts and caches are not made for several threads.
_DRAWING = threading.Lock()


def picture(
    case: str,
    before: Float[np.ndarray, "x y z"],
    after: Float[np.ndarray, "x y z"],
    label: UInt8[np.ndarray, "x y z"],
    spacing: Sequence[float],
) -> bytes:
    """Returns a PNG with one row a kind of tumour, through its largest one.

    Each row has the axial slice with the tumours' outlines, and close-ups of the axial and the
    coronal slice, before and after, without any. The patient's right is on the left.

    Args:
        case: for the title.
        before: HU, RAS+.
        after: HU, on the same grid.
        label: new tumours as ids of `anatomy`.
        spacing: (x, y, z) in mm.
    """
    tumors = tumor_instances(label, spacing)
    shown = {tumor["class"]: tumor for tumor in reversed(tumors)}
    rows = [shown[name] for name in anatomy.TUMORS if name in shown]
    with _DRAWING:
        figure = Figure(figsize=(15, 3.3 * len(rows) + 0.3), facecolor="black")
        axes = figure.subplots(len(rows), 5, squeeze=False)
        for line, tumor in zip(axes, rows, strict=True):
            middle = [round(c) for c in tumor["center"]]
            side = max(_CLOSE_UP_MM, 6 * tumor["radius_mm"])
            _draw(line[0], after, label, middle, 2, spacing, None)
            _draw(line[1], before, None, middle, 2, spacing, side)
            _draw(line[2], after, None, middle, 2, spacing, side)
            _draw(line[3], before, None, middle, 1, spacing, side)
            _draw(line[4], after, None, middle, 1, spacing, side)
            what = f"{tumor['class']}, radius {tumor['radius_mm']:.1f} mm"
            titles = (what, "axial, before", "axial, after", "coronal, before", "coronal, after")
            for axis, title in zip(line, titles, strict=True):
                axis.set_title(title, color="white", fontsize=9, loc="left")
        figure.suptitle(case, color="white", fontsize=10, x=0.01, ha="left")
        figure.subplots_adjust(0.005, 0.01, 0.995, 1 - 0.55 / figure.get_figheight(), 0.02, 0.12)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": "tumorjax"})
    return buffer.getvalue()


def _draw(
    axis: Axes,
    image: Float[np.ndarray, "x y z"],
    label: UInt8[np.ndarray, "x y z"] | None,
    middle: Sequence[int],
    through: int,
    spacing: Sequence[float],
    side: float | None,
) -> None:
    """Draws the slice through `middle` across an axis, whole or `side` mm of it."""
    up = 1 if through == 2 else 2
    index = np.clip(middle[through], 0, image.shape[through] - 1)
    # [across, up]; mirrored, since patients face the reader.
    extent = (
        (image.shape[0] - 0.5) * spacing[0],
        -0.5 * spacing[0],
        -0.5 * spacing[up],
        (image.shape[up] - 0.5) * spacing[up],
    )
    shown = np.take(image, index, through)
    axis.imshow(
        shown[::-1].T,
        cmap="gray",
        vmin=_WINDOW[0],
        vmax=_WINDOW[1],
        origin="lower",
        extent=extent,
        interpolation="bilinear",
    )
    if label is not None:
        drawn = np.take(label, index, through) > 0
        if drawn.any() and min(drawn.shape) > 1:
            x, y = np.arange(drawn.shape[0]) * spacing[0], np.arange(drawn.shape[1]) * spacing[up]
            axis.contour(x, y, drawn.T.astype(float), [0.5], colors="#f0a30a", linewidths=1.0)
    if side is not None:
        across, along = middle[0] * spacing[0], middle[up] * spacing[up]
        axis.set_xlim(across + side / 2, across - side / 2)
        axis.set_ylim(along - side / 2, along + side / 2)
    else:
        axis.set_xlim(extent[0], extent[1])
    axis.set_facecolor("black")
    axis.set_xticks([])
    axis.set_yticks([])
