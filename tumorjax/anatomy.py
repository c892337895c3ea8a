"""The structures of AbdomenAtlas 2.0: 26 organs and 6 tumours, their ids, hosts and sides.

Labels on disk are these ids. A task (say pancreas: organ and lesion) is a selection of them that
is made when crops are read; see `class_table`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from tumorjax.errors import UserError

ORGANS: dict[str, int] = {
    "aorta": 1,
    "gall_bladder": 2,
    "kidney_left": 3,
    "kidney_right": 4,
    "liver": 5,
    "pancreas": 6,
    "postcava": 7,
    "spleen": 8,
    "stomach": 9,
    "adrenal_gland_left": 10,
    "adrenal_gland_right": 11,
    "bladder": 12,
    "celiac_trunk": 13,
    "colon": 14,
    "duodenum": 15,
    "esophagus": 16,
    "femur_left": 17,
    "femur_right": 18,
    "hepatic_vessel": 19,
    "intestine": 20,
    "lung_left": 21,
    "lung_right": 22,
    "portal_vein_and_splenic_vein": 23,
    "prostate": 24,
    "rectum": 25,
    "uterus": 26,
}
TUMORS: dict[str, int] = {
    "liver_lesion": 27,
    "pancreatic_lesion": 28,
    "kidney_lesion": 29,
    "colon_lesion": 30,
    "endometrioma_tumor": 31,
    "esophagus_tumor": 32,
}
LABELS: dict[str, int] = ORGANS | TUMORS
NAMES: dict[int, str] = {number: name for name, number in LABELS.items()}

HOST: dict[str, str] = {
    "liver_lesion": "liver",
    "pancreatic_lesion": "pancreas",
    "kidney_lesion": "kidney",
    "colon_lesion": "colon",
    "endometrioma_tumor": "uterus",
    "esophagus_tumor": "esophagus",
}
TUMOR_OF: dict[str, str] = {organ: tumor for tumor, organ in HOST.items()}

# Structures that lie inside an organ and hide it in a label map: to tumours they are the organ.
INSIDE: dict[str, tuple[str, ...]] = {"liver": ("hepatic_vessel",)}

PAIRS: tuple[tuple[str, str], ...] = (
    ("kidney_left", "kidney_right"),
    ("adrenal_gland_left", "adrenal_gland_right"),
    ("femur_left", "femur_right"),
    ("lung_left", "lung_right"),
)


def organ_labels(organ: str) -> tuple[str, ...]:
    """Returns the label names that make up an organ: both kidneys for "kidney".

    Raises:
        UserError: the organ is not one of `ORGANS` nor a paired organ's common name.
    """
    if organ in ORGANS:
        return (organ,)
    for left, right in PAIRS:
        if left.removesuffix("_left") == organ:
            return (left, right)
    raise UserError(f"organ {organ!r} is unknown. Expected one of {', '.join(ORGANS)}, or kidney")


def class_table(classes: Mapping[str, Sequence[str]]) -> UInt8[np.ndarray, "256"]:
    """Returns the table that turns label ids into a task's class indices.

    Args:
        classes: class name -> names of the labels that it unites, in order; the first class gets
            index 1. Labels in no class become background (0).

    Raises:
        UserError: a label name is unknown or used twice.
    """
    table = np.zeros(256, np.uint8)
    for index, (name, labels) in enumerate(classes.items(), start=1):
        for label in labels:
            if label not in LABELS:
                raise UserError(
                    f"task class {name!r} has the unknown label {label!r}."
                    f" Expected some of {', '.join(LABELS)}"
                )
            if table[LABELS[label]]:
                raise UserError(f"label {label!r} is in two task classes. Keep it in one")
            table[LABELS[label]] = index
    return table


def mirror_table(classes: Mapping[str, Sequence[str]]) -> UInt8[np.ndarray, "classes+1"]:
    """Returns the class index that each class becomes when a volume is mirrored across x.

    Left and right organs swap where the task tells them apart, and stay where it unites them.

    Raises:
        UserError: one side has a class of its own and the other has none, so that a mirrored
            volume would have no true label.
    """
    table = class_table(classes)
    mirrored = np.arange(len(classes) + 1, dtype=np.uint8)
    for left, right in PAIRS:
        left_class, right_class = table[LABELS[left]], table[LABELS[right]]
        if left_class == right_class:
            continue
        if 0 in (left_class, right_class):
            raise UserError(
                f"the task has only one of {left} and {right}, so volumes cannot be mirrored"
                " across x. Add the other side, or leave axis 0 out of augmentation.mirror_axes"
                " and inference.mirror_axes"
            )
        mirrored[left_class], mirrored[right_class] = right_class, left_class
    return mirrored


def tumor_classes(classes: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Returns the task's classes that consist of tumours, with their indices."""
    return {
        name: index
        for index, (name, labels) in enumerate(classes.items(), start=1)
        if labels and all(label in TUMORS for label in labels)
    }
