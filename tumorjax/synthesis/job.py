"""The job "synthesis": tumours into given healthy scans, on the scans' own grids, in HU."""

import ast
import errno
import json
import logging
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Num, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from tumorjax import anatomy
from tumorjax.contents import tumor_instances
from tumorjax.errors import CaseError, UserError
from tumorjax.files import (
    check_case_id,
    write_bytes_atomic,
    write_csv_atomic,
    write_json_atomic,
)
from tumorjax.geometry import from_canonical, spacing_of, to_canonical
from tumorjax.nifti import ENDINGS, Scan, read_ct, write_image, write_mask
from tumorjax.settings import plain
from tumorjax.synthesis import before_after, scan_masks, shapes
from tumorjax.synthesis.implant import implant_in_one
from tumorjax.synthesis.placement import check_position
from tumorjax.synthesis.synthesizers import Synthesizer, from_settings

# Finds the organs of a scan: its label map with the ids of `anatomy`, axes as in the file.
FindOrgans = Callable[[Scan], UInt8[np.ndarray, "i j k"]]

_RECORD = "synthesis.json"


class Healthy(NamedTuple):
    """A scan to put tumours into: its file, and where the folder with its masks would be."""

    scan: Path
    beside: Path


class Wanted(NamedTuple):
    """What is put into each scan.

    Attributes:
        synthesizers: one a kind of tumours, in the order in which they are made.
        sizes: of each: a size group's name, or a radius in mm.
        number: tumours of each; 0: as the prior has it.
        place: position and margin_mm, see `placement.place`.
        seed: of all.
        masks: config.masks; None for those beside the scans.
        labels: what the values of label maps are; None for what is told beside them.
        find_organs: a network's, in place of masks.
        preview: whether pictures are made.
    """

    synthesizers: Sequence[Synthesizer]
    sizes: Sequence[str | float]
    number: int
    place: Mapping[str, Any]
    seed: int
    masks: Path | None
    labels: scan_masks.Labels | None
    find_organs: FindOrgans | None
    preview: bool


def run(
    config: ConfigDict,
    workdir: Path,
    find_organs: FindOrgans | None = None,
    organs_from: Mapping[str, Any] | None = None,
) -> int:
    """Puts tumours into all scans of a file or folder, see configs/synthesis.py.

    Writes OUTPUT/CASE/ct.nii.gz, OUTPUT/CASE/segmentations/TUMOUR.nii.gz for each kind,
    OUTPUT/CASE/preview.png, and last OUTPUT/CASE/synthesis.json, which says how they were made. A
    case that was made for the same request from the same files is skipped.

    Args:
        config: of the job.
        workdir: gets rejected.csv, and scans/ where config.output is empty.
        find_organs: finds organs where there are no masks.
        organs_from: JSON-able, what `find_organs` depends on.

    Returns:
        0, or 1 where cases were set aside: they are in workdir/rejected.csv.

    Raises:
        UserError: the config is wrong, or there is no scan.
    """
    workdir = Path(workdir)
    for key in ("input", "organ"):
        if not config[key]:
            raise UserError(f"config.{key} is empty. Set it with --config.{key}=...")
    wanted = _wanted(config, find_organs)
    scans, rejected = find_scans(Path(config.input))
    if wanted.masks is not None and wanted.masks.is_file() and len(scans) > 1:
        raise UserError(
            f"{wanted.masks}: one file of masks for {len(scans)} scans (config.masks). Give a"
            " folder with one a case"
        )
    output = Path(config.output or workdir / "scans")
    for case, healthy in scans.items():
        if (output / case / "ct.nii.gz").resolve() == healthy.scan.resolve():
            raise UserError(
                f"{output}: config.output is where the scans are. Choose another folder"
            )
    settings = _settings(config, wanted) | {"organs_from": plain(organs_from or {})}
    requests = {case: settings | {"source": _files(case, scans[case], wanted)} for case in scans}
    waiting = [case for case in scans if not _is_finished(output / case, requests[case])]
    logging.info("%s: %d of %d scans to do", output, len(waiting), len(scans))
    bar = tqdm(total=len(waiting), unit="scan", disable=not sys.stderr.isatty())
    with bar, ThreadPoolExecutor(max(1, config.workers)) as pool:
        futures = {
            pool.submit(_synthesize, case, scans[case], output, requests[case], wanted): case
            for case in waiting
        }
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except CaseError as error:
                    case = futures[future]
                    rejected.append({"case": case, "stage": "synthesis", "reason": str(error)})
                    logging.warning("set aside: %s", error)
                bar.update()
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"{output}: no space left on the disk. Free some and run again: what is finished"
                " stays"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    workdir.mkdir(parents=True, exist_ok=True)
    if rejected:
        rejected.sort(key=lambda row: row["case"])
        write_csv_atomic(workdir / "rejected.csv", rejected, ("case", "stage", "reason"))
        print(f"{output}: {len(rejected)} cases set aside, see {workdir / 'rejected.csv'}")
        return 1
    (workdir / "rejected.csv").unlink(missing_ok=True)
    print(f"{output}: {f'{len(waiting)} scans written' if waiting else 'already finished'}")
    return 0


