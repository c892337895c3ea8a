"""The built-in cohort: what a reader may rely on, as facts about the files and the arrays."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data_prep import virtual_tumors
from data_prep.virtual_abdomen import (
    Case,
    check_settings,
    default_settings,
    plan,
    render,
    write_case,
    write_cohort,
)
from data_prep.virtual_scanner import OOD_SITES, SITES, TRAINING_SITES, Grid, add_noise
from data_prep.virtual_shapes import evaluate, smooth_field
from tumorjax.anatomy import HOST, LABELS, TUMORS, organ_labels
from tumorjax.errors import UserError
from tumorjax.files import read_csv

ROOT = Path(__file__).resolve().parents[2]
# Two patients at each of two hospitals, coarse, so that a case takes a tenth of a second.
TINY = {
    "sites": ["alder", "cedar"], "ood_sites": ["juniper"], "patients_per_site": 2,
    "ood_patients_per_site": 1, "follow_up_share": 0.0,
    "in_plane_mm": [5.0, 5.0], "slice_mm": [5.0, 5.0],
}  # fmt: skip


def tumor_case(tumor: str, number: int = 3, site: str = "alder") -> Case:
    return Case("BDMAP_00000001", number, "patient_000001", 0, site, (tumor,))


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def canonical(path: Path) -> nib.Nifti1Image:
    return nib.as_closest_canonical(nib.load(path))


@pytest.fixture(scope="module")
def patients():
    """Twelve scans of healthy adults with a whole abdomen, and no distractors: organs alone."""
    settings = default_settings() | {
        "body_scale": 1.0, "extent_mm": [400.0, 320.0, 310.0], "in_plane_mm": [4.0, 4.0],
        "slice_mm": [4.0, 4.0], "healthy_share": 1.0, "distractors": 0.0, "follow_up_share": 0.0,
    }  # fmt: skip
    cases = [case for case in plan(settings) if case.site == "alder"][:10]
    return [render(settings, case) for case in cases]


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_processes(tmp_path):
    write_cohort(tmp_path / "a", TINY, workers=1)
    write_cohort(tmp_path / "b", TINY, workers=2)
    write_cohort(tmp_path / "c", TINY | {"seed": 1}, workers=1)
    a, b, c = (hashes(tmp_path / name) for name in "abc")
    assert a == b
    scans = [name for name in a if name.endswith("ct.nii.gz")]
    assert len(scans) == 5
    assert all(a[name] != c[name] for name in scans)


def test_layout_is_abdomen_atlas_and_patients_csv_is_complete(tmp_path):
    cases = write_cohort(tmp_path, TINY, workers=1)
    rows = read_csv(tmp_path / "patients.csv")
    assert [row["case"] for row in rows] == [f"BDMAP_{i:08d}" for i in range(1, 6)]
    assert [row["site"] for row in rows] == ["alder", "cedar", "alder", "cedar", "juniper"]
    assert not list(tmp_path.glob(".*part"))
    for case in cases:
        folder = tmp_path / case.case
        image = nib.load(folder / "ct.nii.gz")
        assert image.get_data_dtype() == np.int16
        files = sorted((folder / "segmentations").iterdir())
        names = {path.name.removesuffix(".nii.gz") for path in files}
        assert names <= set(LABELS)
        assert {"liver", "pancreas", "kidney_left", "kidney_right", "spleen", "aorta"} <= names
        assert names & set(TUMORS) == set(case.tumors)
        for path in files:
            mask = nib.load(path)
            assert np.array_equal(mask.affine, image.affine)
            assert set(np.unique(np.asarray(mask.dataobj))) == {0, 1}


def test_hospitals_store_in_their_own_orientation_and_headers_carry_no_text(tmp_path):
    settings = TINY | {"sites": list(TRAINING_SITES), "patients_per_site": 1}
    codes = {}
    for case in write_cohort(tmp_path, settings, workers=1):
        image = nib.load(tmp_path / case.case / "ct.nii.gz")
        codes[case.site] = "".join(nib.aff2axcodes(image.affine))
        for field in ("descrip", "db_name", "intent_name", "aux_file"):
            assert image.header[field].tobytes().strip(b"\0") == b""
        voxels, _, _, grid = render(settings, case)
        back = canonical(tmp_path / case.case / "ct.nii.gz")
        assert np.array_equal(np.asarray(back.dataobj), voxels)
        np.testing.assert_allclose(back.header.get_zooms(), grid.spacing, rtol=1e-6)
        np.testing.assert_allclose(back.affine[:3, 3], grid.origin, atol=1e-3)
    assert codes == {site: SITES[site].orientation for site in codes}
    assert len(set(codes.values())) >= 5


def test_organs_have_the_volumes_of_adults(patients):
    """Ranges of adults in ml; the mean over patients lies well inside, each within twice that."""
    ranges = {
        "liver": (1200, 1900), "kidney_left": (120, 200), "kidney_right": (120, 200),
        "pancreas": (60, 120), "spleen": (120, 300),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        volumes = [
            (organ == LABELS[name]).sum() * np.prod(grid.spacing) / 1000
            for _, organ, _, grid in patients
        ]
        assert low < np.mean(volumes) < high, (name, volumes)
        assert 0.6 * low < min(volumes) <= max(volumes) < 1.5 * high, (name, volumes)
        assert np.std(volumes) > 0.05 * np.mean(volumes), name


def test_organs_lie_on_their_side_in_ras(patients):
    """x grows to the patient's right: the liver there, spleen and stomach on the left."""
    for _, organ, _, grid in patients:
        x, y, z = (
            {name: float(axis[np.nonzero(organ == LABELS[name])[i]].mean()) for name in LABELS
             if (organ == LABELS[name]).any()}
            for i, axis in enumerate(grid.axes())
        )  # fmt: skip
        assert x["liver"] > 30 > -30 > x["stomach"] > x["spleen"]
        assert x["kidney_right"] > 40 > -40 > x["kidney_left"]
        assert x["postcava"] > x["aorta"]
        assert x["lung_right"] > x["gall_bladder"] - 40 > x["lung_left"]
        assert y["stomach"] > y["kidney_left"]
        assert y["pancreas"] > y["kidney_right"]
        assert z["lung_left"] > z["spleen"] > z["kidney_left"]


