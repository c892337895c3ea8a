"""The store: prepared volumes in sharded tensorstore arrays, read crop by crop.

    URL/store.json                 the settings that all cases share
    URL/cases/CASE/case.json       the case's record, written last: without it there is no case
    URL/cases/CASE/TOKEN/image/    zarr3, uint16, one shard
    URL/cases/CASE/TOKEN/label/    zarr3, uint8, one shard
    URL/cases/CASE/TOKEN/locations/  zarr3, int32 [n, 4]: label id and voxel, for foreground crops

Each writing of a case has a TOKEN of its own, which the record names, so a case is replaced as a
whole or not at all. URL is a path, or a URL of any key-value store that tensorstore knows
(file://, gs://, s3://, memory://); the code is the same.

Images are fixed-point numbers: [0, 1] in 4095 steps, kept in uint16. The largest error is half a
step, 0.052 HU for the window of 425 HU (measured: 0.052), a tenth of that of CT itself, which is
stored in steps of 1 HU; float16 errs by up to 0.104 HU and takes 6 % more room after compression.
All 65,536 levels would take 37 % more for no use.
"""

import hashlib
import json
import os
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int, UInt8

from tumorjax import anatomy
from tumorjax.contents import MAX_LOCATIONS, check_volumes, draw_locations, tumor_instances
from tumorjax.errors import CaseError, UserError
from tumorjax.files import check_case_id
from tumorjax.geometry import label_boxes
from tumorjax.key_values import (
    READING,
    WRITING,
    canonical_json,
    clear_errors,
    explain,
    is_full,
    list_keys,
    open_values,
    remove_keys,
)

__all__ = [
    "MAX_LOCATIONS",
    "Store",
    "check_store",
    "create_store",
    "open_store",
    "remove_case",
    "tumor_instances",
    "write_case",
]

VERSION = 1
LEVELS = 4095

# Inner chunks of 32^3. Measured on an abdominal CT at 1.5 mm (244x202x224, raw 22.1 MB), random
# crops of 96^3 (raw 1.77 MB): chunks of 16^3 read 1.7 MB a crop in up to 343 pieces, 24^3 2.0 MB in
# 125, 32^3 2.3 MB in 64, 48^3 3.2 MB in 27, 64^3 4.4 MB in 27; crops of 48^3: 0.37, 0.44, 0.54, 0.9
# and 1.1 MB. Of these 32^3 takes the least processor time, and an object store few requests. Labels
# are a hundredth of that after compression, so fewer and larger pieces are faster.
CHUNK = {"image": 32, "label": 48}
# LZ4HC, since training reads its crops anew each step. Image of 273x273x333, a 96^3 crop: level 5
# 14.2 MB in 0.41 s, 1.7 ms a crop; level 2 14.6 MB in 0.10 s, 1.9 ms; zstd at level 1 13.4 MB in
# 0.12 s, 4.4 ms; LZ4 with bits shuffled 15.5 MB in 0.06 s, 2.2 ms. Labels: 0.4 MB, not shuffled. A
# CRC in each chunk would cost 0.35 ms a crop, 11 %; `Store.verify` finds damage without it.
_COMPRESSION = {
    "image": {"cname": "lz4hc", "clevel": 5, "shuffle": "shuffle"},
    "label": {"cname": "lz4hc", "clevel": 5, "shuffle": "noshuffle"},
    "locations": {"cname": "lz4hc", "clevel": 5, "shuffle": "shuffle"},
}
_ARRAYS = tuple(_COMPRESSION)

Kind = Literal["image", "label"]


