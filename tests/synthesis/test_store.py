"""The synthetic half of a study's scans: what is written, what is skipped, what is set aside."""

import numpy as np
import pytest
from scipy import ndimage

from tumorjax import anatomy, volumes
from tumorjax.data.cohort import Implant
from tumorjax.errors import CaseError, UserError
from tumorjax.synthesis import diffusion_render
from tumorjax.synthesis.store import make_store

SPACING = (3.0, 3.0, 3.0)
WINDOW = (-175.0, 250.0)
SETTINGS = {"synthesizer": "rules", "prior": "difftumor"}


@pytest.fixture
def real(tmp_path, rng):
    """Two healthy patients with a liver and two kidneys; the second's kidneys are small."""
    url = tmp_path / "real"
    for number, kidney in ((1, 24.0), (2, 13.0)):
        shape = (72, 56, 40)
        grid = np.meshgrid(*[(np.arange(n) - n / 2) * 3.0 for n in shape], indexing="ij")
        label = np.zeros(shape, np.uint8)
        image = np.full(shape, 20.0)
        for name, centre, radii, level in (
            ("liver", (50, 0, 0), (45, 50, 45), 110),
            ("kidney_left", (-70, 20, 0), (kidney, kidney, kidney * 1.5), 170),
            ("kidney_right", (-20, -40, 0), (kidney, kidney, kidney * 1.5), 170),
        ):
            inside = (
                sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1
            )
            label[inside] = anatomy.LABELS[name]
            image[inside] = level
        image = ndimage.gaussian_filter(image, 0.5) + rng.normal(0, 12, shape)
        scaled = ((np.clip(image, *WINDOW) + 175) / 425).astype(np.float32)
        meta = {"patient": f"patient{number}", "site": "north", "source": "virtual"}
        settings = {"spacing": SPACING, "window": WINDOW}
        volumes.write_case(url, f"BDMAP_{number}", scaled, label, SPACING, meta, settings)
    return volumes.open_store(url)


def plan(*rows):
    return [
        Implant(f"syn{i}", case, tumor, size, 100 + i) for i, (case, tumor, size) in enumerate(rows)
    ]


def test_synthetic_cases_hold_the_tumour_and_otherwise_the_healthy_scan(real, tmp_path):
    implants = plan(
        ("BDMAP_1", "liver_lesion", "small"),
        ("BDMAP_1", "kidney_lesion", "medium"),
        ("BDMAP_2", "liver_lesion", "large"),
    )
    seen = []
    rejected = make_store(real, tmp_path / "syn", implants, SETTINGS, lambda *a: seen.append(a))
    assert rejected == []
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    store = volumes.open_store(tmp_path / "syn")
    assert store.settings == real.settings
    assert store.cases == ["syn0", "syn1", "syn2"]
    assert store.verify() == []
    for implant in implants:
        record = store.record(implant.name)
        assert record["patient"] == f"patient{implant.case[-1]}"
        assert record["site"] == "north"
        made = record["synthetic"]
        assert (made["from"], made["tumor"], made["size"]) == (
            implant.case,
            implant.tumor,
            implant.size,
        )
        assert (made["seed"], made["synthesizer"], made["prior"]) == (
            implant.seed,
            "rules",
            "difftumor",
        )
        assert {tumor["class"] for tumor in record["tumors"]} == {implant.tumor}
        healthy, label = real.read(implant.case, "label"), store.read(implant.name, "label")
        tumor = label == anatomy.LABELS[implant.tumor]
        assert tumor.any()
        np.testing.assert_array_equal(label[~tumor], healthy[~tumor])
        before, after = real.read(implant.case, "image"), store.read(implant.name, "image")
        far = ndimage.distance_transform_edt(~tumor, sampling=SPACING) > 9
        np.testing.assert_array_equal(after[far], before[far])
        assert (after[tumor] != before[tumor]).mean() > 0.95
        host = {anatomy.LABELS[n] for n in anatomy.organ_labels(anatomy.HOST[implant.tumor])}
        # One kidney at most, and what sticks out of it lies in no organ.
        assert set(np.unique(healthy[tumor])) - {0} <= host
        assert len(set(np.unique(healthy[tumor])) - {0}) == 1
        # Tumours darker than the organ they replace, in HU by the store's window.
        organ = np.isin(healthy, list(host)) & tumor
        assert 425 * float(np.mean(after[organ] - before[organ])) < -15


