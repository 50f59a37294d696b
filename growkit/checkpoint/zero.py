"""Optimizers of DeepSpeed's ZeRO, stages 1 and 2: flat vectors, cut among the ranks.

    zero_pp_rank_0_mp_rank_00_optim_states.pt    rank 0 of data parallelism, 0 of tensor parallelism
    zero_pp_rank_1_mp_rank_00_optim_states.pt    ...

With bfloat16 the names begin with bf16_, as do those of its BF16_Optimizer, which are read too.
DeepSpeed lays the parameters of a group end to end, pads the vector so that the ranks share it
evenly, and gives each rank one part: of the parameters in float32 and of both moments. Which
numbers belong to which parameter is not stated; it follows from the order of the parameters.

Two forms are read. DeepSpeed since 0.4 gives each rank one part of a group
(`single_partition_of_fp32_groups`). Before, as when the Pythia models were trained, stage 1 gave it
one part for each interval of communication (`local_sub_partitions_of_fp32_groups`): the first parts
of all ranks come first, then the second ones. Sources: runtime/zero/stage_1_and_2.py of DeepSpeed
0.8 and later, runtime/zero/stage1.py of 0.3.15, utils/zero_to_fp32.py.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from growkit.checkpoint.optimizer import STEP, read_scalar, require_step
from growkit.checkpoint.tensor import Tensor
from growkit.checkpoint.torch_pickle import Inert, Stored
from growkit.checkpoint.torch_zip import TorchFile, open_torch_file
from growkit.errors import GrowkitError

FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
STATE = "optimizer_state_dict"
MASTERS = ("single_partition_of_fp32_groups", "local_sub_partitions_of_fp32_groups")
# Of stage 3.
SHARDED = "fp32_flat_groups"
ENTRIES = {"exp_avg": "mu", "exp_avg_sq": "nu"}
# Objects beside the tensors that are passed over, by module or by name: the loss scaler, addresses
# of fragments, arguments, the states of random generators.
SKIPPED = re.compile(
    r"(deepspeed|deeperspeed|megatron)\..+|argparse\.Namespace|types\.SimpleNamespace|pathlib\.\w+"
    r"|numpy\.(_?core\.multiarray\.(_reconstruct|scalar)|ndarray|dtype|random\..+)"
    r"|_codecs\.encode|(builtins|__builtin__)\.(set|bytearray)|collections\.(defaultdict|deque)"
    r"|torch\.(device|float16|bfloat16|float32|float64)"
)


def open_state(path: Path) -> TorchFile:
    """A file of DeepSpeed, whose own objects are passed over; nothing of it is run.

    Raises GrowkitError, naming the class, for an object of any other kind.
    """
    file = open_torch_file(path, lambda called: SKIPPED.fullmatch(called) is not None)
    if not isinstance(file.value, Mapping):
        raise GrowkitError(f"{path} holds no state by name, but a {type(file.value).__name__}")
    return file


@dataclass(frozen=True)
class Vector:
    """A flat vector that lies in several files, one part after another."""

    parts: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return sum(part.row_count for part in self.parts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The numbers [start, stop)."""
        starts = [0, *accumulate(part.row_count for part in self.parts)]
        place = bisect_right(starts, start) - 1
        found = []
        while start < stop:
            end = min(stop, starts[place + 1])
            if end > start:
                found.append(self.parts[place].rows(start - starts[place], end - starts[place]))
            start = max(start, end)
            place += 1
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, np.float32)


@dataclass(frozen=True)
class Cut:
    """A parameter of one rank of tensor parallelism: where it lies in the vectors of its group."""

    vectors: Mapping[str, Vector]
    start: int
    shape: tuple[int, ...]

    def read(self, slot: str, first: int, last: int) -> np.ndarray:
        """The rows [first, last) of a slot."""
        row = math.prod(self.shape[1:])
        numbers = self.vectors[slot].read(self.start + first * row, self.start + last * row)
        return numbers.reshape(last - first, *self.shape[1:])


@dataclass(frozen=True)
class Partition:
    """What one rank saved. masters, moments: group -> interval of communication -> its part."""

    file: TorchFile
    masters: list[list[Stored]]
    moments: list[list[Mapping[str, Any]]]
    paddings: list[Any] | None
    count: int | None

    def find_padding(self, group: int) -> int:
        """The padding that is stated of a group's part here; 0 where none is."""
        stated = self.paddings[group] if self.paddings and group < len(self.paddings) else 0
        return stated if type(stated) is int and stated > 0 else 0


def open_partitions(path: Path, rank: int) -> list[Partition]:
    """The files of one rank of tensor parallelism, in the order of data parallelism.

    Raises GrowkitError for a file that is missing, and for what is not of ZeRO 1 or 2.
    """
    files = _list_files(path, rank)
    if not files:
        raise GrowkitError(
            f"{path} has no zero_pp_rank_*_mp_rank_{rank:02d}_optim_states.pt: it was saved "
            "without its optimizer, or without ZeRO"
        )
    partitions = {number: _read_partition(file) for number, file in sorted(files.items())}
    count = _read_rank_count(partitions[min(partitions)].file)
    for number in range(count or max(files) + 1):
        if number not in files:
            raise GrowkitError(
                f"{path / f'zero_pp_rank_{number}_mp_rank_{rank:02d}_optim_states.pt'} is missing: "
                f"the optimizer was cut among {count or max(files) + 1} ranks"
            )
    if count and len(files) > count:
        raise GrowkitError(
            f"{path} has {len(files)} files of an optimizer that was cut among {count} ranks; they "
            "are of two saves"
        )
    return list(partitions.values())


