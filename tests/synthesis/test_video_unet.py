"""DiffTumor's denoiser against the same layers of PyTorch with the same weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax import models
from tumorjax.errors import UserError
from tumorjax.synthesis import video_unet
from tumorjax.synthesis.latent_unet import Inputs

torch = pytest.importorskip("torch")
F = torch.nn.functional


def _inputs(rng, channels=4, latent=(8, 8, 6), rows=2):
    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return Inputs(
        noisy=draw(rows, *latent, channels),
        time=np.asarray([3.0, 170.0], np.float32)[:rows],
        latent=draw(rows, *latent, channels),
        mask=(draw(rows, *(4 * n for n in latent)) > 0).astype(np.float32),
        organ=np.asarray([0, 1], np.int32)[:rows],
        radius_mm=np.asarray([4.0, 20.0], np.float32)[:rows],
        known=np.asarray([True, True])[:rows],
    )


class _Torch:
    """The published layers as functions of a dictionary of our weights. Arrays [b, c, z, x, y]."""

    def __init__(self, parameters, heads, head_width):
        self.weights = {k: torch.from_numpy(np.array(v)) for k, v in parameters.items()}
        self.heads, self.head_width = heads, head_width

    def conv(self, name, x, padding=0):
        kernel = self.weights[f"{name}.kernel"].permute(4, 3, 0, 1, 2)
        return F.conv3d(x, kernel, self.weights[f"{name}.bias"], padding=padding)

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.kernel"].T, self.weights.get(f"{name}.bias"))

    def group_norm(self, name, x):
        return F.group_norm(x, 8, self.weights[f"{name}.scale"], self.weights[f"{name}.bias"])

    def block(self, name, x, vector):
        y = self.group_norm(f"{name}.norm1", self.conv(f"{name}.conv1", x, (0, 1, 1)))
        if vector is not None:
            scale, shift = self.linear(f"{name}.modulate", F.silu(vector)).chunk(2, dim=1)
            y = y * (scale[:, :, None, None, None] + 1) + shift[:, :, None, None, None]
        y = self.conv(f"{name}.conv2", F.silu(y), (0, 1, 1))
        y = F.silu(self.group_norm(f"{name}.norm2", y))
        skip = f"{name}.skip.kernel" in self.weights
        return y + (self.conv(f"{name}.skip", x) if skip else x)

    def normed(self, name, x, function):
        variance = torch.var(x, dim=1, unbiased=False, keepdim=True)
        y = (x - x.mean(dim=1, keepdim=True)) / (variance + 1e-5).sqrt()
        return x + function(
            f"{name}.module", y * self.weights[f"{name}.scale"].view(1, -1, 1, 1, 1)
        )

    def split(self, name, tokens):
        """[..., n, c] -> three of [..., heads, n, d]."""
        parts = self.linear(f"{name}.queries", tokens).chunk(3, dim=-1)
        return [p.unflatten(-1, (self.heads, self.head_width)).transpose(-2, -3) for p in parts]

    def attention(self, name, tokens, bias=None, rotary=False):
        q, k, v = self.split(name, tokens)
        if rotary:
            q, k = _rotate(q), _rotate(k)
        mask = None if bias is None else bias[None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.linear(f"{name}.out", y.transpose(-2, -3).flatten(-2))

    def axis(self, name, x, bias):
        b, c, z, h, w = x.shape
        tokens = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, z, c)
        y = self.attention(name, tokens, bias, rotary=True)
        return y.reshape(b, h, w, z, c).permute(0, 4, 3, 1, 2)

    def plane(self, name, x, linear):
        b, c, z, h, w = x.shape
        tokens = x.permute(0, 2, 3, 4, 1).reshape(b * z, h * w, c)
        if linear:
            q, k, v = self.split(name, tokens)
            q = q.softmax(dim=-1) / math.sqrt(self.head_width)
            context = torch.einsum("bhnd,bhne->bhde", k.softmax(dim=-2), v)
            y = torch.einsum("bhnd,bhde->bhne", q, context).transpose(1, 2).flatten(-2)
            y = self.linear(f"{name}.out", y)
        else:
            y = self.attention(name, tokens)
        return y.reshape(b, z, h, w, c).permute(0, 4, 1, 2, 3)

    def level(self, name, x, vector, bias):
        x = self.block(f"{name}.block2", self.block(f"{name}.block1", x, vector), vector)
        x = self.normed(f"{name}.plane", x, lambda n, y: self.plane(n, y, True))
        return self.normed(f"{name}.axis", x, lambda n, y: self.axis(n, y, bias))

    def __call__(self, inputs, levels):
        given = [torch.from_numpy(np.array(v)) for v in inputs]
        noisy, time, latent, mask = given[:4]
        grid = F.interpolate(2 * mask[:, None] - 1, size=tuple(noisy.shape[1:4]))
        parts = [noisy.permute(0, 4, 1, 2, 3), latent.permute(0, 4, 1, 2, 3), grid]
        x = torch.cat(parts, dim=1).permute(0, 1, 4, 2, 3)
        x = stem = self.conv("stem", x, (0, 3, 3))
        width = x.shape[1]
        rate = torch.exp(torch.arange(width // 2) * -(math.log(10000) / (width // 2 - 1)))
        angles = time[:, None] * rate[None]
        vector = self.linear("time_in", torch.cat([angles.sin(), angles.cos()], dim=-1))
        vector = self.linear("time_out", F.gelu(vector))
        bias = self.weights["position_bias"][_buckets(x.shape[2])].permute(2, 0, 1)
        x = self.normed("stem_attention", x, lambda n, y: self.axis(n, y, bias))
        skips = []
        for index in range(levels):
            x = self.level(f"down.{index}", x, vector, bias)
            skips.append(x)
            if index < levels - 1:
                name = f"down.{index}.change"
                kernel = self.weights[f"{name}.kernel"].permute(3, 2, 0, 1)[:, :, None]
                x = F.conv3d(x, kernel, self.weights[f"{name}.bias"], (1, 2, 2), (0, 1, 1))
        x = self.block("middle1", x, vector)
        x = self.normed("middle_plane", x, lambda n, y: self.plane(n, y, False))
        x = self.normed("middle_axis", x, lambda n, y: self.axis(n, y, bias))
        x = self.block("middle2", x, vector)
        for index in range(levels):
            x = self.level(f"up.{index}", torch.cat([x, skips.pop()], dim=1), vector, bias)
            if index < levels - 1:
                name = f"up.{index}.change"
                kernel = self.weights[f"{name}.kernel"].permute(2, 3, 0, 1)[:, :, None]
                x = F.conv_transpose3d(
                    x, kernel, self.weights[f"{name}.bias"], (1, 2, 2), (0, 1, 1)
                )
        x = self.block("head_block", torch.cat([x, stem], dim=1), None)
        return self.conv("head", x).permute(0, 3, 4, 2, 1)


def _rotate(x):
    """Rotary positions with complex numbers; pairs of channels lie side by side."""
    length, width = x.shape[-2:]
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(turned * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def _buckets(length):
    """T5's buckets, of keys minus queries, number by number."""
    table = torch.zeros(length, length, dtype=torch.long)
    for query in range(length):
        for key in range(length):
            n = query - key
            size = abs(n)
            if size < 8:
                value = size
            else:
                value = min(8 + int(math.log(size / 8) / math.log(32 / 8) * 8), 15)
            table[query, key] = value + (16 if n < 0 else 0)
    return table


