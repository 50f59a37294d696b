"""Buckets as sources and outputs: the same bytes as on a disk, whole or not at all.

The bucket is in memory.
"""

from __future__ import annotations

import pytest
from conftest import contents_of, save_checkpoint, save_directory
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from growkit.checkpoint import remote
from growkit.checkpoint.location import open_source
from growkit.cli import run


class Bucket(MemoryFileSystem):
    """A file system in memory that answers to gs://."""

    protocol = "gs"
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://"))


@pytest.fixture
def bucket(monkeypatch):
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: Bucket())
    return epath.Path("gs://bucket")


@pytest.fixture(params=["huggingface", "checkpoint"])
def source(tmp_path, request):
    save = save_directory if request.param == "huggingface" else save_checkpoint
    return save(tmp_path / "source")


def sent(here, there) -> str:
    remote.upload(here, there, False)
    return str(there)


def objects(path) -> dict[str, bytes]:
    """Every object below a path, by name."""
    return {
        name.removeprefix(f"/{str(path)[5:]}/"): bytes(file.getbuffer())
        for name, file in Bucket.store.items()
        if name.startswith(f"/{str(path)[5:]}/")
    }


def same(ours: dict[str, bytes], theirs: dict[str, bytes]) -> bool:
    """Equal, except for the source's path and the time of writing."""
    told = ("metadata", "lineage.json", "_CHECKPOINT_METADATA", "commit_success.txt")
    weights = [{n: b for n, b in each.items() if not n.endswith(told)} for each in (ours, theirs)]
    return ours.keys() == theirs.keys() and weights[0] == weights[1]


def test_growth_from_a_bucket_to_a_bucket_is_growth_on_a_disk(tmp_path, bucket, source):
    there = sent(source, bucket / "source")
    before = objects(bucket / "source")
    assert run(["depth", "--map", "3:4", str(source), str(tmp_path / "out")]) == 0
    assert run(["depth", "--map", "3:4", there, str(bucket / "out")]) == 0
    assert same(objects(bucket / "out"), contents_of(tmp_path / "out"))
    assert objects(bucket / "source") == before
    found = open_source(str(bucket / "out"))
    assert found.lineage[-1]["source"]["path"] == there and found.model.layer == 4
    assert run(["verify", there, str(bucket / "out")]) == 0
    assert run(["diff", str(tmp_path / "out"), str(bucket / "out")]) == 0


def test_other_growth_is_not_the_same(tmp_path, bucket, source):
    there = sent(source, bucket / "source")
    assert run(["depth", "--map", "3:4", there, str(bucket / "out")]) == 0
    assert run(["depth", "--map", "0,1,2,2", str(source), str(tmp_path / "out")]) == 0
    assert not same(objects(bucket / "out"), contents_of(tmp_path / "out"))


def test_a_run_in_a_bucket_is_named_as_on_a_disk(tmp_path, bucket):
    for step in (5, 10):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
        save_checkpoint(tmp_path / "run" / "checkpoints" / str(step), seed=step, step=step)
    there = sent(tmp_path / "run", bucket / "run")
    assert open_source(there).record["step"] == 10
    assert open_source(f"{there}@5").record["step"] == 5


def test_an_output_in_a_bucket_is_replaced_with_force_only(bucket, source, capsys):
    there, out = sent(source, bucket / "source"), str(bucket / "out")
    assert run(["depth", "--map", "3:4", there, out]) == 0
    assert run(["depth", "--map", "3:5", there, out]) == 2
    assert "the output exists: gs://bucket/out; use --force" in capsys.readouterr().err
    assert run(["depth", "--map", "3:5", there, out, "--force"]) == 0
    assert open_source(out).model.layer == 5
    assert run(["depth", "--map", "3:5", there, there, "--force"]) == 2
    assert "the output is the source" in capsys.readouterr().err


def test_what_makes_a_directory_load_is_sent_last_and_a_failure_leaves_nothing(
    bucket, source, capsys, monkeypatch
):
    there = sent(source, bucket / "source")
    names = []
    copy = remote._copy

    def noted(file, to):
        if str(to).startswith("gs://"):
            names.append(to.name)
        copy(file, to)

    monkeypatch.setattr(remote, "_copy", noted)
    assert run(["depth", "--map", "3:4", there, str(bucket / "out")]) == 0
    assert names[-1] in ("config.json", "_CHECKPOINT_METADATA")
    # From the first of them on, nothing else is sent.
    first = min(names.index(name) for name in set(remote.LAST) & set(names))
    assert set(names[first:]) <= set(remote.LAST)

    def fails(file, to):
        last = to.name in ("config.json", "_CHECKPOINT_METADATA")
        if last and str(to).startswith("gs://bucket/broken"):
            raise OSError("the connection was lost")
        copy(file, to)

    monkeypatch.setattr(remote, "_copy", fails)
    assert run(["depth", "--map", "3:4", there, str(bucket / "broken")]) == 1
    assert "cannot reach gs://bucket/broken: the connection was lost" in capsys.readouterr().err
    assert not objects(bucket / "broken")


def test_what_is_not_there(bucket, capsys, monkeypatch):
    assert run(["inspect", "gs://bucket/nothing"]) == 2
    assert "there is no such directory: gs://bucket/nothing" in capsys.readouterr().err

    def missing(self, path):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", missing)
    assert run(["inspect", "gs://bucket/nothing"]) == 1
    assert "pip install gcsfs" in capsys.readouterr().err


def test_what_other_libraries_read_of_a_bucket_is_here(tmp_path, bucket, capsys):
    pytest.importorskip("torch")
    there = sent(save_checkpoint(tmp_path / "source"), bucket / "source")
    assert run(["export", there, str(bucket / "out"), "--check"]) == 0
    assert "logits of transformers and of JAX differ by at most" in capsys.readouterr().out
    found = open_source(str(bucket / "out"))
    assert str(found.path) == "gs://bucket/out" and (found.here / "config.json").is_file()
