"""What every architecture states of itself: its table, its axes' sizes, the configuration fields that hold them.

An architecture is a frozen dataclass of sizes and options. Growth, files and plans work on this interface
alone, so a further architecture is a table, a reader and a writer of its config.json, and its rotary and
norm rules. Each one's facts are in its own file, and which there are is known to `growkit.models`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from growkit.errors import GrowkitError
from growkit.models.notation import Table


class Architecture:
    """A model's sizes and options.

    fields: the configuration field of each axis. kind: its model_type. norm: 'layer' (mean and variance) or
    'rms'. heads: the axis that more heads grow. head_name: the head's parameter, which files may hold although
    it is tied. buffers: how names end that old checkpoints carry and no model of today reads. tied: whether the
    head is the embedding. norm_eps and initializer_range have no unit; rotary is how many of a head's dimensions
    are rotated.
    """

    fields: ClassVar[Mapping[str, str]]
    kind: ClassVar[str]
    norm: ClassVar[str]
    heads: ClassVar[str]
    head_name: ClassVar[str]
    buffers: ClassVar[tuple[str, ...]]

    layer: int
    embed: int
    mlp: int
    vocab: int
    tied: bool
    initializer_range: float

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every axis of the table."""
        raise NotImplementedError

    @property
    def table(self) -> Table:
        """The axis table, for a tied or an untied head as the model has it."""
        raise NotImplementedError

    @property
    def norm_eps(self) -> float:
        raise NotImplementedError

    @property
    def rotary(self) -> int:
        raise NotImplementedError

    def resized(self, sizes: Mapping[str, int], norm_eps: float | None = None) -> Architecture:
        """This model at other sizes, the number of rotated dimensions kept."""
        raise NotImplementedError

    def written(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The config.json content of the model; fields of `base` that say nothing of it are kept."""
        raise NotImplementedError

    @property
    def coupled(self) -> bool:
        """Whether embed is heads x head_dim, so that one cannot change without another."""
        return self.embed == self.head_count * self.sizes["head_dim"]

    @property
    def head_count(self) -> int:
        """How many query heads there are."""
        return self.sizes[self.heads] * self.sizes.get("group", 1)

    @property
    def parameters(self) -> int:
        """How many numbers the model holds, a tied embedding counted once."""
        return count_parameters(self.table, self.sizes)


def count_parameters(table: Table, sizes: Mapping[str, int]) -> int:
    """The number of elements of all parameters of `table` at `sizes`."""
    return sum(
        math.prod(row.shape(sizes)) * (sizes[row.stacked.name] if row.stacked else 1)
        for row in table.rows
    )


def check_sizes(model: Architecture) -> None:
    """Raise GrowkitError, naming the configuration field, for a size that is no whole number of at least 1."""
    for axis, field in model.fields.items():
        size = getattr(model, axis)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise GrowkitError(f"{field} must be a whole number of at least 1, got {size!r}")


def whole(values: Mapping[str, Any], field: str) -> int:
    """A field of a config.json that holds a whole number. Raises GrowkitError for anything else."""
    value = values[field]
    if isinstance(value, bool) or not isinstance(value, int):
        raise GrowkitError(f"{field} must be a whole number, got {value!r}")
    return value
