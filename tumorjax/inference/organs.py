"""The job "synthesis" where a network finds the organs: scans need no masks.

Synthesis comes before inference in the order of modules, so that what finds organs is handed in
from here.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from tumorjax import anatomy
from tumorjax.errors import UserError
from tumorjax.inference import ensemble
from tumorjax.inference.network import Network
from tumorjax.inference.roles import anatomy_of
from tumorjax.nifti import Scan
from tumorjax.settings import plain
from tumorjax.synthesis import job


def run(config: ConfigDict, workdir: Path) -> int:
    """Puts tumours into scans, see `synthesis.job.run`; organs by config.checkpoint_organs if set.

    Raises:
        UserError: see there; or the network does not know an organ.
    """
    if not config.checkpoint_organs:
        return job.run(config, workdir)
    network = _open(config)
    names = plain(config.names)
    organs_from = ensemble.record_of([network]) | {"names": names}
    return job.run(config, workdir, finder(network, names), organs_from)


def finder(network: Network, names: Mapping[str, Any]) -> job.FindOrgans:
    """Returns what finds the structures of a scan: scan -> label map with the ids of `anatomy`.

    A structure that unites several organs is left out; one that is both kidneys counts as one.

    Args:
        network: that tells them apart.
        names: structure -> label of `anatomy`, see `roles.anatomy_of`.
    """
    table = np.zeros(256, np.uint8)
    parts = anatomy_of(network, names)
    pairs = [set(pair) for pair in anatomy.PAIRS]
    for structure in network.structures:
        labels = parts[structure.name]
        if len(labels) == 1 or set(labels) in pairs:
            table[structure.value] = anatomy.LABELS[labels[0]]
    # The device is one; scans beside each other would only hold its memory twice.
    one_at_a_time = threading.Lock()

    def find(scan: Scan) -> UInt8[np.ndarray, "i j k"]:
        with one_at_a_time:
            prepared = ensemble.prepare([network], scan)
            return table[ensemble.labels(ensemble.answers([network], prepared))]

    return find


def _open(config: ConfigDict) -> Network:
    settings: dict[str, Any] = {
        "checkpoint": config.checkpoint_organs,
        "step": None,
        "folds": (),
        "form": "labels",
        "inference": config.inference,
    }
    network = ensemble.open_network(ConfigDict(settings))
    known = {label for labels in anatomy_of(network, config.names).values() for label in labels}
    for organ in job.organs_of(config):
        if not set(anatomy.organ_labels(organ)) & known:
            raise UserError(
                f"{config.checkpoint_organs}: finds no {organ}: it tells apart"
                f" {', '.join(one.name for one in network.structures)}. Give another"
                " config.checkpoint_organs, or config.masks"
            )
    return network