# ---------------------------------------------------------------------------- what is asked for


def _wanted(config: ConfigDict, find_organs: FindOrgans | None) -> Wanted:
    """Checks the config and opens the synthesizers."""
    organs, sizes = organs_of(config), _values(config.size)
    if len(sizes) == 1:
        sizes = sizes * len(organs)
    if len(organs) != len(sizes):
        raise UserError(
            f"config.organ names {len(organs)} organs and config.size {len(sizes)} sizes. Give one"
            " size, or one for each organ"
        )
    if config.size_is not in ("radius", "diameter"):
        raise UserError(f"config.size_is is {config.size_is!r}. Expected radius or diameter")
    if config.number < 0:
        raise UserError(
            f"config.number is {config.number}. Expected 0 (as the prior has it) or more"
        )
    check_position(config.position, config.margin_mm)
    masks = Path(config.masks) if config.masks else None
    if masks is not None and not masks.exists():
        raise UserError(f"{masks}: no such file or folder (config.masks)")
    if masks is not None and find_organs is not None:
        raise UserError(
            "config.masks and config.checkpoint_organs are both given. Leave one of them out"
        )
    changes = plain(config.texture)
    settings = plain(config) | {
        # Changes of a texture are for all organs, unless they are told by organ.
        "texture": changes
        if set(changes) & set(anatomy.TUMOR_OF)
        else dict.fromkeys(organs, changes)
    }
    return Wanted(
        [from_settings(organ, settings) for organ in organs],
        [_size(size, config.size_is == "diameter") for size in sizes],
        config.number,
        {"position": config.position, "margin_mm": config.margin_mm},
        config.seed,
        masks,
        scan_masks.read_labels(
            config.labels if isinstance(config.labels, str) else plain(config.labels)
        ),
        find_organs,
        config.preview,
    )


def organs_of(config: ConfigDict) -> list[str]:
    """Returns the organ groups that config.organ names."""
    return _values(config.organ)


def _values(given: str | Sequence[Any]) -> list[str]:
    """Returns a setting that is one value or several: "liver", "liver,pancreas", "(12, 25)"."""
    if isinstance(given, str) and given[:1] in ("(", "["):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            raise UserError(f"{given!r} is no list. Expected such as \"('a', 'b')\"") from None
    parts = given.split(",") if isinstance(given, str) else given
    return [str(part).strip() for part in parts]


def _size(text: str, is_diameter: bool) -> str | float:
    if text in shapes.SIZES:
        return text
    try:
        length = float(text)
    except ValueError:
        length = float("nan")
    if not (np.isfinite(length) and length > 0):
        raise UserError(
            f"config.size is {text!r}. Expected {', '.join(shapes.SIZES)}, or a"
            f" {'diameter' if is_diameter else 'radius'} in mm"
        )
    return length / 2 if is_diameter else length


