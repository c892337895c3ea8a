"""A scan resampled to 1.5 mm and brought to its window: seconds and memory, beside nnU-Net v2.

    python -m benchmarks.preparation [LUNG_CT]

The first scan is made up at real size (512x512x200 at 0.8x0.8x2.5 mm, eight organs); the second is
a real one with a tumour's mask, NAME_ct.nii.gz and NAME_tumour.nii.gz,
shared/data/lung/lung1_ct.nii.gz unless another is given. nnU-Net's rows are its
CTNormalization, then its resampling of image and labels with its planner's settings (order 3 and 1;
through-plane order 0 where slices are thick); they need `pip install nnunetv2`.

Each row runs in a process of its own. Memory is the most that the process held at any time, less
what it held before it loaded the scan; so it includes the scan itself.
"""

import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

SPACING = (1.5, 1.5, 1.5)
WINDOW = (-175.0, 250.0)
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "lung" / "lung1_ct.nii.gz"
REPEATS = 3


def made_up_scan(folder: Path) -> None:
    """Writes a scan of a body with eight organs: int16 image and uint8 labels, x fastest."""
    rng = np.random.default_rng(0)
    shape, spacing = (512, 512, 200), (0.8, 0.8, 2.5)
    image = np.empty(shape, np.int16, order="F")
    labels = np.zeros(shape, np.uint8, order="F")
    x, y = np.meshgrid(np.arange(512.0), np.arange(512.0), indexing="ij")
    centres = rng.uniform((150, 150, 30), (360, 360, 170), (8, 3))
    body = ((x - 256) / 220) ** 2 + ((y - 256) / 160) ** 2 < 1
    for z in range(200):
        plane = np.where(body, 20.0, -1000.0)
        for number, (cx, cy, cz) in enumerate(centres, start=1):
            organ = ((x - cx) / 60) ** 2 + ((y - cy) / 45) ** 2 + ((z - cz) / 18) ** 2 < 1
            plane[organ & body] = 40 + 12 * number
            labels[:, :, z][organ & body] = number
        image[:, :, z] = plane + rng.normal(0, 12, plane.shape)
    save(folder, "made up", image, labels, spacing)


def real_scan(folder: Path, path: Path) -> None:
    """Writes a real scan with the tumour's mask that lies beside it."""
    import nibabel as nib

    file = nib.load(path)
    mask = nib.load(path.with_name(path.name.replace("_ct", "_tumour")))
    labels = np.asfortranarray(np.asanyarray(mask.dataobj).astype(np.uint8))
    save(folder, "real", np.asanyarray(file.dataobj), labels, file.header.get_zooms()[:3])


def save(folder: Path, name: str, image: np.ndarray, labels: np.ndarray, spacing) -> None:
    place = folder / name
    place.mkdir()
    np.save(place / "image.npy", image)
    np.save(place / "labels.npy", labels)
    (place / "spacing.json").write_text(json.dumps([float(s) for s in spacing]))


# ---------------------------------------------------------------------------- rows, one a process


def ours(image: np.ndarray, labels: np.ndarray, spacing) -> list[float]:
    from tumorjax.geometry import prepare_image, resample_labels

    begin = time.perf_counter()
    ready = prepare_image(image, spacing, SPACING, WINDOW, order=3)
    middle = time.perf_counter()
    resample_labels(labels, ready.shape)
    return [middle - begin, time.perf_counter() - middle]


def nnunet(image: np.ndarray, labels: np.ndarray, spacing) -> list[float]:
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
    from nnunetv2.preprocessing.resampling.default_resampling import (
        compute_new_shape,
        resample_data_or_seg_to_shape,
    )

    # Its readers give [c, z, y, x] with x fastest: the same memory as our [x, y, z].
    data, seg = image.T[None], labels.T[None]
    old, new = spacing[::-1], SPACING[::-1]
    properties = {
        "mean": 80.0,
        "std": 60.0,
        "percentile_00_5": WINDOW[0],
        "percentile_99_5": WINDOW[1],
    }
    shape = compute_new_shape(data.shape[1:], old, new)
    common = {"order_z": 0, "force_separate_z": None}
    begin = time.perf_counter()
    # As its DefaultPreprocessor does it: a float32 copy, normalised, then resampled.
    data = data.astype(np.float32)
    data[0] = CTNormalization(intensityproperties=properties).run(data[0])
    data = resample_data_or_seg_to_shape(data, shape, old, new, is_seg=False, order=3, **common)
    middle = time.perf_counter()
    resample_data_or_seg_to_shape(seg, shape, old, new, is_seg=True, order=1, **common)
    return [middle - begin, time.perf_counter() - middle]


ROWS = {"tumorjax": ours, "nnU-Net v2": nnunet}


def memory(field: str) -> int:
    """Returns a size of this process in kB (Linux): VmRSS now, VmHWM the most there has been.

    Not getrusage: its peak is handed down from the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def run_row(name: str, folder: str) -> None:
    """Runs one row on one scan and prints its figures as JSON."""
    # All imports are done before the scan is loaded.
    if name == "tumorjax":
        import tumorjax.geometry  # noqa: F401
    else:
        import nnunetv2.preprocessing.normalization.default_normalization_schemes
        import nnunetv2.preprocessing.resampling.default_resampling  # noqa: F401
    before = memory("VmRSS")
    image = np.load(Path(folder) / "image.npy")
    labels = np.load(Path(folder) / "labels.npy")
    spacing = json.loads((Path(folder) / "spacing.json").read_text())
    seconds = ROWS[name](image, labels, spacing)
    print(json.dumps({"seconds": seconds, "mb": (memory("VmHWM") - before) * 1024 / 1e6}))


def measure(name: str, folder: Path) -> dict:
    """Returns the fastest of a few runs, and the least memory."""
    runs = []
    for _ in range(REPEATS):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.preparation", "--row", name, str(folder)],
            check=True,
            capture_output=True,
            text=True,
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    best = min(runs, key=lambda run: sum(run["seconds"]))
    return {"seconds": best["seconds"], "mb": min(run["mb"] for run in runs)}


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--row"]:
        run_row(arguments[1], arguments[2])
        return
    path = Path(arguments[0]) if arguments else REAL
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made_up_scan(folder)
        if path.is_file():
            real_scan(folder, path)
        else:
            print(f"no real scan at {path}: only the made up one")
        print(f"{'scan':<34} {'':<12} {'image s':>8} {'labels s':>9} {'total s':>8} {'MB':>7}")
        for place in sorted(p for p in folder.iterdir()):
            spacing = json.loads((place / "spacing.json").read_text())
            shape = np.load(place / "image.npy", mmap_mode="r").shape
            size = "x".join(map(str, shape)) + " at " + "x".join(f"{s:.3g}" for s in spacing)
            totals = []
            for name in ROWS:
                if name != "tumorjax" and find_spec("nnunetv2") is None:
                    print(f"{size:<34} {name:<12} not installed: pip install nnunetv2")
                    continue
                row = measure(name, place)
                total = sum(row["seconds"])
                totals.append((total, row["mb"]))
                print(
                    f"{size:<34} {name:<12} {row['seconds'][0]:8.2f} {row['seconds'][1]:9.2f}"
                    f" {total:8.2f} {row['mb']:7.0f}",
                    flush=True,
                )
            if len(totals) == 2:
                (our_s, our_mb), (their_s, their_mb) = totals
                print(
                    f"{'':<34} {their_s / our_s:.1f} times faster, {our_mb / their_mb:.0%} of the"
                    " memory"
                )


if __name__ == "__main__":
    main(sys.argv[1:])