@pytest.mark.parametrize(("multipliers", "latent"), [((1, 2), (8, 8, 6)), ((1, 2, 4), (8, 12, 10))])
def test_predictions_and_gradients_are_those_of_the_published_layers(rng, multipliers, latent):
    model = video_unet.create(4, 2, width=16, multipliers=multipliers, heads=2, head_width=8)
    apply, parameters = models.functional(model)
    parameters = {
        name: jnp.asarray(value + 0.1 * rng.standard_normal(value.shape), jnp.float32)
        for name, value in parameters.items()
    }
    inputs = _inputs(rng, latent=latent)
    weights = rng.standard_normal(inputs.noisy.shape).astype(np.float32)

    @jax.jit
    def both(parameters):
        def weighted(parameters):
            prediction = apply(parameters, inputs)
            return (prediction * weights).sum(), prediction

        return jax.value_and_grad(weighted, has_aux=True)(parameters)

    (_, prediction), gradient = both(parameters)
    reference = _Torch(parameters, 2, 8)
    for value in reference.weights.values():
        value.requires_grad_(True)
    expected = reference(inputs, len(multipliers))
    wanted = expected.detach().numpy()
    np.testing.assert_allclose(prediction, wanted, atol=2e-5 * max(1.0, np.abs(wanted).max()))
    (expected * torch.from_numpy(weights)).sum().backward()
    for name, value in reference.weights.items():
        wanted = value.grad.numpy()
        np.testing.assert_allclose(
            gradient[name], wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()), err_msg=name
        )


