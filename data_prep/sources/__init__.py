"""Public data sets: where their files lie and what their labels mean. One module each.

A source has `find(folder, settings, workers)`, which returns a `Found`: the cases that can be
prepared, and those that cannot, with the reason. It looks at names and tables only; the volumes are
read when a case is prepared.
"""

import importlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tumorjax import anatomy
from tumorjax.errors import CaseError, UserError
from tumorjax.files import check_case_id, read_csv

SOURCES = ("abdomen_atlas", "nnunet", "msd", "scans", "virtual")
ENDINGS = (".nii.gz", ".nii")

# Labels that name a pair without a side ("kidney"); sides are told apart when a case is prepared.
PAIRED: tuple[str, ...] = tuple(left.removesuffix("_left") for left, _ in anatomy.PAIRS)
# A label that is read and dropped.
IGNORED = ""

# Other names of the structures, as the public data sets have them. Names are compared in lower case
# with _ for blanks and hyphens.
ALIASES: dict[str, str] = {
    "gallbladder": "gall_bladder",
    "inferior_vena_cava": "postcava",
    "ivc": "postcava",
    "post_cava": "postcava",
    "urinary_bladder": "bladder",
    "celiac_aa": "celiac_trunk",
    "celiac_artery": "celiac_trunk",
    "oesophagus": "esophagus",
    "small_bowel": "intestine",
    "small_intestine": "intestine",
    "portal_and_splenic_vein": "portal_vein_and_splenic_vein",
    "hepatic_vessels": "hepatic_vessel",
    "adrenal": "adrenal_gland",
    "kidneys": "kidney",
    "lungs": "lung",
    "femurs": "femur",
    "femoral_head": "femur",
    "endometrioma": "endometrioma_tumor",
    "colon_cancer_primaries": "colon_lesion",
}
# How a tumour's host is named, and what may follow it: "renal mass", "kidney_tumor".
_HOST_WORDS: dict[str, tuple[str, ...]] = {
    "liver_lesion": ("liver", "hepatic"),
    "pancreatic_lesion": ("pancreas", "pancreatic"),
    "kidney_lesion": ("kidney", "renal"),
    "colon_lesion": ("colon", "colonic", "colorectal"),
    "esophagus_tumor": ("esophagus", "esophageal", "oesophagus", "oesophageal"),
}
TUMOR_WORDS = tuple(
    word + plural
    for word in ("tumor", "tumour", "lesion", "cancer", "mass", "carcinoma")
    for plural in ("", "s")
)
ALIASES |= {
    f"{host}_{word}": name
    for name, hosts in _HOST_WORDS.items()
    for host in hosts
    for word in TUMOR_WORDS
}


class LabelFile(NamedTuple):
    """A file of labels, and the anatomy (or paired, or ignored) name of each value but 0."""

    path: Path
    names: dict[int, str]


class ScanCase(NamedTuple):
    """One scan, as its source has it; of unlabelled ones `labels` is empty."""

    case: str
    image: Path
    labels: tuple[LabelFile, ...]
    patient: str
    site: str


class Found(NamedTuple):
    """What a source holds: cases by id, and what was set aside before any volume was read."""

    cases: list[ScanCase]
    rejected: list[CaseError]


def find(
    source: str, folder: Path, settings: Mapping[str, Any] | None = None, workers: int = 1
) -> Found:
    """Looks up the cases of a source.

    Args:
        source: one of `SOURCES`.
        folder: where the data set lies.
        settings: of the source; for all but the virtual one: labels, a mapping of its own label
            names to anatomy's, "" for labels to drop.
        workers: processes, for a source that makes its scans.

    Raises:
        UserError: the source is unknown, or the folder is not such a data set.
    """
    if source not in SOURCES:
        raise UserError(f"source is {source!r}. Expected one of {', '.join(SOURCES)}")
    settings = dict(settings or {})
    if source != "virtual":
        unknown = sorted(set(settings) - {"labels"})
        if unknown:
            raise UserError(f"source {source}: unknown settings {', '.join(unknown)}")
        if not folder.is_dir():
            raise UserError(f"input {str(folder)!r} is not a folder. Give the data set's folder")
    module = importlib.import_module(f"data_prep.sources.{source}")
    return check_ids(module.find(folder, settings, workers))


