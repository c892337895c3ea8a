"""Tumours of a trained diffusion model, drawn into scans on the scans' own grids.

The model knows crops of one size, spacing and window. What lies around a tumour is brought there,
the model draws the tumour, and what it drew goes back: inside the tumour and its soft edge, with
the scan's own noise on top. All else of the scan is not touched.
"""

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray
from scipy import ndimage

from tumorjax import backend
from tumorjax.errors import UserError
from tumorjax.files import location
from tumorjax.geometry import prepare_image, resample_labels, resample_to_shape
from tumorjax.models.convolution import compiler_options
from tumorjax.synthesis import texture, trained_diffusion
from tumorjax.synthesis.blending import edge_weight, grain, organ_statistics
from tumorjax.synthesis.trained_diffusion import TrainedDiffusion

Triple = tuple[float, float, float]

# Spacings count as the model's own up to this part: a store's true ones differ a little from the
# one it was made for, and interpolation would blur.
_SAME_SPACING = 0.05
# Voxels of the model's crop that a tumour leaves free on each side: one voxel of its latents.
_LATENT = 4
# Gaussian sigma of the seam, mm. The model draws a tumour's edge itself; this hides the mask's.
_EDGE_MM = (0.5, 1.5)
# Noise that has no structure beyond this sigma (voxels) is all taken over.
_NOISE_VOXELS = 1.5


class Model(NamedTuple):
    """A trained diffusion model, ready to draw tumours.

    Attributes:
        trained: as `trained_diffusion.load` gives it.
        record: JSON-able: fingerprint of the weights, and how it samples. Equal records draw equal
            tumours.
    """

    trained: TrainedDiffusion
    record: Mapping[str, Any]


def open_model(
    checkpoint: str | Path,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
) -> Model:
    """Opens a trained diffusion model; the same one only once a process.

    Args:
        checkpoint: workdir of a job "diffusion".
        sampler: None for the one that the model was trained to be used with.
        steps: of the sampler; None for the model's own.
        guidance: classifier-free; None for the model's own.

    Raises:
        UserError: there is no such model, or a setting is not one of its.
    """
    if not checkpoint:
        raise UserError(
            "the synthesizer 'diffusion' has no checkpoint. Give the workdir of a job 'diffusion'"
            " (configs/diffusion.py), for instance --config.checkpoint=runs/diffusion"
        )
    with _OPENING:
        return _open(str(location(checkpoint).resolve()), sampler, steps, guidance)


_OPENING, _COMPILING = threading.Lock(), threading.Lock()


@backend.cached(4)
def _open(folder: str, sampler: str | None, steps: int | None, guidance: float | None) -> Model:
    trained = trained_diffusion.load(folder, sampler=sampler, steps=steps, guidance=guidance)
    return make_model(trained, sampler=sampler, steps=steps, guidance=guidance)


def make_model(trained: TrainedDiffusion, **sampling: Any) -> Model:
    """Returns a model with the record of its weights and its sampling."""
    return Model(trained, {"fingerprint": fingerprint(trained)} | sampling)


