"""The 3D U-Net of Models Genesis, a backbone of the Universal Model and of SuPreM.

Source: Zhou et al., "Models Genesis", Medical Image Analysis 2021; the reference implementation is
UNet3D in the code of the Universal Model (ljwztc/CLIP-Driven-Universal-Model, model/Unet.py) and of
SuPreM (MrGiovanni/SuPreM, backbone/unet.py), whose names are kept, so that weights map one to one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tumorjax.errors import UserError
from tumorjax.models.layers import Conv, Fixed, TransposedConv, triple
from tumorjax.models.rematerialization import run_block
from tumorjax.models.unetr_blocks import check_patch

STATISTICS = ("batch", "sample", "running")
_LEAVES = {
    **{"kernel": "weight", "scale": "weight"},
    **{"mean": "running_mean", "variance": "running_var"},
}


class BatchNorm(nnx.Module):
    """Normalises each channel, in float32, with scale and bias.

    `mean` and `variance` are the running statistics of a checkpoint. Training leaves them as they
    are: a training step here is a pure function of trained parameters.

    Args:
        channels: of the input.
        statistics: "batch": of the batch at hand, over samples and voxels, in training and in
            prediction alike. This is what the reference's ContBatchNorm3d does in both its modes;
            it keeps running statistics, but never uses them. A sample's result depends on the
            others in its batch.
            "sample": of each sample by itself, the same as "batch" for one sample at a time, which
            is how the reference trains and predicts by default.
            "running": `mean` and `variance`, what PyTorch's BatchNorm3d does in eval mode. For
            fine-tuning with frozen statistics; with those of an untrained network, 0 and 1,
            nothing is normalised.
    """

    def __init__(self, channels: int, *, statistics: str, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = Fixed(jnp.zeros(channels))
        self.variance = Fixed(jnp.ones(channels))
        self.statistics = statistics
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z c"]:
        y = x.astype(jnp.float32)
        if self.statistics == "running":
            centred = y - jax.lax.stop_gradient(self.mean[...])
            variance = jax.lax.stop_gradient(self.variance[...])
        else:
            axes = (0, 1, 2, 3) if self.statistics == "batch" else (1, 2, 3)
            centred = y - y.mean(axis=axes, keepdims=True)
            variance = jnp.square(centred).mean(axis=axes, keepdims=True)
        gain = self.scale[...] * jax.lax.rsqrt(variance + self.epsilon)
        return (centred * gain + self.bias[...]).astype(x.dtype)


class LUConv(nnx.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        statistics: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.conv1 = Conv(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(out_channels, statistics=statistics)

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z d"]:
        return jax.nn.relu(self.bn1(self.conv1(x)))


class DownTransition(nnx.Module):
    """Two convolutions."""

    def __init__(self, in_channels: int, width: int, **options: Any):
        self.ops = nnx.List(
            [LUConv(in_channels, width, **options), LUConv(width, 2 * width, **options)]
        )

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z d"]:
        for op in self.ops:
            x = op(x)
        return x


class UpTransition(nnx.Module):
    """Doubles the resolution, joins the skip connection, two convolutions."""

    def __init__(self, channels: int, *, statistics: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        options: dict[str, Any] = {"statistics": statistics, "dtype": dtype, "rngs": rngs}
        half = channels // 2
        self.up_conv = TransposedConv(channels, channels, 2, dtype=dtype, rngs=rngs)
        self.ops = nnx.List(
            [LUConv(channels + half, half, **options), LUConv(half, half, **options)]
        )

    def __call__(
        self, x: Float[Array, "b x y z c"], skip: Float[Array, "b x2 y2 z2 d"]
    ) -> Float[Array, "b x2 y2 z2 d"]:
        x = jnp.concatenate([self.up_conv(x), skip], axis=-1)
        for op in self.ops:
            x = op(x)
        return x


class UNet3D(nnx.Module):
    """The U-Net without head: four levels, of which the coarsest is not pooled.

    Args:
        in_channels: channels of the input.
        width: half the channels at the finest level; 32 in the reference.
        statistics: of the batch norms, see `BatchNorm`.
        remat: recompute each level's activations in the backward pass instead of keeping them.
        dtype: of the convolutions' operands; parameters and norms are float32.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        width: int = 32,
        statistics: str = "batch",
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if statistics not in STATISTICS:
            raise UserError(
                f"model.statistics is {statistics!r}. Expected one of {', '.join(STATISTICS)}"
            )
        options: dict[str, Any] = {"statistics": statistics, "dtype": dtype, "rngs": rngs}
        self.down_tr64 = DownTransition(in_channels, width, **options)
        self.down_tr128 = DownTransition(2 * width, 2 * width, **options)
        self.down_tr256 = DownTransition(4 * width, 4 * width, **options)
        self.down_tr512 = DownTransition(8 * width, 8 * width, **options)
        self.up_tr256 = UpTransition(16 * width, **options)
        self.up_tr128 = UpTransition(8 * width, **options)
        self.up_tr64 = UpTransition(4 * width, **options)
        self.remat = remat
        # Each axis of an input must divide by this.
        self.divisor = triple(2**3)

    def features(
        self, x: Float[Array, "b x y z c"]
    ) -> tuple[Float[Array, "b x3 y3 z3 16w"], Float[Array, "b x y z 2w"]]:
        """Returns the coarsest features, 8 times coarser than x, and the finest.

        Raises:
            ValueError: an axis of x does not divide by 8.
        """
        check_patch(x.shape[1:4], self.divisor)
        skips = []
        for level in (self.down_tr64, self.down_tr128, self.down_tr256):
            skips.append(run_block(level, x, remat=self.remat))
            x = max_pool(skips[-1])
        coarsest = x = run_block(self.down_tr512, x, remat=self.remat)
        for up in (self.up_tr256, self.up_tr128, self.up_tr64):
            x = run_block(up, x, skips.pop(), remat=self.remat)
        return coarsest, x


def max_pool(x: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 c"]:
    """Largest values of blocks of 2^3 voxels; the gradient is the first largest one's."""
    # Not jnp.max: its gradient looks for voxels equal to the result, and where XLA computes x anew
    # for that, rounded otherwise, there is none, and 0 / 0.
    for axis in (1, 2, 3):
        first = jax.lax.slice_in_dim(x, 0, None, 2, axis)
        second = jax.lax.slice_in_dim(x, 1, None, 2, axis)
        x = jnp.where(first >= second, first, second)
    return x


def torch_names(parameters: Mapping[str, Array]) -> dict[str, str]:
    """Returns the name of each parameter in the state_dict of the reference's UNet3D."""
    keys = {}
    for name in parameters:
        path, leaf = name.rsplit(".", 1)
        keys[name] = f"{path}.{_LEAVES.get(leaf, leaf)}"
    return keys


def torch_buffers(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the batch norms' counts of training steps, which nothing uses."""
    return {
        ".".join([*map(str, path), "num_batches_tracked"]): np.asarray(0, np.int64)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, BatchNorm)
    }
