"""Masks compared: Dice, normalized surface Dice, components and matched lesions, beside the peers.

    python -m benchmarks.metrics [--rounds 5] [--only case|masks] [--skip-kernels]

Two measurements:

    case     a scan of 512x512x200 voxels with kidneys and tumours; both classes
    masks    24 scans' tumours in one go, each volume of its own size

Truths are the masks of KiTS19 in ../shared/data, or where TUMORJAX_DATA points (the scan has its
slices repeated to 200); without them, shapes of the program's own. Predictions are made of them
from a seed: shifted, eroded on one side, with false blobs.

The peer is what one writes with surface-distance, connected-components-3d and numpy; "cropped"
crops each class to its objects first. All rows take turns in one process; milliseconds are the
least and the median of the rounds after the first, which for the kernels compiles; on a CPU they
are measured once. Numbers of all rows are compared.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cc3d
import jax
import numpy as np
from scipy import ndimage

from tumorjax.metrics.batch import Comparison, compare_labels, compare_masks
from tumorjax.metrics.boxes import bounding_box

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CASE = "case_00178"  # kidneys and several tumours, from 88 slices
CLASSES = {"kidney": (1, 2), "tumor": (2,)}
TOLERANCE = 2.0

KERNELS = "tumorjax, kernels"
PEER = "surface-distance + cc3d + numpy"


class Scan(NamedTuple):
    truth: np.ndarray  # labels [x, y, z]
    prediction: np.ndarray
    spacing: tuple[float, float, float]


# ------------------------------------------------------------------------------------------- masks


def real_scans(folder: Path) -> list[Scan]:
    """Returns the masks of KiTS19, the case first; stored as (I, P, L), they are turned to RAS+."""
    import nibabel as nib

    paths = sorted(folder.glob("case_*.nii.gz"))
    paths.sort(key=lambda path: CASE not in path.name)
    scans = []
    for number, path in enumerate(paths):
        image = nib.load(path)
        labels = np.asarray(image.dataobj).astype(np.uint8)
        labels = np.ascontiguousarray(labels.transpose(2, 1, 0)[::-1, ::-1, ::-1])
        z, y, x = (float(size) for size in image.header.get_zooms())
        if number == 0:
            slices = labels.shape[2]
            labels = np.ascontiguousarray(labels[:, :, np.arange(200) * slices // 200])
            z *= slices / 200
        scans.append(Scan(labels, predicted(labels, (x, y, z), number), (x, y, z)))
    return scans


def made_up_scans() -> list[Scan]:
    """Returns scans with two ellipsoids for kidneys and tumours of the project's own shapes."""
    from tumorjax.synthesis.shapes import tumor_mask

    scans = []
    for number in range(24):
        rng = np.random.default_rng(number)
        depth, z = (200, 2.2) if number == 0 else (int(rng.integers(40, 110)), 5.0)
        spacing = (0.85, 0.85, z)
        labels = np.zeros((512, 512, depth), np.uint8)
        middle = depth * z / 2
        for side in (170, 265):
            place(labels, ball(spacing, (30, 28, 60)), (side, 250, middle), spacing, 1)
        for tumor in range(3):
            key = jax.random.key(3 * number + tumor)
            mask = np.asarray(tumor_mask(key, float(rng.uniform(5, 20)), spacing, "kidney"))
            at = rng.normal((170, 250, middle), (12, 12, 25))
            place(labels, mask, at, spacing, 2)
        scans.append(Scan(labels, predicted(labels, spacing, number), spacing))
    return scans


def predicted(labels: np.ndarray, spacing: tuple[float, ...], seed: int) -> np.ndarray:
    """Returns labels as a network might: shifted, eroded on one side, with false blobs."""
    rng = np.random.default_rng(seed)
    out = np.zeros_like(labels)
    box = bounding_box(labels)
    if box is None:
        return out
    part = np.pad(labels[box], 3)
    shift = rng.integers(-2, 3, 3)
    moved = np.roll(part, shift, axis=(0, 1, 2))
    eroded = ndimage.binary_erosion(part > 0)
    eroded[: part.shape[0] // 2] = part[: part.shape[0] // 2] > 0
    moved[~np.roll(eroded, shift, axis=(0, 1, 2))] = 0
    target = [slice(max(side.start - 3, 0), side.stop + 3) for side in box]
    source = tuple(
        slice(max(3 - side.start, 0), max(3 - side.start, 0) + len(range(*to.indices(size))))
        for side, to, size in zip(box, target, labels.shape, strict=True)
    )
    out[tuple(target)] = moved[source]
    middle = [(side.start + side.stop) / 2 * step for side, step in zip(box, spacing, strict=True)]
    for _ in range(6):
        radius = rng.uniform(2, 8)
        place(out, ball(spacing, (radius,) * 3), rng.normal(middle, 40), spacing, 2)
    return out


def ball(spacing: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """Returns an ellipsoid with these radii in mm as a mask."""
    half = [int(r / s) + 1 for r, s in zip(radii, spacing, strict=True)]
    grid = np.meshgrid(*[np.arange(-h, h + 1) for h in half], indexing="ij")
    scaled = [g * s / r for g, s, r in zip(grid, spacing, radii, strict=True)]
    return sum(g**2 for g in scaled) <= 1


def place(
    labels: np.ndarray, mask: np.ndarray, at_mm: np.ndarray, spacing: tuple[float, ...], value: int
) -> None:
    """Writes a mask into labels about a place in mm, as far as it lies inside."""
    index = np.argwhere(mask) - np.array(mask.shape) // 2
    index += np.round(np.array(at_mm) / spacing).astype(int)
    index = index[((index >= 0) & (index < labels.shape)).all(axis=1)]
    labels[tuple(index.T)] = value


# -------------------------------------------------------------------------------------------- rows


def peer_mask(
    truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], crop: bool
) -> tuple:
    """Returns Dice, surface Dice, lesions found and false candidates, as one writes it."""
    import surface_distance

    if crop:
        box = bounding_box(truth, prediction) or (slice(0, 1),) * 3
        truth, prediction = truth[box], prediction[box]
    total = truth.sum() + prediction.sum()
    dice = 2 * (truth & prediction).sum() / total if total else float("nan")
    distances = surface_distance.compute_surface_distances(truth, prediction, spacing)
    nsd = surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE)
    lesions, n_lesions = cc3d.connected_components(truth, connectivity=26, return_N=True)
    candidates, n_candidates = cc3d.connected_components(prediction, connectivity=26, return_N=True)
    volumes = np.bincount(lesions.ravel(), minlength=n_lesions + 1)[1:] * np.prod(spacing)
    found = np.unique(lesions[prediction])
    true = np.unique(candidates[truth])
    return (
        dice,
        nsd,
        volumes.sum(),
        np.count_nonzero(found),
        n_candidates - np.count_nonzero(true),
    )


