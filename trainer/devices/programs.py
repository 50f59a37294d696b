"""Where compiled programs are kept, so that a run that is begun again or resumed need not compile them again.

Knows the directory; JAX reads and writes it. Leaves whether to keep any to JAX's own settings.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import jax

DIRECTORY, SWITCH = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"


def enable_program_cache() -> None:
    """Keep programs below the user's cache directory, unless the environment names another place or says no.

    A CPU's go by the machine's name: they use what its processor has, and another that shares the directory may not
    have it.
    """
    if DIRECTORY in os.environ or SWITCH in os.environ or jax.config.jax_compilation_cache_dir:
        return
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "growkit" / "programs"
    if jax.default_backend() == "cpu":
        kept = kept / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(kept))
