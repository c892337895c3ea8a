"""summary.json as nnU-Net's evaluation writes it: voxel counts, Dice and IoU of every label."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tumorjax.evaluation.measure import Labels

METRICS = ("Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref")


class Summary:
    """Collects cases one by one; of each only its text is held.

    As in nnU-Net, a label that a case has neither in truth nor in prediction is left out of the
    means (its Dice is null, where nnU-Net writes NaN). Labels that no case has are left out
    entirely. "labels" says what each key means, "grid" which grid was counted on.
    """

    def __init__(self, labels: Labels, grid: str):
        self._grid = grid
        self._keys = {
            name: str(value) if isinstance(value, int) else str(tuple(value))
            for name, value in labels.items()
        }
        self._sums: dict[str, dict[str, float]] = {name: {} for name in labels}
        self._defined: dict[str, dict[str, int]] = {name: {} for name in labels}
        self._present: set[str] = set()
        self._cases: list[str] = []

    def add(self, result: Mapping[str, Any]) -> None:
        """Adds a case's result, see `records.keep`."""
        overlap = result["overlap"]
        for name in self._keys:
            if overlap[name]["n_ref"] or overlap[name]["n_pred"]:
                self._present.add(name)
            for metric in METRICS:
                value = overlap[name][metric]
                if value is not None:
                    sums, defined = self._sums[name], self._defined[name]
                    sums[metric] = sums.get(metric, 0) + value
                    defined[metric] = defined.get(metric, 0) + 1
        case = {
            "metrics": {key: overlap[name] for name, key in self._keys.items()},
            "prediction_file": result["prediction_file"],
            "reference_file": result["reference_file"],
        }
        self._cases.append(json.dumps(case, allow_nan=False))

    def text(self) -> str:
        """Returns the file's text."""
        names = [name for name in self._keys if name in self._present]
        means = {
            self._keys[name]: {
                metric: self._sums[name][metric] / self._defined[name][metric]
                if metric in self._defined[name]
                else None
                for metric in METRICS
            }
            for name in names
        }
        head = {
            "foreground_mean": {
                metric: _mean(mean[metric] for mean in means.values()) for metric in METRICS
            },
            "grid": self._grid,
            "labels": {self._keys[name]: name for name in names},
            "mean": means,
        }
        absent = {key for name, key in self._keys.items() if name not in self._present}
        cases = ",\n".join(_without(case, absent) for case in self._cases)
        begin = json.dumps(head, indent=1, allow_nan=False).rstrip("}").rstrip()
        return f'{begin},\n "metric_per_case": [\n{cases}\n ]\n}}\n'


def _without(text: str, absent: set[str]) -> str:
    if not absent:
        return text
    case = json.loads(text)
    case["metrics"] = {key: value for key, value in case["metrics"].items() if key not in absent}
    return json.dumps(case, allow_nan=False)


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
