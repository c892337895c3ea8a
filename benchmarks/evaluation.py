"""Two folders of masks evaluated: seconds, cores and memory, beside nnU-Net's own evaluation.

    python -m benchmarks.evaluation
    python -m benchmarks.evaluation --cases 50 200 --shape 512 512 100 --workers 2

The masks are made up: two kidneys with tumours of rough surface in a scan of 0.8 x 0.8 x 3 mm, and
predictions that are off by some voxels, miss tumours and have false ones. A few distinct cases
stand under many names, for writing hundreds would take longer than evaluating them.

Each row runs in a process of its own, with as many worker processes as there are cores. "cores" is
the processor time of all of them by the seconds that the row took, its start included. Memory is
the most that all of them held together (PSS, so that what they share counts once). nnU-Net's
compute_metrics_on_folder counts voxels for Dice and IoU; ours does that too, and surfaces, lesions,
sizes, intervals and pictures beside. Its row needs nnunetv2. It reads with SimpleITK, which it is
given.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil

NNUNET = """
import sys
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
if __name__ == "__main__":
    truth, prediction, output, workers = sys.argv[1:]
    compute_metrics_on_folder(truth, prediction, output, SimpleITKIO(), ".nii.gz", [1, 2], None,
                              int(workers), True)
"""


def make_case(folder: Path, number: int, shape: tuple[int, ...]) -> None:
    """Writes a truth and a prediction."""
    rng = np.random.default_rng(number)
    spacing = np.array([0.8, 0.8, 3.0])
    size = np.array(shape) * spacing
    truth, prediction = np.zeros((2, *shape), np.uint8)

    def paint(mask: np.ndarray, center: np.ndarray, radii: np.ndarray, value: int) -> None:
        low = np.maximum(np.floor((center - 1.3 * radii) / spacing).astype(int), 0)
        high = np.minimum(np.ceil((center + 1.3 * radii) / spacing).astype(int), shape)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        axes = [
            (np.arange(a, b) * s - c) / r
            for a, b, s, c, r in zip(low, high, spacing, center, radii, strict=True)
        ]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        # Bumps as large as a tenth of the radius.
        bumps = 0.1 * np.sin(5 * x + number) * np.cos(4 * y) * np.sin(3 * z + 1)
        mask[box][x**2 + y**2 + z**2 < 1 + bumps] = value

    for side in (0.33, 0.67):
        kidney = size * (side, 0.55, 0.5)
        for mask in (truth, prediction):
            paint(mask, kidney + (mask is prediction) * 1.0, np.array([28.0, 25.0, 52.0]), 1)
        for _ in range(rng.integers(0, 3)):
            center = kidney + rng.uniform(-25, 25, 3)
            radii = rng.uniform(5, 22) * rng.uniform(0.8, 1.2, 3)
            paint(truth, center, radii, 2)
            if rng.random() < 0.8:
                paint(prediction, center + rng.normal(0, 2, 3), radii * rng.uniform(0.8, 1.2), 2)
        if rng.random() < 0.5:
            paint(prediction, kidney + rng.uniform(-40, 40, 3), rng.uniform(3, 8, 3), 2)
    affine = np.diag([-0.8, -0.8, 3.0, 1.0])
    for kind, mask in (("truth", truth), ("prediction", prediction)):
        place = folder / "distinct" / kind
        place.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(mask, affine), place / f"{number}.nii.gz")


def make_folders(folder: Path, cases: int, distinct: int) -> tuple[Path, Path]:
    """Gives the distinct cases many names."""
    places = []
    for kind in ("truth", "prediction"):
        place = folder / f"{kind}_{cases}"
        place.mkdir()
        for number in range(cases):
            source = folder / "distinct" / kind / f"{number % distinct}.nii.gz"
            os.link(source, place / f"case_{number:04d}.nii.gz")
        places.append(place)
    return places[0], places[1]


def watched(command: list[str]) -> dict[str, float]:
    """Runs a command; returns its seconds, processor seconds and most memory, in MB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    most = 0.0
    finished = threading.Event()

    def watch() -> None:
        nonlocal most
        root = psutil.Process(process.pid)
        while not finished.wait(0.2):
            held = 0
            try:
                for one in [root, *root.children(recursive=True)]:
                    held += one.memory_full_info().pss
            except psutil.Error:
                continue  # one has just ended; the next look counts the others
            most = max(most, held / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    _, errors = process.communicate()
    finished.set()
    thread.join()
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode not in (0, 1):
        raise RuntimeError(errors.decode()[-2000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cores": cpu / seconds, "memory": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, nargs="+", default=(50, 200))
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 100))
    parser.add_argument("--distinct", type=int, default=10)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peer-cases", type=int, nargs="*", help="default: all of --cases")
    options = parser.parse_args()
    peer_cases = options.cases if options.peer_cases is None else options.peer_cases
    if not importlib.util.find_spec("nnunetv2"):
        peer_cases = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(options.distinct):
            make_case(folder, number, tuple(options.shape))
        labels = folder / "dataset.json"
        labels.write_text(json.dumps({"labels": {"background": 0, "kidney": 1, "tumor": 2}}))
        script = folder / "nnunet.py"
        script.write_text(NNUNET)
        print(f"masks of {'x'.join(map(str, options.shape))}, {options.workers} worker processes")
        print("| what | cases | s | s a case | cores | memory, MB |")
        print("| --- | --- | --- | --- | --- | --- |")
        for cases in options.cases:
            truth, prediction = make_folders(folder, cases, options.distinct)
            ours = [sys.executable, "-m", "tumorjax.main", "--config=configs/evaluation.py"]
            ours += [f"--workdir={folder / f'work_{cases}'}", f"--config.labels={labels}"]
            ours += [f"--config.truth={truth}", f"--config.prediction={prediction}"]
            ours += ["--config.tumors=('tumor',)", f"--config.workers={options.workers}"]
            rows = {"tumorjax": ours}
            if cases in peer_cases:
                rows["nnU-Net (voxel counts alone)"] = [
                    *(sys.executable, str(script), str(truth), str(prediction)),
                    *(str(folder / f"nnunet_{cases}.json"), str(options.workers)),
                ]
            for what, command in rows.items():
                found = watched(command)
                print(
                    f"| {what} | {cases} | {found['seconds']:.1f} |"
                    f" {found['seconds'] / cases:.3f} | {found['cores']:.2f} |"
                    f" {found['memory']:.0f} |",
                    flush=True,
                )
            if cases in peer_cases:
                same_dice(folder, cases)


def same_dice(folder: Path, cases: int) -> None:
    """Says how far the mean Dice scores of both programs are apart."""
    ours = json.loads((folder / f"work_{cases}" / "summary.json").read_text())["mean"]
    theirs = json.loads((folder / f"nnunet_{cases}.json").read_text())["mean"]
    apart = max(abs(ours[key]["Dice"] - theirs[key]["Dice"]) for key in ("1", "2"))
    print(f"largest difference of mean Dice: {apart:.1e}")


if __name__ == "__main__":
    main()
