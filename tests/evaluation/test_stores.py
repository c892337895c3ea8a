"""A network evaluated on a store; its masks, evaluated as files, give the same numbers."""

import json
import time

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from jax.tree_util import Partial
from ml_collections import ConfigDict

from configs import evaluation, prediction, preparation
from data_prep import prepare
from tumorjax import volumes
from tumorjax.anatomy import LABELS
from tumorjax.errors import UserError
from tumorjax.evaluation import evaluate, stores
from tumorjax.files import read_csv
from tumorjax.inference import predict, sliding_window
from tumorjax.metrics.detection import froc
from tumorjax.training import checkpoints


def ball(center, radius, shape):
    grid = np.indices(shape) - np.reshape(center, (3, 1, 1, 1))
    return (grid**2).sum(axis=0) <= radius**2


CLASSES = {"liver": ["liver"], "liver_lesion": ["liver_lesion"]}


def by_brightness(centres, x):
    """A network that knows classes by their brightness alone, so that the truth is known."""
    return -jnp.square((x - centres) * 30)


@pytest.fixture
def network(tmp_path, rng, monkeypatch):
    """A store of four scans in which brightness tells the label, but for one healthy scan."""
    url = str(tmp_path / "store")
    settings = {"spacing": [1.5, 1.5, 1.5], "window": [-175.0, 250.0]}
    centres = {0: 0.1, LABELS["liver"]: 0.5, LABELS["liver_lesion"]: 0.9}
    for number in range(4):
        label = np.zeros((24, 26, 20), np.uint8)
        label[ball((12, 13, 10), 9, label.shape)] = LABELS["liver"]
        if number:
            label[ball((12, 12 + number, 10), 3, label.shape)] = LABELS["liver_lesion"]
        image = np.vectorize(centres.get)(label) + rng.uniform(-0.02, 0.02, label.shape)
        if number == 0:
            image[11:13, 11:13, 10] = 0.9
        meta = {"patient": f"p{number % 3}"}
        volumes.write_case(
            url, f"c{number}", image.astype(np.float32), label, (1.5, 1.5, 1.5), meta, settings
        )
    trained = ConfigDict(
        {
            "task": {"classes": CLASSES},
            "training": {"patch_size": (16, 16, 16)},
            "preparation": {"spacing": (1.5, 1.5, 1.5), "window": (-175.0, 250.0)},
        }
    )
    apply = Partial(by_brightness, jnp.asarray(list(centres.values()), jnp.float32))
    monkeypatch.setattr(checkpoints, "load_model", lambda folder: (apply, trained))
    config = evaluation.get_config()
    config.checkpoint, config.data.store = str(tmp_path / "trained"), url
    config.split, config.workers = "id", 1
    return config, trained, tmp_path / "work"


def test_a_network_is_scored_on_a_store(network):
    config, _, workdir = network
    assert evaluate.run(config, workdir) == 0
    rows = {(row["case"], row["class"]): row for row in read_csv(workdir / "cases.csv")}
    for number in (1, 2, 3):
        row = rows[f"c{number}", "liver_lesion"]
        assert (row["dsc"], row["nsd"], row["n_detected"]) == ("100", "100", "1")
        assert float(row["score"]) > 0.9
    assert rows["c0", "tumor"]["false_positives"] == "1"
    assert rows["c3", "tumor"]["patient"] == "p0"
    line = read_csv(workdir / "summary.csv")[0]
    assert (line["split"], line["class"], line["n_patients"]) == ("id", "liver_lesion", "3")
    assert (line["tumor_sensitivity"], line["false_positives_per_scan"]) == ("100", "0.25")
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["labels"] == {"1": "liver", "2": "liver_lesion"}
    assert summary["mean"]["1"]["Dice"] > 0.99


def test_a_network_is_not_asked_again_for_what_is_there(network, monkeypatch):
    config, trained, workdir = network
    config.data.cases = ("c1", "c2")
    assert evaluate.run(config, workdir) == 0
    asked = []
    predict = sliding_window.predict

    def counting(apply, image, *arguments, **settings):
        asked.append(image.shape)
        return predict(apply, image, *arguments, **settings)

    monkeypatch.setattr(sliding_window, "predict", counting)
    config.data.cases = ()
    assert evaluate.run(config, workdir) == 0
    assert len(asked) == 2
    other = Partial(by_brightness, jnp.asarray([0.2, 0.5, 0.8], jnp.float32))
    monkeypatch.setattr(checkpoints, "load_model", lambda folder: (other, trained))
    evaluate.run(config, workdir)
    assert len(asked) == 6


