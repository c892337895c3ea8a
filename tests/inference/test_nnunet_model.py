"""nnU-Net's trainer makes a model, and both programs give a scan the same labels; and back."""

import json
import shutil

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import export as export_config
from configs.prediction import get_config
from tumorjax import geometry, models
from tumorjax.errors import UserError
from tumorjax.files import write_json_atomic
from tumorjax.inference import ensemble, nnunet_export, predict, sliding_window
from tumorjax.nifti import read_ct
from tumorjax.training import checkpoints, finetuning

torch = pytest.importorskip("torch")
pytest.importorskip("nnunetv2")

LABELS = {"background": 0, "liver": 1, "tumor": 2}
RESAMPLING = {"is_seg": False, "order_z": 0, "force_separate_z": None}


_UNETS = "dynamic_network_architectures.architectures.unet"
# One model of each architecture: residual with CT's normalization and thin slices; plain with
# z-scores of the nonzero part, thick slices, kernels and strides that spare them, and axes that
# nnU-Net turned (the thick one is the file's first).
MODELS = {
    "residual": {
        "network_class_name": f"{_UNETS}.ResidualEncoderUNet",
        "blocks": {"n_blocks_per_stage": [1, 2, 1]},
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "patch_size": [16, 16, 16],
        "spacing": [1.3, 1.2, 1.2],
        "scan": ((30, 28, 24), (1.0, 1.1, 1.5), "LPS"),
        "transpose": [0, 1, 2],
        "normalization": ("CTNormalization", False),
        "reader": "SimpleITKIO",
    },
    "plain": {
        "network_class_name": f"{_UNETS}.PlainConvUNet",
        "blocks": {"n_conv_per_stage": [2, 1, 1]},
        "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "patch_size": [6, 16, 20],
        "spacing": [5.0, 1.2, 1.1],
        "scan": ((12, 30, 28), (4.5, 1.0, 1.0), "RPS"),
        # Network axes are the file's 0, 1, 2: nnU-Net's own order is 2, 1, 0.
        "transpose": [2, 1, 0],
        "normalization": ("ZScoreNormalization", True),
        "reader": "NibabelIOWithReorient",
    },
}


