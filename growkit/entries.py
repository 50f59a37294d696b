"""The entries of a lineage: what was done to a model, one dataclass for each kind of operation.

    Growth     depth, width or grow          Training     one run, or one part of a run
    Average    the mean of checkpoints       Conversion   import or export
    Unknown    anything else                 Origin       the model that an entry began with

Files hold an entry as a JSON object. `read_entry` reads it, and `to_json` gives back exactly what
was read. An entry that this version does not know is kept as it is. The order of entries, and
what follows from it, is in `growkit.lineage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from growkit import __version__, forms
from growkit.growth.choice import Choice
from growkit.growth.copies import Copies
from growkit.growth.multipliers import describe_multipliers, describe_rates
from growkit.growth.new import describe_new, find_new_units
from growkit.growth.plan import KEEP, MUP, Plan, build_plan
from growkit.growth.separation import parse_noise, state_noise, take_noise
from growkit.growth.vocabulary import read_row, state_function, state_tokens
from growkit.models.architecture import Architecture
from growkit.models.given import KEY as TABLE

# What a JSON value of the wrong shape raises while it is read.
MALFORMED = (AttributeError, KeyError, TypeError, ValueError)


class Described(Protocol):
    """What a lineage needs to know of a model on disk; a `Source` of growkit.checkpoint has it."""

    path: Path
    kind: str
    record: dict[str, Any]

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Origin:
    """The model that an entry began with: where it lay, which it was, how far it was trained.

    record: the checkpoint's position (step, tokens, ...), empty for a model that has none.
    """

    path: str
    kind: str
    fingerprint: str
    record: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Described) -> Origin:
        """The origin to record in an output that is made from a model on disk."""
        return cls(str(source.path), source.kind, source.fingerprint, source.record)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Origin:
        """An origin from its JSON object, which has the record's keys beside its own."""
        own = ("path", "kind", "fingerprint")
        record = {key: value for key, value in stored.items() if key not in own}
        path, kind, fingerprint = (forms.take_text(stored, key) for key in own)
        return cls(path, kind, fingerprint, forms.check_record(record))

    def to_json(self) -> dict[str, Any]:
        own = {"path": self.path, "kind": self.kind, "fingerprint": self.fingerprint}
        return own | dict(self.record)

    @property
    def schedule_step(self) -> int:
        """The step of the learning rate's schedule, 0 where no training is on record."""
        return int(self.record.get("schedule_step", 0))

    @property
    def reduction(self) -> float:
        """What plateaus had multiplied the learning rate by."""
        return float(self.record.get("reduction", 1.0))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What every entry states.

    source: None for a new model. table: the text of the table that the models were read by, where
    growkit ships no such table; else empty. more: keys that this version does not know.
    """

    operation: str
    source: Origin | None = None
    growkit: str = __version__
    table: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The entry as files hold it."""
        origin = {"source": self.source.to_json()} if self.source else {}
        stated = {"growkit": self.growkit} | origin | {"operation": self.operation}
        table = {TABLE: self.table} if self.table else {}
        return stated | self._facts() | table | dict(self.more)

    def _facts(self) -> dict[str, Any]:
        """What this kind of entry states beside what every entry does."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Growth(Entry):
    """A growth by a plan; operation is the verb.

    before, after: the size of every axis. pads: {axis: new size}. count: what became of Adam's
    count, 'kept' or 'reset'. noise: a number, or as 0.5rms. function: 'preserved', 'not preserved',
    or how far from exact. optimizer: the factors on learning rates, eps and clip with which
    training goes on exactly as the small model's would, in words; None where it does not.
    vocabulary: what new tokens' rows hold, and the most by which they raise the loss of old tokens
    (nats; None: unknown); None where there are none. new: {axis: its new units, as '1,3,8-11'}; all
    others are old; None in entries of earlier versions. experts: what became of the choice of
    experts; None where none were added. rates: 'keep', or 'mup' with `by_row`, the factors on
    learning rates.
    """

    method: str
    maps: Mapping[str, Copies]
    pads: Mapping[str, int]
    before: Mapping[str, int]
    after: Mapping[str, int]
    moments: str
    count: str
    noise: float | str
    seed: int
    function: str
    optimizer: Mapping[str, Any] | None = None
    vocabulary: Mapping[str, Any] | None = None
    new: Mapping[str, str] | None = None
    experts: Choice | None = None
    rates: str = KEEP
    by_row: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, source: Origin | None = None) -> Growth:
        """The entry of a growth by this plan."""
        maps = {
            axis: Copies(axis_map.index.tolist(), axis_map.share.tolist())
            for axis, axis_map in plan.maps.items()
        }
        return cls(
            source=source,
            operation=plan.verb,
            method=plan.method,
            maps=maps,
            pads=plan.pads,
            before=plan.model.sizes,
            after=plan.grown.sizes,
            moments=plan.moments,
            count="reset" if plan.moments == "reset" else "kept",
            noise=state_noise(plan.noise, plan.noise_unit),
            seed=plan.seed,
            function=state_function(plan),
            vocabulary=state_tokens(plan),
            new=describe_new(find_new_units([plan])),
            experts=plan.experts,
            optimizer=describe_multipliers(plan) if plan.continues else None,
            rates=plan.rates,
            by_row=describe_rates(plan) if plan.rates == MUP else {},
            table=plan.model.family.given,
        )

    @classmethod
    def read(cls, stored: Mapping[str, Any], common: dict[str, Any]) -> Growth:
        maps = forms.take_object(stored, "maps")
        sizes = forms.take_object(stored, "sizes")
        before = forms.take_sizes(sizes, "before")
        after = forms.take_sizes(sizes, "after")
        if before.keys() != after.keys():
            raise ValueError("the sizes before and after are of different axes")
        rates = forms.take_object(stored, "rates") if "rates" in stored else {"rule": KEEP}
        return cls(
            **common,
            method=forms.take_text(stored, "method"),
            moments=forms.take_text(stored, "moments"),
            count=forms.take_text(stored, "count"),
            function=forms.take_text(stored, "function"),
            maps={axis: Copies.read(forms.take_object(maps, axis)) for axis in maps},
            pads=forms.take_sizes(stored, "pads"),
            noise=take_noise(stored),
            seed=forms.take_whole(stored, "seed"),
            before=before,
            after=after,
            optimizer=forms.take_object(stored, "optimizer") if "optimizer" in stored else None,
            vocabulary=stored.get("vocabulary"),
            new=forms.take_object(stored, "new") if "new" in stored else None,
            experts=Choice.read(stored["experts"]) if "experts" in stored else None,
            rates=forms.take_text(rates, "rule"),
            by_row=forms.take_object(rates, "learning_rate") if "rates" in stored else {},
        )

    def _facts(self) -> dict[str, Any]:
        optimizer = {"optimizer": self.optimizer} if self.optimizer is not None else {}
        return self.resolved() | optimizer

    def resolved(self) -> dict[str, Any]:
        """Every value of the plan, as JSON."""
        maps = {axis: {"index": m.index, "share": m.share} for axis, m in self.maps.items()}
        rates = {"rule": self.rates, "learning_rate": dict(self.by_row)}
        return {
            "operation": self.operation,
            "method": self.method,
            "maps": maps,
            "pads": self.pads,
            "sizes": {"before": self.before, "after": self.after},
            "moments": self.moments,
            "count": self.count,
            "noise": self.noise,
            "seed": self.seed,
            "function": self.function,
            **({"vocabulary": dict(self.vocabulary)} if self.vocabulary else {}),
            **({"new": dict(self.new)} if self.new is not None else {}),
            **({"experts": self.experts.to_json()} if self.experts else {}),
            **({"rates": rates} if self.rates != KEEP else {}),
        }

    @property
    def preserved(self) -> bool:
        """Whether the grown model computes the source's function."""
        return self.function == "preserved"

    @property
    def continues(self) -> bool:
        """Whether, with the factors stated, training goes on exactly as the small model's would."""
        return self.optimizer is not None

    @property
    def changes(self) -> dict[str, tuple[int, int]]:
        """{axis: (size before, size after)} of the axes that grew."""
        return {
            axis: (self.before[axis], size)
            for axis, size in self.after.items()
            if self.before[axis] != size
        }

    def plan(self, model: Architecture) -> Plan:
        """The plan that was carried out, for a model of the sizes before it.

        Raises KeyError, TypeError or ValueError, or what a plan raises, for values that make no
        plan.
        """
        maps = {axis: copies.axis_map(model.sizes[axis]) for axis, copies in self.maps.items()}
        options: dict[str, Any] = {"moments": self.moments, "seed": self.seed}
        options["noise"], options["noise_unit"] = parse_noise(self.noise)
        options["experts"], options["rates"] = self.experts, self.rates
        if self.vocabulary:
            options["vocab_fill"] = self.vocabulary["embedding"]
            options["vocab_row"] = read_row(self.vocabulary.get("row"), model)
        return build_plan(self.operation, self.method, model, maps, self.pads, **options)

    def plan_within(self, model: Architecture) -> Plan:
        """The same plan, for a model of this lineage at whatever sizes it has now."""
        return self.plan(model.resize(self.before))


