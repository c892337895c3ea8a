"""Paths in buckets against servers that speak the protocols: the facts that jobs rely on."""

import os
import pickle
from pathlib import Path

import pytest

from tumorjax.buckets import BucketPath
from tumorjax.errors import UserError


@pytest.fixture
def folder(bucket):
    return BucketPath(bucket)


def fill(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


NAMES = ("config.json", "cells/a/cases.csv", "cells/a/steps/2/x", "cells/b+c/cases.csv", "%d .e")


def test_it_finds_what_a_local_folder_does(folder, tmp_path):
    fill(folder, NAMES)
    fill(tmp_path, NAMES)

    def names(root, paths):
        return sorted(path.relative_to(root).as_posix() for path in paths)

    for pattern in (
        "*",
        "cells/*",
        "cells/*/",
        "cells/*/cases.csv",
        "cells/a/steps/*",
        "*.e",
        "*.e",
    ):
        assert names(folder, folder.glob(pattern)) == names(tmp_path, tmp_path.glob(pattern))
    assert names(folder, folder.iterdir()) == names(tmp_path, tmp_path.iterdir())
    assert names(folder, folder.rglob("*.csv")) == names(tmp_path, tmp_path.rglob("*.csv"))
    for name in (*NAMES, "cells", "cells/a", "cells/a/cases", "conf", "nothing"):
        here, there = tmp_path / name, folder / name
        assert (there.is_file(), there.is_dir(), there.exists()) == (
            here.is_file(),
            here.is_dir(),
            here.exists(),
        )


def test_contents_come_back_byte_for_byte(folder, rng):
    for size in (0, 1, 3_000_000):
        data = rng.bytes(size)
        (folder / "x").write_bytes(data)
        assert (folder / "x").read_bytes() == data
        assert (folder / "x").is_file()
    (folder / "t").write_text("Größe, 1\n")
    with (folder / "t").open(newline="") as file:
        assert file.read() == "Größe, 1\n"
    version = (folder / "t").version()
    (folder / "t").write_text("2")
    assert (folder / "t").version() != version


def test_what_is_removed_is_gone(folder):
    fill(folder, NAMES)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        (folder / "config.json").read_bytes()
    with pytest.raises(FileNotFoundError):
        (folder / "config.json").unlink()
    (folder / "config.json").unlink(missing_ok=True)
    (folder / "cells" / "a").remove_below()
    assert [str(p.relative_to(folder)) for p in (folder / "cells").rglob("*")] == [
        "cells/b+c/cases.csv"
    ]


def test_lists_have_all_pages(folder, proxy):
    fill(folder, [f"many/real+{i:04d}" for i in range(230)])
    assert len(list((folder / "many").iterdir())) == 230


def test_it_is_never_taken_for_a_local_path():
    path = BucketPath("s3://bucket/study") / "x.json"
    assert str(path) == "s3://bucket/study/x.json"
    assert path.with_suffix(".csv").name == "x.csv"
    assert path.parent == BucketPath("s3://bucket/study/")
    assert pickle.loads(pickle.dumps(path)) == path
    for use in (os.fspath, Path, open):
        with pytest.raises(UserError, match=r"s3://bucket/study/x\.json.*on this machine"):
            use(path)