def check_ids(found: Found) -> Found:
    """Sets aside cases whose id is unusable or not the only one of its kind."""
    counts = Counter(case.case for case in found.cases)
    cases, rejected = [], list(found.rejected)
    for case in found.cases:
        try:
            check_case_id(case.case)
        except UserError as error:
            rejected.append(CaseError(case.case, str(error).split(". ")[0], "Rename the case"))
            continue
        if counts[case.case] == 1:
            cases.append(case)
        elif counts[case.case]:
            rejected.append(
                CaseError(
                    case.case,
                    f"{counts[case.case]} cases have this id, so none of them is used",
                    "Give each case an id of its own",
                )
            )
            counts[case.case] = 0
    return Found(sorted(cases), rejected)


def match_label(name: str, overrides: Mapping[str, str]) -> str | None:
    """Returns what a source's label is called here, or None if it is unknown.

    Args:
        name: the source's name.
        overrides: source's name -> anatomy's name, or "" to drop the label. Goes first.

    Returns:
        A name of `anatomy.LABELS`, one of `PAIRED`, or `IGNORED`.

    Raises:
        UserError: an override names no structure of anatomy.
    """
    plain = _plain(name)
    for key, target in overrides.items():
        if _plain(key) == plain:
            if not target:
                return IGNORED
            if target not in anatomy.LABELS and target not in PAIRED:
                raise UserError(
                    f"labels.{key} is {target!r}. Expected a structure of tumorjax.anatomy"
                    f" ({', '.join(anatomy.LABELS)}), {', '.join(PAIRED)}, or '' to drop it"
                )
            return target
    plain = ALIASES.get(plain, plain)
    for side in ("left", "right"):
        for pattern in (f"{side}_", f"_{side}"):
            organ = plain.replace(pattern, "", 1)
            organ = ALIASES.get(organ, organ)
            if pattern in plain and organ in PAIRED:
                plain = f"{organ}_{side}"
    return plain if plain in anatomy.LABELS or plain in PAIRED else None


def match_table(
    names: Mapping[int, str], overrides: Mapping[str, str], where: str
) -> dict[int, str]:
    """Returns value -> anatomy's name for a table of label values.

    A bare word for a tumour ("tumor", "cancer") is the tumour of the only organ in the table that
    can have one.

    Args:
        names: value -> source's name, without background.
        overrides: see `match_label`.
        where: the table's file, for errors.

    Raises:
        UserError: names are unknown or ambiguous; lists them.
    """
    matched = {value: match_label(name, overrides) for value, name in names.items()}
    hosts = {
        tumor for tumor, host in anatomy.HOST.items() for name in matched.values() if name == host
        or (name or "").removesuffix("_left").removesuffix("_right") == host
    }  # fmt: skip
    for value, name in names.items():
        if matched[value] is None and _plain(name) in TUMOR_WORDS and len(hosts) == 1:
            matched[value] = next(iter(hosts))
    unknown = [f"{names[value]!r} ({value})" for value, name in matched.items() if name is None]
    if unknown:
        raise UserError(
            f"{where}: unknown label names {', '.join(unknown)}. Map each to a structure of"
            " tumorjax.anatomy, or to '' to drop it, in the config's labels"
        )
    return {value: name for value, name in matched.items() if name is not None}


def read_patients(folder: Path) -> dict[str, tuple[str, str]]:
    """Reads patients.csv (case, patient, site), if there is one.

    Returns:
        Case -> (patient, site); "" where a field is empty.

    Raises:
        UserError: the table lacks a column, or names a case twice.
    """
    path = folder / "patients.csv"
    if not path.is_file():
        return {}
    try:
        rows = read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as CSV in UTF-8") from error
    patients: dict[str, tuple[str, str]] = {}
    for row in rows:
        if "case" not in row or "patient" not in row:
            raise UserError(f"{path}: expected the columns case, patient and, if wanted, site")
        if row["case"] in patients:
            raise UserError(f"{path}: case {row['case']!r} stands there twice. Keep one row")
        patients[row["case"]] = (row["patient"] or "", row.get("site") or "")
    return patients


def make_case(
    case: str,
    image: Path,
    labels: Iterable[LabelFile],
    patients: Mapping[str, tuple[str, str]],
    site: str,
) -> ScanCase:
    """Returns a case with its patient and site: by default its own id and the source."""
    patient, own_site = patients.get(case, ("", ""))
    return ScanCase(case, image, tuple(labels), patient or case, own_site or site)


def stem(path: Path) -> str | None:
    """Returns a NIfTI file's name without its ending; None for other and hidden files."""
    if path.name.startswith("."):
        return None
    ending = next((e for e in ENDINGS if path.name.endswith(e)), None)
    return path.name.removesuffix(ending) if ending else None


def _plain(name: str) -> str:
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")
