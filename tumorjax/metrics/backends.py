"""Where a metric is computed: by numpy and compiled libraries on the host, or by kernels in JAX.

Both give the same numbers. On a CPU the host's way is the faster one (`python -m
benchmarks.metrics`), on accelerators the kernels are, since the masks need not leave the device.
"""

import multiprocessing
from typing import Any

BACKENDS = ("auto", "host", "device")


def choose(backend: str, *arrays: Any) -> str:
    """Returns "host" or "device".

    Args:
        backend: host, device or auto. auto means device where an array lies on an accelerator, or
            where JAX's default device is one, and host otherwise. Worker processes take the host's
            way: each would start JAX anew, and they would share one accelerator.
        *arrays: what the metric is of.

    Raises:
        ValueError: the name is unknown.
    """
    if _check(backend) != "auto":
        return backend
    if any(on_accelerator(array) for array in arrays):
        return "device"
    if multiprocessing.parent_process() is not None:
        return "host"
    import jax  # here, for worker processes do without

    return "host" if jax.default_backend() == "cpu" else "device"


def choose_by_place(backend: str, *arrays: Any) -> str:
    """As `choose`, but auto means device only where an array lies on an accelerator already.

    For what the host is through with before masks would have arrived on another device.
    """
    if _check(backend) != "auto":
        return backend
    return "device" if any(on_accelerator(array) for array in arrays) else "host"


def _check(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}. Expected one of {', '.join(BACKENDS)}")
    return backend


def on_accelerator(array: Any) -> bool:
    """Says whether an array is JAX's and lies on another device than the CPU."""
    devices = getattr(array, "devices", None)  # numpy's arrays have none
    return callable(devices) and any(device.platform != "cpu" for device in array.devices())
