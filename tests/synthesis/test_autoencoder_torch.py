"""Encoder and decoder of both kinds against PyTorch's layers with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax.synthesis import autoencoder

torch = pytest.importorskip("torch")
F = torch.nn.functional


class Peer:
    """The same networks, written with PyTorch's functions; tensors are [b, c, x, y, z]."""

    def __init__(self, parameters, settings):
        self.parameters = {k: torch.from_numpy(np.array(v)) for k, v in parameters.items()}
        self.settings = settings

    def conv(self, x, name, stride=1):
        kernel = self.parameters[f"{name}.kernel"].permute(4, 3, 0, 1, 2)
        size = kernel.shape[-1]
        if size > 1:
            mode = "constant" if self.settings.padding == "zeros" else "replicate"
            x = F.pad(x, (1,) * 6, mode=mode)
        return F.conv3d(x, kernel, self.parameters[f"{name}.bias"], stride)

    def doubling(self, x, name):
        kernel = self.parameters[f"{name}.kernel"].permute(3, 4, 0, 1, 2)
        bias = self.parameters[f"{name}.bias"]
        if self.settings.padding == "zeros":
            return F.conv_transpose3d(x, kernel, bias, 2, padding=1)
        # DiffTumor's way: a border of replicated voxels, whose own outputs are cut off.
        return F.conv_transpose3d(F.pad(x, (1,) * 6, mode="replicate"), kernel, bias, 2, padding=3)

    def norm(self, x, name):
        scale, bias = self.parameters[f"{name}.scale"], self.parameters[f"{name}.bias"]
        if self.settings.norm == "group":
            return F.group_norm(x, 32, scale, bias, 1e-6)
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], scale, bias, 1e-6).movedim(-1, 1)

    def block(self, x, name):
        y = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1.conv")
        return x + self.conv(F.silu(self.norm(y, f"{name}.norm2")), f"{name}.conv2.conv")

    def encode(self, x):
        s = self.settings
        folded = len(s.widths) == 2
        if folded:
            # Blocks of 2^3 voxels as channels, z fastest.
            b, _, nx, ny, nz = x.shape
            x = x.reshape(b, nx // 2, 2, ny // 2, 2, nz // 2, 2).permute(0, 2, 4, 6, 1, 3, 5)
            x = x.reshape(b, 8, nx // 2, ny // 2, nz // 2)
        y = self.conv(x, "encoder.stem.conv")
        number = 0
        for level, blocks in enumerate(s.encoder_blocks):
            if level or not folded:
                y = self.conv(y, f"encoder.levels.{number}", 2)
                number += 1
            for _ in range(blocks):
                y = self.block(y, f"encoder.levels.{number}")
                number += 1
        return self.conv(F.silu(self.norm(y, "encoder.norm")), "encoder.head")

    def decode(self, z):
        s = self.settings
        y = F.silu(self.norm(self.conv(z, "decoder.stem"), "decoder.norm"))
        number = 0
        for blocks in s.decoder_blocks:
            y = self.doubling(y, f"decoder.levels.{number}")
            number += 1
            for _ in range(blocks):
                y = self.block(y, f"decoder.levels.{number}")
                number += 1
        y = self.conv(y, "decoder.head.conv")
        if len(s.widths) == 2:
            b, _, nx, ny, nz = y.shape
            y = y.reshape(b, 2, 2, 2, nx, ny, nz).permute(0, 4, 1, 5, 2, 6, 3)
            y = y.reshape(b, 1, 2 * nx, 2 * ny, 2 * nz)
        return y


# DiffTumor's layers: widths 16, 32, 64; group norm with 32 groups; replicated borders.
@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "difftumor"},
        {"preset": "small"},
        {"widths": (4, 8, 16), "decoder_blocks": (1, 1), "latent_channels": 3},
    ],
    ids=["difftumor", "small", "unfolded"],
)
def test_outputs_are_those_of_torch_layers(rng, settings):
    model = autoencoder.create(seed=2, **settings)
    # Norms and biases at their first values would hide a mistake.
    parameters = {
        name: jnp.asarray(value + 0.1 * rng.standard_normal(value.shape).astype(np.float32))
        if name.endswith((".bias", ".scale"))
        else value
        for name, value in model.parameters.items()
    }
    peer = Peer(parameters, model.settings)
    x = rng.uniform(-1, 1, (2, 12, 8, 16, 1)).astype(np.float32)
    encoded = jax.jit(model.encode)(parameters, x)
    expected = peer.encode(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).numpy()
    np.testing.assert_allclose(encoded, expected, atol=2e-4, rtol=1e-3)
    z = rng.standard_normal((2, 3, 2, 4, model.settings.latent_channels)).astype(np.float32)
    decoded = jax.jit(model.decode)(parameters, z)
    expected = peer.decode(torch.from_numpy(z).movedim(-1, 1)).movedim(1, -1).numpy()
    np.testing.assert_allclose(decoded, expected, atol=2e-4, rtol=1e-3)


def test_difftumors_layers():
    model = autoencoder.create(preset="difftumor")
    kernels = {n: v.shape for n, v in model.parameters.items() if n.endswith(".kernel")}
    assert kernels["encoder.stem.conv.kernel"] == (3, 3, 3, 1, 16)
    assert kernels["encoder.levels.0.kernel"] == (4, 4, 4, 16, 32)
    assert kernels["encoder.levels.2.kernel"] == (4, 4, 4, 32, 64)
    assert kernels["encoder.head.kernel"] == (1, 1, 1, 64, 8)
    assert kernels["decoder.levels.0.kernel"] == (4, 4, 4, 64, 64)
    assert kernels["decoder.levels.3.kernel"] == (4, 4, 4, 64, 32)
    assert kernels["decoder.levels.5.conv2.conv.kernel"] == (3, 3, 3, 32, 32)
    assert kernels["decoder.head.conv.kernel"] == (3, 3, 3, 32, 1)
    # Two levels down with one block each, two levels up with two.
    assert sum(name.startswith("encoder.levels") for name in kernels) == 2 * (1 + 2)
    assert sum(name.startswith("decoder.levels") for name in kernels) == 2 * (1 + 4)
    assert autoencoder.decoder_margin(model.settings) is None
