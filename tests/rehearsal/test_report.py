"""The tables of a rehearsal, of programs that were made up."""

import pytest

from configs import scaling
from tumorjax.rehearsal import report
from tumorjax.rehearsal.chips import CHIPS
from tumorjax.rehearsal.programs import Program

SENT = {"all-reduce": {"count": 1.0, "bytes": 9e7, "sent": 9e7}}
# On a v5e 10 ms of arithmetic, 20 ms of memory, 2 ms of network.
STEP = Program(
    arguments=600_000_000,
    temporaries=7_000_000_000,
    peak=7_700_000_000,
    flops=0.01 * 197e12,
    moved=0.02 * 819e9,
    traffic=SENT,
)
TILES = Program(flops=0.005 * 197e12, moved=0.001 * 819e9)
PLAN = {"cells": 160, "steps": 1000, "tile_batches": 7200}
MESH = {"cell": 128, "data": 2, "fsdp": 1, "space": 1}


def summary(step=STEP):
    settings = scaling.get_config().rehearsal
    settings.prices.v5e = 0.5
    args = ("v5e:16x16", CHIPS["v5e"], 256, MESH, 62_812_348, step, TILES, PLAN)
    return report.summary(*args, settings, "")


def test_times_and_prices_follow_from_the_programs():
    found = summary()
    assert (found["step"]["bound_by"], found["test"]["bound_by"]) == ("memory", "arithmetic")
    assert found["step"]["seconds"] == pytest.approx(0.02)
    assert found["step"]["parts"]["network"] == pytest.approx(0.002)
    grid = found["grid"]["at_best"]
    assert (grid["waves"], grid["idle"]) == (2, 96)
    # Two waves of 1000 steps of 20 ms, and of 7200 batches of tiles of 5 ms.
    assert grid["training_hours"] == pytest.approx(40 / 3600)
    assert grid["testing_hours"] == pytest.approx(72 / 3600)
    assert grid["chip_hours"] == pytest.approx(256 * 112 / 3600)
    # Half of the roofline's rate, which is the default.
    assert found["grid"]["at_efficiency"]["hours"] == pytest.approx(2 * grid["hours"])
    assert found["price"]["at_best"] == pytest.approx(0.5 * grid["chip_hours"])
    text = report.markdown(found, [], [])
    assert "| peak | 7.70 of 16 GB, fits |" in text
    assert "| step at best | 20.0 ms, by memory" in text
    assert "| price at 0.5 a chip-hour | 4 at best, 8 at the efficiency assumed |" in text


def test_what_does_not_fit_is_said_with_advice_and_without_times():
    found = summary(Program(too_large="Used 20G of 16G hbm"))
    text = report.markdown(found, [], ["take less"])
    assert not found["memory"]["fits"]
    assert "| memory a chip | does not fit: Used 20G of 16G hbm |" in text
    assert "- take less" in text
    assert "step at best" not in text


def test_a_machine_that_the_step_does_not_fit_has_no_figures():
    row = {"chips": 16, "cells": 8, "batch": 2, "peak": 7.3e9, "sent": 9e7, "flops": 2e12}
    rows = [
        row | {"topology": "v5e:4x4", "too_large": ""},
        row | {"topology": "v5e:8x8", "too_large": "Used 17G of 16G hbm", "peak": 0},
    ]
    text = report.markdown(summary(), rows, [])
    assert "| v5e:4x4 | 16 | 8 | 2 | 7.300 | 90.000 | 2.000 |" in text
    assert "| v5e:8x8 | 16 | 8 | 2 | does not fit | | |" in text
