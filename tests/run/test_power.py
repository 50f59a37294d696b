"""A power cut leaves a checkpoint whole: its files are on the disk before it has its name."""

from __future__ import annotations

import os

import pytest
from orbax.checkpoint.path import atomicity
from runs import STEPS, values

from trainer.run.begin import begin, prepare
from trainer.run.damage import Trust
from trainer.run.loop import Run

pytestmark = pytest.mark.usefixtures("compiled_once")
# Orbax writes these in the moment in which it renames.
MARKERS = {"commit_success.txt", "_CHECKPOINT_METADATA"}


def watch(data, out, **how):
    """Train; returns what was brought to the disk, by inode, and the names given, in order."""
    seen = []
    fsync, finalize = os.fsync, atomicity.AtomicRenameTemporaryPath.finalize

    def noted_fsync(file):
        seen.append(os.fstat(file).st_ino)
        fsync(file)

    async def noted_finalize(self, *given, **options):
        await finalize(self, *given, **options)
        seen.append(self.get_final().name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", noted_finalize)
        Run(begin(prepare(values(data), out, trust=Trust(**how)))).go()
    return seen


def test_files_then_the_name_are_brought_to_the_disk(data, tmp_path):
    seen = watch(data, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / str(STEPS)
    at = seen.index(str(STEPS))
    inodes = {path: path.stat().st_ino for path in last.rglob("*")}
    markers = {path for path in inodes if path.parent == last and path.name in MARKERS}
    assert len(inodes) > 20 and markers
    assert {inodes[path] for path in inodes.keys() - markers} <= set(seen[:at])
    after = set(seen[at:])
    assert {inodes[path] for path in markers} <= after
    assert {last.stat().st_ino, last.parent.stat().st_ino} <= after
    assert (tmp_path / "run" / "metrics.csv").stat().st_ino in seen


def test_without_it_nothing_of_a_checkpoint_is_waited_for(data, tmp_path):
    seen = watch(data, tmp_path / "run", sync=False)
    last = tmp_path / "run" / "checkpoints" / str(STEPS)
    assert not {path.stat().st_ino for path in last.rglob("*")} & set(seen)