def test_tissues_have_plausible_hu(patients):
    """Portal phase. Means of the voxels that are not at a border."""
    ranges = {
        "liver": (60, 145), "spleen": (85, 160), "pancreas": (60, 130), "kidney_left": (120, 240),
        "aorta": (110, 210), "lung_right": (-900, -650),
    }  # fmt: skip
    for image, organ, overlay, _ in patients:
        for name, (low, high) in ranges.items():
            inner = ndimage.binary_erosion((organ == LABELS[name]) & (overlay == 0))
            assert low < image[inner].mean() < high, name
        assert image.min() < -950
        assert image.max() > 300
        body = image > -300
        fat = (image > -140) & (image < -60)
        assert 0.15 < fat.sum() / body.sum() < 0.75


@pytest.mark.parametrize("tumor", ["liver_lesion", "pancreatic_lesion", "kidney_lesion"])
def test_tumors_lie_in_or_on_their_host_and_stand_out(tumor):
    settings = default_settings() | {"distractors": 0.0, "noise": 0.0}
    hosts = [LABELS[name] for name in organ_labels(HOST[tumor])]
    differences = []
    for number in range(6):
        image, organ, overlay, _ = render(settings, tumor_case(tumor, number))
        lesion = overlay == LABELS[tumor]
        host = np.isin(organ, hosts)
        assert lesion.any()
        # What bulges out lies in fat, never in another organ.
        assert not (lesion & (organ != 0) & ~host).any()
        assert (lesion & host).sum() >= virtual_tumors.LOOKS[tumor].fit * 0.8 * lesion.sum()
        healthy = host & ~ndimage.binary_dilation(lesion) & (overlay == 0)
        differences.append(image[lesion].mean() - image[ndimage.binary_erosion(healthy)].mean())
    assert -110 < np.median(differences) < -25


@pytest.mark.parametrize("tumor", sorted(virtual_tumors.SIZES))
def test_radii_follow_the_table_of_real_sizes(tumor, rng):
    radii = virtual_tumors.sample_radii(rng, tumor, 4000)
    measured = np.quantile(radii, (0.1, 0.25, 0.5, 0.75, 0.9))
    np.testing.assert_allclose(measured, virtual_tumors.SIZES[tumor]["radius"], rtol=0.06)
    assert virtual_tumors.sample_radii(rng, tumor, 200, largest=3.0).max() <= 3.0


