"""What an output may do to a disk, and whether it is still there after a power cut."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import contents_of, save_checkpoint, save_directory

from growkit.checkpoint import output
from growkit.checkpoint.files import write_atomically
from growkit.checkpoint.location import open_source, write_output
from growkit.checkpoint.lock import describe_self
from growkit.checkpoint.output import MARK, commit_output
from growkit.cli import run
from growkit.errors import GrowkitError
from growkit.growth.depth import plan_depth
from growkit.surgery.grow import prepare_growth


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_directory(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def depth(*more: str, source: str = "model", out: str = "out") -> list[str]:
    return ["depth", "--map", "3:4", source, out, *more]


def watch(monkeypatch) -> list[tuple[str, str]]:
    """(what, path) of every fsync and rename from now on."""
    seen = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(file):
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    def noted_rename(one, other):
        seen.append(("rename", str(other)))
        rename(one, other)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    return seen


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are named in /proc")
@pytest.mark.parametrize("save", [save_directory, save_checkpoint])
def test_files_then_directories_then_the_name_are_brought_to_the_disk(place, monkeypatch, save):
    save(place / "source")
    seen = watch(monkeypatch)
    assert run(depth(source="source", out="deep/out")) == 0
    at = seen.index(("rename", "deep/out"))
    synced = [path for what, path in seen[:at]]
    files = [path for path in (place / "deep" / "out").rglob("*") if path.is_file()]
    new = place / "deep" / ".out.partial" / "new"
    wanted = {str(new / path.relative_to(place / "deep" / "out")) for path in files}
    assert wanted <= set(synced) and str(new) in synced
    assert max(map(synced.index, wanted)) < synced.index(str(new))
    after = [path for what, path in seen[at + 1 :]]
    assert str(place / "deep") in after and str(place) in after


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are named in /proc")
def test_no_sync_waits_for_nothing(place, monkeypatch):
    seen = watch(monkeypatch)
    assert run(depth("--no-sync")) == 0
    assert [what for what, _ in seen] == ["rename"]


def test_a_small_file_is_whole_and_never_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".metrics.csv.part").symlink_to(victim)
    write_atomically(tmp_path / "metrics.csv", b"new")
    assert (tmp_path / "metrics.csv").read_text() == "new" and victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "victim"]


KILLED = """
import os, signal, sys
from growkit.checkpoint import output
from growkit.cli import run
if sys.argv[1] == "renames":
    output.exchange = lambda one, other: False
