"""The built-in cohort: virtual patients scanned at virtual hospitals, as ordinary NIfTI files.

Each case is a function of (settings, case number). It is written in AbdomenAtlas' layout:
BDMAP_00000001/ct.nii.gz (HU, int16), BDMAP_00000001/segmentations/NAME.nii.gz (one binary file
per structure that is there; an organ's file includes its vessels and lesions) and patients.csv
(case, patient, site). Nothing that reads these files knows that they are virtual.
"""

import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int16, UInt8

from data_prep.virtual_anatomy import draw_anatomy, paint
from data_prep.virtual_scanner import (
    OOD_SITES,
    SITES,
    TRAINING_SITES,
    Grid,
    add_noise,
    reconstruct,
    scan_grid,
    tissue_values,
    to_file,
)
from data_prep.virtual_tumors import SIZES, add_distractors, add_tumors
from tumorjax.anatomy import NAMES
from tumorjax.errors import UserError
from tumorjax.files import write_csv_atomic, write_json_atomic

# Part of the settings' hash: raised when the same settings give other scans.
_VERSION = 4
_SETTINGS_FILE = ".virtual.json"


class Case(NamedTuple):
    """One scan of the cohort: its id, its patient (number and id), hospital and tumours."""

    case: str
    patient_number: int
    patient: str
    scan_number: int
    site: str
    tumors: tuple[str, ...]


