"""Logits of 33 classes to labels on the scan's own grid: seconds and memory, beside nnU-Net's.

    python -m benchmarks.export
    python -m benchmarks.export --shape 256 256 300 --scores noise

From 1.5 mm to a scan of 512 x 512 x 600 voxels at 0.75 x 0.75 x 1 mm, and to one of an eighth of
it, which nnU-Net manages in less memory. The logits are float16, as nnU-Net's sliding window leaves
them: cells of 32 structures in a body, blurred and noisy. With `--scores noise` every class may win
anywhere, the worst there is for ours. nnU-Net's rows are the function that it exports with
(convert_predicted_logits_to_segmentation_with_correct_shape) with its default resampling, and with
its alternative in PyTorch.

Each row runs in a process of its own. Memory is the most that it held at any time, less what it
held when the logits had been read. A row that takes more than `--limit` GB, or leaves the machine
less than 2, is stopped and says so. Goals: less than 3 GB above the logits, and 5 times as fast as
nnU-Net's default.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

FULL, SMALL = (512, 512, 600), (256, 256, 300)
SPACING, NATIVE = (1.5, 1.5, 1.5), (0.75, 0.75, 1.0)
MEMORY_GOAL, SPEED_GOAL = 3.0, 5.0
SPARE = 2e9
ROWS = ("tumorjax", "nnU-Net", "nnU-Net, resample_torch")


def make_scores(kind: str, shape: tuple[int, ...], classes: int) -> np.ndarray:
    """Returns logits [classes, x, y, z], float16."""
    rng = np.random.default_rng(0)
    scores = np.empty((classes, *shape), np.float16)
    if kind == "noise":
        for score in scores:
            score[...] = rng.standard_normal(shape, np.float32)
        return scores
    # A body's cross-section is an ellipse; within it every voxel belongs to the nearest centre.
    points = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"), axis=-1)
    labels = np.zeros(shape, np.uint8)
    inside = (points[..., 0] / 0.9) ** 2 + (points[..., 1] / 0.65) ** 2 < 1
    centres = rng.uniform(-1, 1, (300, 3))
    # Half of the body is none of the structures.
    structure = np.where(rng.random(300) < 0.5, 0, rng.integers(1, classes, 300))
    nearest = cKDTree(centres).query(points[inside], workers=-1)[1]
    labels[inside] = structure[nearest]
    for index, score in enumerate(scores):
        mask = gaussian_filter((labels == index).astype(np.float32), 1.5)
        score[...] = 16 * mask - 8 + 0.3 * rng.standard_normal(shape, np.float32)
    return scores


def ours(scores: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    from tumorjax.inference.native_grid import argmax_on_grid

    return argmax_on_grid(np.moveaxis(scores, 0, -1), shape)


def nnunet(scores: np.ndarray, shape: tuple[int, ...], resampling: str) -> np.ndarray:
    import torch
    from nnunetv2.inference import export_prediction
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    names = {"background": 0} | {f"structure {i}": i for i in range(1, len(scores))}
    settings = {"is_seg": False, "force_separate_z": None}
    # What its plans say of probabilities.
    functions = {
        "default": partial(resample_data_or_seg_to_shape, order=1, order_z=0, **settings),
        "torch": partial(resample_torch_fornnunet, num_threads=2, **settings),
    }
    return export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape(
        torch.from_numpy(scores),
        SimpleNamespace(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2]),
        SimpleNamespace(spacing=SPACING, resampling_fn_probabilities=functions[resampling]),
        LabelManager(names, None),
        {
            "spacing": NATIVE,
            "shape_after_cropping_and_before_resampling": shape,
            "shape_before_cropping": shape,
            "bbox_used_for_cropping": [[0, size] for size in shape],
        },
        num_threads_torch=2,
    )


def measure(row: str, folder: Path, shape: tuple[int, ...]) -> None:
    """Runs one row in this process and leaves its time, memory and labels in the folder."""
    function = {
        "tumorjax": ours,
        "nnU-Net": partial(nnunet, resampling="default"),
        "nnU-Net, resample_torch": partial(nnunet, resampling="torch"),
    }[row]
    scores = np.load(folder / "scores.npy")
    # All is imported and has run once before the clock starts.
    function(np.ascontiguousarray(scores[:, :8, :8, :8]), (12, 12, 12))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    labels = function(scores, shape)
    seconds = time.perf_counter() - begin
    found = {"seconds": seconds, "memory": status("VmHWM") - before}
    np.save(folder / f"{row}.npy", labels.astype(np.uint8))
    (folder / f"{row}.json").write_text(json.dumps(found))


def status(field: str) -> float:
    """Returns a memory field of this process, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e9


