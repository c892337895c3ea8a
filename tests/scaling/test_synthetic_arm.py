"""Where a study's synthetic tumours come from, and what is refused."""

from types import SimpleNamespace

import pytest

from configs.scaling import get_config
from tumorjax.errors import UserError
from tumorjax.scaling import synthetic_arm
from tumorjax.synthesis import leakage


def settings(**changes):
    section = get_config().synthesis
    section.update(changes)
    return section


def record(patient, image):
    return {"patient": patient, "checksum": {"image": image}}


class SomeStore:
    """A store's records, all that leakage looks at."""

    def __init__(self, records):
        self.records = records

    def record(self, case):
        return self.records[case]


@pytest.fixture
def seen(monkeypatch):
    """A pool's model that has seen patients a and b."""
    store = SomeStore({"x": record("a", "1"), "y": record("b", "2"), "z": record("b", "3")})
    trained_on = leakage.record_of([(store, case) for case in "xyz"])
    model = SimpleNamespace(trained_on=trained_on)
    monkeypatch.setattr(synthetic_arm.trained_diffusion, "load", lambda folder: model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"synthesizer": "gan"}, r"synthesis\.synthesizer is 'gan'.*rules, diffusion"),
        ({"trained_on": "all"}, r"synthesis\.trained_on is 'all'.*pool or cell"),
        ({"synthesizer": "diffusion"}, r"synthesis\.checkpoint is empty"),
        ({"checkpoint": "runs/d"}, "rules have none"),
        (
            {"synthesizer": "diffusion", "checkpoint": "runs/d", "trained_on": "cell"},
            "cells train their own",
        ),
        ({"synthesizer": "diffusion", "trained_on": "cell", "online": True}, "online"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_the_start(changes, message):
    with pytest.raises(UserError, match=message):
        synthetic_arm.check(settings(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"online": True},
        {"synthesizer": "diffusion", "checkpoint": "runs/d"},
        {"synthesizer": "diffusion", "checkpoint": "runs/d", "online": True},
        {"synthesizer": "diffusion", "trained_on": "cell"},
    ],
)
def test_settings_that_fit_pass(changes):
    synthetic_arm.check(settings(**changes))


def test_a_model_that_has_seen_a_test_patient_is_refused(seen):
    pool = settings(synthesizer="diffusion", checkpoint="runs/d")
    others = {"p": record("c", "7"), "q": record("d", "8")}
    source = synthetic_arm.origin(pool, others)
    assert source == ("diffusion", "pool", 2, 3)
    # The same patient in another scan; the same scan under another patient's name.
    for known in (record("b", "9"), record("e", "1")):
        with pytest.raises(UserError, match=r"runs/d: .*trained on 1 of the 3 test scans.*\(k\)"):
            synthetic_arm.origin(pool, others | {"k": known})


def test_the_report_says_from_whom_was_learned(seen):
    pool = settings(synthesizer="diffusion", checkpoint="runs/d")
    text = synthetic_arm.sentence(synthetic_arm.origin(pool, {})._asdict())
    assert "3 scans of 2 other patients" in text
    own = settings(synthesizer="diffusion", trained_on="cell")
    text = synthetic_arm.sentence(synthetic_arm.origin(own, {})._asdict())
    assert "its own annotated scans" in text
    text = synthetic_arm.sentence(synthetic_arm.origin(settings(), {})._asdict())
    assert "rules" in text
    assert "no scan" in text
