"""The state of an optimizer of PyTorch: which tensor is which moment of which parameter.

A state dict keys parameters by number, in the order of the optimizer's groups. transformers'
Trainer makes two groups: parameters that decay, then all others (norms and biases), each in the
order in which the model defines them. Which parameter a number means follows from that order, and
is checked: the size of every group, the shape of every moment. Where two orders would fit, or
none, the file is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from growkit.checkpoint.tensor import Tensor
from growkit.errors import GrowkitError
from growkit.models.architecture import Architecture
from growkit.models.definition import list_defined
from growkit.models.notation import Row

if TYPE_CHECKING:
    from growkit.checkpoint.torch_pickle import Stored
    from growkit.checkpoint.torch_zip import TorchFile
    from growkit.checkpoint.universal import Universal

# The entries of a parameter's state, and the slots that hold them: of Adam and AdamW, of AMSGrad,
# of Lion, of SGD with momentum and Muon, and of bitsandbytes' Adam in 32 bits.
ENTRIES: tuple[dict[str, str], ...] = (
    {"exp_avg": "mu", "exp_avg_sq": "nu"},
    {"exp_avg": "mu", "exp_avg_sq": "nu", "max_exp_avg_sq": "nu_max"},
    {"exp_avg": "mu"},
    {"momentum_buffer": "mu"},
    {"state1": "mu", "state2": "nu"},
)
SUPPORTED = (
    "Adam, AdamW (fused, foreach and paged ones too), AMSGrad, Lion, Muon and SGD's momentum"
)
STEP = "step"
# Newer versions of bitsandbytes keep the moments within one entry, a dict of them.
WRAPPER = "__bnb_optimizer_quant_state__"
# Entries of optimizers whose state cannot grow, and why.
REASONS = {
    "exp_avg_sq_row": "Adafactor keeps sums over rows and columns, not a number for each parameter",
    "exp_avg_sq_col": "Adafactor keeps sums over rows and columns, not a number for each parameter",
    "qmap1": "its moments have 8 bits, in blocks with a scale each, which growth would cut",
    "absmax1": "its moments have 8 bits, in blocks with a scale each, which growth would cut",
    "mu_product": "NAdam keeps a product of its past momenta",
}
# The key under which torch keeps the names of a group's parameters, where it was told them.
NAMES = "param_names"
# transformers' names of what does not decay, in lower case (Trainer.get_decay_parameter_names).
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@dataclass(frozen=True)
class Scalar:
    """A number that is stored as a tensor without dimensions: Adam's step."""

    dtype: str
    location: str
    value: float


@dataclass(frozen=True)
class Group:
    """A parameter group: its parameters, in order, and everything else that it states."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer's state dict says beside the moments themselves.

    entries: slot -> the name of its entry. locations: slot -> the device that it was saved from.
    steps: parameter -> its step, a number or a `Scalar`; empty for an optimizer that keeps none.
    wrapper: the entry that holds the moments, empty where they are entries themselves. schedule:
    the value of scheduler.pt where it is there and plain, else None. named: whether parameters are
    keyed by name, so that their order says nothing. universal: what else DeepSpeed's universal
    checkpoint holds, where the optimizer is of one.
    """

    groups: tuple[Group, ...]
    entries: Mapping[str, str]
    locations: Mapping[str, str]
    steps: Mapping[str, Any]
    wrapper: str = ""
    schedule: Mapping[str, Any] | None = None
    named: bool = False
    universal: Universal | None = None

    @property
    def count(self) -> int:
        """How many steps were taken: of the parameter that took most."""
        values = [step.value if isinstance(step, Scalar) else step for step in self.steps.values()]
        return int(max(values, default=0))

    @property
    def place(self) -> dict[str, int]:
        """The number of the group of each parameter."""
        return {name: n for n, group in enumerate(self.groups) for name in group.names}


@dataclass(frozen=True)
class ReadOptimizer:
    """An optimizer with its moments. slots: slot -> name in files -> tensor."""

    optimizer: Optimizer
    slots: dict[str, dict[str, Tensor]]


def read_optimizer(file: TorchFile, model: Architecture) -> ReadOptimizer:
    """The optimizer that a file holds, of this model.

    Raises GrowkitError for an optimizer that cannot grow, and for one of another model.
    """
    packed, groups = _split(file)
    state = _unwrap(packed)
    wrapper = "" if state is packed else WRAPPER
    entries = find_entries(file.path, state)
    numbers = [group["params"] for group in groups]
    shapes = _list_shapes(file, state, entries, numbers)
    names = _assign(file, model, groups, shapes)
    found = _Reading(file, state, entries, model)
    for number, name in names.items():
        found.read(number, name)
    made = tuple(
        Group(tuple(names[number] for number in group["params"]), _read_options(file, group))
        for group in groups
    )
    slots = {slot: key for key, slot in entries.items()}
    optimizer = Optimizer(made, slots, found.locations, found.steps, wrapper)
    return ReadOptimizer(optimizer, found.slots)


