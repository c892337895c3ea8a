"""The Universal Model: a head that is told by text which class to segment.

Source: Liu et al., "CLIP-Driven Universal Model for Organ Segmentation and Tumor Detection", ICCV
2023; the reference implementation is Universal_model in ljwztc/CLIP-Driven-Universal-Model, whose
names are kept, so that weights map one to one.

For each class a controller turns the pooled coarsest features and the class's embedding into the
weights of three 1x1 convolutions (8, 8 and 1 channels), which give that class's output from the
finest features.

The original has one output per class, each with a sigmoid of its own, and none for background.
Here those outputs are the logits of classes 1, 2, ..., as they are, and background's logit is 0.
So argmax is background exactly where no class's sigmoid is over 0.5, and else the likeliest class;
with one class softmax is the sigmoid.
"""

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.errors import UserError
from tumorjax.models import swin_unetr, unet3d
from tumorjax.models.layers import Conv, Fixed, GroupNorm, normal
from tumorjax.models.rematerialization import run_block
from tumorjax.models.transformer import Dense
from tumorjax.models.unetr_blocks import refuse_deep_supervision

# For crops of 32^3 on a CPU.
SMALL = {"width": 8}
SETTINGS = (
    *("classes", "in_channels", "backbone", "encoding", "embeddings", "class_names", "width"),
    *("statistics", "feature_size", "depths", "merging", "deep_supervision", "remat", "dtype"),
    "seed",
)
BACKBONES = ("unet", "swin_unetr")
ENCODINGS = ("text", "learned")
CONTEXT = 256  # channels of the pooled features and of a class's encoding
TEXT = 512  # length of CLIP's text embeddings
DYNAMIC = 8  # channels of the dynamic convolutions
GROUPS = 16  # of the group norms, as far as channels divide


class Head(nnx.Module):
    """Dynamic convolutions, one set for each sample and class.

    Args:
        coarse: channels of the coarsest features.
        fine: channels of the finest features.
        table: an embedding for each class, [classes, TEXT], which stays as it is; None for a
            trained one.
        classes: without background.
        dtype: of the operands.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        coarse: int,
        fine: int,
        table: np.ndarray | None,
        classes: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.precls_norm = GroupNorm(fine, math.gcd(GROUPS, fine))
        self.precls_conv = Conv(fine, DYNAMIC, 1, **options)
        self.gap_norm = GroupNorm(coarse, math.gcd(GROUPS, coarse))
        self.gap_conv = Conv(coarse, CONTEXT, 1, **options)
        count = sum(i * o + o for i, o in _DYNAMIC_SHAPES)
        self.controller = Conv(2 * CONTEXT, count, 1, **options)
        self.organ_embedding: nnx.Variable = (
            nnx.Param(normal(rngs.params(), (classes, CONTEXT), 1.0))
            if table is None
            else Fixed(jnp.asarray(table, jnp.float32))
        )
        self.text_to_vision = nnx.data(
            None if table is None else Dense(table.shape[1], CONTEXT, **options)
        )
        self.dtype = dtype

    def __call__(
        self, coarsest: Float[Array, "b i j k f"], finest: Float[Array, "b x y z e"]
    ) -> Float[Array, "b x y z classes"]:
        """Returns each class's own output, without background."""
        pooled = jax.nn.relu(self.gap_norm(coarsest)).astype(jnp.float32)
        pooled = self.gap_conv(pooled.mean(axis=(1, 2, 3), keepdims=True))[:, 0, 0]
        encoding = self.organ_embedding[...]
        if self.text_to_vision is not None:
            encoding = jax.nn.relu(self.text_to_vision(jax.lax.stop_gradient(encoding)))
        shape = (pooled.shape[0], encoding.shape[0], CONTEXT)
        context = jnp.concatenate(
            [jnp.broadcast_to(pooled, shape), jnp.broadcast_to(encoding, shape)], axis=-1
        )
        # Controller and pooling are 1x1x1 convolutions in the reference: [b, class, 1, 1, c].
        parameters = self.controller(context[:, :, None, None])[:, :, 0, 0]
        weights, biases = _split(parameters)
        y = self.precls_conv(jax.nn.relu(self.precls_norm(finest)))
        # [b, 1 or class, voxel, channel]: a batch of matrix products over samples and classes.
        y = y.reshape(y.shape[0], 1, -1, DYNAMIC)
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            y = jnp.matmul(y, jnp.swapaxes(weight, -1, -2).astype(self.dtype))
            y = y + bias[:, :, None].astype(self.dtype)
            if layer < len(weights) - 1:
                y = jax.nn.relu(y)
        return jnp.moveaxis(y[..., 0], 1, -1).reshape(*finest.shape[:4], -1).astype(jnp.float32)