def write_scan(path, seed, shape, spacing, codes):
    """A noisy liver with a tumour, in a border of zeros; returns the labels too."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij"))
    centre = 0.5 + rng.uniform(-0.08, 0.08, (3, 1, 1, 1))
    distance = np.linalg.norm((grid - centre) / [[[[0.9]]], [[[1.0]]], [[[1.1]]]], axis=0)
    lesion = np.linalg.norm(grid - centre - 0.06, axis=0)
    label = np.where(lesion < 0.2, 2, np.where(distance < 0.33, 1, 0)).astype(np.uint8)
    image = np.choose(label, [-150.0, 100.0, 320.0]) + rng.normal(0, 20, shape)
    image[:3], image[:, -2:] = 0, 0
    start = nib.orientations.axcodes2ornt("RAS")
    there = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))
    # Sizes are those of the file's own axes.
    flips = np.where(there[:, 1] < 0, -1.0, 1.0)
    affine = np.diag([*(flips * spacing), 1.0])
    affine[:3, 3] = (20.0, -30.0, 55.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.rint(image).astype(np.int16), affine), path)
    return nib.Nifti1Image(label, affine)


def make_plans(model):
    scheme, masked = model["normalization"]
    intensities = {"mean": 120.0, "std": 110.0, "median": 100.0, "min": -160.0, "max": 380.0}
    intensities |= {"percentile_00_5": -140.0, "percentile_99_5": 350.0}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": model["patch_size"],
        "median_image_size_in_voxels": model["patch_size"],
        "spacing": model["spacing"],
        "normalization_schemes": [scheme],
        "use_mask_for_norm": [masked],
        "architecture": {
            "network_class_name": model["network_class_name"],
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [6, 8, 10],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": model["kernel_sizes"],
                "strides": model["strides"],
                **model["blocks"],
                "n_conv_per_stage_decoder": [1, 2],
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        settings = RESAMPLING | {"order": order, "is_seg": kind == "seg"}
        configuration[f"resampling_fn_{kind}_kwargs"] = settings
    return {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": model["spacing"],
        "original_median_shape_after_transp": model["patch_size"],
        "image_reader_writer": model["reader"],
        "transpose_forward": model["transpose"],
        "transpose_backward": [int(i) for i in np.argsort(model["transpose"])],
        # What nnU-Net calls 3d_fullres inherits all from a configuration of another name.
        "configurations": {"base": configuration, "3d_fullres": {"inherits_from": "base"}},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }


def train_with_nnunet(folder, model, steps, patch):
    """Returns the model folder that nnU-Net's trainer makes of two scans of its own."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    for name in ("raw", "preprocessed", "results"):
        patch.setenv(f"nnUNet_{name}", str(folder / name))
    patch.setenv("nnUNet_n_proc_DA", "0")
    plans = make_plans(model)
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    base = folder / "preprocessed" / plans["dataset_name"]
    preprocessed = base / "nnUNetPlans_3d_fullres"
    preprocessed.mkdir(parents=True)
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    for case, seed in (("a", 1), ("b", 2)):
        image, label = folder / f"{case}_0000.nii.gz", folder / f"{case}.nii.gz"
        nib.save(write_scan(image, seed, *model["scan"]), label)
        configuration.preprocessor_class(verbose=False).run_case_save(
            *(str(preprocessed / case), [str(image)], str(label)),
            *(manager, configuration, dataset),
        )
    write_json_atomic(base / "splits_final.json", [{"train": ["a", "b"], "val": ["a", "b"]}])
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - nnU-Net draws its crops from it
    trainer = nnUNetTrainer(
        plans | {"continue_training": False}, "3d_fullres", 0, dataset, torch.device("cpu")
    )
    trainer.initialize()
    # Few steps: a momentum of 0.99 needs hundreds to get going.
    for group in trainer.optimizer.param_groups:
        group["momentum"], group["lr"] = 0.9, 0.03
    train, _ = trainer.get_dataloaders()
    for _ in range(steps):
        trainer.train_step(next(train))
    results = folder / "results" / plans["dataset_name"] / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    trainer.save_checkpoint(str(results / "fold_0" / "checkpoint_final.pth"))
    write_json_atomic(results / "plans.json", plans)
    write_json_atomic(results / "dataset.json", dataset)
    return results


def nnunet_predictor(folder, mirroring=True):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    return predictor


@pytest.fixture(scope="module", params=list(MODELS))
def trained(request, tmp_path_factory):
    """(settings, model folder, nnU-Net's predictor, a scan) of each architecture."""
    model = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        results = train_with_nnunet(folder, model, 40, patch)
        write_scan(folder / "in" / "scan_0000.nii.gz", 7, *model["scan"])
        yield model, results, nnunet_predictor(results), folder / "in" / "scan_0000.nii.gz"