class Store:
    """A store that is open for reading. Threads may share it; it may be pickled.

    Attributes:
        url: where it lies.
        settings: how its cases were prepared, from store.json.
    """

    def __init__(self, url: str | os.PathLike):
        self.url = str(url)
        self._values = open_values(self.url)
        with clear_errors(self.url):
            found = self._values.read("store.json").result()
        if found.state != "value":
            raise UserError(
                f"{self.url}: no store (store.json is missing). Give the folder or URL that"
                " configs/preparation.py wrote to"
            )
        self.settings: dict[str, Any] = _parse_settings(self.url, found.value)
        self._records: dict[str, dict[str, Any]] = {}
        self._arrays: dict[tuple[str, str], ts.TensorStore] = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return type(self), (self.url,)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @property
    def cases(self) -> list[str]:
        """The ids of the cases that are there as a whole, sorted; looked up anew each time."""
        start, end = "cases/", "/case.json"
        cases = []
        with clear_errors(self.url):
            keys = list_keys(self._values, start)
        for key in keys:
            case = key[len(start) : -len(end)]
            if key.endswith(end) and "/" not in case:
                cases.append(case)
        return sorted(cases)

    def record(self, case: str) -> dict[str, Any]:
        """Returns a case's record: geometry, labels, tumours, source, checksums.

        Raises:
            CaseError: there is no such case, or its record cannot be read.
        """
        with self._lock:
            if case in self._records:
                return self._records[case]
        record = _read_record(self._values, self.url, check_case_id(case))
        with self._lock:
            return self._records.setdefault(case, record)

    def read(
        self, case: str, kind: Kind, slices: Sequence[slice] | None = None
    ) -> Float[np.ndarray, "x y z"] | UInt8[np.ndarray, "x y z"]:
        """Reads a case's volume or a crop of it; only the chunks that it touches are read.

        Args:
            case: its id.
            kind: "image" or "label".
            slices: the crop, as for a numpy array; the whole volume by default.

        Returns:
            float32 image in [0, 1], or uint8 labels with the ids of `anatomy`.

        Raises:
            CaseError: there is no such case, or its data is damaged.
        """
        if kind not in ("image", "label"):
            raise UserError(f"volume {kind!r} is unknown. Expected image or label")
        handle = self._array(case, kind)
        if slices is not None:
            if len(slices) != 3:
                raise UserError(f"a crop needs three slices, got {len(slices)}")
            sides = zip(slices, handle.shape, strict=True)
            # tensorstore has no negative indices and refuses what lies outside.
            ranges = [slice(*side.indices(length)) for side, length in sides]
            if any(r.stop <= r.start for r in ranges):
                shape = [max(0, r.stop - r.start) for r in ranges]
                return np.zeros(shape, np.float32 if kind == "image" else np.uint8)
            handle = handle[tuple(ranges)]
        values = _read_array(handle, case, self.url)
        if kind == "label":
            return values
        return np.multiply(values, np.float32(1 / LEVELS), dtype=np.float32)

    def locations(self, case: str) -> dict[int, Int[np.ndarray, "n 3"]]:
        """Returns label id -> int32 voxels [n, 3] of that label, at most `MAX_LOCATIONS` of each.

        They were drawn at random when the case was written, and are always the same.
        """
        table = _read_array(self._array(case, "locations"), case, self.url)
        return {int(label): table[table[:, 0] == label, 1:] for label in np.unique(table[:, 0])}

    def verify(self, cases: Iterable[str] | None = None) -> list[tuple[str, str]]:
        """Compares what is stored with its checksums, byte for byte.

        Returns:
            (case, problem) for each case that is damaged; none for a sound store.
        """
        problems = []
        for case in self.cases if cases is None else cases:
            try:
                record = _read_record(self._values, self.url, check_case_id(case))
                sums = _checksums(self._values, record)
            except (CaseError, ValueError) as error:
                problems.append((case, f"cannot be read: {error}"))
                continue
            damaged = [name for name in _ARRAYS if sums[name] != record["checksum"][name]]
            if damaged:
                problems.append((case, f"{' and '.join(damaged)} differ from the checksum"))
        return problems

    def _array(self, case: str, kind: str) -> ts.TensorStore:
        key = (case, kind)
        with self._lock:
            handle = self._arrays.get(key)
        if handle is None:
            values = self._values / f"cases/{case}/{self.record(case)['token']}/{kind}/"
            spec = {"driver": "zarr3", "kvstore": values.spec(), "recheck_cached_data": False}
            try:
                handle = ts.open(spec, open=True, read=True, context=READING).result()
            except ValueError as error:
                raise explain(self.url, error) or _damaged(case, error) from error
            with self._lock:
                handle = self._arrays.setdefault(key, handle)
        return handle


