"""DiffTumor's sampler of early tumours in PyTorch: its layers and sizes, with random weights.

From what is published about it: a 3D VQ-GAN whose encoder and decoder are 4 times apart along each
axis, a video U-Net on latents of 8 channels, the cosine schedule in 4 ancestral steps, the nearest
entries of a codebook of 16,384, and a blurred mask to blend with. Volumes are [b, c, z, x, y]; the
first spatial axis is the one that the U-Net takes for time. `benchmarks.synthesis` times it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_CHANNELS, ENTRIES, TIMESTEPS = 8, 16_384, 4
WIDTH, MULTIPLIERS = 24, (1, 2, 4, 8)
HEADS, HEAD_WIDTH = 8, 32
BUCKETS, FARTHEST = 32, 32
# The middle of the range that its blending draws from, voxels.
BLUR = 2.0
# Rows of the distances to the codebook at a time: all at once would be 0.9 GB.
ROWS = 1024


class Residual(nn.Module):
    """A layer's result added to its input."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return x + self.layer(x, *others)


def replicating(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Module:
    return nn.Conv3d(channels, out, kernel, stride, 1, padding_mode="replicate")


def norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels, eps=1e-6)


def residual_block(channels: int) -> nn.Module:
    half = [norm(channels), nn.SiLU(inplace=True), replicating(channels, channels, 3)]
    other = [norm(channels), nn.SiLU(inplace=True), replicating(channels, channels, 3)]
    return Residual(nn.Sequential(*half, *other))


def doubling(channels: int, out: int) -> list[nn.Module]:
    return [nn.ReplicationPad3d(1), nn.ConvTranspose3d(channels, out, 4, 2, 3)]


def encoder() -> nn.Module:
    """Image [b, 1, z, x, y] -> latents [b, 8, z/4, x/4, y/4]."""
    return nn.Sequential(
        *(replicating(1, 16, 3), replicating(16, 32, 4, 2), residual_block(32)),
        *(replicating(32, 64, 4, 2), residual_block(64)),
        *(norm(64), nn.SiLU(inplace=True), nn.Conv3d(64, LATENT_CHANNELS, 1)),
    )


def decoder() -> nn.Module:
    """Latents [b, 8, z, x, y] -> image [b, 1, 4z, 4x, 4y]."""
    return nn.Sequential(
        *(nn.Conv3d(LATENT_CHANNELS, 64, 1), norm(64), nn.SiLU(inplace=True)),
        *(*doubling(64, 64), residual_block(64), residual_block(64)),
        *(*doubling(64, 32), residual_block(32), residual_block(32)),
        replicating(32, 1, 3),
    )


class ChannelNorm(nn.Module):
    """Normalises each voxel over its channels, with a gain."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.movedim(1, -1), self.gain.shape, self.gain)
        return y.movedim(-1, 1)


class Block(nn.Module):
    """Two in-plane convolutions; the time's embedding scales and shifts between."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(4 * WIDTH, 2 * out))
        self.conv1 = nn.Conv3d(channels, out, (1, 3, 3), padding=(0, 1, 1))
        self.norm1 = nn.GroupNorm(8, out)
        self.conv2 = nn.Conv3d(out, out, (1, 3, 3), padding=(0, 1, 1))
        self.norm2 = nn.GroupNorm(8, out)
        self.skip = nn.Identity() if channels == out else nn.Conv3d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[..., None, None, None].chunk(2, 1)
        y = F.silu(self.norm1(self.conv1(x)) * (1 + scale) + shift)
        return F.silu(self.norm2(self.conv2(y))) + self.skip(x)


