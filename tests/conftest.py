"""Shared by all tests: the CPU with eight devices, fast compiles that last, and real scans."""

import os
from pathlib import Path

# Sharding is tested on eight devices that the CPU pretends to be; set before JAX starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251124)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT scans and masks that some tests read; they skip without it."""
    folder = Path(os.environ.get("TUMORJAX_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"no real scans at {folder}; set TUMORJAX_DATA to their folder")
    return folder
