"""Configurations as plain values: for JSON, for comparing, and for keys of caches."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tumorjax.errors import UserError


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


def several(value: str | Sequence[str]) -> list[str]:
    """Returns a setting that is one path or several, as a list.

    Args:
        value: a path; a sequence of them; or a sequence as a command line has it, "('a', 'b')".

    Raises:
        UserError: the text looks like a sequence and is none.
    """
    if not isinstance(value, str):
        return [str(one) for one in value]
    if value[:1] not in ("(", "["):
        return [value] if value else []
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        parsed = None
    if not isinstance(parsed, (tuple, list)) or not all(isinstance(one, str) for one in parsed):
        raise UserError(f"{value!r} is no sequence of paths. Expected such as \"('a', 'b')\"")
    return list(parsed)
