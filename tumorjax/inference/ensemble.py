"""One network or several: opened, run on a scan, and their probabilities averaged.

Members may differ in architecture, patch, spacing and window, and be trained here or by nnU-Net;
what they tell apart must be the same. Those that see a scan alike (`Network.grid`) are averaged on
the network's grid, which is the same as on the scan's, since both ways are linear. Others meet on
the scan's own grid, one class at a time.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, UInt8
from ml_collections import ConfigDict

from tumorjax.errors import UserError
from tumorjax.geometry import from_canonical, to_canonical
from tumorjax.inference import nnunet_model, sliding_window, trained_here
from tumorjax.inference.native_grid import body_middle, values_by_side
from tumorjax.inference.network import Network, Prepared
from tumorjax.models import nnunet_plans
from tumorjax.nifti import Scan
from tumorjax.settings import several


class Answer(NamedTuple):
    """What the members that see a scan alike say of it.

    Attributes:
        network: the first of them.
        prepared: the scan as they see it.
        scores: output of the sliding window, of several the mean.
        members: how many they are.
    """

    network: Network
    prepared: Prepared
    scores: Float[np.ndarray, "x y z classes"]
    members: int


# ---------------------------------------------------------------------------- networks


def open_networks(config: ConfigDict) -> list[Network]:
    """Opens the networks of config.checkpoint.

    Raises:
        UserError: a folder holds no network, or they do not tell the same structures apart.
    """
    folders = several(config.checkpoint)
    if len(folders) > 1 and config.step is not None:
        raise UserError(
            f"config.step is {config.step}, and there are {len(folders)} checkpoints. Leave it out:"
            " the newest of each is taken"
        )
    networks = [open_network(config, folder) for folder in folders]
    first = networks[0]
    for folder, network in zip(folders[1:], networks[1:], strict=True):
        if not _agree(network, first):
            raise UserError(
                f"{folders[0]} tells apart {_told_apart(first)}, and {folder}"
                f" {_told_apart(network)}. An ensemble needs the same classes in the same order"
            )
    regions = [f for f, n in zip(folders, networks, strict=True) if _has_regions(n)]
    if regions and len(folders) > 1:
        raise UserError(
            f"{regions[0]}: predicts overlapping regions, which are not averaged here. Give it"
            " alone, or leave it out"
        )
    return networks


def open_network(config: ConfigDict, folder: str | None = None) -> Network:
    """Opens one network, whether it was trained here or by nnU-Net.

    Args:
        config: of the prediction job.
        folder: of the network; None for config.checkpoint.

    Raises:
        UserError: the folder holds neither, or what it holds does not belong together.
    """
    folder = config.checkpoint if folder is None else folder
    if nnunet_plans.is_model_folder(folder):
        if config.step is not None:
            raise UserError(
                f"config.step is {config.step}, but {folder} is nnU-Net's and has no steps. Leave"
                " it out"
            )
        return nnunet_model.open_network(folder, config.folds, config.inference, config.form)
    if config.folds:
        raise UserError(
            f"config.folds is {tuple(config.folds)}, but {folder} is no model folder of nnU-Net (no"
            " plans.json in it). Leave it out"
        )
    return trained_here.open_network(folder, config.step, config.inference)


def _agree(a: Network, b: Network) -> bool:
    """Whether two networks tell the same apart; values of the output may differ."""
    if [one._replace(value=0) for one in a.structures] != [
        one._replace(value=0) for one in b.structures
    ]:
        return False
    unions = zip(a.classes.values(), b.classes.values(), strict=True)
    return all(not one or not other or set(one) == set(other) for one, other in unions)


def _told_apart(network: Network) -> str:
    names = [
        name if set(labels) <= {name} else f"{name} ({' + '.join(labels)})"
        for name, labels in network.classes.items()
    ]
    return ", ".join(names)


def _has_regions(network: Network) -> bool:
    # Of classes, the background takes part in the softmax; regions have no background.
    return "nnunet" in network.record and any(
        isinstance(value, list) and len(value) > 1
        for value in network.record["nnunet"]["dataset"]["labels"].values()
    )


def record_of(networks: Sequence[Network]) -> dict[str, Any]:
    """Returns all of the networks that masks depend on, as JSON."""
    records = [_record_of(network) for network in networks]
    return records[0] if len(records) == 1 else {"members": records}


def _record_of(network: Network) -> dict[str, Any]:
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(network.apply):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    # The batch size changes nothing but the speed; the mirror table follows from the classes.
    inference = {k: v for k, v in network.window.items() if k not in ("batch_size", "mirror_table")}
    return {
        "inference": inference,
        "patch_size": list(network.patch_size),
        **network.record,
        "weights_sha256": hashed.hexdigest(),
    }


# ---------------------------------------------------------------------------- scans


def prepare(networks: Sequence[Network], scan: Scan) -> list[Prepared]:
    """Returns what each group of networks that see scans alike sees of one.

    Raises:
        CaseError: its values are not such as the networks were trained on.
    """
    return [group[0].prepare(scan) for group in _groups(networks)]


def answers(networks: Sequence[Network], prepared: Sequence[Prepared]) -> list[Answer]:
    """Runs the networks over a scan.

    Args:
        networks: of the ensemble.
        prepared: the scan, from `prepare`.
    """
    result = []
    for group, image in zip(_groups(networks), prepared, strict=True):
        scores: Any = None
        for network in group:
            found = sliding_window.predict(
                network.apply, image.image, network.patch_size, **network.window
            )
            if scores is None:
                scores = found
            else:
                scores = np.add(scores, found, out=scores if scores.flags.writeable else None)
        if len(group) > 1:
            scores *= np.float32(1 / len(group))
        result.append(Answer(group[0], image, scores, len(group)))
    return result


def labels(answered: Sequence[Answer]) -> UInt8[np.ndarray, "i j k"]:
    """Returns the label map of the mean probabilities, on the scan's own grid."""
    first = answered[0]
    if len(answered) == 1:
        return first.network.labels(first.scores, first.prepared)
    classes = range(len(first.network.classes) + 1)
    best, winner = None, np.zeros(first.prepared.scan.image.shape, np.uint8)
    for index, one in zip(classes, probabilities(answered, classes), strict=True):
        if best is None:
            best = one
            continue
        better = one > best
        winner[better] = index
        np.copyto(best, one, where=better)
    return _values(winner, first)


