"""Real against real cannot be told apart, real against shifted can; and what the job leaves."""

import csv
import importlib.util
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import ndimage

from tumorjax import anatomy, models, volumes
from tumorjax.errors import UserError
from tumorjax.geometry import prepare_image
from tumorjax.synthesis import realism
from tumorjax.synthesis.realism_features import FEATURES, describe, encoder
from tumorjax.synthesis.realism_tests import (
    CLASSIFIERS,
    embed,
    histogram_distance,
    ks,
    match_sizes,
    two_sample,
)
from tumorjax.synthesis.realism_tumors import Case, open_folder, open_store, tumors_of
from tumorjax.training import checkpoints

SPACING = (4.0, 4.0, 4.0)
WINDOW = (-175.0, 250.0)
SETTINGS = {"spacing": SPACING, "window": WINDOW, "order": 1}


def scan(rng, contrast=-50.0, grain=12.0, lesions=1):
    """HU and labels of a liver with lesions in soft tissue."""
    shape = (26, 24, 22)
    grid = np.indices(shape) - np.array([13, 12, 11])[:, None, None, None]
    label = np.zeros(shape, np.uint8)
    label[(grid**2).sum(axis=0) < 10**2] = anatomy.LABELS["liver"]
    image = np.where(label > 0, 110.0, 20.0)
    noise = rng.normal(0, grain, shape)
    for number in range(lesions):
        middle = np.array([-5 + 9 * number, 0, 0]) + rng.uniform(-1, 1, 3)
        away = ((grid - middle[:, None, None, None]) ** 2).sum(axis=0)
        inside = away < rng.uniform(1.8, 3.6) ** 2
        label[inside] = anatomy.LABELS["liver_lesion"]
        image[inside] = 110 + contrast + rng.normal(0, 10)
    image = ndimage.gaussian_filter(image, 0.6) + noise
    # Both air and bone, as a scan has.
    image[:2], image[-1] = -1000, 400
    return image.astype(np.float32), label


def write_store(url, rng, cases, prefix, synthetic=False, **look):
    for number in range(cases):
        image, label = scan(rng, **look)
        scaled = ((np.clip(image, *WINDOW) - WINDOW[0]) / (WINDOW[1] - WINDOW[0])).astype("f4")
        meta = {"patient": f"{prefix}patient{number // 2}", "source": "virtual"}
        if synthetic:
            meta["synthetic"] = {"tumor": "liver_lesion", "from": "x"}
        volumes.write_case(url, f"{prefix}{number:02d}", scaled, label, SPACING, meta, SETTINGS)


def features_of(rng, count, **look):
    rows = []
    for _ in range(count):
        image, label = scan(rng, **look)
        case = Case("case", "patient", image, label, SPACING, ("liver_lesion",))
        (tumor,) = tumors_of(case, False, WINDOW, 4, describe, None)
        rows.append([tumor.intensities[name] for name in FEATURES])
    return np.array(rows)


@pytest.fixture(scope="module")
def looks():
    """Features of tumours of one look, of the same again, of others, and patients of two each."""
    rng = np.random.default_rng(7)
    same, again = features_of(rng, 40), features_of(rng, 40)
    shifted = features_of(rng, 40, contrast=+10.0)
    return same, again, shifted, [f"p{i // 2}" for i in range(80)]


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_real_against_real_is_a_coin_and_against_shifted_is_not(looks, classifier):
    same, again, shifted, patients = looks
    made = np.arange(80) >= 40
    options = {"classifier": classifier, "resamples": 200}
    equal = two_sample(np.concatenate([same, again]), made, patients, **options)
    assert equal["low"] < 0.5 < equal["high"]
    assert 0.3 < equal["auc"] < 0.7
    apart = two_sample(np.concatenate([same, shifted]), made, patients, **options)
    assert apart["auc"] > 0.97
    assert apart["low"] > 0.9
    assert (apart["n_real"], apart["patients_synthetic"], apart["folds"]) == (40, 20, 5)


def test_a_patient_s_own_mark_is_no_evidence(rng):
    # Every patient has features of its own, and real or synthetic tumours alone. Whoever could
    # learn patients by heart would be right; with whole patients held out nobody can.
    marks = rng.normal(size=(24, 5))
    of = np.repeat(np.arange(24), 4)
    features = marks[of] + 0.01 * rng.normal(size=(96, 5))
    made = of >= 12
    found = two_sample(features, made, [f"p{i}" for i in of], classifier="forest", resamples=300)
    assert found["low"] < 0.5 < found["high"]


