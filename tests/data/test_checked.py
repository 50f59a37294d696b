"""Token files are checked at their first use, and what was found is used as long as it holds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from growkit.errors import GrowkitError, UsageError
from trainer.data import checked
from trainer.data.checked import check_content
from trainer.data.corpus import check_vocabulary
from trainer.data.tokens import TokenFile, TokenWriter

IDS = np.arange(1000) % 97


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test, and files that count as old at once."""
    monkeypatch.setenv("GROWKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(checked, "_YOUNG", 0.0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def reads(monkeypatch):
    """The names of the token files that were read whole, in order."""
    names = []
    examine = checked.examine

    def noting(token_file):
        names.append(token_file.name)
        return examine(token_file)

    monkeypatch.setattr(checked, "examine", noting)
    return names


def write(directory, manifest=True, ids=IDS):
    directory.mkdir()
    with TokenWriter(directory, 100) as writer:
        writer.add(ids)
    if manifest:
        content = {**writer.summary(), "vocab_size": 100, "end_of_text": 0}
        (directory / "manifest.json").write_text(json.dumps(content))
    return directory


def change(path: Path, place: int = 0) -> None:
    """Write another byte into a file, which keeps its size."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_file_is_read_once(tmp_path, reads, manifest):
    path = write(tmp_path / "data", manifest)
    found = [check_content(TokenFile.open(path)) for _ in range(3)]
    assert len(reads) == 1
    assert len(set(found)) == 1 and (found[0].lowest, found[0].highest) == (0, 96)


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx"])
@pytest.mark.parametrize("seen", [True, False])
def test_a_file_that_has_changed_is_refused(tmp_path, name, seen):
    path = write(tmp_path / "data")
    if seen:
        check_content(TokenFile.open(path))
    # An index that contradicts itself is refused before, so here its manifest is another's.
    if name == "tokens.idx":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["idx_sha256"] = "0" * 64
        (path / "manifest.json").write_text(json.dumps(manifest))
    else:
        change(path / name)
    with pytest.raises(GrowkitError, match=f"{name} has changed since it was made") as caught:
        check_content(TokenFile.open(path))
    assert "\n" not in str(caught.value) and not isinstance(caught.value, UsageError)


def test_a_change_that_keeps_size_and_time_is_seen(tmp_path):
    path = write(tmp_path / "data")
    check_content(TokenFile.open(path))
    times = os.stat(path / "tokens.bin")
    change(path / "tokens.bin")
    os.utime(path / "tokens.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(GrowkitError, match="has changed"):
        check_content(TokenFile.open(path))


def test_a_file_just_written_is_not_remembered(tmp_path, monkeypatch, reads, cache):
    """Within the tick of a clock it could be written again without another time."""
    monkeypatch.setattr(checked, "_YOUNG", 3600.0)
    path = write(tmp_path / "data")
    for _ in range(2):
        check_content(TokenFile.open(path))
    assert len(reads) == 2 and not cache.exists()


def test_another_file_of_the_same_name_is_read(tmp_path, reads):
    path = write(tmp_path / "data", manifest=False)
    check_content(TokenFile.open(path))
    path.rename(tmp_path / "old")
    write(path, manifest=False, ids=IDS + 2)
    assert check_content(TokenFile.open(path)).highest == 98
    assert len(reads) == 2


@pytest.mark.parametrize(
    "garbage", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"stamps": 3, "dtype": 3, "content": {}}']
)
def test_a_damaged_cache_is_no_harm(tmp_path, reads, cache, garbage):
    path = write(tmp_path / "data")
    check_content(TokenFile.open(path))
    (entry,) = cache.iterdir()
    entry.write_bytes(garbage)
    check_content(TokenFile.open(path))
    assert len(reads) == 2
    check_content(TokenFile.open(path))
    assert len(reads) == 2


def test_values_of_another_type_in_the_cache_are_not_taken(tmp_path, reads, cache):
    path = write(tmp_path / "data")
    check_content(TokenFile.open(path))
    (entry,) = cache.iterdir()
    stored = json.loads(entry.read_text())
    entry.write_text(json.dumps(stored | {"content": stored["content"] | {"highest": "96"}}))
    assert check_content(TokenFile.open(path)).highest == 96
    assert len(reads) == 2


def test_without_a_place_for_the_cache_files_are_read_every_time(tmp_path, monkeypatch, reads):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GROWKIT_CACHE_DIR", str(tmp_path / "file"))
    path = write(tmp_path / "data")
    for _ in range(2):
        check_content(TokenFile.open(path))
    assert len(reads) == 2


def test_a_file_that_is_written_to_meanwhile_is_not_taken(tmp_path, monkeypatch):
    path = write(tmp_path / "data")
    examine = checked.examine

    def disturbed(token_file):
        found = examine(token_file)
        time.sleep(0.02)
        change(path / "tokens.bin")
        return found

    monkeypatch.setattr(checked, "examine", disturbed)
    with pytest.raises(GrowkitError, match="was written to while it was read"):
        check_content(TokenFile.open(path))


def test_ids_of_a_changed_file_without_a_manifest_are_named(tmp_path):
    path = write(tmp_path / "data", manifest=False)
    check_vocabulary(TokenFile.open(path), 100)
    (path / "tokens.bin").write_bytes(b"\xf0\x7f" * len(IDS))
    with pytest.raises(UsageError, match="ids up to 32752 occur"):
        check_vocabulary(TokenFile.open(path), 100)


@pytest.mark.parametrize(
    "changed",
    [
        {"vocab_size": None},
        {"vocab_size": True},
        {"vocab_size": 0},
        {"end_of_text": 100},
        {"end_of_text": "0"},
        {"bin_sha256": 5},
        {"bin_sha256": None},
        {"bin_sha256": "x"},
        {"idx_sha256": []},
        {"tokenizer_sha256": {}},
        {"shard": "a/b"},
        {"shard": 3},
    ],
)
def test_values_of_a_manifest_that_cannot_be(tmp_path, changed):
    path = write(tmp_path / "data") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(GrowkitError, match=f"says {next(iter(changed))} = ") as caught:
        TokenFile.open(tmp_path / "data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "manifest.json"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    path = write(tmp_path / "data")
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
    with pytest.raises(GrowkitError, match=f"{name} is a Git LFS pointer, not the file"):
        TokenFile.open(path)


def test_a_manifest_that_nests_deeply(tmp_path):
    path = write(tmp_path / "data") / "manifest.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(GrowkitError, match="is not valid JSON"):
        TokenFile.open(tmp_path / "data")
