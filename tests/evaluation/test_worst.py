"""Which pictures are taken and chosen, and that they show what they say."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from tumorjax.errors import CaseError
from tumorjax.evaluation import snapshots, worst
from tumorjax.evaluation.cases import evaluate_tumors
from tumorjax.evaluation.settings import complete_settings
from tumorjax.metrics.overlap import dice

SPACING = (1.0, 1.5, 3.0)
TUMORS = {"liver_lesion": 2, "kidney_lesion": 3}
SETTINGS = complete_settings({})


def ball(center, radius, shape=(160, 120, 30)):
    grid = (np.indices(shape) - np.reshape(center, (3, 1, 1, 1))) * np.reshape(
        SPACING, (3, 1, 1, 1)
    )
    return (grid**2).sum(axis=0) <= radius**2


@pytest.fixture
def masks():
    """Two missed lesions, one of them small; one found; two false ones."""
    truth, prediction = np.zeros((2, 160, 120, 30), np.uint8)
    truth[ball((80, 60, 15), 50)] = prediction[ball((80, 60, 15), 50)] = 1
    truth[ball((60, 60, 12), 9)] = 2
    truth[ball((100, 80, 20), 5)] = 2
    truth[ball((80, 40, 16), 8)] = 3
    prediction[ball((80, 42, 16), 8)] = 3
    prediction[ball((120, 60, 8), 6)] = 3
    prediction[ball((40, 60, 22), 4)] = 2
    return truth, prediction


def taken(truth, prediction, **settings):
    shots = snapshots.take(truth, prediction, SPACING, TUMORS, SETTINGS | settings)
    return {shot.kind: shot for shot in shots}


def test_the_largest_of_each_kind_is_taken(masks):
    shots = taken(*masks)
    voxel = np.prod(SPACING)
    missed, false = shots["missed"], shots["false"]
    assert (missed.tumor, missed.box[2]) == ("liver_lesion", 12)
    assert missed.volume_mm3 == pytest.approx(ball((60, 60, 12), 9).sum() * voxel)
    assert (false.tumor, false.box[2]) == ("kidney_lesion", 8)
    assert false.volume_mm3 == pytest.approx(ball((120, 60, 8), 6).sum() * voxel)
    differs = (np.isin(masks[0], (2, 3)) != np.isin(masks[1], (2, 3))).sum((0, 1))
    assert shots["differs"].box[2] == differs.argmax()


def test_cuts_are_of_the_masks_and_wide_enough(masks):
    for shot in taken(*masks).values():
        assert np.array_equal(shot.truth, masks[0][shot.box])
        assert np.array_equal(shot.prediction, masks[1][shot.box])
        for size, spacing in zip(shot.truth.shape, SPACING[:2], strict=True):
            assert size * spacing >= snapshots.WIDTH_MM - 2 * spacing


def test_cuts_at_a_border_are_moved_inside(masks):
    prediction = masks[1].copy()
    prediction[ball((3, 117, 2), 12)] = 2
    shot = taken(masks[0], prediction)["false"]
    x, y, _ = shot.box
    assert (x.start, y.stop) == (0, 120)
    assert (x.stop, y.stop - y.start) == (120, 80)


def test_specks_below_the_minimum_are_no_prediction(masks):
    size = ball((120, 60, 8), 6).sum() * np.prod(SPACING)
    assert taken(*masks, minimum_mm3=float(size))["false"].volume_mm3 == pytest.approx(size)
    assert "false" not in taken(*masks, minimum_mm3=float(size) + 1)


def test_a_perfect_or_empty_case_has_no_pictures(masks):
    assert not taken(masks[0], masks[0])
    healthy = np.minimum(masks[0], 1)
    assert not taken(healthy, healthy)
    assert set(taken(healthy, masks[1])) == {"false"}
    assert set(taken(masks[0], healthy)) == {"differs", "missed"}


def test_snapshots_are_read_as_they_were_kept(masks, tmp_path):
    lines = snapshots.keep(tmp_path, "a", *masks, SPACING, TUMORS, SETTINGS)
    assert [line["kind"] for line in lines] == ["differs", "missed", "false"]
    for line, shot in zip(lines, taken(*masks).values(), strict=True):
        back = snapshots.read(tmp_path, "a", line)
        assert back.box == shot.box
        assert np.array_equal(back.truth, shot.truth)
        assert np.array_equal(back.prediction, shot.prediction)


def entry(case, kind, dsc=50.0, volume=100.0):
    line = {"kind": kind, "class": "liver_lesion", "volume_mm3": volume}
    return worst.Entry(case, line, {"dsc": dsc, "class": "tumor"}, SPACING)


def test_the_worst_come_first():
    entries = [
        entry("a", "differs", 10.0),
        entry("b", "differs", 0.0, 50.0),
        entry("c", "differs", 0.0, 90.0),
        entry("d", "differs", 60.0),
        entry("a", "missed", volume=5.0),
        entry("b", "missed", volume=7.0),
    ]
    chosen = worst.choose(iter(entries), 3)
    assert [e.case for e in chosen["differs"]] == ["c", "b", "a"]
    assert [e.case for e in chosen["missed"]] == ["b", "a"]
    assert chosen["false"] == []


def page(tmp_path, masks, read_scan, cases=("case_1", "case_2"), count=2):
    entries = []
    for case in cases:
        names = {"case": case, "patient": case, "split": ""}
        rows = evaluate_tumors(*masks, SPACING, TUMORS, SETTINGS, None, names)
        pictures = snapshots.keep(tmp_path, case, *masks, SPACING, TUMORS, SETTINGS)
        result = {"case": case, "rows": rows, "pictures": pictures, "spacing": SPACING}
        entries += worst.entries_of(result)
    worst.write_page(tmp_path, entries, count, TUMORS, read_scan, "<model>", "the grid")
    return (tmp_path / "worst" / "index.html").read_text()


def test_the_page_names_cases_and_numbers(tmp_path, masks):
    text = page(tmp_path, masks, None)
    for title in worst.TITLES.values():
        assert title in text
    assert text.count("<img") == 6
    both = [np.isin(mask, (2, 3)) for mask in masks]
    dsc = 100 * dice(*both)
    assert f"DSC {dsc:.1f} %" in text
    assert "1 of 3 tumours found, 2 false" in text
    volume = ball((60, 60, 12), 9).sum() * np.prod(SPACING)
    radius = (volume * 3 / 4 / np.pi) ** (1 / 3)
    assert f"missed liver tumour, {volume:.0f} mm³ (radius {radius:.1f} mm as a sphere)" in text
    assert "&lt;model&gt;" in text
    assert "http" not in text
    for line in text.split('src="')[1:]:
        assert (tmp_path / "worst" / line.split('"')[0]).is_file()


def test_pictures_of_an_earlier_run_go(tmp_path, masks):
    page(tmp_path, masks, None)
    page(tmp_path, masks, None, count=1)
    assert len(list((tmp_path / "worst").glob("*.png"))) == 3


def test_a_scan_that_cannot_be_read_is_said(tmp_path, masks):
    def broken(case, box):
        raise CaseError(case, "the file is damaged", "Copy it again")

    text = page(tmp_path, masks, broken)
    assert text.count("scan not shown: the file is damaged") == 6


def near(pixels, color, tolerance=0.12):
    return np.abs(pixels[..., :3] - to_rgb(color)).max(-1) < tolerance


def test_contours_lie_where_the_masks_are(tmp_path, masks):
    """A missed lesion is outlined in the middle of its cut, beside the scan alone."""
    truth, prediction = masks
    seen = {}

    def scan(case, box):
        seen.setdefault(taken(truth, prediction)["missed"].box == box, box)
        return np.full(truth[box].shape, 0.5, np.float32)

    page(tmp_path, masks, scan, cases=("case_1",))
    pixels = matplotlib.image.imread(tmp_path / "worst" / "missed_01_case_1.png")
    height, width = pixels.shape[:2]
    assert width > 800  # two panels
    right = pixels[:, width // 2 :]
    assert not near(pixels[:, : width // 2], worst.TRUTH).any()  # the scan alone
    legend = right[: height // 4]
    body = right[height // 4 :]
    assert near(legend, worst.TRUTH).any()
    # The lesion is in the middle of its cut, and so is its contour.
    rows, columns = np.nonzero(near(body, worst.TRUTH))
    assert columns.mean() == pytest.approx(right.shape[1] / 2, abs=0.06 * right.shape[1])
    assert np.ptp(columns) > 30
    # No prediction lies in that cut's slice.
    assert not np.isin(prediction[seen[True]], (2, 3)).any()
    assert not near(body, worst.PREDICTION).any()


def test_right_is_left_and_front_is_up(masks):
    """A tumour in the patient's right front is in the upper left of the picture."""
    truth = np.zeros((100, 100), np.uint8)
    truth[70:80, 75:85] = 2
    shot = snapshots.Snapshot(
        "missed", "liver_lesion", 10.0, (slice(0, 100), slice(0, 100), 3), truth, truth * 0
    )
    row = {"class": "tumor", "dsc": 0.0}
    figure = worst.picture(
        worst.Entry("a", {"kind": "missed"}, row, (1.0, 1.0, 1.0)), shot, TUMORS, None
    )
    (contour,) = [c for c in figure.axes[0].collections if hasattr(c, "levels")]
    x, y = np.concatenate([path.vertices for path in contour.get_paths()]).T
    assert (x.min(), x.max()) == (pytest.approx(20, abs=0.6), pytest.approx(30, abs=0.6))
    assert (y.min(), y.max()) == (pytest.approx(75, abs=0.6), pytest.approx(85, abs=0.6))
    shown = figure.axes[0].images[0].get_array()
    assert shown[15:25, 20:30].min() > shown[50, 50]  # first row on top
