"""The report of a made-up study: every part is there, true to its inputs, and needs no network."""

import csv
import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from ml_collections import ConfigDict

from tumorjax import files
from tumorjax.errors import UserError
from tumorjax.evaluation.summary import CASE_COLUMNS, SUMMARY_COLUMNS, summarize
from tumorjax.metrics.detection import SIZE_GROUPS
from tumorjax.scaling import laws, report, results, words

TUMORS = ("kidney_lesion", "liver_lesion", "pancreatic_lesion")
CLASSES = ("kidney", "kidney_lesion", "liver", "liver_lesion", "pancreas", "pancreatic_lesion")


def make_study(
    folder: Path,
    n_real=(4, 8, 16, 32),
    arms=results.ARMS,
    seeds=(0, 1),
    splits=("id", "ood"),
    patients: int = 24,
    gain: float = 4.0,
    bootstrap: int = 200,
) -> ConfigDict:
    """Writes what a study leaves, made up: scores follow a law, tumours and patients vary."""
    rng = np.random.default_rng(5)
    # Each patient's own difficulty, tumours (class, radius), the same for all cells.
    people = {}
    for split in splits:
        for index in range(patients):
            tumors = [] if index % 4 == 3 else [(TUMORS[index % 3], rng.lognormal(2.3, 0.5))]
            people[f"{split}{index:02d}"] = (split, rng.normal(0, 12), tumors)
    rows = []
    for seed in seeds:
        for arm in arms:
            for n in n_real:
                cell = results.cell_name(arm, n, seed)
                worth = n * (gain if arm == results.WITH_SYNTHETIC else 1)
                level = {"id": 72, "ood": 60}
                training = rng.normal(0, 1.5)
                cases = []
                for name, (split, difficulty, tumors) in people.items():
                    score = level[split] - 60 * worth**-0.6 + training
                    cases += make_cases(rng, name, split, score + difficulty, tumors)
                place = folder / "cells" / cell
                files.write_csv_atomic(place / "cases.csv", cases, CASE_COLUMNS)
                write_training(rng, place, worth)
                write_samples(rng, place, worth)
                head = {"cell": cell, "arm": arm, "n_real": n, "seed": seed}
                head["n_synthetic"] = 3 * n if arm != "real" else 0
                for split in splits:
                    chosen = [case for case in cases if case["split"] == split]
                    lines = summarize(chosen, {"resamples": 200})
                    rows += [head | {"split": split} | line for line in lines]
    columns = ("cell", "arm", "n_real", "n_synthetic", "seed", "split", *SUMMARY_COLUMNS)
    files.write_csv_atomic(folder / "results.csv", rows, columns)
    config = ConfigDict({"job": "scaling", "laws": {"bootstrap": bootstrap}, "report": {}})
    config.grid = ConfigDict({"n_real": n_real, "arms": arms, "seeds": seeds})
    config.task = ConfigDict({"classes": {name: (name,) for name in CLASSES}})
    files.write_json_atomic(folder / "config.json", json.loads(config.to_json()))
    found = laws.analyse(rows, config.laws, results.read_cases(folder))
    files.write_json_atomic(folder / "laws.json", found)
    seconds = {"prepare": 41.2, "synthesize": 12.0, "load": 8.4, "train": 371.9, "infer": 60.1}
    seconds |= {"metrics": 22.5, "report": 14.1}
    files.write_json_atomic(folder / "timing.json", seconds | {"total": sum(seconds.values())})
    rejected = [{"case": "BDMAP_00000007", "stage": "read", "reason": "<b>NaN</b> voxels in ct"}]
    files.write_csv_atomic(folder / "rejected.csv", rejected, ("case", "stage", "reason"))
    return config


