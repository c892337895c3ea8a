"""Checkpoints in a bucket: written on this machine by Orbax, then put there as a whole.

    checkpoints/STEP/TOKEN/...         the files of one save
    checkpoints/STEP/complete.json     written last: the TOKEN, and each file's size and CRC32C

Orbax itself knows gs:// (with further Google packages) but not s3://, and needs to rename folders,
which buckets cannot. So it works in a folder of this machine. A save counts when its record is in
the bucket; until then the one before stays. What was cut off or is damaged is passed over.
"""

import json
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
import jax

from tumorjax.buckets import BucketPath
from tumorjax.errors import UserError
from tumorjax.files import replacing_folder, scratch, write_json_atomic

RECORD = "complete.json"
# Files that travel at once.
_WAYS = 8


class Mirror:
    """The checkpoints of one training in a bucket, and their copy on this machine.

    Attributes:
        local: folder of the copy, in `files.scratch()`. It is removed by `close`.
    """

    def __init__(self, remote: BucketPath, keep: int):
        self.remote, self.keep = remote, keep
        # Named after where it belongs, since messages of checkpoints name it.
        name = str(remote).replace("://", "-").replace("/", "-")[-100:]
        self.local = Path(tempfile.mkdtemp(dir=scratch(), prefix=f"{name}-"))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._upload: Future[None] | None = None
        try:
            self._fetch()
        except BaseException:
            self.close()
            raise

    def _fetch(self) -> None:
        """Brings the newest complete saves here, as many as are kept."""
        here = 0
        for step in sorted(_steps(self.remote), reverse=True):
            if here < self.keep and _fetch_step(self.remote / str(step), self.local / str(step)):
                here += 1

    def put(self, step: int, saving: Callable[[], bool]) -> None:
        """Puts a save into the bucket, in the background, as soon as Orbax has finished it.

        Args:
            step: whose save has begun.
            saving: says whether a save is still under way.
        """
        self.wait()
        self._upload = self._pool.submit(self._put, step, saving)

    def _put(self, step: int, saving: Callable[[], bool]) -> None:
        folder = self.local / str(step)
        while saving():
            time.sleep(0.02)
        if not folder.is_dir():
            return  # The save failed; Orbax says why to those who wait for it.
        _put_step(folder, self.remote / str(step))
        complete = _steps(self.remote)
        kept = sorted(complete)[-self.keep :]
        # Also what a process that was killed left of a save.
        there = {path.name for path in self.remote.iterdir() if path.name.isdigit()}
        for old in sorted(int(name) for name in there if int(name) not in kept):
            # The record first: without it there is no such save.
            (self.remote / str(old) / RECORD).unlink(missing_ok=True)
            (self.remote / str(old)).remove_below()

    def wait(self) -> None:
        """Waits until what was saved is in the bucket; raises what went wrong."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def close(self) -> None:
        """Waits, and removes the copy."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            shutil.rmtree(self.local, ignore_errors=True)


def open_mirror(
    folder: Path, keep: int, write: bool, owners: Collection[int] | None
) -> Mirror | None:
    """Returns the mirror of a training's checkpoints; None where they lie on a disk.

    Args:
        folder: of the checkpoints.
        keep: how many.
        write: to train.
        owners: processes whose training it is; None for all.

    Raises:
        UserError: several processes would each write a part.
    """
    if not isinstance(folder, BucketPath):
        return None
    several = jax.process_count() if owners is None else len(owners)
    if write and several > 1:
        raise UserError(
            f"{folder}: {several} processes share this training, and each would write a part of its"
            " checkpoints. In a bucket a training's devices have to be those of one process: let"
            " mesh.data, mesh.fsdp and mesh.space fit into one, or give a --workdir that all"
            " machines see as a folder"
        )
    return Mirror(folder, keep)


def copy_training(source: Path, place: Path, without: Collection[str] = ()) -> None:
    """Copies a training's folder with its checkpoints, from a disk or bucket to a disk or bucket.

    Args:
        source: the folder; trainings in folders of it are copied with their checkpoints too.
        place: gets its files, config.json last.
        without: what on its top stays behind.
    """
    from_bucket, to_bucket = isinstance(source, BucketPath), isinstance(place, BucketPath)
    steps: dict[PurePosixPath, None] = {}
    with replacing_folder(place) as folder:
        for path in source.rglob("*"):
            name = PurePosixPath(str(path.relative_to(source)))
            if name.parts[0] in without or not (from_bucket or path.is_file()):
                continue
            if "checkpoints" in name.parts and from_bucket != to_bucket:
                # The two keep them in different forms.
                depth = name.parts.index("checkpoints") + 2
                if len(name.parts) > depth and name.parts[depth - 1].isdigit():
                    steps[PurePosixPath(*name.parts[:depth])] = None
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        for step in steps:
            if isinstance(source, BucketPath):
                _fetch_step(source / step, folder / step)
            elif isinstance(place, BucketPath):
                _put_step(source / step, folder / step)


def _put_step(folder: Path, place: Path | BucketPath) -> None:
    """Puts one save into a bucket, in the form that it has there, its record last."""
    token = uuid.uuid4().hex[:12]
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def send(path: Path) -> tuple[str, list[int]]:
        data, name = path.read_bytes(), path.relative_to(folder).as_posix()
        target = place / token / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return name, [len(data), google_crc32c.value(data)]

    with ThreadPoolExecutor(_WAYS) as ways:
        sent = dict(ways.map(send, files))
    write_json_atomic(place / RECORD, {"token": token, "files": sent})
    for path in place.rglob("*"):
        # Of a save of the same step before, or one that was cut off.
        old = path.name != RECORD and not str(path).startswith(f"{place / token}")
        if old:
            path.unlink(missing_ok=True)


def _steps(remote: BucketPath) -> list[int]:
    records = remote.glob(f"*/{RECORD}")
    return [int(path.parent.name) for path in records if path.parent.name.isdigit()]


def _fetch_step(remote: BucketPath, local: Path) -> bool:
    """Brings one save here; says so, and says no, if it is damaged."""
    try:
        record: dict[str, Any] = json.loads((remote / RECORD).read_text())
        files: dict[str, list[int]] = record["files"]

        def bring(name: str) -> None:
            data = (remote / record["token"] / name).read_bytes()
            if [len(data), google_crc32c.value(data)] != files[name]:
                raise ValueError(f"{name} has {len(data)} bytes of another content")
            path = local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        with ThreadPoolExecutor(_WAYS) as ways:
            list(ways.map(bring, files))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        logging.getLogger(__name__).warning("%s is damaged and passed over: %s", remote, error)
        shutil.rmtree(local, ignore_errors=True)
        return False
    return True
