import sys

import pytest

from tumorjax.errors import UserError
from tumorjax.rehearsal import chips


def test_the_chips_of_a_topology_are_its_sizes_multiplied():
    assert chips.parse("v5e:16x16")[1] == 256
    assert chips.parse("v5p:4x4x4")[1] == 64
    assert chips.parse("h100:64")[1] == 64
    for chip in chips.CHIPS.values():
        assert [chips.parse(f"{chip.name}:{shape}")[1] for shape in chip.shapes] == [16, 64, 256]


def test_smaller_topologies_end_with_the_one_asked_for():
    assert chips.smaller("v5e:16x16") == ["v5e:4x4", "v5e:8x8", "v5e:16x16"]
    assert chips.smaller("v5p:4x4x4") == ["v5p:2x2x4", "v5p:4x4x4"]
    assert chips.smaller("v5e:2x2") == ["v5e:2x2"]


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        ("v9:4x4", "v4, v5e, v5p, v6e, h100"),
        ("v5e", "v5e:16x16"),
        ("v5e:4x0", "v5e:16x16"),
        ("v5p:4x4", "Expected 3 sizes for v5p"),
        ("h100:4x4", "Expected 1 sizes for h100"),
    ],
)
def test_what_is_no_topology_is_refused_with_those_that_are(topology, says):
    with pytest.raises(UserError, match=says):
        chips.parse(topology)


def test_without_libtpu_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"tumorjax\[tpu\]"):
        chips.devices("v5e:2x2")
