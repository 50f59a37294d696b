"""Checkpoints that a power cut leaves whole: on the disk before they have their name.

Orbax writes a checkpoint under a temporary name and renames it. Here its files, and the names in
its directories, are brought to the disk before that, and the new name after it, in the thread in
which Orbax writes. Old checkpoints are removed later, so that one is whole at any moment.
"""

from __future__ import annotations

import asyncio
from typing import Any

from orbax.checkpoint.path import atomicity

from growkit.checkpoint.files import sync_directory, sync_file
from growkit.checkpoint.output import sync_tree


class SyncedPath(atomicity.AtomicRenameTemporaryPath):
    """The temporary directory of a checkpoint, or of one item of it, on this machine's disk."""

    async def finalize(self, *given: Any, **options: Any) -> None:
        """Give the directory its name. One process runs this, when all have written."""
        await asyncio.to_thread(sync_tree, self.get())
        await super().finalize(*given, **options)
        await asyncio.to_thread(_sync_names, self.get_final())


def _sync_names(directory: Any) -> None:
    """Bring a directory's name to the disk, and the markers that Orbax wrote just before it."""
    for path in directory.iterdir():
        if path.is_file():
            sync_file(path)
    sync_directory(directory)
    sync_directory(directory.parent)
