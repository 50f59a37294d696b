"""How the state of a training lies in the keys of a distributed checkpoint.

    model.NAME  or  NAME                     the parameters
    optimizer.state.NAME.exp_avg             a moment       (optim. in OLMo-core)
    optimizer.param_groups.0.lr              an option of a group
    optimizer.param_groups.0.params          the names of a group's parameters
    optimizer.param_groups.NAME.lr           an option of one parameter, where groups are flattened

All other keys belong to the program: a dataloader's position, a schedule. They are carried along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from growkit.checkpoint.dcp_metadata import Entry
from growkit.checkpoint.dcp_names import Spelling
from growkit.checkpoint.optimizer import ENTRIES, REASONS
from growkit.checkpoint.raw import Span
from growkit.errors import GrowkitError

Keys = tuple[str | int, ...]
MODEL = "model"
OPTIMIZERS = ("optimizer", "optim")
STATE, GROUPS, PARAMS = "state", "param_groups", "params"
# How keys of moments end, wherever they lie.
MOMENTS = frozenset(REASONS).union(*ENTRIES)
# How FSDP of torch 1.x names a module's parameters after it made one of them.
FLAT = ("_flat_param", "flat_param")


@dataclass(frozen=True)
class Held:
    """An entry of a checkpoint, and the directory of the files that hold it."""

    directory: Path
    entry: Entry


@dataclass(frozen=True)
class Carried:
    """What is carried along byte for byte. spans: of each chunk of the entry."""

    entry: Entry
    spans: tuple[Span, ...]
    with_optimizer: bool


@dataclass(frozen=True)
class Distributed:
    """How a checkpoint is laid out, for what is written.

    folders: the directories of the model and of the optimizer within the checkpoint, "" for itself.
    model, optimizer: the keys before names of parameters and before the optimizer's; None for no
    optimizer. flattened: whether options are kept parameter by parameter. spelling: what parameters
    are called. others: what is carried along, by key.
    """

    folders: tuple[str, str]
    model: Keys
    optimizer: Keys | None
    flattened: bool
    spelling: Spelling
    others: Mapping[str, Carried]

    def place_parameter(self, name: str) -> Keys:
        """The keys of a parameter, by its name in the checkpoint."""
        return (*self.model, name)

    def place_state(self, name: str, entry: str) -> Keys:
        """The keys of a parameter's state."""
        return self._place((STATE, name, entry))

    def place_option(self, group: str | int, option: str) -> Keys:
        """The keys of an option of a group, or of one parameter."""
        return self._place((GROUPS, group, option))

    def _place(self, keys: Keys) -> Keys:
        assert self.optimizer is not None, "a checkpoint without optimizer has no such keys"
        last = (join_keys(keys),) if self.flattened else keys
        return (*self.optimizer, *last)


def join_keys(keys: Iterable[str | int]) -> str:
    """The key in a checkpoint of nested keys."""
    return ".".join(map(str, keys))


@dataclass
class Sorted:
    """The entries of a checkpoint, sorted.

    parameters: name -> entry. state: name -> name of the entry -> entry. options: group, or name of
    a parameter -> option -> entry. others: by key.
    """

    model: Keys = ()
    optimizer: Keys | None = None
    flattened: bool = False
    parameters: dict[str, Held] = field(default_factory=dict)
    state: dict[str, dict[str, Held]] = field(default_factory=dict)
    options: dict[str | int, dict[str, Held]] = field(default_factory=dict)
    others: dict[str, Held] = field(default_factory=dict)


def sort_entries(held: Mapping[str, Held], path: Path) -> Sorted:
    """Sort the entries of a checkpoint.

    Raises GrowkitError for one of FSDP's flat parameters, and for one that holds no model.
    """
    _refuse_flat(held, path)
    found = Sorted()
    rest: dict[str, Held] = {}
    for key, each in held.items():
        if not _take_optimizer(each, found, path):
            rest[key] = each
    bases = [each.entry.path[:-1] for each in rest.values() if each.entry.path[-2:-1] == (MODEL,)]
    found.model = bases[0] if bases else ()
    for key, each in rest.items():
        keys = each.entry.path
        if keys[:-1] != found.model or (not bases and not each.entry.dtype):
            found.others[key] = each
        elif not each.entry.dtype:
            raise GrowkitError(
                f"{path} holds an object among the parameters, {key}, and growth knows nothing of "
                "it; save the model without it"
            )
        else:
            found.parameters[str(keys[-1])] = each
    if not found.parameters:
        raise GrowkitError(
            f"{path} is a distributed checkpoint without a model: it has neither keys model.NAME "
            f"nor names of parameters, but {', '.join(list(held)[:3]) or 'nothing'}"
        )
    _refuse_further(found, path)
    return found


def _refuse_flat(held: Mapping[str, Held], path: Path) -> None:
    for key, each in held.items():
        names = [word for keys in each.entry.path for word in str(keys).split(".")]
        if any(word.startswith(FLAT) for word in names):
            raise GrowkitError(
                f"{path} holds flat parameters of FSDP in torch 1.x ({key}), in which no parameter "
                "can be told: save with use_orig_params=True and SHARDED_STATE_DICT, or with FSDP2"
            )


def _refuse_further(found: Sorted, path: Path) -> None:
    """Raise GrowkitError for further tensors of the parameters, as running averages and the moments
    of another optimizer are.
    """
    for key, each in found.others.items():
        if each.entry.dtype and each.entry.shape and _is_of_parameter(key, found):
            raise GrowkitError(
                f"{path} holds {key} beside the model and its optimizer, and growkit does not know "
                "how it grows; save without it (the one optimizer that grows is found under "
                f"{' or '.join(OPTIMIZERS)})"
            )


def _is_of_parameter(key: str, found: Sorted) -> bool:
    """Whether a key has a parameter's name within it, or ends as an optimizer's moments do."""
    words = key.split(".")
    if words[-1] in MOMENTS:
        return True
    # Not the whole key: that is a parameter itself.
    places = range(len(words) + 1)
    names = (".".join(words[start:end]) for start in places[1:] for end in places[start + 1 :])
    return any(name in found.parameters for name in names)


def _take_optimizer(held: Held, found: Sorted, path: Path) -> bool:
    """Take an entry that is of the optimizer; returns whether it is.

    Raises GrowkitError for one of a second optimizer.
    """
    keys = held.entry.path
    place = next((n for n, key in enumerate(keys) if key in OPTIMIZERS), None)
    if place is None:
        return False
    inner: Keys = keys[place + 1 :]
    flattened = len(inner) == 1
    if flattened:
        inner = _split_flattened(str(inner[0]))
    if len(inner) != 3 or inner[0] not in (STATE, GROUPS):
        return False
    kind, name, last = inner
    if kind == GROUPS and not flattened and type(name) is not int:
        return False
    base = keys[: place + 1]
    if found.optimizer not in (None, base):
        raise GrowkitError(
            f"{path} holds two optimizers, {join_keys(found.optimizer or ())} and "
            f"{join_keys(base)}, and growkit grows one; save without the other"
        )
    group = found.state if kind == STATE else found.options
    group.setdefault(name, {})[str(last)] = held  # type: ignore[arg-type]
    found.optimizer = base
    found.flattened = flattened
    return True


def _split_flattened(key: str) -> Keys:
    """state, NAME, exp_avg of 'state.NAME.exp_avg'."""
    kind, _, rest = key.partition(".")
    name, _, last = rest.rpartition(".")
    return (kind, name, last)
