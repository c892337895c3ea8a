import pytest

from tumorjax.rehearsal import roofline
from tumorjax.rehearsal.chips import Chip

CHIP = Chip("made-up", memory=1e9, flops=100.0, memory_bandwidth=10.0, link_bandwidth=1.0)


@pytest.mark.parametrize(
    ("flops", "moved", "sent", "seconds", "by"),
    [
        (300.0, 20.0, 1.0, 3.0, "arithmetic"),
        (300.0, 40.0, 1.0, 4.0, "memory"),
        (300.0, 40.0, 5.0, 5.0, "network"),
    ],
)
def test_the_longest_of_the_three_bounds(flops, moved, sent, seconds, by):
    found = roofline.bound(flops, moved, sent, CHIP)
    assert (found.seconds, found.by) == (seconds, by)
    assert found.parts == {"arithmetic": flops / 100, "memory": moved / 10, "network": sent}


def test_hours_and_chip_hours_of_a_grid():
    # 160 cells, 64 at once: 3 waves, 32 places idle; 100,000 steps of 36 ms are an hour.
    found = roofline.grid(160, 64, 256, 0.036, 100_000, 1800.0)
    assert (found.waves, found.idle) == (3, 32)
    assert found.training_hours == pytest.approx(3.0)
    assert found.testing_hours == pytest.approx(1.5)
    assert found.chip_hours == pytest.approx(4.5 * 256)
