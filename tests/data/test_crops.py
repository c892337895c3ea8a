"""Crops: where they lie, that they hold what the store holds, and that runs can be repeated."""

import threading
from collections import Counter
from itertools import islice

import nibabel
import numpy as np
import pytest

from tumorjax import anatomy, volumes
from tumorjax.data import crops
from tumorjax.errors import UserError

CLASSES = {
    "liver": ("liver",),
    "kidney": ("kidney_left", "kidney_right"),
    "liver_lesion": ("liver_lesion",),
}
PATCH = (16, 12, 8)


class MemoryStore:
    """A store's reading side over arrays, which counts the voxels that are read."""

    def __init__(self, cases: dict[str, tuple[np.ndarray, np.ndarray]]):
        self.cases = cases
        self.voxels_read = 0
        self.lock = threading.Lock()

    def record(self, case):
        return {"shape": list(self.cases[case][0].shape)}

    def read(self, case, kind, slices=None):
        part = self.cases[case][("image", "label").index(kind)][slices]
        with self.lock:
            self.voxels_read += part.size
        return part

    def locations(self, case):
        label = self.cases[case][1]
        return {
            int(i): np.argwhere(label == i).astype(np.int32)[:2000] for i in np.unique(label) if i
        }


def make_store(seed: int = 0, shapes=((40, 36, 30), (33, 41, 28), (20, 12, 9), (50, 30, 24))):
    rng = np.random.default_rng(seed)
    cases = {}
    for number, shape in enumerate(shapes):
        label = np.zeros(shape, np.uint8)
        for name, chance in (("liver", 0.2), ("kidney_left", 0.02), ("spleen", 0.1)):
            label[rng.random(shape) < chance] = anatomy.LABELS[name]
        if number != 1:
            label[rng.random(shape) < 0.004] = anatomy.LABELS["liver_lesion"]
        # Never 0 inside, so that padding can be told from the volume.
        cases[f"case{number}"] = (rng.uniform(0.1, 1, shape).astype(np.float32), label)
    return MemoryStore(cases)


def make_loader(store, **settings):
    settings = {
        "patch_size": PATCH, "batch_size": 3, "foreground": 1 / 3, "seed": 5, "threads": 0
    } | settings  # fmt: skip
    return crops.loader([(store, case) for case in store.cases], CLASSES, **settings)


def same(one, other) -> bool:
    return all(np.array_equal(one[key], other[key]) for key in ("image", "label"))


