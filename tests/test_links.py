"""The documentation's form: its links lead somewhere, the README is short, the site has all pages.

Nothing is fetched: links to other sites are left alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Continuous integration takes the tests' command from the first line of the README with this word.
COMMAND = "pytest"


def list_prose(text: str) -> list[str]:
    """The lines of a page outside fenced blocks of code."""
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append(line)
    return lines


def make_anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading: lower case, marks left out, hyphens for spaces."""
    words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return words.replace(" ", "-")


def list_anchors(page: Path) -> set[str]:
    headings = [line for line in list_prose(page.read_text()) if re.match(r"#+ ", line)]
    return {make_anchor(line.lstrip("#")) for line in headings}


def find_dead_links(page: Path) -> list[str]:
    """The relative links of a page without a file, or without the heading that they name."""
    dead = []
    for link in LINK.findall("\n".join(list_prose(page.read_text()))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    assert find_dead_links(page) == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One, two\n[a](#one-two) [b](#three) [c](no.md) [d](https://x.y)\n")
    assert find_dead_links(page) == ["#three", "no.md"]


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    (command, *_) = [line for line in lines if COMMAND in line]
    assert command.startswith("python3 -m venv .venv && ") and f" && .venv/bin/{COMMAND}" in command
    # The command alone may be longer: it has to be one line.
    assert [line for line in lines if len(line) > 100 and line != command] == []


def test_the_site_has_every_page():
    site = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"\S+\.md", site))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[2:]}


def test_the_readme_shows_every_kind_of_command():
    from growkit.cli.verbs import VERBS

    text = (ROOT / "README.md").read_text()
    commands = text[text.index("## Commands") : text.index("## Development")]
    assert [verb for verb in VERBS if f"`{verb}" not in commands] == []
