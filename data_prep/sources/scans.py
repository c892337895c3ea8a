"""Scans without labels, as synthesizers learn from them: a folder of NIfTI files.

CASE.nii.gz   or   CASE_0000.nii.gz   or   CASE/ct.nii.gz
patients.csv (case,patient,site), if there is one
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.sources import ENDINGS, Found, make_case, read_patients, stem
from tumorjax.errors import UserError

SITE = "scans"


def find(folder: Path, settings: Mapping[str, Any], workers: int = 1) -> Found:
    """Looks up the scans; see `data_prep.sources.find`.

    Raises:
        UserError: there is none.
    """
    patients = read_patients(folder)
    files = [
        (re.sub(r"_0000$", "", name), path) for path in folder.iterdir() if (name := stem(path))
    ]
    files += [
        (path.parent.name, path) for ending in ENDINGS for path in folder.glob(f"*/ct{ending}")
    ]
    if not files:
        raise UserError(f"{folder}: no scans. Expected CASE.nii.gz or CASE/ct.nii.gz")
    return Found([make_case(name, path, [], patients, SITE) for name, path in sorted(files)], [])
