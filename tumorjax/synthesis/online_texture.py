"""Lesions drawn into crops on the device: `blending` and `texture` as pure functions under jit.

All here works on one crop [x, y, z] of a batch, is meant to be vmapped, and has no shape that
depends on values. Smoothing is a product with a matrix along each axis, which accelerators like
best. Two things differ from the host's versions: medians are means without what lies far out (a
sort would cost more than all the rest), and how deep a voxel lies in a lesion is read off the
lesion's level set.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from tumorjax.synthesis.texture import Texture

Triple = tuple[float, float, float]
Image = Float[Array, "x y z"]
Mask = Bool[Array, "x y z"]

_EDGE_REACH = 2.75
_COARSEST_NOISE_MM = 2.5
_LEAST_CONTRAST = 8.0
# A normal distribution cut at two deviations has this part of its deviation.
_CUT_DEVIATION = 0.8796
# Of the noise that stands in where a scan has none to take over, voxels.
_KERNEL = 0.6


class Textures(NamedTuple):
    """Textures of several organs as numbers; each array's first axis is the organ.

    Attributes:
        ranges: what is drawn evenly, HU or mm: contrast, variation, edge, rim, rim's thickness,
            core, each (least, most).
        limits: of a lesion's mean, HU.
        reference: HU of the tissue that counts as the organ.
        share: probability of a rim and of a core.
        noise: for each axis the matrices of the noises' filters [organ, scale, n, n].
    """

    ranges: Float[Array, "*k 6 2"]
    limits: Float[Array, "*k 2"]
    reference: Float[Array, "*k 2"]
    share: Float[Array, "*k 2"]
    noise: tuple[Float[Array, "*k s n n"], ...]


def stack_textures(
    looks: Sequence[Texture], shape: tuple[int, int, int], spacing: Triple
) -> Textures:
    """Returns organs' textures as numbers for crops of a shape.

    Args:
        looks: of each organ; the mass effect is left out.
        shape: of the crops, voxels.
        spacing: (x, y, z) in mm.
    """
    names = ("contrast", "variation", "edge_mm", "rim", "rim_mm", "core")
    scales = max(len(look.scales_mm) for look in looks)
    noise = []
    for size, step in zip(shape, spacing, strict=True):
        filters = np.zeros((len(looks), scales, size, size), np.float32)
        for index, look in enumerate(looks):
            for number, scale in enumerate(look.scales_mm):
                distance = np.subtract.outer(np.arange(size), np.arange(size)) * step / scale
                matrix = np.exp(-0.5 * distance**2)
                # Rows of length 1 keep the variance of white noise, at the crop's border too; the
                # noises' sum has variance 1.
                matrix /= np.sqrt((matrix**2).sum(axis=1, keepdims=True))
                filters[index, number] = matrix / len(look.scales_mm) ** (1 / 6)
        noise.append(jnp.asarray(filters))
    everything = (-jnp.inf, jnp.inf)
    return Textures(
        jnp.asarray([[getattr(look, name) for name in names] for look in looks]),
        jnp.asarray([look.limits for look in looks]),
        jnp.asarray([look.reference or everything for look in looks]),
        jnp.asarray([(look.rim_share, look.core_share) for look in looks]),
        tuple(noise),
    )


def draw_lesion(
    key: PRNGKeyArray,
    image: Image,
    organ: Mask,
    tumor: Mask,
    level: Image,
    radius_mm: Float[Array, ""],
    texture: Textures,
    spacing: Triple,
) -> tuple[Image, Float[Array, ""]]:
    """Draws a lesion by the rules of `texture.render`.

    Args:
        key: jax.random key.
        image: crop, HU.
        organ: the host.
        tumor: the lesion, in the host.
        level: the lesion's level set, -1 at its middle and 0 at its surface.
        radius_mm: of the ball of the lesion's volume.
        texture: of this organ, one of `Textures`' rows.
        spacing: (x, y, z) in mm.

    Returns:
        HU of the lesion, everywhere in the crop, and its edge's sigma in mm.
    """
    keys = jax.random.split(key, 4)
    low, high = texture.ranges.T
    drawn = jax.random.uniform(keys[0], (6,), minval=low, maxval=high)
    contrast, variation, edge_mm, rim, rim_mm, core = drawn
    has_rim, has_core = jax.random.uniform(keys[1], (2,)) < texture.share
    normal, spread = organ_statistics(image, organ, texture.reference)
    mean = _lesion_mean(normal, contrast, texture.limits)
    white = jax.random.normal(keys[2], (texture.noise[0].shape[0], *image.shape))
    noise = jnp.sum(jax.vmap(smooth)(white, texture.noise), axis=0)
    depth = jnp.maximum(-level, 0) * radius_mm
    lesion = mean + variation * noise
    lesion += jnp.where(has_rim, rim * jnp.exp(-((depth / rim_mm) ** 2)), 0)
    # Dark from about half of the way in.
    way = jnp.clip(depth / (0.8 * radius_mm), 0, 1)
    dark = core * jax.nn.sigmoid((way - 0.5) / 0.12)
    lesion += jnp.where(has_core & (radius_mm > 10), dark, 0)
    sigma = [_COARSEST_NOISE_MM / step for step in spacing]
    return lesion + grain(keys[3], image, organ | tumor, normal, spread, sigma), edge_mm


def _lesion_mean(normal, contrast, limits):
    """Mean HU of the lesion: within the limits, yet on its side of the organ by a little."""
    mean = jnp.clip(normal + contrast, limits[0], limits[1])
    darker = jnp.minimum(mean, normal + jnp.maximum(contrast, -_LEAST_CONTRAST))
    brighter = jnp.maximum(mean, normal + jnp.minimum(contrast, _LEAST_CONTRAST))
    return jnp.where(contrast < 0, darker, brighter)


def organ_statistics(
    image: Image, organ: Mask, reference: Float[Array, "2"] | tuple[float, float]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns mean and deviation of an organ's HU without what lies far from them.

    Args:
        image: HU.
        organ: its mask.
        reference: HU between which voxels are the organ's tissue.
    """
    # Voxels at the organ's border hold some of its neighbours.
    inner = erode(organ)
    organ = jnp.where(jnp.sum(inner) >= 30, inner, organ)
    tissue = organ & (image >= reference[0]) & (image <= reference[1])
    mean, deviation = typical(image, tissue)
    found = jnp.sum(tissue) >= 10
    return jnp.where(found, mean, 45.0), jnp.where(found, deviation, 10.0)


