"""Patch discriminators of slices and of crops, and the losses that they are trained with.

Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017
(PatchGAN); feature matching as in Wang et al., "pix2pixHD", CVPR 2018. Sizes are DiffTumor's. Norms
are over groups of channels of each sample: they need no running statistics, and a crop's score does
not depend on the others of its batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tumorjax import models
from tumorjax.models import layers
from tumorjax.models.layers import normal
from tumorjax.synthesis import even_convolution
from tumorjax.synthesis.autoencoder import part

_SLOPE = 0.2
_MOST_CHANNELS = 512
_GROUPS = 32
# Of the first weights, as in pix2pix.
_DEVIATION = 0.02


class PatchDiscriminator(nnx.Module):
    """Convolutions of size 4 with padding 2: `layers` with stride 2 that double channels, two more.

    Called with [b, x, y, z, 1], for dimensions 2 with z of size 1, it returns the activations of
    all layers; the last are the logits, one for each patch.
    """

    def __init__(
        self, dimensions: int, width: int, layers: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        widths = [min(width * 2**i, _MOST_CHANNELS) for i in range(layers + 1)]
        kwargs: dict[str, Any] = {"dimensions": dimensions, "dtype": dtype, "rngs": rngs}
        stages = [PatchLayer(1, widths[0], 2, norm=False, act=True, **kwargs)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            stages.append(
                PatchLayer(widths[i - 1], widths[i], stride, norm=True, act=True, **kwargs)
            )
        stages.append(PatchLayer(widths[-1], 1, 1, norm=False, act=False, **kwargs))
        self.stages = nnx.List(stages)

    def __call__(self, x: Float[Array, "b x y z 1"]) -> list[Float[Array, "b _x _y _z _c"]]:
        activations = []
        for stage in self.stages:
            x = stage(x)
            activations.append(x)
        return activations


class PatchLayer(nnx.Module):
    """Convolution of size 4 with padding 2, group norm and leaky ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        dimensions: int,
        norm: bool,
        act: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        size = (4,) * dimensions + (1,) * (3 - dimensions)
        shape = (*size, in_channels, out_channels)
        self.kernel = nnx.Param(normal(rngs.params(), shape, _DEVIATION))
        self.bias = nnx.Param(jnp.zeros(out_channels))
        groups = next(g for g in range(min(_GROUPS, out_channels), 0, -1) if not out_channels % g)
        self.norm = layers.GroupNorm(out_channels, groups) if norm else None
        self.act = act
        self.stride = stride
        self.dimensions = dimensions
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 d"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.dimensions == 2:
            y = jax.lax.conv_general_dilated(
                x[:, :, :, 0],
                kernel[:, :, 0],
                (self.stride, self.stride),
                [(2, 2), (2, 2)],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )[:, :, :, None]
        elif self.stride == 2:
            padded = even_convolution.pad(x, "zeros", 2)
            # A last voxel of an odd axis is in no output.
            nx, ny, nz = (size - size % 2 for size in padded.shape[1:4])
            y = even_convolution.halving(padded[:, :nx, :ny, :nz], kernel)
        else:
            y = even_convolution.convolution(even_convolution.pad(x, "zeros", 2), kernel)
        y = y + self.bias[...].astype(self.dtype)
        if self.norm is not None:
            y = self.norm(y)
        return jnp.where(y >= 0, y, _SLOPE * y) if self.act else y.astype(jnp.float32)


def create(
    dimensions: int,
    *,
    width: int = 64,
    layers: int = 3,
    dtype: str | jnp.dtype = "float32",
    seed: int = 0,
) -> tuple[Callable[[dict[str, Array], Array], list[Array]], dict[str, Array]]:
    """Returns a discriminator's function, see `PatchDiscriminator`, and its first parameters.

    Args:
        dimensions: 3, or 2 for slices.
        width: channels of the first layer.
        layers: those with stride 2.
        dtype: of the convolutions' operands.
        seed: of the parameters.
    """
    module = PatchDiscriminator(
        dimensions, width, layers, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed)
    )
    return models.functional(module)


class Pair(NamedTuple):
    """A discriminator of slices and one of crops.

    Attributes:
        init: seed -> first parameters of both.
        of_generator: (parameters, key, image, decoded) -> what an autoencoder minimises:
            adversarial (less the mean logits for reconstructions) and matching (see
            `feature_matching`); key decides which slices are looked at.
        loss: (parameters, key, image, decoded) -> what the discriminators minimise.
    """

    init: Callable[[int], dict[str, Array]]
    of_generator: Callable[..., dict[str, Array]]
    loss: Callable[..., Array]


def create_pair(weights: Mapping[str, float], dtype: str) -> Pair:
    """Returns both discriminators.

    Args:
        weights: of "slices" and "crops" in all losses.
        dtype: of the convolutions' operands.
    """
    shapes = {"slices": 2, "crops": 3}
    functions: dict[str, Callable[[dict[str, Array], Array], list[Array]]] = {}

    def abstract() -> None:
        # Without drawing weights, which a training without discriminators has no use for.
        for name, dimensions in shapes.items():
            functions[name], _ = create(dimensions, dtype=dtype)

    jax.eval_shape(abstract)

    def init(seed: int) -> dict[str, Array]:
        parameters: dict[str, Array] = {}
        for name, dimensions in shapes.items():
            _, values = create(dimensions, dtype=dtype, seed=10 * seed + dimensions)
            parameters |= {f"{name}.{key}": value for key, value in values.items()}
        return parameters

    def activations(parameters, key, image, decoded):
        inputs = {
            "slices": [random_slices(key, x) for x in (image, decoded)],
            "crops": [image, decoded],
        }
        found = {}
        for name in shapes:
            own = part(parameters, f"{name}.")
            found[name] = [functions[name](own, x) for x in inputs[name]]
        return found

    def of_generator(parameters, key, image, decoded):
        found = activations(parameters, key, image, decoded)
        terms = {
            name: {"adversarial": -fake[-1].mean(), "matching": feature_matching(real, fake)}
            for name, (real, fake) in found.items()
        }
        return {
            term: sum(weights[name] * values[term] for name, values in terms.items())
            for term in ("adversarial", "matching")
        }

    def loss(parameters, key, image, decoded):
        found = activations(parameters, key, image, decoded)
        terms = [
            weights[name] * hinge_loss(real[-1], fake[-1]) for name, (real, fake) in found.items()
        ]
        return sum(terms[1:], start=terms[0])

    return Pair(init, of_generator, loss)


def hinge_loss(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns the discriminator's hinge loss of its logits for scans and for reconstructions."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def feature_matching(
    real: Sequence[Float[Array, "..."]], fake: Sequence[Float[Array, "..."]]
) -> Float[Array, ""]:
    """Returns how far a discriminator's activations for reconstructions are from those for scans.

    The mean absolute difference of each layer but the last, times 4 / number of such layers.
    """
    pairs = list(zip(real[:-1], fake[:-1], strict=True))
    differences = [jnp.abs(a - b).astype(jnp.float32).mean() for a, b in pairs]
    return 4 / len(pairs) * sum(differences[1:], start=differences[0])


def random_slices(key: Array, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y 1 c"]:
    """Returns one axial slice of each crop, drawn at random: the same ones for the same key."""
    z = jax.random.randint(key, (x.shape[0],), 0, x.shape[3])
    return jnp.take_along_axis(x, z[:, None, None, None, None], axis=3)
