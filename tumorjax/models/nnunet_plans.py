"""nnU-Net's model folders: what plans.json and dataset.json say of a network and of its scans.

Only what this program can follow to the letter is accepted; the rest is refused by name. Source:
nnunetv2 2.8.1, utilities/plans_handling and utilities/label_handling.

Axes: nnU-Net's readers give arrays [z, y, x] (SimpleITK's order), which transpose_forward permutes.
Network axis k is therefore the file's axis 2 - transpose_forward[k]. SimpleITK and NibabelIO keep
the file's orientation; NibabelIOWithReorient turns to RAS+ first.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tumorjax.errors import UserError
from tumorjax.files import location
from tumorjax.models import torch_weights

CHECKPOINT = "checkpoint_final.pth"
# Reader -> whether it turns the scan to RAS+.
READERS = {"SimpleITKIO": False, "NibabelIO": False, "NibabelIOWithReorient": True}
# nnU-Net's class -> our network, and what plans call the number of blocks or convolutions a stage.
ARCHITECTURES = {
    "ResidualEncoderUNet": ("resenc_unet", "n_blocks_per_stage"),
    "PlainConvUNet": ("plain_unet", "n_conv_per_stage"),
}
NORMALIZATIONS = (
    *("CTNormalization", "ZScoreNormalization", "NoNormalization"),
    "RescaleTo01Normalization",
)
RESAMPLING = "resample_data_or_seg_to_shape"
# What nnU-Net's planners write; blocks of any other kind would be another network.
_ARCHITECTURE = {
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "nonlin": "torch.nn.LeakyReLU",
}
_NO_MATTER = ("n_stages", "dropout_op_kwargs", "nonlin_kwargs", "deep_supervision")


class Labels(NamedTuple):
    """What a network's output channels stand for.

    Attributes:
        values: name -> value in the label map.
        regions: whether channels are overlapping regions (sigmoid) instead of classes (softmax).
        order: of regions: the value that each channel is painted with, in order.
        heads: number of output channels.
    """

    values: dict[str, int]
    regions: bool
    order: tuple[int, ...]
    heads: int


class Plans(NamedTuple):
    """One configuration of a plans.json. Triples are along the network's axes.

    Attributes:
        axes: the file's (or, with `reorient`, RAS+) axis that each network axis is.
        reorient: whether the reader turns scans to RAS+.
        spacing: mm.
        patch_size: voxels.
        normalization: scheme and, for ZScoreNormalization, whether only the nonzero part counts.
        intensities: of the training data's foreground.
        data: order, order_z and force_separate_z of the image's resampling.
        logits: the same of the logits' resampling.
        model: settings for `models.create`, with name.
        labels: of the output.
    """

    axes: tuple[int, int, int]
    reorient: bool
    spacing: tuple[float, float, float]
    patch_size: tuple[int, int, int]
    normalization: tuple[str, bool]
    intensities: dict[str, float]
    data: dict[str, Any]
    logits: dict[str, Any]
    model: dict[str, Any]
    labels: Labels


def is_model_folder(folder: str | Path) -> bool:
    """Whether a folder is one of nnU-Net's trained models, or what is left of one."""
    folder = location(folder)
    if (folder / "config.json").is_file():
        return False
    signs = ("plans.json", "dataset.json", f"fold_*/{CHECKPOINT}")
    return any(any(folder.glob(sign)) for sign in signs)


def find_folds(folder: Path, folds: Sequence[int] = ()) -> list[Path]:
    """Returns the checkpoints of a model folder.

    Args:
        folder: the model folder.
        folds: whose; empty: all that are there. A model of all cases (fold_all) is one of its own,
            and is taken where there is no other.

    Raises:
        UserError: one is missing, or there is none.
    """
    wanted = [f"fold_{fold}" for fold in folds]
    names = sorted(path.parent.name for path in folder.glob(f"fold_*/{CHECKPOINT}"))
    missing = [name for name in wanted if name not in names]
    if missing or not names:
        raise UserError(
            f"{folder}: no {CHECKPOINT} in {', '.join(missing) or 'any fold_N'}. There are"
            f" {', '.join(names) or 'none'}. Give folds that were trained to their end"
        )
    several = [name for name in names if name != "fold_all"]
    return [folder / name / CHECKPOINT for name in wanted or several or names]


def read_fold(path: Path) -> dict[str, Any]:
    """Reads one of nnU-Net's checkpoints.

    Raises:
        UserError: it is unreadable, would run code, or is not nnU-Net's.
    """
    content = torch_weights.read_checkpoint(path)
    if not is_fold(content):
        raise UserError(
            f"{path}: no checkpoint of nnU-Net's, which has network_weights and init_args with the"
            f" configuration. Give the {CHECKPOINT} that its trainer wrote"
        )
    return dict(content)