def test_tumours_of_the_liver_grow_over_its_vessels(real, tmp_path):
    image, label = real.read("BDMAP_1", "image"), real.read("BDMAP_1", "label")
    vessels = (label == anatomy.LABELS["liver"]) & (np.indices(label.shape)[1] % 6 == 0)
    label[vessels] = anatomy.LABELS["hepatic_vessel"]
    volumes.write_case(real.url, "vessels", image, label, SPACING)
    make_store(real, tmp_path / "syn", plan(("vessels", "liver_lesion", "medium")), SETTINGS)
    store = volumes.open_store(tmp_path / "syn")
    tumor = store.read("syn0", "label") == anatomy.LABELS["liver_lesion"]
    assert (tumor & vessels).any()
    assert len(store.record("syn0")["tumors"]) == 1
    np.testing.assert_array_equal(ndimage.binary_fill_holes(tumor), tumor)


def test_both_kidneys_are_used(real, tmp_path):
    implants = plan(*[("BDMAP_1", "kidney_lesion", "small")] * 8)
    make_store(real, tmp_path / "syn", implants, SETTINGS)
    store, healthy = volumes.open_store(tmp_path / "syn"), real.read("BDMAP_1", "label")
    sides = [
        int(healthy[store.read(name, "label") == anatomy.LABELS["kidney_lesion"]].max())
        for name in store.cases
    ]
    assert set(sides) == {anatomy.LABELS["kidney_left"], anatomy.LABELS["kidney_right"]}


def test_finished_cases_are_left_alone_and_changed_requests_made_anew(real, tmp_path):
    implants = plan(("BDMAP_1", "liver_lesion", "small"), ("BDMAP_2", "liver_lesion", "small"))
    url = tmp_path / "syn"
    make_store(real, url, implants, SETTINGS)
    first = {name: volumes.open_store(url).record(name) for name in ("syn0", "syn1")}
    more = [*implants, Implant("syn2", "BDMAP_1", "kidney_lesion", "small", 1)]
    more[1] = Implant("syn1", "BDMAP_2", "liver_lesion", "medium", 101)
    make_store(real, url, more, SETTINGS)
    store = volumes.open_store(url)
    assert store.record("syn0") == first["syn0"]
    assert store.record("syn1")["synthetic"]["size"] == "medium"
    assert store.cases == ["syn0", "syn1", "syn2"]
    # Other settings of the synthesizer are another request.
    make_store(real, url, implants[:1], SETTINGS | {"texture": {"liver": {"rim_share": 1.0}}})
    assert volumes.open_store(url).record("syn0")["token"] != first["syn0"]["token"]
    # The same request in another folder and with other threads gives the same scan.
    make_store(real, tmp_path / "again", implants[:1], SETTINGS | {"workers": 1})
    again = volumes.open_store(tmp_path / "again").record("syn0")
    assert again["checksum"]["image"] == first["syn0"]["checksum"]["image"]
    assert again["checksum"]["label"] == first["syn0"]["checksum"]["label"]


def test_an_organ_too_small_takes_the_next_smaller_size_and_says_so(real, tmp_path):
    make_store(real, tmp_path / "syn", plan(("BDMAP_2", "kidney_lesion", "large")), SETTINGS)
    made = volumes.open_store(tmp_path / "syn").record("syn0")["synthetic"]
    assert made["requested_size"] == "large"
    assert made["size"] in ("medium", "small")
    token = volumes.open_store(tmp_path / "syn").record("syn0")["token"]
    make_store(real, tmp_path / "syn", plan(("BDMAP_2", "kidney_lesion", "large")), SETTINGS)
    assert volumes.open_store(tmp_path / "syn").record("syn0")["token"] == token


def test_scans_without_the_organ_are_set_aside_and_the_others_go_on(real, tmp_path):
    implants = plan(("BDMAP_1", "pancreatic_lesion", "small"), ("BDMAP_1", "liver_lesion", "tiny"))
    rejected = make_store(real, tmp_path / "syn", implants, SETTINGS)
    assert [(row["case"], row["stage"]) for row in rejected] == [("syn0", "synthesis")]
    assert "no pancreas in the scan" in rejected[0]["reason"]
    assert volumes.open_store(tmp_path / "syn").cases == ["syn1"]


