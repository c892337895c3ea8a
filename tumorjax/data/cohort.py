"""Who is trained on and who is tested on: splits, nested subsets and the synthetic arm's plan.

Everything here works on the store's records and on patients, never on single scans: all scans of
a patient are on the same side of every border. The split and the plan of synthetic scans depend
on the cohort's seed alone, so that all cells of a grid share them; only the order in which
annotated scans are added (`subset`) depends on a cell's seed.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tumorjax import anatomy
from tumorjax.errors import UserError

Records = Mapping[str, Mapping[str, Any]]
Classes = Mapping[str, Sequence[str]]

ARMS = ("real", "real+synthetic")

DEFAULT: dict[str, Any] = {
    # Sites that are never trained on: their patients are the out-of-distribution test.
    "ood_sites": (),
    # Patients of the other sites that are held out: a number from 1 on, or a share below 1.
    "id_test": 0.2,
    # Patients of `ood_sites` that are tested; 1.0 tests all of them.
    "ood_test": 1.0,
    # Whose scans can be bought as annotated ones: "tumor" patients, or "all".
    "annotated": "tumor",
}

# The stratum of patients without a tumour of the task.
_HEALTHY = "healthy"

# What a stream of random numbers is for, so that no two uses share one.
_ID_TEST, _OOD_TEST, _ORDER, _PLAN = 1, 2, 3, 4


@dataclass(frozen=True)
class Split:
    """Case ids by role. Each list is sorted, and no patient is in two roles of training and test.

    Attributes:
        train: scans that can serve as annotated ones.
        healthy: scans of training patients without a tumour of the task: where synthetic tumours
            go. They overlap with `train` only where the cohort's `annotated` is "all".
        id_test: held-out scans of the training sites.
        ood_test: scans of the sites that are never trained on.
        tumors: the task's tumour labels, in the order of the task's classes.
    """

    train: tuple[str, ...]
    healthy: tuple[str, ...]
    id_test: tuple[str, ...]
    ood_test: tuple[str, ...]
    tumors: tuple[str, ...]


@dataclass(frozen=True)
class Implant:
    """One synthetic scan to be made: which tumour goes into which healthy scan.

    Attributes:
        name: the synthetic scan's case id; it changes with any of the other fields.
        case: the healthy scan.
        tumor: a tumour's label name; `anatomy.HOST` names the organ that it goes into.
        size: a size group's name, a key of the synthesis settings' `sizes`.
        seed: of this implant alone.
    """

    name: str
    case: str
    tumor: str
    size: str
    seed: int


def split(records: Records, settings: Mapping[str, Any], seed: int, classes: Classes) -> Split:
    """Divides a store's patients into training and the two tests.

    A patient with a scan at one of `ood_sites` is an out-of-distribution patient; scans of such a
    patient at other sites are used for nothing. The in-distribution test takes its share of each
    stratum (patients by their rarest tumour, and those without), at least one patient of each as
    far as its number allows, and never a stratum's last patient. Synthetic cases are left out.

    Args:
        records: case id -> the store's record (`patient`, `site`, `labels`).
        settings: the config's cohort section; see `DEFAULT`.
        seed: of the cohort, the same for all cells.
        classes: the task's classes. Without a tumour among them all patients count as annotated
            and none as healthy.

    Raises:
        UserError: a setting is wrong, a site is unknown, or nothing is left to train or test on.
    """
    settings = _with_defaults(settings)
    tumors = _task_tumors(classes)
    real = {case: record for case, record in records.items() if not record.get("synthetic")}
    scans = _by_patient(real)
    sites = sorted({str(_site(record)) for record in real.values()})
    ood_sites = tuple(settings["ood_sites"])
    if unknown := sorted(set(ood_sites) - set(sites)):
        raise UserError(
            f"cohort.ood_sites has {', '.join(unknown)}, which no scan comes from."
            f" The store's sites: {', '.join(sites)}"
        )
    outside = {
        patient
        for patient, cases in scans.items()
        if any(_site(real[case]) in ood_sites for case in cases)
    }
    strata = _strata(scans, real, tumors)

    def draw(patients: set[str], key: str, stream: int, keep: int) -> set[str]:
        groups = {name: sorted(patients & set(members)) for name, members in strata.items()}
        groups = {name: members for name, members in groups.items() if members}
        count = _count(settings[key], len(patients), key)
        return set(_draw(groups, count, keep, np.random.default_rng([seed, stream])))

    inside = set(scans) - outside
    held_out = draw(inside, "id_test", _ID_TEST, keep=1) if inside else set()
    ood_patients = draw(outside, "ood_test", _OOD_TEST, keep=0) if outside else set()
    training = inside - held_out
    with_tumor = {patient for name in tumors for patient in strata.get(name, ())}
    everyone = not tumors or settings["annotated"] == "all"
    annotated = training if everyone else training & with_tumor
    return Split(
        train=_cases(scans, annotated),
        healthy=_cases(scans, training - with_tumor) if tumors else (),
        id_test=_cases(scans, held_out),
        ood_test=tuple(
            case for case in _cases(scans, ood_patients) if _site(real[case]) in ood_sites
        ),
        tumors=tumors,
    )


def subset(split: Split, records: Records, n_real: int, seed: int) -> list[str]:
    """Returns the annotated scans of a cell: the first `n_real` of an order that the seed fixes.

    So a seed's smaller subsets lie inside its larger ones. The order goes patient by patient, a
    patient's scans next to each other (those with a tumour first), and `n_real` counts scans; so
    the last patient may be cut short. The first patients bring one tumour class each, the commonest
    class first, until all are there; from then on each class keeps to its share of the training
    patients as closely as whole patients allow.

    Args:
        split: from `split`.
        records: case id -> the store's record.
        n_real: number of scans.
        seed: of the cell.

    Raises:
        UserError: there are fewer scans than `n_real`.
    """
    if n_real < 1:
        raise UserError(f"n_real is {n_real}, expected at least 1")
    if n_real > len(split.train):
        raise UserError(_too_many(n_real, split))
    return _training_order(split, records, seed)[:n_real]


def plan_synthetic(
    split: Split, records: Records, n: int, settings: Mapping[str, Any], seed: int
) -> list[Implant]:
    """Plans `n` synthetic scans; the first `n` of any longer plan are the same.

    A cell with `n_real` scans uses the first `per_real * n_real`. Tumour classes take turns, in a
    new order each round; within a class the sizes keep to their ratio from the start, not only on
    average. The healthy scan is one of those used least so far in which the tumour's host organ is
    labelled.

    Args:
        split: from `split`.
        records: case id -> the store's record.
        n: number of synthetic scans.
        settings: the config's synthesis section: `sizes` maps a size group's name to its weight
            (paper: small 4, medium 2, large 1).
        seed: of the cohort, so that all cells share one store of synthetic scans.

    Raises:
        UserError: the task has no tumour, no healthy scan has a tumour's host organ, or `sizes`
            is not usable.
    """
    if n == 0:
        return []
    sizes = _check_sizes(settings["sizes"])
    hosts = _hosts(split, records)
    _check_no_leak(split, records)
    rng = np.random.default_rng([seed, _PLAN])
    size_streams = {tumor: _evenly(sizes, rng) for tumor in split.tumors}
    uses = dict.fromkeys(split.healthy, 0)
    implants: list[Implant] = []
    while len(implants) < n:
        for tumor in rng.permutation(np.array(split.tumors)).tolist():
            size = next(size_streams[tumor])
            least = min(uses[case] for case in hosts[tumor])
            candidates = [case for case in hosts[tumor] if uses[case] == least]
            case = candidates[rng.integers(len(candidates))]
            uses[case] += 1
            implant_seed = int(rng.integers(2**31))
            content = f"{case} {tumor} {size} {implant_seed}"
            digest = hashlib.sha256(content.encode()).hexdigest()[:8]
            name = f"synthetic-{len(implants):05d}-{digest}"
            implants.append(Implant(name, case, tumor, size, implant_seed))
    return implants[:n]


def check_grid(
    split: Split,
    records: Records,
    n_reals: Iterable[int],
    arms: Sequence[str] = ("real",),
    synthesis: Mapping[str, Any] | None = None,
) -> None:
    """Checks that a grid can be run with the scans that there are, before anything trains.

    Args:
        split: from `split`.
        records: case id -> the store's record.
        n_reals: the grid's numbers of annotated scans.
        arms: some of `ARMS`.
        synthesis: the config's synthesis section (`per_real`, `sizes`); needed for the arm
            real+synthetic.

    Raises:
        UserError: what is missing, how much there is, and what to change.
    """
    n_reals = list(n_reals)
    if not n_reals or any(isinstance(n, bool) or n != int(n) or n < 1 for n in n_reals):
        raise UserError(f"grid.n_real is {n_reals}, expected whole numbers from 1 on")
    if len(set(n_reals)) < len(n_reals):
        raise UserError(f"grid.n_real is {n_reals}: name each number once")
    if not arms or len(set(arms)) < len(arms) or set(arms) - set(ARMS):
        raise UserError(
            f"grid.arms is {list(arms)}, expected one or both of {', '.join(ARMS)}, each once"
        )
    _check_no_leak(split, records)
    if not split.train:
        wanted = f" with {' or '.join(split.tumors)}" if split.tumors else ""
        raise UserError(f"no training patient{wanted} is left. Add scans, or lower cohort.id_test")
    if max(n_reals) > len(split.train):
        raise UserError(_too_many(max(n_reals), split))
    for tumor in split.tumors:
        if not _tumors_of(split.train, records, [tumor]):
            raise UserError(
                f"no training patient has {tumor}, which is a class of the task."
                " Take it out of task.classes, add scans, or lower cohort.id_test"
            )
    if not split.id_test:
        raise UserError("the in-distribution test has no patients. Raise cohort.id_test")
    for key, cases in (("id_test", split.id_test), ("ood_test", split.ood_test)):
        if cases and split.tumors and not _tumors_of(cases, records, split.tumors):
            raise UserError(
                f"no patient of the {key} split has any of {', '.join(split.tumors)}, so nothing"
                f" could be measured there. Raise cohort.{key}, or choose other cohort.ood_sites"
            )
    if "real+synthetic" in arms:
        if synthesis is None:
            raise UserError("the arm real+synthetic needs the config's synthesis section")
        per_real = synthesis["per_real"]
        if isinstance(per_real, bool) or per_real != int(per_real) or per_real < 1:
            raise UserError(f"synthesis.per_real is {per_real}, expected a whole number from 1 on")
        _check_sizes(synthesis["sizes"])
        _hosts(split, records)


def _training_order(split: Split, records: Records, seed: int) -> list[str]:
    """Returns all training scans in the order in which a seed's subsets take them."""
    scans = _by_patient({case: records[case] for case in split.train})
    carried = {
        patient: _tumors_of(cases, records, split.tumors) for patient, cases in scans.items()
    }
    strata = _strata(scans, records, split.tumors)
    rng = np.random.default_rng([seed, _ORDER])
    queues = {
        name: [members[i] for i in rng.permutation(len(members))]
        for name, members in strata.items()
    }
    share = {name: len(members) / len(scans) for name, members in strata.items()}
    taken = dict.fromkeys(queues, 0)
    missing = set().union(*carried.values())
    order: list[str] = []
    for position in range(1, len(scans) + 1):
        tie = {name: rng.random() for name in queues}
        # While a class is missing, only patients who bring a missing one; else who is next.
        choices = {
            name: index
            for name, queue in queues.items()
            for index, patient in reversed(list(enumerate(queue if missing else queue[:1])))
            if not missing or carried[patient] & missing
        }
        name = max(choices, key=lambda name: (share[name] * position - taken[name], tie[name]))
        patient = queues[name].pop(choices[name])
        taken[name] += 1
        missing -= carried[patient]
        # Scans with a tumour come first: a patient who is cut short still has one.
        order += sorted(
            scans[patient],
            key=lambda case: (not _tumors_of([case], records, split.tumors), case),
        )
    return order


def _evenly(weights: Mapping[str, float], rng: np.random.Generator) -> Iterator[str]:
    """Yields names for ever, such that every beginning keeps to the weights within about one."""
    total = sum(weights.values())
    counts = dict.fromkeys(weights, 0)
    position = 0
    while True:
        position += 1
        tie = {name: rng.random() for name in weights}
        name = max(
            (name for name in weights if weights[name] > 0),
            key=lambda name: (weights[name] / total * position - counts[name], tie[name]),
        )
        counts[name] += 1
        yield name


def _draw(
    strata: Mapping[str, Sequence[str]], count: int, keep: int, rng: np.random.Generator
) -> list[str]:
    """Draws `count` patients, from each stratum its share by largest remainder.

    Every stratum gives at least one and keeps at least `keep`, as far as its number and `count`
    allow.
    """
    total = sum(len(members) for members in strata.values())
    most = {name: max(0, len(members) - keep) for name, members in strata.items()}
    quota = {name: count * len(members) / total for name, members in strata.items()}
    number = {name: min(math.floor(quota[name]), most[name]) for name in strata}
    for name in sorted(strata, key=lambda name: -quota[name]):
        if not number[name] and most[name] and sum(number.values()) < count:
            number[name] = 1
    while sum(number.values()) < count:
        room = [name for name in strata if number[name] < most[name]]
        if not room:
            break
        number[max(room, key=lambda name: quota[name] - number[name])] += 1
    return [
        strata[name][i]
        for name in strata
        for i in rng.permutation(len(strata[name]))[: number[name]].tolist()
    ]


def _strata(
    scans: Mapping[str, Sequence[str]], records: Records, tumors: Sequence[str]
) -> dict[str, list[str]]:
    """Groups patients by the rarest of the tumours that they have, or as healthy."""
    carried = {patient: _tumors_of(cases, records, tumors) for patient, cases in scans.items()}
    frequency = {tumor: sum(tumor in c for c in carried.values()) for tumor in tumors}
    strata: dict[str, list[str]] = {name: [] for name in (*tumors, _HEALTHY)}
    for patient in sorted(scans):
        rarest = min(
            (tumor for tumor in tumors if tumor in carried[patient]),
            key=lambda tumor: frequency[tumor],
            default=_HEALTHY,
        )
        strata[rarest].append(patient)
    return {name: members for name, members in strata.items() if members}


def _tumors_of(cases: Iterable[str], records: Records, tumors: Sequence[str]) -> set[str]:
    return {tumor for case in cases for tumor in tumors if tumor in records[case]["labels"]}


def _hosts(split: Split, records: Records) -> dict[str, list[str]]:
    """Returns, for each tumour, the healthy scans that its host organ is labelled in."""
    if not split.tumors:
        raise UserError(
            "the arm real+synthetic needs a tumour among task.classes. Add one, or run arm real"
        )
    if not split.healthy:
        raise UserError(
            f"no training patient is without {' and '.join(split.tumors)}, so there is no healthy"
            " scan to put synthetic tumours into. Add healthy scans, or run arm real only"
        )
    hosts = {}
    for tumor in split.tumors:
        organ = anatomy.HOST[tumor]
        labels = set(anatomy.organ_labels(organ))
        hosts[tumor] = [case for case in split.healthy if labels & set(records[case]["labels"])]
        if not hosts[tumor]:
            raise UserError(
                f"none of the {len(split.healthy)} healthy training scans has the label of"
                f" {organ}, where {tumor} would be put. Add scans with that organ, take {tumor}"
                " out of task.classes, or run arm real only"
            )
    return hosts