def ours(comparison: Comparison) -> tuple:
    match = comparison.match
    return (
        comparison.dice,
        comparison.nsd,
        match.volume_mm3.sum(),
        int(match.detected.sum()),
        int(match.false_positive.sum()),
    )


def case_rows(scan: Scan, kernels: bool) -> dict[str, Callable[[], list[tuple]]]:
    def compared(backend: str) -> Callable[[], list[tuple]]:
        def run() -> list[tuple]:
            results = compare_labels(*scan, CLASSES, TOLERANCE, backend=backend)
            return [ours(result) for result in results.values()]

        return run

    def peer(crop: bool) -> Callable[[], list[tuple]]:
        def run() -> list[tuple]:
            results = []
            for labels in CLASSES.values():
                truth = np.logical_or.reduce([scan.truth == label for label in labels])
                prediction = np.logical_or.reduce([scan.prediction == label for label in labels])
                results.append(peer_mask(truth, prediction, scan.spacing, crop))
            return results

        return run

    return rows(compared, peer, kernels)


def mask_rows(scans: list[Scan], kernels: bool) -> dict[str, Callable[[], list[tuple]]]:
    truths = [scan.truth == 2 for scan in scans]
    predictions = [scan.prediction == 2 for scan in scans]
    spacings = [scan.spacing for scan in scans]

    def compared(backend: str) -> Callable[[], list[tuple]]:
        def run() -> list[tuple]:
            results = compare_masks(truths, predictions, spacings, TOLERANCE, backend=backend)
            return [ours(result) for result in results]

        return run

    def peer(crop: bool) -> Callable[[], list[tuple]]:
        def run() -> list[tuple]:
            pairs = zip(truths, predictions, spacings, strict=True)
            return [peer_mask(*pair, crop) for pair in pairs]

        return run

    return rows(compared, peer, kernels)


def rows(compared: Callable, peer: Callable, kernels: bool) -> dict[str, Callable]:
    return {
        "tumorjax": compared("auto"),
        "tumorjax, on the host": compared("host"),
        **({KERNELS: compared("device")} if kernels else {}),
        PEER: peer(False),
        "the same, cropped first": peer(True),
    }


def measure(title: str, functions: dict[str, Callable[[], list[tuple]]], rounds: int) -> None:
    """Prints a table of the rows' times, taken in turn, and how far their numbers differ."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    results = {}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            if turn > 1 and name == KERNELS and jax.default_backend() == "cpu":
                continue  # slow there, and not what runs
            begin = time.perf_counter()
            results[name] = function()
            times[name].append(1000 * (time.perf_counter() - begin))
    print(f"\n{title}\n| what | first, ms | least, ms | median, ms | times faster than the peer |")
    print("| --- | --- | --- | --- | --- |")
    for name, (first, *later) in times.items():
        least, median = min(later), statistics.median(later)
        ratio = statistics.median(times[PEER][1:]) / median
        print(f"| {name} | {first:.0f} | {least:.1f} | {median:.1f} | {ratio:.1f} |")
    expected = np.array(results[PEER], float)
    for name, result in results.items():
        if name != PEER:
            difference = np.nanmax(np.abs(np.array(result, float) - expected))
            print(f"largest difference from the peer, {name}: {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("case", "masks"))
    parser.add_argument("--skip-kernels", action="store_true")
    options = parser.parse_args()
    setattr(np, "Inf", np.inf)  # noqa: B010  a name that surface-distance 0.1 uses, gone in numpy 2
    folder = Path(os.environ.get("TUMORJAX_DATA", DATA)) / "kits19"
    scans = real_scans(folder) if folder.is_dir() else made_up_scans()
    source = "KiTS19" if folder.is_dir() else "made-up shapes"
    case, kernels = scans[0], not options.skip_kernels
    shape = "x".join(map(str, case.truth.shape))
    print(f"{source}, {jax.default_backend()}, {os.cpu_count()} cores")
    if options.only != "masks":
        title = f"one case, {shape}, {len(CLASSES)} classes"
        measure(title, case_rows(case, kernels), options.rounds)
    if options.only != "case":
        measure(f"{len(scans)} masks", mask_rows(scans, kernels), options.rounds)


if __name__ == "__main__":
    main()
