"""Plans of nnU-Net: what each entry means here, and what is refused by name."""

import copy

import pytest

from tumorjax.errors import UserError
from tumorjax.models.nnunet_plans import read_plans

RESAMPLING = {
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0},
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "force_separate_z": None},
}
CONFIGURATION = {
    "preprocessor_name": "DefaultPreprocessor",
    "patch_size": [16, 32, 40],
    "spacing": [3.0, 0.8, 0.7],
    "normalization_schemes": ["CTNormalization"],
    "use_mask_for_norm": [False],
    **RESAMPLING,
    # As nnU-Net wrote it before version 2.4.
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 16,
    "unet_max_num_features": 40,
    "n_conv_per_stage_encoder": [2, 3, 2],
    "n_conv_per_stage_decoder": [2, 1],
    "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
}
PLANS = {
    "image_reader_writer": "NibabelIO",
    "transpose_forward": [1, 0, 2],
    "transpose_backward": [1, 0, 2],
    "configurations": {
        "2d": {"patch_size": [8, 8]},
        "3d_fullres": CONFIGURATION,
        "mine": {"inherits_from": "3d_fullres", "patch_size": [32, 32, 40]},
        "loop": {"inherits_from": "loop"},
    },
    "foreground_intensity_properties_per_channel": {
        "0": {"mean": 1.0, "std": 2.0, "percentile_00_5": -3.0, "percentile_99_5": 4.0}
    },
}
DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "b": 2, "a": 1, "ignore": 3}}


def changed(entry, path, value):
    entry = copy.deepcopy(entry)
    *parts, last = path.split(".")
    inner = entry
    for part in parts:
        inner = inner[part]
    inner[last] = value
    return entry


def test_old_plans_give_the_network_that_new_ones_give():
    read = read_plans("m", PLANS, DATASET, "3d_fullres")
    assert read.model == {
        "name": "plain_unet",
        "widths": (16, 32, 40),
        "blocks": (2, 3, 2),
        "decoder_blocks": (2, 1),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        "classes": 3,
        "in_channels": 1,
    }
    # nnU-Net's arrays are z, y, x; its axes 1, 0, 2 of those are y, z, x.
    assert read.axes == (1, 2, 0)
    assert not read.reorient
    assert (read.spacing, read.patch_size) == ((3.0, 0.8, 0.7), (16, 32, 40))
    assert read.labels.values == {"b": 2, "a": 1}
    assert (read.data["order"], read.data["force_separate_z"]) == (3, False)
    assert (read.logits["order"], read.logits["force_separate_z"]) == (1, None)


def test_a_configuration_has_what_it_inherits():
    read = read_plans("m", PLANS, DATASET, "mine")
    assert (read.patch_size, read.spacing) == ((32, 32, 40), (3.0, 0.8, 0.7))


def test_regions_have_their_own_order():
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": 3}
    dataset = DATASET | {"labels": labels, "regions_class_order": [1, 2, 3]}
    read = read_plans("m", PLANS, dataset, "3d_fullres").labels
    assert (read.regions, read.order, read.heads) == (True, (1, 2, 3), 3)
    assert read.values == {"whole": 1, "core": 2, "active": 3}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("image_reader_writer", "Tiff3DIO", "image_reader_writer is Tiff3DIO. Expected SimpleITK"),
        ("transpose_forward", [0, 0, 1], r"transpose_forward is \[0, 0, 1\]"),
        ("configurations", {}, "'3d_fullres', and plans.json has "),
        ("configurations.3d_fullres.spacing", [1.0, 1.0], "entry of another kind"),
        ("configurations.3d_fullres.normalization_schemes", ["Mine"], "Mine. Expected CTNormal"),
        ("configurations.3d_fullres.resampling_fn_data", "mine", "resampling_fn_data is mine"),
        (
            "configurations.3d_fullres.resampling_fn_probabilities_kwargs",
            {"order": 3},
            "probabilities_kwargs.order is 3. Expected 0 or 1",
        ),
        ("configurations.3d_fullres.conv_kernel_sizes", [[2, 3, 3]] * 3, "Expected odd sizes"),
        ("configurations.3d_fullres.conv_kernel_sizes", [3, 3], "2 entries. Expected 3"),
        ("foreground_intensity_properties_per_channel", {"0": {}}, "no entry 'mean'"),
    ],
)
def test_what_cannot_be_followed_is_named(path, value, message):
    with pytest.raises(UserError, match=message):
        read_plans("m", changed(PLANS, path, value), DATASET, "3d_fullres")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"channel_names": {"0": "CT", "1": "PET"}}, "number of channels is 2"),
        ({"labels": {"background": 0, "a": 2}}, r"labels are \[0, 2\]"),
        (
            {"labels": {"background": 0, "a": [1, 2], "b": [2]}, "regions_class_order": [1]},
            "entries",
        ),
        ({"labels": {"background": 0, "a": [1, 2]}}, "regions_class_order"),
    ],
)
def test_labels_and_channels_are_checked(dataset, message):
    with pytest.raises(UserError, match=message):
        read_plans("m", PLANS, DATASET | dataset, "3d_fullres")


def test_configurations_that_are_not_3d_or_inherit_themselves_are_refused():
    with pytest.raises(UserError, match="Choose a 3D configuration"):
        read_plans("m", PLANS, DATASET, "2d")
    with pytest.raises(UserError, match="configuration 'loop'"):
        read_plans("m", PLANS, DATASET, "loop")
