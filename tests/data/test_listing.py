"""What is read of a directory is said by ending, and so is what is passed over."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from growkit.errors import GrowkitError, UsageError
from trainer.data.listing import list_inputs
from trainer.data.text import Shard, open_inputs

DOCUMENT = '{"text": "the cat"}\n'


@pytest.fixture
def folder(tmp_path):
    """A directory of files, some of which are read."""
    place = tmp_path / "texts"
    files = {
        "a.txt": "one",
        "B.TXT": "two",
        "sub/c.jsonl": DOCUMENT,
        "d.NDJSON": DOCUMENT,
        "e.json": DOCUMENT,
        "f.json": json.dumps([{"text": "three"}], indent=1),
        "g.json.gz": gzip.compress(DOCUMENT.encode()),
        "settings.json": '{"name": "x"}',
        "x.pdf": "%PDF-",
        "y.PDF": "%PDF-",
        "z.pdf": "%PDF-",
        "LICENSE": "free",
        "h.csv.gz": "x",
        "\x1b[31m.bin": "x",
    }
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return place


def test_every_file_is_read_or_named(folder):
    listing = list_inputs([folder])
    read = {path.name for _, path in listing.files}
    assert read == {
        *("a.txt", "B.TXT", "c.jsonl", "d.NDJSON", "e.json", "f.json", "g.json.gz"),
    }
    said = listing.describe(listing.files)
    assert said.startswith("reading 7 files (2 .txt, ")
    passed = said.partition("; passed over: ")[2]
    assert passed == (
        "3 .pdf (x.pdf, y.PDF, ...), 1 .bin ('\\x1b[31m.bin'), 1 .csv.gz (h.csv.gz), "
        "1 .json (settings.json), 1 without an ending (LICENSE)"
    )
    count = sum(len(names) for names in listing.passed.values())
    assert count + len(read) == sum(len(names) for _, _, names in os.walk(folder))


def test_many_endings_are_summed(tmp_path):
    for number in range(20):
        (tmp_path / f"a.{number:02}").touch()
    (tmp_path / "a.txt").write_text("x")
    listing = list_inputs([tmp_path])
    assert listing.describe(listing.files).endswith(", 1 .07 (a.07), 12 of 12 other endings")


def test_a_file_alone_is_said_too(folder):
    listing = list_inputs([folder / "a.txt"])
    assert listing.describe(listing.files) == "reading 1 file (1 .txt)"


def test_a_shard_says_its_own_files(folder):
    inputs = open_inputs([folder])
    assert len(inputs.select_files(Shard(1, 2))) == 4
    assert len(inputs.select_files(Shard(2, 2))) == 3
    assert len(inputs.select_files(Shard(2, 100))) == 7


def test_what_is_no_file_is_passed_over_and_said(folder):
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "linked").symlink_to(folder / "sub")
    listing = list_inputs([folder])
    assert listing.passed["broken links, pipes or devices"] == ["gone.txt", "pipe.txt"]
    assert listing.passed["linked directories"] == ["linked"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_that_cannot_be_read_is_named(folder):
    (folder / "sub").chmod(0)
    with pytest.raises(GrowkitError, match="cannot read the directory .*sub"):
        list_inputs([folder])


def test_a_directory_without_text_says_what_it_holds(tmp_path):
    for name in ("a.pdf", "b.pdf", "c"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError) as caught:
        list_inputs([tmp_path])
    words = str(caught.value)
    assert f"no text files under {tmp_path}; looked for .txt, .md" in words
    assert words.endswith("it holds 2 .pdf (a.pdf, b.pdf), 1 without an ending (c)")
