"""Compiled programs are found again by the next process, and kept out where that is asked for."""

import os
import subprocess
import sys

from tumorjax import compilation_cache

PROGRAM = """
import logging, sys
from tumorjax import compilation_cache
compilation_cache.keep(sys.argv[1])
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
print(float(jax.jit(lambda x: jnp.sin(x).sum())(jnp.arange(5.0))), len(hits) > 0)
"""


def _run(folder) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != compilation_cache.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_the_next_process_finds_what_the_first_compiled(tmp_path):
    value, hit = _run(tmp_path / "cache")
    assert hit == "False"
    assert any((tmp_path / "cache" / compilation_cache.processor()).iterdir())
    assert _run(tmp_path / "cache") == [value, "True"]


def test_the_users_own_choice_stays_and_empty_keeps_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv(compilation_cache.VARIABLE, "elsewhere")
    compilation_cache.keep(tmp_path)
    assert os.environ[compilation_cache.VARIABLE] == "elsewhere"
    monkeypatch.delenv(compilation_cache.VARIABLE)
    compilation_cache.keep("")
    assert compilation_cache.VARIABLE not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compilation_cache.default_folder() == tmp_path / "tumorjax" / "compiled"
