"""Small files: written whole or not at all, under names that are safe."""

import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tumorjax.errors import UserError

_CASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


def check_case_id(case: str) -> str:
    """Returns the case id if it is safe as one folder's name.

    Case ids come from the outside; they must not lead out of the folder that they are put in.

    Raises:
        UserError: the id is empty, too long, or holds a slash, a leading dot or a character
            outside letters, digits and `._+-`.
    """
    if not isinstance(case, str) or not _CASE_ID.fullmatch(case) or ".." in case:
        raise UserError(
            f"case id {case!r} is not usable as a name: expected 1 to 128 letters, digits or"
            " any of ._+- that start with a letter or digit. Rename the case"
        )
    return case


def write_bytes_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file aside and renames it into place, so that a reader never sees a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; results are ordinary files.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text whole or not at all."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON whole or not at all. NaN and infinity are refused: JSON has none."""
    write_text_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Formats rows as CSV. None and NaN become empty fields, floats get at most 6 decimals."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="raise", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _field(row.get(key)) for key in columns})
    return buffer.getvalue()


def write_csv_atomic(
    path: str | os.PathLike, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]
) -> None:
    """Writes rows as CSV, whole or not at all. See `csv_text` for how values are formatted."""
    write_text_atomic(path, csv_text(rows, columns))


def read_csv(path: str | os.PathLike) -> list[dict[str, str]]:
    """Reads a CSV file with a header into one dictionary a row; all values are text."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def _field(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) or (hasattr(value, "dtype") and value.dtype.kind == "f"):
        value = float(value)
        if value != value:
            return ""
        return f"{value:.6f}".rstrip("0").rstrip(".")
    return value
