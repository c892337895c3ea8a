"""Single tumours out of stores and folders of scans, with what realism compares of them.

A `Source` reads cases one by one: from a store, or from the folder that the synthesis job wrote,
whose scans are brought to a store's grid and window first.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from tumorjax import anatomy, volumes
from tumorjax.errors import CaseError, UserError
from tumorjax.geometry import prepare_image, resample_to_shape, spacing_of, to_canonical
from tumorjax.metrics.components import label_components
from tumorjax.nifti import ENDINGS, check_hu, read_ct
from tumorjax.synthesis.shape_measures import Measures, measure

# Regions by distance from the tumour's voxels, mm: beyond 0 to RIM is the rim, to SURROUNDINGS
# the surroundings. Other tumours belong to neither.
RIM_MM = 5.0
SURROUNDINGS_MM = 15.0
REGIONS = ("lesion", "rim", "surroundings")
# Texture is the magnitude of the gradient, HU/mm, in bins of this width from 0; beyond the last
# bin counts as the last.
TEXTURE_EDGES = np.linspace(0, 60, 41)
HU_BINS = 50
# Side of the pictures in the contact sheet, mm.
PICTURE_MM = 80.0


class Case(NamedTuple):
    """A case as it is read: HU, labels (ids of `anatomy`), spacing, and whose it is."""

    name: str
    patient: str
    image: Float[np.ndarray, "x y z"]
    label: UInt8[np.ndarray, "x y z"]
    spacing: tuple[float, float, float]
    tumors: tuple[str, ...]


class Source(NamedTuple):
    """Where cases come from.

    Attributes:
        cases: their ids.
        read: reads one; raises a CaseError where it cannot be used.
        version: case -> text that changes with what is stored of it.
        settings: spacing (mm), window (HU) and order of the resampling.
    """

    cases: list[str]
    read: Callable[[str], Case]
    version: Callable[[str], str]
    settings: dict[str, Any]


class Tumor(NamedTuple):
    """One tumour.

    Attributes:
        case, patient, kind: whose, and which tumour of `anatomy.TUMORS`.
        number: of its kind in the case, from 1, the largest first.
        synthetic: whether it was made.
        measures: of its mask.
        intensities: `FEATURES` of `realism_features`, name -> value.
        hu, texture: histogram of each of `REGIONS`, each sums to 1; empty regions are all 0.
        picture: HU of the axial slice through its middle, `PICTURE_MM` wide.
        outline: the tumours' mask there.
        pixel: (x, y) of that slice, mm.
        encoded: what a network's encoder says of it; empty without one.
    """

    case: str
    patient: str
    kind: str
    number: int
    synthetic: bool
    measures: Measures
    intensities: dict[str, float]
    hu: Float[np.ndarray, "3 bins"]
    texture: Float[np.ndarray, "3 bins"]
    picture: Float[np.ndarray, "x y"]
    outline: Bool[np.ndarray, "x y"]
    pixel: tuple[float, float]
    encoded: Float[np.ndarray, " channels"]


def open_store(store: str | Path | volumes.Store, cases: Sequence[str] | None = None) -> Source:
    """Returns the cases of a store as a source.

    Args:
        store: open, or where it lies.
        cases: which; None for all that have tumours.

    Raises:
        UserError: there is no store.
    """
    opened = store if isinstance(store, volumes.Store) else volumes.open_store(store)
    window = tuple(opened.settings.get("window", (-175.0, 250.0)))
    low, high = float(window[0]), float(window[1])

    def read(case: str) -> Case:
        record = opened.record(case)
        image = opened.read(case, "image") * np.float32(high - low) + np.float32(low)
        x, y, z = record["spacing"]
        made = record.get("synthetic") or {}
        # A synthetic scan may hold its patient's own tumours of other kinds.
        kinds = (made["tumor"],) if "tumor" in made else tuple(anatomy.TUMORS)
        label = opened.read(case, "label")
        return Case(case, str(record["patient"]), image, np.asarray(label), (x, y, z), kinds)

    if cases is None:
        cases = [case for case in opened.cases if _has_tumors(opened, case)]
    settings = {"window": (low, high), "spacing": opened.settings.get("spacing")}
    settings["order"] = opened.settings.get("order", 3)
    return Source(list(cases), read, lambda case: _checksum(opened, case), settings)


def _checksum(store: volumes.Store, case: str) -> str:
    try:
        sums = store.record(case)["checksum"]
    except CaseError:
        return "damaged"
    return f"{sums['image']} {sums['label']}"


def _has_tumors(store: volumes.Store, case: str) -> bool:
    try:
        return bool(store.record(case)["tumors"])
    except CaseError:
        return True  # It is read later, and set aside then with its reason.


def open_folder(folder: str | Path, settings: dict[str, Any]) -> Source:
    """Returns the scans that the synthesis job wrote as a source.

    Args:
        folder: CASE/ct.nii.gz, CASE/segmentations/TUMOUR.nii.gz and CASE/synthesis.json.
        settings: spacing, window and order that the scans are brought to: those of the real store.

    Raises:
        UserError: there is no such folder, or no case in it.
    """
    folder = Path(folder)
    cases = sorted(path.parent.name for path in folder.glob("*/synthesis.json"))
    if not cases:
        raise UserError(
            f"{folder}: neither a store (store.json) nor scans of the synthesis job"
            " (CASE/synthesis.json). Give one of them as config.data.synthetic"
        )

    def version(case: str) -> str:
        try:
            about = (folder / case / "synthesis.json").stat()
        except OSError:
            return "missing"
        return f"{about.st_size} {about.st_mtime_ns}"

    return Source(cases, lambda case: _read_scan(folder / case, settings), version, settings)


def _read_scan(folder: Path, settings: dict[str, Any]) -> Case:
    case = folder.name
    try:
        request = json.loads((folder / "synthesis.json").read_text())["request"]
        kind = str(request["tumor"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CaseError(case, "synthesis.json is damaged", "Make the case again") from error
    if kind not in anatomy.TUMORS:
        raise CaseError(case, f"its tumour {kind!r} is unknown", "Make the case again")
    scan = _existing(case, folder / "ct")
    try:
        read = read_ct(scan)
        check_hu(case, read.image)
        mask_file = nib.load(_existing(case, folder / "segmentations" / kind))
        mask = np.asanyarray(mask_file.dataobj) > 0  # type: ignore[attr-defined]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise CaseError(
            case, f"not readable to its end ({type(error).__name__})", "Make the case again"
        ) from error
    if mask.shape != read.image.shape:
        raise CaseError(
            case, f"mask {mask.shape} and scan {read.image.shape} differ", "Make the case again"
        )
    image, affine = to_canonical(read.image, read.affine)
    mask, _ = to_canonical(mask, read.affine)
    low, high = settings["window"]
    wanted = settings["spacing"] or spacing_of(affine)
    scaled = prepare_image(image, spacing_of(affine), wanted, (low, high), settings["order"])
    extent = np.asarray(spacing_of(affine)) * image.shape
    share = resample_to_shape(mask.astype(np.float32), scaled.shape, 1)
    label = np.where(share > 0.5, anatomy.TUMORS[kind], 0).astype(np.uint8)
    x, y, z = (float(v) for v in extent / scaled.shape)
    source = str(request.get("patient") or case)
    return Case(case, source, scaled * (high - low) + low, label, (x, y, z), (kind,))


def _existing(case: str, stem: Path) -> Path:
    for ending in ENDINGS:
        if stem.with_name(stem.name + ending).is_file():
            return stem.with_name(stem.name + ending)
    raise CaseError(case, f"{stem.name}.nii.gz is missing", "Make the case again")


def tumors_of(
    case: Case,
    synthetic: bool,
    window: tuple[float, float],
    minimum_voxels: int,
    describe: Callable[..., dict[str, float]],
    encode: Callable[..., Float[np.ndarray, " channels"]] | None,
) -> Iterator[Tumor]:
    """Yields the tumours of a case: 26-connected components of one kind.

    Args:
        case: as `Source.read` returns it.
        synthetic: kept with each tumour.
        window: HU, of the histograms.
        minimum_voxels: smaller ones are left out.
        describe: (HU, texture, masks of the regions, spacing) -> intensities.
        encode: (case, centre in voxels) -> features; None for none.

    Raises:
        CaseError: the image has values that are no numbers.
    """
    if not np.isfinite(case.image).all():
        raise CaseError(case.name, "the image has NaN or infinite voxels", "Repair the scan")
    steps = np.asarray(case.spacing)
    anything = case.label > max(anatomy.ORGANS.values())
    reach = np.ceil((SURROUNDINGS_MM + 2 * steps) / steps).astype(int)
    for kind in case.tumors:
        components, _ = label_components(case.label == anatomy.TUMORS[kind])
        boxes = ndimage.find_objects(components)
        sizes = np.bincount(components.ravel())[1:]
        kept = [int(i) for i in np.argsort(-sizes, kind="stable") if sizes[i] >= minimum_voxels]
        for number, index in enumerate(kept, start=1):
            box = boxes[index]
            wide = tuple(
                slice(max(b.start - r, 0), min(b.stop + r, n))
                for b, r, n in zip(box, reach, case.label.shape, strict=True)
            )
            mask = components[wide] == index + 1
            image = case.image[wide]
            distance = ndimage.distance_transform_edt(~mask, sampling=steps)
            free = ~anything[wide]
            regions = np.stack(
                [
                    mask,
                    free & (distance > 0) & (distance <= RIM_MM),
                    free & (distance > RIM_MM) & (distance <= SURROUNDINGS_MM),
                ]
            )
            texture = _gradient(image, steps)
            centre = np.argwhere(mask).mean(axis=0) + [w.start for w in wide]
            picture, outline = _picture(case, components > 0, centre)
            yield Tumor(
                *(case.name, case.patient, kind, number, synthetic),
                measure(components[box] == index + 1, case.spacing),
                describe(image, texture, regions, case.spacing),
                _histograms(image, regions, np.linspace(*window, HU_BINS + 1)),
                _histograms(texture, regions, TEXTURE_EDGES),
                *(picture, outline, case.spacing[:2]),
                np.zeros(0, np.float32) if encode is None else encode(case, centre),
            )


def _gradient(image: Float[np.ndarray, "x y z"], steps: Float[np.ndarray, "3"]):
    """Magnitude of the gradient, HU/mm. An axis of one voxel has none."""
    parts = [
        np.gradient(image, step, axis=axis) if image.shape[axis] > 1 else np.zeros_like(image)
        for axis, step in enumerate(steps)
    ]
    return np.sqrt(sum(part**2 for part in parts))


def _histograms(values, regions, edges) -> Float[np.ndarray, "3 bins"]:
    counts = []
    for region in regions:
        found, _ = np.histogram(np.clip(values[region], edges[0], edges[-1]), edges)
        counts.append(found / max(1, found.sum()))
    return np.asarray(counts, np.float64)


def _picture(case: Case, mask: Bool[np.ndarray, "x y z"], centre: Float[np.ndarray, "3"]):
    """The axial slice through a tumour's middle, as wide as all are; outside the scan is air."""
    x, y, z = np.round(centre).astype(int)
    half = [round(PICTURE_MM / 2 / step) for step in case.spacing[:2]]
    padding = [(h, h) for h in half]
    image = np.pad(case.image[:, :, z], padding, constant_values=float(case.image.min()))
    outline = np.pad(mask[:, :, z], padding)
    part = slice(x, x + 2 * half[0] + 1), slice(y, y + 2 * half[1] + 1)
    return image[part].astype(np.float32), outline[part]
