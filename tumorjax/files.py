"""Small files: written whole or not at all, under names that are safe, on disks and in buckets."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import numpy as np

from tumorjax.buckets import BucketPath
from tumorjax.errors import UserError
from tumorjax.key_values import is_bucket

_CASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


def location(path: str | os.PathLike) -> Path:
    """Returns a path for a path or URL: local, or in a bucket (gs://, s3://).

    A `BucketPath` has the methods of `Path` that jobs use, so it is typed as one. What has to be a
    file on this machine (`open`, `np.load`, nibabel) refuses it with a `UserError`.
    """
    if isinstance(path, BucketPath):
        return cast(Path, path)
    text = os.fspath(path)
    if is_bucket(text):
        return cast(Path, BucketPath(text))
    parts = urlsplit(text)
    return Path(unquote(parts.path)) if parts.scheme == "file" else Path(path)


def check_writable(folder: Path) -> None:
    """Finds out before any work whether a job may write to its folder in a bucket.

    Raises:
        UserError: there is no such bucket, the credentials are missing or not enough, or the server
            does not answer.
    """
    if isinstance(folder, BucketPath):
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)


def scratch() -> Path:
    """Returns the folder for what has to lie on this machine for a while.

    It is $TUMORJAX_SCRATCH, by default that of temporary files.
    """
    folder = Path(os.environ.get("TUMORJAX_SCRATCH") or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def local_folder(folder: Path) -> Path:
    """Returns a folder, or where on this machine that lies which belongs to one in a bucket.

    For what can be made again from the config, and is found again on the same machine.
    """
    if not isinstance(folder, BucketPath):
        return folder
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return scratch() / f"tumorjax-{name}"


@contextmanager
def replacing_folder(place: Path) -> Iterator[Path]:
    """Gives an empty folder on this machine; at the end, what is in it takes the place's place.

    On disks the folder is renamed into place. In a bucket its files are put there, those on top
    last and of them index.html or config.json, which say that all is there; then those that it does
    not have are removed. After an error in the block the place stays as it was.
    """
    in_bucket = isinstance(place, BucketPath)
    if not in_bucket:
        place.parent.mkdir(parents=True, exist_ok=True)
        for left in place.parent.glob(f".{place.name}-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a run that was killed while it wrote
    parent = scratch() if in_bucket else place.parent
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{place.name}-"))
    try:
        yield folder
        if in_bucket:
            _put_folder(folder, place)
            return
        os.chmod(folder, 0o755)
        old = None
        if place.exists():
            # A folder cannot be renamed onto a full one.
            old = Path(tempfile.mkdtemp(dir=parent, prefix=f".{place.name}-old-"))
            os.replace(place, old / place.name)
        os.replace(folder, place)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_folder(folder: Path, place: Path) -> None:
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    last = ("config.json", "index.html")
    for name in sorted(files, key=lambda name: (-len(name.parts), str(name) in last, str(name))):
        (place / name.as_posix()).write_bytes((folder / name).read_bytes())
    for path in place.rglob("*"):
        if Path(str(path.relative_to(place))) not in files:
            path.unlink()


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file. Nothing in it is executed."""
    with np.load(io.BytesIO(location(path).read_bytes()), allow_pickle=False) as file:
        return dict(file)


def version(path: Path) -> Any:
    """Returns what changes when a file is written, as JSON has it."""
    if isinstance(path, BucketPath):
        return path.version()
    return path.stat().st_mtime_ns


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
    """Writes a file aside and renames it into place, so that a reader never sees a part of it.

    Objects in buckets are put as a whole anyway.
    """
    path = location(path)
    if isinstance(path, BucketPath):
        path.write_bytes(data)
        return
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
    with location(path).open(newline="", encoding="utf-8-sig") as file:
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