def _settings(config: ConfigDict, wanted: Wanted) -> dict[str, Any]:
    """All that decides a case's tumours beside its files, as JSON."""
    tumors = [
        {
            "organ": one.organ,
            "tumor": anatomy.TUMOR_OF[one.organ],
            "size": size,
            "prior": shapes.prior_used(one.organ, one.prior),
            **one.record,
        }
        for one, size in zip(wanted.synthesizers, wanted.sizes, strict=True)
    ]
    return {
        "tumors": plain({"all": tumors})["all"],
        "number": config.number,
        "seed": config.seed,
        "synthesizer": config.synthesizer,
        **wanted.place,
        "labels": plain(wanted.labels or {}),
    }


# ---------------------------------------------------------------------------- scans


def find_scans(source: Path) -> tuple[dict[str, Healthy], list[dict[str, str]]]:
    """Returns the scans of a file or folder by case id, and those that cannot be used.

    Args:
        source: CASE/ct.nii.gz or a NIfTI file of any name, with segmentations/ beside it or not; a
            folder of such cases; one with ct/CASE/ct.nii.gz and label/CASE/segmentations; or a
            folder of NIfTI files. nnU-Net's channel suffix _0000 is no part of an id.

    Raises:
        UserError: there is no such file, or no scan in the folder.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder (config.input)")
    if source.is_file():
        if not source.name.endswith(ENDINGS):
            raise UserError(f"{source}: expected a .nii.gz or .nii file, or a folder of cases")
        alone = source.name in ("ct.nii.gz", "ct.nii")
        found = [(source.resolve().parent.name if alone else _stem(source), source, source.parent)]
    else:
        split = (source / "ct").is_dir() and (source / "label").is_dir()
        found = [
            (scan.parent.name, scan, source / "label" / scan.parent.name if split else scan.parent)
            for ending in ENDINGS
            for scan in sorted((source / "ct" if split else source).glob(f"*/ct{ending}"))
        ]
        if not found:
            found = [
                (_stem(scan), scan, source / _stem(scan))
                for scan in sorted(source.glob("*.nii*"))
                if scan.name.endswith(ENDINGS) and scan.name[0] != "."
            ]
    if not found:
        raise UserError(
            f"{source}: no scans. Expected CASE/ct.nii.gz and CASE/segmentations/,"
            " ct/CASE/ct.nii.gz and label/CASE/segmentations/, or NIfTI files"
        )
    scans: dict[str, Healthy] = {}
    rejected = []
    for case, scan, folder in sorted(found):
        try:
            check_case_id(case)
            if case in scans:
                raise CaseError(
                    case, f"it has both {scans[case].scan.name} and {scan.name}", "Keep one of them"
                )
            scans[case] = Healthy(scan, folder / "segmentations")
        except (UserError, CaseError) as error:
            rejected.append({"case": case, "stage": "find", "reason": str(error)})
    return scans, rejected


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")


def _files(case: str, healthy: Healthy, wanted: Wanted) -> dict[str, list[int]]:
    """Size and time of the files that a case is made from: enough to see that one was replaced."""
    files = [healthy.scan]
    if wanted.find_organs is None:
        try:
            masks = scan_masks.find_masks(case, healthy.beside, wanted.masks)
        except CaseError:
            # It is said when the case is made.
            masks = healthy.beside
        files += sorted(masks.glob("*.nii*")) if masks.is_dir() else [masks]
        if masks.is_file() and wanted.labels is None:
            files.append(masks.parent / scan_masks.LABELS_FILE)
    return {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
        if path.is_file()
    }


def _is_finished(folder: Path, request: Mapping[str, Any]) -> bool:
    try:
        record = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("request") == json.loads(json.dumps(request))


# ---------------------------------------------------------------------------- one case


def _synthesize(
    case: str, healthy: Healthy, output: Path, request: Mapping[str, Any], wanted: Wanted
) -> None:
    """Makes one case and writes it; its record comes last."""
    scan = read_ct(healthy.scan)
    image, affine = to_canonical(np.asarray(scan.image, np.float32), scan.affine)
    structures = _read_structures(case, healthy, scan, image.shape, affine, wanted)
    spacing = spacing_of(affine)
    made, label = _implant(case, image, structures, spacing, wanted)

    folder = output / case
    record = folder / _RECORD
    # While its files are replaced, there is no record that vouches for them.
    record.unlink(missing_ok=True)
    write_image(folder / "ct.nii.gz", _as_stored(scan, image, made), scan.header)
    kinds = dict.fromkeys(anatomy.TUMOR_OF[one.organ] for one in wanted.synthesizers)
    for tumor in kinds:
        mask = from_canonical((label == anatomy.LABELS[tumor]).astype(np.uint8), scan.affine)
        write_mask(folder / "segmentations" / f"{tumor}.nii.gz", mask, scan.header)
    tumors = tumor_instances(label, spacing)
    for found in tumors:
        # Where a reader's viewer finds it: mm of the scan's own space, not our voxels.
        centre = affine @ [*found.pop("center"), 1.0]
        found["center_mm"] = [round(float(c), 1) for c in centre[:3]]
    if wanted.preview:
        picture = before_after.picture(case, image, made, label, spacing)
        write_bytes_atomic(folder / "preview.png", picture)
    volume = float((label > 0).sum() * np.prod(spacing))
    write_json_atomic(
        record,
        {"request": dict(request), "tumor_volume_mm3": round(volume, 1), "tumors": tumors},
    )


def _read_structures(
    case: str,
    healthy: Healthy,
    scan: Scan,
    shape: tuple[int, ...],
    affine: Float[np.ndarray, "4 4"],
    wanted: Wanted,
) -> scan_masks.Structures:
    organs = list(dict.fromkeys(one.organ for one in wanted.synthesizers))
    if wanted.find_organs is not None:
        found, _ = to_canonical(wanted.find_organs(scan), scan.affine)
        return scan_masks.from_map(case, found, scan_masks.ANATOMY, organs)
    path = scan_masks.find_masks(case, healthy.beside, wanted.masks)
    if path.is_dir():
        return scan_masks.from_folder(case, path, organs, shape, affine)
    values = scan_masks.read_map(path, shape, affine)
    labels = wanted.labels or scan_masks.labels_beside(path) or scan_masks.ANATOMY
    return scan_masks.from_map(case, values, labels, organs)


def _implant(
    case: str,
    image: Float[np.ndarray, "x y z"],
    structures: scan_masks.Structures,
    spacing: tuple[float, float, float],
    wanted: Wanted,
) -> tuple[Float[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"]]:
    """Puts all kinds of tumours into a scan, one after the other.

    Returns:
        The scan, and the new tumours as ids of `anatomy`.
    """
    # One key a case: the others of the folder do not change it.
    key = jax.random.fold_in(jax.random.key(wanted.seed), zlib.crc32(case.encode()))
    label = np.zeros(image.shape, np.uint8)
    taken: Bool[np.ndarray, "x y z"] | None = structures.tumors
    made = image
    for index, (one, size) in enumerate(zip(wanted.synthesizers, wanted.sizes, strict=True)):
        made, tumor = implant_in_one(
            jax.random.fold_in(key, index),
            made,
            structures.parts[one.organ],
            spacing,
            size,
            one,
            exclude=taken,
            blocked=structures.known,
            count=wanted.number or None,
            case=case,
            **wanted.place,
        )
        label[tumor] = anatomy.LABELS[anatomy.TUMOR_OF[one.organ]]
        taken = tumor if taken is None else taken | tumor
    return made, label


def _as_stored(
    scan: Scan, before: Float[np.ndarray, "x y z"], after: Float[np.ndarray, "x y z"]
) -> Num[np.ndarray, "i j k"]:
    """Returns the scan with tumours in the type of its file; what did not change is the file's."""
    changed = from_canonical(after != before, scan.affine)
    values = from_canonical(after, scan.affine)[changed]
    kind = scan.image.dtype
    if kind.kind in "iu":
        # NIfTI readers differ over whole numbers of 64 bits; HU never need them.
        kind = kind if kind.itemsize < 8 else np.dtype(np.int32)
        bounds = np.iinfo(kind)
        values = np.clip(np.rint(values), bounds.min, bounds.max)
    stored = np.array(scan.image, kind)
    stored[changed] = values.astype(kind)
    return stored
