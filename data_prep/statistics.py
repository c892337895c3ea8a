"""What is in a store: counts per site and structure, tumour sizes, and a figure of them.

python -m data_prep.statistics STORE FOLDER
"""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tumorjax.anatomy import LABELS, TUMORS
from tumorjax.errors import UserError
from tumorjax.files import location, write_bytes_atomic, write_csv_atomic
from tumorjax.metrics.detection import SIZE_GROUPS, size_group
from tumorjax.volumes import Store, open_store

_TUMOR_COLUMNS = (
    *("case", "patient", "site", "class", "voxels", "volume_mm3", "radius_mm"),
    *("longest_inplane_mm", "size"),
)


def count(store: Store) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns counts per site and structure, and one row per tumour.

    Returns:
        Rows of site, structure, scans, patients, tumors, radius_median_mm and the number of
        tumours in each size group; and rows of case, patient, site, class, sizes and size group.
    """
    records = [store.record(case) for case in store.cases]
    tumors = [
        {key: record[key] for key in ("case", "patient", "site")}
        | {key: value for key, value in tumor.items() if key != "center"}
        | {"size": size_group(tumor["radius_mm"])}
        for record in records
        for tumor in record["tumors"]
    ]
    counts = []
    for site in sorted({record["site"] for record in records}):
        here = [record for record in records if record["site"] == site]
        for structure in LABELS:
            shown = [record for record in here if structure in record["labels"]]
            if not shown:
                continue
            found = [t for t in tumors if t["site"] == site and t["class"] == structure]
            row: dict[str, Any] = {
                "site": site,
                "structure": structure,
                "scans": len(shown),
                "patients": len({record["patient"] for record in shown}),
                "tumors": len(found) if structure in TUMORS else None,
            }
            if found:
                row["radius_median_mm"] = float(np.median([t["radius_mm"] for t in found]))
                for group in SIZE_GROUPS:
                    row[group] = sum(tumor["size"] == group for tumor in found)
            counts.append(row)
    return counts, tumors


def write(store: Store, folder: str | Path) -> None:
    """Writes statistics.csv (counts), tumors.csv (one row a tumour) and statistics.png."""
    folder = location(folder)
    counts, tumors = count(store)
    columns = ("site", "structure", "scans", "patients", "tumors", "radius_median_mm", *SIZE_GROUPS)
    write_csv_atomic(folder / "statistics.csv", counts, columns)
    write_csv_atomic(folder / "tumors.csv", tumors, _TUMOR_COLUMNS)
    buffer = io.BytesIO()
    plot(counts, tumors).savefig(buffer, format="png", dpi=120)
    write_bytes_atomic(folder / "statistics.png", buffer.getvalue())


def plot(counts: list[dict[str, Any]], tumors: list[dict[str, Any]]) -> Figure:
    """Draws scans per structure, and the radii of the tumours with the limits of size groups."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    sites = sorted({row["site"] for row in counts})
    names = [name for name in LABELS if any(row["structure"] == name for row in counts)]
    base = np.zeros(len(names))
    for site in sites:
        scans = {row["structure"]: row["scans"] for row in counts if row["site"] == site}
        heights = np.array([scans.get(name, 0) for name in names], float)
        left.barh(names, heights, left=base, label=site)
        base += heights
    left.invert_yaxis()
    left.set_xlabel("scans that show it")
    left.tick_params(axis="y", labelsize=8)
    if 1 < len(sites) <= 12:
        figure.legend(
            *left.get_legend_handles_labels(), title="site", fontsize=8, loc="outside left upper"
        )
    edges = np.geomspace(1, 64, 25)
    classes = [name for name in TUMORS if any(tumor["class"] == name for tumor in tumors)]
    radii = [[t["radius_mm"] for t in tumors if t["class"] == name] for name in classes]
    if classes:
        labels = [f"{name} ({len(r)})" for name, r in zip(classes, radii, strict=True)]
        right.hist([np.clip(r, 1, 64) for r in radii], edges, stacked=True, label=labels)
        right.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    right.set_xscale("log", base=2)
    right.set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    for limit in list(SIZE_GROUPS.values())[:-1]:
        right.axvline(limit, color="0.4", linewidth=0.8, linestyle="--")
    right.set_xlabel("sphere-equivalent radius, mm (dashed: size groups)")
    right.set_ylabel("tumours")
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def main(arguments: list[str]) -> None:
    """Writes the statistics of a store into a folder."""
    if len(arguments) != 2:
        raise UserError("expected two arguments: the store and a folder")
    write(open_store(arguments[0]), arguments[1])


if __name__ == "__main__":
    main(sys.argv[1:])
