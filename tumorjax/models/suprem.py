"""SuPreM's backbones: networks that were trained on AbdomenAtlas, to start fine-tuning from.

Source: Li et al., "How Well Do Supervised Models Transfer to 3D Image Segmentation?", ICLR 2024;
the reference implementations are those of MrGiovanni/SuPreM: UNet3D of backbone/unet.py, SwinUNETR
of backbone/swinunetr.py (with 48 features) and MONAI's SegResNet (with 16 filters).

SuPreM's checkpoints of U-Net and Swin UNETR are of a Universal Model around the backbone: import
them with strict=False, which leaves out its head and keeps this network's initial one.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.errors import UserError
from tumorjax.models import segresnet, swin_unetr, unet3d
from tumorjax.models.layers import Conv
from tumorjax.models.unetr_blocks import refuse_deep_supervision

# Which settings each backbone has of its own.
BACKBONES = {
    "unet": ("width", "statistics"),
    "swin_unetr": ("feature_size", "depths", "merging"),
    "segresnet": ("init_filters", "blocks_down", "blocks_up"),
}
SETTINGS = (
    *("classes", "in_channels", "backbone", "deep_supervision", "remat", "dtype", "seed"),
    *(name for names in BACKBONES.values() for name in names),
)


class SuPreMUNet(nnx.Module):
    """The U-Net of Models Genesis with a convolution as head.

    Args:
        in_channels: channels of the input.
        classes: channels of the output, background counted.
        dtype: of the convolutions' operands; parameters, norms and logits are float32.
        rngs: source of the initial weights.
        settings: width, statistics and remat, see `unet3d.UNet3D`.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        width: int = 32,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        **settings: Any,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.backbone = unet3d.UNet3D(in_channels, width=width, **settings, **options)
        self.final_conv = Conv(2 * width, classes, 1, **options)
        # Each axis of an input must divide by this.
        self.divisor = self.backbone.divisor

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z classes"]:
        """Returns logits.

        Raises:
            ValueError: an axis of x does not divide by 8.
        """
        return self.final_conv(self.backbone.features(x)[1]).astype(jnp.float32)


def create(
    *,
    classes: int,
    in_channels: int = 1,
    backbone: str = "unet",
    deep_supervision: bool = False,
    seed: int = 0,
    remat: bool = False,
    dtype: jnp.dtype = jnp.float32,
    **settings,
) -> nnx.Module:
    """Returns one of SuPreM's networks with initial weights from `seed`.

    Args:
        classes: number of output classes, background counted.
        in_channels: channels of the input.
        backbone: "unet", "swin_unetr" (version 1) or "segresnet".
        deep_supervision: must be False.
        seed: of the initial weights.
        remat: recompute activations in the backward pass instead of keeping them.
        dtype: of the operands of convolutions and matrix products.
        settings: of the backbone, see `unet3d.UNet3D`, `swin_unetr.build` and `segresnet.create`;
            the defaults are SuPreM's.

    Raises:
        UserError: a setting does not fit.
    """
    refuse_deep_supervision("suprem", deep_supervision)
    if backbone not in BACKBONES:
        raise UserError(f"model.backbone is {backbone!r}. Expected one of {', '.join(BACKBONES)}")
    others = sorted(set(settings) - set(BACKBONES[backbone]))
    if others:
        raise UserError(
            f"model suprem with backbone {backbone} has no setting {', '.join(others)}. Expected"
            f" some of {', '.join(BACKBONES[backbone])}"
        )
    settings |= {"remat": remat, "dtype": dtype}
    if backbone == "unet":
        return SuPreMUNet(in_channels, classes, rngs=nnx.Rngs(seed), **settings)
    if backbone == "swin_unetr":
        settings = {"merging": "merging_repeated", **settings}
        return swin_unetr.build(
            "suprem", in_channels, classes, False, version=1, rngs=nnx.Rngs(seed), **settings
        )
    settings = {"init_filters": 16, "blocks_down": (1, 2, 2, 4), "blocks_up": (1, 1, 1), **settings}
    return segresnet.create(classes=classes, in_channels=in_channels, seed=seed, **settings)


def torch_names(parameters: Mapping[str, Array]) -> dict[str, str]:
    """Returns the name of each parameter of the U-Net in the state_dict of SuPreM's UNet3D.

    The other two networks are of the modules swin_unetr and segresnet, and so are their names.
    """
    keys = unet3d.torch_names(parameters)
    return {
        name: key.removeprefix("backbone.").replace("final_conv.", "out_tr.final_conv.")
        for name, key in keys.items()
    }


def torch_heads(parameters: Mapping[str, Array]) -> set[str]:
    """Returns the names of the last convolution, which gives the classes."""
    return {name for name in parameters if name.startswith("final_conv.")}


def torch_buffers(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the batch norms' counts of training steps, which nothing uses."""
    assert isinstance(model, SuPreMUNet)
    return unet3d.torch_buffers(model.backbone)
