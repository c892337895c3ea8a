"""UNETR: a vision transformer as the encoder of a U-Net.

Source: Hatamizadeh et al., "UNETR: Transformers for 3D Medical Image Segmentation", WACV 2022;
the reference implementation is UNETR of MONAI (without dropout, which is off there by default),
whose names are kept, so that weights map one to one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.errors import UserError
from tumorjax.models.layers import Conv, normal, triple
from tumorjax.models.rematerialization import run_block
from tumorjax.models.transformer import LayerNorm, Mlp, PatchConv, SelfAttention
from tumorjax.models.unetr_blocks import (
    ProjectionUp,
    ResBlock,
    UpBlock,
    check_patch,
    check_settings,
    torch_heads,
    torch_key,
)

__all__ = ["SETTINGS", "UNETR", "create", "torch_heads", "torch_names"]

FIXED_PATCH = True  # its tokens' places are learned
# For crops of 32^3 on a CPU.
SMALL = {"feature_size": 8, "hidden_size": 96, "mlp_width": 192, "heads": 4}
SETTINGS = (
    *("classes", "in_channels", "patch_size", "feature_size", "hidden_size", "mlp_width", "heads"),
    *("qkv_bias", "deep_supervision", "remat", "dtype", "seed"),
)
TOKEN_SIZE = 16  # voxels along each axis of a token
LAYERS = 12
SKIPS = (3, 6, 9)  # the transformer's layers whose outputs are skip connections


class TransformerBlock(nnx.Module):
    """Attention and a multi-layer perceptron, each after a layer norm and with a shortcut.

    MONAI's block also holds a norm for a cross attention that UNETR lacks. Nothing uses it; it is
    here as `norm_cross_attn`, since its weights are in MONAI's files and parameter counts.
    """

    def __init__(self, channels: int, mlp_width: int, heads: int, *, qkv_bias: bool, **options):
        self.mlp = Mlp(channels, mlp_width, **options)
        self.norm1 = LayerNorm(channels)
        self.attn = SelfAttention(channels, heads, qkv_bias=qkv_bias, **options)
        self.norm2 = LayerNorm(channels)
        self.norm_cross_attn = LayerNorm(channels)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    """Tokens of 16^3 voxels with learnt positions, and transformer blocks over all of them."""

    def __init__(
        self,
        in_channels: int,
        patch_size: tuple[int, int, int],
        channels: int,
        mlp_width: int,
        heads: int,
        *,
        qkv_bias: bool,
        remat: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.grid = tuple(size // TOKEN_SIZE for size in patch_size)
        self.patch_embeddings = PatchConv(in_channels, channels, TOKEN_SIZE, **options)
        shape = (1, math.prod(self.grid), channels)
        self.position_embeddings = nnx.Param(normal(rngs.params(), shape, 0.02))
        self.blocks = nnx.List(
            TransformerBlock(channels, mlp_width, heads, qkv_bias=qkv_bias, **options)
            for _ in range(LAYERS)
        )
        self.norm = LayerNorm(channels)
        self.remat = remat

    def __call__(self, x: Float[Array, "b x y z c"]) -> list[Float[Array, "b x2 y2 z2 d"]]:
        """Returns the outputs of the layers in SKIPS and of the last one, as volumes."""
        tokens = self.patch_embeddings(x)
        tokens = tokens.reshape(x.shape[0], -1, tokens.shape[-1])
        tokens = tokens + self.position_embeddings[...].astype(tokens.dtype)
        outputs = []
        for index, block in enumerate(self.blocks):
            tokens = run_block(block, tokens, remat=self.remat)
            if index in SKIPS:
                outputs.append(tokens)
        outputs.append(self.norm(tokens))
        return [y.reshape(x.shape[0], *self.grid, y.shape[-1]) for y in outputs]


class UNETR(nnx.Module):
    """Vision transformer, convolutional skip connections and a convolutional decoder.

    Args:
        in_channels: channels of the input.
        classes: channels of the output, background counted.
        patch_size: of the input, each axis a multiple of 16. The position embeddings bind the
            network to it.
        feature_size: channels at the finest level; they double at each coarser one.
        hidden_size: channels of the tokens.
        mlp_width: channels inside the transformer's perceptrons.
        heads: of the attention.
        qkv_bias: whether queries, keys and values have a bias.
        remat: recompute each block's activations in the backward pass instead of keeping them.
        dtype: of the operands of convolutions and matrix products; parameters, norms, softmax and
            logits are float32.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        patch_size: tuple[int, int, int],
        feature_size: int,
        hidden_size: int,
        mlp_width: int,
        heads: int,
        qkv_bias: bool = False,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width = feature_size
        self.vit = VisionTransformer(
            in_channels,
            patch_size,
            hidden_size,
            mlp_width,
            heads,
            qkv_bias=qkv_bias,
            remat=remat,
            **options,
        )
        self.encoder1 = ResBlock(in_channels, width, **options)
        self.encoder2 = ProjectionUp(hidden_size, 2 * width, 2, **options)
        self.encoder3 = ProjectionUp(hidden_size, 4 * width, 1, **options)
        self.encoder4 = ProjectionUp(hidden_size, 8 * width, 0, **options)
        self.decoder5 = UpBlock(hidden_size, 8 * width, **options)
        self.decoder4 = UpBlock(8 * width, 4 * width, **options)
        self.decoder3 = UpBlock(4 * width, 2 * width, **options)
        self.decoder2 = UpBlock(2 * width, width, **options)
        self.out = Conv(width, classes, 1, **options)
        self.remat = remat
        self.patch_size = patch_size
        # Each axis of an input must divide by this.
        self.divisor = triple(TOKEN_SIZE)

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z classes"]:
        """Returns logits.

        Raises:
            ValueError: x has not the patch size that the network was made for.
        """
        check_patch(x.shape[1:4], self.divisor)
        if x.shape[1:4] != self.patch_size:
            raise ValueError(
                f"input of shape {x.shape[1:4]}: the network was made for {self.patch_size}, as its"
                " position embeddings bind it to one size. Set model.patch_size"
            )
        *skips, y = self.vit(x)
        encoders = (self.encoder2, self.encoder3, self.encoder4)
        skips = [
            run_block(block, skip, remat=self.remat)
            for block, skip in zip(encoders, skips, strict=True)
        ]
        skips.insert(0, run_block(self.encoder1, x, remat=self.remat))
        for block in (self.decoder5, self.decoder4, self.decoder3, self.decoder2):
            y = run_block(block, y, skips.pop(), remat=self.remat)
        return self.out(y).astype(jnp.float32)