def _list_files(path: Path, rank: int) -> dict[int, Path]:
    """The files of one rank of tensor parallelism, by rank of data parallelism."""
    files: dict[int, Path] = {}
    for file in sorted(path.iterdir()):
        found = FILE.fullmatch(file.name)
        if found and int(found[2]) == rank:
            other = files.setdefault(int(found[1]), file)
            require_single(other, file)
    return files


def require_single(one: Path, other: Path) -> None:
    """Raise GrowkitError where two names mean one file of a checkpoint."""
    if one != other:
        raise GrowkitError(
            f"{one} and {other.name} are the same part of two saves; move the one elsewhere that "
            "is not of this save"
        )


def _read_partition(path: Path) -> Partition:
    file = open_state(path)
    state = file.value.get(STATE)
    if not isinstance(state, Mapping):
        raise GrowkitError(f"{path} has no {STATE!r}")
    stage = _read_whole(state.get("zero_stage"))
    if SHARDED in state or stage == 3:
        raise GrowkitError(
            f"{path} is of ZeRO stage 3, which cuts every parameter among the ranks; growkit reads "
            "stages 1 and 2"
        )
    between = state.get("param_alignment_paddings")
    if any(_list_numbers(between)):
        raise GrowkitError(
            f"{path} has padding between its parameters (param_alignment_paddings), and growkit "
            "reads vectors that have it at their end alone"
        )
    key = next((key for key in MASTERS if key in state), None)
    if key is None:
        raise GrowkitError(f"{path} has none of {', '.join(MASTERS)}: it is not of ZeRO 1 or 2")
    masters = [_list_parts(file, group) for group in _take_list(file, state[key], key)]
    moments = _list_moments(file, state.get("base_optimizer_state"), len(masters))
    # The paddings of the older form are of all ranks, and its vectors are lean.
    paddings = state.get("group_paddings") if key == MASTERS[0] else None
    listed = paddings if isinstance(paddings, list) else None
    return Partition(file, masters, moments, listed, _find_count(file, state, moments))


def _list_numbers(value: Any) -> Iterator[Any]:
    """The numbers in nested lists."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _list_numbers(each)
    elif value is not None:
        yield value


def _read_whole(value: Any) -> int | None:
    """A whole number, or that of a member of an enumeration."""
    if isinstance(value, Inert) and len(value.arguments) == 1:
        value = value.arguments[0]
    return value if type(value) is int else None


def _read_rank_count(file: TorchFile) -> int | None:
    """Among how many ranks the vectors were cut, where it is stated."""
    counts = file.value[STATE].get("partition_count")
    return _read_whole(counts[0] if isinstance(counts, list) and counts else counts)


def _take_list(file: TorchFile, value: Any, what: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise GrowkitError(f"{file.path}: {what} is no list")
    return list(value)


def _list_parts(file: TorchFile, group: Any) -> list[Stored]:
    """A group's parts in this file: one, or one for each interval of communication."""
    parts = [group] if isinstance(group, Stored) else _take_list(file, group, "a group")
    for part in parts:
        _check_vector(file, part, "a part of the parameters")
    return parts


def _check_vector(file: TorchFile, part: Any, what: str) -> None:
    if not isinstance(part, Stored) or len(part.shape) != 1 or part.dtype != np.float32:
        found = f"{part.dtype} {list(part.shape)}" if isinstance(part, Stored) else "no tensor"
        raise GrowkitError(f"{file.path}: {what} must be a vector of float32, and is {found}")


def _list_moments(file: TorchFile, base: Any, groups: int) -> list[list[Mapping[str, Any]]]:
    """group -> interval -> the state of Adam. Raises GrowkitError for another optimizer."""
    found: list[list[Any]]
    if isinstance(base, Mapping):
        found = _number_moments(file, base)
    else:
        found = [
            [group] if isinstance(group, Mapping) else _take_list(file, group, "a group")
            for group in _take_list(file, base, "base_optimizer_state")
        ]
    if len(found) != groups:
        raise GrowkitError(f"{file.path} has {groups} groups, and moments of {len(found)}")
    for entry in (each for group in found for each in group):
        if not isinstance(entry, Mapping) or not set(ENTRIES) <= set(entry):
            keys = ", ".join(map(str, entry)) if isinstance(entry, Mapping) and entry else "nothing"
            raise GrowkitError(
                f"{file.path} is of an optimizer that keeps {keys}; growkit reads Adam's "
                f"{' and '.join(ENTRIES)} from checkpoints of ZeRO"
            )
    return found