def test_auc_is_that_of_pairs_within_folds(rng):
    from sklearn.metrics import roc_auc_score

    from tumorjax.synthesis.realism_tests import _pairs

    score, made = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    groups, fold = rng.integers(0, 9, 40), np.zeros(40, int)
    wins, pairs = _pairs(score, fold, made, groups)
    assert wins.sum() / pairs.sum() == pytest.approx(roc_auc_score(made, score))
    fold[20:] = 1
    score[20:] += 100  # Folds that do not share a scale change nothing.
    wins, pairs = _pairs(score, fold, made, groups)
    parts = [slice(0, 20), slice(20, 40)]
    counts = [made[p].sum() * (~made[p]).sum() for p in parts]
    expected = np.average([roc_auc_score(made[p], score[p]) for p in parts], weights=counts)
    assert wins.sum() / pairs.sum() == pytest.approx(expected)


def test_too_few_patients_are_said(rng):
    made = np.arange(20) >= 10
    patients = ["a", "b", "c"] * 3 + ["a"] + [f"s{i}" for i in range(10)]
    found = two_sample(rng.normal(size=(20, 3)), made, patients, classifier="logistic")
    assert found["auc"] is None
    assert found["reason"].startswith("3 patients with real and 10 with synthetic tumours")


def test_undefined_features_are_filled_or_dropped(looks):
    same, _, shifted, patients = looks
    features = np.concatenate([same, shifted])
    features[::7, 3] = np.nan
    features[:, 5] = np.nan
    made = np.arange(80) >= 40
    found = two_sample(features, made, patients, classifier="logistic", resamples=50)
    assert found["auc"] > 0.95
    assert embed(features[:30]).shape == (30, 2)
    assert embed(features[:7]) is None


def test_pairs_of_one_size(rng):
    radius = np.concatenate([rng.uniform(5, 20, 30), rng.uniform(3, 12, 50)])
    made = np.arange(80) >= 30
    chosen = match_sizes(radius, made)
    real, synthetic = np.sort(radius[chosen[~made[chosen]]]), np.sort(radius[chosen[made[chosen]]])
    assert len(real) == len(synthetic) >= 8
    assert len(set(chosen.tolist())) == len(chosen)
    np.testing.assert_allclose(real, synthetic, rtol=0.11)
    assert len(match_sizes(np.array([5.0, 50.0]), np.array([False, True]))) == 0


def test_ks_and_histogram_distances():
    assert ks([1, 2, 3, 4], [3.5, 5, 6, np.nan])["ks"] == pytest.approx(0.75)
    assert ks([1, 2, 3, 4], [3.5, 5, 6, np.nan])["n_synthetic"] == 3
    assert ks([], [1.0])["ks"] is None
    first, second = np.array([2.0, 2, 0, 0]), np.array([0.0, 1, 1, 0])
    assert histogram_distance(first, second) == pytest.approx(0.5)
    assert histogram_distance(first, np.zeros(4)) is None


