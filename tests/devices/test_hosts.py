"""Two processes train as one: the same losses, and each sequence drawn once.

They stop at the same step, and resume bit for bit.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from etils import epath

from growkit.checkpoint.location import open_source
from growkit.errors import UsageError
from growkit.models.gpt_neox import GPT_NEOX
from trainer.config.sections import build_section
from trainer.data.tokens import TokenWriter
from trainer.devices.hosts import COORDINATOR, COUNT, NUMBER, join_cluster
from trainer.run.checkpoint import find_last_step
from trainer.run.watch import Watch

TINY = GPT_NEOX.model(layer=2, embed=16, head=2, mlp=32, vocab=64, context=16, rotary_pct=0.5)
SEQUENCES, STEPS = 8, 8

# The command line in a process of its own. It logs what it draws. On demand it sends itself a
# signal, is slow, or draws what the first process draws.
DRIVER = """
import json, os, sys, time
from trainer.data.stream import Stream
batch = Stream.batch
log, number, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
wrong, slow = sys.argv[4] == "wrong", sys.argv[4] == "slow"
def drawing(self, drawn, count):
    if wrong:
        drawn -= drawn % 4
    with open(log, "a") as file:
        print(json.dumps([drawn, count]), file=file)
    if slow and os.environ.get("JAX_PROCESS_ID") == "1" and drawn >= 16:
        time.sleep(4.0 if drawn < 20 else 0.0)
    if number and drawn >= step:
        os.kill(os.getpid(), number)
    return batch(self, drawn, count)
