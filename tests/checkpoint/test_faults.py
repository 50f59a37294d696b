"""Growth killed at any moment, and what other tools leave: an output is whole or absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, contents_of, save_checkpoint, save_directory
from trained import save_trained

from growkit.checkpoint import huggingface
from growkit.cli import run

KILLS = 30
# A small default for a kind whose thirty kills take long.
FEW = 6
LARGER = SMALL.change(embed=256, mlp=1024, vocab=20000)
# One process imports everything once. Each growth is a fork of it, killed after a random part of
# the time that a growth takes.
KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import growkit.cli.growing, growkit.checkpoint.orbax, growkit.growth.depth, growkit.surgery.grow
from growkit.checkpoint import output
from growkit.cli import run

source, out, kills, broken = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if broken == "in place":
    from contextlib import contextmanager

    @contextmanager
    def in_place(out, force=False, sync=True):
        yield out

    output.commit_output = in_place

# These files hold times.
VARIES = ("_CHECKPOINT_METADATA", "_METADATA")

def contents(path):
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in VARIES]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}

def grow():
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(run(["depth", "--map", "3:4", str(source), str(out)]))
    return child

begun = time.monotonic()
assert os.waitpid(grow(), 0)[1] == 0
usual = time.monotonic() - begun
whole = contents(out)
found = {"absent": 0, "whole": 0, "half": 0, "left": 0}
shutil.rmtree(out)
moments = random.Random(0)
for _ in range(kills):
    child = grow()
    time.sleep(moments.uniform(0, 1.1 * usual))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found["left"] += out.with_name(f".{out.name}.partial").exists()
    if not out.exists():
        found["absent"] += 1
    elif contents(out) == whole:
        found["whole"] += 1
    else:
        found["half"] += 1
    shutil.rmtree(out, ignore_errors=True)
print(json.dumps(found))
"""


def killed(source: Path, out: Path, broken: str = "", kills: int = KILLS) -> dict[str, int]:
    """How often a killed growth left no output, a whole or a half one, and a working directory."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(out), str(kills), broken],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(
    params=["huggingface", "checkpoint", pytest.param("hf_trainer", marks=pytest.mark.slow)]
)
def source(tmp_path, request) -> Path:
    kinds = {
        "huggingface": save_directory,
        "checkpoint": save_checkpoint,
        "hf_trainer": save_trained,
    }
    return kinds[request.param](tmp_path / "source", LARGER)


def test_a_killed_growth_of_an_optimizer_leaves_all_or_nothing(tmp_path):
    source = save_trained(tmp_path / "source", SMALL.change(embed=128, mlp=512, vocab=5000))
    found = killed(source, tmp_path / "out", kills=FEW)
    assert found["half"] == 0 and found["absent"] + found["whole"] == FEW
    assert run(["depth", "--map", "3:4", str(source), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_growth_killed_at_any_moment_leaves_all_or_nothing(tmp_path, source):
    before = contents_of(source)
    found = killed(source, tmp_path / "out")
    assert found["half"] == 0 and found["absent"] + found["whole"] == KILLS
    assert found["left"], "no kill came while the output was being written"
    assert contents_of(source) == before
    assert run(["depth", "--map", "3:4", str(source), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert run(["verify", str(source), str(tmp_path / "out")]) == 0


def test_an_output_written_in_place_would_be_left_half_written(tmp_path, source):
    assert killed(source, tmp_path / "out", "in place")["half"]


def test_no_shard_of_an_older_and_larger_output_is_left_beside_the_new(tmp_path):
    source = save_directory(tmp_path / "source")
    out = tmp_path / "out"
    command = ["depth", "--map", "3:6", str(source), str(out), "--max-shard-size"]
    assert run([*command, "20KB"]) == 0
    many = {path.name for path in out.glob("*.safetensors")}
    assert len(many) > 3 and (out / "model.safetensors.index.json").exists()
    assert run([*command, "1GB", "--force"]) == 0
    assert [path.name for path in out.glob("*safetensors*")] == ["model.safetensors"]
    assert run([*command, "60KB", "--force"]) == 0
    few = {path.name for path in out.glob("*.safetensors")}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert few == set(index["weight_map"].values()) and len(few) < len(many)
    assert run(["verify", str(source), str(out)]) == 0


def test_a_directory_is_not_one_that_loads_until_all_of_it_is_there(tmp_path, monkeypatch):
    source = save_directory(tmp_path / "source")
    out = tmp_path / "out"
    seen = []

    def watched(jobs, progress):
        (work,) = tmp_path.glob(".out.partial/new")
        seen.append({path.name for path in work.iterdir()})
        assert not out.exists()
        return fill(jobs, progress)

    fill = huggingface.fill
    monkeypatch.setattr(huggingface, "fill", watched)
    command = ["depth", "--map", "3:6", "--max-shard-size", "20KB", str(source), str(out)]
    assert run(command) == 0
    # Without these two files a directory does not load; they are written after the shards.
    last = {"config.json", "model.safetensors.index.json"}
    assert seen and not any(last & names for names in seen)


def test_shards_are_of_directories_only(tmp_path, capsys):
    source = save_checkpoint(tmp_path / "source")
    command = ["depth", "--map", "3:4", "--max-shard-size", "1GB", str(source)]
    assert run([*command, str(tmp_path / "out")]) == 2
    assert "--max-shard-size is for Hugging Face directories" in capsys.readouterr().err