def find(store, image) -> tuple[str, np.ndarray]:
    """Returns the case that a crop is from and its corner, by the crop's intensities."""
    inside = np.argwhere(image > 0)
    voxel = inside[len(inside) // 2]
    for case, (volume, _) in store.cases.items():
        hits = np.argwhere(volume == image[tuple(voxel)])
        for hit in hits:
            corner = hit - voxel
            slices = tuple(
                slice(max(0, c), min(s, c + n))
                for c, s, n in zip(corner, volume.shape, image.shape, strict=True)
            )
            part, held = volume[slices], image[image > 0]
            if part.size == held.size and np.array_equal(part.ravel(), held):
                return case, corner
    raise AssertionError("the crop is from nowhere")


def test_a_batch_holds_what_the_store_holds():
    store = make_store()
    table = anatomy.class_table(CLASSES)
    with make_loader(store) as loader:
        for batch in islice(loader, 20):
            assert batch["image"].shape == (3, *PATCH, 1)
            assert batch["image"].dtype == np.float32
            assert batch["label"].shape == (3, *PATCH)
            assert batch["label"].dtype == np.uint8
            for image, label in zip(batch["image"][..., 0], batch["label"], strict=True):
                case, corner = find(store, image)
                padded = np.pad(store.cases[case][1], 40)
                expected = padded[
                    tuple(slice(c + 40, c + 40 + n) for c, n in zip(corner, PATCH, strict=True))
                ]
                np.testing.assert_array_equal(label, table[expected])


def test_only_the_crop_is_read():
    store = make_store(shapes=((64, 64, 64),) * 2)
    with make_loader(store, batch_size=1, foreground=0.0) as loader:
        next(loader)
    assert store.voxels_read == 2 * np.prod(PATCH)


@pytest.mark.parametrize(
    ("batch_size", "share", "centered"),
    [(2, 1 / 3, [1]), (3, 1 / 3, [2]), (6, 1 / 3, [4, 5]), (4, 0.5, [2, 3]), (2, 0, []),
     (2, 1, [0, 1])],
)  # fmt: skip
def test_the_last_of_each_batch_are_centred_on_foreground(batch_size, share, centered):
    """nnU-Net: not sample_idx < round(batch_size * (1 - oversample_foreground_percent))."""
    assert centered == [i for i in range(batch_size) if not i < round(batch_size * (1 - share))]
    # One foreground voxel in a large volume, which chance does not put into the middle.
    label = np.zeros((60, 60, 60), np.uint8)
    label[30, 30, 30] = anatomy.LABELS["liver_lesion"]
    image = np.random.default_rng(0).uniform(0.1, 1, label.shape).astype(np.float32)
    store = MemoryStore({"case": (image, label)})
    with make_loader(store, batch_size=batch_size, foreground=share) as loader:
        for batch in islice(loader, 10):
            middle = batch["label"][:, 8, 6, 4]
            assert [i for i in range(batch_size) if middle[i]] == centered


def middle_classes(loader, batches: int) -> Counter:
    middles: Counter = Counter()
    for batch in islice(loader, batches):
        middles.update(batch["label"][:, 8, 6, 4].tolist())
    return middles


def interior_store() -> MemoryStore:
    """Labels far from the border, so that a crop's middle voxel is the one that was drawn."""
    rng = np.random.default_rng(3)
    label = np.zeros((60, 60, 60), np.uint8)
    inner = label[20:40, 20:40, 20:40]
    draw = rng.random(inner.shape)
    for name, low, high in (
        ("liver", 0, 0.5), ("kidney_left", 0.5, 0.55), ("spleen", 0.55, 0.8),
        ("liver_lesion", 0.8, 0.81),
    ):  # fmt: skip
        inner[(draw >= low) & (draw < high)] = anatomy.LABELS[name]
    return MemoryStore({"case": (rng.uniform(0.1, 1, label.shape).astype(np.float32), label)})


def test_classes_are_drawn_evenly_however_large_they_are():
    with make_loader(interior_store(), foreground=1.0) as loader:
        middles = middle_classes(loader, 400)
    assert set(middles) == {1, 2, 3}  # the spleen is no class of the task
    for count in middles.values():
        assert count / 1200 == pytest.approx(1 / 3, abs=0.06)  # 4.4 standard deviations


def test_tumours_can_have_a_larger_share():
    with make_loader(interior_store(), foreground=1.0, tumor_share=0.7) as loader:
        middles = middle_classes(loader, 400)
    assert middles[3] / 1200 == pytest.approx(0.7, abs=0.06)
    assert middles[1] / 1200 == pytest.approx(0.15, abs=0.05)


def test_foreground_can_be_the_tumour_alone():
    settings = {"foreground": 1.0, "foreground_classes": ("liver_lesion",)}
    with make_loader(interior_store(), **settings) as loader:
        assert set(middle_classes(loader, 50)) == {3}


def test_a_case_without_foreground_gives_crops_anywhere():
    rng = np.random.default_rng(0)
    image = rng.uniform(0.1, 1, (60, 50, 40)).astype(np.float32)
    store = MemoryStore({"case": (image, np.zeros(image.shape, np.uint8))})
    with make_loader(store, foreground=1.0) as loader:
        corners = [find(store, b["image"][0, ..., 0])[1] for b in islice(loader, 30)]
    assert np.ptp(np.array(corners), axis=0).min() > 15


def test_each_case_comes_once_a_pass_and_passes_differ():
    store = make_store(shapes=((20, 20, 20),) * 7)
    with make_loader(store, batch_size=1) as loader:
        order = [find(store, b["image"][0, ..., 0])[0] for b in islice(loader, 28)]
    passes = [tuple(order[i : i + 7]) for i in range(0, 28, 7)]
    assert all(len(set(one)) == 7 for one in passes)
    assert len(set(passes)) > 1


@pytest.mark.parametrize("start", [1, 5, 13])
def test_a_stream_continues_from_any_step(start):
    store = make_store()
    with make_loader(store) as loader:
        whole = list(islice(loader, 20))
    with make_loader(store, start=start, threads=3) as loader:
        assert loader.step == start
        rest = list(islice(loader, 20 - start))
        assert loader.step == 20
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))
        loader.set_state({"step": start})
        assert loader.get_state() == {"step": start}
        assert same(next(loader), whole[start])
    assert not same(whole[0], whole[1])


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_do_not_change_the_stream(threads):
    store = make_store()
    with make_loader(store) as alone, make_loader(store, threads=threads) as together:
        assert all(same(next(alone), next(together)) for _ in range(30))