def fingerprint(trained: TrainedDiffusion) -> str:
    """Returns a hash of all weights and of the grid that a model knows; independent of its place.

    Args:
        trained: a model; arrays among the leaves of its `generate` are its weights.
    """
    digest = hashlib.sha256()
    grid = [list(trained.organs), *(list(map(float, v)) for v in (trained.spacing, trained.window))]
    digest.update(json.dumps([grid, list(map(int, trained.crop))]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained.generate):
        value = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()[:16]


def largest_tumor(trained: TrainedDiffusion) -> Triple:
    """Returns the extent (x, y, z), mm, that a tumour may have to lie in the model's crop."""
    x, y, z = (
        float((n - 2 * _LATENT) * s) for n, s in zip(trained.crop, trained.spacing, strict=True)
    )
    return x, y, z


def context(trained: TrainedDiffusion) -> float:
    """Returns how much of a scan around a tumour, mm, the model may look at.

    A crop's whole length: where the scan ends on one side there is more of the other.
    """
    return max(n * s for n, s in zip(trained.crop, trained.spacing, strict=True))


def render(
    key: PRNGKeyArray,
    image: Float[np.ndarray, "x y z"],
    organ: Bool[np.ndarray, "x y z"],
    tumor: Bool[np.ndarray, "x y z"],
    spacing: Triple,
    *,
    trained: TrainedDiffusion,
    organ_index: int,
) -> Float[np.ndarray, "x y z"]:
    """Draws a tumour into a crop of a scan.

    What lies around the tumour, of the extent that the model knows, is resampled to its grid. A
    scan that is smaller is continued by its outermost voxels. Back come two pictures: the crop with
    the tumour, and the crop as the model sees it without. The difference of the latter from the
    scan is noise, and goes onto the tumour; without the part that no noise can be (vessels,
    borders). Where the tumour ends is the mask's to say, on the scan's own grid.

    Args:
        key: jax.random key.
        image: the crop, HU; best with `context` mm around the tumour.
        organ: the host organ, without lesions that are already there.
        tumor: where the tumour is to be; not larger than `largest_tumor`.
        spacing: (x, y, z) in mm, of any grid.
        trained: the model.
        organ_index: of the host in `trained.organs`.

    Returns:
        The crop with the tumour, HU float32. Voxels beyond the edge's reach (6 mm; a voxel along
        each axis where those are larger) are the input's bit for bit, and so are those outside the
        organ where the tumour does not stick out of it.

    Raises:
        UserError: the model drew no numbers.
    """
    steps = np.asarray(spacing, np.float64)
    box = [np.flatnonzero(tumor.any(axis=o))[[0, -1]] for o in ((1, 2), (0, 2), (0, 1))]
    size = [
        _native_length(n, wanted, step)
        for n, wanted, step in zip(trained.crop, trained.spacing, steps, strict=True)
    ]
    # About the tumour; within the scan, where that is large enough, as in training.
    start = [
        int(np.clip((low + high + 1 - n) // 2, min(0, length - n), max(0, length - n)))
        for (low, high), n, length in zip(box, size, image.shape, strict=True)
    ]
    around = _cut_out(image, start, size, "edge")
    hole = _cut_out(tumor, start, size, "constant")

    lesion, without = _generate(key, around, hole, steps, trained, organ_index)
    reach = np.ceil(texture.CONTEXT_MM / steps).astype(int)
    near = tuple(
        slice(max(low - r, 0, s), min(high + 1 + r, length, s + n))
        for (low, high), r, length, s, n in zip(box, reach, image.shape, start, size, strict=True)
    )
    inner = tuple(slice(b.start - s, b.stop - s) for b, s in zip(near, start, strict=True))
    before, lesion = image[near].astype(np.float32), lesion[inner]
    mask, host = tumor[near], organ[near] | tumor[near]
    random = texture.generator(key)
    residual = before - without[inner]
    normal, spread = organ_statistics(residual, host)
    lesion = lesion + grain(random, residual, host, steps, normal, spread, _NOISE_VOXELS)
    weight = edge_weight(mask, organ[near], steps, random.uniform(*_EDGE_MM))
    touched = weight > 0
    before[touched] += weight[touched] * (lesion[touched] - before[touched])
    result = np.array(image, np.float32)
    result[near] = before
    return result


def _native_length(voxels: int, wanted: float, spacing: float) -> int:
    """Returns how many voxels of a scan are what the model's crop is along an axis."""
    if abs(spacing / wanted - 1) <= _SAME_SPACING:
        return voxels
    return max(1, round(voxels * wanted / spacing))


def _cut_out(array, start, size, mode):
    """Cuts a box that may hang over the border, continued by `mode` of numpy.pad."""
    inside = tuple(
        slice(min(max(s, 0), length - 1), max(min(s + n, length), 1))
        for s, n, length in zip(start, size, array.shape, strict=True)
    )
    pads = [(i.start - s, s + n - i.stop) for i, s, n in zip(inside, start, size, strict=True)]
    return np.pad(array[inside], pads, mode=mode)


def _generate(key, image, hole, steps, trained, organ_index):
    """Runs the model on a box of a scan.

    Returns:
        HU on the box's grid: of the tumour (beyond it: what it would be there), and of the box as
        the model sees it without one.
    """
    order = 1
    preparation = trained.config.get("preparation")
    if preparation is not None:
        order = int(preparation.get("order", order))
    scale = [s * n / m for s, n, m in zip(steps, image.shape, trained.crop, strict=True)]
    prepared = prepare_image(image, tuple(steps), scale, trained.window, order)
    mask = resample_labels(hole, trained.crop)
    radius = (np.count_nonzero(hole) * np.prod(steps) * 3 / 4 / np.pi) ** (1 / 3)
    arguments = (
        key,
        jnp.asarray(2 * prepared - 1)[None, ..., None],
        jnp.asarray(mask)[None],
        jnp.asarray([organ_index], jnp.int32),
        jnp.asarray([radius], jnp.float32),
    )
    # Threads that come first together would all compile; what is compiled runs beside the lock.
    with _COMPILING:
        pictures = _compiled()(trained.generate, *arguments)
    low, high = (float(value) for value in trained.window)
    found = [np.asarray(picture, np.float32)[0, ..., 0] for picture in pictures]
    if not all(np.isfinite(values).all() for values in found):
        raise UserError(
            "the diffusion model draws NaN or infinite values. Its training diverged: train it"
            " anew, or give another checkpoint"
        )
    lesion, without = (
        np.clip((values + 1) / 2, 0, 1) * np.float32(high - low) + np.float32(low)
        for values in found
    )
    lesion = _continued(lesion, mask)
    return [resample_to_shape(values, image.shape, 3) for values in (lesion, without)]


def _continued(
    lesion: Float[np.ndarray, "x y z"], mask: Bool[np.ndarray, "x y z"]
) -> Float[np.ndarray, "x y z"]:
    """Continues a lesion beyond its mask by what is inside.

    On a finer grid the scan's own mask and the edge's blur say where it ends; else its edge would
    be as blurred as the model's voxels are large.
    """
    part = ndimage.gaussian_filter(mask.astype(np.float32), 1.0)
    inside = ndimage.gaussian_filter(np.where(mask, lesion, np.float32(0)), 1.0)
    beyond = np.where(part > 1e-4, inside / np.maximum(part, 1e-4), lesion)
    return np.where(mask, lesion, beyond)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """One compilation a model: its weights are arguments, its crop has one size."""
    return jax.jit(
        lambda generate, *arguments: generate(*arguments), compiler_options=compiler_options()
    )
