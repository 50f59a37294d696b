"""Reading text: every form gives the same documents, and shards are all of them once.

What cannot be read is named.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

import trainer.data.text as module
from growkit import textfiles
from growkit.errors import GrowkitError, UsageError
from trainer.data.cleaning import Cleaner
from trainer.data.text import Shard, group_documents, open_inputs

zstd = pytest.importorskip("backports.zstd")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"text {number}, of its own: 日本\n" * (number % 7) for number in range(300)]


def json_lines(texts):
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()


def write_parquet(path, texts, kind=None, **options):
    columns = {
        "id": list(range(len(texts))),
        "text": pyarrow.array(texts, kind or pyarrow.string()),
    }
    parquet.write_table(pyarrow.table(columns), path, **options)


def refused(kind, path, *fragments):
    with pytest.raises(GrowkitError) as caught:
        list(open_inputs([path]).read_documents())
    assert caught.type is kind
    for fragment in (str(path), *fragments):
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """The same texts in every form, a file each."""
    lines = json_lines(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    # As parallel compressors write them: several frames, one after the other.
    (tmp_path / "c.jsonl.zst").write_bytes(
        zstd.compress(lines[:5000]) + zstd.compress(lines[5000:])
    )
    write_parquet(tmp_path / "d.parquet", TEXTS, row_group_size=70)
    write_parquet(tmp_path / "e.parquet", TEXTS, pyarrow.large_string(), compression="zstd")
    return tmp_path


@pytest.mark.parametrize("size", [1, 1000, 1 << 18])
def test_every_form_gives_the_same_documents(folder, monkeypatch, size):
    monkeypatch.setattr(module, "BLOCK_SIZE", size)
    for file in sorted(folder.iterdir()):
        assert list(open_inputs([file]).read_documents()) == TEXTS
    assert list(open_inputs([folder]).read_documents()) == TEXTS * 5


def test_another_document_would_be_seen(folder):
    """The sibling of the test above."""
    (folder / "a.jsonl").write_bytes(json_lines([*TEXTS[1:], TEXTS[0]]))
    assert list(open_inputs([folder / "a.jsonl"]).read_documents()) != TEXTS


def test_plain_text_may_be_compressed(tmp_path):
    for name, content in [
        ("a.txt.zst", zstd.compress(b"one\r\n")),
        ("b.rst.gz", gzip.compress(b"two")),
        ("c.py", b"3"),
    ]:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "d.bin.zst").write_bytes(zstd.compress(b"no text by its name"))
    assert list(open_inputs([tmp_path]).read_documents()) == ["one\r\n", "two", "3"]


def test_a_last_line_may_lack_its_end(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "two"])[:-1])
    assert list(open_inputs([tmp_path]).read_documents()) == ["one", "two"]


def test_blocks_are_of_bounded_size_and_long_documents_alone(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_SIZE", 10)
    blocks = list(group_documents(["four", "four", "four", "x" * 30, "four"]))
    assert [block.texts for block in blocks] == [["four", "four"], ["four"], ["x" * 30], ["four"]]
    assert [block.number for block in blocks] == [0, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_of_files_are_all_files_once(folder, count):
    inputs = open_inputs([folder, folder / "a.jsonl"])
    parts = [shard_of(inputs, number, count) for number in range(1, count + 1)]
    assert sum(map(Counter, parts), Counter()) == Counter(TEXTS * 6)
    assert parts[0][: len(TEXTS)] == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "d.parquet"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_shards_of_one_file_are_all_blocks_once(folder, monkeypatch, name, count):
    monkeypatch.setattr(module, "BLOCK_SIZE", 500)
    inputs = open_inputs([folder / name])
    parts = [shard_of(inputs, number, count) for number in range(1, count + 1)]
    assert sum(map(Counter, parts), Counter()) == Counter(TEXTS)
    assert max(map(len, parts)) < 2 * len(TEXTS) / count


def test_a_shard_taken_twice_would_be_seen(folder, monkeypatch):
    """The sibling of the two tests above: shards that begin one later lose the first block."""
    monkeypatch.setattr(
        Shard, "select", lambda shard, things: list(things)[shard.number :: shard.count]
    )
    inputs = open_inputs([folder])
    parts = [shard_of(inputs, number, 3) for number in (1, 2, 3)]
    assert sum(map(Counter, parts), Counter()) != Counter(TEXTS * 5)


def shard_of(inputs, number, count):
    return [
        text
        for block in inputs.read_blocks(Shard(number, count))
        for text, _ in block.read_documents(Cleaner("strict"))
    ]


def test_a_shard_reads_its_own_files_only(folder):
    (folder / "b.jsonl.gz").write_bytes(b"broken")
    assert shard_of(open_inputs([folder]), 1, 5) == TEXTS
    with pytest.raises(GrowkitError, match="b.jsonl.gz"):
        shard_of(open_inputs([folder]), 2, 5)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "-1/4", "1/4/2", ""])
def test_shards_that_make_no_sense(text):
    with pytest.raises(UsageError, match="1/8 for the first of eight"):
        Shard.parse(text)


def test_a_shard_by_its_name():
    assert Shard.parse("3/8") == Shard(3, 8)


def test_broken_files_are_named(tmp_path):
    whole = zstd.compress(json_lines(TEXTS))
    for number, content in enumerate([whole[:-20], whole[:6] + b"\xff" * 30, b"plain"]):
        path = tmp_path / f"{number}.jsonl.zst"
        path.write_bytes(content)
        refused(GrowkitError, path, "not a whole zst file")
    write_parquet(tmp_path / "d.parquet", TEXTS)
    whole = (tmp_path / "d.parquet").read_bytes()
    for number, content in enumerate([whole[:-20], b"plain", b""]):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(content)
        refused(GrowkitError, path, "not a whole Parquet file")


def test_a_parquet_file_needs_its_column_of_strings(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"content": ["x"], "text": [3]}), path)
    refused(GrowkitError, path, 'a column "text" of strings; it has content (string), text (int64)')


def test_a_null_is_an_empty_document(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", None, "two"])
    assert list(open_inputs([tmp_path]).read_documents()) == ["one", "", "two"]


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.txt.zst", "backports.zstd"), ("a.parquet", "pyarrow"), ("a.arrow", "pyarrow")],
)
def test_a_package_that_is_missing_is_named_with_its_command(tmp_path, monkeypatch, name, package):
    def missing(module):
        raise ImportError(module)

    monkeypatch.setattr(textfiles.importlib, "import_module", missing)
    (tmp_path / name).write_bytes(zstd.compress(b"x") if name.endswith("zst") else b"x")
    refused(UsageError, tmp_path / name, f"needs the package {package}: pip install {package}")
