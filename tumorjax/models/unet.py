"""What nnU-Net's two U-Nets share: the decoder, planning by patch size, names of weights.

Source: Isensee et al., "nnU-Net", Nature Methods 2021, and its planner's code for the rules.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.errors import UserError
from tumorjax.models.layers import Conv, ConvNormAct, TransposedConv, triple
from tumorjax.models.rematerialization import run_block

# An axis is halved as long as this many voxels are left: nnU-Net's UNet_featuremap_min_edge_length.
MIN_EDGE = 4
# Of the first stages; further ones are as wide as the last.
WIDTHS = (32, 64, 128, 256, 320)
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class Stage(nnx.Module):
    """Blocks in a row."""

    def __init__(self, blocks: Sequence[nnx.Module]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def conv_stage(in_channels: int, width: int, count: int, size, stride=1, **options: Any) -> Stage:
    """Returns `count` convolutions with norm and leaky ReLU, the first with the stride."""
    return Stage(
        [
            ConvNormAct(width if i else in_channels, width, size, 1 if i else stride, **options)
            for i in range(count)
        ]
    )


def make_decoder(
    classes: int,
    widths: Sequence[int],
    blocks: int | Sequence[int],
    sizes: Sequence[tuple[int, int, int]],
    strides: Sequence[tuple[int, int, int]],
    **options: Any,
) -> tuple[nnx.List, nnx.List, nnx.List]:
    """Returns upsampling, convolutions and heads of each decoder level, coarsest first.

    Args:
        classes: channels of the heads.
        widths: channels of each stage of the encoder, finest first; sizes and strides likewise.
        blocks: convolutions of each level, for all or coarsest first.
        sizes: of the kernels.
        strides: step into each stage.
        options: dtype and rngs of the layers.

    Raises:
        UserError: `blocks` has not one entry a level.
    """
    levels = range(len(widths) - 2, -1, -1)
    counts = [blocks] * len(levels) if isinstance(blocks, int) else list(blocks)
    if len(counts) != len(levels):
        raise UserError(
            f"model.decoder_blocks {counts}: expected one number, or {len(levels)}: one for each"
            " stage but the coarsest"
        )
    transposed, decoder, heads = [], [], []
    for level, count in zip(levels, counts, strict=True):
        width = widths[level]
        transposed.append(TransposedConv(widths[level + 1], width, strides[level + 1], **options))
        decoder.append(conv_stage(2 * width, width, count, sizes[level], **options))
        heads.append(Conv(width, classes, 1, **options))
    return nnx.List(transposed), nnx.List(decoder), nnx.List(heads)


def run_unet(
    model: Any, upsampling: nnx.List, x: Float[Array, "b x y z c"]
) -> Float[Array, "b x y z classes"] | list[Float[Array, "b _x _y _z classes"]]:
    """Runs the encoder, decoder and heads of a model.

    Args:
        model: has encoder (a list of stages, finest first), decoder and heads (coarsest first),
            deep_supervision and remat.
        upsampling: from each level to the next finer one, coarsest first.
        x: what the first stage takes.

    Returns:
        Logits, float32; with deep supervision those of all levels, finest first.
    """
    skips = []
    for stage in model.encoder:
        x = run_block(stage, x, remat=model.remat)
        skips.append(x)
    logits = []
    for level, (up, stage, head) in enumerate(
        zip(upsampling, model.decoder, model.heads, strict=True)
    ):
        # Side by side, as the first convolution takes them.
        x = run_block(stage, (up(x), skips[-2 - level]), remat=model.remat)
        if model.deep_supervision or level == len(model.heads) - 1:
            logits.append(head(x).astype(jnp.float32))
    return logits[::-1] if model.deep_supervision else logits[-1]


def check_divides(shape: Sequence[int], divisor: Sequence[int]) -> None:
    """Raises a ValueError where an axis of a patch does not divide by the network's divisor."""
    if any(size % by for size, by in zip(shape, divisor, strict=True)):
        raise ValueError(
            f"input of shape {tuple(shape)}: each axis must divide by {tuple(divisor)}."
            " Choose another patch size, or fewer stages"
        )


