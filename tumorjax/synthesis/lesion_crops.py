"""Crops around real tumours, one tumour each: what a synthesizer of tumours learns from.

Batch i is a pure function of (seed, i), as in `tumorjax.data.crops`.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from tumorjax import anatomy
from tumorjax.data.crops import Batch, CropLoader, CropSource, crop_range, read_crop
from tumorjax.errors import UserError
from tumorjax.metrics.components import label_components

# What a stream of random numbers is for, so that no two uses share one.
_DRAW, _PLACE = 11, 12


class Lesion(NamedTuple):
    """One real tumour.

    Attributes:
        store: that its scan is in.
        case: the scan.
        organ: host organ, as in `anatomy.HOST`.
        label: its label id.
        radius_mm: of the sphere of its volume.
        center: voxel (x, y, z).
    """

    store: CropSource
    case: str
    organ: str
    label: int
    radius_mm: float
    center: tuple[float, ...]


def find_lesions(sources: Sequence[tuple[CropSource, str]]) -> list[Lesion]:
    """Returns the tumours of scans, as the store's records have them.

    Args:
        sources: (store, case) of each scan.
    """
    lesions = []
    for store, case in sources:
        for tumor in store.record(case)["tumors"]:
            name = tumor["class"]
            center = tuple(float(value) for value in tumor["center"])
            radius = float(tumor["radius_mm"])
            label = anatomy.LABELS[name]
            lesions.append(Lesion(store, case, anatomy.HOST[name], label, radius, center))
    return lesions


def organs_of(lesions: Sequence[Lesion]) -> tuple[str, ...]:
    """Returns the host organs that there are tumours of, in the order of `anatomy.HOST`."""
    there = {lesion.organ for lesion in lesions}
    return tuple(organ for organ in anatomy.HOST.values() if organ in there)


def loader(
    lesions: Sequence[Lesion],
    organs: Sequence[str],
    crop: Sequence[int],
    batch_size: int,
    jitter: float,
    seed: int = 0,
    *,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    prefetch: int = 4,
) -> CropLoader:
    """Returns an endless, reproducible stream of batches.

    Each batch is {"image": float32 [b, x, y, z, 1] in the store's [0, 1], "mask": bool
    [b, x, y, z] of the tumour, "organ": int32 [b] (number in `organs`), "radius_mm": float32 [b]}.
    Organs are drawn evenly, then one of the organ's tumours. Other tumours that are near stay in
    the image and are not in the mask.

    Args:
        lesions: to draw from.
        organs: whose tumours are drawn.
        crop: voxels (x, y, z).
        batch_size: crops in a batch of all processes together.
        jitter: how far a tumour's centre may lie from the crop's, as a share of the crop's side.
        seed: of the stream.
        start: number of the first batch.
        process_index: this process among those that share each batch.
        process_count: how many there are. Process p makes the p-th block of rows.
        threads: that read batches ahead; 0 reads each when it is asked for.
        prefetch: batches held ready.

    Raises:
        UserError: an organ has no tumours, or a setting does not fit.
    """
    for organ in organs:
        if not any(lesion.organ == organ for lesion in lesions):
            raise UserError(f"there are no tumours of the {organ} to train on. Check data.organs")
    if not 0 <= jitter < 0.5:
        raise UserError(f"training.jitter is {jitter}. Expected 0 to less than 0.5")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"training.batch_size is {batch_size}, expected a multiple of the {process_count}"
            " processes"
        )
    rows = range(
        process_index * batch_size // process_count,
        (process_index + 1) * batch_size // process_count,
    )
    batches = _Batches(lesions, organs, crop, batch_size, rows, jitter, seed)
    return CropLoader(batches, start, threads, max(prefetch, threads))


def read_lesion(
    lesion: Lesion, corner: Sequence[int] | Int[np.ndarray, "3"], crop: Sequence[int]
) -> tuple[Float[np.ndarray, "x y z"], Bool[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"]]:
    """Reads the crop about a tumour that begins at `corner`.

    Returns:
        The image in [0, 1], the tumour's mask (one 26-connected component) and the labels.
    """
    image = np.zeros(tuple(crop), np.float32)
    label = np.zeros(tuple(crop), np.uint8)
    read_crop(lesion.store, lesion.case, [int(first) for first in corner], image, label)
    return image, _component(label == lesion.label, np.asarray(lesion.center) - corner), label


def corner_about(
    lesion: Lesion, crop: Sequence[int], shift: Int[np.ndarray, "3"]
) -> Int[np.ndarray, "3"]:
    """Returns the corner of the crop that has the tumour in its middle, or `shift` voxels beside.

    The crop stays inside the scan where that is large enough.
    """
    shape = lesion.store.record(lesion.case)["shape"]
    low, high = np.asarray(crop_range(shape, crop, crop)).T
    middle = np.rint(lesion.center).astype(int) - np.asarray(crop) // 2 + shift
    return np.clip(middle, low, high)


class _Batches:
    """Random access to this process's rows of each batch: Grain's data source."""

    def __init__(
        self,
        lesions: Sequence[Lesion],
        organs: Sequence[str],
        crop: Sequence[int],
        batch_size: int,
        rows: range,
        jitter: float,
        seed: int,
    ):
        self._by_organ = [
            [lesion for lesion in lesions if lesion.organ == organ] for organ in organs
        ]
        self._crop = tuple(int(size) for size in crop)
        self._batch_size = batch_size
        self._rows = rows
        self._jitter = jitter
        self._seed = seed

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        rows = len(self._rows)
        batch: dict[str, Any] = {
            "image": np.zeros((rows, *self._crop, 1), np.float32),
            "mask": np.zeros((rows, *self._crop), bool),
            "organ": np.zeros(rows, np.int32),
            "radius_mm": np.zeros(rows, np.float32),
        }
        for index, row in enumerate(self._rows):
            sample = step * self._batch_size + row
            rng = np.random.default_rng([self._seed, _DRAW, sample])
            organ = int(rng.integers(len(self._by_organ)))
            lesions = self._by_organ[organ]
            lesion = lesions[rng.integers(len(lesions))]
            image, mask, _ = read_lesion(lesion, self._corner(lesion, sample), self._crop)
            batch["image"][index, ..., 0] = image
            batch["mask"][index] = mask
            batch["organ"][index] = organ
            batch["radius_mm"][index] = lesion.radius_mm
        return batch

    def _corner(self, lesion: Lesion, sample: int) -> Int[np.ndarray, "3"]:
        rng = np.random.default_rng([self._seed, _PLACE, sample])
        reach = (np.asarray(self._crop) * self._jitter).astype(int)
        return corner_about(lesion, self._crop, rng.integers(-reach, reach + 1))


def _component(mask: Bool[np.ndarray, "x y z"], center: np.ndarray) -> Bool[np.ndarray, "x y z"]:
    """Returns the connected part that has the voxel nearest to `center`."""
    voxels = np.argwhere(mask)
    if not len(voxels):
        return mask
    nearest = voxels[np.argmin(((voxels - center) ** 2).sum(axis=1))]
    components, _ = label_components(mask)
    components = np.asarray(components)
    return components == components[tuple(nearest)]
