"""How well an autoencoder gives a scan back: PSNR, SSIM and the error in HU by tissue."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter

from tumorjax import anatomy

# What is not labelled is told apart by its HU.
_RANGES = {
    "air": (-np.inf, -160.0),
    "fat": (-160.0, -30.0),
    "soft tissue": (-30.0, 130.0),
    "bone": (130.0, np.inf),
}
TISSUES = (*_RANGES, "organ", "tumor")


def psnr(truth: Float[np.ndarray, "..."], other: Float[np.ndarray, "..."]) -> float:
    """Returns the peak signal-to-noise ratio in dB of images in [-1, 1]; infinite where equal."""
    error = np.mean(np.square(truth.astype(np.float64) - other))
    return float(10 * np.log10(4 / error)) if error else float("inf")


def ssim(truth: Float[np.ndarray, "x y z"], other: Float[np.ndarray, "x y z"]) -> float:
    """Returns the structural similarity of two volumes in [-1, 1], at most 1.

    As Wang et al. (IEEE Transactions on Image Processing, 2004) define it, with their Gaussian
    window (sigma 1.5, here in 3D, 11 voxels across) and constants, averaged where the window lies
    inside the volume; sizes of 11 voxels at least.
    """
    a, b = truth.astype(np.float64), other.astype(np.float64)

    def smooth(x: Float[np.ndarray, "x y z"]) -> Float[np.ndarray, "x y z"]:
        return gaussian_filter(x, 1.5, truncate=3.5)

    mean_a, mean_b = smooth(a), smooth(b)
    variance_a = smooth(a * a) - mean_a**2
    variance_b = smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    values /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float(values[5:-5, 5:-5, 5:-5].mean())


def tissues(
    image: Float[np.ndarray, "..."], label: Int[np.ndarray, "..."], window: tuple[float, float]
) -> Int[np.ndarray, "..."]:
    """Returns the index in `TISSUES` of each voxel.

    Args:
        image: in [-1, 1].
        label: ids of `anatomy`, 0 for none.
        window: HU of -1 and 1.
    """
    low, high = window
    hu = low + (image + 1) / 2 * (high - low)
    result = np.zeros(image.shape, np.int64)
    for index, (first, last) in enumerate(_RANGES.values()):
        result[(hu >= first) & (hu < last)] = index
    result[label > 0] = TISSUES.index("organ")
    result[np.isin(label, list(anatomy.TUMORS.values()))] = TISSUES.index("tumor")
    return result


def measure(
    reconstruct: Callable[[Float[np.ndarray, "b x y z 1"]], Float[np.ndarray, "b x y z 1"]],
    batches: Iterable[Mapping[str, np.ndarray]],
    window: tuple[float, float],
) -> dict[str, Any]:
    """Returns how close reconstructions come to their scans.

    Args:
        reconstruct: from images [b, x, y, z, 1] in [-1, 1] to the same.
        batches: image [b, x, y, z, 1] in [0, 1], and label [b, x, y, z] with ids of `anatomy`.
        window: HU of 0 and 1.

    Returns:
        crops: how many; psnr (dB) and ssim: means over crops; hu_error and hu_bias: mean absolute
        and mean difference (reconstruction less scan) in HU over all voxels of each tissue; None
        for a tissue that no crop has.
    """
    scale = (window[1] - window[0]) / 2
    ratios, similarities = [], []
    sums = np.zeros((3, len(TISSUES)))
    for batch in batches:
        truth = batch["image"] * 2 - 1
        other = np.clip(np.asarray(reconstruct(truth)), -1, 1)
        kinds = tissues(truth[..., 0], batch["label"], window).ravel()
        difference = (other - truth).astype(np.float64).ravel() * scale
        for row, weights in enumerate((None, np.abs(difference), difference)):
            sums[row] += np.bincount(kinds, weights, len(TISSUES))
        for a, b in zip(truth[..., 0], other[..., 0], strict=True):
            ratios.append(psnr(a, b))
            similarities.append(ssim(a, b))
    counts = sums[0]

    def by_tissue(values: Float[np.ndarray, "tissues"]) -> dict[str, float | None]:
        return {
            name: round(float(value / count), 2) if count else None
            for name, value, count in zip(TISSUES, values, counts, strict=True)
        }

    return {
        "crops": len(ratios),
        "psnr": round(float(np.mean(ratios)), 2),
        "ssim": round(float(np.mean(similarities)), 4),
        "hu_error": by_tissue(sums[1]),
        "hu_bias": by_tissue(sums[2]),
    }
