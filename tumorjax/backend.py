"""The platform that programs are compiled for: this machine's, or that of a machine elsewhere."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

# JAX's own caches of traced and compiled programs ask for it as well.
_target = jax.make_user_context(None)


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu", by which formulations and dtypes are chosen."""
    return _target.value or jax.default_backend()


@contextlib.contextmanager
def target(name: str) -> Iterator[None]:
    """Inside, in this thread, programs are traced and compiled for another platform.

    Args:
        name: "cpu", "gpu" or "tpu".
    """
    with _target(name):
        yield


def cached(maxsize: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """functools.lru_cache for what depends on the platform: each has entries of its own."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.lru_cache(maxsize=maxsize)
        def of_platform(name: str, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return of_platform(platform(), *args, **kwargs)

        call.cache_clear = of_platform.cache_clear  # type: ignore[attr-defined]
        return call

    return decorate
