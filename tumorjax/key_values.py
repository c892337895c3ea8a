"""Key-value stores behind a path or URL: folders, buckets, memory."""

import errno
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import tensorstore as ts

from tumorjax.errors import UserError

# One for the process: shard indices and the last chunks stay in memory (all of a small store does),
# and files written once under a token never change, so they are not looked at again.
# A limit of its own lets several reading threads use all cores: twice the crops a second of the
# pool that tensorstore shares by default.
READING = ts.Context(
    {
        "cache_pool": {"total_bytes_limit": 128_000_000},
        "data_copy_concurrency": {"limit": os.cpu_count() or 1},
    }
)
# What is written is not kept: reading it back comes from the disk.
WRITING = ts.Context({"cache_pool": {"total_bytes_limit": 0}}, parent=READING)


def open_values(url: str) -> ts.KvStore:
    """Opens a path or URL as a key-value store, each key below it."""
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        # Given as a path, so that no character of it needs an escape.
        path = Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute()
        return ts.KvStore.open({"driver": "file", "path": f"{path}/"}, context=READING).result()
    try:
        return ts.KvStore.open(f"{url.rstrip('/')}/", context=READING).result()
    except ValueError as error:
        raise UserError(
            f"{url}: not a path or a URL that tensorstore knows (file://, gs://, s3://)"
        ) from error


def list_keys(root: ts.KvStore, prefix: str) -> list[str]:
    """Returns the keys that start with a prefix."""
    # "0" is the character after "/".
    keys = root.list(ts.KvStore.KeyRange(prefix, f"{prefix[:-1]}0")).result()
    return sorted(key.decode() for key in keys)


def remove_keys(root: ts.KvStore, prefix: str) -> None:
    for key in list_keys(root, prefix):
        root.write(key, None).result()


def canonical_json(value: Any) -> bytes:
    """Returns JSON of which each byte is determined by the value."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def is_full(error: BaseException) -> bool:
    """Says whether an error means that the disk or the quota is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT))
