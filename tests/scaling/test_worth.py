"""Studies with different synthesizers side by side."""

import csv
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import worth as worth_config
from tumorjax.errors import UserError
from tumorjax.evaluation.evaluate import CASE_COLUMNS
from tumorjax.files import read_csv
from tumorjax.scaling import worth

# What patients of each arm score on average, by number of real scans.
LEVELS = {
    "real": {1: 20.0, 4: 50.0},
    "rules": {1: 40.0, 4: 50.0},
    "diffusion": {1: 45.0, 4: 56.0},
}
PATIENTS = 40


def write_study(folder, arms, *, steps=400, cases=PATIENTS):
    """Writes a study's files; arms maps the arm's name in the table to a key of LEVELS."""
    rows = []
    for arm, level in arms.items():
        for n, mean in LEVELS[level].items():
            for seed in range(3):
                cell = f"{arm}-n{n:04d}-s{seed}"
                # A patient is as hard for every network; a training has its own luck.
                hardness = np.random.default_rng(7).normal(0, 12, cases)
                hardness -= hardness.mean()
                luck = np.random.default_rng([n, seed, len(level)]).normal(0, 1)
                scores = np.clip(mean + luck + hardness, 0, 100)
                (folder / "cells" / cell).mkdir(parents=True)
                measured = {"split": "id", "class": "tumor", "has_tumor": 1, "predicted_tumor": 1}
                for_patient = [
                    dict.fromkeys(CASE_COLUMNS, 0)
                    | measured
                    | {"patient": f"p{i}", "case": f"c{i}", "dsc": f"{score:.4f}"}
                    for i, score in enumerate(scores)
                ]
                _write(folder / "cells" / cell / "cases.csv", for_patient)
                rows.append(
                    {
                        "cell": cell,
                        "arm": arm,
                        "n_real": n,
                        "seed": seed,
                        "split": "id",
                        "class": "tumor",
                        "dsc": f"{scores.mean():.4f}",
                    }
                )
    _write(folder / "results.csv", rows)
    config = {"training": {"steps": steps}, "grid": {"arms": list(arms)}, "synthesis": {"a": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def studies(tmp_path):
    return {
        "rules": write_study(tmp_path / "a", {"real": "real", "real+synthetic": "rules"}),
        "diffusion": write_study(tmp_path / "b", {"real+synthetic": "diffusion"}),
    }


def config_of(studies):
    config = worth_config.get_config()
    config.studies = ConfigDict({name: str(folder) for name, folder in studies.items()})
    return config


def test_arms_of_several_studies_are_compared_on_the_same_patients(studies, tmp_path):
    assert worth.run(config_of(studies), tmp_path / "out") == 0
    rows = {int(row["n_real"]): row for row in read_csv(tmp_path / "out" / "worth.csv")}
    for name, level in LEVELS.items():
        for n, mean in level.items():
            assert float(rows[n][name]) == pytest.approx(mean, abs=4)
            assert int(rows[n][f"{name}_seeds"]) == 3
    first, last = rows[1], rows[4]
    for row in rows.values():
        for pair in ("rules-real", "diffusion-real", "rules-diffusion"):
            other, one = pair.split("-")
            # Each of the three is rounded to a tenth.
            difference = float(row[other]) - float(row[one])
            assert float(row[pair]) == pytest.approx(difference, abs=0.11)
    # Twenty points are certain, although patients scatter by twelve: differences are paired.
    assert float(first["rules-real_low"]) > 10
    assert float(last["rules-real_low"]) < 0 < float(last["rules-real_high"])
    width = float(first["real_high"]) - float(first["real_low"])
    paired = float(last["rules-diffusion_high"]) - float(last["rules-diffusion_low"])
    assert paired < 1.5 * width
    text = (tmp_path / "out" / "worth.md").read_text()
    assert "real + diffusion" in text
    assert "rules − diffusion" in text
    for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (tmp_path / "out" / f"worth.{kind}").read_bytes().startswith(magic)


def test_studies_that_trained_otherwise_are_refused(studies, tmp_path):
    studies["diffusion"] = write_study(tmp_path / "c", {"real+synthetic": "diffusion"}, steps=800)
    with pytest.raises(UserError, match=r"not comparable: config\.training\.steps was 800"):
        worth.run(config_of(studies), tmp_path / "out")


def test_studies_of_other_test_scans_are_refused(studies, tmp_path):
    studies["diffusion"] = write_study(tmp_path / "c", {"real+synthetic": "diffusion"}, cases=39)
    with pytest.raises(UserError, match=r"tested on different scans \(1 differ\)"):
        worth.run(config_of(studies), tmp_path / "out")


def test_what_is_missing_is_named(studies, tmp_path):
    with pytest.raises(UserError, match=r"config\.studies is empty"):
        worth.run(worth_config.get_config(), tmp_path / "out")
    with pytest.raises(UserError, match="no results of real"):
        worth.run(config_of({"diffusion": studies["diffusion"]}), tmp_path / "out")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        worth.run(config_of({"rules": tmp_path / "nowhere"}), tmp_path / "out")
    config = config_of(studies)
    config.metric = "dice"
    with pytest.raises(UserError, match="dice"):
        worth.run(config, tmp_path / "out")
