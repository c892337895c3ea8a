"""Slices of scans to show masks on: from a store, or from a folder of NIfTI files."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from tumorjax.errors import CaseError, UserError
from tumorjax.evaluation.worst import ReadScan
from tumorjax.geometry import to_canonical
from tumorjax.nifti import ENDINGS, read_ct
from tumorjax.volumes import Store

# Soft tissue, HU.
WINDOW = (-175.0, 250.0)


def from_store(store: Store) -> ReadScan:
    """Returns how to read slices of a store."""

    def read(case: str, box: tuple[slice, slice, int]) -> Float[np.ndarray, "x y"]:
        x, y, z = box
        return np.asarray(store.read(case, "image", (x, y, slice(z, z + 1))))[..., 0]

    return read


def from_folder(folder: str | Path) -> ReadScan:
    """Returns how to read slices of a folder's scans (NIfTI, HU).

    They are called CASE_0000.nii.gz as nnU-Net's, CASE.nii.gz, or CASE/ct.nii.gz.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (config.images). Leave it out for no scans")

    def read(case: str, box: tuple[slice, slice, int]) -> Float[np.ndarray, "x y"]:
        names = [f"{case}{part}{ending}" for part in ("_0000", "") for ending in ENDINGS]
        paths = [folder / name for name in (*names, f"{case}/ct.nii.gz")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise CaseError(case, f"no scan of this name in {folder}", "Give it the masks' name")
        scan = read_ct(path)
        image, _ = to_canonical(scan.image, scan.affine)
        x, y, z = box
        if x.stop > image.shape[0] or y.stop > image.shape[1] or z >= image.shape[2]:
            found = f"the scan has shape {image.shape}, smaller than its masks"
            raise CaseError(case, found, "Give the scan that the masks are of")
        low, high = WINDOW
        return np.clip((image[box].astype(np.float32) - low) / (high - low), 0, 1)

    return read