@dataclass(frozen=True)
class Branch:
    """What a lineage says of a run that began as a branch of another, as an annealing does.

    rate: the learning rate it began at; to: the one it ends at; tokens: over how many.
    """

    verb: str
    rate: float
    to: float
    tokens: int

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Branch:
        rates = (forms.take_number(stored, "from"), forms.take_number(stored, "to"))
        return cls(forms.take_text(stored, "verb"), *rates, forms.take_whole(stored, "tokens"))

    def to_json(self) -> dict[str, Any]:
        return {"verb": self.verb, "from": self.rate, "to": self.to, "tokens": self.tokens}


@dataclass(frozen=True, kw_only=True)
class Training(Entry):
    """A training, from its start or from a growth on the way.

    multipliers: whether the factors of the growths before it are applied. config: the resolved
    configuration, as nested values.
    """

    operation: str = "train"
    multipliers: bool
    config: Mapping[str, Any]
    branch: Branch | None = None

    @classmethod
    def read(cls, stored: Mapping[str, Any], common: dict[str, Any]) -> Training:
        branch = Branch.read(stored["branch"]) if "branch" in stored else None
        config = forms.take_object(stored, "config")
        forms.take_object(config, "schedule")
        multipliers = forms.take_flag(stored, "multipliers")
        return cls(**common, multipliers=multipliers, config=config, branch=branch)

    def _facts(self) -> dict[str, Any]:
        branch = {"branch": self.branch.to_json()} if self.branch else {}
        return {"multipliers": self.multipliers, "config": self.config} | branch

    @property
    def trains_all(self) -> bool:
        """Whether all parameters were trained, and not only those that growth had made new."""
        return bool(self.config.get("train", "all") == "all")

    @property
    def continued(self) -> bool:
        """Whether the schedule went on where the source's stood, and did not begin again."""
        return bool(self.config["schedule"].get("continued"))