class Head(nn.Module):
    """A block that is not told the time, with one convolution of each kind: the last layers."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, out, (1, 3, 3), padding=(0, 1, 1))
        self.norm1 = nn.GroupNorm(8, out)
        self.conv2 = nn.Conv3d(out, out, (1, 3, 3), padding=(0, 1, 1))
        self.norm2 = nn.GroupNorm(8, out)
        self.skip = nn.Conv3d(channels, out, 1)
        self.out = nn.Conv3d(out, LATENT_CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        return self.out(F.silu(self.norm2(self.conv2(y))) + self.skip(x))


class LinearAttention(nn.Module):
    """Attention in each plane that costs as much as there are voxels (Katharopoulos et al., 2020).

    Queries are softmaxed over their features and keys over voxels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Conv3d(channels, 3 * HEADS * HEAD_WIDTH, 1, bias=False)
        self.out = nn.Conv3d(HEADS * HEAD_WIDTH, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, nz, nx, ny = x.shape
        tokens = self.qkv(self.norm(x)).view(b, 3, HEADS, HEAD_WIDTH, nz, nx * ny)
        q, k, v = tokens.permute(1, 0, 4, 2, 3, 5)  # each [b, z, head, feature, voxel]
        q, k = q.softmax(-2) * HEAD_WIDTH**-0.5, k.softmax(-1)
        mixed = (v @ k.transpose(-1, -2)) @ q
        return self.out(mixed.permute(0, 2, 3, 1, 4).reshape(b, -1, nz, nx, ny))


class Attention(nn.Module):
    """Softmax attention along the first axis (`along`), or in each plane.

    Along the axis positions are told by rotation, and by a bias that the network has once.
    """

    def __init__(self, channels: int, along: bool):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Linear(channels, 3 * HEADS * HEAD_WIDTH, bias=False)
        self.out = nn.Linear(HEADS * HEAD_WIDTH, channels, bias=False)
        self.along = along

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        b, c, nz, nx, ny = x.shape
        y = self.norm(x).permute(0, 3, 4, 2, 1) if self.along else self.norm(x).movedim(1, -1)
        y = y.reshape(-1, nz if self.along else nx * ny, c)
        q, k, v = self.qkv(y).view(*y.shape[:2], 3, HEADS, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        if self.along:
            q, k = rotated(q), rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = self.out(mixed.transpose(1, 2).flatten(2))
        if self.along:
            return y.view(b, nx, ny, nz, c).permute(0, 4, 3, 1, 2)
        return y.view(b, nz, nx, ny, c).movedim(-1, 1)


def rotated(x: Tensor) -> Tensor:
    """Rotates pairs of features by angles that grow with the position (Su et al., 2021)."""
    count, width = x.shape[-2:]
    frequencies = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(count)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class PositionBias(nn.Module):
    """A learned bias for each head and distance; far distances share one (Raffel et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(BUCKETS, HEADS)

    def forward(self, count: int) -> Tensor:
        distance = torch.arange(count)[None] - torch.arange(count)[:, None]
        half, exact = BUCKETS // 2, BUCKETS // 4
        size = distance.abs()
        logarithm = torch.log(size.clamp(min=1) / exact) / math.log(FARTHEST / exact)
        far = exact + (logarithm * (half - exact)).long()
        bucket = torch.where(size < exact, size, far.clamp(max=half - 1)) + half * (distance < 0)
        return self.table(bucket).permute(2, 0, 1)


class Time(nn.Module):
    """Sinusoids of the time step, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        wide = 4 * WIDTH
        self.layers = nn.Sequential(nn.Linear(WIDTH, wide), nn.GELU(), nn.Linear(wide, wide))

    def forward(self, time: Tensor) -> Tensor:
        half = WIDTH // 2
        angles = time[:, None] * 10_000 ** (-torch.arange(half) / (half - 1))
        return self.layers(torch.cat([angles.sin(), angles.cos()], -1))


class VideoUNet(nn.Module):
    """The denoiser: noisy latents, latents of the masked scan and the mask, 17 channels, to 8."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH * m for m in MULTIPLIERS]
        self.time, self.bias = Time(), PositionBias()
        channels = 2 * LATENT_CHANNELS + 1
        self.stem = nn.Conv3d(channels, WIDTH, (1, 7, 7), padding=(0, 3, 3))
        self.stem_attention = Residual(Attention(WIDTH, along=True))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        pairs = list(zip([WIDTH, *widths], widths, strict=False))
        for level, (before, width) in enumerate(pairs):
            self.down.append(self.level(before, width))
            last = level + 1 == len(pairs)
            shrink = nn.Conv3d(width, width, (1, 4, 4), (1, 2, 2), (0, 1, 1))
            self.down.append(nn.Identity() if last else shrink)
        deepest = widths[-1]
        self.middle = nn.ModuleList(
            [
                Block(deepest, deepest),
                Residual(Attention(deepest, along=False)),
                Residual(Attention(deepest, along=True)),
                Block(deepest, deepest),
            ]
        )
        for level, (before, width) in enumerate(reversed(pairs)):
            self.up.append(self.level(2 * width, before))
            last = level + 1 == len(pairs)
            grow = nn.ConvTranspose3d(before, before, (1, 4, 4), (1, 2, 2), (0, 1, 1))
            self.up.append(nn.Identity() if last else grow)
        self.head = Head(2 * WIDTH, WIDTH)

    @staticmethod
    def level(channels: int, out: int) -> nn.ModuleList:
        return nn.ModuleList(
            [
                Block(channels, out),
                Block(out, out),
                Residual(LinearAttention(out)),
                Residual(Attention(out, along=True)),
            ]
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time, bias = self.time(time), self.bias(x.shape[2])

        def run(level: nn.ModuleList, x: Tensor) -> Tensor:
            block, other, plane, axis = level
            return axis(plane(other(block(x, time), time)), bias)

        x = self.stem_attention(self.stem(x), bias)
        first, skips = x, []
        for level, shrink in zip(self.down[::2], self.down[1::2], strict=True):
            x = run(level, x)
            skips.append(x)
            x = shrink(x)
        block, plane, axis, other = self.middle
        x = other(axis(plane(block(x, time)), bias), time)
        for level, grow in zip(self.up[::2], self.up[1::2], strict=True):
            x = grow(run(level, torch.cat([x, skips.pop()], 1)))
        return self.head(torch.cat([x, first], 1))


class Sampler(nn.Module):
    """Image [b, 1, z, x, y] in [-1, 1] and mask (0 or 1) -> the image with a tumour there."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.denoiser, self.decoder = encoder(), VideoUNet(), decoder()
        self.codebook = nn.Parameter(torch.randn(ENTRIES, LATENT_CHANNELS), requires_grad=False)
        # The cosine schedule: what is left of the data's variance after each step.
        level = torch.linspace(0, 1, TIMESTEPS + 1, dtype=torch.float64)
        level = torch.cos((level + 0.008) / 1.008 * torch.pi / 2) ** 2
        taken = (1 - level[1:] / level[:-1]).clamp(max=0.9999)
        self.levels = torch.cumprod(1 - taken, 0).tolist()
        self.eval()

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        condition = self.encode(image, mask)
        latents = torch.randn_like(condition[:, :LATENT_CHANNELS])
        for step in reversed(range(TIMESTEPS)):
            latents = self.step(latents, condition, step)
        return self.blend(image, mask, self.decode(latents))

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """Returns the condition [b, 9, ...]: latents of the masked scan, and the mask in -1, 1."""
        masked = self.encoder(image * (1 - mask)).float()
        low, high = self.codebook.min(), self.codebook.max()
        coarse = F.interpolate(2 * mask - 1, masked.shape[2:])
        return torch.cat([2 * (masked - low) / (high - low) - 1, coarse], 1)

    def step(self, noisy: Tensor, condition: Tensor, step: int) -> Tensor:
        """Returns the latents after an ancestral step."""
        now, later = self.levels[step], self.levels[step - 1] if step else 1.0
        time = torch.full((noisy.shape[0],), float(step))
        noise = self.denoiser(torch.cat([noisy, condition], 1), time).float()
        data = ((noisy - math.sqrt(1 - now) * noise) / math.sqrt(now)).clamp(-1, 1)
        kept = now / later
        mean = math.sqrt(later) * (1 - kept) / (1 - now) * data
        mean = mean + math.sqrt(kept) * (1 - later) / (1 - now) * noisy
        deviation = math.sqrt((1 - kept) * (1 - later) / (1 - now))
        return mean + deviation * torch.randn_like(noisy) if step else mean

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the image of the codebook's entries that are nearest to the latents."""
        low, high = self.codebook.min(), self.codebook.max()
        return self.decoder(self.nearest((latents + 1) / 2 * (high - low) + low)).float()

    def nearest(self, latents: Tensor) -> Tensor:
        rows = latents.movedim(1, -1).reshape(-1, LATENT_CHANNELS)
        squares, weights = self.codebook.square().sum(1), -2 * self.codebook.T
        chosen = [torch.addmm(squares, part, weights).argmin(1) for part in rows.split(ROWS)]
        b, c, *shape = latents.shape
        return self.codebook[torch.cat(chosen)].view(b, *shape, c).movedim(-1, 1).contiguous()

    def blend(self, image: Tensor, mask: Tensor, drawn: Tensor) -> Tensor:
        """Mixes the drawn image into the given one, by the mask with its edge blurred."""
        reach = round(4 * BLUR)
        taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / BLUR) ** 2)
        weight = mask
        for axis in (2, 3, 4):
            shape = [1] * 5
            shape[axis] = -1
            padding = [reach if axis == a else 0 for a in (2, 3, 4)]
            weight = F.conv3d(weight, (taps / taps.sum()).view(shape), padding=padding)
        return image + weight * (drawn - image)
