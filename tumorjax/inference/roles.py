"""What a network's structures are in the words of anatomy.py: tumours, and their organs."""

from collections.abc import Mapping, Sequence

from tumorjax.anatomy import HOST, LABELS, TUMORS, organ_labels
from tumorjax.errors import UserError
from tumorjax.inference.network import Network

# Parts of names that say of a label unknown to anatomy.py that it is a tumour.
_TUMOR_WORDS = ("tumor", "tumour", "lesion", "cancer", "metastas")


def anatomy_of(
    network: Network, names: Mapping[str, str | Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Returns the labels of anatomy.py that each structure of the output is or unites.

    Args:
        network: whose structures they are.
        names: structure -> label, or labels, of anatomy.py ("kidney" is both), for nnU-Net's labels
            with other names.

    Returns:
        Structure -> labels, none where the structure is not known.

    Raises:
        UserError: `names` has a structure that the network does not know, or an unknown label.
    """
    known = [structure.name for structure in network.structures]
    check_known("names", names, known)
    given = {}
    for name, labels in names.items():
        labels = (labels,) if isinstance(labels, str) else tuple(labels)
        if all(label in TUMORS for label in labels):
            given[name] = labels
        else:
            given[name] = tuple(one for label in labels for one in organ_labels(label))
    result = {}
    for name in known:
        own = (name,) if name in LABELS else tuple(network.classes.get(name, ()))
        result[name] = given.get(name, own)
    return result


def tumors_of(anatomy: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Returns the structures that are tumours; those unknown to anatomy.py are judged by name."""
    return tuple(
        name
        for name, labels in anatomy.items()
        if (labels and set(labels) <= set(TUMORS))
        or (not labels and any(word in name.lower() for word in _TUMOR_WORDS))
    )


def hosts_of(anatomy: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Returns tumour -> the structures that it may lie in, by anatomy.py's HOST."""
    tumors = tumors_of(anatomy)
    result = {}
    for tumor in tumors:
        organs = {one for label in anatomy[tumor] for one in organ_labels(HOST[label])}
        result[tumor] = tuple(
            name for name, labels in anatomy.items() if name not in tumors and organs & set(labels)
        )
    return result


def check_known(
    setting: str, names: Mapping[str, object] | Sequence[str], known: Sequence[str]
) -> None:
    """Checks that a setting names only what the network tells apart.

    Raises:
        UserError: it does not.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"config.{setting} has {', '.join(map(repr, unknown))}, which the checkpoint does not"
            f" know. It tells apart {', '.join(known)}"
        )