@pytest.mark.parametrize("tumor", ["liver_lesion", "kidney_lesion"])
def test_grown_tumors_have_their_volume_and_the_elongation_of_real_ones(tumor, rng):
    ratios = []
    for _ in range(60):
        lesion = virtual_tumors.grow(rng, tumor, 12.0, (2.0, 2.0, 2.0))
        mask = lesion.level <= 1
        assert mask.sum() == pytest.approx(4 / 3 * np.pi * 6**3, abs=1)
        moments = np.linalg.eigvalsh(np.cov(np.argwhere(mask).T))
        ratios.append(np.sqrt(moments[0] / moments[2]))
    low, middle, high = virtual_tumors.SIZES[tumor]["axes"]
    assert np.median(ratios) == pytest.approx(middle, abs=0.12)
    assert np.quantile(ratios, 0.1) < middle < np.quantile(ratios, 0.9)
    assert low - 0.2 < np.quantile(ratios, 0.1)
    assert np.quantile(ratios, 0.9) < high + 0.12


def test_tumors_are_not_ellipsoids(rng):
    """The ellipsoid of the same moments misses a part of each tumour, as it does in real ones."""
    for _ in range(10):
        mask = virtual_tumors.grow(rng, "liver_lesion", 12.0, (1.5, 1.5, 1.5)).level <= 1
        points = np.argwhere(mask).astype(float)
        inverse = np.linalg.inv(np.cov(points.T))
        offset = np.argwhere(np.ones_like(mask)) - points.mean(0)
        # A solid ellipsoid's squared Mahalanobis radius is 5.
        ellipsoid = (np.einsum("ni,ij,nj->n", offset, inverse, offset) <= 5).reshape(mask.shape)
        dice = 2 * (mask & ellipsoid).sum() / (mask.sum() + ellipsoid.sum())
        assert 0.6 < dice < 0.96


def test_noise_has_each_hospitals_strength_and_grain():
    """In mid-body the noise is the site's figure; sharp kernels have less at low frequencies."""
    grid = Grid((96, 96, 8), (2.5, 2.5, 3.0), (-119.0, -94.0, 0.0))
    strength, grain = {}, {}
    for name, site in SITES.items():
        noise = np.zeros(grid.shape, np.float32, order="F")
        add_noise(noise, [1, 2], grid, site, 1.0, 1.0)
        strength[name] = noise[36:60, 36:60].std()
        coarse = noise.reshape(24, 4, 24, 4, 8).mean((1, 3))[9:15, 9:15]
        grain[name] = coarse.std() / strength[name]
        assert strength[name] == pytest.approx(site.noise, rel=0.12)
        assert noise[36:60, 36:60].mean() == pytest.approx(site.offset, abs=2)
    assert grain["birch"] < 0.6 * grain["alder"] < 0.6 * grain["cedar"]
    training = [strength[name] for name in TRAINING_SITES]
    assert np.mean([strength[name] for name in OOD_SITES]) > 1.25 * np.mean(training)


def test_ood_hospitals_are_never_trained_on():
    settings = default_settings()
    cases = plan(settings)
    trained = {case.site for case in cases if case.site in settings["sites"]}
    foreign = {case.site for case in cases} - trained
    assert trained == set(TRAINING_SITES)
    assert foreign == set(OOD_SITES)
    with pytest.raises(UserError, match="share alder"):
        plan(settings | {"ood_sites": ["alder"]})


def test_plan_has_the_shares_that_the_settings_ask_for():
    settings = default_settings() | {"patients_per_site": 100, "follow_up_share": 0.2}
    cases = plan(settings)
    first = {case.patient: case for case in cases if case.scan_number == 0}
    assert len(first) == 515
    assert len(cases) - len(first) == pytest.approx(0.2 * 515, abs=30)
    ill = [case for case in first.values() if case.tumors]
    assert 1 - len(ill) / len(first) == pytest.approx(0.3, abs=0.03)
    kinds = [case.tumors[0] for case in ill]
    assert max(map(kinds.count, set(kinds))) - min(map(kinds.count, set(kinds))) <= 1
    assert np.mean([len(case.tumors) == 2 for case in ill]) == pytest.approx(0.1, abs=0.04)


def test_follow_up_shows_the_same_patient_with_other_noise():
    settings = default_settings()
    case = tumor_case("liver_lesion")
    first = render(settings, case)
    second = render(settings, case._replace(scan_number=1))
    other = render(settings, case._replace(patient_number=4))
    names = ("liver", "spleen", "stomach", "pancreas", "kidney_left")
    volumes = [
        np.array([(organ == LABELS[name]).sum() * np.prod(grid.spacing) for name in names])
        for _, organ, _, grid in (first, second, other)
    ]
    np.testing.assert_allclose(volumes[0], volumes[1], rtol=0.05)
    assert np.abs(volumes[0] / volumes[2] - 1).max() > 0.1
    shape = np.minimum(first[0].shape, second[0].shape)
    part = tuple(slice(0, n) for n in shape)
    assert np.mean(first[0][part] == second[0][part]) < 0.5