def plan(
    preset: str | None,
    presets: dict[str, int],
    preset_blocks: Sequence[int],
    patch_size: Sequence[int] | None,
    stages: int | None,
    widths: Sequence[int] | None,
    blocks: Sequence[int] | None,
    strides: Sequence[int | tuple[int, int, int]] | None,
    kernels: Sequence[int | tuple[int, int, int]] | None,
) -> dict[str, Any]:
    """Returns widths, blocks, strides and kernels from what is given of a network's settings.

    Args:
        preset: one of `presets`, or None for widths and blocks as given.
        presets: name -> number of stages where neither stages nor a patch size is given.
        preset_blocks: blocks of a preset's first stages; further ones have as many as the last.
        patch_size: decides stages and strides as nnU-Net's planner does, see `planned_strides`.
        stages: number of stages, each of which halves all axes.
        widths: channels of each stage, finest first, instead of the preset's.
        blocks: blocks of each stage, instead of the preset's.
        strides: step into each stage. None for 1, 2, 2, ...
        kernels: size of each stage's convolutions. None for 3.

    Raises:
        UserError: settings that are unknown or do not go together.
    """
    if preset and preset not in presets:
        raise UserError(f"model.preset is {preset!r}. Expected one of {', '.join(presets)}")
    if patch_size is not None and strides is None:
        strides = planned_strides(patch_size)[:stages]
    if stages is None:
        given = next((part for part in (strides, widths, blocks) if part is not None), None)
        stages = presets.get(preset or "", 0) if given is None else len(given)
    if preset and widths is None:
        widths = [WIDTHS[min(i, len(WIDTHS) - 1)] for i in range(stages)]
    if preset and blocks is None:
        blocks = [preset_blocks[min(i, len(preset_blocks) - 1)] for i in range(stages)]
    if strides is None:
        strides = [1, *(2 for _ in range(stages - 1))]
    if kernels is None:
        kernels = [3] * stages
    parts = (widths or (), blocks or (), strides, kernels)
    if stages < 2 or any(len(part) != stages for part in parts):
        raise UserError(
            f"model.widths {widths}, model.blocks {blocks}, model.strides {strides}, model.kernels"
            f" {kernels}, model.stages {stages}: give a preset ({', '.join(presets)}), or as many"
            " blocks as widths, two at least"
        )
    if any(count < 1 for part in parts[:2] for count in part):
        raise UserError(f"model.widths {widths}, model.blocks {blocks}: expected numbers from 1")
    if any(size % 2 == 0 for kernel in kernels for size in triple(kernel)):
        raise UserError(f"model.kernels {kernels}: expected odd sizes, as 3 or (1, 3, 3)")
    return {
        "widths": tuple(widths or ()),
        "blocks": tuple(blocks or ()),
        "strides": tuple(triple(step) for step in strides),
        "kernels": tuple(triple(kernel) for kernel in kernels),
    }


def planned_strides(patch_size: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns the step into each stage that nnU-Net plans for a patch of one spacing.

    Source: get_pool_and_conv_props of nnU-Net's experiment planning.

    Raises:
        UserError: no axis can be halved, or the patch does not divide by the strides.
    """
    left = list(patch_size)
    strides = [(1, 1, 1)]
    while True:
        halved = [size >= 2 * MIN_EDGE for size in left]
        # The last axis alone is halved only where more than the least is left of it.
        if not any(halved) or (sum(halved) == 1 and left[halved.index(True)] < 3 * MIN_EDGE):
            break
        x, y, z = (2 if axis else 1 for axis in halved)
        strides.append((x, y, z))
        left = [-(-size // step) for size, step in zip(left, strides[-1], strict=True)]
    divisor = [math.prod(step[axis] for step in strides) for axis in range(3)]
    if len(strides) < 2 or any(n % d for n, d in zip(patch_size, divisor, strict=True)):
        raise UserError(
            f"model.patch_size {tuple(patch_size)}: each axis must divide by {tuple(divisor)}, and"
            f" one have at least {2 * MIN_EDGE} voxels. Choose another patch size, or set"
            " model.stages"
        )
    return strides


def torch_decoder_key(path: str) -> str:
    """Returns the key of a decoder's module: the decoder is the same in nnU-Net's networks."""
    part, _, rest = path.partition(".")
    if part == "decoder":
        return f"decoder.stages.{rest}".replace(".blocks.", ".convs.")
    return f"decoder.{'transpconvs' if part == 'transposed' else 'seg_layers'}.{rest}"


def torch_aliases(keys: Iterable[str]) -> dict[str, str]:
    """Returns the keys that repeat a weight: all_modules.* and the encoder within the decoder."""
    aliases: dict[str, str] = {}
    for key in keys:
        again = key.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
        copies = {key, again}
        if key.startswith("encoder."):
            copies |= {f"decoder.{copy}" for copy in copies}
        aliases |= dict.fromkeys(copies - {key}, key)
    return aliases


def torch_heads(parameters: Iterable[str]) -> set[str]:
    """Returns the parameters that depend on the number of classes."""
    return {name for name in parameters if name.startswith("heads.")}