def create(
    *,
    classes: int,
    in_channels: int = 1,
    patch_size: int | Sequence[int] = 96,
    feature_size: int = 32,
    hidden_size: int = 768,
    mlp_width: int = 3072,
    heads: int = 12,
    deep_supervision: bool = False,
    seed: int = 0,
    **settings,
) -> UNETR:
    """Returns the network with initial weights from `seed`.

    The default sizes are those of the paper's table: 101.8 M parameters at 96^3.

    Args:
        classes: number of output classes, background counted.
        in_channels: channels of the input.
        patch_size: of the input, in voxels, one number or one an axis.
        feature_size, hidden_size, mlp_width, heads: see `UNETR`.
        deep_supervision: must be False.
        seed: of the initial weights.
        settings: qkv_bias, remat and dtype, see `UNETR`.

    Raises:
        UserError: a setting does not fit.
    """
    check_settings("unetr", deep_supervision, {hidden_size: heads})
    size = triple(patch_size if isinstance(patch_size, int) else tuple(patch_size))  # type: ignore
    if any(n < TOKEN_SIZE or n % TOKEN_SIZE for n in size):
        raise UserError(
            f"model.patch_size is {size}. Expected multiples of {TOKEN_SIZE}, the size of a token"
        )
    return UNETR(
        in_channels,
        classes,
        patch_size=size,
        feature_size=feature_size,
        hidden_size=hidden_size,
        mlp_width=mlp_width,
        heads=heads,
        **settings,
        rngs=nnx.Rngs(seed),
    )


def torch_names(parameters: Mapping[str, Array]) -> dict[str, str]:
    """Returns the name of each parameter in the state_dict of MONAI's UNETR."""

    def key(name: str) -> str:
        path = torch_key(name)
        for ours, theirs in (
            ("vit.position_embeddings", "vit.patch_embedding.position_embeddings"),
            ("vit.patch_embeddings.", "vit.patch_embedding.patch_embeddings."),
            (".attn.proj.", ".attn.out_proj."),
        ):
            path = path.replace(ours, theirs)
        return path

    return {name: key(name) for name in parameters}