def typical(values: Image, where: Mask) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns mean and deviation of most values: those beyond two deviations are left out, thrice.

    Args:
        values: any.
        where: which of them count.
    """
    kept = where
    mean = deviation = jnp.zeros(())
    for turn in range(4):
        number = jnp.maximum(jnp.sum(kept), 1)
        mean = jnp.sum(jnp.where(kept, values, 0)) / number
        square = jnp.sum(jnp.where(kept, (values - mean) ** 2, 0)) / number
        deviation = jnp.sqrt(square) / (_CUT_DEVIATION if turn else 1.0)
        kept = where & (jnp.abs(values - mean) <= 2 * deviation)
    return mean, deviation


def grain(
    key: PRNGKeyArray,
    image: Image,
    host: Mask,
    normal: Float[Array, ""],
    spread: Float[Array, ""],
    sigma: Sequence[float],
) -> Image:
    """Returns the scan's own noise inside the host, without its vessels; as `blending.grain`.

    Args:
        key: for the noise that stands in where there is none to take over.
        image: HU, or what is left of them beside a smooth copy.
        host: where noise is wanted.
        normal: mean of the image in the host, HU.
        spread: its deviation there, HU.
        sigma: what is coarser is no noise, voxels along each axis.
    """
    filters = [gaussian(n, s, 2.5) for n, s in zip(image.shape, sigma, strict=True)]
    part = smooth(host.astype(jnp.float32), filters)
    coarse = smooth(jnp.where(host, image, 0), filters) / jnp.maximum(part, 1e-3)
    detail = jnp.where(host, image - coarse, 0)
    foreign = dilate(host & (jnp.abs(image - normal) > jnp.maximum(3 * spread, 25.0)))
    own = host & ~foreign
    deviation = jnp.where(jnp.sum(own) >= 30, typical(detail, own)[1], spread)
    kernel = [gaussian(n, _KERNEL, 3.0) for n in image.shape]
    kernel = [k / jnp.sqrt(jnp.sum(k**2, axis=1, keepdims=True)) for k in kernel]
    fill = deviation * smooth(jax.random.normal(key, image.shape), kernel)
    clipped = jnp.where(foreign, fill, jnp.clip(detail, -3 * deviation, 3 * deviation))
    # At the organ's outer border the scan's own partial volume stays: half fat is half fat.
    border = host & ~erode(host)
    return jnp.where(border & (detail < -3 * deviation), detail, clipped)


def edge_weight(
    tumor: Mask, host: Mask, edge_mm: Float[Array, ""], spacing: Triple
) -> Float[Array, "x y z"]:
    """Returns how much of the lesion each voxel takes; as `blending.edge_weight`.

    Args:
        tumor: the lesion's mask, in the host.
        host: the organ.
        edge_mm: Gaussian sigma of the edge.
        spacing: (x, y, z) in mm.
    """
    filters = [
        gaussian(n, edge_mm / step, _EDGE_REACH)
        for n, step in zip(tumor.shape, spacing, strict=True)
    ]
    soft = smooth(tumor.astype(jnp.float32), filters)
    whole = smooth(host.astype(jnp.float32), filters)
    weight = jnp.where(host, soft / jnp.maximum(whole, 1e-6), 0)
    return jnp.where(weight < 0.003, 0, jnp.minimum(weight, 1))


def gaussian(size: int, sigma: Float[Array, ""] | float, reach: float) -> Float[Array, "n n"]:
    """Returns the matrix of a Gaussian filter along an axis, cut at `reach` sigmas.

    Args:
        size: voxels of the axis.
        sigma: voxels; may be traced.
        reach: in sigmas, rounded to whole voxels.
    """
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    weight = jnp.exp(-0.5 * (distance / sigma) ** 2)
    return jnp.where(distance <= jnp.floor(reach * sigma + 0.5), weight, 0)


def smooth(volume: Image, filters: Sequence[Float[Array, "n n"]]) -> Image:
    """Filters a volume along each of its axes by a matrix."""
    for axis, matrix in enumerate(filters):
        # Coarser products would show as patterns in HU.
        product = jnp.tensordot(matrix, volume, (1, axis), precision=jax.lax.Precision.HIGHEST)
        volume = jnp.moveaxis(product, 0, axis)
    return volume


def dilate(mask: Mask) -> Mask:
    """Returns a mask grown by a box of 3 voxels."""
    for axis in range(3):
        mask = mask | _shifted(mask, axis, 1) | _shifted(mask, axis, -1)
    return mask


def erode(mask: Mask) -> Mask:
    """Returns a mask without the voxels that have one of their six neighbours outside it."""
    inner = mask
    for axis in range(3):
        for step in (1, -1):
            # Beyond the crop the organ goes on.
            inner = inner & ~_shifted(~mask, axis, step)
    return inner


def _shifted(mask: Mask, axis: int, step: int) -> Mask:
    """Moves a mask by a voxel; what comes in is False."""
    size = mask.shape[axis]
    kept = jax.lax.slice_in_dim(mask, max(0, -step), size - max(0, step), axis=axis)
    pads = [(max(0, step), max(0, -step)) if a == axis else (0, 0) for a in range(3)]
    return jnp.pad(kept, pads)