def test_rows_of_hosts_are_marked_also_where_a_scan_is_there_twice():
    store = make_store()
    names = list(store.cases)
    sources = [(store, case) for case in (*names, names[0], names[0])]
    settings = {"foreground": 0.5, "patch_size": (8, 8, 8), "batch_size": 2, "seed": 3}
    hosts = range(len(names), len(sources))
    with (
        crops.loader(sources, CLASSES, **settings, hosts=hosts) as loader,
        crops.loader(sources, CLASSES, **settings) as plain,
    ):
        marked, of_scan = [], []
        for _ in range(3 * len(sources)):
            batch, same_batch = next(loader), next(plain)
            assert "implant" not in same_batch
            np.testing.assert_array_equal(batch["image"], same_batch["image"])
            marked += list(batch["implant"])
            of_scan += [find(store, image[..., 0])[0] for image in batch["image"]]
    # Each source comes six times: two of them are hosts, and one more source is the same scan.
    assert sum(marked) == 12
    assert {case for case, mark in zip(of_scan, marked, strict=True) if mark} == {names[0]}
    assert sum(case == names[0] for case in of_scan) == 18


def test_seeds_give_different_streams():
    store = make_store()
    with make_loader(store, seed=1) as one, make_loader(store, seed=2) as other:
        assert not same(next(one), next(other))


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_together_make_the_same_batch(process_count):
    store = make_store()
    settings = {"batch_size": 6, "foreground": 0.5}
    parts = [
        make_loader(store, process_index=p, process_count=process_count, **settings)
        for p in range(process_count)
    ]
    with make_loader(store, **settings) as whole:
        for _ in range(8):
            rows = [next(part) for part in parts]
            joined = {k: np.concatenate([r[k] for r in rows]) for k in ("image", "label")}
            assert same(next(whole), joined)
    for part in parts:
        part.close()


def test_a_patch_larger_than_the_volume_is_padded_with_air():
    shape = (9, 7, 20)
    image = np.random.default_rng(0).uniform(0.1, 1, shape).astype(np.float32)
    label = np.full(shape, anatomy.LABELS["liver"], np.uint8)
    store = MemoryStore({"case": (image, label)})
    with make_loader(store, patch_size=(16, 12, 8), foreground=0.0) as loader:
        for batch in islice(loader, 10):
            for crop, classes in zip(batch["image"][..., 0], batch["label"], strict=True):
                assert (crop > 0).sum() == 9 * 7 * 8
                np.testing.assert_array_equal(classes, crop > 0)
                # Padding of 7 along x is 4 and 3 or 3 and 4; of 5 along y 3 and 2 or 2 and 3.
                first = np.argwhere(crop > 0)[0]
                assert first[0] in (3, 4)
                assert first[1] in (2, 3)