def _unwrap(state: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The state with its moments as entries; the same where they are."""
    entries = state.values()
    wrapped = [
        isinstance(each, Mapping) and isinstance(each.get(WRAPPER), Mapping) for each in entries
    ]
    if not all(wrapped):
        return state
    return {
        number: {key: value for key, value in entry.items() if key != WRAPPER}
        | dict(entry[WRAPPER])
        for number, entry in state.items()
    }


def _read_options(file: TorchFile, group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group states beside its parameters."""
    return {
        str(key): read_scalar(file, value, f"{key} of a group") if is_stored(value) else value
        for key, value in group.items()
        if key != "params"
    }


def is_stored(value: Any) -> TypeGuard[Stored]:
    """Whether a value of a state is a tensor in the file."""
    # Whoever holds one has imported its class; growth of other files does without.
    from growkit.checkpoint.torch_pickle import Stored

    return isinstance(value, Stored)


def read_scalar(file: TorchFile, stored: Stored, what: str) -> Scalar:
    """A number that is a tensor. Raises GrowkitError for a tensor of several."""
    if stored.shape not in ((), (1,)):
        raise GrowkitError(f"{file.path}: {what} is no number")
    value = file.open_tensor(stored, what).read()
    return Scalar(str(stored.dtype), stored.storage.location, float(value.reshape(-1)[0]))


def read_step(file: TorchFile, value: Any, name: str) -> Any:
    """A parameter's step, a number or a `Scalar`. Raises GrowkitError for anything else."""
    step = value
    if is_stored(value):
        step = read_scalar(file, value, f"the step of {name}")
    require_step(file.path, name, step)
    return step


def require_step(where: Path, name: str, step: Any) -> None:
    """Raise GrowkitError unless a parameter's step is a number from 0, plain or a `Scalar`."""
    number = step.value if isinstance(step, Scalar) else step
    if type(number) not in (int, float) or not 0 <= number < math.inf:
        raise GrowkitError(f"{where}: the step of {name} is no number from 0")


def _split(file: TorchFile) -> tuple[Mapping[Any, Any], list[dict[str, Any]]]:
    """The two parts of a state dict. Raises GrowkitError for what is none."""
    value = file.value
    wrong = f"{file.path} is no optimizer's state dict: it has no 'state' and 'param_groups'"
    if not isinstance(value, Mapping) or set(value) != {"state", "param_groups"}:
        raise GrowkitError(wrong)
    state, groups = value["state"], value["param_groups"]
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        raise GrowkitError(wrong)
    for group in groups:
        numbers = group.get("params") if isinstance(group, Mapping) else None
        if isinstance(numbers, list) and numbers and isinstance(numbers[0], str):
            raise GrowkitError(
                f"{file.path} keys parameters by name, as FSDP's full state dicts do; growkit reads"
                " numbers: FSDP.rekey_optim_state_dict gives them"
            )
        if not isinstance(numbers, list) or not all(type(each) is int for each in numbers):
            raise GrowkitError(f"{file.path}: a parameter group without the numbers of parameters")
    numbers = [number for group in groups for number in group["params"]]
    if len(set(numbers)) != len(numbers):
        raise GrowkitError(f"{file.path}: a parameter is in two groups")
    if not state:
        raise GrowkitError(f"{file.path} holds no state, as of SGD without momentum: nothing grows")
    odd = set(state) ^ set(numbers)
    if odd:
        raise GrowkitError(
            f"{file.path}: the groups list {len(numbers)} parameters, and {len(state)} have a "
            f"state; parameter {min(odd, key=str)} is on one side only"
        )
    return state, groups


def find_entries(path: Path, state: Mapping[Any, Any]) -> dict[str, str]:
    """Entry -> slot, the same for all parameters. Raises GrowkitError for an unknown optimizer.

    state: parameter -> its entries.
    """
    kinds = {
        tuple(sorted(key for key in entry if key != STEP)) if isinstance(entry, Mapping) else ()
        for entry in state.values()
    }
    keys = {key for kind in kinds for key in kind}
    for key, reason in REASONS.items():
        if key in keys:
            raise GrowkitError(f"{path} cannot grow: {reason}; growkit grows {SUPPORTED}")
    if len(kinds) == 1:
        for entries in ENTRIES:
            if entries.keys() == keys:
                return entries
    listed = ", ".join(sorted(map(str, keys))) or "nothing"
    raise GrowkitError(
        f"{path} is of an optimizer that growkit does not know, which keeps {listed}; it grows"
        f" {SUPPORTED}"
    )


def _list_shapes(
    file: TorchFile,
    state: Mapping[Any, Any],
    entries: Mapping[str, str],
    numbers: Sequence[Sequence[int]],
) -> dict[int, tuple[int, ...]]:
    """The shape of each numbered parameter: that of its moments."""
    shapes = {}
    for number in (each for listed in numbers for each in listed):
        found = set()
        for key in entries:
            stored = state[number][key]
            if not is_stored(stored) or stored.dtype.kind not in "fV":
                what = str(stored.dtype) if is_stored(stored) else type(stored).__name__
                raise GrowkitError(
                    f"{file.path}: {key} of parameter {number} is {what}, no tensor of floating-"
                    "point numbers"
                )
            found.add(stored.shape)
        if len(found) != 1:
            raise GrowkitError(f"{file.path}: the moments of parameter {number} differ in shape")
        shapes[number] = found.pop()
    return shapes


def _assign(
    file: TorchFile,
    model: Architecture,
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[int, tuple[int, ...]],
) -> dict[int, str]:
    """The name of each numbered parameter. Raises GrowkitError unless exactly one order fits."""
    defined = list_defined(model)
    wanted = {name: row.shape(model.sizes) for name, row in defined}
    numbers = [list(group["params"]) for group in groups]
    longest = max(shape[0] for shape in wanted.values())
    if all(len(shape) == 1 for shape in shapes.values()) and max(shapes.values())[0] > longest:
        raise GrowkitError(
            f"{file.path} has flat moments, one for all parameters of a module, as FSDP 1 keeps "
            "them: save it by FSDP.optim_state_dict, or train with use_orig_params=True"
        )
    if len(shapes) != len(defined):
        raise GrowkitError(
            f"{file.path} has the moments of {len(shapes)} parameters, and the model has "
            f"{len(defined)}: it is of another model, or not all of this one was trained"
        )
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for layout in _list_layouts(model, defined, groups):
        if [len(names) for names in layout] != [len(listed) for listed in numbers]:
            continue
        flat = tuple(name for names in layout for name in names)
        pairs = dict(zip((n for listed in numbers for n in listed), flat, strict=True))
        if all(wanted.get(name) == shapes[number] for number, name in pairs.items()):
            found[flat] = pairs
    if len(found) == 1:
        return next(iter(found.values()))
    sizes = " + ".join(str(len(listed)) for listed in numbers)
    problem = "more than one order of parameters fits" if found else "no known order fits"
    raise GrowkitError(
        f"{file.path} has groups of {sizes} parameters, and {problem}: growkit knows the two "
        f"groups of transformers' Trainer, one group of all, and groups with {NAMES!r}"
    )


def _list_layouts(
    model: Architecture, defined: Sequence[tuple[str, Row]], groups: Sequence[Mapping[str, Any]]
) -> Iterator[list[list[str]]]:
    """Each way in which groups of this model's parameters may have been made."""
    from growkit.checkpoint.naming import find_name

    stated = [group.get(NAMES) for group in groups]
    if any(stated):
        yield [[find_name(str(name), model) for name in names or ()] for names in stated]
        return
    order = [name for name, _ in defined]
    yield [order]
    for undecayed in list_undecayed(defined):
        yield [
            [name for name in order if name not in undecayed],
            [name for name in order if name in undecayed],
        ]


def list_undecayed(defined: Sequence[tuple[str, Row]]) -> list[frozenset[str]]:
    """The parameters without decay, by the rules of transformers' Trainer, the newest rule first.

    By name, and norms of torch's own class LayerNorm. Until 4.46 by class and the word bias:
    LayerNorms, and those other norms that a model's file had registered. Tables do not say which
    class a norm is of, so norms are in or out together; the sizes of the groups tell.
    """
    named = {name for name, _ in defined if UNDECAYED.search(name.lower())}
    norms = {name for name, row in defined if row.role == "norm"}
    biases = {name for name, _ in defined if "bias" in name}
    sets = (named | norms, named, biases | norms, biases)
    return [frozenset(each) for each in dict.fromkeys(map(frozenset, sets))]


@dataclass
class _Reading:
    """The moments of a state dict as they are opened, by slot and name."""

    file: TorchFile
    state: Mapping[Any, Any]
    entries: Mapping[str, str]
    model: Architecture
    slots: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)

    def read(self, number: int, name: str) -> None:
        """Open the moments of one parameter, and read its step.

        Those of all experts together are opened one by one, as files name them.
        """
        from growkit.checkpoint.naming import read_aliases

        for key, slot in self.entries.items():
            stored = self.state[number][key]
            tensor = self.file.open_tensor(stored, f"{key} of {name}")
            parts = read_aliases(name, tensor, self.model.family)
            self.slots.setdefault(slot, {}).update(parts)
            self.locations.setdefault(slot, stored.storage.location)
        if STEP in self.state[number]:
            self.steps[name] = read_step(self.file, self.state[number][STEP], name)
