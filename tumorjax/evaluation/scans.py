"""Slices of scans to show masks on: from a store, or from a folder of NIfTI files."""

import numpy as np
from jaxtyping import Float

from tumorjax.errors import CaseError
from tumorjax.evaluation.worst import ReadScan
from tumorjax.geometry import to_canonical
from tumorjax.inference.predict import find_scans
from tumorjax.nifti import read_ct
from tumorjax.volumes import Store

# Soft tissue, HU.
WINDOW = (-175.0, 250.0)


def from_store(store: Store) -> ReadScan:
    """Returns how to read slices of a store."""

    def read(case: str, box: tuple[slice, slice, int]) -> Float[np.ndarray, "x y"]:
        x, y, z = box
        return np.asarray(store.read(case, "image", (x, y, slice(z, z + 1))))[..., 0]

    return read


def from_folder(folder: str) -> ReadScan:
    """Returns how to read slices of a folder's scans: NIfTI, HU, named as the masks.

    Raises:
        UserError: there is no scan.
    """
    scans, _ = find_scans(folder)

    def read(case: str, box: tuple[slice, slice, int]) -> Float[np.ndarray, "x y"]:
        if case not in scans:
            raise CaseError(case, f"no scan of this name in {folder}", "Give it the masks' name")
        scan = read_ct(scans[case])
        image, _ = to_canonical(scan.image, scan.affine)
        x, y, z = box
        if x.stop > image.shape[0] or y.stop > image.shape[1] or z >= image.shape[2]:
            found = f"the scan has shape {image.shape}, smaller than its masks"
            raise CaseError(case, found, "Give the scan that the masks are of")
        low, high = WINDOW
        return np.clip((image[box].astype(np.float32) - low) / (high - low), 0, 1)

    return read
