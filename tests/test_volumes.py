"""The store gives back what was written, reads little, finds damage, and is never half-written."""

import errno
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorstore as ts

from tumorjax import volumes
from tumorjax.errors import CaseError, UserError
from tumorjax.volumes import create_store, open_store, remove_case, tumor_instances, write_case

SPACING = (1.5, 1.5, 2.0)
SETTINGS = {"spacing": (1.5, 1.5, 2.0), "window": (-175, 250)}


@pytest.fixture
def case(rng):
    image = rng.random((70, 45, 50), dtype=np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[5:40, 5:40, 5:40] = 5
    label[10:14, 10:14, 10:14] = 27
    label[14, 14, 14] = 27  # touches by a corner: the same tumour
    label[30, 20, 20] = 27
    label[20:22, 30, 30] = 29
    return image, label


@pytest.fixture
def url(tmp_path):
    return tmp_path / "store with spaces%20 and ü"


# ------------------------------------------------------------------ what comes back


@pytest.mark.parametrize("where", ["path", "file", "memory"])
def test_a_case_comes_back_at_every_kind_of_url(where, case, tmp_path):
    image, label = case
    folder = tmp_path / "store"
    url = {"path": folder, "file": f"file://{folder}", "memory": f"memory://{tmp_path.name}/s"}
    write_case(url[where], "a1", image, label, SPACING, settings=SETTINGS)
    store = open_store(url[where])
    assert store.cases == ["a1"]
    assert store.settings == {"spacing": [1.5, 1.5, 2.0], "window": [-175, 250]}
    np.testing.assert_array_equal(store.read("a1", "label"), label)
    back = store.read("a1", "image")
    assert back.dtype == np.float32
    # Half a step of 1/4095: 0.052 HU of a window of 425 HU.
    assert np.abs(back - image).max() * 425 < 0.0520
    assert store.verify() == []
    if where != "memory":
        assert (folder / "cases" / "a1" / "case.json").is_file()


def test_ends_of_the_range_are_exact(case, url):
    image, label = case
    image[0], image[1] = 0, 1
    write_case(url, "a", image, label, SPACING)
    back = open_store(url).read("a", "image")
    assert (back[0] == 0).all()
    assert (back[1] == 1).all()
    # What was read is written again without a further error.
    write_case(url, "b", back, label, SPACING)
    np.testing.assert_array_equal(open_store(url).read("b", "image"), back)


def test_crops_follow_numpys_rules(case, url):
    image, label = case
    write_case(url, "a", np.asfortranarray(image), label[:, :, ::-1], SPACING)
    store = open_store(url)
    whole = store.read("a", "image")
    for crop in [
        (slice(3, 40), slice(None), slice(-7, None)),
        (slice(60, 200), slice(0, 1), slice(None, -20)),
        (slice(None, None, 3), slice(1, 9, 2), slice(4, 5)),
        (slice(50, 20), slice(0, 4), slice(0, 4)),
    ]:
        np.testing.assert_array_equal(store.read("a", "image", crop), whole[crop])
        np.testing.assert_array_equal(store.read("a", "label", crop), label[:, :, ::-1][crop])
    with pytest.raises(UserError, match="three slices"):
        store.read("a", "image", (slice(0, 3),))
    with pytest.raises(UserError, match="image or label"):
        store.read("a", "mask")


def test_a_crop_reads_only_its_chunks(rng, url):
    image = rng.random((160, 160, 160), dtype=np.float32)
    write_case(url, "a", image, np.ones(image.shape, np.uint8), SPACING)
    size = sum(path.stat().st_size for path in url.rglob("image/c/0/0/0"))
    store = open_store(url)
    store.read("a", "image", (slice(0, 1),) * 3)

    def bytes_read():
        metric = "/tensorstore/kvstore/file/bytes_read"
        return sum(
            value["value"]
            for found in ts.experimental_collect_matching_metrics(metric)
            for value in found["values"]
        )

    before = bytes_read()
    crop = (slice(64, 96), slice(96, 128), slice(40, 60))
    np.testing.assert_allclose(store.read("a", "image", crop), image[crop], atol=2e-4)
    # Two of 125 chunks.
    assert 0 < bytes_read() - before < 2.5 * size / 125


def test_stores_are_shared_by_threads_and_processes(case, url):
    image, label = case
    for name in "abc":
        write_case(url, name, image, label, SPACING)
    store = pickle.loads(pickle.dumps(open_store(url)))
    crops = [(name, k) for k in range(20) for name in "abc"]
    expected = open_store(url).read("a", "image")

    def same(item):
        name, k = item
        crop = (slice(k, k + 20), slice(k, k + 20), slice(k, k + 20))
        return np.array_equal(store.read(name, "image", crop), expected[crop])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, crops))


