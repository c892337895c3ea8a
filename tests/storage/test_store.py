"""The store in buckets: what is written comes back, whatever the server does meanwhile."""

import numpy as np
import pytest

from tumorjax import volumes
from tumorjax.buckets import BucketPath
from tumorjax.errors import CaseError, UserError


@pytest.fixture
def scan(rng):
    image = rng.random((40, 36, 50), np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[10:20, 10:20, 10:20] = 2
    label[22:26, 22:26, 22:26] = 27
    return image, label


def test_a_case_comes_back(bucket, scan, tmp_path, rng):
    image, label = scan
    record = volumes.write_case(bucket, "a", image, label, (1, 1, 2), {"site": "x"})
    volumes.write_case(tmp_path, "a", image, label, (1, 1, 2), {"site": "x"})
    here, there = volumes.open_store(tmp_path), volumes.open_store(bucket)
    assert there.cases == ["a"]
    assert there.record("a") == record
    low = rng.integers(0, 20, 3)
    crop = tuple(slice(int(n), int(n) + 16) for n in low)
    for kind in ("image", "label"):
        np.testing.assert_array_equal(there.read("a", kind), here.read("a", kind))
        np.testing.assert_array_equal(there.read("a", kind, crop), here.read("a", kind)[crop])
    assert {k: v.tolist() for k, v in there.locations("a").items()} == {
        k: v.tolist() for k, v in here.locations("a").items()
    }
    assert there.verify() == []
    volumes.remove_case(bucket, "a")
    assert volumes.open_store(bucket).cases == []
    assert [path.name for path in BucketPath(bucket).rglob("*")] == ["store.json"]


def every_second(proxy):
    return [fault for kind in 2 * proxy.kinds for fault in (None, kind)]


def test_no_fault_loses_or_changes_anything(proxy, bucket, scan):
    image, label = scan
    # Every second request of the first ones, of writing and of reading.
    proxy.script = every_second(proxy)
    volumes.write_case(bucket, "a", image, label, (1, 1, 2))
    assert not proxy.script
    proxy.script = every_second(proxy)[:16]
    store = volumes.open_store(bucket)
    np.testing.assert_allclose(store.read("a", "image"), image, atol=0.5001 / volumes.LEVELS)
    np.testing.assert_array_equal(store.read("a", "label"), label)
    assert store.verify() == []
    assert not proxy.script
    assert min(proxy.count[kind] for kind in proxy.kinds) >= 3


def test_damage_is_found(bucket, scan):
    volumes.write_case(bucket, "a", *scan, (1, 1, 2))
    shard = next(path for path in BucketPath(bucket).rglob("0") if "/image/" in str(path))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    assert [case for case, _ in volumes.open_store(bucket).verify()] == ["a"]
    shard.unlink()
    assert [case for case, _ in volumes.open_store(bucket).verify()] == ["a"]


def test_a_store_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match=rf"{bucket}: no store"):
        volumes.open_store(bucket)
    volumes.create_store(bucket, {})
    with pytest.raises(CaseError, match="not in the store"):
        volumes.open_store(bucket).read("b", "image")