Stream.batch = drawing
from growkit.cli import main
main(sys.argv[5:])
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Token files and a configuration."""
    root = tmp_path_factory.mktemp("hosts")
    (root / "text").mkdir()
    with TokenWriter(root / "text", TINY.vocab) as writer:
        writer.add(np.random.default_rng(0).integers(0, TINY.vocab, 4000))
    values = {
        "model": asdict(build_section(TINY)),
        "dropout": {"hidden": 0.1, "attention": 0.1},
        "precision": {"compute": "float32"},
        "data": {"train": [str(root / "text")]},
        "batch": {"sequences": SEQUENCES, "accumulation": 2},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"steps": STEPS, "warmup": 3},
        "checkpoint": {"every": 4, "minutes": 0},
        "eval": {"every": 4, "windows": 6},
        "log": {"every": 1},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    return root


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(root, out, count, devices=1, stop=None, wrong="", more=()):
    """Train in `count` processes, with `devices` each. Returns (exit codes, outputs).

    stop: (process, signal, number of sequences drawn at which the process sends it to itself).
    """
    port = free_port()
    command = ["train", str(root / "run.yaml"), "--out", str(out), *more]
    processes = []
    for process in range(count):
        environment = make_environment(devices)
        if count > 1:
            environment[COORDINATOR] = f"127.0.0.1:{port}"
            environment[COUNT] = str(count)
            environment[NUMBER] = str(process)
        number, drawn = 0, 0
        if stop and stop[0] == process:
            number, drawn = int(stop[1]), stop[2]
        arguments = [f"{out}.{process}.log", str(number), str(drawn), wrong]
        processes.append(start([*arguments, *command], environment))
    outputs = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], ["".join(each) for each in outputs]


def make_environment(devices):
    """The environment of a process with so many emulated devices."""
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
    ]
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "PYTHONPATH": os.pathsep.join(path),
    }


def start(arguments, environment):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def drawn_by(out, process):
    """The sequences that a process drew, by their place in the stream."""
    lines = Path(f"{out}.{process}.log").read_text().splitlines()
    return [
        place for first, count in map(json.loads, lines) for place in range(first, first + count)
    ]


def losses(out):
    with open(Path(out) / "metrics.csv") as file:
        return [
            (row["step"], float(row["loss"] or row["validation_loss"]))
            for row in list(csv.DictReader(file))[1:]
        ]


def state_of(out):
    source = open_source(str(out))
    return {
        f"{slot} {name}": tensor.read()
        for slot, some in source.tensors.items()
        for name, tensor in some.items()
    }


def assert_same_losses(ours, theirs):
    assert [step for step, _ in losses(ours)] == [step for step, _ in losses(theirs)]
    np.testing.assert_allclose(
        [loss for _, loss in losses(ours)], [loss for _, loss in losses(theirs)], rtol=1e-5
    )


@pytest.fixture(scope="module")
def one(root):
    codes, said = train(root, root / "one", 1)
    assert codes == [0], said
    return root / "one"


@pytest.fixture(scope="module")
def two(root):
    codes, said = train(root, root / "two", 2, devices=2)
    assert codes == [0, 0], said
    return root / "two", said


def test_two_processes_train_as_one(one, two):
    out, said = two
    assert_same_losses(out, one)
    ours, theirs = state_of(out), state_of(one)
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-4
    # The second process says nothing and writes nothing but its part of the checkpoints.
    assert f"step {STEPS}" in said[0]
    assert "step" not in said[1]


def test_every_sequence_is_drawn_once(two):
    out, _ = two
    first, second = drawn_by(out, 0), drawn_by(out, 1)
    assert len(first) == len(second)
    assert sorted(first + second) == list(range(STEPS * SEQUENCES))


def test_processes_that_draw_the_same_train_another_model(root, one):
    out = root / "wrong"
    codes, said = train(root, out, 2, devices=2, wrong="wrong")
    assert codes == [0, 0], said
    with pytest.raises(AssertionError):
        assert_same_losses(out, one)


def test_a_signal_to_one_process_stops_all_at_one_step_and_the_run_resumes(root, two):
    out = root / "stopped"
    codes, said = train(root, out, 2, devices=2, stop=(1, signal.SIGTERM, 4 * SEQUENCES))
    assert codes == [75, 75], said
    assert 5 <= find_last_step(out) < STEPS
    codes, said = train(root, out, 2, devices=2)
    assert codes == [0, 0], said
    ours, theirs = state_of(out), state_of(two[0])
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert losses(out) == losses(two[0])


def spoil(path: Path, how: str) -> None:
    """Cut a small file of a checkpoint short, or change a letter of what it carries."""
    content = path.read_bytes()
    assert b"tokens_per_second" in content
    changed = content.replace(b"tokens_per_second", b"tokens_per_sekond")
    path.write_bytes(content[:-3] if how == "cut" else changed)


@pytest.mark.parametrize("how", ["changed", pytest.param("cut", marks=pytest.mark.slow)])
def test_all_processes_refuse_a_damaged_checkpoint_and_none_waits(root, two, how):
    out = shutil.copytree(two[0], root / f"damaged-{how}")
    path = out / "checkpoints" / str(STEPS) / "files" / "metadata"
    spoil(path, how)
    words = "is damaged: it is not JSON" if how == "cut" else "the file 'history.csv' of"
    codes, said = train(root, out, 2, devices=2)
    assert codes == [1, 1], said
    assert all(words in each and "Traceback" not in each for each in said)
    assert f"whole is {out}@4, and --from-last-whole" in said[0]
    codes, said = train(root, out, 2, devices=2, more=["--from-last-whole"])
    assert codes == [2, 2], said
    assert all("moves checkpoints, which one process must do alone" in each for each in said)


def test_half_of_what_processes_need_to_meet_is_refused(monkeypatch):
    monkeypatch.setenv(COUNT, "2")
    with pytest.raises(
        UsageError, match="JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID, all three"
    ):
        join_cluster.__wrapped__()  # past what an earlier test of this process was told


def test_the_process_that_the_others_wait_for_is_named(root, two):
    out = root / "slow"
    codes, said = train(root, out, 2, devices=2, wrong="slow", more=["log.stalled=1"])
    assert codes == [0, 0], said
    assert "the others wait for process 1 on " in said[0]
    assert losses(out) == losses(two[0]) and not (out / ".met").exists()
    # The sibling: with the time-out that there is by itself, two seconds are no stall.
    assert "the others wait" not in two[1][0]


class Alone:
    single_process, calls = True, 0


def test_who_is_behind_and_for_how_long():
    watch = Watch(Alone(), 10.0, print, epath.Path("run"))
    moved = {0: (5, "a"), 1: (4, "b"), 2: (4, "c")}
    assert watch.look(moved, 100.0) is None and watch.look(moved, 109.0) is None
    said = watch.look(moved, 111.0)
    assert said == (
        "the others wait for process 1 on b, process 2 on c, which have made no progress for 11 s"
    )
    assert watch.look(moved, 120.0) is None and "for 22 s" in watch.look(moved, 122.0)
    # A slow process is not stalled: it goes on. Nor are processes that have all met equally often,
    # as while all of them compile.
    assert watch.look({0: (6, "a"), 1: (5, "b"), 2: (5, "c")}, 140.0) is None
    level = {0: (7, "a"), 1: (7, "b"), 2: (7, "c")}
    assert [watch.look(level, now) for now in (150.0, 200.0, 300.0)] == [None] * 3
