"""STU-Net: equality to a PyTorch network built from its published description."""

import numpy as np
import pytest
from flax import nnx

from tumorjax import models
from tumorjax.errors import UserError


def make_reference(*, width, depth, classes, channels, strides, deep_supervision=False):
    """STU-Net in PyTorch, after section 3 of the paper, under the names of its checkpoints."""
    torch = pytest.importorskip("torch")
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, before, after, stride=1, *, first):
            super().__init__()
            self.conv1 = nn.Conv3d(before, after, 3, stride, 1)
            self.norm1 = nn.InstanceNorm3d(after, affine=True)
            self.conv2 = nn.Conv3d(after, after, 3, 1, 1)
            self.norm2 = nn.InstanceNorm3d(after, affine=True)
            if first:
                self.conv3 = nn.Conv3d(before, after, 1, stride)

        def forward(self, x):
            y = nn.functional.leaky_relu(self.norm1(self.conv1(x)), 0.01)
            shortcut = self.conv3(x) if hasattr(self, "conv3") else x
            return nn.functional.leaky_relu(self.norm2(self.conv2(y)) + shortcut, 0.01)

    class Grow(nn.Module):
        def __init__(self, before, after, factor):
            super().__init__()
            self.conv = nn.Conv3d(before, after, 1)
            self.factor = factor

        def forward(self, x):
            return self.conv(nn.functional.interpolate(x, scale_factor=self.factor, mode="nearest"))

    def stage(before, after, stride=1):
        rest = [Residual(after, after, first=False) for _ in range(depth - 1)]
        return nn.Sequential(Residual(before, after, stride, first=True), *rest)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            w = [width * multiple for multiple in (1, 2, 4, 8, 16, 16)]
            down = [stage(channels, w[0])]
            down += [stage(w[i], w[i + 1], strides[i]) for i in range(5)]
            self.conv_blocks_context = nn.ModuleList(down)
            order = range(4, -1, -1)
            self.upsample_layers = nn.ModuleList(
                [Grow(w[i + 1], w[i], [float(s) for s in strides[i]]) for i in order]
            )
            self.conv_blocks_localization = nn.ModuleList([stage(2 * w[i], w[i]) for i in order])
            self.seg_outputs = nn.ModuleList([nn.Conv3d(w[i], classes, 1) for i in order])

        def forward(self, x):
            features = []
            for block in self.conv_blocks_context:
                x = block(x)
                features.append(x)
            logits = []
            for level in range(5):
                x = torch.cat([self.upsample_layers[level](x), features[4 - level]], dim=1)
                x = self.conv_blocks_localization[level](x)
                logits.append(self.seg_outputs[level](x))
            return logits[::-1] if deep_supervision else logits[-1]

    return Network()


HALVED = [[2, 2, 2]] * 5


@pytest.mark.parametrize(
    ("patch", "channels", "classes", "strides", "depth"),
    [
        ((16, 16, 32), 1, 3, [[2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 2], [1, 1, 1]], 1),
        ((32, 8, 16), 2, 5, [[2, 1, 1], [2, 2, 2], [2, 2, 2], [2, 1, 2], [1, 1, 1]], 2),
    ],
)
def test_network_equals_its_reference(
    equals_reference, rng, patch, channels, classes, strides, depth
):
    deep = depth == 1
    reference = make_reference(
        width=2,
        depth=depth,
        classes=classes,
        channels=channels,
        strides=strides,
        deep_supervision=deep,
    )
    model = models.create(
        "stu_net",
        widths=(2, 4, 8, 16, 32, 32),
        blocks=(depth,) * 6,
        strides=[[1, 1, 1], *strides],
        classes=classes,
        in_channels=channels,
        deep_supervision=deep,
    )
    x = rng.standard_normal((2, *patch, channels)).astype(np.float32)
    equals_reference(model, reference, x)


@pytest.mark.parametrize(
    ("preset", "width", "depth", "millions"),
    [("S", 16, 1, 14.60), ("B", 32, 1, 58.26), ("L", 64, 2, 440.30), ("H", 96, 3, 1457.33)],
)
def test_presets_have_the_papers_parameters(
    parameters_of, torch_parameters_of, preset, width, depth, millions
):
    # The published numbers are of the 105 classes of TotalSegmentator, background counted.
    found = parameters_of("stu_net", preset=preset, classes=105)
    assert found == pytest.approx(millions * 1e6, abs=0.006e6)
    options = {"width": width, "depth": depth, "classes": 105, "channels": 1, "strides": HALVED}
    assert found == torch_parameters_of(lambda: make_reference(**options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "width", "depth", "patch"),
    [("S", 16, 1, (48, 32, 32)), ("B", 32, 1, (32, 48, 32)), ("L", 64, 2, (32, 32, 48))],
)
def test_full_sizes_equal_their_reference(equals_reference, rng, preset, width, depth, patch):
    # As at 96^3, the sixth stage halves nothing.
    strides = [*HALVED[:4], [1, 1, 1]]
    reference = make_reference(width=width, depth=depth, classes=3, channels=1, strides=strides)
    settings = {"preset": preset, "strides": [[1, 1, 1], *strides], "classes": 3}
    # Of shapes alone: nothing is allocated before the weights are there.
    model = nnx.eval_shape(lambda: models.create("stu_net", **settings))
    x = rng.standard_normal((1, *patch, 1)).astype(np.float32)
    equals_reference(model, reference, x, gradients=preset != "L", full_size=True)


@pytest.mark.parametrize(
    ("patch", "divisor"), [((96, 96, 96), (16, 16, 16)), ((192, 96, 96), (32, 16, 16))]
)
def test_strides_follow_the_patch_and_further_stages_halve_nothing(patch, divisor):
    model = nnx.eval_shape(
        lambda: models.create("stu_net", preset="S", patch_size=patch, classes=2)
    )
    assert model.divisor == divisor
    assert len(model.encoder) == 6


def test_wrong_settings_are_told():
    with pytest.raises(UserError, match="Expected one of S, B, L, H"):
        models.create("stu_net", preset="M", classes=2)
    with pytest.raises(UserError, match="as many blocks as widths"):
        models.create("stu_net", widths=(4, 8), blocks=(1,), classes=2)
    with pytest.raises(UserError, match="must divide by"):
        models.create("stu_net", preset="S", patch_size=(100, 96, 96), classes=2)
