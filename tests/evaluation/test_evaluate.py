"""The evaluation job on two folders: its tables, continuing, and bad cases one by one."""

import dataclasses
import errno
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import ndimage

from configs.evaluation import get_config
from tumorjax.anatomy import LABELS
from tumorjax.errors import UserError
from tumorjax.evaluation import evaluate, measure
from tumorjax.evaluation.masks import read_labels, read_pair
from tumorjax.files import read_csv
from tumorjax.metrics.overlap import dice
from tumorjax.metrics.surface import normalized_surface_dice

SPACING = (1.5, 1.0, 3.0)
LABEL_VALUES = {"background": 0, "kidney": 1, "tumor": 2}


def ball(center, radius, shape=(30, 36, 16)):
    grid = np.indices(shape) - np.reshape(center, (3, 1, 1, 1))
    return (grid**2).sum(axis=0) <= radius**2


def masks(number):
    """Truth and prediction of a case: a kidney, and a tumour in all but every third."""
    truth, prediction = np.zeros((2, 30, 36, 16), np.uint8)
    truth[ball((15, 18, 8), 7)] = prediction[ball((15, 17, 8), 7)] = 1
    if number % 3:
        truth[ball((14, 18, 8), 2 + number % 3)] = 2
        prediction[ball((14, 18 + number % 2, 8), 3)] = 2
    return truth, prediction


def affine(spacing=SPACING, origin=(-40.0, 12.0, 700.0)):
    matrix = np.diag([*spacing, 1.0])
    matrix[:3, 3] = origin
    return matrix


def save(path, data, matrix=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.asarray(data), affine() if matrix is None else matrix)
    nib.save(image, path)


@dataclasses.dataclass
class Study:
    folder: Path
    config: ConfigDict

    def file(self, kind, number):
        return self.folder / kind / f"case_{number}.nii.gz"

    def run(self):
        return evaluate.run(self.config, self.folder / "work")

    def rejected(self):
        path = self.folder / "work" / "rejected.csv"
        return {row["case"]: row["reason"] for row in read_csv(path)} if path.is_file() else {}

    def rows(self):
        return read_csv(self.folder / "work" / "cases.csv")


@pytest.fixture
def study(tmp_path):
    for number in range(5):
        truth, prediction = masks(number)
        save(tmp_path / "truth" / f"case_{number}.nii.gz", truth)
        save(tmp_path / "prediction" / f"case_{number}.nii.gz", prediction)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABEL_VALUES}))
    config = get_config()
    config.truth, config.prediction = str(tmp_path / "truth"), str(tmp_path / "prediction")
    config.labels, config.tumors = str(tmp_path / "dataset.json"), ("tumor",)
    config.workers = 1
    return Study(tmp_path, config)


def test_tables_hold_the_metrics_of_the_masks(study):
    assert study.run() == 0
    rows = study.rows()
    assert [row["case"] for row in rows] == [f"case_{number}" for number in range(5)]
    for number, row in enumerate(rows):
        truth, prediction = (mask == 2 for mask in masks(number))
        if truth.any():
            nsd = normalized_surface_dice(truth, prediction, SPACING, 2.0)
            assert float(row["dsc"]) == pytest.approx(100 * dice(truth, prediction), abs=1e-5)
            assert float(row["nsd"]) == pytest.approx(100 * nsd, abs=1e-5)
        else:
            assert (row["dsc"], row["nsd"], row["has_tumor"]) == ("", "", "0")
    (line,) = read_csv(study.folder / "work" / "summary.csv")
    assert (line["n_patients"], line["n_tumors"]) == ("5", "3")
    assert line["patient_specificity"] == "100"
    assert float(line["dsc"]) == pytest.approx(
        np.mean([float(row["dsc"]) for row in rows if row["dsc"]]), abs=1e-5
    )
    assert not study.rejected()


