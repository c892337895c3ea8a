"""Settings of an evaluation: which rules decide, with their defaults."""

from collections.abc import Mapping
from typing import Any

from tumorjax.errors import UserError
from tumorjax.metrics.components import CONNECTIVITIES
from tumorjax.metrics.detection import check_rule

DEFAULTS: dict[str, Any] = {
    "tolerance_mm": 2.0,  # NSD tolerance (DiffTumor's validation)
    "tolerances_mm": {},  # class -> NSD tolerance, where it differs
    "connectivity": 26,  # of lesions and candidates: 6, 18 or 26
    "minimum_mm3": 0.0,  # predicted components smaller than this are dropped first
    "lesion_rule": "any",  # any, fraction or iou; see metrics.detection.match_lesions
    "lesion_threshold": None,  # the rule's share; None is the rule's own default
    "early_diameter": "sphere",  # largest diameter of an early tumour: sphere or recist
    "early_mm": 20.0,  # early tumours are smaller than this
    "resamples": 1000,  # of the bootstrap over patients
    "confidence": 0.95,
    "seed": 0,
}


# What the means and intervals need, and the numbers of one case do not.
_POOLING = ("resamples", "confidence", "seed")


def case_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of complete settings that the numbers of one case depend on."""
    return {key: value for key, value in settings.items() if key not in _POOLING}


def complete_settings(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the settings with `DEFAULTS` for what is absent, checked.

    Raises:
        UserError: a setting is not usable.
    """
    given = dict(settings.items()) if settings is not None else {}
    complete = {key: given.get(key, default) for key, default in DEFAULTS.items()}
    complete["tolerances_mm"] = dict(complete["tolerances_mm"].items())
    try:
        check_rule(complete["lesion_rule"], complete["lesion_threshold"])
    except ValueError as error:
        raise UserError(f"evaluation settings: {error}") from error
    allowed = {"connectivity": CONNECTIVITIES, "early_diameter": ("sphere", "recist")}
    for key, choices in allowed.items():
        if complete[key] not in choices:
            raise UserError(
                f"evaluation.{key} is {complete[key]!r}. Expected one of"
                f" {', '.join(map(str, choices))}"
            )
    lowest = {"tolerance_mm": 0, "minimum_mm3": 0, "early_mm": 0, "resamples": 1}
    lowest |= {f"tolerances_mm.{name}": 0 for name in complete["tolerances_mm"]}
    for key, low in lowest.items():
        section, _, name = key.partition(".")
        value = complete[section][name] if name else complete[key]
        if not value >= low:
            raise UserError(f"evaluation.{key} is {value!r}. Expected {low} or more")
    if not 0 < complete["confidence"] < 1:
        raise UserError(
            f"evaluation.confidence is {complete['confidence']!r}. Expected a share between 0 and 1"
        )
    return complete
