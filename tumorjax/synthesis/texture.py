"""Texture of hand-written tumours: what an organ's lesion looks like in HU.

A lesion has a mean HU, lower or higher than its organ's; smooth noise of several scales about it;
for some a rim and a darker core; an edge as blurred as the scanner would make it. The scan's own
noise is kept, so that a lesion is as grainy as its surroundings: a smooth patch would give it
away. Vessels and gas that the lesion replaces are taken out.

Sources. SyntheticTumors (Hu et al., CVPR 2023) draws liver lesions as the organ minus 65..145 HU
times a texture with mean 0.5..0.55, which is smoothed noise of two scales, and blurs the edge with
a sigma of 1..2 voxels; DiffTumor (Chen et al., CVPR 2024) blends with 0..4 mm. Contrasts of the
other organs are from clinical reports, cited with each organ in `TEXTURES`. The virtual cohort's
tumours are another author's work: nothing here was taken from them or fitted to them.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray
from scipy import ndimage

from tumorjax.synthesis.blending import edge_weight, filter_gain, grain, organ_statistics

Range = tuple[float, float]


class Texture(NamedTuple):
    """How an organ's lesions look. Ranges are drawn from evenly, once a lesion.

    Args:
        contrast: lesion mean minus reference, HU.
        reference: None where the reference is the organ's local median; a range in HU where it is
            the soft tissue of a hollow organ's wall (voxels outside it are lumen or gas).
        limits: the lesion's mean stays within these, HU: an unenhanced organ of 35 HU has no
            lesions of -60 HU.
        variation: standard deviation of the smooth noise, HU.
        scales_mm: Gaussian sigmas of that noise, fine to coarse, equally strong.
        edge_mm: Gaussian sigma of the edge.
        rim_share: probability of a rim (capsule, wall, enhancing margin).
        rim: its contrast to the lesion, HU.
        rim_mm: its thickness, mm.
        core_share: probability of a core (necrosis) in lesions of more than 10 mm radius.
        core: its contrast to the lesion, HU.
        mass_effect: how far the lesion pushes its surroundings outwards, as a part of its
            radius; 0 leaves everything beyond the edge as it was.
    """

    contrast: Range
    limits: Range
    variation: Range
    scales_mm: tuple[float, ...]
    edge_mm: Range
    reference: Range | None = None
    rim_share: float = 0.0
    rim: Range = (0.0, 0.0)
    rim_mm: Range = (1.5, 3.0)
    core_share: float = 0.0
    core: Range = (0.0, 0.0)
    mass_effect: float = 0.0


TEXTURES: dict[str, Texture] = {
    # SyntheticTumors: 65..145 HU times a mean of 0.5..0.55; its noise has sigmas of 3 to 15
    # voxels of 1 mm. Rims: hypovascular metastases with an enhancing margin, capsules of HCC.
    "liver": Texture(
        contrast=(-80.0, -32.0),
        limits=(10.0, 90.0),
        variation=(6.0, 18.0),
        scales_mm=(1.5, 4.0, 9.0),
        edge_mm=(1.0, 2.0),
        rim_share=0.25,
        rim=(8.0, 30.0),
        core_share=0.35,
        core=(-30.0, -10.0),
    ),
    # Ductal adenocarcinoma is ill-defined and enhances less than the gland; 5 to 11 % are
    # isoattenuating (Diagnostics 2021;11:2166), which the weak end of the contrast stands for.
    "pancreas": Texture(
        contrast=(-60.0, -12.0),
        limits=(15.0, 90.0),
        variation=(4.0, 11.0),
        scales_mm=(1.5, 3.5, 8.0),
        edge_mm=(1.2, 2.6),
        core_share=0.25,
        core=(-30.0, -10.0),
    ),
    # Papillary carcinomas measure 41..95 HU in the portal and 18..91 in the nephrographic phase
    # (AJR 2018, 42 homogeneous ones), parenchyma 140..200; clear cell ones enhance more and are
    # mottled. Pseudocapsules are common; large ones have necrotic cores.
    "kidney": Texture(
        contrast=(-110.0, -35.0),
        limits=(18.0, 130.0),
        variation=(8.0, 22.0),
        scales_mm=(1.5, 4.0, 10.0),
        edge_mm=(0.8, 1.6),
        rim_share=0.35,
        rim=(10.0, 35.0),
        core_share=0.5,
        core=(-50.0, -15.0),
    ),
    # Carcinomas measure 91 HU after contrast and 43 before, fluid in the lumen 14 (Oto et al.,
    # Eur Radiol 2003;13:1657): brighter than the wall, and solid where the lumen was.
    "colon": Texture(
        contrast=(10.0, 40.0),
        limits=(35.0, 115.0),
        variation=(5.0, 13.0),
        scales_mm=(1.5, 4.0, 8.0),
        edge_mm=(0.8, 1.8),
        reference=(0.0, 150.0),
        core_share=0.3,
        core=(-30.0, -10.0),
    ),
    # Squamous cell carcinoma minus normal wall: 23.9 +- 10.6 HU (Li et al., World J Radiol
    # 2012;4:179).
    "esophagus": Texture(
        contrast=(10.0, 40.0),
        limits=(35.0, 115.0),
        variation=(4.0, 11.0),
        scales_mm=(1.5, 4.0, 8.0),
        edge_mm=(0.8, 1.8),
        reference=(0.0, 150.0),
    ),
    # Endometriomas are cysts of blood products: no enhancement inside, a mildly enhancing wall.
    "uterus": Texture(
        contrast=(-75.0, -30.0),
        limits=(12.0, 70.0),
        variation=(2.0, 6.0),
        scales_mm=(2.0, 6.0),
        edge_mm=(0.8, 1.4),
        rim_share=0.7,
        rim=(10.0, 35.0),
    ),
}

# What is left of a contrast, HU, where a lesion's limits would swallow it or turn it round.
_LEAST_CONTRAST = 8.0
# The mass effect ends this far from the lesion, within the context that is given; and moves less
# than half of that, so that nothing is folded over.
_PUSH_REACH_MM, _MOST_PUSH_MM = 12.0, 5.0
# How far around a lesion its organ's local HU is looked at, mm.
CONTEXT_MM = 15.0


def generator(key: PRNGKeyArray) -> np.random.Generator:
    """Returns NumPy's generator for a jax.random key (typed or raw): noise at NumPy's speed."""
    if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return np.random.default_rng(np.asarray(key, np.uint32).ravel().tolist())


def smooth_noise(
    key: PRNGKeyArray,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    scales_mm: tuple[float, ...],
) -> Float[np.ndarray, "x y z"]:
    """Draws a sum of Gaussian-filtered white noises, equally strong, with variance 1.

    Args:
        key: jax.random key.
        shape: voxels along x, y and z.
        spacing: (x, y, z) in mm.
        scales_mm: sigma of each filter, mm.

    Returns:
        Noise with mean 0 and variance 1 in expectation (not normalised per draw, so that small
        lesions do not all come out alike).
    """
    random = generator(key)
    total = np.zeros(shape, np.float32)
    for scale in scales_mm:
        # A coarse noise is drawn on a coarse grid; two samples a sigma describe it.
        step = np.maximum(np.asarray(spacing), scale / 2)
        coarse = tuple(
            int(np.ceil(n * s / t)) + 2 for n, s, t in zip(shape, spacing, step, strict=True)
        )
        sigma = scale / step
        margin = tuple(int(np.ceil(3 * s)) for s in sigma)
        noise = random.standard_normal(
            tuple(n + 2 * m for n, m in zip(coarse, margin, strict=True)), np.float32
        )
        noise = ndimage.gaussian_filter(noise, sigma, truncate=3.0)
        noise = noise[tuple(slice(m, m + n) for m, n in zip(margin, coarse, strict=True))]
        noise *= np.prod([filter_gain(s) for s in sigma])
        for axis in range(3):
            noise = _resample_axis(noise, axis, shape[axis], spacing[axis] / step[axis])
        total += noise
    return total / np.float32(np.sqrt(len(scales_mm)))


def render(
    key: PRNGKeyArray,
    image: Float[np.ndarray, "x y z"],
    organ: Bool[np.ndarray, "x y z"],
    tumor: Bool[np.ndarray, "x y z"],
    spacing: tuple[float, float, float],
    texture: Texture,
) -> Float[np.ndarray, "x y z"]:
    """Draws a lesion into a crop of a scan.

    Args:
        key: jax.random key.
        image: the crop, HU; best with a margin of `CONTEXT_MM` around the lesion.
        organ: the host organ, without lesions that are already there.
        tumor: where the lesion is to be.
        spacing: (x, y, z) in mm.
        texture: how the lesion looks.

    Returns:
        The crop with the lesion, HU float32. Voxels beyond the edge's reach (at most 7 mm) are
        the input's bit for bit, and so are those outside the organ where the lesion does not
        stick out of it.
    """
    random = generator(jax.random.fold_in(key, 0))
    noise_key = jax.random.fold_in(key, 1)
    steps = np.asarray(spacing, np.float64)
    radius = (tumor.sum() * np.prod(steps) * 3 / 4 / np.pi) ** (1 / 3)
    draw = {
        name: random.uniform(*getattr(texture, name))
        for name in ("contrast", "variation", "edge_mm", "rim", "rim_mm", "core")
    }
    has_rim = random.random() < texture.rim_share
    has_core = random.random() < texture.core_share and radius > 10

    host = organ | tumor
    normal, spread = organ_statistics(image, organ, texture.reference)
    mean = _lesion_mean(normal, draw["contrast"], texture.limits)
    if texture.mass_effect > 0:
        image = _push(image, host, tumor, steps, texture.mass_effect * radius)

    lesion = np.full(image.shape, mean, np.float32)
    lesion += draw["variation"] * smooth_noise(noise_key, image.shape, spacing, texture.scales_mm)
    if has_rim or has_core:
        depth = _depth(tumor, steps)
        if has_rim:
            lesion += draw["rim"] * np.exp(-((depth / draw["rim_mm"]) ** 2))
        if has_core:
            # Dark from about half of the way in.
            way = np.clip(depth / (0.8 * radius), 0, 1)
            lesion += draw["core"] / (1 + np.exp(-(way - 0.5) / 0.12)).astype(np.float32)
    lesion += grain(random, image, host, steps, normal, spread)

    weight = edge_weight(tumor, organ, steps, draw["edge_mm"])
    touched = weight > 0
    result = image.copy()
    result[touched] += weight[touched] * (lesion[touched] - image[touched])
    return result


def _lesion_mean(normal, contrast, limits):
    """Mean HU of the lesion: within the limits, yet on its side of the organ by a little."""
    mean = min(max(normal + contrast, limits[0]), limits[1])
    if contrast < 0:
        return min(mean, normal + max(contrast, -_LEAST_CONTRAST))
    return max(mean, normal + min(contrast, _LEAST_CONTRAST))


def _depth(mask, steps):
    """Distance to the outside of a mask, mm; on a grid of at most 40 voxels an axis."""
    stride = np.maximum(1, np.ceil(np.asarray(mask.shape) / 40)).astype(int)
    coarse = np.pad(mask[tuple(slice(None, None, s) for s in stride)], 1)
    depth = ndimage.distance_transform_edt(coarse, sampling=steps * stride)[1:-1, 1:-1, 1:-1]
    depth = depth.astype(np.float32)
    for axis in range(3):
        depth = _resample_axis(depth, axis, mask.shape[axis], 1 / stride[axis])
    return depth


def _push(image, host, tumor, steps, push_mm):
    """Moves the host's content outwards around the lesion, fading with distance and at borders."""
    centre = np.argwhere(tumor).mean(axis=0)
    grid = np.indices(image.shape, sparse=True)
    offset = [(g - c) * s for g, c, s in zip(grid, centre, steps, strict=True)]
    distance = np.sqrt(sum(o**2 for o in offset)) + 1e-6
    edge = (tumor.sum() * np.prod(steps) * 3 / 4 / np.pi) ** (1 / 3)
    # Nothing moves at the host's border, so that its mask stays true.
    room = np.clip(_depth(host, steps) / 5 - 0.2, 0, 1)
    beyond = np.maximum(distance - edge, 0)
    shift = min(push_mm, _MOST_PUSH_MM) * np.clip(1 - beyond / _PUSH_REACH_MM, 0, 1) * room
    points = np.stack(
        [g - shift * o / distance / s for g, o, s in zip(grid, offset, steps, strict=True)]
    )
    moved = ndimage.map_coordinates(image, points, order=1, mode="nearest")
    return np.where(host & (shift > 0.05), moved, image).astype(np.float32)


def _resample_axis(array, axis, size, step):
    """Linear interpolation along an axis at 0, step, 2 step, ..., held at the end."""
    if step == 1 and array.shape[axis] >= size:
        return array[(slice(None),) * axis + (slice(size),)]
    last = array.shape[axis] - 1
    position = np.minimum(np.arange(size) * step, last)
    low = np.minimum(position.astype(np.int64), max(last - 1, 0))
    shape = [1] * array.ndim
    shape[axis] = size
    part = (position - low).astype(np.float32).reshape(shape)
    return (
        np.take(array, low, axis) * (1 - part)
        + np.take(array, np.minimum(low + 1, last), axis) * part
    )
