"""Records of whom a network has seen."""

import numpy as np
import pytest

from tumorjax.synthesis import leakage
from tumorjax.volumes import open_store, write_case


@pytest.fixture
def store(tmp_path, rng):
    url = tmp_path / "store"
    images = [rng.random((9, 8, 7), np.float32) for _ in range(3)]
    label = np.zeros((9, 8, 7), np.uint8)
    label[2:5, 2:5, 2:5] = 5
    # scan_2 is a second scan of the first patient, copy the third's image under another name.
    for case, patient, image in (
        ("scan_1", "ann", images[0]),
        ("scan_2", "ann", images[1]),
        ("scan_3", "bob", images[2]),
        ("copy", "cam", images[2]),
    ):
        write_case(url, case, image, label, (4.0, 4.0, 4.0), {"patient": patient}, {})
    return open_store(url)


def _records(store):
    return {case: store.record(case) for case in store.cases}


def test_a_record_names_patients_and_images_once(store):
    record = leakage.record_of([(store, case) for case in store.cases])
    assert len(set(record["patients"])) == 3
    assert not any(name in str(record) for name in ("ann", "bob", "cam"))
    assert len(record["images"]) == 3
    assert record["scans"] == 4


def test_other_scans_of_a_patient_count_as_seen(store):
    seen = leakage.record_of([(store, "scan_1")])
    assert leakage.overlap(seen, _records(store)) == ["scan_1", "scan_2"]


def test_an_image_is_known_under_another_name(store):
    seen = leakage.record_of([(store, "scan_3")])
    assert leakage.overlap(seen, _records(store)) == ["copy", "scan_3"]


def test_strangers_are_no_overlap(store):
    seen = leakage.record_of([(store, "scan_3")])
    others = {case: store.record(case) for case in ("scan_1", "scan_2")}
    assert leakage.overlap(seen, others) == []


def test_the_union_has_seen_what_either_has(store):
    parts = [leakage.record_of([(store, case)]) for case in ("scan_1", "scan_3", "copy")]
    whole = leakage.union(parts)
    assert len(whole["patients"]) == 3
    assert leakage.overlap(whole, _records(store)) == sorted(store.cases)
