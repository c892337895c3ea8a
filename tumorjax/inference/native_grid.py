"""From a network's probabilities to labels on a scan's own grid.

Class by class, with a running best: no more than one class is ever held at the scan's resolution,
and each only where it may win. (Holding classes x voxels is what exhausts memory elsewhere:
nnU-Net's issues 1128, 2014, 2912.)
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num, UInt8

from tumorjax.anatomy import LABELS, PAIRS, class_table
from tumorjax.geometry import axis_matrix


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
    probabilities: Float[np.ndarray, "x y z classes+1"],
    image: Float[np.ndarray, "x y z"],
    shape: tuple[int, int, int],
    table: Sequence[Structure],
) -> UInt8[np.ndarray, "x2 y2 z2"]:
    """Returns the label map on another grid of the same extent.

    Args:
        probabilities: of background and the task's classes.
        image: that they are of, [0, 1], to find the middle of the body in.
        shape: of the grid wanted.
        table: what the output tells apart.

    Returns:
        The most probable class of each voxel, after linear interpolation of the probabilities,
        as the values of `table`.
    """
    winner = argmax_on_grid(probabilities, shape)
    left, right = np.zeros((2, 256), np.uint8)
    for structure in table:
        if structure.side != "right":
            left[structure.class_index] = structure.value
        if structure.side != "left":
            right[structure.class_index] = structure.value
    # x runs from the patient's left to the right.
    middle = round(body_middle(image) * shape[0])
    return np.concatenate([left[winner[:middle]], right[winner[middle:]]])


def argmax_on_grid(
    probabilities: Float[np.ndarray, "x y z classes"], shape: tuple[int, int, int]
) -> UInt8[np.ndarray, "x2 y2 z2"]:
    """Returns the most probable class on another grid of the same extent.

    Probabilities are interpolated linearly (averaged along axes that shrink), one class at a time
    and only in the box where it may win: the best of n probabilities is at least 1/n, and
    interpolation stays between the values it lies between. Outside all boxes is background.
    """
    classes = probabilities.shape[-1]
    matrices = [
        axis_matrix(old, new, 1) for old, new in zip(probabilities.shape[:3], shape, strict=True)
    ]
    boxes = {}
    for index in range(1, classes):
        may_win = probabilities[..., index] > 0.999 / classes
        if may_win.any():
            boxes[index] = [
                _reached(matrix, may_win.any(axis=others))
                for matrix, others in zip(matrices, ((1, 2), (0, 2), (0, 1)), strict=True)
            ]
    winner = np.zeros(shape, np.uint8)
    if not boxes:
        return winner
    union = [
        slice(min(side.start for side in sides), max(side.stop for side in sides))
        for sides in zip(*boxes.values(), strict=True)
    ]
    best = np.zeros(shape, np.float32)
    best[tuple(union)] = _interpolated(probabilities[..., 0], matrices, union)
    for index, box in boxes.items():
        where = tuple(box)
        one = _interpolated(probabilities[..., index], matrices, box)
        better = one > best[where]
        winner[where][better] = index
        np.copyto(best[where], one, where=better)
    return winner


def _reached(matrix: Float[np.ndarray, "new old"], used: Bool[np.ndarray, "old"]) -> slice:
    """Returns the range of new voxels that have weight from some used old one."""
    rows = np.flatnonzero(matrix[:, used].any(axis=1))
    return slice(int(rows[0]), int(rows[-1]) + 1)


def _interpolated(
    values: Float[np.ndarray, "x y z"],
    matrices: Sequence[Float[np.ndarray, "new old"]],
    box: Sequence[slice],
) -> Float[np.ndarray, "x2 y2 z2"]:
    """Returns one box of a volume on the new grid."""
    parts = []
    for matrix, side in zip(matrices, box, strict=True):
        columns = np.flatnonzero(matrix[side].any(axis=0))
        parts.append((slice(int(columns[0]), int(columns[-1]) + 1), side))
    values = values[tuple(old for old, _ in parts)]
    # Axes that shrink most go first: less is left for the others.
    for axis in sorted(
        range(3), key=lambda axis: matrices[axis].shape[0] / matrices[axis].shape[1]
    ):
        old, new = parts[axis]
        values = np.moveaxis(np.tensordot(matrices[axis][new, old], values, (1, axis)), 0, axis)
    return values


def body_middle(image: Num[np.ndarray, "x y z"]) -> float:
    """Returns where half of the body lies on either side, as a share of the x axis.

    Args:
        image: [0, 1]; the body is what is above 0 (air).
    """
    across = np.cumsum(np.count_nonzero(image > 0, axis=(1, 2)))
    if across[-1] == 0:
        return 0.5
    return (int(np.searchsorted(across, across[-1] / 2)) + 0.5) / len(across)
