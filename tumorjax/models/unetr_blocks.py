"""The convolutional blocks that UNETR and Swin UNETR share, with MONAI's names.

Source: unetr_block.py and dynunet_block.py of MONAI. Convolutions have no bias, instance norms
no parameters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.errors import UserError
from tumorjax.models.layers import Conv, InstanceNorm, TransposedConv, leaky_relu


class ResBlock(nnx.Module):
    """Two convolutions and a shortcut, which is projected when channels change (UnetResBlock)."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        options: dict[str, Any] = {"bias": False, "dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(in_channels, out_channels, 3, **options)
        self.conv2 = Conv(out_channels, out_channels, 3, **options)
        self.conv3 = nnx.data(
            Conv(in_channels, out_channels, 1, **options) if in_channels != out_channels else None
        )
        self.norm = InstanceNorm(out_channels, affine=False)

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z d"]:
        y = leaky_relu(self.norm(self.conv1(x)))
        y = self.norm(self.conv2(y))
        return leaky_relu(y + (x if self.conv3 is None else self.norm(self.conv3(x))))


class UpBlock(nnx.Module):
    """Doubles the resolution and joins the skip connection (UnetrUpBlock)."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.transp_conv = TransposedConv(in_channels, out_channels, 2, bias=False, **options)
        self.conv_block = ResBlock(2 * out_channels, out_channels, **options)

    def __call__(
        self, x: Float[Array, "b x y z c"], skip: Float[Array, "b x2 y2 z2 d"]
    ) -> Float[Array, "b x2 y2 z2 d"]:
        up = self.transp_conv(x)
        return self.conv_block(jnp.concatenate([up, skip.astype(up.dtype)], axis=-1))


class ProjectionUp(nnx.Module):
    """Doubles the resolution once, then `layers` times with a block each (UnetrPrUpBlock)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.transp_conv_init = TransposedConv(in_channels, out_channels, 2, bias=False, **options)
        self.blocks = nnx.List(
            nnx.List(
                [
                    TransposedConv(out_channels, out_channels, 2, bias=False, **options),
                    ResBlock(out_channels, out_channels, **options),
                ]
            )
            for _ in range(layers)
        )

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 d"]:
        x = self.transp_conv_init(x)
        for up, block in self.blocks:
            x = block(up(x))
        return x


def check_settings(name: str, deep_supervision: bool, heads: Mapping[int, int]) -> None:
    """Checks what the transformers' `create` functions have in common.

    Args:
        name: of the network.
        deep_supervision: which none of them has.
        heads: channels of each attention -> its heads, which must divide them.

    Raises:
        UserError: a setting does not fit.
    """
    refuse_deep_supervision(name, deep_supervision)
    for channels, count in heads.items():
        if count < 1 or channels % count:
            raise UserError(
                f"model {name}: {channels} channels do not divide over {count} attention heads."
                " Choose other numbers of channels or heads"
            )


def refuse_deep_supervision(name: str, deep_supervision: bool) -> None:
    """Refuses deep supervision for a network whose original has none.

    Raises:
        UserError: it is asked for.
    """
    if deep_supervision:
        raise UserError(
            f"model {name} has no deep supervision: its original gives logits at the finest level"
            " alone. Set training.deep_supervision to False"
        )


def check_patch(shape: Sequence[int], divisor: Sequence[int]) -> None:
    """Checks that each axis of a patch divides by the network's divisor.

    Raises:
        ValueError: one does not.
    """
    if any(size % step or size < step for size, step in zip(shape, divisor, strict=True)):
        raise ValueError(
            f"input of shape {tuple(shape)}: each axis must divide by {tuple(divisor)}. Choose"
            " another patch size"
        )


# Modules that MONAI wraps into a Convolution, which holds the layer as `conv`.
_WRAPPED = ("conv1", "conv2", "conv3", "transp_conv", "transp_conv_init")
# The blocks that MONAI wraps into a UnetrBasicBlock, which holds the block as `layer`.
_ENCODER = re.compile(r"^(encoder\d+)\.(conv\d)\.")


def torch_key(name: str) -> str:
    """Returns MONAI's key of a parameter whose network names its blocks as MONAI's does."""
    *path, leaf = _ENCODER.sub(r"\1.layer.\2.", name).split(".")
    # blocks.LAYER.0 is the transposed convolution of a UnetrPrUpBlock.
    if path[-1] in _WRAPPED or (path[-3:-2] == ["blocks"] and path[-1] == "0"):
        path.append("conv")
    elif path == ["out"]:
        path += ["conv", "conv"]
    return ".".join([*path, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def torch_heads(parameters: Mapping[str, Array]) -> set[str]:
    """Returns the names of the last convolution, which gives the classes."""
    return {name for name in parameters if name.startswith("out.")}
