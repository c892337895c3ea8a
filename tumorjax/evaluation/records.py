"""What an evaluation keeps of each case, so that a second run does only what is missing or changed.

workdir/cases/CASE.json    what the case's numbers were made from, and the numbers
workdir/cases/CASE.npz     its pictures, see snapshots.py; written first
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tumorjax.errors import CaseError
from tumorjax.files import write_json_atomic
from tumorjax.settings import plain


class Outcome(NamedTuple):
    """How a case ended: its numbers are in its record, or `error` says why there are none.

    Attributes:
        case: the case's id.
        fresh: whether the numbers were computed by this run.
        error: None where there are numbers.
    """

    case: str
    fresh: bool = False
    error: CaseError | None = None


def is_kept(workdir: Path, case: str, made_from: Mapping[str, Any]) -> bool:
    """Whether a case has a record that was made from the same."""
    try:
        record = json.loads(_path(workdir, case).read_text())
    except FileNotFoundError:
        return False
    return record["made_from"] == plain(made_from)


def keep(workdir: Path, case: str, made_from: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Writes a case's record.

    Args:
        workdir: of the evaluation.
        case: the case's id.
        made_from: all that the result depends on, as JSON.
        result: rows, overlap and froc (see measure.py), reference_file and prediction_file.
    """
    record = {"made_from": plain(made_from), "result": dict(result)}
    write_json_atomic(_path(workdir, case), record)


def read_result(workdir: Path, case: str) -> dict[str, Any]:
    """Returns a case's kept result."""
    return json.loads(_path(workdir, case).read_text())["result"]


def hash_file(case: str, path: Path) -> str:
    """Returns a file's SHA-256.

    Raises:
        CaseError: it is not readable.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CaseError(case, f"{path}: {error.strerror}", "Check the file") from error


def hash_weights(apply: Any) -> str:
    """Returns the SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(apply):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _path(workdir: Path, case: str) -> Path:
    return workdir / "cases" / f"{case}.json"
