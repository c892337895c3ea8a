"""Equality of a network with its reference implementation in PyTorch."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tumorjax import models
from tumorjax.models import unetr_blocks
from tumorjax.models.torch_weights import export_state_dict, import_state_dict


def count_parameters(name, **settings) -> int:
    """Counts a network's trained parameters without making them."""
    fixed = []

    def parameters():
        model = models.create(name, **settings)
        fixed.extend(models.fixed_parameters(model))
        return models.functional(model)[1]

    shapes = jax.eval_shape(parameters)
    return sum(math.prod(s.shape) for name, s in shapes.items() if name not in fixed)


def compile_and_run(function, *arguments):
    """Returns a function's results, compiled as a whole, with little time spent on compiling.

    Compiling for speed would take several times as long as it takes to run once.
    """
    fast = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*arguments).compile(fast)(*arguments)


def randomise(reference, rng) -> None:
    """Draws all parameters of a torch module so that activations stay about 1."""
    import torch

    with torch.no_grad():
        for value in reference.parameters():
            draw = rng.standard_normal(tuple(value.shape))
            draw *= (2 / math.prod(value.shape[1:])) ** 0.5 if value.ndim > 1 else 0.3
            value.copy_(torch.from_numpy(draw))
        for module in reference.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, module.weight.shape)))