def run(row: str, folder: Path, shape: tuple[int, ...], limit: float) -> str:
    """Runs a row in a process that is stopped at the limit; returns why, or nothing."""
    command = [sys.executable, "-m", "benchmarks.export", "--one", row, "--folder", str(folder)]
    process = subprocess.Popen([*command, "--shape", *map(str, shape)])
    watched, begin = psutil.Process(process.pid), time.perf_counter()
    while process.poll() is None:
        try:
            held = watched.memory_info().rss / 1e9
        except psutil.NoSuchProcess:
            break
        if held > limit or psutil.virtual_memory().available < SPARE:
            process.kill()
            process.wait()
            return f"stopped at {held:.1f} GB after {time.perf_counter() - begin:.0f} s"
        time.sleep(0.05)
    return "" if process.wait() == 0 else f"ended with {process.returncode}"


def compare(folder: Path, shape: tuple[int, ...], options) -> None:
    """Prints the rows of one shape."""
    old = tuple(round(n * a / b) for n, a, b in zip(shape, NATIVE, SPACING, strict=True))
    path = folder / "scores.npy"
    np.save(path, make_scores(options.scores, old, options.classes))
    size = path.stat().st_size / 1e9
    print(f"\n{options.scores}, {options.classes} classes x {old} ({size:.1f} GB) to {shape}")
    print("| what | best, s | all, s | peak above the logits, GB | labels as tumorjax', % |")
    print("| --- | --- | --- | --- | --- |")
    rows = [row for row in options.rows if row == "tumorjax" or find_spec("nnunetv2")]
    found: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    failed: dict[str, str] = {}
    for _ in range(options.rounds):
        for row in rows:
            if row not in failed:
                if reason := run(row, folder, shape, options.limit):
                    failed[row] = reason
                else:
                    found[row].append(json.loads((folder / f"{row}.json").read_text()))
    ours = np.load(folder / "tumorjax.npy") if found.get("tumorjax") else None
    best = {row: min(e["seconds"] for e in entries) for row, entries in found.items() if entries}
    for row in rows:
        if row in failed:
            print(f"| {row} | {failed[row]} | | | |")
            continue
        memory = max(entry["memory"] for entry in found[row])
        times = " ".join(f"{entry['seconds']:.1f}" for entry in found[row])
        equal = 100 * (np.load(folder / f"{row}.npy") == ours).mean() if ours is not None else 0
        print(f"| {row} | {best[row]:.1f} | {times} | {memory:.2f} | {equal:.4f} |")
    if "tumorjax" in best:
        memory = max(entry["memory"] for entry in found["tumorjax"])
        state = "reached" if memory < MEMORY_GOAL else "not reached"
        print(f"{memory:.2f} GB above the logits; goal {MEMORY_GOAL:g}: {state}")
        if "nnU-Net" in best:
            ratio = best["nnU-Net"] / best["tumorjax"]
            state = "reached" if ratio >= SPEED_GOAL else "not reached"
            print(f"{ratio:.1f} times as fast as nnU-Net; goal {SPEED_GOAL:g}: {state}")
    if "nnU-Net" in failed:
        # A copy in float64, then all classes on the scan's grid in the logits' own type.
        arrays = options.classes * (8 * np.prod(old) + 2 * np.prod(shape)) / 1e9
        print(f"nnU-Net holds arrays of {arrays:.1f} GB beside the logits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, help="of the scan; else both of the above")
    parser.add_argument("--classes", type=int, default=33)
    parser.add_argument("--scores", choices=("structures", "noise"), default="structures")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--limit", type=float, default=12.0, help="GB that a row may hold")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.folder, tuple(options.shape))
        return
    for shape in [tuple(options.shape)] if options.shape else [SMALL, FULL]:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), shape, options)


if __name__ == "__main__":
    main()