def is_fold(content: Any) -> bool:
    """Whether the content of a file is that of nnU-Net's checkpoints."""
    return (
        isinstance(content, Mapping)
        and "network_weights" in content
        and isinstance(content.get("init_args"), Mapping)
        and "configuration" in content["init_args"]
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of a model folder's JSON files.

    Raises:
        UserError: it is missing, or no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file. A model folder of nnU-Net has plans.json, dataset.json and"
            " fold_0/checkpoint_final.pth (nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION)"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}). Copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__}, expected a JSON object")
    return content


def read_plans(
    name: str, plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: str
) -> Plans:
    """Returns a configuration of the plans.

    Args:
        name: of the folder, for errors.
        plans: content of plans.json.
        dataset: content of dataset.json.
        configuration: for instance "3d_fullres".

    Raises:
        UserError: an entry is missing, or asks for what this program does not do alike.
    """
    try:
        return _read_plans(name, plans, dataset, configuration)
    except KeyError as error:
        raise UserError(
            f"{name}: plans.json or dataset.json has no entry {error} (configuration"
            f" {configuration}). Expected plans of nnU-Net version 2"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{name}: plans.json or dataset.json has an entry of another kind ({error})."
            " Expected plans of nnU-Net version 2"
        ) from error


def _read_plans(
    name: str, plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: str
) -> Plans:
    entry = _configuration(name, plans, configuration)
    patch = entry["patch_size"]
    _expect(name, "the patch's number of axes", len(patch), (3,), "Choose a 3D configuration")
    advice = "Cascades predict in two stages; give a model that predicts in one"
    _expect(name, "previous_stage", entry.get("previous_stage"), (None,), advice)
    _expect(
        *(name, "preprocessor_name", entry.get("preprocessor_name", "DefaultPreprocessor")),
        ("DefaultPreprocessor",),
    )
    reader = plans.get("image_reader_writer", "SimpleITKIO")
    _expect(name, "image_reader_writer", reader, READERS)
    channels = dataset.get("channel_names") or dataset["modality"]
    advice = "Scans of several channels cannot be predicted here"
    _expect(name, "the number of channels", len(channels), (1,), advice)
    scheme, masked = entry["normalization_schemes"][0], bool(entry["use_mask_for_norm"][0])
    _expect(name, "normalization_schemes", scheme, NORMALIZATIONS)
    intensities = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    intensities = dict(intensities.get("0", {}))
    if scheme == "CTNormalization":
        for key in ("mean", "std", "percentile_00_5", "percentile_99_5"):
            intensities[key] = float(intensities[key])
    forward = [int(axis) for axis in plans["transpose_forward"]]
    if sorted(forward) != [0, 1, 2]:
        raise UserError(f"{name}: transpose_forward is {forward}. Expected some order of 0, 1, 2")
    resampling = []
    for kind, orders in (("data", (0, 1, 2, 3, 4, 5)), ("probabilities", (0, 1))):
        _expect(name, f"resampling_fn_{kind}", entry[f"resampling_fn_{kind}"], (RESAMPLING,))
        settings = {"order": 3, "order_z": 0, "force_separate_z": False}
        settings |= entry[f"resampling_fn_{kind}_kwargs"]
        for key in ("order", "order_z"):
            _expect(name, f"resampling_fn_{kind}_kwargs.{key}", settings[key], orders)
        resampling.append({key: settings[key] for key in ("order", "order_z", "force_separate_z")})
    labels = _labels(name, dataset)
    spacing, patch_size = (float(size) for size in entry["spacing"]), (int(size) for size in patch)
    a, b, c = (2 - axis for axis in forward)
    model = _model(name, entry) | {"classes": labels.heads, "in_channels": len(channels)}
    result = Plans(
        *((a, b, c), READERS[reader], _triple(spacing), _triple(patch_size), (scheme, masked)),
        *(intensities, resampling[0], resampling[1], model, labels),
    )
    divisor = [math.prod(axis) for axis in zip(*model["strides"], strict=True)]
    if any(size % n for size, n in zip(result.patch_size, divisor, strict=True)):
        raise UserError(
            f"{name}: a patch of {list(result.patch_size)} does not divide by {divisor}, the"
            " product of the strides. plans.json was changed by hand?"
        )
    return result


