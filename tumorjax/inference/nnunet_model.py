"""Networks that nnU-Net trained: from its model folder to masks, the way nnU-Net itself goes.

A scan is taken as nnU-Net reads it, cropped to what is not zero, normalized, resampled by splines,
sent through the sliding window, and the logits come back to the scan's grid, one class at a time
(`nnunet_resampling`). Where nnU-Net sums tiles in float16, this is float32. Source: nnunetv2 2.8.1,
preprocessing/preprocessors/default_preprocessor.py and inference/export_prediction.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Shaped, UInt8
from ml_collections import ConfigDict
from scipy.ndimage import binary_fill_holes

from tumorjax import models
from tumorjax.anatomy import LABELS
from tumorjax.errors import CaseError, UserError
from tumorjax.files import check_case_id
from tumorjax.geometry import from_canonical, spacing_of, to_canonical
from tumorjax.inference.native_grid import Structure
from tumorjax.inference.network import Network, Prepared
from tumorjax.inference.nnunet_resampling import painted, resample, separate_axis, winners
from tumorjax.models import torch_weights
from tumorjax.models.nnunet_plans import Plans, find_folds, read_fold, read_json, read_plans
from tumorjax.nifti import LEAST_HU_RANGE, Scan, check_hu
from tumorjax.settings import plain
from tumorjax.training.checkpoints import compute_dtype


def open_network(
    folder: str | Path, folds: Sequence[int], inference: ConfigDict, form: str = "labels"
) -> Network:
    """Opens a model folder of nnU-Net's for prediction.

    Args:
        folder: with plans.json, dataset.json and fold_N/checkpoint_final.pth.
        folds: to average the logits of; empty: all that are there.
        inference: overlap, batch_size, and mirror_axes along the network's axes, None for those
            that the checkpoint allows.
        form: of the output, "labels", "structures" or "dicom".

    Raises:
        UserError: a file is missing or unreadable, the files do not belong together, or the plans
            ask for what is not done alike here.
    """
    folder = Path(folder)
    plans_json, dataset = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    paths = find_folds(folder, folds)
    contents = [read_fold(path) for path in paths]
    first = contents[0]
    plans = read_plans(str(folder), plans_json, dataset, first["init_args"]["configuration"])
    table = [
        Structure(label, value, index, "")
        for index, (label, value) in enumerate(
            sorted(plans.labels.values.items(), key=lambda item: item[1]), start=1
        )
    ]
    # Channels of regions are in the order of dataset.json.
    names = list(plans.labels.values) if plans.labels.regions else [one.name for one in table]
    if form != "labels" and plans.labels.regions:
        raise UserError(
            f"{folder}: predicts overlapping regions, of which each voxel of a label map"
            " keeps one. Set config.form to labels"
        )
    for name in names if form == "structures" else ():
        check_case_id(name)
    allowed = [int(axis) for axis in first.get("inference_allowed_mirroring_axes") or ()]
    axes = allowed if inference.mirror_axes is None else [int(a) for a in inference.mirror_axes]
    if not set(axes) <= set(allowed):
        raise UserError(
            f"inference.mirror_axes is {axes}, and {folder} was trained with mirroring along"
            f" {allowed or 'no axis'} alone. Give some of those"
        )
    apply = _apply_of(paths, contents, plans)
    settings = {key: plain(inference)[key] for key in ("overlap", "batch_size")}
    return Network(
        apply,
        plans.patch_size,
        settings | {"mirror_axes": axes, "skip_air": False, "output": "logits"},
        table,
        {name: (name,) if name in LABELS else () for name in names},
        # Other normalizations than CT's are for images in any unit.
        LEAST_HU_RANGE if _is_ct(plans) else 0.0,
        "",
        lambda scan: prepare_scan(scan, plans),
        lambda logits, prepared: native_labels(logits, prepared, plans),
        lambda logits, prepared, classes: native_probabilities(logits, prepared, plans, classes),
        {
            "nnunet": plain({"plans": plans_json, "dataset": dataset}),
            "folds": [path.parent.name for path in paths],
        },
    )


def _apply_of(
    paths: Sequence[Path], contents: Sequence[Mapping[str, Any]], plans: Plans
) -> jax.tree_util.Partial:
    settings = plans.model | {"dtype": compute_dtype("auto"), "deep_supervision": False}
    # Shapes alone: what does not fit is told before anything is allocated.
    blank = nnx.eval_shape(lambda: models.create(**settings))
    folds = []
    for path, content in zip(paths, contents, strict=True):
        try:
            network = torch_weights.import_state_dict(
                blank, content["network_weights"], remake_heads=False
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        apply, parameters = models.functional(network)
        folds.append(parameters)
    if len(folds) == 1:
        return jax.tree_util.Partial(apply, folds[0])
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *folds)

    def mean_of_folds(parameters: dict[str, Array], x: Array) -> Array:
        # One fold after the other: one copy of the network is compiled for all.
        def add(total: Array, one: dict[str, Array]) -> tuple[Array, None]:
            return total + apply(one, x), None

        like = jax.eval_shape(apply, folds[0], x)
        total, _ = jax.lax.scan(add, jnp.zeros(like.shape, like.dtype), parameters)
        return total / len(folds)

    return jax.tree_util.Partial(mean_of_folds, stacked)


# ---------------------------------------------------------------------------- there and back


def prepare_scan(scan: Scan, plans: Plans) -> Prepared:
    """Brings a scan to the grid and values that nnU-Net trained the network on.

    Raises:
        CaseError: its values are not such as the network was trained on, or all of them are 0.
    """
    if _is_ct(plans):
        check_hu(scan.name, scan.image)
    image, spacing = _as_nnunet_reads(scan, plans)
    x, y, z = image.shape
    crop = _nonzero_box(scan.name, image)
    image = normalize(image[crop].astype(np.float32), plans)
    grid = (spacing, plans.spacing)
    shape = [
        max(1, round(old / new * length))
        for old, new, length in zip(*grid, image.shape, strict=True)
    ]
    settings = plans.data
    axis = separate_axis(*grid, settings["force_separate_z"])
    image = resample(image, shape, axis, settings["order"], settings["order_z"])
    return Prepared(scan, (x, y, z), image, crop)


def normalize(image: Float[np.ndarray, "a b c"], plans: Plans) -> Float[np.ndarray, "a b c"]:
    """Normalizes a cropped image as nnU-Net's scheme of the plans does.

    Args:
        image: float32 in the file's unit.
        plans: with the scheme, and for CT the training data's intensities.
    """
    scheme, masked = plans.normalization
    if scheme == "CTNormalization":
        known = plans.intensities
        image = np.clip(image, known["percentile_00_5"], known["percentile_99_5"])
        image -= known["mean"]
        image /= max(known["std"], 1e-8)
    elif scheme == "ZScoreNormalization":
        image = image.copy()
        part = binary_fill_holes(image != 0) if masked else np.ones(image.shape, bool)
        values = image[part]
        image[part] = (values - values.mean()) / max(values.std(), 1e-8)
    elif scheme == "RescaleTo01Normalization":
        image = image - image.min()
        image /= max(image.max(), 1e-8)
    return image


def native_labels(
    logits: Float[np.ndarray, "a b c heads"], prepared: Prepared, plans: Plans
) -> UInt8[np.ndarray, "i j k"]:
    """Returns the label map on the scan's own grid, axes as in its file."""
    shape, axis, orders = _way_back(prepared, plans)
    if plans.labels.regions:
        inside = painted(logits, plans.labels.order, shape, axis, *orders)
    else:
        inside = winners(logits, shape, axis, *orders)
    labels = np.zeros(prepared.shape, np.uint8)
    labels[prepared.crop] = inside
    return _as_in_file(labels, prepared, plans)