def nnunet_bounds(data_shape, patch_size, final_patch_size):
    """nnU-Net 2.8.1, nnUNetDataLoader.get_bbox, with its own variable names."""
    need_to_pad = (np.array(patch_size) - np.array(final_patch_size)).astype(int)
    dim = len(data_shape)
    for d in range(dim):
        if need_to_pad[d] + data_shape[d] < patch_size[d]:
            need_to_pad[d] = patch_size[d] - data_shape[d]
    lbs = [-need_to_pad[i] // 2 for i in range(dim)]
    ubs = [
        data_shape[i] + need_to_pad[i] // 2 + need_to_pad[i] % 2 - patch_size[i] for i in range(dim)
    ]
    return list(zip(lbs, ubs, strict=True))


def test_crops_lie_where_nnunet_puts_them(rng):
    for _ in range(200):
        shape = rng.integers(5, 60, 3)
        final = rng.integers(4, 30, 3)
        patch = final + rng.integers(0, 12, 3)
        assert crops.crop_range(shape, patch, final) == nnunet_bounds(shape, patch, final)


def test_corners_reach_both_ends_of_their_range_and_no_further():
    store = make_store(shapes=((21, 22, 23),))
    settings = {"patch_size": (18, 17, 16), "final_patch_size": (15, 15, 15), "foreground": 0.0}
    with make_loader(store, **settings) as loader:
        corners = np.array(
            [find(store, crop)[1] for b in islice(loader, 80) for crop in b["image"][..., 0]]
        )
    bounds = np.array(nnunet_bounds((21, 22, 23), (18, 17, 16), (15, 15, 15)))
    np.testing.assert_array_equal(corners.min(0), bounds[:, 0])
    np.testing.assert_array_equal(corners.max(0), bounds[:, 1])


def test_a_lesion_at_the_border_is_in_the_middle_above_and_in_reach_below():
    shape = (40, 40, 40)
    image = np.random.default_rng(0).uniform(0.1, 1, shape).astype(np.float32)
    for voxel, corner in (((39, 39, 39), (31, 33, 35)), ((0, 0, 0), (0, 0, 0))):
        label = np.zeros(shape, np.uint8)
        label[voxel] = anatomy.LABELS["liver_lesion"]
        store = MemoryStore({"case": (image, label)})
        with make_loader(store, foreground=1.0, batch_size=1) as loader:
            assert tuple(find(store, next(loader)["image"][0, ..., 0])[1]) == corner


def test_real_and_synthetic_cases_mix():
    real, synthetic = make_store(0), make_store(1)
    sources = [(real, "case0"), (synthetic, "case0"), (synthetic, "case3")]
    with crops.loader(sources, CLASSES, PATCH, 3, threads=0) as loader:
        batch = next(loader)
    origins = []
    for crop in batch["image"][..., 0]:
        for name, store in (("real", real), ("synthetic", synthetic)):
            try:
                origins.append((name, find(store, crop)[0]))
            except AssertionError:
                continue
    assert sorted(origins) == [("real", "case0"), ("synthetic", "case0"), ("synthetic", "case3")]


def test_closing_ends_the_threads():
    before = threading.active_count()
    loader = make_loader(make_store(), threads=4)
    next(loader)
    assert threading.active_count() > before
    loader.close()
    loader.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=10)
    assert threading.active_count() <= before
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_an_unreadable_case_is_an_error_not_a_hang():
    class Broken(MemoryStore):
        def read(self, case, kind, slices=None):
            raise OSError(f"{case}: chunk is missing")

    broken = Broken(make_store().cases)
    with make_loader(broken, threads=2) as loader, pytest.raises(OSError, match="chunk is missing"):
        next(loader)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3, "process_count": 2}, "batch_size is 3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"foreground": 1.5}, "foreground share is 1.5"),
        ({"patch_size": (16, 16)}, "patch_size"),
        ({"patch_size": (16, 16, 0)}, "patch_size"),
        ({"final_patch_size": (20, 12, 8)}, "larger than patch_size"),
        ({"foreground_classes": ("spleen",)}, "spleen.*liver, kidney, liver_lesion"),
        ({"tumor_share": 2.0}, "tumor_share"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make_loader(make_store(), **settings)


def test_no_cases_is_an_error():
    with pytest.raises(UserError, match="no cases to train on"):
        crops.loader([], CLASSES, PATCH, 2)


@pytest.fixture
def store(tmp_path, rng):
    """Two cases on disk."""
    for number in range(2):
        label = np.zeros((40, 36, 33), np.uint8)
        label[10:30, 8:28, 9:25] = anatomy.LABELS["liver"]
        label[14:17, 12:15, 12:14] = anatomy.LABELS["liver_lesion"]
        image = rng.uniform(0.1, 1, label.shape).astype(np.float32)
        volumes.write_case(tmp_path / "store", f"case{number}", image, label, (1.5, 1.5, 1.5))
    return volumes.open_store(tmp_path / "store")


@pytest.mark.parametrize("threads", [0, 2])
def test_crops_of_a_store_on_disk(store, threads):
    whole = MemoryStore(
        {case: (store.read(case, "image"), store.read(case, "label")) for case in store.cases}
    )
    table = anatomy.class_table(CLASSES)
    settings = {"foreground": 2 / 3, "foreground_classes": ("liver_lesion",), "threads": threads}
    with make_loader(store, **settings) as loader:
        for batch in islice(loader, 8):
            assert (batch["label"][1:, 8, 6, 4] == 3).all()
            for image, label in zip(batch["image"][..., 0], batch["label"], strict=True):
                case, corner = find(whole, image)
                slices = tuple(slice(c, c + n) for c, n in zip(corner, PATCH, strict=True))
                if min(corner) >= 0 and (corner + PATCH <= whole.cases[case][0].shape).all():
                    np.testing.assert_array_equal(label, table[whole.cases[case][1][slices]])


def test_crops_of_a_real_scan(tmp_path, real_data):
    scan = nibabel.load(real_data / "totalsegmentator" / "example_ct_sm.nii.gz")
    organs = np.asarray(nibabel.load(real_data / "totalsegmentator" / "example_seg.nii.gz").dataobj)
    label = np.zeros(organs.shape, np.uint8)
    for number, name in {5: "liver", 2: "kidney_right", 3: "kidney_left"}.items():
        label[organs == number] = anatomy.LABELS[name]
    image = (np.clip(scan.get_fdata(dtype=np.float32), -175, 250) + 175) / 425
    volumes.write_case(tmp_path, "real", image, label, (3.0, 3.0, 3.0))
    sources = [(volumes.open_store(tmp_path), "real")]
    # Taller than the scan's 30 slices.
    with crops.loader(sources, CLASSES, (32, 32, 40), 2, foreground=0.5, seed=1) as loader:
        batches = list(islice(loader, 60))
    for batch in batches:
        padding = batch["image"][0, :, :, :5, 0]
        assert (padding == 0).all()
        assert not batch["label"][0, :, :, :5].any()
    # The organs are an eighth of the scan, and more of the crops that are centred on them.
    share = np.mean([(batch["label"] > 0).mean((1, 2, 3)) for batch in batches], axis=0)
    assert share[1] > 1.5 * share[0]
    assert {int(c) for batch in batches for c in np.unique(batch["label"])} == {0, 1, 2}
