"""Real masks that several tests of the metrics read."""

import nibabel as nib
import numpy as np
import pytest

from tumorjax.metrics.boxes import bounding_box


@pytest.fixture(scope="session")
def kits19(real_data):
    """All masks of KiTS19: labels (1 kidney, 2 tumour) cropped to the kidneys, and spacings."""
    cases = []
    for path in sorted((real_data / "kits19").glob("case_*.nii.gz")):
        image = nib.load(path)
        labels = np.asarray(image.dataobj).astype(np.uint8)
        box = tuple(slice(max(s.start - 4, 0), s.stop + 4) for s in bounding_box(labels))
        spacing = tuple(float(size) for size in image.header.get_zooms())
        cases.append((np.ascontiguousarray(labels[box]), spacing))
    assert len(cases) == 24
    return cases