def test_it_goes_on_where_it_was_stopped(network, monkeypatch):
    config, _, workdir = network
    evaluate.run(config, workdir / "whole")
    compute, asked = sliding_window.predict, []

    def stopped(apply, image, *arguments, **settings):
        asked.append(image.shape)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return compute(apply, image, *arguments, **settings)

    monkeypatch.setattr(sliding_window, "predict", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config, workdir / "parts")
    assert not (workdir / "parts" / "cases.csv").exists()
    assert evaluate.run(config, workdir / "parts") == 0
    assert len(asked) == 3 + 2  # the one that was stopped, and the last
    for name in ("cases.csv", "summary.json", "froc.csv", "thresholds.json", "worst/index.html"):
        there = [(workdir / part / name).read_bytes() for part in ("whole", "parts")]
        assert there[0] == there[1]


def test_a_store_made_otherwise_is_refused(network):
    config, trained, workdir = network
    trained.preparation.window = (-100.0, 250.0)
    with pytest.raises(UserError, match=r"made with the window .*-175.* trained with .*-100"):
        evaluate.run(config, workdir)
    trained.preparation.window = (-175.0, 250.0)
    trained.preparation.spacing = (2.0, 2.0, 2.0)
    assert evaluate.run(config, workdir) == 1
    reasons = [row["reason"] for row in read_csv(workdir / "rejected.csv")]
    assert len(reasons) == 4
    assert all("trained at (2.0, 2.0, 2.0)" in reason for reason in reasons)


def test_cases_that_are_not_in_the_store_are_refused(network):
    config, _, workdir = network
    config.data.cases = ("c1", "c9")
    with pytest.raises(UserError, match="no case c9"):
        evaluate.run(config, workdir)


def test_froc_is_that_of_the_networks_probabilities(network):
    config, trained, workdir = network
    config.froc.thresholds = (0.3, 0.6, 0.9)
    assert evaluate.run(config, workdir) == 0
    model = stores.open_model(config)
    truths, maps = [], []
    for case in model.cases:
        image, label = model.store.read(case, "image"), model.store.read(case, "label")
        output = sliding_window.predict(model.apply, image, trained.training.patch_size)
        truths.append(label == LABELS["liver_lesion"])
        maps.append(output[..., 2])
    expected = froc(truths, maps, [(1.5, 1.5, 1.5)] * 4, (0.3, 0.6, 0.9))
    lines = [r for r in read_csv(workdir / "froc.csv") if r["class"] == "liver_lesion"]
    assert [float(r["threshold"]) for r in lines] == [0.3, 0.6, 0.9]
    assert [int(r["n_detected"]) for r in lines] == expected.detected.tolist()
    false = [float(r["false_positives_per_scan"]) * 4 for r in lines]
    assert false == pytest.approx(expected.false_positives)
    assert {r["n_patients"] for r in lines} == {"3"}


def test_thresholds_are_written_for_annotation(network):
    config, _, workdir = network
    evaluate.run(config, workdir)
    record = json.loads((workdir / "thresholds.json").read_text())
    assert record["grid"] == "the network's grid, 1.5 x 1.5 x 1.5 mm"
    assert record["wanted_sensitivity"] == 90
    assert set(record["classes"]) == {"liver_lesion", "tumor"}
    entry = record["classes"]["liver_lesion"]
    assert entry == record["classes"]["tumor"]
    # Brightness tells all: every tumour is found, and the bright spot of the healthy scan with it.
    assert (entry["sensitivity"], entry["false_positives_per_scan"]) == (100, 0.25)
    assert entry["threshold"] in record["thresholds"]
    assert (entry["n_tumors"], entry["n_scans"], entry["identifiable"]) == (3, 4, True)
    assert {path.name for path in (workdir / "figures").iterdir()} == {"froc.png", "froc.pdf"}


def test_processes_beside_the_network_give_the_same_files(network):
    config, _, workdir = network
    evaluate.run(config, workdir / "alone")
    config.workers = 2
    evaluate.run(config, workdir / "beside")
    for name in ("cases.csv", "summary.csv", "summary.json", "froc.csv", "thresholds.json"):
        assert (workdir / "alone" / name).read_bytes() == (workdir / "beside" / name).read_bytes()