def make_cases(rng, name, split, score, tumors) -> list[dict]:
    lines = []
    for label in (*TUMORS, "tumor"):
        own = [(c, r) for c, r in tumors if label in (c, "tumor")]
        found = [rng.random() < 1 / (1 + np.exp(-(score - 45 + r) / 12)) for _, r in own]
        alarms = int(rng.poisson(max(0.1, 1.5 - score / 50)))
        group = [next(g for g, top in SIZE_GROUPS.items() if r <= top) for _, r in own]
        line = {"case": name, "patient": name, "split": split, "class": label}
        line |= {"has_tumor": int(bool(own)), "predicted_tumor": int(any(found) or alarms > 0)}
        line["score"] = float(np.clip(rng.normal(0.8 if any(found) else 0.3, 0.15), 0, 1))
        dsc = float(np.clip(score + rng.normal(0, 5), 0, 100)) if own else (0 if alarms else None)
        line |= {"dsc": dsc, "nsd": None if dsc is None else 0.9 * dsc}
        line |= {"n_lesions": len(own), "n_detected": sum(found), "false_positives": alarms}
        early = [f for f, (_, r) in zip(found, own, strict=True) if r < 10]
        line |= {"n_early": len(early), "n_early_detected": sum(early)}
        for g in SIZE_GROUPS:
            line[f"lesions_{g}"] = group.count(g)
            line[f"detected_{g}"] = sum(f for f, x in zip(found, group, strict=True) if x == g)
        lines.append(line | {"truth_mm3": 4.19 * sum(r**3 for _, r in own), "predicted_mm3": 900.0})
    return lines


def write_training(rng, place: Path, worth: float) -> None:
    rows = []
    for step in range(25, 301, 25):
        share = 1 - np.exp(-step / 90)
        row = {
            "step": step,
            "seconds": 0.13 * step,
            "loss": 1.4 - 1.6 * share + rng.normal(0, 0.04),
        }
        row["learning_rate"] = 0.05 * (1 + np.cos(np.pi * step / 300)) / 2
        for name in CLASSES:
            row[f"dice_{name}"] = float(np.clip(0.9 * share + rng.normal(0, 0.04), 0, 1))
        rows.append(row)
    files.write_csv_atomic(place / "metrics.csv", rows, list(rows[0]))


def write_samples(rng, place: Path, worth: float) -> None:
    x, y = np.mgrid[:96, :72]
    images, truths, predictions, names, splits = [], [], [], [], []
    for split in ("id", "ood"):
        for index in range(2):
            body = ((x - 48) / 42) ** 2 + ((y - 36) / 30) ** 2 < 1
            liver = ((x - 66) / 16) ** 2 + ((y - 38) / 18) ** 2 < 1
            kidney = ((x - 24) / 8) ** 2 + ((y - 26) / 9) ** 2 < 1
            tumor = (x - 64 + 3 * index) ** 2 + (y - 42 + 4 * index) ** 2 < (5 + index) ** 2
            error = 6 * worth**-0.5
            guess = (x - 64 + 3 * index - error) ** 2 + (y - 42 + 4 * index) ** 2 < 5**2
            image = np.where(body, 0.45, 0) + 0.16 * liver + 0.18 * kidney - 0.12 * tumor
            image = np.clip(image + rng.normal(0, 0.03, x.shape) * body, 0, 1)
            truth = np.select([tumor, liver, kidney], [4, 3, 1], 0)
            predicted = np.select([guess, liver, kidney], [4, 3, 1], 0)
            images.append(image.astype(np.float32))
            truths.append(truth.astype(np.uint8))
            predictions.append(predicted.astype(np.uint8))
            names.append(f"{split}{index:02d}")
            splits.append(split)
    place.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        place / "samples.npz",
        image=np.stack(images),
        truth=np.stack(truths),
        prediction=np.stack(predictions),
        case=np.array(names),
        split=np.array(splits),
        class_names=np.array(CLASSES),
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, ConfigDict]:
    folder = tmp_path_factory.mktemp("study")
    config = make_study(folder)
    report.write(folder, config)
    return folder, config