def native_probabilities(
    logits: Float[np.ndarray, "a b c heads"],
    prepared: Prepared,
    plans: Plans,
    classes: Sequence[int],
) -> Iterator[Float32[np.ndarray, "i j k"]]:
    """Yields classes' probabilities on the scan's own grid, axes as in its file.

    They are the softmax of the interpolated logits, of a region the sigmoid of its own. What
    nnU-Net cuts off is background.

    Args:
        logits: of the sliding window.
        prepared: the scan that they are of.
        plans: of the network.
        classes: their indices, 0 for background (which regions do not have).
    """
    shape, axis, orders = _way_back(prepared, plans)

    def head(index: int) -> Float[np.ndarray, "a2 b2 c2"]:
        return resample(logits[..., index], shape, axis, *orders)

    total: Any = 0.0
    if not plans.labels.regions:
        total = np.array(head(0), copy=True)
        for index in range(1, logits.shape[-1]):
            np.logaddexp(total, head(index), out=total)
    for index in classes:
        if plans.labels.regions:
            inside = 1 / (1 + np.exp(-head(index - 1)))
        else:
            inside = np.exp(head(index) - total)
        whole = np.full(prepared.shape, float(index == 0), np.float32)
        whole[prepared.crop] = inside
        yield _as_in_file(whole, prepared, plans)


def _is_ct(plans: Plans) -> bool:
    return plans.normalization[0] == "CTNormalization"


def _way_back(prepared: Prepared, plans: Plans) -> tuple[list[int], int | None, tuple[int, int]]:
    """Returns shape, separate axis and spline orders of the way back to the scan's grid."""
    box = [range(size)[side] for side, size in zip(prepared.crop, prepared.shape, strict=True)]
    _, spacing = _as_nnunet_reads(prepared.scan, plans)
    settings = plans.logits
    axis = separate_axis(plans.spacing, spacing, settings["force_separate_z"])
    return [len(side) for side in box], axis, (settings["order"], settings["order_z"])


def _as_in_file(
    volume: Shaped[np.ndarray, "a b c"], prepared: Prepared, plans: Plans
) -> Shaped[np.ndarray, "i j k"]:
    volume = volume.transpose(np.argsort(plans.axes))
    return from_canonical(volume, prepared.scan.affine) if plans.reorient else volume


def _as_nnunet_reads(
    scan: Scan, plans: Plans
) -> tuple[Float[np.ndarray, "a b c"], tuple[float, float, float]]:
    """Returns the image along the network's axes, and its spacing."""
    image, affine = scan.image, scan.affine
    sizes = np.asarray(scan.header.get_zooms()[:3], np.float64)
    # The header's own numbers are free of the rounding of an affine's square roots.
    spacing = np.asarray(spacing_of(affine))
    spacing = sizes if np.allclose(sizes, spacing, rtol=1e-3) else spacing
    if plans.reorient:
        image, turned = to_canonical(image, affine)
        spacing = spacing[np.abs(np.linalg.inv(affine[:3, :3]) @ turned[:3, :3]).argmax(axis=0)]
    a, b, c = (float(spacing[axis]) for axis in plans.axes)
    return image.transpose(plans.axes), (a, b, c)


def _nonzero_box(name: str, image: Float[np.ndarray, "a b c"]) -> tuple[slice, ...]:
    box = []
    filled = image != 0
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        used = np.flatnonzero(filled.any(axis=others))
        if not len(used):
            raise CaseError(name, "all voxels are 0", "Convert the scan again")
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)