def default_settings(large: bool = False) -> dict[str, Any]:
    """Returns the settings of the built-in cohort.

    Args:
        large: full-size scans of adults, 512x512 at 0.7 to 0.9 mm with 100 to 300 slices, hundreds
            of them, instead of the small cohort of the default study.

    Returns:
        seed: of everything.
        sites, ood_sites: hospitals, names in `virtual_scanner.SITES`; no name may be in both.
        patients_per_site, ood_patients_per_site: patients.
        healthy_share: share of patients without a tumour, in each hospital.
        follow_up_share: share of patients with a second scan.
        two_organs_share: share of tumour patients with tumours in two organs.
        tumors: kinds of tumour, drawn evenly; endometriomas need a field of view of the pelvis.
        extent_mm: field of view (x, y, z), mm; it hangs below the diaphragm.
        in_plane_mm, slice_mm: finest and coarsest spacing of the hospitals.
        matrix: voxels in x and y, or 0 to follow from extent_mm and the spacing.
        body_scale: size of the body, 1 for an adult. Tumours keep their real sizes in mm.
        contrast: factor on the difference in HU between a tumour and its organ.
        noise: factor on the noise of all hospitals.
        distractors: factor on the number of cysts, calcifications and focal fat.
        variation: factor on the differences between patients and between tumours.
    """
    settings: dict[str, Any] = {
        "seed": 0,
        "sites": list(TRAINING_SITES),
        "ood_sites": list(OOD_SITES),
        "patients_per_site": 11,
        "ood_patients_per_site": 5,
        "healthy_share": 0.3,
        "follow_up_share": 0.05,
        "two_organs_share": 0.1,
        "tumors": ["liver_lesion", "pancreatic_lesion", "kidney_lesion"],
        "extent_mm": [240.0, 192.0, 168.0],
        "in_plane_mm": [2.4, 3.2],
        "slice_mm": [2.5, 4.0],
        "matrix": 0,
        "body_scale": 0.75,
        "contrast": 1.0,
        "noise": 1.0,
        "distractors": 1.0,
        "variation": 1.0,
    }
    if large:
        settings |= {
            "patients_per_site": 60,
            "ood_patients_per_site": 30,
            "tumors": [*settings["tumors"], "colon_lesion", "esophagus_tumor"],
            "extent_mm": [410.0, 410.0, 300.0],
            "in_plane_mm": [0.7, 0.9],
            "slice_mm": [1.0, 3.0],
            "matrix": 512,
            "body_scale": 1.0,
        }
    return settings


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings as plain values, with defaults for what is missing.

    Raises:
        UserError: a key, hospital or tumour is unknown, a hospital is on both sides, a number is
            out of range, or endometriomas are asked for outside the field of view.
    """
    merged = default_settings()
    given = {key: _plain(settings[key]) for key in settings}
    unknown = sorted(set(given) - set(merged))
    if unknown:
        raise UserError(
            f"virtual cohort: unknown settings {', '.join(unknown)}. Expected {', '.join(merged)}"
        )
    merged |= given
    for key, known in (("sites", SITES), ("ood_sites", SITES), ("tumors", SIZES)):
        wrong = [name for name in merged[key] if name not in known]
        if wrong:
            raise UserError(
                f"virtual.{key} has the unknown names {', '.join(map(str, wrong))}."
                f" Expected some of {', '.join(known)}"
            )
    both = sorted(set(merged["sites"]) & set(merged["ood_sites"]))
    if both:
        raise UserError(
            f"virtual.sites and virtual.ood_sites share {', '.join(both)}. A hospital that is"
            " trained on cannot be out of distribution: keep it in one list"
        )
    ranges = {
        "patients_per_site": (0, 1_000_000), "ood_patients_per_site": (0, 1_000_000),
        "healthy_share": (0, 1), "follow_up_share": (0, 1), "two_organs_share": (0, 1),
        "matrix": (0, 2048), "body_scale": (0.4, 1.5), "contrast": (0, 10), "noise": (0, 20),
        "distractors": (0, 20), "variation": (0, 2),
    }  # fmt: skip
    for key, (low, high) in ranges.items():
        if not low <= merged[key] <= high:
            raise UserError(f"virtual.{key} is {merged[key]}. Expected {low} to {high}")
    for key in ("extent_mm", "in_plane_mm", "slice_mm"):
        if any(value <= 0 for value in merged[key]) or len(merged[key]) != 2 + (key == "extent_mm"):
            raise UserError(f"virtual.{key} is {merged[key]}. Expected positive numbers, mm")
    if "endometrioma_tumor" in merged["tumors"]:
        needed = 435 * merged["body_scale"]
        if merged["extent_mm"][2] < needed:
            raise UserError(
                f"virtual.tumors has endometrioma_tumor, but virtual.extent_mm ends above the"
                f" pelvis. Set its third number to at least {needed:.0f}"
            )
    if not merged["tumors"] and merged["healthy_share"] < 1:
        raise UserError("virtual.tumors is empty. Name a tumour, or set virtual.healthy_share to 1")
    return merged


def plan(settings: Mapping[str, Any]) -> list[Case]:
    """Returns the cohort's cases, in order: training hospitals take turns, then the OOD ones."""
    settings = check_settings(settings)
    rng = np.random.default_rng([settings["seed"], 0])
    places: list[str] = []
    for names, number in (
        (settings["sites"], settings["patients_per_site"]),
        (settings["ood_sites"], settings["ood_patients_per_site"]),
    ):
        places += [name for _ in range(number) for name in names]
    tumors: list[tuple[str, ...]] = [()] * len(places)
    turn = 0
    for site in [*settings["sites"], *settings["ood_sites"]]:
        mine = rng.permutation([i for i, place in enumerate(places) if place == site])
        healthy = round(settings["healthy_share"] * len(mine))
        for i in mine[healthy:]:
            # Kinds take turns, so that each is there as often as the others.
            kinds = settings["tumors"]
            tumors[i] = (kinds[turn % len(kinds)],)
            if len(kinds) > 1 and rng.random() < settings["two_organs_share"]:
                tumors[i] += (kinds[(turn + 1 + rng.integers(len(kinds) - 1)) % len(kinds)],)
            turn += 1
    cases: list[Case] = []
    for number, (site, kinds) in enumerate(zip(places, tumors, strict=True)):
        scans = 1 + int(rng.random() < settings["follow_up_share"])
        for scan in range(scans):
            name = f"BDMAP_{len(cases) + 1:08d}"
            # Patients of two cohorts are two people: whoever keeps record of whom a network has
            # seen goes by these ids.
            patient = f"patient_{settings['seed']}_{number + 1:06d}"
            cases.append(Case(name, number, patient, scan, site, tuple(kinds)))
    return cases