def test_difftumors_preset_takes_17_channels_at_its_widths():
    model = video_unet.create(8, 3, **video_unet.DIFFTUMOR)
    _, parameters = models.functional(model)
    assert parameters["stem.kernel"].shape == (1, 7, 7, 17, 24)
    assert parameters["head.kernel"].shape == (1, 1, 1, 24, 8)
    assert parameters["middle1.conv1.kernel"].shape == (1, 3, 3, 192, 192)
    assert not any(name.startswith("told") for name in parameters)


def test_planes_see_each_other_along_z_alone(rng):
    model = video_unet.create(4, 2, width=16, multipliers=(1,), heads=2, head_width=8)
    apply, parameters = models.functional(model)
    parameters = {
        name: value * 0 if name.endswith("axis.module.out.kernel") else value
        for name, value in parameters.items()
    }
    parameters["stem_attention.module.out.kernel"] *= 0
    inputs = _inputs(rng)
    other = inputs._replace(noisy=inputs.noisy.copy())
    other.noisy[:, :, :, 3] += 1
    run = jax.jit(apply)
    changed = np.abs(run(parameters, inputs) - run(parameters, other)).max(axis=(0, 1, 2, 4))
    # The group norm's mean and deviation are of all planes: those see the change, but little.
    assert changed[3] > 5 * np.delete(changed, 3).max()


def test_organ_and_radius_count_only_where_they_are_asked_for(rng):
    inputs = _inputs(rng)
    other = inputs._replace(organ=inputs.organ[::-1], radius_mm=2 * inputs.radius_mm)
    for told in (False, True):
        settings = {"width": 16, "multipliers": (1,), "heads": 2, "head_width": 8}
        apply, parameters = models.functional(video_unet.create(4, 2, told=told, **settings))
        run = jax.jit(apply)
        difference = np.abs(run(parameters, inputs) - run(parameters, other)).max()
        assert (difference > 1e-3) == told
        silent = run(parameters, inputs._replace(known=np.asarray([False, False])))
        unheard = run(parameters, other._replace(known=np.asarray([False, False])))
        np.testing.assert_array_equal(silent, unheard)


def test_planes_that_cannot_be_halved_and_wrong_settings_are_refused(rng):
    model = video_unet.create(4, 2, width=16, multipliers=(1, 2), heads=2, head_width=8)
    with pytest.raises(UserError, match="multiples of 8"):
        model(_inputs(rng, latent=(7, 8, 6)))
    with pytest.raises(UserError, match=r"model\.width is 20"):
        video_unet.create(4, 2, width=20)
