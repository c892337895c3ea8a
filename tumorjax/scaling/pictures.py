"""Sample slices of a study: scan, truth and what the networks drew, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tumorjax.anatomy import TUMORS
from tumorjax.files import read_arrays

# Told apart by all kinds of colour vision, and on grey.
TRUTH, PREDICTION, ORGAN = "#56b4e9", "#f0a30a", "#9fd8b8"


@dataclass(frozen=True)
class Sample:
    """One slice of one test scan as one cell saw it."""

    case: str
    split: str
    image: Float[np.ndarray, "x y"]
    truth: UInt8[np.ndarray, "x y"]
    prediction: UInt8[np.ndarray, "x y"]
    tumors: tuple[int, ...]


def read_samples(path: Path, tumors: Sequence[str] = tuple(TUMORS)) -> dict[str, Sample]:
    """Reads a cell's samples.npz.

    Args:
        path: the file; missing or without pictures counts as empty.
        tumors: names of the classes that are tumours.

    Returns:
        case -> its slice.
    """
    if not path.is_file():
        return {}
    arrays = read_arrays(path)
    if "image" not in arrays:
        return {}
    names = [str(name) for name in arrays["class_names"]]
    indices = tuple(index for index, name in enumerate(names, start=1) if name in tumors)
    return {
        str(case): Sample(str(case), str(split), image, truth, prediction, indices)
        for case, split, image, truth, prediction in zip(
            *(arrays[key] for key in ("case", "split", "image", "truth", "prediction")), strict=True
        )
    }


def choose(cases: Mapping[str, Sample], count: int) -> list[str]:
    """Returns up to `count` cases of each split, those with most tumour first."""
    chosen = []
    for split in ("id", "ood"):
        names = [case for case, sample in cases.items() if sample.split == split]
        names.sort(key=lambda case: -np.isin(cases[case].truth, cases[case].tumors).sum())
        chosen += names[:count]
    return chosen


def side_by_side(
    cells: Sequence[tuple[str, Mapping[str, Sample], Mapping[str, float]]], cases: Sequence[str]
) -> Figure:
    """Returns one row a case: the scan, the truth, then each cell's prediction.

    Args:
        cells: (title, case -> sample, case -> DSC where known).
        cases: the cases to show; each cell has all of them.
    """
    columns = 2 + len(cells)
    windows = [_window([cell[1][case] for cell in cells]) for case in cases]
    # Rows as high as their pictures are at the common width.
    heights = [(w[1].stop - w[1].start) / (w[0].stop - w[0].start) for w in windows]
    width = min(2.2, 11.4 / columns)
    size = width * columns, width * sum(heights) + 0.1 * len(cases) + 0.5
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(cases), columns, squeeze=False, height_ratios=heights)
    for row, (case, window) in enumerate(zip(cases, windows, strict=True)):
        samples = [cell[1][case] for cell in cells]
        first = samples[0]
        for axis in axes[row]:
            shown = _display(first.image[window])
            axis.imshow(
                shown, cmap="gray", vmin=0, vmax=1, origin="lower", interpolation="bilinear"
            )
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[row, 0].set_ylabel(f"{first.split.upper()}\n{case}", fontsize=8)
        _outline(axes[row, 1], first.truth[window], first.tumors, TRUTH)
        for axis, (_, _, dice), sample in zip(axes[row, 2:], cells, samples, strict=True):
            _outline(axis, sample.prediction[window], sample.tumors, PREDICTION)
            if dice.get(case) is not None:
                text = f"DSC {dice[case]:.0f}"
                axis.text(0.03, 0.04, text, color="white", fontsize=8, transform=axis.transAxes)
    for axis, title in zip(axes[0], ["scan", "truth", *(c[0] for c in cells)], strict=True):
        axis.set_title(title, fontsize=9, fontweight="bold", loc="left")
    handles = [
        Line2D([], [], color=color, lw=2, label=name)
        for color, name in (
            (TRUTH, "tumour, truth"),
            (PREDICTION, "tumour, predicted"),
            (ORGAN, "organ"),
        )
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=8)
    return figure


def _window(samples: Sequence[Sample]) -> tuple[slice, slice]:
    """Returns the part of a slice that holds all labels, with some surroundings."""
    labelled = np.any([s.truth > 0 for s in samples] + [s.prediction > 0 for s in samples], axis=0)
    if not labelled.any():
        labelled = samples[0].image > 0
    if not labelled.any():
        labelled = np.ones_like(labelled)
    window = []
    for axis in (0, 1):
        (inside,) = np.nonzero(labelled.any(1 - axis))
        margin = 4 + labelled.shape[axis] // 16
        end = min(labelled.shape[axis], inside[-1] + margin + 1)
        window.append(slice(max(0, int(inside[0]) - margin), int(end)))
    return window[0], window[1]


def _display(values: np.ndarray) -> np.ndarray:
    """Turns [x, y] in RAS+ into rows and columns as radiologists look: the patient's right left."""
    return values[::-1].T


def _outline(
    axis: Axes, label: UInt8[np.ndarray, "x y"], tumors: Sequence[int], color: str
) -> None:
    """Draws the contours of organs and, stronger, of the tumours in a slice of class indices."""
    shown = _display(label)
    for index in np.unique(label):
        if index and index not in tumors:
            axis.contour(shown == index, [0.5], colors=[ORGAN], linewidths=0.8)
    tumor = np.isin(shown, tumors)
    if tumor.any():
        axis.contour(tumor, [0.5], colors=[color], linewidths=1.8)
