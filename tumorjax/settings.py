"""Configurations as plain values: for JSON, for comparing, and for keys of caches."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def plain(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Returns a configuration as JSON's types, keys in alphabetical order at every level.

    ConfigDict itself goes through its keys in that order; whoever reads the JSON back then sees
    the same one. A task's class indices rest on it.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return json.loads(json.dumps(values, sort_keys=True))


def first_difference(a: Any, b: Any, path: str = "config") -> str | None:
    """Returns where two configurations differ, as `path: a, b`, or None where they are equal."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(set(a) | set(b)):
            where = f"{path}.{key}"
            if key not in a or key not in b:
                return f"{where} is only in {'the second' if key not in a else 'the first'}"
            difference = first_difference(a[key], b[key], where)
            if difference:
                return difference
        return None
    return None if a == b else f"{path} was {a!r} and is {b!r}"
