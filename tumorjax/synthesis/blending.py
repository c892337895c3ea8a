"""Putting a lesion into a scan without a trace: soft edges, and the scan's own noise.

A smooth patch would give a lesion away, and so would a vessel that shines through it.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

Mask = Bool[np.ndarray, "x y z"]

# Beyond this many sigmas the blurred edge is cut off: its weight there is under 0.3 %.
_EDGE_REACH = 2.75
# What varies more slowly than this sigma is anatomy and no noise.
_COARSEST_NOISE_MM = 2.5


def edge_weight(
    tumor: Mask, organ: Mask, steps: Float[np.ndarray, "3"], edge_mm: float
) -> Float[np.ndarray, "x y z"]:
    """Returns how much of the lesion each voxel takes.

    1 inside, blurred towards the rest of the organ, 0 outside it and beyond the blur's reach.
    Where the lesion sticks out of the organ it is blurred towards what is there.

    Args:
        tumor: the lesion's mask.
        organ: its host.
        steps: voxel size, mm.
        edge_mm: Gaussian sigma of the edge, mm.
    """
    sigma = edge_mm / steps
    host = organ | tumor
    if (tumor & ~organ).any():
        reach = 2 * np.ceil(_EDGE_REACH * sigma).astype(int) + 1
        host |= ndimage.maximum_filter(tumor & ~organ, size=tuple(reach))
    soft = ndimage.gaussian_filter(tumor.astype(np.float32), sigma, truncate=_EDGE_REACH)
    # Where the host ends the lesion does not fade: it is weighed against the host alone.
    whole = ndimage.gaussian_filter(host.astype(np.float32), sigma, truncate=_EDGE_REACH)
    weight = np.where(host, soft / np.maximum(whole, 1e-6), 0)
    return np.where(weight < 0.003, 0, np.minimum(weight, 1)).astype(np.float32)


def grain(
    random: np.random.Generator,
    image: Float[np.ndarray, "x y z"],
    host: Mask,
    steps: Float[np.ndarray, "3"],
    normal: float,
    spread: float,
    least_voxels: float = 0.0,
) -> Float[np.ndarray, "x y z"]:
    """Returns the scan's own noise inside the host, without its vessels, fat and gas.

    Args:
        random: for the noise that stands in where there is none to take over.
        image: HU, or what is left of them beside a smooth copy.
        host: where noise is wanted.
        steps: voxel size, mm.
        normal: median of the image in the host, HU.
        spread: its deviation there, HU.
        least_voxels: what is coarser than 2.5 mm is no noise, and neither is what is coarser than
            so many voxels (sigma of a Gaussian along each axis).

    Returns:
        HU, at most three deviations of the noise; 0 outside the host.
    """
    sigma = np.maximum(_COARSEST_NOISE_MM / steps, least_voxels)
    norm = ndimage.gaussian_filter(host.astype(np.float32), sigma, truncate=2.5)
    smooth = ndimage.gaussian_filter(np.where(host, image, np.float32(0)), sigma, truncate=2.5)
    detail = np.where(host, image - smooth / np.maximum(norm, 1e-3), 0)
    # What is not parenchyma, nor next to such, has no noise that could be taken over: it gets
    # noise of the same strength, of the correlation of a usual reconstruction kernel.
    foreign = host & (np.abs(image - normal) > max(3 * spread, 25.0))
    foreign = ndimage.maximum_filter(foreign, 3)
    own = detail[host & ~foreign]
    deviation = 1.4826 * float(np.median(np.abs(own))) if own.size >= 30 else spread
    deviation = min(deviation, _noise_level(image))
    # At the organ's outer border the scan's own partial volume stays: half fat is half fat.
    border = host & ~ndimage.binary_erosion(host, border_value=1)
    fill = ndimage.gaussian_filter(random.standard_normal(image.shape, np.float32), 0.6)
    fill *= deviation * filter_gain(0.6) ** 3
    clipped = np.where(foreign, fill, np.clip(detail, -3 * deviation, 3 * deviation))
    partial = border & (detail < -3 * deviation)
    return np.where(partial, detail, clipped).astype(np.float32)


def _noise_level(image):
    """An upper bound of the noise's deviation, from the evenest tenth of the crop's tissue."""
    mean = ndimage.uniform_filter(image, 3)
    variance = ndimage.uniform_filter(image * image, 3) - mean * mean
    tissue = variance[(mean > -150) & (mean < 300)]
    if not tissue.size:
        return 15.0
    # In even tissue the tenth percentile of local deviations is about 0.7 of the deviation.
    return 1.4 * float(np.sqrt(max(np.quantile(tissue, 0.1), 1.0)))


def organ_statistics(
    image: Float[np.ndarray, "x y z"], organ: Mask, reference: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Returns an organ's median HU and their deviation, robust against vessels and edges.

    Args:
        image: HU.
        organ: its mask.
        reference: HU of the tissue that counts in a hollow organ; None for all.
    """
    # Voxels at the organ's border hold some of its neighbours.
    inner = ndimage.binary_erosion(organ)
    values = image[inner if inner.sum() >= 30 else organ]
    if reference is not None:
        tissue = values[(values >= reference[0]) & (values <= reference[1])]
        values = tissue if tissue.size >= 10 else np.full(1, 45.0, np.float32)
    if values.size == 0:
        return 45.0, 10.0
    median = float(np.median(values))
    return median, 1.4826 * float(np.median(np.abs(values - median)))


def filter_gain(sigma: float) -> float:
    """Returns 1 / deviation of unit white noise after SciPy's Gaussian filter along one axis."""
    reach = max(int(3 * sigma + 0.5), 1)
    taps = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (taps / sigma) ** 2)
    return 1 / float(np.sqrt(np.sum((kernel / kernel.sum()) ** 2)))
