"""The class map is AbdomenAtlas 2.0's, and mirroring swaps exactly what has two sides."""

import numpy as np
import pytest

from tumorjax import anatomy
from tumorjax.errors import UserError

# The class map as AbdomenAtlas 2.0's public repository gives it.
CLASS_MAP = """1 aorta, 2 gall_bladder, 3 kidney_left, 4 kidney_right, 5 liver, 6 pancreas,
7 postcava, 8 spleen, 9 stomach, 10 adrenal_gland_left, 11 adrenal_gland_right, 12 bladder,
13 celiac_trunk, 14 colon, 15 duodenum, 16 esophagus, 17 femur_left, 18 femur_right,
19 hepatic_vessel, 20 intestine, 21 lung_left, 22 lung_right, 23 portal_vein_and_splenic_vein,
24 prostate, 25 rectum, 26 uterus, 27 liver_lesion, 28 pancreatic_lesion, 29 kidney_lesion,
30 colon_lesion, 31 endometrioma_tumor, 32 esophagus_tumor"""


def test_class_map():
    expected = {}
    for entry in CLASS_MAP.split(","):
        number, name = entry.split()
        expected[name] = int(number)
    assert expected == anatomy.LABELS
    assert len(anatomy.ORGANS) == 26
    assert len(anatomy.TUMORS) == 6
    assert all(anatomy.LABELS[name] == number for number, name in anatomy.NAMES.items())


def test_every_tumour_has_a_host_whose_labels_exist():
    assert set(anatomy.HOST) == set(anatomy.TUMORS)
    for tumor, organ in anatomy.HOST.items():
        assert set(anatomy.organ_labels(organ)) <= set(anatomy.ORGANS)
        assert anatomy.TUMOR_OF[organ] == tumor
    assert anatomy.organ_labels("kidney") == ("kidney_left", "kidney_right")
    with pytest.raises(UserError, match="'brain' is unknown"):
        anatomy.organ_labels("brain")


def test_pairs_are_all_labels_with_sides():
    sided = {name for name in anatomy.LABELS if name.endswith(("_left", "_right"))}
    assert {name for pair in anatomy.PAIRS for name in pair} == sided


def test_class_table_selects_and_unites():
    table = anatomy.class_table(
        {
            "kidney": ("kidney_left", "kidney_right"),
            "tumor": ("kidney_lesion", "liver_lesion"),
            "liver": ("liver",),
        }
    )
    assert table.shape == (256,)
    assert {name: table[number] for name, number in anatomy.LABELS.items() if table[number]} == {
        "kidney_left": 1, "kidney_right": 1, "kidney_lesion": 2, "liver_lesion": 2, "liver": 3
    }  # fmt: skip
    assert table[0] == 0


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"liver": ("livr",)}, "unknown label 'livr'"),
        ({"a": ("liver",), "b": ("spleen", "liver")}, "'liver' is in two task classes"),
    ],
)
def test_senseless_tasks_are_refused(classes, message):
    with pytest.raises(UserError, match=message):
        anatomy.class_table(classes)


def test_mirroring_swaps_sides_that_the_task_tells_apart():
    sided = {
        "kidney_right": ("kidney_right",),
        "liver": ("liver",),
        "lungs": ("lung_left", "lung_right"),
        "kidney_left": ("kidney_left",),
    }
    table = anatomy.mirror_table(sided)
    np.testing.assert_array_equal(table, [0, 4, 2, 3, 1])
    # Mirroring twice changes nothing.
    np.testing.assert_array_equal(table[table], np.arange(5))
    with pytest.raises(UserError, match="only one of kidney_left and kidney_right"):
        anatomy.mirror_table({"kidney": ("kidney_left",)})


def test_mirrored_labels_equal_labels_of_the_mirrored_class_map(rng):
    classes = {
        "femur_left": ("femur_left",),
        "femur_right": ("femur_right",),
        "kidney": ("kidney_left", "kidney_right"),
    }
    swap = np.arange(256)
    for left, right in anatomy.PAIRS:
        a, b = anatomy.LABELS[left], anatomy.LABELS[right]
        swap[[a, b]] = b, a
    labels = rng.integers(0, 33, 1000)
    to_class, mirrored = anatomy.class_table(classes), anatomy.mirror_table(classes)
    np.testing.assert_array_equal(mirrored[to_class[labels]], to_class[swap[labels]])


def test_tumour_classes_hold_nothing_but_tumours():
    classes = {"liver": ("liver", "liver_lesion"), "a": ("liver_lesion",), "b": ("colon_lesion",)}
    del classes["liver"]
    assert anatomy.tumor_classes({"liver": ("liver",), **classes}) == {"a": 2, "b": 3}
    assert anatomy.tumor_classes({"both": ("liver", "liver_lesion")}) == {}