# ------------------------------------------------------------------ the record


def test_the_record_names_labels_and_tumours(case, url):
    image, label = case
    meta = {
        "patient": "p7",
        "source": "abdomen_atlas",
        "original": {"shape": (3, 4, 5)},
        "source_hash": {"ct.nii.gz": "ab"},
        "synthetic": {"from": "h1"},
    }
    written = write_case(url, "a", image, label, SPACING, meta)
    record = open_store(url).record("a")
    assert record == written
    assert record["patient"] == "p7"
    assert record["site"] == "abdomen_atlas"
    assert record["original"] == {"shape": [3, 4, 5]}
    assert record["shape"] == [70, 45, 50]
    assert record["spacing"] == [1.5, 1.5, 2.0]
    assert record["labels"] == ["liver", "liver_lesion", "kidney_lesion"]
    assert [(t["class"], t["voxels"]) for t in record["tumors"]] == [
        ("liver_lesion", 65),
        ("liver_lesion", 1),
        ("kidney_lesion", 2),
    ]
    plain = write_case(url, "b", image, label, SPACING)
    assert plain["patient"] == "b"
    assert plain["synthetic"] is None


def test_sizes_of_tumours_in_closed_form():
    label = np.zeros((40, 40, 40), np.uint8)
    label[4:14, 6:8, 9] = 28
    label[20:23, 20:24, 20:30] = 32
    spacing = (0.5, 2.0, 3.0)
    row, block = tumor_instances(label, spacing)
    assert row["volume_mm3"] == 10 * 2 * 3.0
    assert row["radius_mm"] == pytest.approx((60 * 3 / (4 * np.pi)) ** (1 / 3), abs=1e-3)
    assert row["center"] == [8.5, 6.5, 9.0]
    # Centres 9 x 0.5 mm and 1 x 2 mm apart, plus half a pixel at either end.
    assert row["longest_inplane_mm"] == pytest.approx(np.hypot(4.5, 2.0) + 1.25, abs=1e-3)
    assert block["class"] == "esophagus_tumor"
    assert block["voxels"] == 120


def test_locations_lie_in_their_label_and_are_always_the_same(case, url, tmp_path):
    image, label = case
    write_case(url, "a", image, label, SPACING)
    write_case(tmp_path / "other", "a", image, label, SPACING)
    found = open_store(url).locations("a")
    assert {number: len(voxels) for number, voxels in found.items()} == {5: 2000, 27: 66, 29: 2}
    for number, voxels in found.items():
        assert voxels.dtype == np.int32
        assert (label[tuple(voxels.T)] == number).all()
        assert len(np.unique(voxels, axis=0)) == len(voxels)
        np.testing.assert_array_equal(open_store(tmp_path / "other").locations("a")[number], voxels)
    # Spread over the organ, not a corner of it.
    np.testing.assert_allclose(found[5].mean(axis=0), np.argwhere(label == 5).mean(0), atol=1)


def test_a_case_without_any_label(rng, url):
    image = rng.random((5, 33, 4), dtype=np.float32)
    record = write_case(url, "a", image, np.zeros(image.shape, np.uint8), SPACING)
    store = open_store(url)
    assert record["labels"] == record["tumors"] == []
    assert store.locations("a") == {}
    assert not store.read("a", "label").any()
    assert store.verify() == []


# ------------------------------------------------------------------ damage


def test_a_flipped_byte_anywhere_is_found(case, url, rng):
    image, label = case
    for name in ("a", "b"):
        write_case(url, name, image, label, SPACING)
    files = sorted(path for path in (url / "cases" / "a").rglob("*") if path.is_file())
    assert len(files) == 7
    for path in files:
        sound = path.read_bytes()
        for place in {0, len(sound) - 1, *rng.integers(0, len(sound), 6).tolist()}:
            damaged = bytearray(sound)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            problems = open_store(url).verify()
            assert [case for case, _ in problems] == ["a"], (path, place)
        path.write_bytes(sound)
    assert open_store(url).verify() == []
    next(path for path in files if path.parts[-5:-3] == ("image", "c")).unlink()
    assert [case for case, _ in open_store(url).verify()] == ["a"]
    assert open_store(url).verify(["b"]) == []


