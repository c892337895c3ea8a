"""What prediction needs to know of a network, wherever it was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

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
    """A trained network with all that lies between a scan's file and its mask.

    Attributes:
        apply: x [b, *patch_size, 1] -> logits.
        patch_size: along the network's axes.
        window: further arguments of `sliding_window.predict`.
        structures: what its output tells apart.
        prepare: scan file -> what the network sees.
        labels: (output of the sliding window, prepared) -> label map, axes as in the file.
        record: all else that the masks depend on, as JSON.
    """

    apply: jax.tree_util.Partial
    patch_size: tuple[int, int, int]
    window: dict[str, Any]
    structures: list[Structure]
    prepare: Callable[[Path], Prepared]
    labels: Callable[[Float[np.ndarray, "x y z classes"], Prepared], UInt8[np.ndarray, "i j k"]]
    record: dict[str, Any]