def page_of(folder: Path) -> str:
    return (folder / "report" / "index.html").read_text()


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_all_sections_figures_and_tables_are_there(study):
    folder, _ = study
    page = page_of(folder)
    sections = ("curves", "words", "laws", "scores", "organs", "sizes", "alarms", "samples")
    for name in (*sections, "training", "run", "time", "set-aside", "config", "versions"):
        assert f'id="{name}"' in page
    names = ("headline", "metrics", "gains", "organs", "sizes", "alarms", "samples", "training")
    assert {p.stem for p in (folder / "report/figures").glob("*.png")} == set(names)
    for name in names:
        assert f'id="figure-{name}"' in page
        image = matplotlib.image.imread(folder / f"report/figures/{name}.png")
        assert min(image.shape[:2]) > 250
        assert image[..., :3].std() > 0.03  # something is drawn
        pdf = (folder / f"report/figures/{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert len(pdf) > 5000
    for name in ("table5", "laws", "savings", "equivalents", "organs", "tests"):
        assert f'id="table-{name}"' in page
        assert (folder / f"report/tables/{name}.csv").stat().st_size > 100
        latex = (folder / f"report/tables/{name}.tex").read_text()
        assert latex.count("\\toprule") == latex.count("\\bottomrule") == 1


def test_page_opens_without_a_network(study):
    page = page_of(study[0])
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 20
    for source in sources:
        assert source.startswith(("data:image/png;base64,", "#", "figures/", "tables/"))
        if source.startswith(("figures/", "tables/")):
            assert (study[0] / "report" / source).is_file()
    assert not re.search(r"https?://|@import|<script|url\(", page)


def test_page_is_true_to_its_inputs(study):
    folder, _ = study
    found = json.loads((folder / "laws.json").read_text())
    text = text_of(page_of(folder))
    for curve in found["curves"][:2]:
        assert f"{max(curve['mean']):.1f}" in text
        assert f"{curve['low'][0]:.1f} to {curve['high'][0]:.1f}" in text
    (saved,) = [
        s
        for s in found["savings"]
        if (s["split"], s["metric"], s["class"]) == ("id", "dsc", "tumor")
    ]
    assert f"{saved['same_score']['n_real']} annotated scans do what takes" in text
    assert "train 371.9 s" in text
    assert "Each network was trained 2 times" in text
    assert f"numpy {np.__version__}" in text
    # Text from the outside is text, not markup.
    assert "&lt;b&gt;NaN&lt;/b&gt; voxels in ct" in page_of(folder)
    rows = files.read_csv(folder / "report/tables/scores.csv")
    assert len(rows) == 2 * 2 * 4
    real = next(c for c in found["curves"] if c["metric"] == "dsc")
    assert [float(row["dsc"]) for row in rows[:4]] == pytest.approx(real["mean"])


def test_report_is_deterministic_and_replaces_the_old_one(study, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(study[0], folder)
    (folder / "report" / "stale.txt").write_text("old")
    (folder / ".report-killed" / "figures").mkdir(parents=True)
    report.write(folder, study[1])
    assert not (folder / "report" / "stale.txt").exists()
    first, again = (
        {p.relative_to(root): p.read_bytes() for p in (root / "report").rglob("*") if p.is_file()}
        for root in (study[0], folder)
    )
    assert first == again
    assert not [p for p in folder.iterdir() if p.name.startswith(".report")]


def test_failed_report_leaves_the_old_one(study, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(study[0], folder)
    before = page_of(folder)
    (folder / "timing.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        report.write(folder, study[1])
    assert page_of(folder) == before
    assert not [p for p in folder.iterdir() if p.name.startswith(".report")]


@pytest.mark.parametrize(
    "shape",
    [
        {"seeds": (0,), "arms": ("real",), "n_real": (4, 8, 16, 32)},
        {"seeds": (0,), "n_real": (8, 16), "splits": ("id",)},
        {"seeds": (0,), "n_real": (8,), "splits": ("ood",)},
    ],
    ids=["one arm", "two sizes", "one size, ood only"],
)
def test_small_studies_have_a_report_too(tmp_path, shape):
    config = make_study(tmp_path, **shape, patients=8, bootstrap=100)
    text = text_of(report.write(tmp_path, config).read_text())
    assert "Each network was trained once" in text
    if len(shape["n_real"]) < 4:
        assert "needs at least four" in text or "need at least four" in text
        assert "these data cannot tell" in text
    if shape.get("arms") == ("real",):
        assert "nothing can be said about synthetic tumours" in text


def test_missing_parts_are_named_and_missing_cells_counted(study, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(study[0], folder)
    for path in (folder / "timing.json", folder / "rejected.csv"):
        path.unlink()
    for cell in sorted((folder / "cells").iterdir()):
        (cell / "samples.npz").unlink()
        (cell / "metrics.csv").unlink()
    shutil.rmtree(cell)
    text = text_of(report.write(folder, study[1]).read_text())
    assert "15 of the study's 16 cells are done" in text.replace("&#39;", "'")
    assert "No sample slices were kept" in text
    assert "No training curves were kept" in text
    assert "No times were recorded" in text


def test_no_laws_no_report(tmp_path):
    with pytest.raises(UserError, match=r"laws\.json is missing"):
        report.write(tmp_path, ConfigDict())


# The job


@pytest.fixture
def table(tmp_path) -> Path:
    rows = [
        {"split": split, "arm": arm, "n_real": n, "dsc": round(60 - shift - 300 * n**-0.5, 2)}
        for split, less in (("id", 0), ("ood", 10))
        for arm, shift in (("real", less), ("real+synthetic", less - 5))
        for n in (60, 120, 278, 435, 750)
    ]
    path = tmp_path / "table.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def job(results_path: Path | str) -> ConfigDict:
    config = ConfigDict({"job": "laws", "results": str(results_path), "bootstrap": 100, "seed": 0})
    config.margin = 1.0
    return config


def test_job_on_a_bare_table(table, tmp_path, capsys):
    assert laws.run(job(table), tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "laws.json").read_text())
    assert len(found["curves"]) == 4
    page = page_of(tmp_path / "out")
    assert "No sample slices were kept" in page
    assert "no rows for single organs" in page
    assert "id dsc: plateau at 750" in capsys.readouterr().out
    before = (tmp_path / "out" / "laws.json").stat().st_mtime_ns
    assert laws.run(job(table), tmp_path / "out") == 0
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "out" / "laws.json").stat().st_mtime_ns == before
    table.write_text(table.read_text().replace("750,49.05", "750,49.06"))
    laws.run(job(table), tmp_path / "out")
    assert (tmp_path / "out" / "laws.json").stat().st_mtime_ns != before


def test_job_uses_the_cells_beside_the_table(study, tmp_path):
    laws.run(job(study[0] / "results.csv"), tmp_path)
    found = json.loads((tmp_path / "laws.json").read_text())
    assert found["curves"][0]["interval_over"] == "patients and seeds"
    assert (tmp_path / "report" / "figures" / "samples.png").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such results table"),
        ("", "no rows"),
        ("split,arm,n_real,dsc\n", "no rows"),
        ("split,arm,dsc\nid,real,5\n", "column n_real is missing; found split, arm, dsc"),
        (
            "split,arm,n_real,dice\nid,real,5,1\n",
            "no metric column; found split, arm, n_real, dice",
        ),
        ("split,arm,n_real,dsc\nid,real,5,good\n", "row 2: dsc is 'good', which is no number"),
        ("split,arm,n_real,dsc\nid,fake,5,50\n", "row 2: arm is 'fake', which is unknown"),
        ("split,arm,n_real,dsc\nid,real,5,\n", "every metric is empty"),
        (b"\xff\xfe\x00s\x00p", "not a CSV file in UTF-8"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(message)) as error:
        laws.run(job(path), tmp_path / "out")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# The words


def two_curves(real, both, sd=0.5) -> dict:
    rng = np.random.default_rng(11)
    rows = [
        {"split": "id", "arm": arm, "n_real": n, "seed": seed, "dsc": score + rng.normal(0, sd)}
        for arm, curve in (("real", real), ("real+synthetic", both))
        for n, score in zip((10, 20, 40, 80, 160), curve, strict=True)
        for seed in range(4)
    ]
    return laws.analyse(rows)


def test_words_claim_a_saving_only_where_the_data_do():
    sure = words.headline(two_curves([30, 40, 50, 60, 70], [60, 70, 75, 78, 80], 0.2), "dsc")
    assert "20 annotated scans do what takes 160 real ones alone, 88 % fewer" in sure
    assert "The data support a saving" in sure
    unsure = words.headline(two_curves([50, 52, 54, 55, 56], [52, 53, 54.5, 56, 56], 3), "dsc")
    assert "not certain" in unsure


def test_words_say_when_synthetic_tumours_lose():
    lower = two_curves([30, 40, 50, 60, 70], [45, 46, 46, 46, 46])
    assert "no saving" in words.headline(lower, "dsc")
    told = " ".join(words.story(lower, "dsc", "id"))
    assert "an early plateau at a lower score saves nothing" in told
    assert "a loss" in told
    later = two_curves([50, 60, 60.2, 60.1, 60], [40, 50, 55, 60, 60.1], 0.05)
    assert "synthetic tumours do not help" in words.headline(later, "dsc")
    assert "speak against a saving" in words.headline(later, "dsc")


def test_words_do_not_call_the_largest_size_a_plateau():
    told = words.story(two_curves([30, 40, 50, 60, 70], [30, 40, 50, 60, 70]), "dsc", "id")
    assert "lies beyond what was tried" in told[0]


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (None, ""),
        ((None, None), ""),
        ((1.04, 2.06), "1.0 to 2.1"),
        ((-3.0, None), "−3.0 or more"),
        ((None, 4.0), "4.0 or less"),
        ((-0.01, 4.0), "0.0 to 4.0"),
    ],
)
def test_intervals_in_words(interval, text):
    assert words.range_of(interval) == text
