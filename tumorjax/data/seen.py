"""Which scans a network was trained on, as it is kept beside its weights in trained_on.json.

Patients are kept as digests of their ids: a network may be given away, and who was in its training
set is nobody's business but that of who has the same patient.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tumorjax.data.crops import CropSource


def record_of(sources: Sequence[tuple[CropSource, str]]) -> dict[str, Any]:
    """Returns what is kept of the scans that a network was trained on, for trained_on.json.

    Args:
        sources: (store, case) of each training scan.

    Returns:
        patients: sorted digests of ids; images: sorted SHA-256 of the stored images, which find a
        scan again under another patient's name; scans: their number.
    """
    records = [store.record(case) for store, case in sources]
    return {
        "patients": sorted({digest(record["patient"]) for record in records}),
        "images": sorted({str(record["checksum"]["image"]) for record in records}),
        "scans": len(records),
    }


def digest(patient: object) -> str:
    """Returns what stands for a patient's id in a record."""
    return hashlib.sha256(f"patient {patient}".encode()).hexdigest()


def union(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the record of a network whose parts were trained on the scans of `records`.

    Args:
        records: of `record_of`. A scan that several parts have seen counts once.
    """
    records = list(records)
    patients = sorted({patient for record in records for patient in record["patients"]})
    images = sorted({image for record in records for image in record["images"]})
    return {"patients": patients, "images": images, "scans": len(images)}
