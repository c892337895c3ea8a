"""The synthetic half of a study: who draws its tumours, whom that was learned from, and what a cell
gets of it.

Rules learn from nobody. A diffusion model learns from scans, and may have seen none of the patients
that the study tests on. Either it was trained before, on patients of its own ("pool", as the paper
does), or every cell trains one on its own annotated scans ("cell"), so that the two arms have seen
the same annotations.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from tumorjax import anatomy
from tumorjax.clock import Clock
from tumorjax.data.cohort import Implant
from tumorjax.errors import UserError
from tumorjax.files import write_csv_atomic
from tumorjax.settings import plain
from tumorjax.synthesis import (
    autoencoder_training,
    diffusion_training,
    leakage,
    lesion_crops,
    synthesizers,
    trained_autoencoder,
    trained_diffusion,
)
from tumorjax.synthesis.store import make_store
from tumorjax.volumes import Store, open_store

TRAINED_ON = ("pool", "cell")
# In the folder of a cell that makes its own synthetic scans.
REJECTED = "rejected.csv"
Records = Mapping[str, Mapping[str, Any]]


class Origin(NamedTuple):
    """Where a study's synthetic tumours come from, for its report and its records.

    Attributes:
        synthesizer: name.
        trained_on: "pool" or "cell"; "" where nothing was learned.
        patients: that a pool's model has seen.
        scans: of these patients.
    """

    synthesizer: str
    trained_on: str
    patients: int | None = None
    scans: int | None = None


def check(settings: ConfigDict) -> None:
    """Refuses a synthesis section that cannot be run, before anything is made.

    Args:
        settings: the config's section synthesis.

    Raises:
        UserError: says which setting.
    """
    if settings.synthesizer not in synthesizers.SYNTHESIZERS:
        raise UserError(
            f"synthesis.synthesizer is {settings.synthesizer!r}. Expected one of"
            f" {', '.join(synthesizers.SYNTHESIZERS)}"
        )
    if settings.trained_on not in TRAINED_ON:
        raise UserError(
            f"synthesis.trained_on is {settings.trained_on!r}. Expected {' or '.join(TRAINED_ON)}"
        )
    learned = settings.synthesizer != "rules"
    by_cell = learned and settings.trained_on == "cell"
    if settings.checkpoint and (by_cell or not learned):
        why = "cells train their own" if by_cell else "rules have none"
        raise UserError(f"synthesis.checkpoint is {settings.checkpoint!r}, but {why}. Leave it out")
    if learned and not by_cell and not settings.checkpoint:
        raise UserError(
            "synthesis.checkpoint is empty. Give the workdir of a job 'diffusion', or let every"
            " cell train its own with --config.synthesis.trained_on=cell"
        )
    if by_cell and settings.online:
        raise UserError(
            "synthesis.online needs a synthesizer that is there before the cells: rules, or"
            " trained_on=pool"
        )


def origin(settings: ConfigDict, tests: Records) -> Origin:
    """Returns where a study's tumours come from; refuses a model that has seen a test patient.

    Args:
        settings: the config's section synthesis.
        tests: case -> the store's record, of all test scans.

    Raises:
        UserError: the model has seen test patients, or is not there.
    """
    if settings.synthesizer == "rules":
        return Origin("rules", "")
    if settings.trained_on == "cell":
        return Origin(settings.synthesizer, "cell")
    trained_on = trained_diffusion.load(settings.checkpoint).trained_on
    refuse_seen(trained_on, tests, settings.checkpoint)
    return Origin(
        settings.synthesizer, "pool", len(trained_on["patients"]), len(trained_on["images"])
    )


def refuse_seen(trained_on: Mapping[str, Any], tests: Records, name: str | Path) -> None:
    """Refuses a synthesizer that has seen a scan or a patient of the tests.

    Raises:
        UserError: it has; how many, and some of them.
    """
    seen = leakage.overlap(trained_on, tests)
    if seen:
        raise UserError(
            f"{name}: the synthesizer was trained on {len(seen)} of the {len(tests)} test scans or"
            f" their patients ({', '.join(seen[:3])}{', ...' * (len(seen) > 3)}), so its tumours"
            " would tell what is tested. Train one on other patients, or hold others out"
        )


def of_cell(
    config: ConfigDict,
    implants: Sequence[Implant],
    store: Store,
    real: Sequence[str],
    tests: Records,
    folder: Path,
    mesh: Mesh,
    clock: Clock,
) -> Store:
    """Trains a synthesizer on a cell's annotated scans and makes the cell's synthetic scans by it.

    What is there of an earlier run is gone on from.

    Args:
        config: of the study, with the cell's seed.
        implants: the cell's part of the plan.
        store: of the scans.
        real: the cell's annotated scans.
        tests: case -> the store's record, of all test scans.
        folder: the cell's; gets synthesizer/, synthetic/ and `REJECTED`, the implants that were set
            aside.
        mesh: of the devices.
        clock: gets the phases load, train and synthesize.

    Returns:
        The store of the synthetic scans.

    Raises:
        UserError: the scans have no tumour, or training failed.
    """
    own, settings = folder / "synthesizer", config.synthesis
    sources = [(store, case) for case in real]
    # All scans are trained on: with one or three there is none to hold out.
    shared = {"seed": config.seed, "preparation": config.preparation, "data": {"held_out": 0.0}}
    shared |= {"mesh": config.mesh}
    first = ConfigDict(shared | dict(settings.networks.autoencoder) | {"job": "autoencoder"})
    autoencoder_training.fit(first, sources, [], own / "autoencoder", mesh, clock=clock)
    autoencoder = trained_autoencoder.load(own / "autoencoder")
    organs = lesion_crops.organs_of(lesion_crops.find_lesions(sources))
    second = ConfigDict(shared | dict(settings.networks.diffusion) | {"job": "diffusion"})
    diffusion_training.fit(second, sources, [], organs, autoencoder, own, mesh, clock=clock)
    refuse_seen(trained_diffusion.load(own).trained_on, tests, own)
    known = [implant for implant in implants if anatomy.HOST[implant.tumor] in organs]
    rejected: list[dict[str, Any]] = [
        {
            "case": implant.name,
            "stage": "synthesis",
            "reason": f"{folder.name}: none of its annotated scans has a {implant.tumor}",
        }
        for implant in implants
        if implant not in known
    ]
    url = str(folder / "synthetic")
    with clock("synthesize"):
        made_by = plain(settings) | {"checkpoint": str(own)}
        rejected += [dict(row) for row in make_store(store, url, known, made_by)]
    write_csv_atomic(folder / REJECTED, rejected, ("case", "stage", "reason"))
    return open_store(url)


def sentence(source: Mapping[str, Any]) -> str:
    """Returns an `Origin` in words, for the report."""
    name = {"rules": "hand-written rules", "diffusion": "a diffusion model"}[source["synthesizer"]]
    if not source["trained_on"]:
        return f"Synthetic tumours are drawn by {name}, which learned from no scan."
    if source["trained_on"] == "cell":
        return (
            f"Synthetic tumours are drawn by {name} that each training made anew from its own"
            " annotated scans."
        )
    return (
        f"Synthetic tumours are drawn by {name} that was trained on a pool of {source['scans']}"
        f" scans of {source['patients']} other patients, whose annotations are not counted here."
        " None of them is tested on."
    )