def test_summary_json_is_nnunets(study):
    study.run()
    summary = json.loads((study.folder / "work" / "summary.json").read_text())
    expected = {key: [] for key in ("1", "2")}
    for number, case in enumerate(summary["metric_per_case"]):
        assert case["reference_file"] == str(study.file("truth", number))
        assert case["prediction_file"] == str(study.file("prediction", number))
        truth, prediction = masks(number)
        for key, value in (("1", 1), ("2", 2)):
            t, p = truth == value, prediction == value
            counts = {"TP": t & p, "FP": ~t & p, "FN": t & ~p, "TN": ~(t | p)}
            counts |= {"n_ref": t, "n_pred": p}
            found = case["metrics"][key]
            assert {name: found[name] for name in counts} == {
                name: mask.sum() for name, mask in counts.items()
            }
            score = dice(t, p)
            assert found["Dice"] == (None if np.isnan(score) else pytest.approx(score))
            expected[key].append(score)
    means = {key: np.nanmean(scores) for key, scores in expected.items()}
    for key, mean in means.items():
        assert summary["mean"][key]["Dice"] == pytest.approx(mean)
    overall = np.mean(list(means.values()))
    assert summary["foreground_mean"]["Dice"] == pytest.approx(overall)


def test_a_second_run_computes_only_what_changed(study, monkeypatch, capsys):
    study.run()
    tables = [path.read_bytes() for path in sorted((study.folder / "work").glob("*.*"))]
    calls = []
    read = measure.read_pair
    monkeypatch.setattr(
        measure, "read_pair", lambda *paths: calls.append(paths[0].name) or read(*paths)
    )
    assert study.run() == 0
    assert not calls
    assert "finished before" in capsys.readouterr().out
    assert [p.read_bytes() for p in sorted((study.folder / "work").glob("*.*"))] == tables
    save(study.file("prediction", 3), masks(4)[1])
    assert study.run() == 0
    assert calls == ["case_3.nii.gz"]
    study.config.evaluation.tolerance_mm = 4.0
    study.run()
    assert len(calls) == 6


def test_processes_give_the_same_tables(study):
    study.run()
    alone = (study.folder / "work" / "cases.csv").read_bytes()
    study.config.workers = 2
    assert evaluate.run(study.config, study.folder / "parallel") == 0
    assert (study.folder / "parallel" / "cases.csv").read_bytes() == alone


def test_axes_may_lie_in_any_order_and_direction(study):
    """The same masks stored as (I, P, L) give the same numbers: slices stay axial."""
    study.config.evaluation.early_diameter = "recist"
    study.config.evaluation.early_mm = 12.0
    study.run()
    rows = study.rows()
    for kind in ("truth", "prediction"):
        for number in range(5):
            image = nib.load(study.file(kind, number))
            there = nib.orientations.ornt_transform(
                nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("IPL")
            )
            turned = image.as_reoriented(there)
            assert nib.aff2axcodes(turned.affine) == ("I", "P", "L")
            save(study.file(kind, number), np.asarray(turned.dataobj), turned.affine)
    study.run()
    assert study.rows() == rows
    assert {row["n_early"] for row in rows} == {"0", "1"}
    _, _, spacing = read_pair(study.file("truth", 1), study.file("prediction", 1), LABEL_VALUES)
    assert spacing == pytest.approx(SPACING)


