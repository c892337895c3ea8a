"""What benchmarks.synthesis measures is what its text says."""

import jax
import numpy as np
import pytest

from benchmarks import synthesis
from benchmarks.untrained import scene


def test_a_run_draws_another_tumour_each_time_and_leaves_the_rest_of_the_crop():
    size, radius = 32, 5.0
    row = synthesis.ours("tumorjax", size, radius)
    before, _, tumor = scene(size, radius)
    first, second = row.run(), row.run()
    # The soft edge reaches 4.1 mm.
    far = np.linalg.norm(np.indices((size,) * 3) - size / 2, axis=0) > radius + 5
    np.testing.assert_array_equal(first[far], before[far])
    assert (first != before)[tumor].mean() > 0.9
    assert (first != second)[tumor].mean() > 0.9


def test_stages_are_those_of_a_run():
    row = synthesis.ours("tumorjax", 32, 5.0)
    shapes = {name: jax.tree.map(np.shape, f()) for name, (_, f) in row.stages.items()}
    assert shapes == {
        "encode": (2, 8, 8, 8, 8),
        "denoise": (1, 8, 8, 8, 8),
        "decode": (2, 32, 32, 32, 1),
    }
    assert [count for count, _ in row.stages.values()] == [1, 4, 1]


def test_report_tells_whether_goals_are_reached(capsys):
    row = {"first": 9.0, "cpu": 2.0, "memory": 1.5, "parameters": 3.25}
    rows = {
        "sampler/tumorjax": row | {"seconds": 1.0, "encode": "1 x 0.100"},
        "sampler/pytorch-float32": row | {"seconds": 2.9},
        "training/plain": row | {"seconds": 10.0},
        "training/rules": row | {"seconds": 13.5},
        "training/diffusion": row | {"seconds": 12.9},
    }
    synthesis.report(rows)
    lines = capsys.readouterr().out.splitlines()
    assert "2.90 times as many tumours as PyTorch; goal 3: not reached" in lines
    assert "a step with rules takes 1.35 times the time; goal 1.3: not reached" in lines
    assert "a step with diffusion takes 1.29 times the time; goal 1.3: reached" in lines
    ours = next(line for line in lines if "sampler/tumorjax" in line)
    assert ours == "| sampler/tumorjax | 3.2 | 9.0 | 1.00 | 2.00 | 1 x 0.100 | 60.0 | 1.5 |"


def test_best_takes_the_least_time_and_the_most_memory():
    rounds = [
        {"first": 5.0, "seconds": 1.2, "cpu": 2.0, "memory": 1.0, "parameters": 1.0},
        {"first": 0.5, "seconds": 1.0, "cpu": 2.1, "memory": 0.9, "parameters": 1.0},
    ]
    assert synthesis.best(rounds) == pytest.approx(
        {"first": 5.0, "seconds": 1.0, "cpu": 2.0, "memory": 1.0, "parameters": 1.0}
    )