_DYNAMIC_SHAPES = ((DYNAMIC, DYNAMIC), (DYNAMIC, DYNAMIC), (DYNAMIC, 1))


def _split(parameters: Float[Array, "b k n"]) -> tuple[list[Array], list[Array]]:
    """Cuts the controller's output into weights [b, k, out, in], first, and biases [b, k, out]."""
    sizes = [i * o for i, o in _DYNAMIC_SHAPES] + [o for _, o in _DYNAMIC_SHAPES]
    parts = jnp.split(parameters, np.cumsum(sizes)[:-1].tolist(), axis=-1)
    layers = len(_DYNAMIC_SHAPES)
    weights = [
        part.reshape(*part.shape[:2], o, i)
        for part, (i, o) in zip(parts[:layers], _DYNAMIC_SHAPES, strict=True)
    ]
    return weights, parts[layers:]


class Universal(nnx.Module):
    """A backbone and the text-driven head.

    Args:
        backbone: has `features(x) -> (coarsest, finest)` and `divisor`.
        head: see `Head`.
        remat: recompute the head's activations in the backward pass instead of keeping them.
    """

    def __init__(
        self, backbone: unet3d.UNet3D | swin_unetr.SwinUNETR, head: Head, *, remat: bool = False
    ):
        self.backbone = backbone
        self.head = head
        self.remat = remat
        # Each axis of an input must divide by this.
        self.divisor = backbone.divisor

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z classes"]:
        """Returns logits: 0 for background, and the reference's outputs for the classes.

        Raises:
            ValueError: an axis of x does not divide by the backbone's divisor.
        """
        outputs = run_block(self.head, *self.backbone.features(x), remat=self.remat)
        return jnp.pad(outputs, ((0, 0),) * 4 + ((1, 0),))


def create(
    *,
    classes: int,
    in_channels: int = 1,
    backbone: str = "unet",
    encoding: str = "text",
    embeddings: str | None = None,
    class_names: Sequence[str] | None = None,
    width: int = 32,
    statistics: str = "batch",
    feature_size: int = 48,
    depths: Sequence[int] = (2, 2, 2, 2),
    merging: str = "merging_repeated",
    deep_supervision: bool = False,
    remat: bool = False,
    dtype: jnp.dtype = jnp.float32,
    seed: int = 0,
) -> Universal:
    """Returns the network with initial weights from `seed`.

    Args:
        classes: number of output classes, background counted.
        in_channels: channels of the input.
        backbone: "unet" (the U-Net of Models Genesis) or "swin_unetr" (version 1).
        encoding: "text" (the reference's word_embedding: a fixed table of text embeddings) or
            "learned" (its rand_embedding: a trained table).
        embeddings: file with the text embeddings, see `read_embeddings`. None for a fixed random
            table, the same for all seeds.
        class_names: of the classes without background, in their order; looked up in the file.
            None where the file has just these classes in this order.
        width, statistics: of the U-Net, see `unet3d.UNet3D`.
        feature_size, depths, merging: of Swin UNETR, see `swin_unetr.build`; the reference's code
            has the order of patch merging that repeats voxels.
        deep_supervision: must be False.
        remat: recompute activations in the backward pass instead of keeping them.
        dtype: of the operands of convolutions and matrix products; parameters, norms and logits
            are float32.
        seed: of the initial weights.

    Raises:
        UserError: a setting does not fit, or the file of embeddings is not as expected.
    """
    refuse_deep_supervision("universal", deep_supervision)
    for name, value, known in (
        ("backbone", backbone, BACKBONES),
        ("encoding", encoding, ENCODINGS),
    ):
        if value not in known:
            raise UserError(f"model.{name} is {value!r}. Expected one of {', '.join(known)}")
    if classes < 2:
        raise UserError(
            f"model universal: {classes} class. Expected background and at least one other"
        )
    if embeddings and encoding != "text":
        raise UserError(
            "model.embeddings is for the encoding text, and model.encoding is learned. Leave one of"
            " them out"
        )
    table = None
    if encoding == "text":
        table = (
            read_embeddings(embeddings, classes - 1, class_names)
            if embeddings
            else random_embeddings(classes - 1)
        )
    options: dict[str, Any] = {"dtype": dtype, "rngs": nnx.Rngs(seed)}
    body: unet3d.UNet3D | swin_unetr.SwinUNETR
    if backbone == "unet":
        body = unet3d.UNet3D(
            in_channels, width=width, statistics=statistics, remat=remat, **options
        )
        coarse, fine = 16 * width, 2 * width
    else:
        body = swin_unetr.build(
            "universal",
            in_channels,
            None,
            False,
            feature_size=feature_size,
            version=1,
            depths=depths,
            merging=merging,
            remat=remat,
            **options,
        )
        coarse, fine = 16 * feature_size, feature_size
    head = Head(coarse, fine, table, classes - 1, **options)
    return Universal(body, head, remat=remat)