def _number_moments(file: TorchFile, base: Mapping[str, Any]) -> list[list[Any]]:
    """The states that torch's own form keys by number, by group."""
    try:
        state = base["state"]
        return [[state[number] for number in group["params"]] for group in base["param_groups"]]
    except (IndexError, KeyError, TypeError):
        raise GrowkitError(
            f"{file.path}: base_optimizer_state is no optimizer's state dict"
        ) from None


def _find_count(
    file: TorchFile, state: Mapping[str, Any], moments: list[list[Mapping[str, Any]]]
) -> int | None:
    """Adam's step, which its versions keep in three places; None where none is saved."""
    base = state["base_optimizer_state"]
    groups = base.get("param_groups") if isinstance(base, Mapping) else None
    entries = [entry.get(STEP) for group in moments for entry in group]
    stated = [group.get(STEP) for group in groups or () if isinstance(group, Mapping)]
    values: list[Any] = [*entries, state.get("base_optimizer_state_step"), *stated]
    for value in values:
        if isinstance(value, Stored) and value.shape in ((), (1,)):
            value = read_scalar(file, value, STEP).value
        if type(value) in (int, float):
            require_step(file.path, "the optimizer", value)
            return int(value)
    return None


def cut_parameters(
    partitions: Sequence[Partition], groups: Sequence[Mapping[str, tuple[int, ...]]]
) -> dict[str, Cut]:
    """Each parameter's place. groups: its name and shape, in the order of the vectors.

    Raises GrowkitError unless the vectors have exactly as many numbers as the parameters.
    """
    first = partitions[0]
    odd = [each.file.path for each in partitions if len(each.masters) != len(groups)]
    if odd:
        raise GrowkitError(
            f"{odd[0]} has another number of parameter groups than the {len(groups)} of the model"
        )
    found = {}
    for number, shapes in enumerate(groups):
        wanted = sum(math.prod(shape) for shape in shapes.values())
        lean = list(partitions)
        if _count(partitions, number) != wanted:
            lean = [_strip(each, number) for each in partitions]
        vectors = {"params": _join_masters(lean, number)}
        vectors |= {slot: _join_moments(lean, number, key) for key, slot in ENTRIES.items()}
        for slot, vector in vectors.items():
            if vector.size != wanted:
                raise GrowkitError(
                    f"{first.file.path.parent}: the vectors of {slot} of group {number} have "
                    f"{vector.size:,} numbers without padding, and its parameters {wanted:,}"
                )
        start = 0
        for name, shape in shapes.items():
            found[name] = Cut(vectors, start, shape)
            start += math.prod(shape)
    return found


def _count(partitions: Sequence[Partition], group: int) -> int:
    """How many numbers the parameters of a group have, with the padding that is saved."""
    return sum(part.shape[0] for each in partitions for part in each.masters[group])


def _strip(partition: Partition, group: int) -> Partition:
    """The partition without the stated padding of a group's parameters: BF16_Optimizer saves it."""
    padding = partition.find_padding(group)
    parts = [
        replace(part, shape=(max(0, part.shape[0] - padding),)) for part in partition.masters[group]
    ]
    masters = [parts if n == group else each for n, each in enumerate(partition.masters)]
    return replace(partition, masters=masters)


def _join_masters(partitions: Sequence[Partition], group: int) -> Vector:
    """The parameters of a group: interval by interval, and rank by rank in each."""
    _check_intervals(partitions, group)
    parts = []
    for interval in range(len(partitions[0].masters[group])):
        for each in partitions:
            parts.append(each.file.open_tensor(each.masters[group][interval], "parameters"))
    return Vector(tuple(parts))


def _join_moments(partitions: Sequence[Partition], group: int, key: str) -> Vector:
    """A moment of a group, without the padding that a rank's part ends with."""
    parts = []
    for interval in range(len(partitions[0].masters[group])):
        for each in partitions:
            stored = each.moments[group][interval][key]
            _check_vector(each.file, stored, key)
            lean = each.masters[group][interval].shape[0]
            _check_padding(each, group, key, stored.shape[0] - lean)
            parts.append(each.file.open_tensor(replace(stored, shape=(lean,)), key))
    return Vector(tuple(parts))


def _check_intervals(partitions: Sequence[Partition], group: int) -> None:
    """Raise GrowkitError unless all ranks have as many parts, of parameters and of moments."""
    count = len(partitions[0].masters[group])
    for each in partitions:
        if len(each.masters[group]) != count or len(each.moments[group]) != count:
            raise GrowkitError(
                f"{each.file.path}: group {group} has {len(each.masters[group])} parts and moments "
                f"of {len(each.moments[group])}, and rank 0 has {count} parts"
            )


def _check_padding(partition: Partition, group: int, key: str, found: int) -> None:
    """Raise GrowkitError unless a moment is longer by nothing, or by the padding that is stated."""
    stated = partition.find_padding(group)
    if found and found != stated:
        raise GrowkitError(
            f"{partition.file.path}: {key} of group {group} is longer by {found} than the "
            f"parameters, and the padding is {stated}"
        )
