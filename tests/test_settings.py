"""Configurations as plain values, and where two of them differ."""

import json

import pytest
from ml_collections import ConfigDict

from tumorjax.settings import first_difference, plain


def test_plain_is_what_json_gives_back():
    config = ConfigDict({"window": (-175.0, 250.0), "mesh": {"space": 1, "cell": -1}, "none": None})
    values = plain(config)
    assert values == {"window": [-175.0, 250.0], "mesh": {"space": 1, "cell": -1}, "none": None}
    assert json.loads(json.dumps(values)) == values
    assert plain(values) == values


def test_the_order_of_keys_survives_a_round_trip():
    # Class indices are positions in this order: it must not depend on how the config was written.
    classes = {"pancreas": ["pancreas"], "liver": ["liver"], "kidney": ["kidney_left"]}
    kept = plain({"classes": classes})
    assert list(kept["classes"]) == ["kidney", "liver", "pancreas"]
    assert list(kept["classes"]) == list(ConfigDict({"classes": classes}).classes)
    assert list(plain(ConfigDict(kept))["classes"]) == list(kept["classes"])


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ({"x": 1, "y": {"z": [1, 2]}}, {"y": {"z": [1, 2]}, "x": 1}, None),
        ({"y": {"z": [1, 2]}}, {"y": {"z": [1, 3]}}, "config.y.z was [1, 2] and is [1, 3]"),
        ({"x": 1}, {"x": 1, "y": 2}, "config.y is only in the second"),
        ({"x": {"y": 2}}, {"x": {}}, "config.x.y is only in the first"),
        ({"x": {"y": 2}}, {"x": 5}, "config.x was {'y': 2} and is 5"),
    ],
)
def test_the_first_difference_is_named(a, b, difference):
    assert first_difference(a, b) == difference