def _truncate(study):
    data = study.file("prediction", 2).read_bytes()
    study.file("prediction", 2).write_bytes(data[: len(data) // 2])


def _truncate_inside(study):
    data = gzip.decompress(study.file("prediction", 2).read_bytes())
    study.file("prediction", 2).write_bytes(gzip.compress(data[: len(data) // 2]))


def _flip_byte(study):
    data = bytearray(study.file("prediction", 2).read_bytes())
    data[len(data) // 2] ^= 0xFF
    study.file("prediction", 2).write_bytes(data)


def _zero_spacing(study):
    image = nib.load(study.file("truth", 2))
    raw = bytearray(image.to_bytes())
    raw[80:84] = np.float32(0).tobytes()  # pixdim[1]
    study.file("truth", 2).write_bytes(gzip.compress(bytes(raw)))


def _turned_grid(study):
    turned = affine()
    turned[:3, :3] = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]) @ turned[:3, :3]
    save(study.file("prediction", 2), masks(2)[1], turned)


BAD = {
    "no prediction": (lambda s: s.file("prediction", 2).unlink(), "no file in .*prediction"),
    "no truth": (lambda s: s.file("truth", 2).unlink(), "no file in .*truth"),
    "two files": (
        lambda s: save(s.folder / "truth" / "case_2.nii", masks(2)[0]),
        "case_2.nii and case_2.nii.gz",
    ),
    "truncated": (_truncate, "prediction/case_2.nii.gz: not readable"),
    "truncated inside": (_truncate_inside, "prediction/case_2.nii.gz: not readable"),
    "damaged": (_flip_byte, "prediction/case_2.nii.gz"),
    "empty file": (lambda s: s.file("truth", 2).write_bytes(b""), "truth/case_2.nii.gz: not read"),
    "no NIfTI": (lambda s: s.file("truth", 2).write_bytes(gzip.compress(b"x" * 999)), "not read"),
    "other shape": (
        lambda s: save(s.file("prediction", 2), masks(2)[1][:, 1:]),
        r"shape \(30, 35, 16\), where the truth has \(30, 36, 16\)",
    ),
    "other spacing": (
        lambda s: save(s.file("prediction", 2), masks(2)[1], affine((1.5, 1.0, 3.1))),
        "corners lie up to 1.50 mm away",
    ),
    "other origin": (
        lambda s: save(s.file("prediction", 2), masks(2)[1], affine(origin=(-40, 12, 703))),
        "corners lie up to 3.00 mm away",
    ),
    "turned grid": (_turned_grid, "corners lie up to"),
    "4D": (lambda s: save(s.file("truth", 2), masks(2)[0][..., None, None]), "5D|4D"),
    "RGB": (
        lambda s: save(
            s.file("truth", 2), np.zeros((30, 36, 16), [(c, "u1") for c in ("R", "G", "B")])
        ),
        "RGB",
    ),
    "NaN": (
        lambda s: save(s.file("prediction", 2), np.where(masks(2)[1], np.nan, 0.0)),
        "not whole numbers",
    ),
    "probabilities": (
        lambda s: save(s.file("prediction", 2), masks(2)[1] * np.float32(0.4)),
        "from 0.0 to 0.8.* not whole numbers",
    ),
    "negative values": (
        lambda s: save(s.file("prediction", 2), masks(2)[1].astype(np.int16) - 1),
        "from -1 to 1",
    ),
    "unknown label": (
        lambda s: save(s.file("truth", 2), masks(2)[0] * 3),
        "unknown label values 3, 6; known are 0, 1, 2",
    ),
    "zero spacing": (_zero_spacing, "voxel size 0 x 1 x 3 mm"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_case_is_set_aside_and_the_others_go_on(study, kind):
    spoil, reason = BAD[kind]
    spoil(study)
    assert study.run() == 1
    rejected = study.rejected()
    assert list(rejected) == ["case_2"]
    assert re.search(reason, rejected["case_2"]), rejected["case_2"]
    assert [row["case"] for row in study.rows()] == ["case_0", "case_1", "case_3", "case_4"]
    assert not (study.folder / "work" / "cases" / "case_2.json").exists()


def test_a_mended_case_is_done_by_the_next_run(study):
    good = study.file("prediction", 2).read_bytes()
    _truncate(study)
    assert study.run() == 1
    study.file("prediction", 2).write_bytes(good)
    assert study.run() == 0
    assert not study.rejected()
    assert len(study.rows()) == 5


def test_names_that_lead_elsewhere_are_set_aside(study):
    for kind in ("truth", "prediction"):
        save(study.folder / kind / "a..b.nii.gz", masks(1)[0])
    assert study.run() == 1
    assert list(study.rejected()) == ["a..b"]


def test_scans_of_one_patient_are_one_patient(study):
    lines = ["case,patient", "case_1,p", "case_2,p"]
    (study.folder / "patients.csv").write_text("\n".join(lines) + "\n")
    study.config.patients = str(study.folder / "patients.csv")
    study.run()
    assert [row["patient"] for row in study.rows()] == ["case_0", "p", "p", "case_3", "case_4"]
    (line,) = read_csv(study.folder / "work" / "summary.csv")
    assert line["n_patients"] == "4"


def test_labels_are_anatomys_without_a_dataset_json(study):
    table = np.array([0, LABELS["kidney_left"], LABELS["kidney_lesion"]], np.uint8)
    for number in range(5):
        for kind, mask in zip(("truth", "prediction"), masks(number), strict=True):
            save(study.file(kind, number), table[mask])
    study.config.labels, study.config.tumors = "", ()
    assert study.run() == 0
    assert {row["class"] for row in study.rows()} == {"kidney_lesion", "tumor"}
    summary = json.loads((study.folder / "work" / "summary.json").read_text())
    assert summary["labels"] == {"3": "kidney_left", "29": "kidney_lesion"}


def test_a_dataset_json_may_have_regions_and_old_order(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"background": 0, "masses": [2, 3], "tumor": 2}}))
    assert read_labels(str(path)) == {"masses": (2, 3), "tumor": 2}
    path.write_text(json.dumps({"labels": {"0": "background", "1": "pancreas", "2": "cancer"}}))
    assert read_labels(str(path)) == {"pancreas": 1, "cancer": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": ""}, "go together"),
        ({"truth": "", "prediction": ""}, "two folders of masks"),
        ({"checkpoint": "runs/segmentation"}, "either"),
        ({"truth": "nowhere"}, "nowhere: no such folder"),
        ({"labels": "nowhere.json"}, "nowhere.json: no labels"),
        ({"tumors": ("cancer",)}, "cancer, which is no label. Labels are kidney, tumor"),
        ({"patients": "nowhere.csv"}, "nowhere.csv: no patients"),
    ],
)
def test_wrong_use_is_said_in_one_line(study, change, message):
    study.config.update(change)
    with pytest.raises(UserError, match=message) as caught:
        study.run()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no labels to read"),
        ("{}", "no labels to read"),
        ('{"labels": {"background": 0, "tumor": 300}}', "300"),
        ('{"labels": {"background": 0, "tumor": 1, "ignore": 2}}', "ignore"),
    ],
)
def test_unusable_labels_are_refused(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_labels(str(tmp_path / "dataset.json"))


def test_a_folder_without_masks_is_refused(study):
    (study.folder / "empty").mkdir()
    study.config.prediction = str(study.folder / "empty")
    with pytest.raises(UserError, match=r"no \.nii\.gz or \.nii file"):
        study.run()


def test_the_command_line_takes_folders_and_says_its_exit_code(study):
    _truncate(study)
    command = [sys.executable, "-m", "tumorjax.main", "--config=configs/evaluation.py"]
    command += [f"--workdir={study.folder / 'work'}", f"--config.truth={study.folder / 'truth'}"]
    command += [f"--config.prediction={study.folder / 'prediction'}", "--config.workers=1"]
    command += [f"--config.labels={study.config.labels}", "--config.tumors=('tumor',)"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "4 cases evaluated, 1 in rejected.csv" in done.stdout
    done = subprocess.run([*command, "--config.truth="], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("tumorjax: config.truth and")


def test_real_kidney_masks_shifted_by_a_voxel(real_data, tmp_path):
    """On the files as the challenge stores them (I, P, L): slices are found to be axial."""
    for case in ("case_00064", "case_00134"):
        image = nib.load(real_data / "kits19" / f"{case}.nii.gz")
        mask = np.asarray(image.dataobj).astype(np.uint8)
        save(tmp_path / "truth" / f"{case}.nii.gz", mask, image.affine)
        save(tmp_path / "prediction" / f"{case}.nii.gz", np.roll(mask, 1, axis=1), image.affine)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABEL_VALUES}))
    config = get_config()
    config.truth, config.prediction = str(tmp_path / "truth"), str(tmp_path / "prediction")
    config.labels, config.tumors = str(tmp_path / "dataset.json"), ("tumor",)
    config.workers = 1
    assert evaluate.run(config, tmp_path / "work") == 0
    for row in read_csv(tmp_path / "work" / "cases.csv"):
        assert 80 < float(row["dsc"]) < 100
        assert float(row["nsd"]) > 99  # a voxel is under 2 mm in plane
        truth = np.asarray(nib.load(tmp_path / "truth" / f"{row['case']}.nii.gz").dataobj) == 2
        lesions, count = ndimage.label(truth, np.ones((3, 3, 3)))
        moved = np.roll(truth, 1, axis=1)
        assert int(row["n_lesions"]) == count
        assert int(row["n_detected"]) == len(np.unique(lesions[moved & truth]))