def open_store(url: str | os.PathLike) -> Store:
    """Opens a store for reading.

    Args:
        url: a path, or a file://, gs://, s3:// or memory:// URL.

    Raises:
        UserError: there is no store, or it is of another version.
    """
    return Store(url)


# ---------------------------------------------------------------------------- writing


def check_store(url: str | os.PathLike, settings: Mapping[str, Any]) -> bool:
    """Says whether there is a store, which must be one of these settings.

    Raises:
        UserError: the store there was made with other settings (they are named).
    """
    with clear_errors(url):
        found = open_values(str(url)).read("store.json").result()
    if found.state != "value":
        return False
    differ = _differences(
        _parse_settings(str(url), found.value), json.loads(canonical_json(settings))
    )
    if differ:
        raise UserError(
            f"{url}: the store was made with other settings ({'; '.join(differ)}). Give the"
            " same settings, or another folder for the new store"
        )
    return True


def create_store(url: str | os.PathLike, settings: Mapping[str, Any]) -> Store:
    """Opens a store for cases of these settings, and makes it if there is none.

    Args:
        url: see `open_store`.
        settings: how the cases are prepared.

    Raises:
        UserError: the store there was made with other settings, or there is no space for one.
    """
    if not check_store(url, settings):
        text = canonical_json({"version": VERSION, "settings": settings})
        try:
            open_values(str(url)).write("store.json", text).result()
        except Exception as error:
            if not is_full(error):
                raise explain(url, error) or error from error
            raise UserError(
                f"{url}: no space left to make a store. Free some, or give another folder"
            ) from error
    return Store(url)


