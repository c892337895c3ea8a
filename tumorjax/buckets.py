"""Paths in buckets (gs://, s3://), used as `pathlib.Path` is.

A job writes what it leaves under its workdir with the methods of `pathlib.Path`; `BucketPath` has
those that make sense for objects. An object is put whole or not at all and seen by all at once, so
that what is renamed into place on disks is simply written here, and what one process wrote the
others see. That is why a workdir in a bucket is no local folder that is copied there now and then:
several processes would have to agree on when. Requests go through tensorstore (see
`key_values`), which retries them.

Folders exist as far as there are objects in them: `mkdir` makes nothing. What needs files on this
machine (NIfTI, Orbax) gets a local folder and is put here as a whole: `files.replacing_folder`,
`training/mirror.py`. Taken for a local path (`open`, `Path`), one in a bucket is a `UserError`.
"""

import fnmatch
import io
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import tensorstore as ts

from tumorjax.errors import UserError
from tumorjax.key_values import (
    BULK_SECONDS,
    clear_errors,
    insist,
    is_bucket,
    list_keys,
    open_bucket,
)


class BucketPath:
    """A path in a bucket. Immutable, compared by its URL.

    Attributes:
        bucket: gs://NAME or s3://NAME.
    """

    __slots__ = ("_path", "bucket")
    bucket: str
    _path: PurePosixPath

    def __init__(self, url: "str | BucketPath"):
        if isinstance(url, BucketPath):
            self.bucket, self._path = url.bucket, url._path
            return
        scheme, _, rest = url.partition("://")
        name, _, key = rest.partition("/")
        if not is_bucket(url) or not name:
            raise UserError(
                f"{url}: no URL of a bucket. Expected gs://BUCKET/... or s3://BUCKET/..."
            )
        self.bucket = f"{scheme}://{name}"
        self._path = PurePosixPath(f"/{key.lstrip('/')}")

    def _at(self, path: PurePosixPath) -> "BucketPath":
        made = BucketPath.__new__(BucketPath)
        made.bucket, made._path = self.bucket, path
        return made

    # ------------------------------------------------------------------------ as text

    @property
    def key(self) -> str:
        """The object's key in the bucket; "" for the bucket itself."""
        return str(self._path)[1:]

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}".rstrip("/")

    as_posix = __str__

    def __repr__(self) -> str:
        return f"BucketPath({str(self)!r})"

    def __fspath__(self) -> str:
        raise UserError(f"{self}: a file or folder on this machine is needed here, not in a bucket")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __lt__(self, other: "BucketPath") -> bool:
        return (self.bucket, self._path) < (other.bucket, other._path)

    def __hash__(self) -> int:
        return hash(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return BucketPath, (str(self),)

    # ------------------------------------------------------------------------ other paths

    def __truediv__(self, part: Any) -> "BucketPath":
        return self._at(self._path / str(part).lstrip("/"))

    def joinpath(self, *parts: Any) -> "BucketPath":
        path = self
        for part in parts:
            path = path / part
        return path

    @property
    def name(self) -> str:
        return self._path.name

    @property
    def stem(self) -> str:
        return self._path.stem

    @property
    def suffix(self) -> str:
        return self._path.suffix

    @property
    def parent(self) -> "BucketPath":
        return self._at(self._path.parent)

    def with_name(self, name: str) -> "BucketPath":
        return self._at(self._path.with_name(name))

    def with_suffix(self, suffix: str) -> "BucketPath":
        return self._at(self._path.with_suffix(suffix))

    def relative_to(self, other: "BucketPath") -> PurePosixPath:
        if self.bucket != other.bucket:
            raise ValueError(f"{self} is not below {other}")
        return self._path.relative_to(other._path)

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self) -> "BucketPath":
        return self

    def expanduser(self) -> "BucketPath":
        return self

    # ------------------------------------------------------------------------ what is there

    def _values(self) -> ts.KvStore:
        return open_bucket(self.bucket)

    def _read(self, byte_range: slice | None = None) -> ts.KvStore.ReadResult:
        with clear_errors(self):
            return insist(
                lambda: self._values().read(self.key, byte_range=byte_range), BULK_SECONDS
            )

    def _below(self) -> list[str]:
        """Returns the keys below this folder, relative to it."""
        prefix = f"{self.key}/" if self.key else ""
        with clear_errors(self):
            return [key[len(prefix) :] for key in list_keys(self._values(), prefix)]

    def is_file(self) -> bool:
        # A range of no bytes asks whether it is there, and reads nothing.
        return bool(self.key) and self._read(slice(0, 0)).state == "value"

    def is_dir(self) -> bool:
        return bool(self._below())

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["BucketPath"]:
        names = dict.fromkeys(key.split("/", 1)[0] for key in self._below())
        if not names:
            raise FileNotFoundError(f"{self}: nothing there")
        yield from (self / name for name in names)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yields what matches, files and folders; a slash at the end means folders alone."""
        folders_only, parts = pattern.endswith("/"), PurePosixPath(pattern).parts
        fixed: list[str] = []
        while len(fixed) < len(parts) - 1 and not set("*?[") & set(parts[len(fixed)]):
            fixed.append(parts[len(fixed)])
        base, wanted = self.joinpath(*fixed), parts[len(fixed) :]
        if "**" in wanted:
            raise ValueError(f"{pattern!r}: ** is not supported, use rglob")
        found: dict[str, None] = {}
        for key in base._below():
            there = key.split("/")
            deep = len(there) > len(wanted) if folders_only else len(there) >= len(wanted)
            if deep and all(
                fnmatch.fnmatchcase(name, one) for name, one in zip(there, wanted, strict=False)
            ):
                found["/".join(there[: len(wanted)])] = None
        yield from (base / name for name in found)

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yields the files below whose name matches."""
        for key in self._below():
            if fnmatch.fnmatchcase(key.rsplit("/", 1)[-1], pattern):
                yield self / key

    # ------------------------------------------------------------------------ contents

    def read_bytes(self) -> bytes:
        found = self._read()
        if found.state != "value":
            raise FileNotFoundError(2, "No such object", str(self))
        return found.value

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """Puts an object, whole or not at all."""
        with clear_errors(self):
            insist(lambda: self._values().write(self.key, data), BULK_SECONDS)
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def open(self, mode: str = "r", newline: str | None = None, encoding: str = "utf-8") -> Any:
        """Opens an object for reading, as text or bytes."""
        if mode not in ("r", "rt", "rb"):
            raise ValueError(f"{self}: objects are written whole, by write_bytes or write_text")
        data = io.BytesIO(self.read_bytes())
        return data if mode == "rb" else io.TextIOWrapper(data, encoding=encoding, newline=newline)

    def version(self) -> str:
        """Returns what changes whenever the object is written.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self._read(slice(0, 0))
        if found.state != "value":
            raise FileNotFoundError(2, "No such object", str(self))
        return found.stamp.generation.hex()

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(2, "No such object", str(self))
        with clear_errors(self):
            insist(lambda: self._values().write(self.key, None))

    def remove_below(self) -> None:
        """Removes all objects below this folder."""
        values, prefix = self._values(), f"{self.key}/"
        with clear_errors(self):
            # At once: one request after the other would take long for a large folder.
            for write in [values.write(f"{prefix}{key}", None) for key in self._below()]:
                write.result(timeout=BULK_SECONDS)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes nothing: a folder is there when something is in it."""
        if not exist_ok and self.exists():
            raise FileExistsError(17, "Exists already", str(self))
