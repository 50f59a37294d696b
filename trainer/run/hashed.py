"""Hashes of what a run saves: made while Orbax writes, off the training thread, compared on resume.

The arrays are hashed in host memory, from the copy that Orbax writes from, in the thread that
writes the checkpoint's meta; training waits for neither. Hashing 2.4 GB takes 0.15 s, beside some
seconds of writing. An array that lies on several devices of this process is put together first,
one at a time. Of several processes none has a whole array: there only meta and files are hashed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from growkit.checkpoint.hashes import ALGORITHM, hash_array, make_hashes
from trainer.run.state import to_tree
from trainer.step.update import State


@dataclass(frozen=True)
class HostArray:
    """An array in host memory: its parts by their place in the whole."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[tuple[tuple[slice, ...], np.ndarray], ...]

    def join(self) -> np.ndarray:
        """The whole array; a view where it is one part."""
        (_, first), *others = self.parts
        if not others:
            return first
        whole = np.empty(self.shape, self.dtype)
        for index, part in self.parts:
            whole[index] = part
        return whole


def copy_to_host(state: State) -> dict[str, HostArray]:
    """The arrays of a state in host memory, by their name in the checkpoint.

    JAX keeps the host copy of a device's array, so that Orbax does not copy it again. Arrays that
    lie on devices of other processes are left out.
    """
    leaves = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(to_tree(state))}
    shards = {
        name: [(shard.index, shard.data) for shard in leaf.addressable_shards if _is_first(shard)]
        for name, leaf in leaves.items()
        if leaf.is_fully_addressable
    }
    # All copies are begun before the first is waited for.
    for each in shards.values():
        for _, data in each:
            data.copy_to_host_async()
    return {
        name: HostArray(
            leaves[name].shape,
            np.dtype(leaves[name].dtype),
            tuple((index, np.asarray(data)) for index, data in each),
        )
        for name, each in shards.items()
    }


def _name(path: Any) -> str:
    return ".".join(str(key.key) for key in path)


def _is_first(shard: Any) -> bool:
    """Whether this is the first of the equal copies of a part."""
    # Replicas hold the same numbers: hashed and copied once.
    return bool(shard.replica_id == 0)


def hash_arrays(arrays: Mapping[str, HostArray], algorithm: str = ALGORITHM) -> dict[str, str]:
    """The hash of each array."""
    return {name: hash_array(array.join(), algorithm) for name, array in arrays.items()}


def hash_later(
    state: State, files: Mapping[str, bytes], meta: Mapping[str, Any]
) -> Callable[[], dict[str, Any]]:
    """Copy a state to the host now; the result makes the hashes of everything when it is called."""
    arrays = copy_to_host(state)
    return lambda: make_hashes(hash_arrays(arrays), files, meta)