def _configuration(
    name: str, plans: Mapping[str, Any], configuration: str, below: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns a configuration with what it inherits."""
    known = plans["configurations"]
    if configuration not in known or configuration in below:
        raise UserError(
            f"{name}: the network is of configuration {configuration!r}, and plans.json has"
            f" {', '.join(known)}. Take plans.json and checkpoint from the same training"
        )
    entry = dict(known[configuration])
    if "inherits_from" not in entry:
        return entry
    return _configuration(name, plans, entry["inherits_from"], (*below, configuration)) | entry


def _model(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the network's settings for `models.create`."""
    if "architecture" in entry:
        path = entry["architecture"]["network_class_name"]
        settings = dict(entry["architecture"]["arch_kwargs"])
    else:
        # As nnU-Net wrote it before version 2.4.
        path = entry["UNet_class_name"]
        base, most = entry["UNet_base_num_features"], entry["unet_max_num_features"]
        counts = entry["n_conv_per_stage_encoder"]
        settings = _ARCHITECTURE | {
            "n_stages": len(counts),
            "features_per_stage": [min(base * 2**stage, most) for stage in range(len(counts))],
            "kernel_sizes": entry["conv_kernel_sizes"],
            "strides": entry["pool_op_kernel_sizes"],
            "n_conv_per_stage_decoder": entry["n_conv_per_stage_decoder"],
            "n_conv_per_stage": counts,
            "n_blocks_per_stage": counts,
        }
    kind = path.rsplit(".", 1)[-1]
    _expect(name, "network_class_name", kind, ARCHITECTURES)
    network, blocks = ARCHITECTURES[kind]
    stages = int(settings["n_stages"])

    def per_stage(key: str, count: int = stages) -> list[Any]:
        value = settings[key]
        value = [value] * count if isinstance(value, int) else list(value)
        if len(value) != count:
            raise UserError(f"{name}: {key} has {len(value)} entries. Expected {count}")
        return value

    result = {
        "name": network,
        "widths": tuple(per_stage("features_per_stage")),
        "blocks": tuple(per_stage(blocks)),
        "decoder_blocks": tuple(per_stage("n_conv_per_stage_decoder", stages - 1)),
        "strides": tuple(_sizes(size) for size in per_stage("strides")),
        "kernels": tuple(_sizes(size) for size in per_stage("kernel_sizes")),
    }
    for key, value in settings.items():
        read = ("features_per_stage", "strides", "kernel_sizes", "n_conv_per_stage_decoder")
        if key in (*_NO_MATTER, *read, "n_conv_per_stage", "n_blocks_per_stage"):
            continue
        _expect(name, f"arch_kwargs.{key}", value, (_ARCHITECTURE.get(key, "absent"),))
    slope = (settings.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)
    _expect(name, "arch_kwargs.nonlin_kwargs.negative_slope", slope, (0.01,))
    _expect(name, "the first stride", result["strides"][0], ((1, 1, 1),))
    for size in result["kernels"]:
        if any(n % 2 == 0 for n in size):
            raise UserError(f"{name}: a kernel of size {list(size)}. Expected odd sizes")
    return result


def _labels(name: str, dataset: Mapping[str, Any]) -> Labels:
    entries = {key: value for key, value in dataset["labels"].items() if key != "ignore"}
    if any(isinstance(value, list) and len(value) > 1 for value in entries.values()):
        order = tuple(int(value) for value in dataset["regions_class_order"])
        regions = [key for key, value in entries.items() if value not in (0, [0])]
        if len(order) != len(regions):
            raise UserError(
                f"{name}: dataset.json has {len(regions)} regions, and regions_class_order"
                f" {len(order)} entries. Expected one a region"
            )
        values = dict(zip(regions, order, strict=True))
        result = Labels(values, True, order, len(order))
    else:
        numbers = {
            key: int(value[0] if isinstance(value, list) else value)
            for key, value in entries.items()
        }
        heads = sorted(set(numbers.values()))
        if heads != list(range(len(heads))):
            raise UserError(f"{name}: labels are {heads}. Expected 0, 1, 2, ... without gaps")
        values = {key: number for key, number in numbers.items() if number}
        result = Labels(values, False, (), len(heads))
    if max((*result.values.values(), result.heads)) > 255:
        raise UserError(f"{name}: labels up to {max(result.values.values())}. Expected 255 at most")
    return result


def _expect(name: str, what: str, found: Any, known: Any, advice: str = "") -> None:
    found = tuple(found) if isinstance(found, list) else found
    if found not in (tuple(known) if not isinstance(known, Mapping) else known):
        expected = " or ".join(str(value) for value in known)
        raise UserError(
            f"{name}: {what} is {found}. Expected {expected}. "
            + (advice or "A model with another setting cannot be followed exactly here")
        )


def _sizes(size: Any) -> tuple[int, int, int]:
    return _triple((size,) * 3 if isinstance(size, int) else size)


def _triple(values: Any) -> tuple[Any, Any, Any]:
    a, b, c = values
    return a, b, c