def config_for(checkpoint, scans, output, **changes):
    config = get_config()
    config.checkpoint, config.input, config.output = str(checkpoint), str(scans), str(output)
    config.update_from_flattened_dict(changes)
    return config


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_a_scan_is_prepared_and_a_tile_answered_as_by_nnunet(trained):
    _, results, predictor, scan = trained
    network = ensemble.open_network(config_for(results, scan, ""))
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    image, _, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(scan)],
        None,
        *(predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json),
    )
    prepared = network.prepare(read_ct(scan))
    np.testing.assert_allclose(prepared.image, image[0], atol=2e-5)
    box = [[side.start, side.stop] for side in prepared.crop]
    assert box == [list(map(int, side)) for side in properties["bbox_used_for_cropping"]]
    assert sorted(side.start for side in prepared.crop)[::2] == [0, 3]
    tile = np.random.default_rng(0).standard_normal((1, 1, *network.patch_size), np.float32)
    with torch.inference_mode():
        expected = predictor.network.eval()(torch.from_numpy(tile)).numpy()
    found = np.moveaxis(jax.jit(network.apply)(np.moveaxis(tile, 1, -1)), -1, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("mirroring", [False, True])
def test_a_predicted_scan_has_nnunets_labels(trained, tmp_path, mirroring):
    _, results, predictor, scan = trained
    predictor.use_mirroring = mirroring
    predictor.predict_from_files_sequential([[str(scan)]], [str(tmp_path / "theirs")])
    changes = {} if mirroring else {"inference.mirror_axes": ()}
    config = config_for(results, scan.parent, tmp_path / "ours", **changes)
    assert predict.run(config, tmp_path / "work") == 0
    ours = nib.load(tmp_path / "ours" / "scan.nii.gz")
    np.testing.assert_array_equal(ours.affine, nib.load(scan).affine)
    theirs = np.asanyarray(nib.load(tmp_path / "theirs.nii.gz").dataobj)
    ours = np.asanyarray(ours.dataobj)
    for value in (1, 2):
        assert (theirs == value).sum() > 50
        assert dice(ours == value, theirs == value) > 0.99
    record = json.loads((tmp_path / "ours" / "labels.json").read_text())
    assert record["labels"] == LABELS
    assert record["inference"]["mirror_axes"] == ([0, 1, 2] if mirroring else [])


def test_a_training_starts_from_it_with_its_axes_turned(trained):
    """The same logits for a tile whose axes are turned alike."""
    model, results, predictor, _ = trained
    read = checkpoints_config(model)
    start = finetuning.starting_parameters(str(results), read, initial_parameters(read))
    apply, _ = checkpoints.abstract_model(read)
    axes = [2 - axis for axis in model["transpose"]]
    tile = np.random.default_rng(5).standard_normal(model["patch_size"], np.float32)
    with torch.inference_mode():
        expected = predictor.network.eval()(torch.from_numpy(tile[None, None]))[0].numpy()
    turned = tile.transpose(np.argsort(axes))[None, ..., None]
    found = np.moveaxis(np.asarray(jax.jit(apply)(start, turned))[0], -1, 0)
    found = found.transpose(0, *(1 + axis for axis in axes))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def checkpoints_config(model, classes=("liver", "tumor")):
    """Our configuration of nnU-Net's network, axes in the order x, y, z."""
    order = np.argsort([2 - axis for axis in model["transpose"]])
    (blocks,) = model["blocks"].values()
    labels = {"liver": ["liver"], "tumor": ["liver_lesion"], "spleen": ["spleen"]}
    return ConfigDict(
        {
            "seed": 0,
            "task": {"classes": {name: labels[name] for name in classes}},
            "model": {
                "name": "resenc_unet" if "n_blocks_per_stage" in model["blocks"] else "plain_unet",
                "widths": [6, 8, 10],
                "blocks": blocks,
                "decoder_blocks": [1, 2],
                "strides": [[int(step[axis]) for axis in order] for step in model["strides"]],
                "kernels": [[int(size[axis]) for axis in order] for size in model["kernel_sizes"]],
                "dtype": "float32",
            },
        }
    )


def initial_parameters(config):
    _, shapes = checkpoints.abstract_model(config)
    rng = np.random.default_rng(11)
    return {
        name: jnp.asarray(rng.standard_normal(value.shape) * 0.2, jnp.float32)
        for name, value in shapes.items()
    }


def test_heads_are_made_anew_for_other_classes(trained, caplog):
    model, results, *_ = trained
    for classes in (("liver", "spleen"), ("liver", "tumor", "spleen")):
        config = checkpoints_config(model, classes)
        initial = initial_parameters(config)
        start = finetuning.starting_parameters(str(results), config, initial)
        assert "re-made" in caplog.text
        caplog.clear()
        assert all(start[name].shape == initial[name].shape for name in initial)
        body = [name for name in start if not name.startswith("heads.")]
        assert not any(np.array_equal(start[n], initial[n]) for n in body if "kernel" in n)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "plans.json").unlink(), r"plans\.json: no such file"),
        (lambda folder: (folder / "dataset.json").unlink(), r"dataset\.json: no such file"),
        (
            lambda folder: (folder / "fold_0" / "checkpoint_final.pth").unlink(),
            r"no checkpoint_final\.pth in any fold_N",
        ),
        (
            lambda folder: torch.save(
                {"network_weights": {"a": torch.ones(2)}, "init_args": {"configuration": "2d"}},
                folder / "fold_0" / "checkpoint_final.pth",
            ),
            "configuration '2d', and plans.json has base, 3d_fullres",
        ),
        (
            lambda folder: torch.save(
                {
                    "network_weights": {"a": torch.ones(2)},
                    "init_args": {"configuration": "3d_fullres"},
                },
                folder / "fold_0" / "checkpoint_final.pth",
            ),
            r"missing: decoder.* more; extra: a \[2\]",
        ),
        (
            lambda folder: change(folder, "configurations.base.preprocessor_name", "Mine"),
            "preprocessor_name is Mine. Expected DefaultPreprocessor",
        ),
        (
            lambda folder: change(folder, "configurations.base.previous_stage", "3d_lowres"),
            "Cascades predict in two stages",
        ),
        (lambda folder: change(folder, "transpose_forward", None), "transpose_forward"),
        (lambda folder: change(folder, "configurations.base.patch_size", [16, 16]), "3D"),
        (
            lambda folder: change(folder, "configurations.base.patch_size", [15, 16, 16]),
            "does not divide by",
        ),
        (
            lambda folder: change(
                folder,
                "configurations.base.architecture.network_class_name",
                "primus.PrimusM",
            ),
            "network_class_name is PrimusM. Expected ResidualEncoderUNet or PlainConvUNet",
        ),
        (
            lambda folder: change(
                folder, "configurations.base.architecture.arch_kwargs.features_per_stage", [6, 8, 9]
            ),
            r"of another shape: .*\[10, .*expected \[9, ",
        ),
        (
            lambda folder: change(
                folder, "configurations.base.architecture.arch_kwargs.block", "Bottleneck"
            ),
            r"arch_kwargs\.block is Bottleneck",
        ),
    ],
)
@pytest.mark.parametrize("trained", ["residual"], indirect=True)
def test_what_does_not_belong_together_is_named(trained, tmp_path, damage, message):
    _, results, _, scan = trained
    folder = tmp_path / "model"
    shutil.copytree(results, folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        predict.run(config_for(folder, scan, tmp_path / "out"), tmp_path / "work")
    assert not (tmp_path / "out").exists()


def change(folder, path, value):
    content = json.loads((folder / "plans.json").read_text())
    *parts, last = path.split(".")
    entry = content
    for part in parts:
        entry = entry[part]
    if value is None:
        del entry[last]
    else:
        entry[last] = value
    (folder / "plans.json").write_text(json.dumps(content))


@pytest.mark.parametrize("trained", ["residual"], indirect=True)
def test_folds_are_averaged(trained, tmp_path):
    _, results, predictor, scan = trained
    folder = tmp_path / "model"
    shutil.copytree(results, folder)
    shutil.copytree(folder / "fold_0", folder / "fold_1")
    path = folder / "fold_1" / "checkpoint_final.pth"
    other = torch.load(path, weights_only=False)
    for value in other["network_weights"].values():
        value.mul_(1.1)
    torch.save(other, path)
    tile = np.random.default_rng(2).standard_normal((1, 1, 16, 16, 16), np.float32)
    logits = []
    # The other fold first: the predictor is used again.
    for weights in (other["network_weights"], predictor.list_of_parameters[0]):
        predictor.network.load_state_dict(weights)
        with torch.inference_mode():
            logits.append(predictor.network.eval()(torch.from_numpy(tile)).numpy())
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
    network = ensemble.open_network(config_for(folder, scan, ""))
    found = np.moveaxis(jax.jit(network.apply)(np.moveaxis(tile, 1, -1)), -1, 1)
    np.testing.assert_allclose(found, (logits[0] + logits[1]) / 2, atol=1e-4)
    assert network.record["folds"] == ["fold_0", "fold_1"]
    with pytest.raises(UserError, match=r"in fold_3. There are fold_0, fold_1"):
        ensemble.open_network(config_for(folder, scan, "", folds=(3,)))


def test_an_ensemble_has_the_mean_of_nnunets_probabilities(trained, tmp_path):
    model, results, _, scan = trained
    affine = nib.load(scan).affine
    other = tmp_path / "other"
    shutil.copytree(results, other)
    path = other / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    for name, value in checkpoint["network_weights"].items():
        value.mul_(0.7 if "seg_layers" in name else 1.05)
    torch.save(checkpoint, path)
    theirs = []
    for folder in (results, other):
        target = tmp_path / f"theirs_{folder.name}"
        nnunet_predictor(folder, mirroring=False).predict_from_files_sequential(
            [[str(scan)]], [str(target)], save_probabilities=True
        )
        # nnU-Net's reader gives [z, y, x].
        saved = np.load(f"{target}.npz")["probabilities"]
        saved = saved.transpose(0, 3, 2, 1).astype(np.float32)
        if model["reader"] == "NibabelIOWithReorient":
            saved = np.stack([geometry.from_canonical(one, affine) for one in saved])
        theirs.append(saved)
    assert np.abs(theirs[0] - theirs[1]).max() > 0.02
    mean = (theirs[0] + theirs[1]) / 2

    changes = {"inference.mirror_axes": (), "probabilities": ("liver", "tumor")}
    config = config_for(str((str(results), str(other))), scan, tmp_path / "ours", **changes)
    assert predict.run(config, tmp_path / "work") == 0
    for index, name in enumerate(("liver", "tumor"), start=1):
        ours = nib.load(tmp_path / "ours" / "scan" / "probabilities" / f"{name}.nii.gz")
        apart = np.abs(np.asanyarray(ours.dataobj) - mean[index])
        # nnU-Net sums tiles in float16, which tells little apart where they weigh least.
        assert np.quantile(apart, 0.99) < 0.02
        assert apart.mean() < 2e-3
    labels = np.asanyarray(nib.load(tmp_path / "ours" / "scan.nii.gz").dataobj)
    expected = mean.argmax(axis=0)
    for value in (1, 2):
        assert (expected == value).sum() > 50
        assert dice(labels == value, expected == value) > 0.99


@pytest.mark.parametrize("trained", ["residual"], indirect=True)
def test_overlapping_regions_are_painted_in_their_order(trained, tmp_path):
    _, results, _, scan = trained
    folder = tmp_path / "model"
    shutil.copytree(results, folder)
    dataset = json.loads((folder / "dataset.json").read_text())
    dataset["labels"] = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": 3}
    dataset["regions_class_order"] = [1, 2, 3]
    write_json_atomic(folder / "dataset.json", dataset)
    predictor = nnunet_predictor(folder, mirroring=False)
    predictor.predict_from_files_sequential([[str(scan)]], [str(tmp_path / "theirs")])
    theirs = np.asanyarray(nib.load(tmp_path / "theirs.nii.gz").dataobj)
    config = config_for(folder, scan, tmp_path / "ours", **{"inference.mirror_axes": ()})
    assert predict.run(config, tmp_path / "work") == 0
    ours = np.asanyarray(nib.load(tmp_path / "ours" / "scan.nii.gz").dataobj)
    for value in (1, 2, 3):
        assert (theirs == value).sum() > 50
        assert dice(ours == value, theirs == value) > 0.99
    config.form = "structures"
    with pytest.raises(UserError, match="overlapping regions"):
        predict.run(config, tmp_path / "work")


# ---------------------------------------------------------------------------- and back


CLASSES = {"liver": ["liver"], "liver_lesion": ["liver_lesion"]}


def cell_of(folder, name, **model):
    """A folder of a training with the weights that a training begins with."""
    trained = {
        "seed": 0,
        "task": {"classes": CLASSES},
        "model": {"name": name, "widths": [4, 6, 8], "blocks": [1, 2, 1], "dtype": "float32"}
        | model,
        "training": {"patch_size": [16, 16, 8], "batch_size": 2},
        "preparation": {"spacing": [2.0, 2.0, 3.0], "window": [-175.0, 250.0], "order": 3},
        "inference": {"mirror_axes": [1, 2]},
    }
    write_json_atomic(folder / "config.json", trained)
    config = ConfigDict(trained)
    network = checkpoints.build_model(config, deep_supervision=False, seed=3)
    state = {"parameters": models.functional(network)[1], "step": jnp.zeros((), jnp.int32)}
    with checkpoints.open_manager(folder) as manager:
        checkpoints.save(manager, 5, state, position=0)
        manager.wait_until_finished()
    return folder


@pytest.mark.parametrize("name", ["resenc_unet", "plain_unet"])
def test_an_exported_network_gives_the_same_labels_with_nnunet(name, tmp_path, rng):
    strides = [[1, 1, 1], [2, 2, 1], [2, 2, 2]]
    kernels = [[3, 3, 1], [3, 3, 3], [3, 3, 3]]
    cell = cell_of(tmp_path / "cell", name, strides=strides, kernels=kernels)
    config = export_config.get_config()
    config.checkpoint, config.output = str(cell), str(tmp_path / "model")
    assert nnunet_export.run(config, tmp_path / "work") == 0

    scan = tmp_path / "in" / "scan_0000.nii.gz"
    scan.parent.mkdir()
    # On the network's spacing, in an orientation of its own: file axes are y, z, x.
    image = rng.normal(20, 120, (26, 11, 24)).astype(np.int16)
    affine = np.zeros((4, 4))
    affine[[1, 2, 0, 3], [0, 1, 2, 3]] = (-2.0, 3.0, 2.0, 1.0)
    affine[:3, 3] = (10, 20, -30)
    nib.save(nib.Nifti1Image(image, affine), scan)
    predictor = nnunet_predictor(tmp_path / "model")
    assert tuple(predictor.allowed_mirroring_axes) == (1, 2)
    predictor.predict_from_files_sequential([[str(scan)]], [str(tmp_path / "theirs")])
    theirs = np.asanyarray(nib.load(tmp_path / "theirs.nii.gz").dataobj)
    network = ensemble.open_network(config_for(cell, scan, "", **{"inference.mirror_axes": (1, 2)}))
    prepared = network.prepare(read_ct(scan))
    logits = sliding_window.predict(
        network.apply, prepared.image, (16, 16, 8), **network.window | {"output": "logits"}
    )
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    ours = network.labels(shares / shares.sum(axis=-1, keepdims=True), prepared)
    # The same wherever the best two logits are further apart than nnU-Net's float16 sums can err:
    # in the corners, tiles weigh less than float16 can tell from 0.
    best = np.sort(logits, axis=-1)
    sure = best[..., -1] - best[..., -2] > 5e-3 * np.abs(best).max()
    sure = geometry.from_canonical(sure, affine)[2:-2, 2:-2, 2:-2]
    assert sure.mean() > 0.95
    inner = np.array([0, 5, 27])[theirs][2:-2, 2:-2, 2:-2]
    np.testing.assert_array_equal(inner[sure], ours[2:-2, 2:-2, 2:-2][sure])
    for value, own in ((1, 5), (2, 27)):
        assert (theirs == value).sum() > 50
        assert dice(ours == own, theirs == value) > 0.98

    # And read back here, the folder is the network that it was made of.
    config = checkpoints.load_model(cell)[1]
    start = finetuning.starting_parameters(
        str(tmp_path / "model"), config, initial_parameters(config)
    )
    apply, _ = checkpoints.load_model(cell)
    for key, value in apply.args[0].items():
        np.testing.assert_array_equal(start[key], value, err_msg=key)


def test_exports_are_finished_refused_and_never_mixed(tmp_path, capsys):
    cell = cell_of(tmp_path / "cell", "resenc_unet")
    config = export_config.get_config()
    with pytest.raises(UserError, match=r"config\.checkpoint is empty"):
        nnunet_export.run(config, tmp_path / "work")
    config.checkpoint = str(cell)
    assert nnunet_export.run(config, tmp_path / "work") == 0
    assert nnunet_export.run(config, tmp_path / "work") == 0
    assert "already finished" in capsys.readouterr().out
    other = cell_of(tmp_path / "other", "resenc_unet", widths=[4, 6, 10])
    config.checkpoint = str(other)
    with pytest.raises(UserError, match="holds another model"):
        nnunet_export.run(config, tmp_path / "work")
    trained = json.loads((other / "config.json").read_text())
    trained["model"]["name"] = "segresnet"
    (other / "config.json").write_text(json.dumps(trained))
    with pytest.raises(UserError):
        nnunet_export.run(config, tmp_path / "elsewhere")
