"""Where a case's results lie, when a case is finished, and how results are written.

    OUTPUT/labels.json                          what the values are and how they came about
    OUTPUT/CASE.nii.gz                          form "labels"
    OUTPUT/CASE/segmentations/NAME.nii.gz       form "structures", as AbdomenAtlas has it
    OUTPUT/CASE/segmentation.dcm                form "dicom"
    OUTPUT/CASE/statistics.json, preview.png
    OUTPUT/CASE/probabilities/NAME.nii.gz or NAME.zarr

Every file appears whole, masks first: whatever else is there of a case, its mask is too.
"""

import errno
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from jaxtyping import Float32, UInt8

from tumorjax.files import write_bytes_atomic
from tumorjax.inference import dicom_segmentation
from tumorjax.inference.native_grid import Structure
from tumorjax.nifti import Scan, write_image, write_mask

FORMS = ("labels", "structures", "dicom")
FORMATS = ("nifti", "zarr")


class Wanted(NamedTuple):
    """What is written of each case.

    Attributes:
        form: of the mask, one of FORMS.
        statistics: whether to write statistics.json.
        preview: whether to write preview.png.
        probabilities: classes whose probabilities are kept.
        probability_format: one of FORMATS.
    """

    form: str
    statistics: bool = False
    preview: bool = False
    probabilities: tuple[str, ...] = ()
    probability_format: str = "nifti"


def mask_path(output: Path, case: str, form: str) -> Path:
    """Returns the file or folder that a case's mask is."""
    if form == "labels":
        return output / f"{case}.nii.gz"
    return output / case / ("segmentations" if form == "structures" else "segmentation.dcm")


def paths_of(output: Path, case: str, wanted: Wanted) -> dict[str, Path]:
    """Returns all that is written of a case: what -> file or folder."""
    folder = output / case
    paths = {"mask": mask_path(output, case, wanted.form)}
    if wanted.statistics:
        paths["statistics"] = folder / "statistics.json"
    if wanted.preview:
        paths["preview"] = folder / "preview.png"
    ending = {"nifti": ".nii.gz", "zarr": ".zarr"}[wanted.probability_format]
    for name in wanted.probabilities:
        paths[f"probability of {name}"] = folder / "probabilities" / f"{name}{ending}"
    return paths


def is_finished(output: Path, case: str, wanted: Wanted) -> bool:
    """Whether all that is wanted of a case is there."""
    return all(path.exists() for path in paths_of(output, case, wanted).values())


def remove_leftovers(output: Path, case: str) -> None:
    """Removes what a killed process left aside of a case. Nobody else may work on it meanwhile."""
    asides = [*output.glob(f".{case}.nii.gz.*.part")]
    for folder in (output / case, output / case / "probabilities"):
        asides += [*folder.glob(".*.part"), *folder.glob(".aside-*")]
    for aside in asides:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- masks


def write_masks(
    target: Path,
    form: str,
    labels: UInt8[np.ndarray, "i j k"],
    scan: Scan,
    table: Sequence[Structure],
    segments: Sequence[dicom_segmentation.Segment] = (),
    record: str = "",
) -> None:
    """Writes a case's mask in its form.

    Args:
        target: see `mask_path`.
        form: one of FORMS.
        labels: on the grid of the scan.
        scan: whose grid, or DICOM series, it is.
        table: structures of form "structures".
        segments: those of form "dicom".
        record: of the settings, for "dicom", see `dicom_segmentation.encode`.
    """
    if form == "labels":
        write_mask(target, labels, scan.header)
    elif form == "dicom":
        write_bytes_atomic(target, dicom_segmentation.encode(labels, scan, segments, record))
    else:
        with _aside(target) as aside:
            for structure in table:
                mask = (labels == structure.value).astype(np.uint8)
                write_mask(aside / f"{structure.name}.nii.gz", mask, scan.header)


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Makes a folder that takes its name when all is in it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".aside-", dir=target.parent))
    try:
        yield folder
        # mkdtemp makes folders private; results are ordinary ones.
        folder.chmod(target.parent.stat().st_mode)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# ---------------------------------------------------------------------------- beside them


def write_probabilities(
    paths: Sequence[Path],
    volumes: Iterable[Float32[np.ndarray, "i j k"]],
    names: Sequence[str],
    scan: Scan,
) -> None:
    """Writes classes' probabilities on the grid of a scan, with the precision of float16.

    Args:
        paths: ending in .zarr, or in .nii.gz: NIfTI has no float16, so they are float32 there with
            the values that float16 can tell apart.
        volumes: one after the other; no two are held at a time.
        names: of the classes.
        scan: whose grid it is.
    """
    for path, volume, name in zip(paths, volumes, names, strict=True):
        half = volume.astype(np.float16)
        if path.name.endswith(".zarr"):
            _write_zarr(path, half, name, scan)
        else:
            write_image(path, half.astype(np.float32), scan.header)


def _write_zarr(path: Path, values: np.ndarray, name: str, scan: Scan) -> None:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file"},
        "metadata": {
            "shape": list(values.shape),
            "data_type": "float16",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [min(128, n) for n in values.shape]},
            },
            "codecs": [
                {"name": "bytes"},
                {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 5}},
            ],
            "dimension_names": ["i", "j", "k"],
            "attributes": {"class": name, "affine": scan.affine.tolist(), "world": "RAS, mm"},
        },
    }
    with _aside(path) as aside:
        spec["kvstore"] = {"driver": "file", "path": f"{aside}/"}
        try:
            ts.open(spec, create=True).result().write(values).result()
        except ValueError as error:
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise
