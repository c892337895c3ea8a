"""Splits, nested subsets and the synthetic arm's plan: no patient on both sides, ever."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tumorjax.data import cohort
from tumorjax.errors import UserError

CLASSES = {
    "liver": ("liver",),
    "pancreas": ("pancreas",),
    "kidney": ("kidney_left", "kidney_right"),
    "liver_lesion": ("liver_lesion",),
    "pancreatic_lesion": ("pancreatic_lesion",),
    "kidney_lesion": ("kidney_lesion",),
}
TUMORS = ("liver_lesion", "pancreatic_lesion", "kidney_lesion")
SETTINGS = {"ood_sites": ("east",), "id_test": 0.2}
SYNTHESIS = {"per_real": 3, "sizes": {"small": 4, "medium": 2, "large": 1}}


def make_records(patients: int = 120, scans_each: int = 2, seed: int = 1) -> dict:
    """A cohort of four sites in which liver lesions are common and kidney lesions rare."""
    rng = np.random.default_rng(seed)
    records = {}
    for patient in range(patients):
        site = ("north", "south", "west", "east")[patient % 4]
        tumors = [t for t, p in zip(TUMORS, (0.4, 0.2, 0.08), strict=True) if rng.random() < p]
        if patient // 4 < 3:  # each site has each tumour, and a patient without any
            tumors = [TUMORS[patient // 4]]
        elif patient // 4 == 3:
            tumors = []
        for scan in range(1 + int(rng.integers(scans_each))):
            records[f"case{patient:03d}-{scan}"] = {
                "patient": f"p{patient:03d}",
                "site": site,
                "labels": ["liver", "pancreas", "kidney_left", "kidney_right", "spleen", *tumors],
                "synthetic": None,
            }
    return records


def patients_of(records: dict, cases) -> set[str]:
    return {records[case]["patient"] for case in cases}


@pytest.fixture(scope="module")
def records() -> dict:
    return make_records()


@pytest.fixture(scope="module")
def split(records) -> cohort.Split:
    return cohort.split(records, SETTINGS, 0, CLASSES)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("annotated", ["tumor", "all"])
def test_no_patient_is_in_training_and_in_a_test(records, seed, annotated):
    split = cohort.split(records, SETTINGS | {"annotated": annotated}, seed, CLASSES)
    training = patients_of(records, split.train + split.healthy)
    assert not training & patients_of(records, split.id_test)
    assert not training & patients_of(records, split.ood_test)
    assert not patients_of(records, split.id_test) & patients_of(records, split.ood_test)
    used = set(split.train) | set(split.healthy) | set(split.id_test) | set(split.ood_test)
    assert used == set(records)


def test_sites_decide_what_is_out_of_distribution(records, split):
    assert {records[case]["site"] for case in split.ood_test} == {"east"}
    rest = split.train + split.healthy + split.id_test
    assert {records[case]["site"] for case in rest} == {"north", "south", "west"}
    assert len(patients_of(records, split.ood_test)) == 30


def test_roles_follow_the_tumours(records, split):
    assert split.tumors == TUMORS
    assert all(set(TUMORS) & set(records[case]["labels"]) for case in split.train)
    assert not any(set(TUMORS) & set(records[case]["labels"]) for case in split.healthy)
    everyone = cohort.split(records, SETTINGS | {"annotated": "all"}, 0, CLASSES)
    assert set(everyone.train) == set(split.train) | set(split.healthy)
    assert everyone.healthy == split.healthy


def test_the_test_share_holds_in_each_stratum(records, split):
    inside = {case: r for case, r in records.items() if r["site"] != "east"}
    assert len(patients_of(records, split.id_test)) == round(0.2 * 90)
    for tumor in TUMORS:
        everyone = patients_of(records, [c for c in inside if tumor in inside[c]["labels"]])
        tested = patients_of(records, [c for c in split.id_test if tumor in records[c]["labels"]])
        assert 1 <= len(tested) < len(everyone)
        assert len(tested) == pytest.approx(0.2 * len(everyone), abs=2.5)


def test_a_number_of_test_patients_is_kept_exactly(records):
    for number in (4, 11, 30):
        split = cohort.split(records, SETTINGS | {"id_test": number}, 3, CLASSES)
        assert len(patients_of(records, split.id_test)) == number
    few = cohort.split(records, SETTINGS | {"ood_test": 7}, 3, CLASSES)
    assert len(patients_of(records, few.ood_test)) == 7
    one = cohort.split(records, SETTINGS | {"ood_test": 1}, 3, CLASSES)
    assert len(patients_of(records, one.ood_test)) == 1


def test_the_split_is_a_function_of_the_records_and_the_seed(records, split):
    shuffled = dict(sorted(records.items(), key=lambda item: hash(item[0])))
    assert cohort.split(shuffled, SETTINGS, 0, CLASSES) == split
    assert cohort.split(records, SETTINGS, 1, CLASSES).id_test != split.id_test


def test_a_patient_seen_at_both_kinds_of_site_is_not_trained_on(records):
    both = {
        "away": records["case000-0"] | {"patient": "traveller", "site": "east"},
        "home": records["case000-0"] | {"patient": "traveller", "site": "north"},
    }
    split = cohort.split(records | both, SETTINGS, 0, CLASSES)
    assert "away" in split.ood_test
    assert "home" not in split.train + split.healthy + split.id_test + split.ood_test


def test_synthetic_cases_of_a_store_are_left_out(records, split):
    made = {"made": records["case000-0"] | {"patient": "made", "synthetic": {"from": "case000-0"}}}
    assert cohort.split(records | made, SETTINGS, 0, CLASSES) == split


def test_without_tumour_classes_everyone_is_annotated(records):
    split = cohort.split(records, SETTINGS, 0, {"liver": ("liver",)})
    assert split.tumors == ()
    assert split.healthy == ()
    assert len(patients_of(records, split.train)) == 90 - 18


@pytest.mark.parametrize("seed", range(6))
def test_smaller_subsets_lie_inside_larger_ones(records, split, seed):
    orders = [
        cohort.subset(split, records, n, seed) for n in (1, 2, 3, 7, 20, 41, len(split.train))
    ]
    for smaller, larger in pairwise(orders):
        assert larger[: len(smaller)] == smaller
    assert sorted(orders[-1]) == list(split.train)


def test_each_seed_has_its_own_order(records, split):
    orders = {tuple(cohort.subset(split, records, 10, seed)) for seed in range(8)}
    assert len(orders) == 8


@pytest.mark.parametrize("seed", range(6))
def test_each_tumour_is_there_as_soon_as_the_number_allows(seed):
    records = make_records(scans_each=1)
    split = cohort.split(records, SETTINGS, 0, CLASSES)
    for n in (3, 4, 10):
        subset = cohort.subset(split, records, n, seed)
        assert {t for c in subset for t in records[c]["labels"]} >= set(TUMORS)
    first = records[cohort.subset(split, records, 1, seed)[0]]["labels"]
    assert "liver_lesion" in first  # the commonest


@pytest.mark.parametrize("seed", range(4))
def test_subsets_keep_the_classes_shares(seed):
    records = make_records(patients=400, scans_each=1)
    split = cohort.split(records, SETTINGS, 0, CLASSES)
    share = {
        tumor: np.mean([tumor in records[case]["labels"] for case in split.train])
        for tumor in TUMORS
    }
    for n in (20, 50, 100):
        subset = cohort.subset(split, records, n, seed)
        for tumor in TUMORS:
            count = sum(tumor in records[case]["labels"] for case in subset)
            assert count == pytest.approx(share[tumor] * n, abs=0.1 * n + 1)


def test_a_patients_scans_stay_together_in_the_order(records, split):
    order = cohort.subset(split, records, len(split.train), 0)
    patients = [records[case]["patient"] for case in order]
    runs = [p for i, p in enumerate(patients) if i == 0 or patients[i - 1] != p]
    assert len(runs) == len(set(runs))


def test_asking_for_more_scans_than_there_are_says_how_many_there_are(records, split):
    available = len(split.train)
    with pytest.raises(UserError, match=rf"asks for {available + 1} .* only {available}\b"):
        cohort.subset(split, records, available + 1, 0)
    with pytest.raises(UserError, match=rf"only {available}\b"):
        cohort.check_grid(split, records, [4, available + 1])


def test_the_synthetic_plan_is_nested_and_reproducible(records, split):
    plan = cohort.plan_synthetic(split, records, 60, SYNTHESIS, 0)
    assert plan == cohort.plan_synthetic(split, records, 300, SYNTHESIS, 0)[:60]
    assert plan != cohort.plan_synthetic(split, records, 60, SYNTHESIS, 1)
    assert len({implant.name for implant in plan}) == 60
    assert len({implant.seed for implant in plan}) == 60
    assert cohort.plan_synthetic(split, records, 0, SYNTHESIS, 0) == []


def test_names_change_with_what_they_stand_for(records, split):
    plans = [cohort.plan_synthetic(split, records, 40, SYNTHESIS, seed) for seed in range(3)]
    names = [implant.name for plan in plans for implant in plan]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("n", [21, 42, 210])
def test_synthetic_tumours_and_sizes_keep_their_ratios(records, split, n):
    plan = cohort.plan_synthetic(split, records, n, SYNTHESIS, 0)
    assert set(Counter(i.tumor for i in plan).values()) == {n // 3}
    for tumor in TUMORS:
        sizes = Counter(i.size for i in plan if i.tumor == tumor)
        assert sizes == {"small": n * 4 // 21, "medium": n * 2 // 21, "large": n // 21}


def test_synthetic_tumours_go_into_healthy_training_scans_evenly(records, split):
    plan = cohort.plan_synthetic(split, records, 4 * len(split.healthy), SYNTHESIS, 0)
    assert set(Counter(i.case for i in plan).values()) == {4}
    assert {i.case for i in plan} == set(split.healthy)
    tested = patients_of(records, split.id_test + split.ood_test)
    assert not tested & patients_of(records, [i.case for i in plan])


def test_a_tumour_goes_only_where_its_organ_is_labelled(records, split):
    fewer = {
        case: record | {"labels": [x for x in record["labels"] if not x.startswith("kidney_")]}
        if case in split.healthy[5:]
        else record
        for case, record in records.items()
    }
    plan = cohort.plan_synthetic(split, fewer, 90, SYNTHESIS, 0)
    assert {i.case for i in plan if i.tumor == "kidney_lesion"} == set(split.healthy[:5])


def test_a_leaking_split_is_refused(records, split):
    leaking = cohort.Split(
        split.train, split.healthy + split.id_test[:1], split.id_test, split.ood_test, split.tumors
    )
    with pytest.raises(ValueError, match="are in training"):
        cohort.plan_synthetic(leaking, records, 5, SYNTHESIS, 0)
    with pytest.raises(ValueError, match="are in training"):
        cohort.check_grid(leaking, records, [4])


def without(records: dict, label: str, sites=("north", "south", "west")) -> dict:
    return {
        case: record
        for case, record in records.items()
        if label not in record["labels"] or record["site"] not in sites
    }


def test_a_grid_that_can_run_passes(records, split):
    cohort.check_grid(split, records, [4, 8, 16], ("real", "real+synthetic"), SYNTHESIS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_reals": []}, "grid.n_real"),
        ({"n_reals": [4, 0]}, "grid.n_real"),
        ({"n_reals": [4, 2.5]}, "grid.n_real"),
        ({"n_reals": [4, 4]}, "each number once"),
        ({"arms": ("synthetic",)}, "grid.arms"),
        ({"arms": ()}, "grid.arms"),
        ({"arms": ("real+synthetic",), "synthesis": SYNTHESIS | {"per_real": 0}}, "per_real"),
        (
            {"arms": ("real+synthetic",), "synthesis": SYNTHESIS | {"sizes": {"small": 0}}},
            "synthesis.sizes",
        ),
    ],
)
def test_a_wrong_grid_is_refused(records, split, change, message):
    grid = {"n_reals": [4], "arms": ("real",), "synthesis": SYNTHESIS} | change
    with pytest.raises(UserError, match=message):
        cohort.check_grid(split, records, **grid)


def test_missing_scans_are_named_before_anything_trains(records):
    both = ("real", "real+synthetic")

    def check(records, arms=("real",), **settings):
        split = cohort.split(records, SETTINGS | settings, 0, CLASSES)
        cohort.check_grid(split, records, [4], arms, SYNTHESIS)

    with pytest.raises(UserError, match="no training patient has kidney_lesion"):
        check(without(records, "kidney_lesion"))
    only_tumors = {c: r for c, r in records.items() if set(TUMORS) & set(r["labels"])}
    check(only_tumors)
    with pytest.raises(UserError, match="healthy"):
        check(only_tumors, both)
    no_pancreas = {
        c: r | {"labels": [x for x in r["labels"] if x != "pancreas"]} for c, r in records.items()
    }
    with pytest.raises(UserError, match=r"label of pancreas, where pancreatic_lesion"):
        check(no_pancreas, both)
    with pytest.raises(UserError, match="no patient of the ood_test split has any of"):
        check(
            {
                c: r
                for c, r in records.items()
                if r["site"] != "east" or not set(TUMORS) & set(r["labels"])
            }
        )
    only_east = {c: r for c, r in records.items() if r["site"] == "east"}
    with pytest.raises(UserError, match="no training patient with liver_lesion or"):
        check(only_east)
    with pytest.raises(UserError, match="asks for 91 patients, but there are only 90"):
        check(records, id_test=91)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ood_sites": ("atlantis",)}, "atlantis.*east, north, south, west"),
        ({"id_test": 0}, "cohort.id_test is 0"),
        ({"id_test": -3}, "cohort.id_test"),
        ({"id_test": 2.5}, "cohort.id_test"),
        ({"id_test": "many"}, "cohort.id_test"),
        ({"annotated": "some"}, "cohort.annotated"),
        ({"ood_site": "east"}, "cohort.ood_site is not a setting"),
    ],
)
def test_wrong_settings_are_refused(records, settings, message):
    with pytest.raises(UserError, match=message):
        cohort.split(records, SETTINGS | settings, 0, CLASSES)


def test_a_single_site_needs_no_out_of_distribution_test(records):
    split = cohort.split(records, {"id_test": 10}, 0, CLASSES)
    assert split.ood_test == ()
    cohort.check_grid(split, records, [4, 8])


def test_the_papers_size_is_planned_in_seconds():
    records = make_records(patients=4000, scans_each=1)
    split = cohort.split(records, SETTINGS, 0, CLASSES)
    assert len(cohort.subset(split, records, 1200, 0)) == 1200
    assert len(cohort.plan_synthetic(split, records, 3600, SYNTHESIS, 0)) == 3600
