"""nnU-Net's plain U-Net: equality to its reference."""

import numpy as np
import pytest

from tumorjax import models
from tumorjax.errors import UserError


def _reference(*, stages, widths, classes, channels, **changed):
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    from torch import nn

    settings = {
        "kernel_sizes": 3,
        "strides": [1] + [2] * (stages - 1),
        "n_conv_per_stage": 2,
        "n_conv_per_stage_decoder": 2,
        "deep_supervision": True,
    } | changed
    return unets.PlainConvUNet(
        input_channels=channels,
        n_stages=stages,
        features_per_stage=widths,
        conv_op=nn.Conv3d,
        num_classes=classes,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **settings,
    )


def test_network_equals_its_reference(equals_reference, rng):
    reference = _reference(stages=3, widths=[4, 6, 8], classes=3, channels=1)
    model = models.create(
        "plain_unet", widths=(4, 6, 8), blocks=(2, 2, 2), classes=3, deep_supervision=True
    )
    x = rng.standard_normal((2, 8, 8, 12, 1)).astype(np.float32)
    equals_reference(model, reference, x)


def test_network_of_an_anisotropic_plan_equals_its_reference(equals_reference, rng):
    plan = {
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "n_conv_per_stage": [1, 2, 3],
        "n_conv_per_stage_decoder": [2, 1],
        "deep_supervision": False,
    }
    reference = _reference(stages=3, widths=[4, 6, 8], classes=5, channels=2, **plan)
    model = models.create(
        "plain_unet",
        widths=(4, 6, 8),
        blocks=(1, 2, 3),
        decoder_blocks=(2, 1),
        strides=plan["strides"],
        kernels=plan["kernel_sizes"],
        classes=5,
        in_channels=2,
    )
    x = rng.standard_normal((1, 6, 16, 12, 2)).astype(np.float32)
    equals_reference(model, reference, x)


def test_preset_has_the_references_parameters(parameters_of, torch_parameters_of):
    def reference():
        widths = [32, 64, 128, 256, 320, 320]
        return _reference(stages=6, widths=widths, classes=2, channels=1)

    found = parameters_of("plain_unet", preset="nnunet", classes=2)
    assert found == torch_parameters_of(reference)
    assert found == pytest.approx(31.20e6, rel=1e-3)
    planned = parameters_of("plain_unet", preset="nnunet", patch_size=(160, 128, 128), classes=2)
    assert found == planned


@pytest.mark.slow
def test_full_size_equals_its_reference(equals_reference, rng):
    widths = [32, 64, 128, 256, 320, 320]
    reference = _reference(stages=6, widths=widths, classes=2, channels=1)
    model = models.create("plain_unet", preset="nnunet", classes=2, deep_supervision=True)
    x = rng.standard_normal((1, 64, 64, 32, 1)).astype(np.float32)
    equals_reference(model, reference, x, full_size=True)


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match="Expected one of nnunet"):
        models.create("plain_unet", preset="M", classes=2)
    with pytest.raises(UserError, match="expected one number, or 1"):
        models.create("plain_unet", widths=(4, 8), blocks=(1, 1), decoder_blocks=(1, 2), classes=2)
    with pytest.raises(UserError, match="expected odd sizes"):
        models.create("plain_unet", widths=(4, 8), blocks=(1, 1), kernels=(3, 2), classes=2)
    model = models.create("plain_unet", widths=(4, 8), blocks=(1, 1), classes=2)
    with pytest.raises(ValueError, match=r"input of shape \(8, 7, 8\): each axis must divide by"):
        model(np.ones((1, 8, 7, 8, 1), np.float32))
