"""The job "synthesis": tumours into given healthy scans, on the scans' own grids, in HU."""

import errno
import json
import logging
import sys
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import nibabel as nib
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from tqdm import tqdm

from tumorjax import anatomy
from tumorjax.errors import CaseError, UserError
from tumorjax.files import check_case_id, write_csv_atomic, write_json_atomic
from tumorjax.geometry import from_canonical, spacing_of, to_canonical
from tumorjax.nifti import ENDINGS, read_ct, write_image, write_mask
from tumorjax.settings import plain
from tumorjax.synthesis import shapes
from tumorjax.synthesis.implant import Synthesizer, create, implant_in_one

# Corners of a mask may lie this many voxels from the scan's.
_SAME_GRID = 0.1


class Healthy(NamedTuple):
    """A scan to put tumours into: its file, and the folder with a mask per structure."""

    scan: Path
    masks: Path


def run(config: ConfigDict, workdir: Path) -> int:
    """Puts tumours into all scans of a file or folder, see configs/synthesis.py.

    Writes OUTPUT/CASE/ct.nii.gz, OUTPUT/CASE/segmentations/TUMOUR.nii.gz, and last
    OUTPUT/CASE/synthesis.json, which says how they were made. A case that was made for the same
    request from the same files is skipped.

    Returns:
        0, or 1 where cases were set aside: they are in workdir/rejected.csv.

    Raises:
        UserError: the config is wrong, or there is no scan.
    """
    workdir = Path(workdir)
    for key in ("input", "organ"):
        if not config[key]:
            raise UserError(f"config.{key} is empty. Set it with --config.{key}=...")
    size = _size(config.size)
    synthesizer = create(config.synthesizer, config.organ, prior=config.prior, **config.texture)
    if config.number < 0:
        raise UserError(f"config.number is {config.number}. Expected 0 (as the size has) or more")
    scans, rejected = find_scans(Path(config.input))
    output = Path(config.output or workdir / "scans")
    if output.resolve() in (Path(config.input).resolve(), Path(config.input).resolve().parent):
        raise UserError(f"{output}: config.output is where the scans are. Choose another folder")

    settings = {
        "organ": config.organ,
        "tumor": anatomy.TUMOR_OF[config.organ],
        "size": size,
        "number": config.number,
        "seed": config.seed,
        "synthesizer": config.synthesizer,
        "prior": shapes.prior_used(config.organ, config.prior),
        "texture": plain(config.texture),
    }
    requests = {case: settings | {"source": _fingerprint(scan)} for case, scan in scans.items()}
    waiting = [case for case in scans if not _is_finished(output / case, requests[case])]
    logging.info("%s: %d of %d scans to do", output, len(waiting), len(scans))
    bar = tqdm(total=len(waiting), unit="scan", disable=not sys.stderr.isatty())
    with bar, ThreadPoolExecutor(max(1, config.workers)) as pool:
        futures = {
            pool.submit(_synthesize, case, scans[case], output, requests[case], synthesizer): case
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


def find_scans(source: Path) -> tuple[dict[str, Healthy], list[dict[str, str]]]:
    """Returns the scans of a file or folder by case id, and those that cannot be used.

    Args:
        source: CASE/ct.nii.gz with CASE/segmentations beside it; a folder of such cases; or one
            with ct/CASE/ct.nii.gz and label/CASE/segmentations.

    Raises:
        UserError: there is no such file, or no scan in the folder.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder (config.input)")
    if source.is_file():
        if not source.name.endswith(ENDINGS):
            raise UserError(f"{source}: expected a .nii.gz or .nii file, or a folder of cases")
        found = [(source.resolve().parent.name, source, source.parent)]
    else:
        split = (source / "ct").is_dir() and (source / "label").is_dir()
        found = [
            (scan.parent.name, scan, source / "label" / scan.parent.name if split else scan.parent)
            for ending in ENDINGS
            for scan in sorted((source / "ct" if split else source).glob(f"*/ct{ending}"))
        ]
    if not found:
        raise UserError(
            f"{source}: no scans. Expected CASE/ct.nii.gz and CASE/segmentations/, or"
            " ct/CASE/ct.nii.gz and label/CASE/segmentations/"
        )
    scans: dict[str, Healthy] = {}
    rejected = []
    for case, scan, masks in sorted(found):
        try:
            check_case_id(case)
            if case in scans:
                raise CaseError(case, "it has both ct.nii.gz and ct.nii", "Keep one of them")
            scans[case] = Healthy(scan, masks / "segmentations")
        except (UserError, CaseError) as error:
            rejected.append({"case": case, "stage": "find", "reason": str(error)})
    return scans, rejected


def _size(text: str) -> str | float:
    if text in shapes.SIZES:
        return text
    try:
        radius = float(text)
    except ValueError:
        radius = float("nan")
    if not (np.isfinite(radius) and radius > 0):
        raise UserError(
            f"config.size is {text!r}. Expected {', '.join(shapes.SIZES)}, or a radius in mm"
        )
    return radius


def _synthesize(
    case: str,
    healthy: Healthy,
    output: Path,
    request: Mapping[str, Any],
    synthesizer: Synthesizer,
) -> None:
    """Makes one case and writes it; its synthesis.json comes last."""
    scan = read_ct(healthy.scan)
    image, affine = to_canonical(np.asarray(scan.image, np.float32), scan.affine)
    masks = {}
    for name in _structures(healthy.masks, request["organ"], case):
        mask = _read_mask(healthy.masks, name, image.shape, affine, scan.affine)
        masks[name] = mask
    none = np.zeros(image.shape, bool)
    parts = [masks.pop(name, none) for name in _parts(request["organ"])]
    if not any(part.any() for part in parts):
        raise CaseError(
            case,
            f"its {request['organ']} mask is empty: there is no {request['organ']} in the scan",
            "Leave the case out",
        )
    tumors = [mask for name, mask in masks.items() if name in anatomy.TUMORS]
    others = list(masks.values())
    # One key a case: the others of the folder do not change it.
    key = jax.random.fold_in(jax.random.key(request["seed"]), zlib.crc32(case.encode()))
    made, tumor = implant_in_one(
        key,
        image,
        parts,
        spacing_of(affine),
        request["size"],
        synthesizer,
        exclude=np.logical_or.reduce(tumors) if tumors else None,
        blocked=np.logical_or.reduce(others) if others else None,
        count=request["number"] or None,
        case=case,
    )
    folder = output / case
    record = folder / "synthesis.json"
    # While its files are replaced, there is no record that vouches for them.
    record.unlink(missing_ok=True)
    result = from_canonical(made, scan.affine)
    if scan.image.dtype.kind in "iu":
        # NIfTI readers differ over whole numbers of 64 bits; HU never need them.
        stored = scan.image.dtype if scan.image.dtype.itemsize < 8 else np.dtype(np.int32)
        bounds = np.iinfo(stored)
        result = np.clip(np.rint(result), bounds.min, bounds.max).astype(stored)
    write_image(folder / "ct.nii.gz", result, scan.header)
    mask = from_canonical(tumor.astype(np.uint8), scan.affine)
    write_mask(folder / "segmentations" / f"{request['tumor']}.nii.gz", mask, scan.header)
    volume = float(tumor.sum() * np.prod(spacing_of(affine)))
    write_json_atomic(record, {"request": dict(request), "tumor_volume_mm3": round(volume, 1)})


def _parts(organ: str) -> tuple[str, ...]:
    """Names of the masks that an organ may have: kidney_left, kidney_right, or kidney for both."""
    sides = anatomy.organ_labels(organ)
    return sides if len(sides) == 1 else (*sides, organ)


def _structures(folder: Path, organ: str, case: str) -> list[str]:
    """Returns the masks to read: the organ's, tumours, and what a kidney's tumour may run into."""
    present = {
        path.name.removesuffix(ending)
        for ending in ENDINGS
        for path in (folder.glob(f"*{ending}") if folder.is_dir() else ())
    }
    parts = [name for name in _parts(organ) if name in present]
    if not parts:
        raise CaseError(
            case,
            f"no mask of the {organ}: {folder} has none of"
            f" {', '.join(f'{name}.nii.gz' for name in _parts(organ))}",
            "Add the organ's mask",
        )
    others = anatomy.LABELS if organ == "kidney" else anatomy.TUMORS
    return [*parts, *sorted((present & set(others)) - set(parts))]


def _read_mask(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    canonical_affine: Float[np.ndarray, "4 4"],
    scan_affine: Float[np.ndarray, "4 4"],
) -> Bool[np.ndarray, "x y z"]:
    """Reads a binary mask and brings it to RAS+; it must lie on the scan's grid."""
    path = next(p for p in (folder / f"{name}{ending}" for ending in ENDINGS) if p.is_file())
    try:
        file = cast(nib.Nifti1Image, nib.load(path))
        mask = np.asanyarray(file.dataobj) > 0
        affine = np.asarray(file.affine, np.float64)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise CaseError(
            str(path),
            f"not readable to its end as NIfTI ({type(error).__name__})",
            "Copy or convert it again",
        ) from error
    try:
        turned, affine = to_canonical(mask, affine) if mask.ndim == 3 else (mask, affine)
    except UserError as error:
        raise CaseError(str(path), str(error), "Write the mask with the scan's header") from error
    if turned.shape != shape:
        raise CaseError(
            str(path),
            f"its shape is {turned.shape}, the scan's {shape} (axes in RAS+)",
            "Give masks on the scan's grid",
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1).T
    apart = nib.affines.apply_affine(affine, corners) - nib.affines.apply_affine(
        canonical_affine, corners
    )
    distance = float(np.linalg.norm(apart, axis=1).max())
    if distance > _SAME_GRID * min(spacing_of(scan_affine)):
        raise CaseError(
            str(path),
            f"its corners lie up to {distance:.2f} mm away from the scan's (affines differ)",
            "Give masks on the scan's grid",
        )
    return turned


def _fingerprint(healthy: Healthy) -> dict[str, list[int]]:
    """Size and time of the files that a case is made from: enough to see that one was replaced."""
    files = [healthy.scan, *sorted(healthy.masks.glob("*.nii*"))]
    return {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
        if path.is_file()
    }


def _is_finished(folder: Path, request: Mapping[str, Any]) -> bool:
    try:
        record = json.loads((folder / "synthesis.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("request") == json.loads(json.dumps(request))
