"""The 3D autoencoder: a scan's crop to latents on a grid four times as coarse, and back.

Kind "kl" (default) has Gaussian latents; kind "vq" has those of a codebook (vector_quantization.py)
and with the preset "difftumor" the layers of DiffTumor's 3D VQ-GAN. Images are [b, x, y, z, 1] in
[-1, 1]; their sizes are multiples of 4.

With the norm "voxel" each voxel is normalised over its own channels. The decoder is then local: a
part of the latents with a margin of `decoder_margin` about it decodes to the same voxels as the
whole. With "group", DiffTumor's group norm, each voxel depends on the whole crop.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.models import layers
from tumorjax.models.layers import he_normal
from tumorjax.settings import plain
from tumorjax.synthesis import even_convolution
from tumorjax.training import checkpoints

FACTOR = 4
KINDS = ("kl", "vq")
NORMS = ("voxel", "group")
PADDINGS = ("zeros", "replicate")

# For crops of 32^3 on a CPU: no features at the image's own resolution, where there are eight times
# as many voxels, and in the decoder no 3^3 convolution at the latents', which adds to the margin.
SMALL: dict[str, Any] = {
    "kind": "kl",
    "widths": (32, 64),
    "latent_channels": 8,
    "encoder_blocks": (1, 1),
    "decoder_blocks": (2,),
    "norm": "voxel",
    "padding": "zeros",
}
# As published: widths 16, 32, 64; the decoder's two levels keep 64 and 32 channels.
DIFFTUMOR: dict[str, Any] = {
    "kind": "vq",
    "widths": (16, 32, 64),
    "decoder_widths": (64, 64, 32),
    "latent_channels": 8,
    "encoder_blocks": (1, 1),
    "decoder_blocks": (2, 2),
    "norm": "group",
    "padding": "replicate",
}
PRESETS = {"small": SMALL, "difftumor": DIFFTUMOR}

# Bounds of the latents' log variance: beyond them exp overflows, or a latent is free of noise.
_LOG_VARIANCE = (-30.0, 20.0)
_DIFFTUMOR_GROUPS = 32


class Settings(NamedTuple):
    """What an autoencoder is built from.

    Attributes:
        kind: "kl" or "vq".
        widths: channels of the encoder at the image's, half and a quarter of its resolution. With
            two, those at half and a quarter: the image's voxels are folded in blocks of 2^3 to
            channels, and the decoder's are unfolded at its end.
        decoder_widths: channels of the decoder at a quarter and after each doubling; None for the
            encoder's in reverse.
        latent_channels: of a latent.
        encoder_blocks: residual blocks at half and at a quarter of the resolution.
        decoder_blocks: residual blocks after each doubling.
        norm: "voxel" or "group".
        padding: of the convolutions, "zeros" or "replicate".
        dtype: of the convolutions; parameters are float32.
    """

    kind: str = "kl"
    widths: tuple[int, ...] = SMALL["widths"]
    decoder_widths: tuple[int, ...] | None = None
    latent_channels: int = 8
    encoder_blocks: tuple[int, ...] = (1, 1)
    decoder_blocks: tuple[int, ...] = (1, 1)
    norm: str = "voxel"
    padding: str = "zeros"
    dtype: str = "float32"


def check_settings(settings: Mapping[str, Any]) -> Settings:
    """Returns the settings with the preset's and the defaults for what is missing.

    Args:
        settings: those of `Settings`, and preset: "small" (default) or "difftumor".

    Raises:
        UserError: a setting is unknown or does not fit.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    preset = given.pop("preset", "small")
    if preset not in PRESETS:
        raise UserError(f"model.preset is {preset!r}. Expected {' or '.join(PRESETS)}")
    unknown = sorted(set(given) - set(Settings._fields))
    if unknown:
        raise UserError(
            f"the autoencoder has no setting {', '.join(unknown)}."
            f" Expected some of preset, {', '.join(Settings._fields)}"
        )
    values = Settings(**(PRESETS[preset] | given))
    for name, known in (("kind", KINDS), ("norm", NORMS), ("padding", PADDINGS)):
        if getattr(values, name) not in known:
            raise UserError(
                f"model.{name} is {getattr(values, name)!r}. Expected {' or '.join(known)}"
            )
    decoder_widths = values.decoder_widths or tuple(reversed(values.widths))
    count = len(values.widths) if len(values.widths) in (2, 3) else 3
    lists = {
        "widths": (values.widths, count, 1),
        "decoder_widths": (decoder_widths, count, 1),
        "latent_channels": ((values.latent_channels,), 1, 1),
        "encoder_blocks": (values.encoder_blocks, 2, 0),
        "decoder_blocks": (values.decoder_blocks, count - 1, 0),
    }
    for name, (numbers, count, least) in lists.items():
        if not _whole_numbers(numbers, count, least):
            raise UserError(
                f"model.{name} is {getattr(values, name)!r}. Expected {count} whole"
                f" number{'s' * (count > 1)} from {least}"
            )
    if values.norm == "group" and (
        uneven := [w for w in (*values.widths[-2:], *decoder_widths) if w % _DIFFTUMOR_GROUPS]
    ):
        raise UserError(
            f"model.norm 'group' has {_DIFFTUMOR_GROUPS} groups, and a width is {uneven[0]}."
            f" Choose multiples of {_DIFFTUMOR_GROUPS}, or the norm 'voxel'"
        )
    return values._replace(
        widths=tuple(values.widths),
        decoder_widths=tuple(decoder_widths),
        encoder_blocks=tuple(values.encoder_blocks),
        decoder_blocks=tuple(values.decoder_blocks),
    )


