"""No training begins with numbers that no model should hold: NaN, infinities, negative squares.

They are looked for in host memory, where a state passes anyway: as a source is read, and in the
copy that a checkpoint's hashes are made of. Of several processes each looks at its own parts, and
all of them refuse what one has found.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from growkit.checkpoint.numbers import Findings
from growkit.checkpoint.tensor import SLOTS, Source
from growkit.errors import GrowkitError
from trainer.run.state import PARTIAL, from_source, to_tree
from trainer.step.part import ALL, Part
from trainer.step.update import State


def take_state(
    source: Source,
    like: State,
    continued: bool,
    step: int,
    check: Callable[[], None],
    part: Part = ALL,
) -> State:
    """The state that begins with a model on disk; see `from_source`.

    check: called when all of it is read, to compare hashes that were made meanwhile. Raises
    GrowkitError for numbers that no training can begin with.
    """
    findings = Findings()
    state = from_source(source, like, continued, step, findings, part)
    check()
    wrong = describe_findings(findings)
    if wrong:
        raise GrowkitError(f"{source.path} cannot be trained on: {wrong}; take another model")
    return state


def look_at(state: State) -> Findings:
    """What is wrong with the numbers of a state, of this process's parts of it."""
    findings = Findings()
    tree = to_tree(state)
    # The trainer's own slots: those of other optimizers are in no state.
    moments = {f"{PARTIAL}{slot}": slot for slot in SLOTS}
    known = moments.keys() | set(SLOTS)
    for key in [key for key in tree if key in known]:
        slot = moments.get(key, key)
        for path, leaf in jax.tree.leaves_with_path(tree[key]):
            name = ".".join((slot, *(str(key.key) for key in path)))
            for shard in leaf.addressable_shards:
                # The others are copies.
                if shard.replica_id == 0:
                    findings.look(slot, name, np.asarray(shard.data))
    return findings


def describe_findings(findings: Findings) -> str:
    """What any process found, in words; empty where none found anything."""
    found = bool(findings)
    if jax.process_count() > 1:
        found = bool(multihost_utils.process_allgather(np.asarray(found)).any())
    if not found:
        return ""
    return findings.describe() or "another process found numbers that are NaN or infinite"