def test_regions_and_features_of_a_known_lesion():
    spacing = (1.0, 1.0, 2.0)
    grid = np.meshgrid(
        *[(np.arange(n) - n // 2) * s for n, s in zip((60, 60, 30), spacing, strict=True)],
        indexing="ij",
    )
    away = np.sqrt(sum(g**2 for g in grid))
    label = np.where(away < 8, anatomy.LABELS["liver_lesion"], 0).astype(np.uint8)
    image = np.where(away < 8, 40.0, 100.0)
    # Another tumour, of another kind, is neither rim nor surroundings.
    label[:, 41:, :] = anatomy.LABELS["kidney_lesion"]
    image[:, 41:, :] = -170
    case = Case("case", "patient", image, label, spacing, ("liver_lesion",))
    (tumor,) = tumors_of(case, False, WINDOW, 4, describe, None)
    found = tumor.intensities
    assert found["lesion_mean"] == pytest.approx(40)
    assert found["rim_mean"] == pytest.approx(100)
    assert found["surroundings_mean"] == pytest.approx(100)
    assert found["contrast"] == pytest.approx(-60)
    assert found["lesion_deviation"] == pytest.approx(0, abs=1e-6)
    assert tumor.measures.radius_mm == pytest.approx(8, rel=0.03)
    edges = np.linspace(*WINDOW, 51)
    for row, value in zip(tumor.hu, (40, 100, 100), strict=True):
        assert row.sum() == pytest.approx(1)
        assert row[np.searchsorted(edges, value, "right") - 1] == pytest.approx(1)
    assert tumor.picture.shape == tumor.outline.shape == (81, 81)
    assert tumor.picture[40, 40] == 40
    assert tumor.outline.sum() == (away[:, :, 15] < 8).sum()


def test_noise_has_the_grain_that_it_should(rng):
    image = rng.normal(0, 10, (40, 40, 40))
    regions = np.zeros((3, 40, 40, 40), bool)
    regions[0, 5:20], regions[1, 20:22], regions[2, 22:35] = True, True, True
    found = describe(image, np.abs(image), regions, SPACING)
    # A voxel minus the mean of six others of independent noise.
    assert found["lesion_grain"] == pytest.approx(10 * np.sqrt(7 / 6), rel=0.02)
    assert found["grain_ratio"] == pytest.approx(1, abs=0.03)


def config(real, synthetic, **changes):
    path = Path(__file__).parents[2] / "configs" / "realism.py"
    spec = importlib.util.spec_from_file_location("realism_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.get_config()
    found.data.store, found.data.synthetic = str(real), str(synthetic)
    found.test.resamples = 50
    found.update(ConfigDict(changes))
    return found


def test_the_job_compares_two_stores_and_sets_damaged_cases_aside(tmp_path, rng, capsys):
    write_store(tmp_path / "real", rng, 10, "r")
    write_store(tmp_path / "made", rng, 9, "s", synthetic=True, contrast=20.0, lesions=2)
    # A case whose data is gone.
    broken = volumes.open_store(tmp_path / "real").record("r03")
    for part in (tmp_path / "real" / "cases" / "r03" / broken["token"] / "image").rglob("*"):
        if part.is_file() and part.name != "zarr.json":
            part.write_bytes(b"damaged")
    settings = config(tmp_path / "real", tmp_path / "made")
    assert realism.run(settings, tmp_path / "out") == 1
    summary = json.loads((tmp_path / "out" / "realism.json").read_text())
    assert [row["case"] for row in summary["rejected"]] == ["r03"]
    assert "r03" in (tmp_path / "out" / "rejected.csv").read_text()
    found = summary["classes"]["liver_lesion"]
    assert (found["n_real"], found["n_synthetic"]) == (9, 18)
    assert found["distances"]["number"]["ks"] == 1
    assert found["distances"]["contrast"]["ks"] > 0.9
    assert found["distances"]["radius_mm"]["ks"] < 0.65
    assert found["histograms"]["hu"]["lesion"] > 0.5 > found["histograms"]["hu"]["surroundings"]
    assert found["auc"]["forest"]["auc"] > 0.9
    with open(tmp_path / "out" / "realism.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27
    page = (tmp_path / "out" / "index.html").read_text()
    assert summary["headline"] in page
    for name in ("contact_sheet", "sizes", "shapes", "hu", "texture", "tsne", "auc"):
        assert f'id="figure-{name}"' in page
        assert (tmp_path / "out" / "figures" / f"{name}.pdf").stat().st_size > 1000
    # Again: nothing is computed anew.
    before = (tmp_path / "out" / "index.html").stat().st_mtime_ns
    assert realism.run(settings, tmp_path / "out") == 1
    assert (tmp_path / "out" / "index.html").stat().st_mtime_ns == before


def test_scans_of_the_synthesis_job_are_read_on_the_store_s_grid(tmp_path, rng):
    image, label = scan(rng)
    fine = [np.repeat(np.repeat(a, 2, 0), 2, 1) for a in (image, label)]
    affine = np.diag([-2.0, -2.0, 4.0, 1.0])
    folder = tmp_path / "scans" / "case1"
    (folder / "segmentations").mkdir(parents=True)
    nib.save(nib.Nifti1Image(fine[0][::-1, ::-1], affine), folder / "ct.nii.gz")
    tumor = (fine[1] == anatomy.LABELS["liver_lesion"]).astype(np.uint8)
    nib.save(
        nib.Nifti1Image(tumor[::-1, ::-1], affine),
        folder / "segmentations" / "liver_lesion.nii.gz",
    )
    (folder / "synthesis.json").write_text(json.dumps({"request": {"tumor": "liver_lesion"}}))
    source = open_folder(tmp_path / "scans", SETTINGS)
    case = source.read("case1")
    assert case.spacing == pytest.approx(SPACING)
    np.testing.assert_array_equal(case.label > 0, label == anatomy.LABELS["liver_lesion"])
    expected = prepare_image(fine[0], (2.0, 2.0, 4.0), SPACING, WINDOW, 1) * 425 - 175
    np.testing.assert_allclose(case.image, expected, atol=1e-3)
    (folder / "segmentations" / "liver_lesion.nii.gz").unlink()
    with pytest.raises(Exception, match="case1: liver_lesion"):
        source.read("case1")


def test_encoder_features_are_those_of_the_crop(tmp_path, rng):
    settings = {"widths": [4, 6, 8], "blocks": [1, 1, 1]}
    trained = ConfigDict(
        {
            "task": {"classes": {"liver": ["liver"]}},
            "model": {"name": "resenc_unet", "dtype": "float32"} | settings,
            "training": {"patch_size": [16, 16, 16], "deep_supervision": True},
            "preparation": {"spacing": list(SPACING), "window": list(WINDOW)},
        }
    )
    network = checkpoints.build_model(trained, deep_supervision=True, seed=3)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text(json.dumps(trained.to_dict()))
    with checkpoints.open_manager(tmp_path / "net") as manager:
        checkpoints.save(manager, 1, {"parameters": models.functional(network)[1]}, 0)
        manager.wait_until_finished()
    write_store(tmp_path / "real", rng, 2, "r")
    source = open_store(tmp_path / "real")
    encode, name = encoder(str(tmp_path / "net"), source)
    assert "resenc_unet" in name
    case = source.read("r00")
    found = encode(case, np.array([10.2, 12.0, 3.0]))
    # The crop begins at 10 - 8, 12 - 8, 3 - 8: five slices of air come first.
    crop = np.full((16, 16, 16), WINDOW[0], np.float32)
    crop[:, :, 5:] = case.image[2:18, 4:20, :11]
    x = network.stem(((crop - WINDOW[0]) / 425)[None, ..., None])
    for stage in network.encoder:
        x = stage(x)
    np.testing.assert_allclose(found, np.asarray(x).mean(axis=(0, 1, 2, 3)), atol=1e-4)
    assert found.shape == (8,)
    assert np.std(found) > 0
    other = source._replace(settings=source.settings | {"window": (-100.0, 200.0)})
    with pytest.raises(UserError, match="trained at window"):
        encoder(str(tmp_path / "net"), other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"store": ""}}, "config.data.store is empty"),
        ({"data": {"synthetic": "nowhere"}}, "no store"),
        ({"test": {"folds": 1}}, "folds is 1. Expected 2 or more"),
        ({"test": {"confidence": 95.0}}, "confidence is 95.0"),
        ({"checkpoint": "nowhere"}, "no config.json"),
    ],
)
def test_wrong_use_is_said(tmp_path, rng, changes, message):
    write_store(tmp_path / "real", rng, 1, "r")
    with pytest.raises(UserError, match=message):
        realism.run(config(tmp_path / "real", tmp_path / "real", **changes), tmp_path / "out")


def test_stores_that_cannot_be_compared_are_refused(tmp_path, rng):
    write_store(tmp_path / "real", rng, 1, "r")
    image, label = scan(rng, lesions=0)
    scaled = ((np.clip(image, *WINDOW) + 175) / 425).astype("f4")
    volumes.write_case(tmp_path / "other", "o1", scaled, label, SPACING, {}, SETTINGS)
    with pytest.raises(UserError, match=r"no kind of tumour is both real \(liver_lesion\)"):
        realism.write(tmp_path / "real", None, tmp_path / "other", ["o1"], tmp_path / "out")
    coarse = SETTINGS | {"spacing": (5.0, 5.0, 5.0)}
    volumes.write_case(tmp_path / "coarse", "c1", scaled, label, SPACING, {}, coarse)
    with pytest.raises(UserError, match="Give stores of one preparation"):
        realism.write(tmp_path / "real", None, tmp_path / "coarse", ["c1"], tmp_path / "out")
    with pytest.raises(UserError, match="settings colour are unknown"):
        realism.write(
            tmp_path / "real", None, tmp_path / "real", None, tmp_path / "out", {"colour": 1}
        )
