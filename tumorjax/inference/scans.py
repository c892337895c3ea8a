"""Which scans a prediction is asked for: files, folders, lists, and DICOM series."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tumorjax.errors import CaseError, UserError
from tumorjax.files import check_case_id
from tumorjax.inference import dicom
from tumorjax.nifti import ENDINGS, LEAST_HU_RANGE, Scan, read_ct
from tumorjax.settings import several

# Of a text file with a path a line.
LIST_ENDING = ".txt"


class Source(NamedTuple):
    """Where a scan is read from.

    Attributes:
        path: the NIfTI file, or the folder that a DICOM series lies in.
        slices: the files of a DICOM series; none for NIfTI.
    """

    path: Path
    slices: tuple[Path, ...] = ()


def find_scans(
    source: str | os.PathLike | Sequence[str],
) -> tuple[dict[str, Source], list[dict[str, str]]]:
    """Returns the scans of a setting by case id, and those that cannot be cases.

    Only names are looked at, and of DICOM files the headers' kinds and series.

    Args:
        source: a NIfTI file; a folder of them; a folder of folders with a ct.nii.gz; where there
            are none of these, a folder with DICOM series at any depth; a .txt file with a path of
            these a line (relative ones from the list's folder on, # begins a remark); or a sequence
            of paths.

    Returns:
        Case id -> source, in alphabetical order. nnU-Net's channel suffix _0000 is no part of the
        id. A DICOM series is called by its folders below the one given; where there are several in
        one folder, with the beginning of a hash of the series' UID.
        Rows (case, stage, reason) of what is set aside: unsafe ids, two files of one id, several
        channels, entries of a list that do not exist, series that are no CT.

    Raises:
        UserError: there is no such file, or no scan in the folder.
    """
    entries, is_list = _entries(source)
    found: list[tuple[str, Source]] = []
    rejected: list[dict[str, str]] = []
    for entry in entries:
        try:
            named, rows = _scans_of(entry, alone=not is_list)
        except UserError as error:
            if not is_list:
                raise
            named, rows = [], [_row(_stem(entry), error)]
        found += named
        rejected += rows
    if not found and not rejected:
        raise UserError(f"{source}: no scan in it (config.input)")

    stems = [name for name, _ in found]
    # A file ..._0001 is a second channel only beside a first one: else numbers end many a name.
    first_channels = {stem.removesuffix("_0000") for stem in stems if stem.endswith("_0000")}
    cases: dict[str, list[Source]] = {}
    for stem, one in found:
        base = stem[:-5]
        is_channel = stem[-5:-4] == "_" and stem[-4:].isdigit() and base in first_channels
        cases.setdefault(base if is_channel else stem, []).append(one)

    scans = {}
    for case, sources in sorted(cases.items()):
        try:
            check_case_id(case)
            if len(sources) > 1:
                paths = [one.path for one in sources]
                apart = len({path.parent for path in paths}) > 1
                names = ", ".join(str(path) if apart else path.name for path in paths)
                raise CaseError(case, f"{len(sources)} files of one case ({names})", "Keep one CT")
            scans[case] = sources[0]
        except (UserError, CaseError) as error:
            rejected.append(_row(case, error))
    return scans, rejected


def read_scan(source: Source, least_range: float = LEAST_HU_RANGE) -> Scan:
    """Reads a scan and checks that it can be one.

    Args:
        source: from `find_scans`.
        least_range: that values must span.

    Raises:
        CaseError: it cannot be used.
    """
    if source.slices:
        return dicom.read_series(str(source.path), source.slices, least_range)
    return read_ct(source.path, least_range=least_range)


def _entries(source: str | os.PathLike | Sequence[str]) -> tuple[list[Path], bool]:
    """Returns the paths that a setting names, and whether it is a list of them."""
    given = os.fspath(source) if isinstance(source, os.PathLike) else source
    names = several(given)
    if not isinstance(given, str) or names != [given]:
        return [Path(name) for name in names], True
    path = Path(given)
    if path.name.endswith(LIST_ENDING) and path.is_file():
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not readable as text. Expected a path a line") from error
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise UserError(f"{path}: no path in it. Expected one a line")
        return [path.parent / line for line in lines], True
    return [path], False


def _scans_of(path: Path, alone: bool) -> tuple[list[tuple[str, Source]], list[dict[str, str]]]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (config.input)")
    if path.is_file():
        if path.name.endswith(ENDINGS):
            return [(_name(path) if alone else _stem(path), Source(path))], []
        if dicom.is_dicom(path):
            raise UserError(f"{path}: one DICOM file. Give the folder that holds its whole series")
        raise UserError(
            f"{path}: expected a .nii.gz or .nii file, a folder of them, a folder with DICOM"
            f" series, or a {LIST_ENDING} file with a path a line"
        )
    files = [
        (_name(one) if one.parent == path else one.parent.name, Source(one))
        for one in _sorted_scans([*path.iterdir(), *path.glob("*/ct.nii.gz")])
    ]
    if files:
        return files, []
    series, rows = dicom.find_series(path)
    if not series and not rows:
        raise UserError(
            f"{path}: no .nii.gz or .nii file in it, no CASE/ct.nii.gz, and no DICOM series of CT."
            " Give the folder that holds the scans (nnU-Net: imagesTs)"
        )
    return [(name, Source(folder, slices)) for name, folder, slices in series], rows


def _sorted_scans(paths: Iterable[Path]) -> list[Path]:
    return sorted(
        path
        for path in paths
        if path.name.endswith(ENDINGS) and path.name[0] != "." and path.is_file()
    )


def _name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _stem(path: Path) -> str:
    """Returns the name that stands for a list's entry: of CASE/ct.nii.gz it is the folder's."""
    return path.resolve().parent.name if path.name == "ct.nii.gz" else _name(path)


def _row(case: str, error: Exception) -> dict[str, str]:
    return {"case": case, "stage": "find", "reason": str(error)}
