"""From a network's scores to labels and probabilities on a scan's own grid.

No class is ever held at the scan's resolution: see `class_scores`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Num, UInt8

from tumorjax.anatomy import LABELS, PAIRS, class_table
from tumorjax.geometry import axis_matrix
from tumorjax.inference.class_scores import best_classes, class_probabilities


class Structure(NamedTuple):
    """One value of the output.

    Attributes:
        name: of the label, or of the task's class where that unites several.
        value: in a label map.
        class_index: of the class in the network's output.
        side: "left" or "right" where the class unites both sides of a pair, else "".
    """

    name: str
    value: int
    class_index: int
    side: str


def structures(classes: Mapping[str, Sequence[str]]) -> list[Structure]:
    """Returns what the output tells apart, for a task's classes.

    A class of one label has that label's name and id. A class that unites the two sides of a pair
    (kidney) becomes both again, by the side of the body's middle that a voxel lies on. Any other
    union keeps the class's name and takes the id of its first label.

    Raises:
        UserError: a label is unknown or in two classes.
    """
    class_table(classes)
    table = []
    for index, (name, labels) in enumerate(classes.items(), start=1):
        pair = next((pair for pair in PAIRS if set(pair) == set(labels)), None)
        if pair:
            left, right = pair
            table.append(Structure(left, LABELS[left], index, "left"))
            table.append(Structure(right, LABELS[right], index, "right"))
        else:
            alone = len(labels) == 1
            table.append(Structure(labels[0] if alone else name, LABELS[labels[0]], index, ""))
    return table


def native_labels(
    scores: Float[np.ndarray, "x y z classes+1"],
    image: Float[np.ndarray, "x y z"],
    shape: tuple[int, int, int],
    table: Sequence[Structure],
) -> UInt8[np.ndarray, "x2 y2 z2"]:
    """Returns the label map on another grid of the same extent.

    Args:
        scores: logits or probabilities of background and the task's classes.
        image: that they are of, [0, 1], to find the middle of the body in.
        shape: of the grid wanted.
        table: what the output tells apart.

    Returns:
        The class of the highest score of each voxel, after linear interpolation of the scores,
        as the values of `table`.
    """
    labels = argmax_on_grid(scores, shape)
    left, right = values_by_side(table)
    # x runs from the patient's left to the right.
    middle = round(body_middle(image) * shape[0])
    for part, values in ((labels[:middle], left), (labels[middle:], right)):
        for plane in part:
            plane[...] = values[plane]
    return labels


def values_by_side(table: Sequence[Structure]) -> UInt8[np.ndarray, "2 256"]:
    """Returns the value of each class index in the left half of a body, and in the right one."""
    left, right = values = np.zeros((2, 256), np.uint8)
    for structure in table:
        if structure.side != "right":
            left[structure.class_index] = structure.value
        if structure.side != "left":
            right[structure.class_index] = structure.value
    return values


def argmax_on_grid(
    scores: Float[np.ndarray, "x y z classes"], shape: tuple[int, int, int]
) -> UInt8[np.ndarray, "x2 y2 z2"]:
    """Returns the class of the highest score on another grid of the same extent.

    The same as `geometry.resample_to_shape` of every class with order 1 (linear, averaging along
    axes that shrink) and then argmax, without the memory.

    Args:
        scores: logits or probabilities.
        shape: of the grid wanted.
    """
    return best_classes(scores, _matrices(scores, shape))


def native_probabilities(
    scores: Float[np.ndarray, "x y z classes"],
    shape: tuple[int, int, int],
    classes: Sequence[int],
    logits: bool = False,
) -> Iterator[tuple[slice, Float16[np.ndarray, "chosen rows y2 z2"]]]:
    """Yields the probabilities of chosen classes on another grid of the same extent, in slabs.

    Args:
        scores: probabilities, which are interpolated linearly; or
        logits: the scores are logits: they are interpolated, then made probabilities.
        shape: of the grid wanted.
        classes: those wanted, as indices into the scores.

    Yields:
        The slab's place along x, in order, and its probabilities.
    """
    return class_probabilities(scores, _matrices(scores, shape), classes, softmax=logits)


def _matrices(
    scores: Float[np.ndarray, "x y z classes"], shape: Sequence[int]
) -> list[Float[np.ndarray, "new old"]]:
    return [axis_matrix(old, new, 1) for old, new in zip(scores.shape[:3], shape, strict=True)]


def body_middle(image: Num[np.ndarray, "x y z"]) -> float:
    """Returns where half of the body lies on either side, as a share of the x axis.

    Args:
        image: [0, 1]; the body is what is above 0 (air).
    """
    across = np.cumsum(np.count_nonzero(image > 0, axis=(1, 2)))
    if across[-1] == 0:
        return 0.5
    return (int(np.searchsorted(across, across[-1] / 2)) + 0.5) / len(across)