def _whole_numbers(values: Any, count: int, least: int) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values)
    )


class Autoencoder(NamedTuple):
    """An autoencoder as pure functions of its parameters.

    Attributes:
        encode: (parameters, x [b, x, y, z, 1]) -> what the encoder says of each latent,
            [b, x/4, y/4, z/4, c] for "vq", or twice the channels for "kl": mean and log variance.
        decode: (parameters, z [b, x, y, z, c]) -> image [b, 4x, 4y, 4z, 1], not clipped.
        parameters: first ones, by name; those of the decoder begin with "decoder.".
        settings: what it was built from.
    """

    encode: Callable[[dict[str, Array], Array], Array]
    decode: Callable[[dict[str, Array], Array], Array]
    parameters: dict[str, Array]
    settings: Settings


def create(*, seed: int = 0, **settings) -> Autoencoder:
    """Returns an autoencoder with first weights.

    Args:
        seed: of the weights.
        settings: see `check_settings`.

    Raises:
        UserError: a setting is unknown or does not fit.
    """
    values = check_settings(settings)
    rngs = nnx.Rngs(seed)
    encode, of_encoder = models.functional(Encoder(values, rngs=rngs))
    decode, of_decoder = models.functional(Decoder(values, rngs=rngs))
    parameters = {f"encoder.{name}": value for name, value in of_encoder.items()}
    parameters |= {f"decoder.{name}": value for name, value in of_decoder.items()}
    return Autoencoder(
        lambda given, x: encode(part(given, "encoder."), x),
        lambda given, z: decode(part(given, "decoder."), z),
        parameters,
        values,
    )


def settings_of(config: ConfigDict) -> Settings:
    """Returns the settings of a job's configuration.

    Args:
        config: with the section model: what `check_settings` takes; dtype may be "auto".

    Raises:
        UserError: a setting is unknown or does not fit.
    """
    settings = plain(config.model)
    settings["dtype"] = checkpoints.compute_dtype(settings.get("dtype") or "auto")
    return check_settings(settings)


def build(config: ConfigDict, seed: int = 0) -> Autoencoder:
    """Returns the autoencoder of a job's configuration, with first weights from the seed.

    Raises:
        UserError: a setting is unknown or does not fit.
    """
    return create(seed=seed, **settings_of(config)._asdict())