def read_embeddings(
    path: str, classes: int, class_names: Sequence[str] | None = None
) -> Float[np.ndarray, "classes n"]:
    """Reads a table of class embeddings.

    Args:
        path: .npz with one vector per class under its name, or .json with an object of lists.
        classes: how many, without background.
        class_names: those wanted, in their order; None for all in the file's order.

    Raises:
        UserError: the file is not readable, a class is not in it, or the vectors are not finite
            numbers of one length.
    """
    try:
        if Path(path).suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                vectors = {name: file[name] for name in file.files}
        else:
            vectors = json.loads(Path(path).read_text())
        vectors = {str(name): np.asarray(v, np.float32) for name, v in vectors.items()}
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not readable as class embeddings ({error}). Expected .npz or .json with a"
            " vector of numbers for each class name"
        ) from error
    names = list(vectors if class_names is None else class_names)
    missing = [name for name in names if name not in vectors]
    if missing or len(names) != classes:
        raise UserError(
            f"{path} has embeddings of {', '.join(vectors)}. Expected"
            f" {', '.join(names) if class_names else 'some'} for {classes} classes"
            f"{'; missing: ' + ', '.join(missing) if missing else ''}. Add them, or set"
            " model.class_names"
        )
    shapes = {vectors[name].shape for name in names}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise UserError(f"{path}: vectors of shapes {sorted(shapes)}. Expected one length for all")
    table = np.stack([vectors[name] for name in names])
    if not np.isfinite(table).all():
        raise UserError(f"{path}: values that are not finite numbers. Make the embeddings anew")
    return table


def random_embeddings(classes: int) -> Float[np.ndarray, "classes n"]:
    """Returns a normal vector for each class: always the same, however many classes there are."""
    return np.stack(
        [np.random.default_rng([TEXT, i]).standard_normal(TEXT, np.float32) for i in range(classes)]
    )


_HEAD_KEYS = {
    **{"precls_norm": "precls_conv.0", "precls_conv": "precls_conv.2"},
    **{"gap_norm": "GAP.0", "gap_conv": "GAP.3"},
}


def torch_names(parameters: Mapping[str, Array]) -> dict[str, str]:
    """Returns the name of each parameter in the state_dict of the reference."""
    prefix = "backbone."
    inner = {n.removeprefix(prefix): v for n, v in parameters.items() if n.startswith(prefix)}
    backbone = unet3d if any(name.startswith("down_tr64.") for name in inner) else swin_unetr
    keys = {prefix + name: prefix + key for name, key in backbone.torch_names(inner).items()}
    text = "head.text_to_vision.kernel" in parameters
    for name in parameters:
        if name == "head.organ_embedding":
            keys[name] = "organ_embedding" if text else "organ_embedding.weight"
        elif name.startswith("head."):
            _, layer, leaf = name.split(".")
            leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
            keys[name] = f"{_HEAD_KEYS.get(layer, layer)}.{leaf}"
    return keys


def torch_heads(parameters: Mapping[str, Array]) -> set[str]:
    """Returns the table of embeddings: all else is the same for any number of classes."""
    return {name for name in parameters if name == "head.organ_embedding"}


def torch_buffers(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns what the backbone's state_dict holds besides weights."""
    assert isinstance(model, Universal)
    module = unet3d if isinstance(model.backbone, unet3d.UNet3D) else swin_unetr
    buffers = module.torch_buffers(model.backbone)
    return {f"backbone.{key}": value for key, value in buffers.items()}
