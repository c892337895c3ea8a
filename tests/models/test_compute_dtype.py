"""Networks in half precision and with recomputed activations: the same function, less exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tumorjax import models

TINY = {
    "plain_unet": {"widths": (4, 8), "blocks": (1, 2)},
    "stu_net": {"widths": (4, 8), "blocks": (1, 2)},
    "segresnet": {"blocks_down": (1, 1), "groups": 4},
}


@pytest.mark.parametrize("name", sorted(TINY))
def test_bfloat16_and_remat_keep_logits_and_gradients(rng, name):
    x = jnp.asarray(rng.standard_normal((1, 4, 8, 8, 1)), jnp.float32)
    draw = jnp.asarray(rng.standard_normal((1, 4, 8, 8, 3)), jnp.float32)
    results = []
    for settings in ({}, {"dtype": "bfloat16", "remat": True}):
        model = models.create(name, classes=3, **TINY[name], **settings)
        apply, parameters = models.functional(model)

        def loss(parameters, apply=apply):
            logits = apply(parameters, x)
            return jnp.sum(logits * draw), logits

        # Compiling for speed would take several times as long as it takes to run once.
        lowered = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(parameters)
        run = lowered.compile({"xla_backend_optimization_level": 0})
        (_, logits), slopes = run(parameters)
        assert logits.dtype == jnp.float32
        assert {slope.dtype for slope in slopes.values()} == {jnp.dtype("float32")}
        results.append((logits, np.concatenate([np.ravel(v) for v in slopes.values()])))
    (exact, slopes), (half, half_slopes) = results
    error = float(jnp.abs(exact - half).max() / jnp.abs(exact).max())
    # bfloat16 has eight bits: it is used, and no more is lost than its roundings.
    assert 1e-4 < error < 0.05
    assert np.corrcoef(slopes, half_slopes)[0, 1] > 0.995
