"""The peer of benchmarks.synthesis has DiffTumor's layers: shapes and parameters, counted anew."""

import importlib
import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peer = importlib.import_module("benchmarks.difftumor_sampler")


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def convolution(taps: int, channels: int, out: int) -> int:
    return taps * channels * out + out


def norm(channels: int) -> int:
    return 2 * channels


def residual_block(channels: int) -> int:
    return 2 * (norm(channels) + convolution(27, channels, channels))


def test_encoder_has_the_parameters_of_its_layers():
    expected = convolution(27, 1, 16)
    for before, width in ((16, 32), (32, 64)):
        expected += convolution(64, before, width) + residual_block(width)
    expected += norm(64) + convolution(1, 64, 8)
    assert count(peer.encoder()) == expected


def test_decoder_has_the_parameters_of_its_layers():
    expected = convolution(1, 8, 64) + norm(64)
    for before, width in ((64, 64), (64, 32)):
        expected += convolution(64, before, width) + 2 * residual_block(width)
    expected += convolution(27, 32, 1)
    assert count(peer.decoder()) == expected


def test_denoiser_has_the_parameters_of_its_layers():
    inner, wide = 8 * 32, 96

    def block(before: int, width: int) -> int:
        layers = convolution(9, before, width) + convolution(9, width, width) + 2 * norm(width)
        skip = 0 if before == width else convolution(1, before, width)
        return layers + skip + convolution(1, wide, 2 * width)

    def attention(width: int) -> int:
        return width + 3 * width * inner + inner * width

    def level(before: int, width: int) -> int:
        linear = attention(width) + width  # its last layer has a bias
        return block(before, width) + block(width, width) + linear + attention(width)

    widths = [24, 24, 48, 96, 192]
    pairs = list(itertools.pairwise(widths))
    expected = convolution(49, 17, 24) + attention(24)
    expected += convolution(1, 24, wide) + convolution(1, wide, wide)  # of the time
    expected += 32 * 8  # of the relative positions
    expected += sum(level(before, width) for before, width in pairs)
    expected += sum(convolution(16, width, width) for _, width in pairs[:-1])
    expected += 2 * block(192, 192) + 2 * attention(192)
    expected += sum(level(2 * width, before) for before, width in pairs)
    expected += sum(convolution(16, before, before) for before, _ in pairs[1:])
    head = convolution(9, 48, 24) + convolution(9, 24, 24) + 2 * norm(24) + convolution(1, 48, 24)
    expected += head + convolution(1, 24, 8)
    assert count(peer.VideoUNet()) == expected


def test_shapes_from_image_to_tumour(rng):
    size = 32
    image = torch.from_numpy(rng.uniform(-1, 1, (1, 1, size, size, size)).astype(np.float32))
    mask = torch.from_numpy((rng.random(image.shape) < 0.2).astype(np.float32))
    sampler = peer.Sampler()
    with torch.inference_mode():
        condition = sampler.encode(image, mask)
        assert condition.shape == (1, 9, 8, 8, 8)
        assert set(condition[:, 8].unique().tolist()) == {-1.0, 1.0}
        noisy = torch.randn(1, 8, 8, 8, 8)
        noise = sampler.denoiser(torch.cat([noisy, condition], 1), torch.ones(1))
        assert noise.shape == (1, 8, 8, 8, 8)
        assert sampler(image, mask).shape == image.shape


def test_attention_along_the_axis_sees_no_other_column(rng):
    x = torch.from_numpy(rng.standard_normal((1, 16, 4, 5, 6)).astype(np.float32))
    other = x.clone()
    other[..., 2, 3] += torch.from_numpy(rng.standard_normal((16, 4)).astype(np.float32))
    layer = peer.Attention(16, along=True)
    with torch.inference_mode():
        changed = (layer(other) - layer(x)).abs().amax((0, 1, 2)) > 1e-6
    assert changed.nonzero().tolist() == [[2, 3]]


def test_attention_along_the_axis_tells_distances_but_not_positions():
    """Rotated queries and keys: their products depend on the difference of positions alone."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 32)
    rows = peer.rotated(q.expand(9, 32)) @ peer.rotated(k.expand(9, 32)).T
    for distance in range(-8, 9):
        diagonal = rows.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert rows[0].std() > 0.1


def test_schedule_ends_in_noise_and_begins_with_data():
    levels = peer.Sampler().levels
    cosines = [math.cos((i / 4 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(5)]
    np.testing.assert_allclose(levels[:3], [c / cosines[0] for c in cosines[1:4]], rtol=1e-12)
    assert levels[3] == pytest.approx(levels[2] * 1e-4)


def test_last_ancestral_step_gives_the_data_that_the_denoiser_stands_for(monkeypatch):
    sampler = peer.Sampler()
    data, noise = torch.rand(1, 8, 8, 8, 8) * 2 - 1, torch.randn(1, 8, 8, 8, 8)
    level = sampler.levels[0]
    noisy = math.sqrt(level) * data + math.sqrt(1 - level) * noise
    monkeypatch.setattr(sampler, "denoiser", torch.nn.Identity())
    sampler.denoiser.forward = lambda x, time: noise
    with torch.inference_mode():
        found = sampler.step(noisy, torch.zeros(1, 9, 8, 8, 8), 0)
    torch.testing.assert_close(found, data, atol=1e-5, rtol=0)


def test_nearest_entries_are_those_of_the_full_search():
    sampler = peer.Sampler()
    latents = torch.randn(1, 8, 4, 5, 6)
    with torch.inference_mode():
        rows = latents.movedim(1, -1).reshape(-1, 8)
        expected = sampler.codebook[torch.cdist(rows.double(), sampler.codebook.double()).argmin(1)]
        found = sampler.nearest(latents).movedim(1, -1).reshape(-1, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_blending_keeps_what_is_far_from_the_mask_and_replaces_what_is_deep_in_it():
    sampler = peer.Sampler()
    image, drawn = torch.randn(2, 1, 1, 40, 40, 40)
    mask = torch.zeros(1, 1, 40, 40, 40)
    mask[..., 4:25, 4:25, 4:25] = 1
    blended = sampler.blend(image, mask, drawn)
    # The blur reaches 8 voxels: to 32 on the outside, and not to 14 on the inside.
    assert torch.equal(blended[..., 33:], image[..., 33:])
    assert not torch.equal(blended[..., 30, 14, 14], image[..., 30, 14, 14])
    torch.testing.assert_close(blended[..., 14, 14, 14], drawn[..., 14, 14, 14], atol=1e-5, rtol=0)


def test_it_has_as_many_parameters_as_the_networks_that_the_project_calls_difftumors():
    from tumorjax.synthesis import autoencoder, denoisers

    model = autoencoder.create(preset="difftumor")
    for name, network in (("encoder", peer.encoder()), ("decoder", peer.decoder())):
        sizes = [v.size for k, v in model.parameters.items() if k.startswith(f"{name}.")]
        assert sum(sizes) == count(network)
    settings = {"name": "video_unet", "preset": "difftumor"}
    _, shapes = denoisers.abstract(settings, latent_channels=8, organs=1)
    assert sum(math.prod(shape.shape) for shape in shapes.values()) == count(peer.VideoUNet())
