"""The documentation's commands are ones that growkit takes, and its pages make a site."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from growkit.cli.verbs import growkit
from growkit.errors import UsageError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def list_commands(text: str) -> list[list[str]]:
    """The growkit commands in a page's shell blocks, as words."""
    commands = []
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["growkit"]:
                commands.append(words[1:])
    return commands


def find_problem(words: list[str]) -> str | None:
    """What growkit says of a command before it does anything, None for nothing."""
    context = click.Context(growkit)
    try:
        command = growkit.get_command(context, words[0])
        if command is None:
            return f"there is no verb {words[0]}"
        with command.make_context(words[0], words[1:], resilient_parsing=False):
            return None
    except click.ClickException as problem:
        return problem.format_message()
    except UsageError as problem:
        # A reader has the files that a page names.
        missing = str(problem).startswith("there is no table file")
        return None if missing else str(problem)
    except click.exceptions.Exit:
        return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_is_one_that_growkit_takes(page):
    problems = {" ".join(words): find_problem(words) for words in list_commands(page.read_text())}
    assert {words: said for words, said in problems.items() if said} == {}


def test_a_command_that_growkit_does_not_take_is_noticed():
    page = "```sh\ngrowkit depth --maps 18:24 \\\n    SRC OUT   # a comment\ngrowkit grw SRC\n```\n"
    first, second = map(find_problem, list_commands(page))
    assert "--maps" in first and "grw" in second


def test_the_pages_are_a_site_without_a_dead_link(tmp_path):
    pytest.importorskip(
        "material", reason="mkdocs-material is not installed: pip install '.[docs]'"
    )
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "-d"]
    done = subprocess.run(
        [*command, str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "site" / "growing" / "index.html").exists()
