"""Equality of a network with its reference implementation in PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tumorjax import models
from tumorjax.models.torch_weights import export_state_dict, import_state_dict


def count_parameters(name, **settings) -> int:
    """Counts a network's parameters without making them."""
    shapes = jax.eval_shape(lambda: models.functional(models.create(name, **settings))[1])
    return sum(math.prod(shape.shape) for shape in shapes.values())


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


def check_equals_reference(model, reference, x, rng) -> dict[str, float]:
    """Asserts that two networks are the same in weights, logits and gradients.

    Args:
        model: ours, with any weights.
        reference: the torch module; it gets random weights.
        x: input [b, x, y, z, c], float32.
        rng: draws weights and the loss.

    Returns:
        The largest errors of logits and gradients, relative to the largest logit of a level, and
        to the largest entry of a parameter's gradient.
    """
    import torch

    randomise(reference, rng)
    weights = reference.state_dict()
    ours = import_state_dict(model, weights)
    exported = export_state_dict(ours)
    assert exported.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(exported[key], value.numpy(), err_msg=key)

    expected = reference(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    levels = list(expected) if isinstance(expected, list | tuple) else [expected]
    draws = [rng.standard_normal(tuple(level.shape)).astype(np.float32) for level in levels]
    loss = sum((level * torch.from_numpy(r)).sum() for level, r in zip(levels, draws, strict=True))
    loss.backward()
    apply, parameters = models.functional(ours)
    draws = [jnp.asarray(np.moveaxis(r, 1, -1)) for r in draws]

    def of_loss(parameters):
        found = apply(parameters, jnp.asarray(x))
        found = found if isinstance(found, list) else [found]
        return sum(jnp.sum(y * r) for y, r in zip(found, draws, strict=True)), found

    (_, found), gradients = jax.jit(jax.value_and_grad(of_loss, has_aux=True))(parameters)
    errors = {"logits": 0.0, "gradients": 0.0}
    for mine, level in zip(found, levels, strict=True):
        theirs = np.moveaxis(level.detach().numpy(), 1, -1)
        assert mine.shape == theirs.shape
        assert mine.dtype == jnp.float32
        error = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
        errors["logits"] = max(errors["logits"], error)
    assert errors["logits"] < 1e-4

    # Gradients come back under the reference's names by the same way as weights.
    graph, state = nnx.split(ours)
    flat = nnx.to_flat_state(state)
    values = [(path, nnx.Param(gradients[".".join(map(str, path))])) for path, _ in flat]
    mine = export_state_dict(nnx.merge(graph, nnx.from_flat_state(values)))
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert len(theirs) > 2
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        # What a norm takes away, as a bias before it, has a gradient of nothing but rounding.
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        error = float(np.abs(mine[name] - gradient.numpy()).max() / scale)
        errors["gradients"] = max(errors["gradients"], error)
        assert error < 1e-3, name
    return errors


@pytest.fixture
def equals_reference(rng):
    """Asserts that model and torch module agree, see `check_equals_reference`."""
    pytest.importorskip("torch")
    return lambda model, reference, x: check_equals_reference(model, reference, x, rng)


@pytest.fixture
def parameters_of():
    """Counts a network's parameters: parameters_of(name, **settings)."""
    return count_parameters


@pytest.fixture
def torch_parameters_of():
    """Counts a torch module's parameters, made on the meta device by a function."""
    torch = pytest.importorskip("torch")

    def count(make):
        with torch.device("meta"):
            return sum(value.numel() for value in make().parameters())

    return count