def test_the_next_scan_is_read_while_the_network_computes(network, monkeypatch):
    config, _, workdir = network
    events = []
    read, compute = volumes.Store.read, sliding_window.predict

    def reading(store, case, kind, *rest):
        events.append(("read", case))
        return read(store, case, kind, *rest)

    def computing(*arguments, **settings):
        number = sum(kind == "compute" for kind, _ in events)
        events.append(("compute", f"c{number}"))
        time.sleep(0.3)
        return compute(*arguments, **settings)

    monkeypatch.setattr(volumes.Store, "read", reading)
    monkeypatch.setattr(sliding_window, "predict", computing)
    config.worst = 0
    evaluate.run(config, workdir)
    for number in range(3):
        ahead = events.index(("read", f"c{number + 1}"))
        assert ahead < events.index(("compute", f"c{number + 1}"))
        # And no further: one scan is held beside the one that is computed on.
        if number < 2:
            assert events.index(("read", f"c{number + 2}")) > events.index(
                ("compute", f"c{number}")
            )


def test_tumors_may_be_chosen_and_must_be_known(network):
    config, _, workdir = network
    config.tumors = ("liver_lesion", "kidney_lesion")
    with pytest.raises(UserError, match=r"kidney_lesion, which is no label. Labels are liver, liv"):
        evaluate.run(config, workdir)


def test_patients_may_say_split_and_patient(network, tmp_path):
    config, _, workdir = network
    table = tmp_path / "patients.csv"
    table.write_text("case,patient,split\nc1,q,ood\nc2,q,ood\n")
    config.patients = str(table)
    evaluate.run(config, workdir)
    found = {row["case"]: (row["patient"], row["split"]) for row in read_csv(workdir / "cases.csv")}
    assert found == {"c0": ("p0", "id"), "c1": ("q", "ood"), "c2": ("q", "ood"), "c3": ("p0", "id")}
    assert [r["split"] for r in read_csv(workdir / "summary.csv")] == ["id", "id", "ood", "ood"]


def test_a_folder_without_its_config_is_no_checkpoint(tmp_path):
    config = evaluation.get_config()
    (tmp_path / "trained" / "checkpoints").mkdir(parents=True)
    config.checkpoint, config.data.store = str(tmp_path / "trained"), str(tmp_path / "store")
    with pytest.raises(UserError, match=r"trained: no config\.json"):
        evaluate.run(config, tmp_path / "work")


def test_too_little_memory_sets_one_scan_aside(network, monkeypatch):
    config, _, workdir = network
    compute = sliding_window.predict

    def tight(apply, image, *arguments, **settings):
        if image.max() > 0.85 and image.mean() > tight.limit:
            raise MemoryError
        return compute(apply, image, *arguments, **settings)

    means = [volumes.open_store(config.data.store).read(f"c{i}", "image").mean() for i in range(4)]
    tight.limit = sorted(means)[-2]
    monkeypatch.setattr(sliding_window, "predict", tight)
    assert evaluate.run(config, workdir) == 1
    (line,) = read_csv(workdir / "rejected.csv")
    assert line["case"] == f"c{int(np.argmax(means))}"
    assert "not enough memory" in line["reason"]


# The same numbers from masks


