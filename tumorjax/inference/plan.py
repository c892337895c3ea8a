"""What a prediction makes of each scan: settings checked against the networks and the output."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tumorjax.errors import UserError
from tumorjax.files import check_case_id, write_json_atomic
from tumorjax.inference import cleanup, ensemble, msd, roles
from tumorjax.inference.dicom_segmentation import Segment, segments_of
from tumorjax.inference.native_grid import Structure
from tumorjax.inference.network import Network
from tumorjax.inference.outputs import FORMATS, FORMS, Wanted
from tumorjax.inference.scans import Source
from tumorjax.locks import locked
from tumorjax.settings import first_difference, several


class Plan(NamedTuple):
    """What a run makes of each scan.

    Attributes:
        networks: the ensemble, at least one.
        table: structures as the networks' labels have them.
        written: the same with the values of the files, without those that are left out.
        tumors: names of those that are tumours.
        rules: of the clean-up.
        wanted: what is written.
        probabilities: indices of the classes that are kept.
        segments: of DICOM segmentations.
        record: all that masks depend on beside the scans, as JSON.
    """

    networks: list[Network]
    table: list[Structure]
    written: list[Structure]
    tumors: tuple[str, ...]
    rules: cleanup.Rules
    wanted: Wanted
    probabilities: tuple[int, ...]
    segments: list[Segment]
    record: dict[str, Any]


def check_settings(config: ConfigDict) -> None:
    """Checks what can be checked without looking at any file.

    Raises:
        UserError: a setting is unknown, empty or out of range.
    """
    for key, known in (("form", FORMS), ("probability_format", FORMATS)):
        if config[key] not in known:
            raise UserError(f"config.{key} is {config[key]!r}. Expected one of {', '.join(known)}")
    for key in ("checkpoint", "input"):
        if not several(config[key]):
            raise UserError(f"config.{key} is empty. Set it with --config.{key}=...")
    if not 0 <= config.part < config.num_parts:
        raise UserError(
            f"config.part is {config.part} and config.num_parts {config.num_parts}. Expected a part"
            " from 0 to num_parts - 1"
        )
    distance, minimum = config.cleanup.organ_distance, config.cleanup.minimum_mm3
    if (distance is not None and not distance >= 0) or not minimum >= 0:
        raise UserError(
            f"config.cleanup has organ_distance {distance} and minimum_mm3 {minimum}. Expected"
            " numbers from 0 on"
        )
    if config.msd:
        msd.task_of(config.msd)
        if config.form != "labels":
            raise UserError(f"config.form is {config.form!r}. The Decathlon takes labels")


def check_places(config: ConfigDict, scans: Mapping[str, Source], output: Path) -> None:
    """Checks that results do not fall among the scans, and that these are of the right kind.

    Raises:
        UserError: they do, or are not.
    """
    place = output.resolve()
    folders = [Path(entry).resolve() for entry in several(config.input)]
    for source in scans.values():
        parent = source.path.resolve() if source.slices else source.path.resolve().parent
        among = (parent, parent.parent) if source.path.name == "ct.nii.gz" else (parent,)
        if place in (*among, *folders):
            raise UserError(
                f"{output}: config.output is where the scans are. Choose another folder"
            )
        if config.form == "dicom" and not source.slices:
            raise UserError(
                f"{source.path}: NIfTI, and a DICOM segmentation has to name the series that it is"
                " of. Set config.form to labels or structures"
            )
        if config.msd and source.slices:
            raise UserError(f"{source.path}: DICOM. The Decathlon's images are NIfTI files")
    if config.msd:
        msd.check_cases(config.msd, list(scans))


def make_plan(config: ConfigDict, networks: list[Network]) -> Plan:
    """Returns what a run makes of each scan, and checks that the networks can.

    Raises:
        UserError: a setting names what the networks do not know, or needs what they have not.
    """
    table = networks[0].structures
    anatomy = roles.anatomy_of(networks[0], config.names)
    tumors = roles.tumors_of(anatomy)
    value = {structure.name: structure.value for structure in table}
    hosts = roles.hosts_of(anatomy)
    distance = config.cleanup.organ_distance
    homeless = [tumor for tumor in tumors if not hosts[tumor]]
    if distance is not None and homeless:
        raise UserError(
            f"config.cleanup.organ_distance is {distance}, and the checkpoint knows no organ of"
            f" {', '.join(homeless)}. It tells apart {', '.join(value)}; config.names says which of"
            " them is what. Or leave it out"
        )
    rules = cleanup.Rules(
        distance,
        float(config.cleanup.minimum_mm3),
        {value[tumor]: tuple(value[host] for host in hosts[tumor]) for tumor in tumors},
    )
    classes = list(networks[0].classes)
    roles.check_known("probabilities", config.probabilities, classes)
    for name in config.probabilities:
        check_case_id(name)
    wanted = Wanted(
        config.form,
        config.statistics,
        config.preview,
        tuple(config.probabilities),
        config.probability_format,
    )
    written = msd.structures_of(config.msd, table, anatomy, tumors) if config.msd else table
    segments = (
        segments_of([(one.name, one.value) for one in table], anatomy)
        if config.form == "dicom"
        else []
    )
    record = {
        "labels": {"background": 0} | {one.name: one.value for one in written},
        "form": config.form,
        **ensemble.record_of(networks),
    }
    if rules.change_anything:
        record["cleanup"] = {
            "organ_distance": distance,
            "minimum_mm3": rules.minimum_mm3,
            "hosts": {tumor: list(hosts[tumor]) for tumor in tumors},
        }
    if config.msd:
        record["msd"] = config.msd
    return Plan(
        networks,
        table,
        written,
        tumors,
        rules,
        wanted,
        tuple(classes.index(name) + 1 for name in config.probabilities),
        segments,
        json.loads(json.dumps(record)),
    )


def check_output(output: Path, has_masks: bool, record: dict[str, Any]) -> None:
    """Writes labels.json, or compares with the one that is there: masks must not be mixed.

    Its "labels" are those of an nnU-Net dataset.json, so that the job "evaluation" can read it.

    Raises:
        UserError: the output cannot be written, or holds masks of other settings.
    """
    path, lock = output / "labels.json", output / ".labels.lock"
    try:
        with locked(lock):
            if not path.is_file() and not has_masks:
                write_json_atomic(path, record)
            # Whoever waits for the removed lock finds the file there.
            lock.unlink(missing_ok=True)
        before = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{output}: holds masks of some of the scans, but no labels.json that says how they"
            " were made. Choose another config.output"
        ) from error
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}). Choose another config.output"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}). Remove it") from error
    difference = first_difference(before, record, "labels.json")
    if difference:
        raise UserError(
            f"{output}: holds masks made with other settings ({difference}). Choose another"
            " config.output, or remove it"
        )