def render(
    settings: Mapping[str, Any], case: Case
) -> tuple[
    Int16[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"], Grid
]:
    """Makes one scan: a function of the settings and the case.

    A patient's scans share anatomy and tumours; noise, phase of uptake and position differ.

    Returns:
        image: HU, RAS+.
        organ: anatomy id of the organ, 0 for none.
        overlay: id of the hepatic vessel or lesion within or on it, 0 for none.
        grid: voxel grid.
    """
    settings = check_settings(settings)
    site, seed = SITES[case.site], settings["seed"]
    body = np.random.default_rng([seed, 1, case.patient_number])
    scan_rng = np.random.default_rng([seed, 2, case.patient_number, case.scan_number])
    # Who has an endometrioma is a woman; others are women as often as men.
    female = "endometrioma_tumor" in case.tumors or bool(body.random() < 0.5)
    grid = scan_grid(scan_rng, site, settings)
    values = tissue_values(scan_rng, site, settings["variation"])
    anatomy = draw_anatomy(body, settings["body_scale"], settings["variation"], female)
    scan = paint(anatomy, grid, values)
    for number, tumor in enumerate(case.tumors):
        lesions = np.random.default_rng([seed, 3, case.patient_number, number])
        add_tumors(
            lesions,
            tumor,
            site.phase,
            settings["contrast"],
            settings["variation"],
            scan,
            grid,
            values,
        )
    distractors = np.random.default_rng([seed, 4, case.patient_number])
    add_distractors(distractors, settings["distractors"], scan, grid, settings["body_scale"])
    image, organ, overlay = scan
    reconstruct(image, grid.spacing, site)
    noise = [seed, 5, case.patient_number, case.scan_number]
    add_noise(image, noise, grid, site, settings["noise"], settings["body_scale"])
    np.clip(np.rint(image, out=image), -1024, 3071, out=image)
    return image.astype(np.int16, order="F"), organ, overlay, grid


def write_case(folder: str | os.PathLike, settings: Mapping[str, Any], case: Case) -> str:
    """Writes one case aside and renames it into place; one that is there is left as it is.

    Returns:
        The case id.
    """
    folder = Path(folder)
    target = folder / case.case
    if target.is_dir():
        return case.case
    image, organ, overlay, grid = render(settings, case)
    site = SITES[case.site]
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=f".{case.case}.", suffix=".part"))
    try:
        aside.chmod(0o755)
        (aside / "segmentations").mkdir()
        _write_nifti(aside / "ct.nii.gz", to_file(image, grid, site))
        present = set(np.unique(organ)) | set(np.unique(overlay))
        for label in sorted(present - {0}):
            mask = overlay == label if label in np.unique(overlay) else organ == label
            image_file = to_file(mask.astype(np.uint8, order="F"), grid, site)
            _write_nifti(aside / "segmentations" / f"{NAMES[int(label)]}.nii.gz", image_file)
        os.rename(aside, target)
    except OSError:
        # Another process may have finished the same case first.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return case.case


def _write_nifti(path: Path, image) -> None:
    # Level 1: noise does not compress, and masks do at any level. No time stamp: same bytes.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def write_cohort(
    folder: str | os.PathLike,
    settings: Mapping[str, Any],
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Case]:
    """Writes the cohort that the settings describe, or what is missing of it.

    Cases of other settings are removed first; a case that is there is complete and is kept.
    patients.csv is written before the first case.

    Args:
        folder: made if need be.
        settings: see `default_settings`; what is missing has its default.
        workers: processes; as many as there are processors by default, 1 for none but this one.
        progress: called with (cases done, cases in all).

    Returns:
        All cases of the cohort.

    Raises:
        UserError: the settings are wrong, or the folder holds cases that are not this cohort's.
    """
    folder = Path(folder)
    settings = check_settings(settings)
    cases = plan(settings)
    text = json.dumps({"version": _VERSION, "settings": settings}, sort_keys=True)
    stamp = hashlib.sha256(text.encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    _clear_other(folder, stamp)
    write_json_atomic(folder / _SETTINGS_FILE, {"hash": stamp, "settings": settings})
    rows = [{"case": c.case, "patient": c.patient, "site": c.site} for c in cases]
    write_csv_atomic(folder / "patients.csv", rows, ["case", "patient", "site"])
    missing = [case for case in cases if not (folder / case.case).is_dir()]
    done = len(cases) - len(missing)
    if progress:
        progress(done, len(cases))
    count = min(workers or os.cpu_count() or 1, len(missing))
    if count <= 1:
        for case in missing:
            write_case(folder, settings, case)
            done += 1
            if progress:
                progress(done, len(cases))
    else:
        # Spawned, not forked: the caller may run JAX, whose threads do not survive a fork.
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(write_case, str(folder), settings, case) for case in missing]
            for job in as_completed(jobs):
                job.result()
                done += 1
                if progress:
                    progress(done, len(cases))
    for leftover in folder.glob(".BDMAP_*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    return cases


def _clear_other(folder: Path, stamp: str) -> None:
    """Removes the cases of other settings."""
    record = folder / _SETTINGS_FILE
    there = sorted(folder.glob("BDMAP_*"))
    if not record.is_file():
        if there:
            raise UserError(
                f"{folder} holds cases such as {there[0].name} that are not the virtual cohort's."
                " Give the virtual cohort a folder of its own"
            )
        return
    if json.loads(record.read_text()).get("hash") == stamp:
        return
    (folder / "patients.csv").unlink(missing_ok=True)
    for case in there:
        # Renamed first: a folder that is half removed is never taken for a case.
        aside = folder / f".{case.name}.old.part"
        os.rename(case, aside)
        shutil.rmtree(aside)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
