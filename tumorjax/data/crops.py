"""Random crops from the store, as batches of numpy arrays, by Grain.

Batch i is a pure function of (seed, i): no state is carried from one to the next, so training
continues in mid-epoch from the number of steps alone, any number of threads gives the same
batches, and processes that share a job each make their own rows of the same global batch.
"""

import functools
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import grain.python as grain
import numpy as np
from jaxtyping import Float, Int, UInt8

from tumorjax import anatomy
from tumorjax.errors import UserError

Batch = dict[str, np.ndarray]
Voxel = tuple[int, int, int]

# What a stream of random numbers is for, so that no two uses share one.
_EPOCH, _CROP = 1, 2

# Cases whose foreground locations are kept: at 2,000 voxels a label some 100 kB each.
_KEPT_LOCATIONS = 256


class CropSource(Protocol):
    """What crops need of a `tumorjax.volumes.Store`."""

    def record(self, case: str) -> Mapping[str, Any]: ...

    def read(
        self,
        case: str,
        kind: Literal["image", "label"],
        slices: Sequence[slice] | None = None,
    ) -> np.ndarray: ...

    def locations(self, case: str) -> Mapping[int, Int[np.ndarray, "n 3"]]: ...


class Batches(Protocol):
    """Batches by their number, for a `CropLoader`."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Batch: ...


class CropLoader:
    """Endless iterator over batches; `step` is the number of the next one.

    Each batch is {"image": float32 [b, x, y, z, 1] in the store's [0, 1], "label": uint8
    [b, x, y, z] class indices of the task}, where b is this process's share of the batch; with
    `hosts` also "implant": bool [b], whether the crop is of one of these sources.
    """

    def __init__(self, batches: "Batches", start: int, threads: int, prefetch: int):
        dataset = grain.MapDataset.source(batches).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        )
        self._iterator = iter(dataset)
        self._step = 0
        self.set_state({"step": start})

    def __iter__(self) -> "CropLoader":
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._step += 1
        return batch

    @property
    def step(self) -> int:
        """The number of the batch that comes next."""
        return self._step

    def get_state(self) -> dict[str, int]:
        """Returns all that is needed to continue from here, for a checkpoint."""
        return {"step": self._step}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues from a state of `get_state`, of this or another loader of the same settings."""
        self._step = int(state["step"])
        self._iterator.set_state({"next_index": self._step})

    def close(self) -> None:
        """Ends the reading threads."""
        self._iterator.close()

    def __enter__(self) -> "CropLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def loader(
    sources: Sequence[tuple[CropSource, str]],
    classes: Mapping[str, Sequence[str]],
    patch_size: Sequence[int],
    batch_size: int,
    foreground: float = 1 / 3,
    seed: int = 0,
    *,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
    threads: int = 2,
    prefetch: int = 4,
    final_patch_size: Sequence[int] | None = None,
    foreground_classes: Sequence[str] | None = None,
    tumor_share: float | None = None,
    hosts: Collection[int] | None = None,
) -> CropLoader:
    """Returns an endless, reproducible stream of training batches.

    Cases come in shuffled passes, each case once a pass. In each batch the last
    `batch_size - round(batch_size * (1 - foreground))` crops (nnU-Net's rule: of two, the second)
    are centred on a random voxel of a random class that the case has; the others, and those of a
    case without any such class, lie anywhere.

    Args:
        sources: (store, case) pairs; real and synthetic cases may be mixed.
        classes: the task's classes (see `anatomy.class_table`).
        patch_size: voxels (x, y, z) to read. Larger than `final_patch_size` where augmentation
            rotates and scales first (see `augmentation.source_patch`).
        batch_size: crops in a batch of all processes together.
        foreground: share of the crops that are centred on foreground.
        seed: of the stream.
        start: number of the first batch.
        process_index: this process among those that share each batch.
        process_count: how many there are. Process p makes the p-th block of rows.
        rows: of each batch that this process makes, instead of that block; ascending.
        threads: that read batches ahead; 0 reads each when it is asked for.
        prefetch: batches held ready.
        final_patch_size: voxels that remain after augmentation; `patch_size` if None. Crops may
            hang over the volume's border by half of the difference, so that what remains of them
            reaches the border but does not cross it.
        foreground_classes: classes that crops are centred on; all of the task if None.
        tumor_share: chance that a centred crop is on one of the tumour classes where the case has
            a tumour and another class as well; None gives each class the same chance.
        hosts: positions in `sources` of scans that are to get synthetic tumours on the device; None
            where none are. A scan may be there twice, with and without.

    Raises:
        UserError: no sources, or a setting that does not fit.
    """
    patch = _patch(patch_size)
    final_patch = patch if final_patch_size is None else _patch(final_patch_size)
    if any(final > size for final, size in zip(final_patch, patch, strict=True)):
        raise UserError(f"final_patch_size {final_patch} is larger than patch_size {patch}")
    if not sources:
        raise UserError("there are no cases to train on. Check the store and the cohort's settings")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"training.batch_size is {batch_size}, expected a multiple of the {process_count}"
            " processes"
        )
    if not 0 <= foreground <= 1:
        raise UserError(f"the foreground share is {foreground}, expected 0 to 1")
    if tumor_share is not None and not 0 <= tumor_share <= 1:
        raise UserError(f"tumor_share is {tumor_share}, expected 0 to 1, or None")
    names = list(classes)
    if unknown := sorted(set(foreground_classes or ()) - set(names)):
        raise UserError(
            f"foreground_classes has {', '.join(unknown)}. The task's classes: {', '.join(names)}"
        )
    wanted = names if foreground_classes is None else foreground_classes
    batches = _Batches(
        sources=list(sources),
        table=anatomy.class_table(classes),
        centers=tuple(names.index(name) + 1 for name in wanted),
        tumors=frozenset(anatomy.tumor_classes(classes).values()),
        tumor_share=tumor_share,
        patch=patch,
        final_patch=final_patch,
        batch_size=batch_size,
        rows=range(
            process_index * batch_size // process_count,
            (process_index + 1) * batch_size // process_count,
        )
        if rows is None
        else tuple(rows),
        first_centered=round(batch_size * (1 - foreground)),
        seed=seed,
        hosts=None if hosts is None else frozenset(hosts),
    )
    return CropLoader(batches, start, threads, max(prefetch, threads))


