"""Whether a synthesizer has seen a study's test patients."""

from collections.abc import Mapping
from typing import Any

from tumorjax.data.seen import digest, record_of, union

__all__ = ["overlap", "record_of", "union"]


def overlap(trained_on: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the cases that a synthesizer has seen: the same patient, or the same image.

    Args:
        trained_on: of `record_of`.
        records: case id -> the store's record.

    Returns:
        sorted case ids; none if it has seen none of them.
    """
    patients, images = set(trained_on["patients"]), set(trained_on["images"])
    return sorted(
        case
        for case, record in records.items()
        if digest(record["patient"]) in patients or record["checksum"]["image"] in images
    )
