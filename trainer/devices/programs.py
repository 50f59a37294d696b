"""The cache of compiled programs, so that a run that begins again or resumes need not compile them.

JAX reads and writes the cache; this file chooses its directory.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import jax

DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
SWITCH = "JAX_ENABLE_COMPILATION_CACHE"


def enable_program_cache() -> None:
    """Keep compiled programs below the user's cache directory.

    Does nothing when the environment or JAX's settings name another place, or switch the cache on
    or off. On a CPU the directory is named after the machine: programs use the instructions of its
    processor, and another machine that shares the directory may not have them.
    """
    if DIRECTORY in os.environ or SWITCH in os.environ or jax.config.jax_compilation_cache_dir:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = caches / "growkit" / "programs"
    if jax.default_backend() == "cpu":
        directory = directory / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(directory))