def write_ct(folder, case, spacing, rng):
    """A scan whose brightness tells the label, with two lesions, as nnU-Net's data sets have it."""
    size_mm = np.array([72.0, 66.0, 60.0])
    shape = np.round(size_mm / spacing).astype(int)
    grid = (np.indices(shape) + 0.5) * np.reshape(spacing, (3, 1, 1, 1))

    def inside(center, radius):
        return ((grid - np.reshape(center, (3, 1, 1, 1))) ** 2).sum(axis=0) <= radius**2

    label = np.zeros(shape, np.uint8)
    label[inside(size_mm / 2, 26)] = LABELS["liver"]
    for _ in range(2):
        label[inside(size_mm / 2 + rng.uniform(-14, 14, 3), rng.uniform(5, 9))] = 27
    hu = np.array([-132.0, 37.0, 207.0])[np.searchsorted([0, LABELS["liver"], 27], label)]
    # Some brightness is wrong, so that the network is.
    for _ in range(3):
        spot = inside(size_mm / 2 + rng.uniform(-20, 20, 3), rng.uniform(4, 7))
        hu[spot] = rng.choice([37.0, 207.0])
    hu = np.round(hu + rng.normal(0, 4, shape)).astype(np.int16)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-40.0, 12.0, 700.0)
    # Stored from right to left, as most scanners do.
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = shape[0] - 1
    for kind, values in (("imagesTr", hu), ("labelsTr", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        name = f"{case}_0000.nii.gz" if kind == "imagesTr" else f"{case}.nii.gz"
        nib.save(nib.Nifti1Image(values[::-1], affine @ flip), folder / kind / name)


def both_ways(tmp_path, monkeypatch, spacing, rng):
    """Rows and summary.json of a checkpoint on a store, and of its masks on the scans' grids."""
    scans = tmp_path / "scans"
    for number in range(3):
        write_ct(scans, f"case_{number}", spacing, rng)
    names = {"background": 0} | LABELS
    (scans / "dataset.json").write_text(
        json.dumps(
            {"labels": names, "channel_names": {"0": "CT"}, "numTraining": 3,
             "file_ending": ".nii.gz"}
        )
    )  # fmt: skip
    config = preparation.get_config("nnunet")
    config.input, config.output = str(scans), str(tmp_path / "store")
    config.workers = 1
    assert prepare.run(config, tmp_path / "preparation") == 0
    trained = ConfigDict(
        {
            "task": {"classes": CLASSES},
            "training": {"patch_size": (32, 32, 32)},
            "preparation": {"spacing": (1.5, 1.5, 1.5), "window": (-175.0, 250.0), "order": 3},
        }
    )
    apply = Partial(by_brightness, jnp.asarray([0.1, 0.5, 0.9], jnp.float32))
    monkeypatch.setattr(checkpoints, "load_model", lambda folder, step=None: (apply, trained))
    config = evaluation.get_config()
    config.checkpoint, config.data.store = str(tmp_path / "trained"), str(tmp_path / "store")
    config.workers = 1
    assert evaluate.run(config, tmp_path / "network") == 0
    config = prediction.get_config()
    config.checkpoint, config.input = str(tmp_path / "trained"), str(scans / "imagesTr")
    config.output = str(tmp_path / "masks")
    assert predict.run(config, tmp_path / "prediction") == 0
    config = evaluation.get_config()
    config.truth, config.prediction = str(scans / "labelsTr"), str(tmp_path / "masks")
    config.images, config.workers = str(scans / "imagesTr"), 1
    assert evaluate.run(config, tmp_path / "folders") == 0
    found = []
    for name in ("network", "folders"):
        rows = read_csv(tmp_path / name / "cases.csv")
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        found.append((rows, summary))
    return found


def test_masks_of_the_prediction_job_give_the_networks_numbers(tmp_path, monkeypatch, rng):
    """On scans that are on the network's grid already every number is the same."""
    (rows, summary), (mask_rows, mask_summary) = both_ways(
        tmp_path, monkeypatch, (1.5, 1.5, 1.5), rng
    )
    assert len(rows) == len(mask_rows) == 6
    assert any(0 < float(row["dsc"]) < 100 for row in rows)
    for row, other in zip(rows, mask_rows, strict=True):
        for column in set(row) - {"score"}:
            assert row[column] == other[column], column
        assert row["score"]
        assert not other["score"]  # masks have none
    assert summary["mean"] == mask_summary["mean"]
    assert summary["labels"] == mask_summary["labels"] == {"1": "liver", "2": "liver_lesion"}
    assert summary["grid"] == "the network's grid, 1.5 x 1.5 x 1.5 mm"
    assert mask_summary["grid"] == "the scans' own grids"


def test_on_other_grids_the_numbers_agree_up_to_resampling(tmp_path, monkeypatch, rng, capsys):
    (rows, _), (mask_rows, _) = both_ways(tmp_path, monkeypatch, (0.9, 0.9, 2.5), rng)
    for row, other in zip(rows, mask_rows, strict=True):
        assert (row["case"], row["class"]) == (other["case"], other["class"])
        assert float(row["dsc"]) == pytest.approx(float(other["dsc"]), abs=5)
        assert float(row["nsd"]) == pytest.approx(float(other["nsd"]), abs=5)
        assert float(row["truth_mm3"]) == pytest.approx(float(other["truth_mm3"]), rel=0.05)
        assert row["n_lesions"] == other["n_lesions"]
        assert row["n_detected"] == other["n_detected"]
    printed = capsys.readouterr().out
    assert "numbers are on the network's grid, 1.5 x 1.5 x 1.5 mm" in printed
    assert "numbers are on the scans' own grids" in printed
    for name, grid in (("network", "the network's grid, 1.5 x 1.5 x 1.5 mm"),
                       ("folders", "the scans' own grids")):  # fmt: skip
        folder = tmp_path / name
        assert {line["grid"] for line in read_csv(folder / "summary.csv")} == {grid}
        assert json.loads((folder / "evaluation.json").read_text())["grid"] == grid
        assert grid in (folder / "tables" / "table3.tex").read_text()
        assert grid.replace("'", "&#39;") in (folder / "worst" / "index.html").read_text()