real = os.rename
def rename(one, other):
    real(one, other)
    if str(one) == "out":
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename
sys.exit(run(["depth", "--map", "3:4", "--force", "model", "out"]))
"""


def replace_killed(place: Path, how: str) -> int:
    """Grow over OUT in a process that dies as soon as it moves OUT away."""
    save_directory(place / "out", seed=1)
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, how]
    return subprocess.run(command, cwd=place, env=environ, capture_output=True).returncode


def test_force_has_no_moment_without_an_output(place):
    if not output.exchange(save_directory(place / "a", seed=1), save_directory(place / "b")):
        pytest.skip("this kernel or file system does not swap names")
    assert replace_killed(place, "swap") == 0
    assert open_source("out").model.layer == 4


def test_an_old_output_that_was_moved_away_is_named_and_found(place, capsys):
    before = contents_of(save_directory(place / "twin", seed=1))
    assert replace_killed(place, "renames") == -9
    assert not (place / "out").exists()
    assert run(["inspect", "out"]) == 2
    assert "left the old one in .out.partial/old" in capsys.readouterr().err
    assert run(depth()) == 2  # it is back, so that --force is needed
    assert contents_of(place / "out") == before
    assert sorted(path.name for path in place.iterdir()) == ["model", "out", "twin"]


@pytest.mark.parametrize("how", ["link", "directory", "file", "marked link"])
def test_only_what_growkit_left_is_removed(place, capsys, how):
    victim = place / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    if how == "marked link":
        (victim / MARK).write_text(describe_self())
    work = place / ".out.partial"
    if how == "directory":
        victim.rename(work)
    elif how == "file":
        work.write_text("mine")
    else:
        work.symlink_to("victim")
    before = contents_of(place)
    assert run(depth()) == 2
    assert "is not growkit's" in capsys.readouterr().err
    assert contents_of(place) == before


def test_a_strangers_file_beside_what_growkit_left_stays(place):
    work = place / ".out.partial"
    (work / "new").mkdir(parents=True)
    (work / MARK).write_text("host 1")
    (work / "new" / "half").write_text("half")
    (work / "mine.txt").write_text("mine")
    assert run(depth()) == 0
    assert (work / "mine.txt").read_text() == "mine" and not (work / "new").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": "{}", "index.js": ""},
        {"config.json": '{"model_type": "llama"}', "thesis.txt": "mine"},
        {"manifest.json": '{"name": "an extension"}', "background.js": ""},
        {"config.yaml": "site: mine\n", "posts/1.md": "mine"},
        {"config.json": '{"model_type": "llama"}', "model.safetensors": "", "notes/a.md": "mine"},
        {"config.json": '{"model_type": "llama"}', "model.safetensors": "", "thesis.txt": "mine"},
        {"_CHECKPOINT_METADATA": "{}", "letter.txt": "mine"},
    ],
)
def test_force_refuses_what_only_looks_like_an_output(place, capsys, files):
    for name, content in files.items():
        path = place / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    before = contents_of(place)
    assert run(depth("--force")) == 2
    assert "neither empty nor a model" in capsys.readouterr().err
    assert contents_of(place) == before


@pytest.mark.parametrize("save", [save_directory, save_checkpoint])
def test_force_replaces_outputs(place, save):
    save(place / "out", seed=1)
    assert run(depth("--force")) == 0
    assert open_source("out").model.layer == 4
    assert sorted(path.name for path in place.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("out", ["run", "run/checkpoints/10", "run/checkpoints/11"])
def test_a_run_that_a_trainer_holds_is_left_alone(place, capsys, out):
    (place / "run" / "checkpoints").mkdir(parents=True)
    (place / "run" / "config.yaml").write_text("growkit: 0\nfrom: null\nconfig: {}\n")
    save_checkpoint(place / "run" / "checkpoints" / "10")
    before = contents_of(place)
    with open(place / "run" / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4242")
        lock.flush()
        assert run(depth("--force", out=out)) == 2
        assert "process 4242 is training into run" in capsys.readouterr().err
        os.unlink(place / "run" / ".lock")
        assert contents_of(place) == before
    assert run(depth("--force", out=out)) == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks(place, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run(depth()) == 0
    assert sorted(path.name for path in place.iterdir()) == ["model", "out"]
    with commit_output(place / "other") as new:
        # Another process, which the one that writes is alive for.
        work = new.parent
        (work / MARK).write_text(f"{os.uname().nodename} {os.getppid()}")
        assert run(depth(out="other")) == 2
        assert "has no locks to tell" in capsys.readouterr().err
        new.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    work = place / ".third.partial"
    work.mkdir()
    (work / MARK).write_text(f"{os.uname().nodename} {dead.pid}")
    assert run(depth(out="third")) == 0


@pytest.mark.parametrize("how", ["absent", "not supported"])
def test_a_system_that_cannot_reserve_blocks_or_read_into_memory(place, monkeypatch, how):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if how == "absent":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.delattr(os, "preadv", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    assert run(depth()) == 0 and run(["verify", "model", "out"]) == 0


@pytest.mark.parametrize("how", ["replaced", "written"])
def test_a_source_of_the_same_size_and_time_is_still_another(tmp_path, how):
    path = save_directory(tmp_path / "hf") / "model.safetensors"
    source = open_source(str(tmp_path / "hf"))
    status = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    if how == "replaced":
        (tmp_path / "new").write_bytes(raw)
        (tmp_path / "new").replace(path)
    else:
        path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and path.stat().st_size == status.st_size
    with pytest.raises(GrowkitError, match="changed while it was being read"):
        contents = prepare_growth(source, plan_depth(source.model, "3:4"))
        write_output(tmp_path / "out", "huggingface", contents, [source])
    assert [each.name for each in tmp_path.iterdir()] == ["hf"]
    assert np.isfinite(open_source(str(tmp_path / "hf")).stack()["embed_in"]["weight"]).all()
