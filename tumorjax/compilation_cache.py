"""Compiled programs, kept between runs, so that a job that goes on does not compile anew."""

import hashlib
import os
import platform
import sys
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def default_folder() -> Path:
    """Returns the user's cache folder for tumorjax: in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "tumorjax" / "compiled"


def keep(folder: str | os.PathLike) -> None:
    """Lets JAX keep compiled programs in a folder and read them there.

    It is said by JAX's environment variable, so that jobs that never need JAX do not wait for its
    import; where JAX is there already, to JAX as well. A value that the user has given to that
    variable stays.

    Args:
        folder: made when the first program is written, with a folder in it for each kind of
            processor: a program compiled for CPU may use instructions that another machine with the
            same home lacks. "" keeps nothing.
    """
    if not os.fspath(folder) or os.environ.get(VARIABLE):
        return
    path = Path(folder).expanduser().absolute() / processor()
    os.environ[VARIABLE] = str(path)
    jax = sys.modules.get("jax")
    if jax is not None:
        jax.config.update("jax_compilation_cache_dir", str(path))


def processor() -> str:
    """Returns a name that differs where the processor's instructions do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = {line for line in lines if line.startswith(("flags", "Features"))}
    text = "\n".join([platform.processor(), *sorted(features)])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
