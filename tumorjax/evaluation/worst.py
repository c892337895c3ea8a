"""The worst cases with pictures: a page that opens without a network, and its PNG files.

Three lists: the lowest Dice scores, the largest tumours that were missed (no predicted voxel lies
in them), and the largest false ones (they touch no annotated voxel); of each case at most one entry
in each list.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tumorjax.errors import CaseError
from tumorjax.evaluation import snapshots
from tumorjax.evaluation.cases import UNION, has_any
from tumorjax.evaluation.figures import style
from tumorjax.evaluation.paper_tables import tumor_title
from tumorjax.evaluation.snapshots import KINDS, Snapshot
from tumorjax.files import write_bytes_atomic, write_text_atomic
from tumorjax.metrics.detection import sphere_radius
from tumorjax.pages import template

TITLES = {
    "differs": "Lowest Dice scores",
    "missed": "Largest missed tumours",
    "false": "Largest false tumours",
}
# Told apart by all kinds of colour vision, and on grey.
TRUTH, PREDICTION = "#56b4e9", "#f0a30a"
_BAR_MM = 20

# (case, box of the snapshot) -> that slice of the scan, [0, 1].
ReadScan = Callable[[str, tuple[slice, slice, int]], Float[np.ndarray, "x y"]]


class Entry(NamedTuple):
    """One picture that the page may show.

    Attributes:
        case: the case's id.
        line: what its record says of the picture, see `snapshots.keep`.
        row: the case's row of all tumours together.
        spacing: voxel size (x, y, z), mm.
    """

    case: str
    line: Mapping[str, Any]
    row: Mapping[str, Any]
    spacing: Sequence[float]


def entries_of(result: Mapping[str, Any]) -> list[Entry]:
    """Returns the pictures of a case's kept result."""
    lines = result.get("pictures", [])
    row = next((row for row in result["rows"] if row["class"] == UNION), None)
    if row is None:  # a single class that is itself called so, or none
        return []
    return [Entry(result["case"], line, row, result["spacing"]) for line in lines]


def choose(entries: Iterable[Entry], count: int) -> dict[str, list[Entry]]:
    """Returns up to `count` of each kind, the worst first."""
    chosen: dict[str, list[Entry]] = {kind: [] for kind in KINDS}
    for entry in entries:
        chosen[entry.line["kind"]].append(entry)
    for kind, found in chosen.items():
        if kind == "differs":
            # Of equally bad ones the largest tumour, most often of 0 %.
            found.sort(key=lambda e: (e.row["dsc"], -e.line["volume_mm3"], e.case))
        else:
            found.sort(key=lambda e: (-e.line["volume_mm3"], e.case))
        del found[count:]
    return chosen


def write_page(
    workdir: Path,
    entries: Iterable[Entry],
    count: int,
    tumors: Mapping[str, int | Sequence[int]],
    read_scan: ReadScan | None,
    name: str,
    grid: str,
) -> None:
    """Writes workdir/worst/index.html and its pictures; those of an earlier run go.

    Args:
        workdir: of the evaluation.
        entries: of all cases.
        count: how many of each kind.
        tumors: tumour name -> its value or values in the masks.
        read_scan: None where there are only masks.
        name: of the model.
        grid: that the numbers are on.
    """
    folder = workdir / "worst"
    sections = []
    written = set()
    for kind, chosen in choose(entries, count).items():
        pictures = []
        for rank, entry in enumerate(chosen, start=1):
            shot = snapshots.read(workdir, entry.case, entry.line)
            image, note = _scan_of(entry.case, shot, read_scan)
            file = f"{kind}_{rank:02d}_{entry.case}.png"
            write_bytes_atomic(folder / file, _png(picture(entry, shot, tumors, image)))
            written.add(file)
            pictures.append({"file": file, "case": entry.case, "text": describe(entry, shot)})
            pictures[-1]["note"] = note
        sections.append({"kind": kind, "title": TITLES[kind], "pictures": pictures})
    page = template("tumorjax.evaluation", "worst.html").render(
        name=name, grid=grid, sections=sections, truth=TRUTH, prediction=PREDICTION
    )
    write_text_atomic(folder / "index.html", page)
    for path in folder.glob("*.png"):
        if path.name not in written:
            path.unlink()


