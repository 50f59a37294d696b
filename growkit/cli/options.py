"""What options and arguments of verbs take: counts as people write them, paths with a tilde; and
several options as one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def combine_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator of a verb for several, whose options its help shows in their order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


class Count(click.ParamType):  # type: ignore[type-arg]
    """A whole number, which may be written 32k, 1.5M or 1e6."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; one that is below 1 is left to the verb to refuse. Raises UsageError."""
        from growkit.quantity import parse_count

        if isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            option = param.opts[0] if param is not None else "a count"
            return parse_count(value, option)


class PathName(click.ParamType):  # type: ignore[type-arg]
    """A path, in which ~ is the home directory: no shell expands it after an equals sign."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path with the home directory in the place of ~."""
        return os.path.expanduser(value)


COUNT = Count()
PATH = PathName()


def _use_table(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Have the verb read models of the table's type by it."""
    from growkit.models.given import read_table, use_family

    if value is not None:
        ctx.with_resource(use_family(read_table(Path(os.path.expanduser(value)))))


# Of the verbs that grow.
add_rates_option = click.option(
    "--rates",
    default="keep",
    metavar="keep|mup",
    help="Learning rates of the training after growth in width: keep (default; multiplied only "
    "where training then goes on exactly), or mup, those of matrices times fan-in before over "
    "fan-in after.",
)
# The option of verbs that open models. They need not know of it: it holds while they run.
add_table_option = click.option(
    "--table",
    metavar="FILE",
    expose_value=False,
    callback=_use_table,
    help="Read models of the type that FILE is for by its table, as `growkit derive` writes it. "
    "What is grown by it keeps the table in its lineage.",
)