def probabilities(
    answered: Sequence[Answer], classes: Sequence[int]
) -> Iterator[Float32[np.ndarray, "i j k"]]:
    """Yields the mean probability of classes on the scan's own grid, one after the other.

    Args:
        answered: by the networks.
        classes: indices, 0 for background.
    """
    total = sum(answer.members for answer in answered)
    each = [
        answer.network.probabilities(answer.scores, answer.prepared, classes) for answer in answered
    ]
    for volumes in zip(*each, strict=True):
        if len(volumes) == 1:
            yield volumes[0]
            continue
        mean = np.zeros(volumes[0].shape, np.float32)
        for volume, answer in zip(volumes, answered, strict=True):
            mean += volume * np.float32(answer.members / total)
        yield mean


def _groups(networks: Sequence[Network]) -> list[list[Network]]:
    groups: dict[Any, list[Network]] = {}
    for index, network in enumerate(networks):
        groups.setdefault(network.grid or index, []).append(network)
    return list(groups.values())


def _values(winner: UInt8[np.ndarray, "i j k"], first: Answer) -> UInt8[np.ndarray, "i j k"]:
    """Turns class indices into the values of the structures, as `native_labels` does."""
    left, right = values_by_side(first.network.structures)
    if (left == right).all():
        return left[winner]
    # Only networks trained here have sides, and their axes are RAS+.
    turned, _ = to_canonical(winner, first.prepared.scan.affine)
    middle = round(body_middle(first.prepared.image) * turned.shape[0])
    both = np.concatenate([left[turned[:middle]], right[turned[middle:]]])
    return from_canonical(both, first.prepared.scan.affine)