def test_larger_settings_reach_the_pelvis_and_bring_the_other_tumors():
    settings = default_settings() | {
        "body_scale": 1.0, "extent_mm": [400.0, 320.0, 480.0], "in_plane_mm": [4.0, 4.0],
        "slice_mm": [4.0, 4.0], "tumors": ["colon_lesion", "esophagus_tumor", "endometrioma_tumor"],
    }  # fmt: skip
    for tumor in settings["tumors"]:
        _, organ, overlay, _ = render(settings, tumor_case(tumor))
        assert (overlay == LABELS[tumor]).any(), tumor
        assert (organ == LABELS[HOST[tumor]]).any()
        assert {LABELS["bladder"], LABELS["rectum"], LABELS["femur_left"]} <= set(np.unique(organ))
    with pytest.raises(UserError, match="pelvis"):
        check_settings(settings | {"extent_mm": [400.0, 320.0, 300.0]})


def test_a_killed_run_goes_on_to_the_same_files(tmp_path):
    script = textwrap.dedent(
        f"""
        from data_prep.virtual_abdomen import write_cohort
        write_cohort({str(tmp_path / "killed")!r}, {TINY!r}, workers=1,
                     progress=lambda done, total: print(done, flush=True))
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "2":
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    # What a kill in mid-case leaves.
    (tmp_path / "killed" / ".BDMAP_00000004.x.part").mkdir()
    kept = tmp_path / "killed" / "BDMAP_00000001" / "ct.nii.gz"
    before = kept.stat().st_mtime_ns
    counts = []
    write_cohort(tmp_path / "killed", TINY, workers=1, progress=lambda *a: counts.append(a))
    write_cohort(tmp_path / "whole", TINY, workers=1)
    assert counts[0][0] >= 2
    assert counts[-1] == (5, 5)
    assert kept.stat().st_mtime_ns == before
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*part"))


def test_other_settings_replace_the_cohort_and_foreign_cases_are_left_alone(tmp_path):
    write_cohort(tmp_path / "a", TINY, workers=1)
    changed = TINY | {"noise": 2.0, "patients_per_site": 1}
    write_cohort(tmp_path / "a", changed, workers=1)
    write_cohort(tmp_path / "b", changed, workers=1)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    (tmp_path / "real" / "BDMAP_00000007").mkdir(parents=True)
    with pytest.raises(UserError, match="BDMAP_00000007"):
        write_cohort(tmp_path / "real", TINY, workers=1)
    assert (tmp_path / "real" / "BDMAP_00000007").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 3}, "unknown settings seeds"),
        ({"sites": ["mayo"]}, "mayo"),
        ({"tumors": ["lung_lesion"]}, "lung_lesion"),
        ({"healthy_share": 1.5}, "healthy_share is 1.5"),
        ({"extent_mm": [240.0, 192.0]}, "extent_mm"),
        ({"slice_mm": [0.0, 3.0]}, "slice_mm"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        check_settings(change)


def test_smooth_fields_have_unit_variance_and_do_not_depend_on_the_grid(rng):
    field = smooth_field(rng, 10.0, (-200, -200, -200), (200, 200, 200))
    axes = [np.linspace(-190, 190, n) for n in (90, 80, 70)]
    values = evaluate(field, axes)
    assert values.shape == (90, 80, 70)
    assert values.mean() == pytest.approx(0, abs=0.1)
    assert values.std() == pytest.approx(1, abs=0.08)
    part = evaluate(field, [axes[0][10:20], axes[1][5:9], axes[2][60:]])
    np.testing.assert_allclose(part, values[10:20, 5:9, 60:], atol=1e-5)


@pytest.mark.slow
def test_one_full_size_case_takes_minutes_and_little_more_than_a_gigabyte(tmp_path):
    settings = default_settings(large=True) | {"slice_mm": [2.0, 2.0]}
    case = next(case for case in plan(settings) if case.tumors)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=write_case, args=(str(tmp_path), settings, case))
    start, peak = time.monotonic(), 0
    process.start()
    while process.is_alive():
        status = Path(f"/proc/{process.pid}/status")
        if status.exists():
            lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines)])
        process.join(0.2)
    assert process.exitcode == 0
    assert nib.load(tmp_path / case.case / "ct.nii.gz").shape[:2] == (512, 512)
    assert peak < 1.4e9
    assert time.monotonic() - start < 240