@dataclass(frozen=True, kw_only=True)
class Average(Entry):
    """The weighted mean of several models' parameters. All else is the last one's, the source's."""

    operation: str = "average"
    averaged: Sequence[Origin]
    weights: Sequence[float]

    @classmethod
    def read(cls, stored: Mapping[str, Any], common: dict[str, Any]) -> Average:
        averaged = [Origin.read(origin) for origin in stored["averaged"]]
        return cls(**common, averaged=averaged, weights=forms.take_numbers(stored, "weights"))

    def _facts(self) -> dict[str, Any]:
        averaged = [origin.to_json() for origin in self.averaged]
        return {"averaged": averaged, "weights": list(self.weights)}


@dataclass(frozen=True, kw_only=True)
class Conversion(Entry):
    """An import from a Hugging Face directory, or an export to one.

    dtype: that of the parameters written.
    """

    dtype: str

    @classmethod
    def read(cls, stored: Mapping[str, Any], common: dict[str, Any]) -> Conversion:
        return cls(**common, dtype=forms.take_text(stored, "dtype"))

    def _facts(self) -> dict[str, Any]:
        return {"dtype": self.dtype}


@dataclass(frozen=True, kw_only=True)
class Unknown(Entry):
    """An entry of another program or version, kept as it is.

    problem: what is wrong with an entry that claims to be of a known kind.
    """

    stored: Any
    problem: str | None = None

    @classmethod
    def of(cls, stored: Any, problem: str | None = None) -> Unknown:
        """The entry, with what can be read of its operation and its source."""
        stated = stored if isinstance(stored, Mapping) else {}
        try:
            source = Origin.read(stated["source"])
        except MALFORMED:
            source = None
        operation = stated.get("operation")
        if not isinstance(operation, str):
            operation = "unknown"
        return cls(operation=operation, source=source, stored=stored, problem=problem)

    def to_json(self) -> Any:
        return self.stored


KINDS: dict[str, type[Growth | Training | Average | Conversion]] = {
    "train": Training,
    "average": Average,
    "import": Conversion,
    "export": Conversion,
}


def read_entry(stored: Any) -> Entry:
    """The entry that a JSON value of a lineage is.

    `Unknown` for a value of no known kind, and for one that misses a part.
    """
    if not isinstance(stored, Mapping):
        return Unknown.of(stored)
    # A verb that grows may be called anything.
    kind = Growth if "maps" in stored else KINDS.get(str(stored.get("operation")))
    if kind is None:
        return Unknown.of(stored)
    try:
        common: dict[str, Any] = {
            name: forms.take_text(stored, name) for name in ("operation", "growkit")
        }
        if "source" in stored:
            common["source"] = Origin.read(stored["source"])
        if isinstance(stored.get(TABLE), str):
            common["table"] = stored[TABLE]
        entry = kind.read(stored, common)
    except MALFORMED as problem:
        return Unknown.of(stored, repr(problem))
    known = entry.to_json()
    more = {key: value for key, value in stored.items() if key not in known}
    return replace(entry, more=more)