def crop_range(
    shape: Sequence[int], patch_size: Sequence[int], final_patch_size: Sequence[int]
) -> list[tuple[int, int]]:
    """Returns, for each axis, the least and the largest corner of a crop that lies anywhere.

    nnU-Net's rule (nnUNetDataLoader.get_bbox): a crop may hang over by half of what augmentation
    cuts away, and a volume that is smaller than the patch lies inside it with the padding on both
    sides.

    Args:
        shape: of the volume, voxels.
        patch_size: of the crop, voxels.
        final_patch_size: of what augmentation leaves, voxels.
    """
    bounds = []
    for size, patch, final in zip(shape, patch_size, final_patch_size, strict=True):
        padding = max(patch - final, patch - size)
        # Both ends are rounded outwards: an odd voxel of padding goes to either side.
        bounds.append((-padding // 2, size + padding // 2 + padding % 2 - patch))
    return bounds


def read_crop(
    store: CropSource, case: str, corner: Sequence[int], image: np.ndarray, label: np.ndarray
) -> None:
    """Reads one crop into given arrays, which stay as they are outside the volume.

    Only the part that lies inside the volume is read from the store.

    Args:
        store: the case's store.
        case: its id.
        corner: the crop's lowest voxel (x, y, z) in the volume; may be negative.
        image: [x, y, z] to fill with intensities in [0, 1].
        label: [x, y, z] to fill with label ids.
    """
    inside, target = [], []
    for low, size, length in zip(corner, store.record(case)["shape"], image.shape, strict=True):
        first, last = max(0, low), min(size, low + length)
        if first >= last:
            return
        inside.append(slice(first, last))
        target.append(slice(first - low, last - low))
    image[tuple(target)] = store.read(case, "image", tuple(inside))
    label[tuple(target)] = store.read(case, "label", tuple(inside))


class _Batches:
    """Random access to this process's rows of each batch: Grain's data source."""

    def __init__(
        self,
        sources: list[tuple[CropSource, str]],
        table: UInt8[np.ndarray, "256"],
        centers: tuple[int, ...],
        tumors: frozenset[int],
        tumor_share: float | None,
        patch: Voxel,
        final_patch: Voxel,
        batch_size: int,
        rows: Sequence[int],
        first_centered: int,
        seed: int,
        hosts: frozenset[int] | None,
    ):
        self._hosts = hosts
        self._sources = sources
        self._table = table
        self._centers = centers
        self._tumors = tumors
        self._tumor_share = tumor_share
        self._patch = patch
        self._final_patch = final_patch
        self._batch_size = batch_size
        self._rows = rows
        self._first_centered = first_centered
        self._seed = seed
        self._pass_order = functools.lru_cache(maxsize=4)(self._pass_order_uncached)
        self._locations = functools.lru_cache(maxsize=_KEPT_LOCATIONS)(self._locations_uncached)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        rows = len(self._rows)
        # Outside the volume there is air (0 after clipping) and background.
        image: Float[np.ndarray, "b x y z 1"] = np.zeros((rows, *self._patch, 1), np.float32)
        label: UInt8[np.ndarray, "b x y z"] = np.zeros((rows, *self._patch), np.uint8)
        implant = np.zeros(rows, bool)
        for index, row in enumerate(self._rows):
            # A sample's number counts over all processes, so it does not depend on who makes it.
            sample = step * self._batch_size + row
            number = self._case(sample)
            store, case = self._sources[number]
            rng = np.random.default_rng([self._seed, _CROP, sample])
            corner = self._corner(number, row >= self._first_centered, rng)
            read_crop(store, case, corner, image[index, ..., 0], label[index])
            implant[index] = number in (self._hosts or ())
        batch = {"image": image, "label": self._table[label]}
        return batch if self._hosts is None else batch | {"implant": implant}

    def _case(self, sample: int) -> int:
        """Returns which source a sample is from: shuffled passes without replacement."""
        number, position = divmod(sample, len(self._sources))
        return int(self._pass_order(number)[position])

    def _pass_order_uncached(self, number: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, _EPOCH, number])
        return rng.permutation(len(self._sources))

    def _corner(self, number: int, centered: bool, rng: np.random.Generator) -> list[int]:
        store, case = self._sources[number]
        bounds = crop_range(store.record(case)["shape"], self._patch, self._final_patch)
        center = self._center(number, rng) if centered else None
        if center is None:
            return [int(rng.integers(low, high + 1)) for low, high in bounds]
        # As in nnU-Net a centred crop keeps to the lower bound only; beyond the upper border it is
        # padded, so that a lesion there is seen in the patch's middle.
        return [
            max(low, int(voxel) - size // 2)
            for (low, _), voxel, size in zip(bounds, center, self._patch, strict=True)
        ]

    def _center(self, number: int, rng: np.random.Generator) -> Int[np.ndarray, "3"] | None:
        """Draws a voxel: first a class of those that the case has, then one of its locations."""
        locations = self._locations(number)
        present = list(locations)
        if not present:
            return None
        tumors = [index for index in present if index in self._tumors]
        if self._tumor_share is not None and 0 < len(tumors) < len(present):
            on_tumor = rng.random() < self._tumor_share
            present = [index for index in present if (index in self._tumors) == on_tumor]
        voxels = locations[present[rng.integers(len(present))]]
        return voxels[rng.integers(len(voxels))]

    def _locations_uncached(self, number: int) -> dict[int, Int[np.ndarray, "n 3"]]:
        """Returns class index -> voxels. A class of several labels pools their locations."""
        store, case = self._sources[number]
        voxels: dict[int, list[np.ndarray]] = {}
        for label, found in sorted(store.locations(case).items()):
            index = int(self._table[label])
            if index in self._centers and len(found):
                voxels.setdefault(index, []).append(np.asarray(found))
        return {index: np.concatenate(parts) for index, parts in sorted(voxels.items())}


def _patch(patch_size: Sequence[int]) -> Voxel:
    patch = tuple(int(size) for size in patch_size)
    if len(patch) != 3 or min(patch) < 1:
        raise UserError(
            f"patch_size is {tuple(patch_size)}, expected three sizes (x, y, z) above 0"
        )
    return patch
