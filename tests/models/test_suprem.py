"""SuPreM's backbones against their references, and starting from its checkpoints.

The reference of the U-Net is a torch model written from SuPreM's published code's description, see
`unet3d_reference`; that of Swin UNETR is MONAI's with the order of patch merging of SuPreM's code;
that of SegResNet is MONAI's, as in SuPreM.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.models.torch_weights import export_state_dict, import_state_dict

OLD_MERGING = (
    *([0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]),
    *([1, 0, 1], [0, 1, 0], [0, 0, 1], [1, 1, 1]),
)


def test_parameters_are_the_references(
    parameters_of, torch_parameters_of, unet3d_reference, swin_reference
):
    nets = pytest.importorskip("monai.networks.nets")
    references = {
        "unet": lambda: unet3d_reference(1, 32, 25),
        "swin_unetr": lambda: swin_reference(1, 25, feature_size=48),
        "segresnet": lambda: nets.SegResNet(
            3, 16, 1, 25, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1)
        ),
    }
    for backbone, make in references.items():
        # The running statistics of batch norms are buffers there, and no parameters.
        fixed = 2 * (3 * 32 * (1 + 2 + 4 + 8) + 2 * 64 * (4 + 2 + 1)) if backbone == "unet" else 0
        count = parameters_of("suprem", classes=25, backbone=backbone) - fixed
        assert count == torch_parameters_of(make), backbone


@pytest.mark.parametrize(
    ("shape", "in_channels", "classes"), [((16, 8, 8), 1, 3), ((8, 16, 24), 2, 2)]
)
def test_unet_equals_the_reference(
    rng, equals_reference, unet3d_reference, shape, in_channels, classes
):
    model = models.create("suprem", classes=classes, in_channels=in_channels, width=4)
    x = rng.standard_normal((2, *shape, in_channels)).astype(np.float32)
    reference = unet3d_reference(in_channels, 4, classes)
    import torch

    with torch.no_grad():
        for name, value in reference.named_buffers():
            if "running" in name:
                value.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, value.shape)))
    # The reference takes the batch's statistics in both its modes.
    equals_reference(model, reference.eval(), x)


def test_swin_unetr_equals_the_reference(rng, equals_reference, swin_reference):
    sizes = {"feature_size": 12, "depths": (1, 1, 1, 1)}
    model = models.create("suprem", classes=2, backbone="swin_unetr", **sizes)
    x = rng.standard_normal((1, 32, 64, 32, 1)).astype(np.float32)
    reference = swin_reference(1, 2, order=OLD_MERGING, **sizes)
    equals_reference(model, reference, x, gradients=False)


def test_segresnet_equals_monais(rng, equals_reference):
    nets = pytest.importorskip("monai.networks.nets")
    sizes = {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)}
    model = models.create("suprem", classes=3, backbone="segresnet", **sizes)
    reference = nets.SegResNet(3, in_channels=1, out_channels=3, **sizes)
    equals_reference(model, reference, rng.standard_normal((1, 8, 8, 12, 1)).astype(np.float32))


@pytest.mark.slow
def test_full_size_unet_equals_the_reference(rng, equals_reference, unet3d_reference):
    model = models.create("suprem", classes=3)
    x = rng.standard_normal((1, 96, 96, 96, 1)).astype(np.float32)
    equals_reference(model, unet3d_reference(1, 32, 3), x, gradients=False)


@pytest.mark.parametrize(
    ("backbone", "sizes"),
    [("unet", {"width": 2}), ("swin_unetr", {"feature_size": 12, "depths": (1, 1, 1, 1)})],
)
def test_checkpoints_of_pretraining_start_the_backbone(caplog, backbone, sizes):
    # SuPreM saves a Universal Model, wrapped by DistributedDataParallel.
    pretrained = models.create("universal", classes=33, seed=1, backbone=backbone, **sizes)
    weights = {f"module.{k}": v for k, v in export_state_dict(pretrained).items()}
    model = models.create("suprem", classes=3, backbone=backbone, **sizes)
    with pytest.raises(UserError, match="controller"):
        import_state_dict(model, weights)
    found = export_state_dict(import_state_dict(model, weights, strict=False))
    head = "out_tr.final_conv.weight" if backbone == "unet" else "out.conv.conv.weight"
    assert head in caplog.text
    np.testing.assert_array_equal(found[head], export_state_dict(model)[head])
    backbones = [key for key in found if f"module.backbone.{key}" in weights]
    assert len(backbones) == len(found) - 2
    for key in backbones:
        np.testing.assert_array_equal(found[key], weights[f"module.backbone.{key}"], err_msg=key)


def test_wrong_settings_are_told():
    for settings, message in (
        ({"backbone": "vnet"}, "Expected one of unet, swin_unetr, segresnet"),
        ({"backbone": "unet", "feature_size": 12}, "no setting feature_size"),
        ({"deep_supervision": True}, "no deep supervision"),
    ):
        with pytest.raises(UserError, match=message):
            models.create("suprem", classes=2, **settings)
    with pytest.raises(ValueError, match="each axis must divide by"):
        models.create("suprem", classes=2, width=2)(jnp.ones((1, 8, 8, 4, 1)))
