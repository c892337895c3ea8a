"""Key-value stores behind a path or URL: folders, buckets, memory.

Everything that goes to a bucket goes through tensorstore, which is needed for volumes anyway: one
set of credentials, endpoints and retries, one way to write under a condition, and no further
package. Credentials come from where Google's and Amazon's own programs look for them. Servers other
than theirs are named by environment variables, which have to be set before the first access:

    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL   s3:// (MinIO, Ceph, R2, ...)
    STORAGE_EMULATOR_HOST                   gs://; no credentials are needed then
"""

import errno
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import tensorstore as ts

from tumorjax.errors import UserError

BUCKETS = ("gs", "s3")
# What a server may do wrong before a job ends: about a minute of errors 429, 500, 502, 503, 504, of
# refused or cut connections. Waits double from the first to the last and are drawn at random.
RETRIES = {"max_retries": 10, "initial_delay": "100ms", "max_delay": "16s"}
# A connection without a byte in this time is cut and counts as an error. curl's own settings, read
# when tensorstore first uses it.
_PATIENCE = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "15",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "30",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}

# Longer than all of these tries together; and for an object of a few gigabytes, such as a
# checkpoint's, or a list of a million keys.
ANSWER_SECONDS = 150.0
BULK_SECONDS = 900.0

# One for the process: shard indices and the last chunks stay in memory (all of a small store does),
# and files written once under a token never change, so they are not looked at again.
# A limit of its own lets several reading threads use all cores: twice the crops a second of the
# pool that tensorstore shares by default.
READING = ts.Context(
    {
        "cache_pool": {"total_bytes_limit": 128_000_000},
        "data_copy_concurrency": {"limit": os.cpu_count() or 1},
        "gcs_request_retries": RETRIES,
        "s3_request_retries": RETRIES,
    }
)
# What is written is not kept: reading it back comes from the disk.
WRITING = ts.Context({"cache_pool": {"total_bytes_limit": 0}}, parent=READING)

_CREDENTIALS = {
    "gs": (
        "Log in (gcloud auth application-default login), point GOOGLE_APPLICATION_CREDENTIALS to a"
        " key file, or give this machine's service account access to the bucket"
    ),
    "s3": (
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN for keys that"
        " expire), or AWS_PROFILE, to an account with access to the bucket"
    ),
}


def is_bucket(url: Any) -> bool:
    """Says whether a path or URL lies in a bucket."""
    return str(url).startswith(tuple(f"{scheme}://" for scheme in BUCKETS))


def open_values(url: str) -> ts.KvStore:
    """Opens a path or URL as a key-value store, each key below it."""
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        # Given as a path, so that no character of it needs an escape.
        path = Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute()
        return ts.KvStore.open({"driver": "file", "path": f"{path}/"}, context=READING).result()
    spec: Any = _bucket(url) if parts.scheme in BUCKETS else f"{url.rstrip('/')}/"
    try:
        return ts.KvStore.open(spec, context=READING).result()
    except ValueError as error:
        raise UserError(
            f"{url}: not a path or a URL that tensorstore knows (file://, gs://, s3://): {error}"
        ) from error


def _bucket(url: str) -> dict[str, Any]:
    scheme, rest = url.split("://", 1)
    name, _, path = rest.partition("/")
    path = path.strip("/")
    for variable, value in _PATIENCE.items():
        os.environ.setdefault(variable, value)
    spec: dict[str, Any] = {"bucket": name, "path": f"{path}/" if path else ""}
    if scheme == "gs":
        emulator = os.environ.get("STORAGE_EMULATOR_HOST")
        if emulator:
            where = emulator if "://" in emulator else f"http://{emulator}"
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", where.rstrip("/"))
            # Else a token would be looked for on Google's machines.
            os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "emulator")
        return {"driver": "gcs", **spec}
    # Without it a condition would be checked by a request of its own before the write.
    spec |= {"driver": "s3", "use_conditional_write": True}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    return spec


@contextmanager
def clear_errors(url: Any) -> Iterator[None]:
    """Turns what a user can mend about a bucket (name, access, server) into one line that says how.

    Raises:
        UserError: in place of tensorstore's error, where it is of that kind.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        explained = explain(url, error)
        if explained is None:
            raise
        raise explained from error


def explain(url: Any, error: BaseException) -> UserError | None:
    """Returns what a user can do about an error of a bucket; None for all other errors."""
    if not is_bucket(url):
        return None
    text = str(error)
    scheme = str(url).split("://", 1)[0]
    name = "/".join(str(url).split("/")[:3])

    def says(*signs: str) -> bool:
        return any(sign in text for sign in signs)

    reason = text.split(" [")[0].strip()[:200]
    if says("NoSuchBucket") or (says("NOT_FOUND") and says("bucket", "404")):
        return UserError(
            f"{url}: there is no bucket {name} ({reason}). Make it, or correct the URL"
        )
    if says(
        *("UNAUTHENTICATED", "PERMISSION_DENIED", "AccessDenied", "ExpiredToken"),
        *("InvalidAccessKeyId", "SignatureDoesNotMatch", "'401'", "'403'", "credential"),
    ):
        return UserError(
            f"{url}: access was refused, with credentials that are missing, expired or not allowed"
            f" to do this ({reason}). {_CREDENTIALS[scheme]}"
        )
    if says("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CURL error", "retry attempts"):
        return UserError(
            f"{url}: the server does not answer or fails again and again ({reason}). Run the same"
            " command again when it is reachable; what was written stays"
        )
    return None


def insist(ask: Callable[[], ts.Future], seconds: float = ANSWER_SECONDS) -> Any:
    """Returns what a request gives; asks again where it gives nothing at all for too long.

    Beside tensorstore's own tries, which know nothing of a server that answers and never ends.

    Args:
        ask: makes the request; one that may be made twice.
        seconds: to wait each time.
    """
    for last in (False, False, True):
        try:
            return ask().result(timeout=seconds)
        except TimeoutError as error:
            if last:
                raise TimeoutError(f"DEADLINE_EXCEEDED: nothing for {seconds:.0f} s") from error
            logging.getLogger(__name__).warning("no answer for %.0f s, asked again", seconds)
    raise AssertionError("unreachable")


def list_keys(root: ts.KvStore, prefix: str) -> list[str]:
    """Returns the keys that start with a prefix; all for ""."""
    # "0" is the character after "/".
    keys = ts.KvStore.KeyRange(prefix, f"{prefix[:-1]}0") if prefix else ts.KvStore.KeyRange()
    return sorted(key.decode() for key in insist(lambda: root.list(keys), BULK_SECONDS))


def remove_keys(root: ts.KvStore, prefix: str) -> None:
    for key in list_keys(root, prefix):
        root.write(key, None).result()


@functools.lru_cache(maxsize=16)
def _open_bucket(name: str, endpoint: str | None) -> ts.KvStore:
    return open_values(name)


def open_bucket(name: str) -> ts.KvStore:
    """Opens a bucket (gs://NAME, s3://NAME) as a whole; once in a process."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _open_bucket(name, endpoint)


def canonical_json(value: Any) -> bytes:
    """Returns JSON of which each byte is determined by the value."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def is_full(error: BaseException) -> bool:
    """Says whether an error means that the disk or the quota is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT))