def test_a_wrong_plan_is_an_error_before_anything_is_written(real, tmp_path):
    for row, message in (
        (("BDMAP_1", "brain_tumor", "small"), "tumour 'brain_tumor' is unknown"),
        (("BDMAP_1", "liver_lesion", "huge"), "size 'huge' is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            make_store(real, tmp_path / "syn", plan(row), SETTINGS)
    with pytest.raises(CaseError, match="BDMAP_9"):
        make_store(real, tmp_path / "syn", plan(("BDMAP_9", "liver_lesion", "small")), SETTINGS)
    twice = plan(("BDMAP_1", "liver_lesion", "small")) * 2
    with pytest.raises(UserError, match="several implants of the name syn0"):
        make_store(real, tmp_path / "syn", twice, SETTINGS)
    with pytest.raises(UserError, match="synthesizer 'dreams' is unknown"):
        make_store(real, tmp_path / "syn", twice[:1], {"synthesizer": "dreams"})
    assert not (tmp_path / "syn").exists()


@pytest.fixture
def diffusion(monkeypatch, make_trained):
    """Models of checkpoints "one" and "two" in the place of trained ones."""
    levels = {"one": (-0.1, 0.0, 0.1), "two": (-0.2, 0.0, 0.1)}

    def open_model(checkpoint, sampler=None, steps=None, guidance=None):
        if checkpoint == "coarse":
            return diffusion_render.make_model(make_trained(spacing=(4.0, 4.0, 4.0)))
        if checkpoint == "wide":
            return diffusion_render.make_model(make_trained(window=(-200.0, 300.0)))
        trained = make_trained(level=levels[checkpoint])
        return diffusion_render.make_model(trained, sampler=sampler, steps=steps)

    monkeypatch.setattr(diffusion_render, "open_model", open_model)
    return {"synthesizer": "diffusion", "prior": "difftumor", "checkpoint": "one"}


def test_a_diffusion_model_makes_a_store_of_its_own_look(real, tmp_path, diffusion):
    implants = plan(("BDMAP_1", "liver_lesion", "medium"), ("BDMAP_1", "kidney_lesion", "small"))
    assert make_store(real, tmp_path / "syn", implants, diffusion) == []
    store = volumes.open_store(tmp_path / "syn")
    assert store.settings == real.settings
    for name, tumor_name, level in (
        ("syn0", "liver_lesion", 13.0),
        ("syn1", "kidney_lesion", 57.0),
    ):
        label = store.read(name, "label")
        tumor = label == anatomy.LABELS[tumor_name]
        before, after = real.read("BDMAP_1", "image"), store.read(name, "image")
        far = ndimage.distance_transform_edt(~tumor, sampling=SPACING) > 6
        np.testing.assert_array_equal(after[far], before[far])
        core = ndimage.binary_erosion(tumor)
        assert float(np.mean(after[core])) * 425 - 175 == pytest.approx(level, abs=10)
    record = store.record("syn0")["synthetic"]
    assert record["synthesizer"] == "diffusion"
    assert len(record["model"]["fingerprint"]) == 16
    assert "texture" not in record


def test_a_store_of_another_model_is_made_anew(real, tmp_path, diffusion):
    implants = plan(("BDMAP_1", "liver_lesion", "small"))
    url = tmp_path / "syn"
    tokens = []
    for change in ({}, {}, {"checkpoint": "two"}, {"steps": 8}, {"synthesizer": "rules"}):
        make_store(real, url, implants, diffusion | change)
        tokens.append(volumes.open_store(url).record("syn0")["token"])
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 4


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("coarse", r"made with spacing 3, 3, 3, and .* trained with spacing 4, 4, 4"),
        ("wide", r"made with window -175, 250, and .* trained with window -200, 300"),
    ],
)
def test_models_of_another_grid_are_refused(real, tmp_path, diffusion, checkpoint, message):
    implants = plan(("BDMAP_1", "liver_lesion", "small"))
    with pytest.raises(UserError, match=message):
        make_store(real, tmp_path / "syn", implants, diffusion | {"checkpoint": checkpoint})
    assert not (tmp_path / "syn").exists()


def test_tumours_beyond_the_crop_of_a_model_become_smaller_ones(
    real, tmp_path, monkeypatch, make_trained
):
    model = diffusion_render.make_model(make_trained(crop=(20, 20, 20)))
    monkeypatch.setattr(diffusion_render, "open_model", lambda *settings: model)
    settings = {"synthesizer": "diffusion", "checkpoint": "small"}
    assert (
        make_store(real, tmp_path / "syn", plan(("BDMAP_1", "liver_lesion", "large")), settings)
        == []
    )
    made = volumes.open_store(tmp_path / "syn").record("syn0")["synthetic"]
    assert made["requested_size"] == "large"
    assert made["size"] in ("medium", "small")
