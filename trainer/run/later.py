"""Libraries that a run needs after its first step, or just before it: imported while it compiles.

Together they take half as long to import as everything before them. The compiler leaves Python's
lock alone, so that they cost nothing where a program is compiled, and what they did before where it
comes from the cache.
"""

from __future__ import annotations

import threading
from importlib import import_module

# grain draws the batches; Orbax saves them checkpoints, and grain imports it too.
LATER = ("grain", "trainer.run.saving")


def import_later() -> None:
    """Import them in a thread. Whoever needs one sooner waits for that thread's import."""
    # Not a daemon: Python's end would break off one that runs code of C++, and abort the process.
    threading.Thread(target=_import_all, name="imports").start()


def _import_all() -> None:
    for name in LATER:
        import_module(name)
