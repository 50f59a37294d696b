"""Text is read as what it is: whatever its name, its compression and its byte order mark.

What is not text is refused with what it is, and what could not be read would be seen.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import tarfile
import threading
import zipfile

import pytest

from growkit.errors import GrowkitError, UsageError
from growkit.textfiles import HEAD, holds_json_lines
from trainer.data.text import open_inputs

zstd = pytest.importorskip("backports.zstd")

TEXTS = ["the cat", "the dog — 犬", ""]
LINES = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS).encode()
MARK = b"\xef\xbb\xbf"
COMPRESSIONS = {
    ".gz": gzip.compress,
    ".zst": zstd.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, policy="strict"):
    return list(open_inputs([path], policy).read_documents())


def refused(path, *fragments, kind=GrowkitError):
    with pytest.raises(GrowkitError) as caught:
        read(path)
    assert caught.type is kind
    for fragment in (str(path), *fragments):
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonlines", "a.json", "A.JSONL"])
def test_json_lines_by_their_endings(tmp_path, name):
    assert read(write(tmp_path / name, LINES)) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "part-00000", "a.dat"])
def test_json_lines_by_what_they_hold(tmp_path, name):
    inputs = open_inputs([write(tmp_path / name, LINES)])
    assert list(inputs.read_documents()) == TEXTS
    assert inputs.disguised == {name}


@pytest.mark.parametrize(
    "content",
    [
        b"the cat\n" * 5 + LINES,
        LINES + b"the cat\n" * 5,
        b'{"body": "the cat"}\n',
        b'{"body": "the cat"}\nthe cat\n',
        b'{"text": 3}\n',
        b'["text"]\n',
        b"{oops\n",
        b"",
    ],
)
def test_other_text_is_one_document(tmp_path, content):
    inputs = open_inputs([write(tmp_path / "a.txt", content)])
    assert list(inputs.read_documents()) == [content.decode()]
    assert not inputs.disguised


@pytest.mark.parametrize("line", [b"the cat\n", b'{"text": "the c\n', b'{"text": 3}\n'])
def test_a_broken_line_among_json_lines_is_named(tmp_path, line):
    path = write(tmp_path / "a.txt", LINES + line + LINES)
    number = LINES.count(b"\n") + 1
    refused(path, f"line {number} ", "--errors skip")
    assert read(path, "skip") == TEXTS * 2


@pytest.mark.parametrize("name", ["a.txt", "part-00000"])
def test_json_lines_without_a_text_are_not_read_with_their_braces(tmp_path, name):
    content = b'{"body": "the cat"}\n{"body": "the dog"}\n'
    refused(write(tmp_path / name, content), "of JSON objects, one a line", "rename the file to")
    assert read(write(tmp_path / "a.md", content)) == [content.decode()]


def test_source_code_is_never_json_lines(tmp_path):
    assert read(write(tmp_path / "a.md", LINES)) == [LINES.decode()]


def test_a_line_longer_than_what_is_looked_at():
    line = b'{"id": 1, "text": "' + b"x" * HEAD
    assert holds_json_lines(line[:HEAD]) and not holds_json_lines(line[:HEAD].replace(b"{", b"x"))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_of_objects(tmp_path, indent):
    items = [{"text": text} for text in TEXTS] + [{"text": None}]
    path = write(tmp_path / "a.json", json.dumps(items, indent=indent))
    assert read(path) == [*TEXTS, ""]
    refused(write(path, json.dumps([{"text": "a"}, {"body": "b"}])), "item 2", "has 'body'")
    refused(write(path, json.dumps(["a"])), "item 1", "is not an object")
    refused(write(path, json.dumps(items)[:-5]), "is not JSON")


def test_one_json_object_over_several_lines(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"text": "the cat", "id": 1}, indent=2))
    assert read(path) == ["the cat"]
    refused(write(path, json.dumps({"name": "x"}, indent=2)), "has 'name'")


def test_a_broken_line_of_a_json_file_is_placed(tmp_path):
    path = write(tmp_path / "a.json", LINES + b'{"text": oops}\n')
    refused(path, "line 4 is not JSON")
    refused(write(path, b'{"text": oops}\n' + LINES), "line 1 is not JSON")


def test_a_null_is_an_empty_document(tmp_path):
    assert read(write(tmp_path / "a.jsonl", '{"text": null}\n{"text": "a"}\n')) == ["", "a"]


def test_lines_that_python_cannot_read_at_once(tmp_path):
    long = '{"text": "a", "id": %s}\n' % ("9" * 6000)
    assert read(write(tmp_path / "a.jsonl", long)) == ["a"]
    deep = '{"text": "a", "x": %s}\n' % ("[" * 100_000 + "]" * 100_000)
    refused(write(tmp_path / "a.jsonl", "\n" + deep), "line 2 nests too deeply")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert read(write(tmp_path / "a.txt", MARK + b"the cat")) == ["the cat"]
    assert read(write(tmp_path / "a.jsonl", MARK + LINES + MARK + LINES)) == TEXTS * 2
    array = MARK + json.dumps([{"text": "the cat"}]).encode()
    assert read(write(tmp_path / "a.json", array)) == ["the cat"]
    # One within a text is a character of it.
    assert read(write(tmp_path / "a.txt", "a\ufeffb")) == ["a\ufeffb"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_text_of_windows_in_other_encodings(tmp_path, encoding):
    assert read(write(tmp_path / "a.txt", "the cat — 猫".encode(encoding))) == ["the cat — 猫"]
    big = b"\xfe\xff" + "the cat — 猫".encode("utf-16-be")
    assert read(write(tmp_path / "b.txt", big)) == ["the cat — 猫"]
    lines = LINES.decode().encode(encoding) * 1
    assert read(write(tmp_path / "a.jsonl", gzip.compress(lines))) == TEXTS
    refused(write(tmp_path / "c.txt", "the cat".encode(encoding)[:-1]), "is not whole utf-")
    refused(write(tmp_path / "d.txt", "the cat".encode("utf-16-le")), "UTF-16 without a byte order")


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl{}", "A.JSONL{}", "a.jsonl"])
def test_compressed_files_under_any_name(tmp_path, ending, name):
    """As parallel compressors write them too: several streams, one after the other."""
    compress = COMPRESSIONS[ending]
    content = compress(LINES[:30]) + compress(LINES[30:])
    assert read(write(tmp_path / name.format(ending.upper()), content)) == TEXTS


def test_a_compressed_file_that_was_compressed_again(tmp_path):
    content = gzip.compress(zstd.compress(bz2.compress(LINES)))
    assert read(write(tmp_path / "a.jsonl.gz", content)) == TEXTS


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("damage", ["cut", "plain", "empty", "changed"])
def test_a_damaged_compressed_file_is_named(tmp_path, ending, damage):
    whole = COMPRESSIONS[ending](json.dumps({"text": os.urandom(3000).hex()}).encode())
    changed = whole[:200] + bytes(len(whole) - 200)
    content = {"cut": whole[:-200], "plain": LINES, "empty": b"", "changed": changed}[damage]
    path = write(tmp_path / f"a.jsonl{ending}", content)
    refused(path, "is not a whole " + {".gz": "gzip"}.get(ending, ending[1:]))


def frame(window_log, content):
    """A frame of one stored block (RFC 8878), as if it was compressed with that window."""
    block = (1 | len(content) << 3).to_bytes(3, "little") + content
    return b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3]) + block


@pytest.mark.parametrize("window_log", [20, 27, 28, 31])
def test_zstandard_with_a_long_window(tmp_path, window_log):
    assert read(write(tmp_path / "a.jsonl.zst", frame(window_log, LINES))) == TEXTS
    # A frame that is to be skipped may come first.
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    assert read(write(tmp_path / "a.jsonl", skipped + frame(window_log, LINES))) == TEXTS


def make_archive(kind):
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("a.txt", "the cat")
    else:
        with tarfile.open(fileobj=packed, mode=kind) as archive:
            archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return packed.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FOREIGN = {
    "a.tar": (make_archive("w"), "a tar archive"),
    "a.tar.gz": (make_archive("w:gz"), "a tar archive"),
    "a.txt": (make_archive("zip"), "a zip archive"),
    "pointer.txt": (LFS, "a Git LFS pointer"),
    "pointer.jsonl": (LFS, "a Git LFS pointer"),
    "pointer.parquet": (LFS, "a Git LFS pointer"),
    "pointer.jsonl.gz": (LFS, "a Git LFS pointer"),
    "pointer.txt.xz": (LFS, "a Git LFS pointer"),
    "a.pdf": (b"%PDF-1.7\n", "a PDF document"),
    "a.doc": (b"{\\rtf1 the cat}", "an RTF document"),
    "a.lz4": (b"\x04\x22\x4d\x18the cat", "lz4"),
    "a.bin": (bytes(100) + b"the cat", "binary"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_text_is_named(tmp_path, name):
    content, words = FOREIGN[name]
    refused(write(tmp_path / name, content), words)
    assert read(tmp_path / name, "skip") == []


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz"])
def test_a_table_is_not_read_as_a_text(tmp_path, name):
    refused(write(tmp_path / name, "id,text\n1,the cat\n"), "is a table", kind=UsageError)


def test_a_pipe_is_read_and_a_device_is_not(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=write, args=(path, gzip.compress(LINES)))
    writer.start()
    assert read(path) == TEXTS
    writer.join()
    refused("/dev/zero", "a device", kind=UsageError)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        refused(tmp_path / "socket", "a socket", kind=UsageError)


def test_home_is_known_by_its_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "the cat")
    assert read("~/a.txt") == ["the cat"]
    with pytest.raises(UsageError, match=f"no such file or directory: {tmp_path}/b.txt"):
        read("~/b.txt")
