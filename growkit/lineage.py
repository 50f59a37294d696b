"""A model's lineage: everything that was done to it, and what follows from the order.

Files hold it as a list of JSON objects, the oldest first; what each of them states is in
`growkit.entries`. Here are the questions about several entries together: which growths no
training has followed, whose multipliers are still owed, and since when the present schedule has
gone on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from growkit.entries import Entry, Growth, Training, Unknown, read_entry
from growkit.errors import GrowkitError, UsageError
from growkit.growth.plan import MUP

SomeEntry = TypeVar("SomeEntry", bound=Entry)


@dataclass(frozen=True)
class Lineage:
    """Entries, the oldest first."""

    entries: tuple[Entry, ...] = ()

    @classmethod
    def read(cls, stored: Sequence[Any]) -> Lineage:
        """The lineage that a file holds as a list."""
        return cls(tuple(read_entry(entry) for entry in stored))

    def to_json(self) -> list[Any]:
        """The list as files hold it."""
        return [entry.to_json() for entry in self.entries]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def followed_by(self, entry: Entry) -> Lineage:
        """This lineage with one entry more."""
        return Lineage((*self.entries, entry))

    @property
    def trained(self) -> bool:
        """Whether the trainer has trained the model."""
        return self.last_as(Training) is not None

    @property
    def before_last(self) -> Lineage:
        """This lineage without its last entry."""
        return Lineage(self.entries[:-1])

    def last_as(self, kind: type[SomeEntry]) -> SomeEntry | None:
        """The last entry where it is of this kind, else None."""
        last = self.entries[-1] if self.entries else None
        return last if isinstance(last, kind) else None

    @property
    def last_training(self) -> Training:
        """The last entry, which must be a training. Raises GrowkitError where it is none."""
        last = self.last_as(Training)
        if last is None:
            raise GrowkitError("the last entry of the lineage is not a training that can be read")
        return last

    def growths_after(self, ends: Callable[[Entry], bool]) -> list[Growth]:
        """The growths at the end, in order, down to the latest entry of which `ends` is true, or to
        the latest one that made another type of the model.

        Raises GrowkitError for an entry among them that claims to be a growth or a training and
        cannot be read.
        """
        found: list[Growth] = []
        for entry in reversed(self.entries):
            _require_readable(entry)
            if ends(entry):
                break
            if isinstance(entry, Growth):
                found.insert(0, entry)
                # Plans before it are of a model of another type.
                if entry.experts is not None and entry.experts.upcycling is not None:
                    break
        return found

    def last_growths(self) -> list[Growth]:
        """The growths at the end, which no training has followed."""
        return self.growths_after(lambda entry: isinstance(entry, Training))

    def growths_owed(self) -> list[Growth]:
        """The growths whose multipliers are owed: all since the last training without them."""
        return self.growths_after(
            lambda entry: isinstance(entry, Training) and not entry.multipliers
        )

    def growths_new(self) -> list[Growth]:
        """The growths whose new parameters are still new: no training of all has followed them.

        A training of the new parameters alone leaves them new.
        """
        return self.growths_after(lambda entry: isinstance(entry, Training) and entry.trains_all)

    @property
    def continues(self) -> bool:
        """Whether there are growths owed, and all of them are exact for the training too."""
        owed = self.growths_owed()
        return bool(owed) and all(growth.continues for growth in owed)

    @property
    def multiplied(self) -> bool:
        """Whether there are growths owed whose multipliers are applied unless one says otherwise.

        They are where all are exact for the training, or one was made with --rates mup.
        """
        return self.continues or any(growth.rates == MUP for growth in self.growths_owed())

    @property
    def grown_at(self) -> int | None:
        """The step of the present schedule at which the model was last grown.

        None for a schedule that was begun since. The last entry is the present training.
        """
        for entry in reversed(self.entries):
            _require_readable(entry)
            if isinstance(entry, Growth):
                return entry.source.schedule_step if entry.source else 0
            if not isinstance(entry, Training) or not entry.continued:
                return None
        return None

    def last_growth(self, path: Path) -> Growth:
        """The growth that made the model at `path`, whose lineage this is.

        Raises UsageError when something else was done last, GrowkitError for an entry that cannot
        be read.
        """
        if not any(_claims_growth(entry) for entry in self.entries):
            raise UsageError(
                f"{path} has no growth in its lineage, so there is no plan to recompute it from"
            )
        last = self.entries[-1]
        if isinstance(last, Growth):
            return last
        if isinstance(last, Unknown) and _claims_growth(last):
            raise GrowkitError(f"{path}: {unreadable_plan(last.problem)}")
        raise UsageError(
            f"the last thing that was done to {path} is {last.operation!r}, not growth; "
            "verify compares what growth wrote"
        )


def unreadable_plan(problem: str | None) -> str:
    """What to say of a lineage whose last entry should be a growth and makes no plan."""
    return f"the lineage's last entry is not a plan that can be read: {problem}"


def _claims_growth(entry: Entry) -> bool:
    """Whether an entry is a growth or would be one if it could be read."""
    if isinstance(entry, Unknown):
        return entry.problem is not None and "maps" in entry.stored
    return isinstance(entry, Growth)


def _require_readable(entry: Entry) -> None:
    if isinstance(entry, Unknown) and entry.problem:
        raise GrowkitError(
            f"the lineage has an entry of {entry.operation!r} that cannot be read: {entry.problem}"
        )