def write_case(
    url: str | os.PathLike,
    case: str,
    image: Float[np.ndarray, "x y z"],
    label: UInt8[np.ndarray, "x y z"],
    spacing: Sequence[float],
    meta: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes one case, or replaces it, as a whole or not at all.

    Args:
        url: the store; made if it is not there.
        case: id, safe as a folder's name.
        image: float [x, y, z] in [0, 1], RAS+.
        label: uint8 [x, y, z], ids of `anatomy`.
        spacing: voxel size (x, y, z), mm.
        meta: what the record holds besides: patient, site, source, original, source_hash,
            synthetic. Patient is the case and site the source where they are not given.
        settings: the store's; None takes those that it has, or none for a new one.

    Returns:
        The record, as `Store.record` gives it.

    Raises:
        CaseError: image or label do not suit, or the case cannot be written; nothing of it stays.
        UserError: the id is unusable, or the store was made with other settings.
    """
    check_case_id(case)
    image, label = np.asarray(image), np.asarray(label)
    check_volumes(case, image, label, spacing)
    root = open_values(str(url))
    if settings is not None or root.read("store.json").result().state != "value":
        create_store(url, settings or {})
    token = uuid.uuid4().hex[:12]
    prefix = f"cases/{case}/{token}/"
    try:
        levels = np.multiply(image, np.float32(LEVELS), dtype=np.float32)
        _write_array(root, f"{prefix}image/", np.rint(levels, out=levels).astype(np.uint16))
        del levels
        _write_array(root, f"{prefix}label/", label)
        _write_array(root, f"{prefix}locations/", draw_locations(case, label))
        record = _make_record(case, label, spacing, meta or {}, token)
        record["checksum"] = _checksums(root, record)
        record["checksum"]["record"] = _record_checksum(record)
        root.write(f"cases/{case}/case.json", canonical_json(record)).result()
    except BaseException as error:
        remove_keys(root, prefix)
        if is_full(error):
            raise CaseError(
                case,
                f"no space left in {url}, nothing of the case was kept",
                "Free some space and run again; what is finished stays",
            ) from error
        explained = explain(url, error)
        if explained is not None:
            raise explained from error
        raise
    # What an earlier or interrupted writing left.
    for key in list_keys(root, f"cases/{case}/"):
        if not key.startswith(prefix) and not key.endswith("/case.json"):
            root.write(key, None).result()
    return record


def remove_case(url: str | os.PathLike, case: str) -> None:
    """Takes a case out of a store; its record goes first, so it is gone at once or not at all."""
    root = open_values(str(url))
    root.write(f"cases/{check_case_id(case)}/case.json", None).result()
    remove_keys(root, f"cases/{case}/")


def _make_record(
    case: str,
    label: UInt8[np.ndarray, "x y z"],
    spacing: Sequence[float],
    meta: Mapping[str, Any],
    token: str,
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "case": case,
        "patient": case,
        "source": "",
        "original": None,
        "source_hash": {},
        "synthetic": None,
    }
    record |= {key: value for key, value in meta.items() if value is not None}
    record.setdefault("site", record["source"])
    record |= {
        "token": token,
        "shape": [int(n) for n in label.shape],
        "spacing": [float(s) for s in spacing],
        "labels": [anatomy.NAMES[number] for number in label_boxes(label)],
        "tumors": tumor_instances(label, spacing),
    }
    # As it will be read back: lists for tuples, text for keys.
    return json.loads(canonical_json(record))


# ---------------------------------------------------------------------------- arrays and values


def _write_array(root: ts.KvStore, prefix: str, values: np.ndarray) -> None:
    """Writes an array as one zarr3 shard; the last part of the prefix says what it is."""
    kind = prefix.split("/")[-2]
    codecs = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "blosc", "configuration": _COMPRESSION[kind]},
    ]
    if values.ndim == 3:
        inner = [min(CHUNK[kind], n) for n in values.shape]
    else:
        inner = [max(1, n) for n in values.shape]
    shard = [max(1, -(-n // c)) * c for n, c in zip(values.shape, inner, strict=True)]
    spec = {
        "driver": "zarr3",
        "kvstore": (root / prefix).spec(),
        "metadata": {
            "shape": list(values.shape),
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {"chunk_shape": inner, "codecs": codecs},
                }
            ],
        },
    }
    # Also opened: where the answer to making it was lost, the next try finds what the first made.
    array = ts.open(spec, create=True, open=True, context=WRITING).result()
    array.write(values).result()


def _read_array(handle: ts.TensorStore, case: str, url: str) -> np.ndarray:
    try:
        return handle.read().result()
    except (ValueError, OSError) as error:
        raise explain(url, error) or _damaged(case, error) from error


def _damaged(case: str, error: Exception) -> CaseError:
    return CaseError(
        case,
        f"its stored data is missing or damaged ({str(error).splitlines()[0][:200]})",
        "Run the preparation again on this case",
    )


def _record_checksum(record: Mapping[str, Any]) -> str:
    sums = {key: value for key, value in record["checksum"].items() if key != "record"}
    return hashlib.sha256(canonical_json({**record, "checksum": sums})).hexdigest()


def _checksums(root: ts.KvStore, record: Mapping[str, Any]) -> dict[str, str]:
    """Returns array -> SHA-256 over the names and bytes of all that is stored of it."""
    sums = {}
    for name in _ARRAYS:
        prefix = f"cases/{record['case']}/{record['token']}/{name}/"
        digest = hashlib.sha256()
        for key in list_keys(root, prefix):
            value = root.read(key).result().value
            digest.update(f"{key.removeprefix(prefix)}:{len(value)}:".encode())
            digest.update(value)
        sums[name] = digest.hexdigest()
    return sums


def _read_record(root: ts.KvStore, url: str, case: str) -> dict[str, Any]:
    with clear_errors(url):
        found = root.read(f"cases/{case}/case.json").result()
    if found.state != "value":
        raise CaseError(case, f"not in the store {url}", "Prepare it first")
    try:
        record = json.loads(found.value)
        sound = found.value == canonical_json(record) and record["case"] == case
        sound = sound and _record_checksum(record) == record["checksum"]["record"]
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise CaseError(
            case,
            f"its record case.json in {url} is damaged",
            "Run the preparation again on this case",
        )
    return record


def _parse_settings(url: str, text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
        version, settings = content["version"], content["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{url}: store.json is damaged. Prepare the store anew") from error
    if version != VERSION:
        raise UserError(
            f"{url}: the store has version {version}, expected {VERSION}. Prepare it anew"
        )
    return settings


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {json.dumps(there.get(key))} there and {json.dumps(wanted.get(key))} now"
        for key in sorted(set(there) | set(wanted))
        if there.get(key) != wanted.get(key)
    ]