# Names, pictures, several models


def test_names_that_do_not_match_are_listed_both_ways(study, capsys):
    study.file("truth", 1).unlink()
    study.file("prediction", 2).unlink()
    study.file("prediction", 4).unlink()
    assert study.run() == 1
    printed = capsys.readouterr().out
    assert f"Only in {study.folder / 'truth'}: case_2, case_4;" in printed
    assert f"only in {study.folder / 'prediction'}: case_1\n" in printed
    assert list(study.rejected()) == ["case_1", "case_2", "case_4"]
    assert [row["case"] for row in study.rows()] == ["case_0", "case_3"]


def test_folders_without_a_common_name_are_refused(study):
    for number in range(5):
        path = study.file("prediction", number)
        path.rename(path.with_name(f"scan_{number}.nii.gz"))
    with pytest.raises(
        UserError, match=r"Only in .*truth: case_0, .*; only in .*: scan_0, .*scan_4"
    ):
        study.run()


def test_all_cases_may_be_bad(study):
    for number in range(5):
        study.file("truth", number).write_bytes(b"no mask")
    assert study.run() == 1
    assert len(study.rejected()) == 5
    assert study.rows() == []


def test_a_full_disk_is_said_in_one_line(study, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tumorjax.evaluation.results.write_csv_atomic", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        study.run()


def test_masks_of_our_networks_are_brought_to_their_classes(study, capsys):
    """Their folder says what the network knows; whatever else the truth has is background."""
    table = np.array([0, LABELS["kidney_left"], LABELS["kidney_lesion"]], np.uint8)
    for number in range(5):
        truth, prediction = (table[mask] for mask in masks(number))
        truth[:3, :3, :3] = LABELS["liver_lesion"]
        right = np.arange(30)[:, None, None] >= 15
        truth[(truth == LABELS["kidney_left"]) & right] = LABELS["kidney_right"]
        save(study.file("truth", number), truth)
        save(study.file("prediction", number), prediction)
    classes = {"kidney": ["kidney_left", "kidney_right"], "kidney_lesion": ["kidney_lesion"]}
    record = {
        "labels": {"background": 0, "kidney_left": 3, "kidney_right": 4, "kidney_lesion": 29},
        "classes": classes,
    }
    path = study.folder / "prediction" / "labels.json"
    path.write_text(json.dumps(record))
    study.config.labels, study.config.tumors = "", ()
    assert study.run() == 0
    assert {row["class"] for row in study.rows()} == {"kidney_lesion", "tumor"}
    assert "masks of a network that knows kidney, kidney_lesion" in capsys.readouterr().out
    summary = json.loads((study.folder / "work" / "summary.json").read_text())
    assert summary["labels"] == {"1": "kidney", "2": "kidney_lesion"}
    kidneys = [dice(*(mask == 1 for mask in masks(number))) for number in range(5)]
    assert summary["mean"]["1"]["Dice"] == pytest.approx(np.mean(kidneys))
    # Asked for by name, the liver's tumours are missed ones.
    study.config.tumors = ("liver_lesion", "kidney_lesion")
    assert evaluate.run(study.config, study.folder / "all") == 0
    (line,) = (
        r for r in read_csv(study.folder / "all" / "summary.csv") if r["class"] == "liver_lesion"
    )
    assert (line["n_tumors"], line["tumor_sensitivity"]) == ("5", "0")
    path.write_text("{")
    study.config.tumors = ()
    with pytest.raises(UserError, match=r"labels\.json: not what the prediction job writes"):
        study.run()


def test_values_that_stand_beside_the_masks_are_those_of_both_folders(study, capsys):
    """Masks of nnU-Net's networks and of challenges have values of their own."""
    path = study.folder / "prediction" / "labels.json"
    path.write_text(json.dumps({"labels": {"background": 0, "kidney": 1, "tumor": 2}}))
    study.run()
    expected = study.rows()
    study.config.labels = ""
    assert evaluate.run(study.config, study.folder / "beside") == 0
    assert read_csv(study.folder / "beside" / "cases.csv") == expected
    assert "labels.json: says what the values of both folders are" in capsys.readouterr().out


def test_pictures_show_the_scans_where_they_are(study, rng):
    hu = rng.normal(40, 10, (30, 36, 16)).astype(np.int16)
    hu[:2] = -1000
    save(study.folder / "images" / "case_1_0000.nii.gz", hu)
    save(study.folder / "images" / "case_2_0000.nii.gz", rng.normal(0, 300, (9, 9, 9)))
    study.config.images = str(study.folder / "images")
    assert study.run() == 0
    page = (study.folder / "work" / "worst" / "index.html").read_text()
    # Cases 1 and 2 are not as they should be; the scan of 2 is another one.
    assert page.count("<img") == 2
    assert page.count("smaller than its masks") == 1
    study.config.worst = 0
    assert evaluate.run(study.config, study.folder / "plain") == 0
    assert not (study.folder / "plain" / "worst").exists()
    assert not list((study.folder / "plain" / "cases").glob("*.npz"))


def second_model(study, skip=()):
    """Another model's masks, the truth but for a shift, for all cases but some."""
    for number in range(5):
        if number not in skip:
            shifted = np.roll(masks(number)[0], 1, axis=0)
            save(study.file("other", number), shifted)
    return str(study.folder / "other")


def test_two_models_are_compared_on_the_same_cases(study):
    study.config.compare = {"other model": second_model(study)}
    study.config.name, study.config.comparison.resamples = "mine", 200
    assert study.run() == 0
    work = study.folder / "work"
    alone = read_csv(work / "models" / "0-other-model" / "summary.csv")[0]
    mine = read_csv(work / "summary.csv")[0]
    (line,) = (r for r in read_csv(work / "comparison.csv") if r["metric"] == "dsc")
    assert (line["model"], line["other"], line["n_patients"]) == ("mine", "other model", "3")
    assert (line["value"], line["other_value"]) == (mine["dsc"], alone["dsc"])
    table = read_csv(work / "tables" / "table3.csv")
    assert [row["method"] for row in table] == ["other model", "mine"]
    # The finished evaluation of the other may be named instead of its masks.
    study.config.compare = {"other model": str(work / "models" / "0-other-model")}
    assert evaluate.run(study.config, study.folder / "again") == 0
    assert (study.folder / "again" / "comparison.csv").read_bytes() == (
        work / "comparison.csv"
    ).read_bytes()


def test_a_bad_mask_of_one_model_is_left_out_for_all(study, capsys):
    other = second_model(study)
    study.file("other", 2).write_bytes(b"no mask")
    study.config.compare = {"other": other}
    assert study.run() == 1
    assert "left out for all: case_2" in capsys.readouterr().out
    lines = read_csv(study.folder / "work" / "comparison.csv")
    assert {r["n_patients"] for r in lines if r["metric"] == "dsc"} == {"2"}
    rejected = read_csv(study.folder / "work" / "models" / "0-other" / "rejected.csv")
    assert [row["case"] for row in rejected] == ["case_2"]


def test_models_on_other_cases_are_refused(study):
    study.run()
    one, two = study.folder / "work", second_model(study, skip=(1,))
    study.config.prediction, study.config.compare = two, {"first": str(one)}
    study.file("truth", 1).unlink()
    with pytest.raises(UserError, match="first and other were not evaluated on the same cases"):
        evaluate.run(study.config, study.folder / "second")


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"x": "nowhere"}, r"compare\.x: nowhere is not there"),
        ({"mine": "nowhere"}, "'mine', which is this model's own name"),
    ],
)
def test_models_that_are_not_there_are_refused(study, compare, message):
    study.config.compare, study.config.name = compare, "mine"
    with pytest.raises(UserError, match=message):
        study.run()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("worst", -1, "worst is -1"),
        ("workers", -2, "workers is -2"),
        ("froc.sensitivity", 0.0, "froc.sensitivity is 0"),
        ("comparison.resamples", 0, "resamples is 0"),
        ("comparison.family", "class", "family is 'class'"),
    ],
)
def test_unusable_settings_of_the_job_are_refused(study, key, value, message):
    study.config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        study.run()
