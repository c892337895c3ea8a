"""What prediction needs to know of a network, wherever it was trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, UInt8

from tumorjax.inference.native_grid import Structure
from tumorjax.nifti import Scan


class Prepared(NamedTuple):
    """A scan, and its image as the network wants it.

    Attributes:
        scan: as its file has it.
        shape: of the scan along the network's axes (RAS+ for networks trained here).
        image: at the network's spacing and in its units, along its axes.
        crop: the part of `shape` that the image is of.
    """

    scan: Scan
    shape: tuple[int, int, int]
    image: Float[np.ndarray, "x y z"]
    crop: tuple[slice, ...] = (slice(None), slice(None), slice(None))


class Network(NamedTuple):
    """A trained network with all that lies between a scan and its mask.

    Attributes:
        apply: x [b, *patch_size, 1] -> logits.
        patch_size: along the network's axes.
        window: further arguments of `sliding_window.predict`.
        structures: what its output tells apart.
        classes: its classes in the order of its output, without background, each with the labels of
            anatomy.py that it unites; none where nnU-Net's label has a name of its own.
        least_range: that a scan's values must span, see `nifti.check_values`.
        grid: equal for networks that see a scan on the same grid, in the same units, and whose
            answers are probabilities: those may be averaged there. Empty: as no other network.
        prepare: scan -> what the network sees.
        labels: (output of the sliding window, prepared) -> label map, axes as in the file.
        probabilities: (output of the sliding window, prepared, indices of classes, 0 for
            background) -> each one's probability on the scan's own grid, axes as in the file, one
            after the other.
        record: all else that the masks depend on, as JSON.
    """

    apply: jax.tree_util.Partial
    patch_size: tuple[int, int, int]
    window: dict[str, Any]
    structures: list[Structure]
    classes: Mapping[str, Sequence[str]]
    least_range: float
    grid: str
    prepare: Callable[[Scan], Prepared]
    labels: Callable[[Float[np.ndarray, "x y z classes"], Prepared], UInt8[np.ndarray, "i j k"]]
    probabilities: Callable[
        [Float[np.ndarray, "x y z classes"], Prepared, Sequence[int]],
        Iterator[Float32[np.ndarray, "i j k"]],
    ]
    record: dict[str, Any]
