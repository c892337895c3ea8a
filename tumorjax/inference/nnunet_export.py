"""The job "export": a network trained here as a model folder that nnU-Net predicts with.

nnU-Net is told to turn scans to RAS+ and to have its axes in the order x, y, z, so kernels stay as
they are. Its CT normalization clips to percentiles and divides by a standard deviation; with the
window's ends as the one and the window's width as the other, it is the window of the training to
the bit. A scan on the network's own spacing gets the same labels, as far as nnU-Net's sums of tiles
in float16 can tell. Two things cannot be said in plans: nnU-Net resamples by splines, without the
averaging done here along axes that shrink, and it cuts borders of zeros off before it looks.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from tumorjax.anatomy import mirror_table
from tumorjax.errors import UserError
from tumorjax.files import write_json_atomic
from tumorjax.models import torch_weights
from tumorjax.models.nnunet_plans import ARCHITECTURES, CHECKPOINT, RESAMPLING, read_json
from tumorjax.settings import first_difference, plain
from tumorjax.training import checkpoints

CONFIGURATION = "3d_fullres"
_CLASSES = {
    "resenc_unet": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "plain_unet": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
}


def run(config: ConfigDict, workdir: Path) -> int:
    """Writes a network of config.checkpoint as nnU-Net's model folder, see configs/export.py.

    Raises:
        UserError: there is no such network, nnU-Net has none like it, or another model lies where
            this one should.
    """
    if not config.checkpoint:
        raise UserError("config.checkpoint is empty. Set it with --config.checkpoint=...")
    output = Path(config.output or Path(workdir) / "nnunet")
    apply, trained = checkpoints.load_model(config.checkpoint, config.step)
    if trained.model.name not in _CLASSES:
        raise UserError(
            f"{config.checkpoint}: a {trained.model.name}, which nnU-Net cannot make from plans."
            f" Expected one of {', '.join(_CLASSES)}"
        )
    parameters = {name: np.asarray(value) for name, value in apply.args[0].items()}
    plans, dataset = make_plans(trained, parameters), make_dataset(trained)
    target = output / "fold_0" / CHECKPOINT
    if (output / "plans.json").exists():
        difference = first_difference(read_json(output / "plans.json"), plans, "plans.json")
        if difference:
            raise UserError(
                f"{output}: holds another model ({difference}). Choose another config.output, or"
                " remove it"
            )
        if target.exists():
            print(f"{output}: already finished")
            return 0
    model = nnx.eval_shape(lambda: checkpoints.build_model(trained, deep_supervision=False))
    graph, state = nnx.split(model)
    values = [
        (path, nnx.Param(parameters[".".join(map(str, path))]))
        for path, _ in nnx.to_flat_state(state)
    ]
    weights = torch_weights.export_state_dict(nnx.merge(graph, nnx.from_flat_state(values)))
    axes = mirror_axes(trained)
    write_json_atomic(output / "dataset.json", dataset)
    write_json_atomic(output / "plans.json", plans)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch_weights.write_checkpoint(
        target,
        {
            "network_weights": weights,
            "trainer_name": "nnUNetTrainer",
            "init_args": {
                "plans": plans,
                "configuration": CONFIGURATION,
                "fold": 0,
                "dataset_json": dataset,
            },
            # nnU-Net knows no empty tuple here.
            "inference_allowed_mirroring_axes": axes or None,
        },
    )
    print(f"{output}: written for nnU-Net (nnUNetv2_predict_from_modelfolder -m {output} -f 0)")
    return 0


def mirror_axes(trained: Any) -> tuple[int, ...]:
    """Returns the axes along which nnU-Net may mirror: those that the training's tests used.

    nnU-Net does not exchange left and right organs, so not across x where the task tells them
    apart.
    """
    axes = tuple(int(axis) for axis in trained.get("inference", {}).get("mirror_axes") or ())
    if 0 in axes:
        table = mirror_table(trained.task.classes)
        if (table != np.arange(len(table))).any():
            return tuple(axis for axis in axes if axis)
    return axes


def make_dataset(trained: Any) -> dict[str, Any]:
    """Returns dataset.json; a label's value is its class's index."""
    names = list(trained.task.classes)
    return {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {name: index for index, name in enumerate(names, start=1)},
        "numTraining": 0,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        # Which structures of tumorjax's a label unites.
        "tumorjax_classes": plain(trained.task.classes),
    }


def make_plans(trained: Any, parameters: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns plans.json.

    Args:
        trained: configuration of the training.
        parameters: of the network, by name.
    """
    low, high = (float(value) for value in trained.preparation.window)
    spacing = [float(size) for size in trained.preparation.spacing]
    patch = [int(size) for size in trained.training.patch_size]
    order = int(trained.preparation.get("order", 3))
    hashed = hashlib.sha256()
    for name in sorted(parameters):
        hashed.update(np.ascontiguousarray(parameters[name]).tobytes())

    def resampling(kind: str, order: int) -> dict[str, Any]:
        settings = {"is_seg": kind == "seg", "order": order, "order_z": 0}
        return {
            f"resampling_fn_{kind}": RESAMPLING,
            f"resampling_fn_{kind}_kwargs": settings | {"force_separate_z": False},
        }

    configuration = {
        "data_identifier": f"tumorjax_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": int(trained.training.get("batch_size", 2)),
        "patch_size": patch,
        "median_image_size_in_voxels": patch,
        "spacing": spacing,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        **resampling("data", order),
        **resampling("seg", 1),
        **resampling("probabilities", 1),
        "architecture": architecture(trained.model.name, parameters),
        "batch_dice": bool(trained.training.get("batch_dice", False)),
    }
    return {
        "dataset_name": "Dataset999_tumorjax",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": patch,
        "image_reader_writer": "NibabelIOWithReorient",
        # The reader gives [z, y, x].
        "transpose_forward": [2, 1, 0],
        "transpose_backward": [2, 1, 0],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {
                **{"min": low, "percentile_00_5": low, "mean": low, "std": high - low},
                **{"median": (low + high) / 2, "percentile_99_5": high, "max": high},
            }
        },
        "tumorjax_weights_sha256": hashed.hexdigest(),
    }


def architecture(name: str, parameters: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the plans' entry for a network, as its kernels show it.

    Args:
        name: "resenc_unet" or "plain_unet".
        parameters: their arrays by name.
    """
    stages = 1 + _count(parameters, "transposed")
    first = "conv1.conv" if name == "resenc_unet" else "conv"
    kernels = [parameters[f"encoder.{s}.blocks.0.{first}.kernel"].shape for s in range(stages)]
    # A transposed convolution's kernel is the step of the stage below; the coarsest is first.
    steps = [parameters[f"transposed.{d}.kernel"].shape[:3] for d in range(stages - 1)]
    return {
        "network_class_name": _CLASSES[name],
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [int(shape[-1]) for shape in kernels],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[int(n) for n in shape[:3]] for shape in kernels],
            "strides": [[1, 1, 1], *([int(n) for n in step] for step in steps[::-1])],
            ARCHITECTURES[_CLASSES[name].rsplit(".", 1)[-1]][1]: [
                _count(parameters, f"encoder.{s}.blocks") for s in range(stages)
            ],
            "n_conv_per_stage_decoder": [
                _count(parameters, f"decoder.{d}.blocks") for d in range(stages - 1)
            ],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _count(parameters: Mapping[str, np.ndarray], prefix: str) -> int:
    """Returns how many entries a list of modules has."""
    start = f"{prefix}."
    return len({name[len(start) :].split(".")[0] for name in parameters if name.startswith(start)})