def part(parameters: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """Returns the parameters whose names begin with the prefix, under what follows it."""
    return {
        name.removeprefix(prefix): value
        for name, value in parameters.items()
        if name.startswith(prefix)
    }


def split_latent(
    encoded: Float[Array, "b x y z 2*c"],
) -> tuple[Float[Array, "b x y z c"], Float[Array, "b x y z c"]]:
    """Returns mean and log variance of the latents of kind "kl"."""
    mean, log_variance = jnp.split(encoded, 2, axis=-1)
    return mean, jnp.clip(log_variance, *_LOG_VARIANCE)


def decoder_margin(settings: Settings) -> int | None:
    """Returns how many latents about a part of them its decoding depends on, along each axis.

    None where each voxel depends on all: with group norm.
    """
    if settings.norm == "group":
        return None
    reach = 1  # of the last convolution
    for blocks in reversed(settings.decoder_blocks):
        # Each block has two convolutions of 3; a doubling looks one voxel beyond half the way.
        reach = (reach + 2 * blocks) // 2 + 1
    return reach


def _of_convolutions(settings: Settings, rngs: nnx.Rngs) -> dict[str, Any]:
    return {"padding": settings.padding, "dtype": jnp.dtype(settings.dtype), "rngs": rngs}


class Encoder(nnx.Module):
    """Image [b, x, y, z, 1] -> [b, x/4, y/4, z/4, c]."""

    def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
        kwargs = _of_convolutions(settings, rngs)
        widths = settings.widths
        self.folded = len(widths) == 2
        self.stem = Conv(8 if self.folded else 1, widths[0], **kwargs)
        levels: list[nnx.Module] = []
        for level, blocks in zip((-2, -1), settings.encoder_blocks, strict=True):
            if not (self.folded and level == -2):
                levels.append(Halving(widths[level - 1], widths[level], **kwargs))
            levels += [ResidualBlock(widths[level], settings.norm, **kwargs) for _ in range(blocks)]
        self.levels = nnx.List(levels)
        self.norm = _norm(settings.norm, widths[-1])
        outputs = settings.latent_channels * (2 if settings.kind == "kl" else 1)
        self.head = layers.Conv(widths[-1], outputs, 1, dtype=kwargs["dtype"], rngs=rngs)

    def __call__(self, x: Float[Array, "b x y z 1"]) -> Float[Array, "b x2 y2 z2 c"]:
        x = self.stem(even_convolution.fold(x) if self.folded else x)
        for level in self.levels:
            x = level(x)
        return self.head(jax.nn.silu(self.norm(x))).astype(jnp.float32)


class Decoder(nnx.Module):
    """Latents [b, x, y, z, c] -> image [b, 4x, 4y, 4z, 1]."""

    def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
        kwargs = _of_convolutions(settings, rngs)
        widths = settings.decoder_widths or tuple(reversed(settings.widths))
        self.stem = layers.Conv(
            settings.latent_channels, widths[0], 1, dtype=kwargs["dtype"], rngs=rngs
        )
        self.norm = _norm(settings.norm, widths[0])
        self.folded = len(widths) == 2
        levels: list[nnx.Module] = []
        for before, width, blocks in zip(
            widths[:-1], widths[1:], settings.decoder_blocks, strict=True
        ):
            levels.append(Doubling(before, width, **kwargs))
            levels += [ResidualBlock(width, settings.norm, **kwargs) for _ in range(blocks)]
        self.levels = nnx.List(levels)
        self.head = Conv(widths[-1], 8 if self.folded else 1, **kwargs)

    def __call__(self, z: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 1"]:
        x = jax.nn.silu(self.norm(self.stem(z)))
        for level in self.levels:
            x = level(x)
        x = self.head(x).astype(jnp.float32)
        return even_convolution.unfold(x) if self.folded else x


class ResidualBlock(nnx.Module):
    """Norm, SiLU and 3^3 convolution, twice, added to the input."""

    def __init__(self, channels: int, norm: str, *, padding: str, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = _norm(norm, channels)
        self.conv1 = Conv(channels, channels, padding=padding, dtype=dtype, rngs=rngs)
        self.norm2 = _norm(norm, channels)
        self.conv2 = Conv(channels, channels, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z c"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        return x + self.conv2(jax.nn.silu(self.norm2(y)))


class VoxelNorm(nnx.Module):
    """Normalises each voxel over its channels, in float32, with scale and bias."""

    def __init__(self, channels: int, *, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z c"]:
        y = x.astype(jnp.float32)
        centred = y - y.mean(-1, keepdims=True)
        gain = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (centred * gain * self.scale[...] + self.bias[...]).astype(x.dtype)


def _norm(kind: str, channels: int) -> nnx.Module:
    if kind == "voxel":
        return VoxelNorm(channels)
    return layers.GroupNorm(channels, _DIFFTUMOR_GROUPS, epsilon=1e-6)


class Conv(nnx.Module):
    """A 3^3 convolution, padded with zeros or with the border's voxels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        padding: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.conv = layers.Conv(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.padding = padding

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x y z d"]:
        if self.padding == "zeros":
            return self.conv(x)
        return self.conv(even_convolution.pad(x, self.padding))[:, 1:-1, 1:-1, 1:-1]


class Halving(nnx.Module):
    """A 4^3 convolution with stride 2 and padding 1, as PyTorch's Conv3d(c, d, 4, 2, 1)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        padding: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(he_normal(rngs.params(), (4, 4, 4, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))
        self.padding = padding
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 d"]:
        padded = even_convolution.pad(x.astype(self.dtype), self.padding)
        y = even_convolution.halving(padded, self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype)


class Doubling(nnx.Module):
    """A transposed 4^3 convolution, as PyTorch's ConvTranspose3d(c, d, 4, 2, 1).

    With the padding "replicate" the input is continued beyond its border, where PyTorch's has
    zeros; DiffTumor pads before and cuts after.
    """

    # PyTorch lays out such a kernel [in, out, ...].
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        padding: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        # Each output voxel sees 2^3 inputs, an eighth of the kernel.
        kernel = he_normal(rngs.params(), (4, 4, 4, in_channels, out_channels)) * 8**0.5
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(out_channels))
        self.padding = padding
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 d"]:
        padded = even_convolution.pad(x.astype(self.dtype), self.padding)
        y = even_convolution.doubling(padded, self.kernel[...].astype(self.dtype))
        return y + self.bias[...].astype(self.dtype)