def check_equals_reference(
    model, reference, x, rng, *, gradients=True, full_size=False
) -> dict[str, float]:
    """Asserts that two networks are the same in weights, logits and gradients.

    Args:
        model: ours, with any weights.
        reference: the torch module; it gets random weights.
        x: input [b, x, y, z, c], float32.
        rng: draws weights and the loss.
        gradients: compare those too; without them it takes a third of the memory.
        full_size: take cross-entropy with random labels as the loss instead of a random sum, and
            return how far the gradients as a whole are from PyTorch's in float64, for the caller
            to judge. In deep networks of random weights the last digit decides which side of zero
            some activations are on, and in a random sum one of them is much: PyTorch in float32
            is then 4e-3 from itself in float64.

    Returns:
        The largest errors of logits and gradients, relative to the largest logit of a level, and
        to the largest entry of a parameter's gradient.
    """
    import torch

    randomise(reference, rng)
    reference.zero_grad()
    weights = reference.state_dict()
    ours = import_state_dict(model, weights)
    exported = export_state_dict(ours)
    assert exported.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(exported[key], value.numpy(), err_msg=key)
    # Networks of gigabytes are held three times as it is.
    del exported, model
    with torch.set_grad_enabled(gradients):
        expected = reference(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    levels = list(expected) if isinstance(expected, list | tuple) else [expected]
    draws = [rng.standard_normal(tuple(level.shape)).astype(np.float32) for level in levels]
    if full_size:
        # One for the drawn class, so that the sum with log-probabilities is the cross-entropy.
        draws = [(r == r.max(1, keepdims=True)) / np.float32(-r[:, 0].size) for r in draws]
    weigh = torch.nn.functional.log_softmax if full_size else lambda level, dim: level
    apply, parameters = models.functional(ours)

    def of_loss(parameters):
        found = apply(parameters, jnp.asarray(x))
        found = found if isinstance(found, list) else [found]
        of_levels = zip(found, draws, strict=True)
        logs = jax.nn.log_softmax if full_size else lambda y: y
        return sum(jnp.sum(logs(y) * np.moveaxis(r, 1, -1)) for y, r in of_levels), found

    if gradients:
        of_levels = zip(levels, draws, strict=True)
        sum((weigh(y, dim=1) * torch.from_numpy(r)).sum() for y, r in of_levels).backward()
        exact = _exact_gradients(reference, x, draws) if full_size else {}
    function = jax.value_and_grad(of_loss, has_aux=True) if gradients else of_loss
    result = compile_and_run(function, parameters)
    (_, found), slopes = result if gradients else (result, {})
    errors = {"logits": 0.0, "gradients": 0.0}
    for mine, level in zip(found, levels, strict=True):
        theirs = np.moveaxis(level.detach().numpy(), 1, -1)
        assert mine.shape == theirs.shape
        assert mine.dtype == jnp.float32
        error = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
        errors["logits"] = max(errors["logits"], error)
    assert errors["logits"] < 1e-4
    if not gradients:
        return errors

    # Gradients come back under the reference's names by the same way as weights.
    graph, state = nnx.split(ours)
    flat = nnx.to_flat_state(state)
    values = [(path, v.replace(slopes[".".join(map(str, path))])) for path, v in flat]
    mine = export_state_dict(nnx.merge(graph, nnx.from_flat_state(values)))
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert len(theirs) > 2
    if full_size:
        own = _distance({name: g.numpy() for name, g in theirs.items()}, exact)
        errors |= {"gradients": _distance(mine, exact), "PyTorch's gradients": own}
        return errors
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        # What a norm takes away, as a bias before it, has a gradient of nothing but rounding.
        scale = max(float(gradient.abs().max()), 1e-2 * largest)
        error = float(np.abs(mine[name] - gradient.numpy()).max() / scale)
        errors["gradients"] = max(errors["gradients"], error)
        assert error < 1e-3, name
    return errors


def _exact_gradients(reference, x, draws) -> dict[str, np.ndarray]:
    """Returns PyTorch's gradients of the same loss in float64."""
    import torch

    exact = copy.deepcopy(reference).double()
    exact.zero_grad()
    levels = exact(torch.from_numpy(np.moveaxis(x, -1, 1).astype(np.float64)))
    levels = list(levels) if isinstance(levels, list | tuple) else [levels]
    of_levels = zip(levels, draws, strict=True)
    log_softmax = torch.nn.functional.log_softmax
    sum((log_softmax(y, dim=1) * torch.from_numpy(r)).sum() for y, r in of_levels).backward()
    return {name: p.grad.numpy() for name, p in exact.named_parameters() if p.grad is not None}


def _distance(found, exact) -> float:
    """Returns the length of the difference of all gradients, relative to theirs."""
    squares = [(np.sum((found[n] - g) ** 2), np.sum(g**2)) for n, g in exact.items()]
    return float(np.sqrt(sum(d for d, _ in squares) / sum(g for _, g in squares)))


@pytest.fixture
def equals_reference(rng):
    """Asserts that model and torch module agree, see `check_equals_reference`.

    `pytest -rP` shows the errors.
    """
    pytest.importorskip("torch")

    def check(model, reference, x, *, full_size=False, **options):
        # Where an activation of a coarse level changes sides in one draw, it does not in the next;
        # what is wrong is wrong in all.
        for _ in range(3 if full_size else 1):
            errors = check_equals_reference(
                model, reference, x, rng, full_size=full_size, **options
            )
            print(", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
            if errors["gradients"] < 1e-3:
                return
            x = rng.standard_normal(x.shape).astype(np.float32)
        pytest.fail(f"{errors}")

    return check


@pytest.fixture
def without_kinks(monkeypatch):
    """Puts SiLU for ReLU, and for UNETR's leaky one: without_kinks(reference) -> reference.

    From the call on the network under test has it as well. A ReLU's slope jumps at 0. Where two
    networks round differently a value's sign turns here and there, and with it that voxel's
    gradient: 1e-2 of a parameter's in a small patch.
    """
    torch = pytest.importorskip("torch")

    def smooth(reference):
        monkeypatch.setattr(unetr_blocks, "leaky_relu", jax.nn.silu)
        monkeypatch.setattr(jax.nn, "relu", jax.nn.silu)
        # torch.nn.ReLU calls it, too.
        monkeypatch.setattr(torch, "relu", torch.nn.functional.silu)
        for module in list(reference.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.LeakyReLU):
                    setattr(module, name, torch.nn.SiLU())
        return reference

    return smooth


@pytest.fixture
def run_once():
    """Compiles a function and runs it: run_once(function, *arguments), see `compile_and_run`."""
    return compile_and_run


@pytest.fixture
def parameters_of():
    """Counts a network's trained parameters: parameters_of(name, **settings)."""
    return count_parameters


@pytest.fixture
def torch_parameters_of():
    """Counts a torch module's parameters, made on the meta device by a function."""
    torch = pytest.importorskip("torch")

    def count(make):
        with torch.device("meta"):
            return sum(value.numel() for value in make().parameters())

    return count


@pytest.fixture
def unet3d_reference():
    """Makes a torch U-Net of Models Genesis: unet3d_reference(in_channels, width, classes=None).

    Written from the description of the code that the Universal Model and SuPreM publish: names and
    sizes of its layers, ReLU after batch norm after convolution, three poolings by the largest
    value, transposed convolutions that keep the channels, batch norms that use the batch's own
    statistics also in eval mode. Without classes it has no head and gives the coarsest and the
    finest features.
    """
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class BatchNorm(nn.BatchNorm3d):
        def forward(self, x):
            statistics = (self.running_mean, self.running_var, self.weight, self.bias)
            return nn.functional.batch_norm(x, *statistics, True, self.momentum, self.eps)

    class Unit(nn.Module):
        def __init__(self, channels, width):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv3d(channels, width, 3, padding=1), BatchNorm(width)

        def forward(self, x):
            return torch.relu(self.bn1(self.conv1(x)))

    class Level(nn.Module):
        def __init__(self, channels, widths, grow=0):
            super().__init__()
            if grow:
                self.up_conv = nn.ConvTranspose3d(grow, grow, 2, stride=2)
            self.ops = nn.Sequential(Unit(channels, widths[0]), Unit(*widths))

        def forward(self, x, skip=None):
            return self.ops(x if skip is None else torch.cat([self.up_conv(x), skip], 1))

    class UNet3D(nn.Module):
        def __init__(self, in_channels, width, classes=None):
            super().__init__()
            channels = in_channels
            for name, w in zip((64, 128, 256, 512), (1, 2, 4, 8), strict=True):
                setattr(self, f"down_tr{name}", Level(channels, (w * width, 2 * w * width)))
                channels = 2 * w * width
            for name, w in zip((256, 128, 64), (16, 8, 4), strict=True):
                widths = (w * width // 2, w * width // 2)
                level = Level(w * width * 3 // 2, widths, grow=w * width)
                setattr(self, f"up_tr{name}", level)
            if classes:
                self.out_tr = nn.Module()
                self.out_tr.final_conv = nn.Conv3d(2 * width, classes, 1)

        def forward(self, x):
            skips = []
            for level in (self.down_tr64, self.down_tr128, self.down_tr256):
                skips.append(level(x))
                x = nn.functional.max_pool3d(skips[-1], 2)
            coarsest = x = self.down_tr512(x)
            for level in (self.up_tr256, self.up_tr128, self.up_tr64):
                x = level(x, skips.pop())
            return self.out_tr.final_conv(x) if hasattr(self, "out_tr") else (coarsest, x)

    return UNet3D


@pytest.fixture
def swin_reference(monkeypatch):
    """Makes MONAI's SwinUNETR: swin_reference(in_channels, classes, **settings).

    With `order` its patch merging lays voxels side by side in that order, as older versions and
    other code do. It can be made on the meta device too.
    """
    monai = pytest.importorskip("monai.networks.nets.swin_unetr")
    import torch

    # MONAI reads the rates of stochastic depth back from a tensor, which meta tensors refuse.
    monkeypatch.setattr(monai.torch, "linspace", np.linspace)

    def make(in_channels, classes, order=None, **settings):
        if order:

            class Merging(monai.PatchMergingV2):
                def forward(self, x):
                    x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in order], -1)
                    return self.reduction(self.norm(x))

            settings["downsample"] = Merging
        return monai.SwinUNETR(in_channels, classes, **settings)

    return make