@pytest.mark.parametrize("damage", ["index", "cut", "gone"])
def test_damaged_files_are_an_error_that_names_the_case(case, url, damage):
    image, label = case
    write_case(url, "a", image, label, SPACING)
    (path,) = url.rglob("image/c/0/0/0")
    data = bytearray(path.read_bytes())
    if damage == "index":
        data[-20] ^= 1
    elif damage == "cut":
        data = data[: len(data) // 2]
    path.write_bytes(data)
    if damage == "gone":
        (url / "cases" / "a" / open_store(url).record("a")["token"] / "image/zarr.json").unlink()
    with pytest.raises(CaseError, match=r"a: .*missing or damaged.*preparation again"):
        open_store(url).read("a", "image")


# ------------------------------------------------------------------ writing


def test_no_space_leaves_nothing_and_spares_the_old_case(case, url, monkeypatch):
    image, label = case
    old = write_case(url, "a", image, label, SPACING)
    write = volumes._write_array

    def full(root, prefix, values):
        if "label" in prefix:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(root, prefix, values)

    monkeypatch.setattr(volumes, "_write_array", full)
    for name in ("a", "b"):
        with pytest.raises(CaseError, match=rf"{name}: no space left.*Free some space"):
            write_case(url, name, 1 - image, label, SPACING)
    monkeypatch.undo()
    store = open_store(url)
    assert store.cases == ["a"]
    assert store.record("a") == old
    assert store.verify() == []
    assert [p for p in (url / "cases" / "b").rglob("*") if p.is_file()] == []
    assert len([p for p in (url / "cases" / "a").rglob("*") if p.is_file()]) == 7


def test_tensorstores_own_message_of_a_full_disk_is_understood(case, url, monkeypatch):
    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")

    monkeypatch.setattr(volumes, "_write_array", full)
    with pytest.raises(CaseError, match="no space left"):
        write_case(url, "a", *case, SPACING)


def test_killed_before_the_record_there_is_no_case_and_the_next_writing_clears_up(
    case, url, monkeypatch
):
    image, label = case

    def killed(*_):
        raise KeyboardInterrupt

    # What kill -9 leaves: arrays without a record, and nobody to remove them.
    monkeypatch.setattr(volumes, "_checksums", killed)
    monkeypatch.setattr(volumes, "remove_keys", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        write_case(url, "a", image, label, SPACING)
    monkeypatch.undo()
    assert list(url.rglob("image/c/0/0/0"))
    store = open_store(url)
    assert store.cases == []
    with pytest.raises(CaseError, match="not in the store"):
        store.read("a", "image")
    write_case(url, "a", image, label, SPACING)
    assert len(list(url.rglob("image/c/0/0/0"))) == 1
    assert store.cases == ["a"]


def test_a_case_is_replaced_and_removed_as_a_whole(case, url):
    image, label = case
    write_case(url, "a", image, label, SPACING)
    write_case(url, "a", 1 - image, label, SPACING)
    store = open_store(url)
    np.testing.assert_allclose(store.read("a", "image"), 1 - image, atol=2e-4)
    assert len([p for p in url.rglob("*") if p.is_file()]) == 8
    remove_case(url, "a")
    assert open_store(url).cases == []
    assert [p.name for p in url.rglob("*") if p.is_file()] == ["store.json"]


def test_other_settings_are_named(case, url):
    write_case(url, "a", *case, SPACING, settings=SETTINGS)
    create_store(url, SETTINGS)
    write_case(url, "b", *case, SPACING)
    with pytest.raises(UserError) as error:
        create_store(url, {**SETTINGS, "spacing": [1.0, 1.0, 1.0], "order": 3})
    assert "order is null there and 3 now" in str(error.value)
    assert "spacing is [1.5, 1.5, 2.0] there and [1.0, 1.0, 1.0] now" in str(error.value)
    assert "window" not in str(error.value)
    assert "another folder" in str(error.value)


def test_what_is_no_store_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no store \(store.json is missing\)"):
        open_store(tmp_path)
    with pytest.raises(UserError, match="not a path or a URL"):
        open_store("gopher://x/y")
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_store(tmp_path)
    (tmp_path / "store.json").write_text('{"version": 99, "settings": {}}')
    with pytest.raises(UserError, match="version 99"):
        open_store(tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 200, "a\n"])
def test_ids_that_lead_elsewhere_are_refused(name, case, url):
    with pytest.raises(UserError, match="case id"):
        write_case(url, name, *case, SPACING)
    assert not url.exists()
    write_case(url, "a", *case, SPACING)
    with pytest.raises(UserError, match="case id"):
        open_store(url).record(name)


def test_volumes_that_do_not_suit_are_refused(case, url):
    image, label = case
    bad = {
        "expected 0 to 1": (image * 100, label),
        "nan": (np.where(image > 0.5, np.nan, image), label),
        "label .*45, 50": (image[1:], label),
        "expected uint8": (image, label.astype(np.int32)),
        "up to 32": (image, label + np.uint8(10)),
    }
    for words, (bad_image, bad_label) in bad.items():
        with pytest.raises(CaseError, match=words):
            write_case(url, "a", bad_image, bad_label, SPACING)
    with pytest.raises(CaseError, match="spacing"):
        write_case(url, "a", image, label, (1, 0, 1))
    assert not url.exists()
