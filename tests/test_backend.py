import jax
import jax.numpy as jnp
import numpy as np

from tumorjax import backend
from tumorjax.models.convolution import compiler_options, convolution
from tumorjax.training.checkpoints import compute_dtype


def test_inside_target_the_choices_are_those_of_the_other_platform():
    here = (backend.platform(), compute_dtype("auto"), compiler_options())
    assert here[0] == jax.default_backend()
    with backend.target("tpu"):
        assert (backend.platform(), compute_dtype("auto"), compiler_options()) == (
            "tpu",
            "bfloat16",
            {},
        )
        with backend.target("cpu"):
            assert backend.platform() == "cpu"
        assert backend.platform() == "tpu"
    assert (backend.platform(), compute_dtype("auto"), compiler_options()) == here


def test_one_jitted_function_is_traced_anew_for_another_platform():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 5, 6, 7, 2)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 2, 3)), jnp.float32)
    jitted = jax.jit(convolution)

    def dimensions() -> set[int]:
        text = str(jitted.trace(x, kernel).jaxpr)
        return {n for n in (2, 3) if f"window_strides={(1,) * n}" in text}

    assert dimensions() == {2}
    with backend.target("tpu"):
        assert dimensions() == {3}
        np.testing.assert_allclose(
            jitted(x, kernel), convolution(x, kernel, formulation="planar"), atol=1e-5
        )
    assert dimensions() == {2}


def test_cached_keeps_entries_apart_by_platform():
    calls = []

    @backend.cached(4)
    def made(name: str) -> str:
        calls.append(name)
        return f"{name} on {backend.platform()}"

    with backend.target("tpu"):
        assert made("network") == "network on tpu"
    with backend.target("gpu"):
        assert made("network") == made("network") == "network on gpu"
    assert made("network") == f"network on {jax.default_backend()}"
    assert len(calls) == 3
    made.cache_clear()
    made("network")
    assert len(calls) == 4
