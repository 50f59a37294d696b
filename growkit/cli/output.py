"""How verbs print: --json and --quiet, the same for every verb that has a result.

`add_output_options` gives both options to a verb when it is looked up. A verb says the same thing
to everybody: `tell` what it is about to do, `remark` what is beside the result, and `show_result`
the result, in words and as a document. What is printed of it, and where, is decided here:

             tell              remark            show_result
    (none)   standard output   standard error    its words
    --json   nothing           standard error    its document
    --quiet  nothing           nothing           its words, in brief where it has some
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

# Verbs without a document: what they print is for a shell, a table for a file, or other verbs at
# work.
WITHOUT = ("completion", "derive", "quickstart")
# Keys of a context's `meta`.
JSON = "growkit.json"
QUIET = "growkit.quiet"
HELP = {
    "json": "Print the result as one JSON document.",
    "quiet": "Print the result alone: no progress, no notes, no plan.",
}

# Words, or the function that prints them; a document, or the function that makes it.
Words = str | Callable[[], None]
Document = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


def add_output_options(name: str, command: click.Command) -> None:
    """Give a verb --json and --quiet, unless it has no result or has them already."""
    taken = {option for parameter in command.params for option in parameter.opts}
    if name in WITHOUT or "--json" in taken:
        return
    for option, key in (("json", JSON), ("quiet", QUIET)):
        command.params.append(
            click.Option(
                [f"--{option}"],
                is_flag=True,
                expose_value=False,
                callback=_keep(key),
                help=HELP[option],
            )
        )


def _keep(key: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    """The callback that keeps an option's value where `is_json` and `is_quiet` find it."""

    def keep(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        ctx.meta[key] = value

    return keep


def _is_set(key: str) -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(key))


def is_json() -> bool:
    """Whether the verb that runs now prints a document."""
    return _is_set(JSON)


def is_quiet() -> bool:
    """Whether the verb that runs now prints its result alone."""
    return _is_set(QUIET)


def tell(words: str) -> None:
    """Print what a verb is about to do, for people."""
    from growkit.cli.terminal import say

    if not is_json() and not is_quiet():
        say(words)


def remark(words: str) -> None:
    """Print a line that is not the result."""
    from growkit.cli.terminal import say

    if not is_quiet():
        say(words, err=True)


def show_result(words: Words, document: Document, brief: str | None = None) -> None:
    """Print a verb's result: its words, or with --json its document.

    Both may be functions, of which only the one that is needed is called: that of the words prints
    them itself, that of the document returns it. brief: the words with --quiet, where they are
    fewer.
    """
    from growkit.cli.terminal import say

    if is_json():
        found = document() if callable(document) else document
        click.echo(format_json(dict(found)))
    elif is_quiet() and brief is not None:
        say(brief)
    elif callable(words):
        words()
    else:
        say(words)


def format_json(value: dict[str, Any]) -> str:
    """One JSON document; numbers that are not finite are null."""
    from growkit.checkpoint.files import replace_nonfinite

    return json.dumps(replace_nonfinite(value), allow_nan=False)
