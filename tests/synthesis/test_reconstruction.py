"""PSNR, SSIM and errors by tissue against scikit-image and by hand."""

import numpy as np
import pytest

from tumorjax.anatomy import LABELS
from tumorjax.synthesis import reconstruction, reconstruction_figure

WINDOW = (-175.0, 250.0)


def test_psnr_and_ssim_are_scikit_images(rng):
    metrics = pytest.importorskip("skimage.metrics")
    truth = rng.uniform(-1, 1, (18, 16, 20)).astype(np.float32)
    other = np.clip(truth + rng.normal(0, 0.2, truth.shape), -1, 1).astype(np.float32)
    expected = metrics.peak_signal_noise_ratio(truth, other, data_range=2)
    assert reconstruction.psnr(truth, other) == pytest.approx(expected, rel=1e-6)
    expected = metrics.structural_similarity(
        truth.astype(float),
        other.astype(float),
        data_range=2,
        gaussian_weights=True,
        use_sample_covariance=False,
    )
    assert reconstruction.ssim(truth, other) == pytest.approx(expected, rel=1e-6)
    assert reconstruction.ssim(truth, truth) == pytest.approx(1)
    assert reconstruction.psnr(truth, truth) == np.inf


def test_tissues_by_label_and_else_by_hu():
    hu = np.array([-175.0, -100.0, 40.0, 200.0, 40.0, 40.0, -175.0], np.float32)
    label = np.array([0, 0, 0, 0, LABELS["liver"], LABELS["kidney_lesion"], LABELS["colon"]])
    image = (hu - WINDOW[0]) / (WINDOW[1] - WINDOW[0]) * 2 - 1
    found = [reconstruction.TISSUES[i] for i in reconstruction.tissues(image, label, WINDOW)]
    assert found == ["air", "fat", "soft tissue", "bone", "organ", "tumor", "organ"]


def test_errors_in_hu_are_those_that_were_put_in(rng):
    image = rng.uniform(0.3, 0.7, (2, 12, 12, 12, 1)).astype(np.float32)
    label = np.zeros((2, 12, 12, 12), np.uint8)
    label[:, :4] = LABELS["liver"]
    label[:, 4:6] = LABELS["liver_lesion"]
    step = 2 / (WINDOW[1] - WINDOW[0])

    def reconstruct(x):
        y = x.copy()
        y[:, :4] += 10 * step
        y[:, 4:5] -= 30 * step
        y[:, 5:6] += 10 * step
        return y

    found = reconstruction.measure(reconstruct, [{"image": image, "label": label}], WINDOW)
    assert found["crops"] == 2
    assert found["hu_error"]["organ"] == pytest.approx(10, abs=0.01)
    assert found["hu_bias"]["organ"] == pytest.approx(10, abs=0.01)
    assert found["hu_error"]["tumor"] == pytest.approx(20, abs=0.01)
    assert found["hu_bias"]["tumor"] == pytest.approx(-10, abs=0.01)
    assert found["hu_error"]["air"] is None


def test_the_figure_has_a_row_a_crop(tmp_path, rng):
    import matplotlib.image

    truth = rng.uniform(-1, 1, (3, 12, 12, 12, 1)).astype(np.float32)
    reconstruction_figure.write(tmp_path / "q.png", truth, truth * 0.9, WINDOW)
    picture = matplotlib.image.imread(tmp_path / "q.png")
    assert 0.85 < picture.shape[0] / picture.shape[1] < 1.1
    assert picture[..., :3].std() > 0.1