def describe(entry: Entry, shot: Snapshot) -> str:
    """Returns what a picture's caption says beside the case's id."""
    row = entry.row
    z = f"axial slice {shot.box[2]}"
    if shot.kind == "differs":
        found = f"{row['n_detected']} of {row['n_lesions']} tumours found"
        return (
            f"DSC {row['dsc']:.1f} %, NSD {row['nsd']:.1f} %, {found},"
            f" {row['false_positives']} false; {z}"
        )
    radius = float(sphere_radius(shot.volume_mm3))
    name = "tumour" if shot.tumor == UNION else tumor_title(shot.tumor).replace("Tumor", "tumour")
    return (
        f"{shot.kind} {name.lower()},"
        f" {shot.volume_mm3:.0f} mm³ (radius {radius:.1f} mm as a sphere); {z}"
    )


def picture(
    entry: Entry,
    shot: Snapshot,
    tumors: Mapping[str, int | Sequence[int]],
    image: Float[np.ndarray, "x y"] | None,
) -> Figure:
    """Returns a figure of one slice: the scan alone, and with the contours of both masks.

    As radiologists look at it: from the feet, the patient's right on the left, front up.
    """
    values = np.unique(np.hstack(list(tumors.values())))
    # Size in mm along x and y.
    x, y = (size * space for size, space in zip(shot.truth.shape, entry.spacing, strict=False))
    panels = 1 if image is None else 2
    height = 3.6 * y / x
    with style():
        figure = Figure(figsize=(3.6 * panels + 0.2, height + 0.75), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        for axis in axes:
            axis.set_axis_off()
            if image is None:
                # Without a scan, what the truth says of organs and tumours is the background.
                organ_or_tumor = np.where(has_any(shot.truth, values), 0.3, 0.42)
                grey = np.where(shot.truth > 0, organ_or_tumor, 0.18)
            else:
                grey = image
            axis.imshow(_seen(grey), cmap="gray", vmin=0, vmax=1, extent=(0, x, 0, y))
            axis.set_xlim(0, x)
            axis.set_ylim(0, y)
        for labels, color, dashes in (
            (shot.truth, TRUTH, "solid"),
            (shot.prediction, PREDICTION, "dashed"),
        ):
            _draw_contour(axes[-1], has_any(labels, values), (x, y), color, dashes)
        axes[0].plot([4, 4 + _BAR_MM], [4, 4], color="white", lw=2.5, solid_capstyle="butt")
        axes[0].text(4 + _BAR_MM / 2, 6, f"{_BAR_MM} mm", color="white", fontsize=7, ha="center",
                     va="bottom")  # fmt: skip
        handles = [
            Line2D([], [], color=TRUTH, lw=1.8, label="truth"),
            Line2D([], [], color=PREDICTION, lw=1.8, ls="--", label="prediction"),
        ]
        axes[-1].legend(
            handles=handles, loc="upper right", fontsize=7, labelcolor="white", frameon=True,
            facecolor="#202124", edgecolor="none", framealpha=0.7, borderpad=0.3,
        )  # fmt: skip
        title = f"{_shortened(entry.case)}\n" + describe(entry, shot).replace("; ", "\n")
        figure.suptitle(title, fontsize=8.5 if panels == 2 else 7.5, x=0.02, ha="left")
    return figure


def _scan_of(
    case: str, shot: Snapshot, read_scan: ReadScan | None
) -> tuple[Float[np.ndarray, "x y"] | None, str]:
    if read_scan is None:
        return None, ""
    try:
        return read_scan(case, shot.box), ""
    except CaseError as error:
        return None, f"scan not shown: {error.found}"


def _seen(slice_: np.ndarray) -> np.ndarray:
    # x runs to the patient's right, which is drawn on the left; y to the front, which is up.
    return slice_[::-1, ::-1].T


def _draw_contour(
    axis: Axes, mask: np.ndarray, size: tuple[float, float], color: str, dashes: str
) -> None:
    if not mask.any():
        return
    # A frame of background closes contours at the border. Row 0 is the top.
    seen = np.pad(_seen(mask).astype(float), 1)
    rows, columns = seen.shape
    step_x, step_y = size[0] / (columns - 2), size[1] / (rows - 2)
    x = (np.arange(columns) - 0.5) * step_x
    y = size[1] - (np.arange(rows) - 0.5) * step_y
    axis.contour(x, y, seen, [0.5], colors=[color], linewidths=1.8, linestyles=[dashes])


def _shortened(case: str, most: int = 60) -> str:
    return case if len(case) <= most else case[: most - 1] + "…"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
