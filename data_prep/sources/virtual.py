"""The built-in cohort: made first, then read as any other data set in AbdomenAtlas' layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep import virtual_abdomen
from data_prep.sources import Found, abdomen_atlas


def find(folder: Path, settings: Mapping[str, Any], workers: int = 1) -> Found:
    """Makes the scans that are missing and looks up all; see `data_prep.sources.find`.

    Args:
        folder: where the scans are, or will be.
        settings: see `virtual_abdomen.default_settings`.
        workers: processes.
    """
    virtual_abdomen.write_cohort(folder, settings, workers=workers)
    return abdomen_atlas.find(folder, {}, workers, site="virtual")
