"""A picture of scans, their reconstructions and the difference."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float

from tumorjax.files import write_bytes_atomic

# HU at which the difference's colours end.
_DIFFERENCE = 100.0


def write(
    path: Path,
    truth: Float[np.ndarray, "n x y z 1"],
    other: Float[np.ndarray, "n x y z 1"],
    window: tuple[float, float],
) -> None:
    """Draws the middle axial slice of each crop: scan, reconstruction, difference in HU.

    Args:
        path: of the picture.
        truth: scans in [-1, 1].
        other: their reconstructions.
        window: HU of -1 and 1.
    """
    low, high = window
    middle = truth.shape[3] // 2
    rows = [
        [low + (x[n, :, :, middle, 0] + 1) / 2 * (high - low) for x in (truth, other)]
        for n in range(len(truth))
    ]
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(7.2, 2.3 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (scan, reconstruction) in zip(axes, rows, strict=True):
        pictures = (scan, reconstruction, reconstruction - scan)
        for axis, picture in zip(line, pictures, strict=True):
            difference = picture is pictures[-1]
            # Anterior up and the patient's right on the left, as radiologists look at it.
            shown = axis.imshow(
                picture.T[::-1, ::-1],
                cmap="RdBu_r" if difference else "gray",
                vmin=-_DIFFERENCE if difference else low,
                vmax=_DIFFERENCE if difference else high,
                interpolation="nearest",
            )
            axis.set_axis_off()
        figure.colorbar(shown, ax=line[-1], label="HU", fraction=0.05)
    for axis, title in zip(axes[0], ("scan", "reconstruction", "difference"), strict=True):
        axis.set_title(title, fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format=path.suffix[1:])
    write_bytes_atomic(path, drawn.getvalue())
    plt.close(figure)