def _check_sizes(sizes: Mapping[str, float]) -> dict[str, float]:
    weights = {str(name): float(sizes[name]) for name in sorted(sizes)}
    if not any(weights.values()) or any(not 0 <= w < math.inf for w in weights.values()):
        raise UserError(
            f"synthesis.sizes is {weights}, expected weights of 0 or more, at least one above 0"
        )
    return weights


def _check_no_leak(split: Split, records: Records) -> None:
    """Raises if a patient is on both sides: a defect of whoever made the split."""

    def patients(cases: Iterable[str]) -> set[str]:
        return {_patient(case, records[case]) for case in cases}

    training = patients((*split.train, *split.healthy))
    for name, cases in (("id_test", split.id_test), ("ood_test", split.ood_test)):
        if both := training & patients(cases):
            raise ValueError(f"{len(both)} patients of {name} are in training: {sorted(both)[:3]}")


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    if unknown := sorted(set(settings) - set(DEFAULT)):
        raise UserError(
            f"cohort.{unknown[0]} is not a setting. Expected some of {', '.join(DEFAULT)}"
        )
    settings = DEFAULT | settings
    if isinstance(settings["ood_sites"], str):
        settings["ood_sites"] = (settings["ood_sites"],)
    if settings["annotated"] not in ("tumor", "all"):
        raise UserError(f"cohort.annotated is {settings['annotated']!r}, expected tumor or all")
    return settings


def _count(wanted: Any, total: int, key: str) -> int:
    """Turns a number of patients, or a share of them, into a number."""
    number = isinstance(wanted, int | float) and not isinstance(wanted, bool)
    if not number or not wanted > 0 or (wanted > 1 and wanted != int(wanted)):
        raise UserError(
            f"cohort.{key} is {wanted!r}, expected a whole number of patients or a share below 1"
        )
    count = int(wanted) if isinstance(wanted, int) or wanted > 1 else max(1, round(wanted * total))
    if count > total:
        raise UserError(
            f"cohort.{key} asks for {count} patients, but there are only {total} to draw from."
            " Lower it, or add patients"
        )
    return count


def _too_many(n_real: int, split: Split) -> str:
    wanted = f" with {' or '.join(split.tumors)}" if split.tumors else ""
    return (
        f"grid.n_real asks for {n_real} annotated scans, but training patients{wanted} have only"
        f" {len(split.train)}. Lower it, add scans, or lower cohort.id_test"
    )


def _by_patient(records: Records) -> dict[str, list[str]]:
    scans: dict[str, list[str]] = {}
    for case in sorted(records):
        scans.setdefault(_patient(case, records[case]), []).append(case)
    return scans


def _cases(scans: Mapping[str, Sequence[str]], patients: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(case for patient in patients for case in scans[patient]))


def _patient(case: str, record: Mapping[str, Any]) -> str:
    return str(record.get("patient") or case)


def _site(record: Mapping[str, Any]) -> str:
    return str(record.get("site") or record.get("source") or "unknown")


def _task_tumors(classes: Classes) -> tuple[str, ...]:
    return tuple(
        label for labels in classes.values() for label in labels if label in anatomy.TUMORS
    )
