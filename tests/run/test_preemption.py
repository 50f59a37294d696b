"""Training preempted at any moment: the same command goes on to the same end, to the bit.

By SIGTERM and SIGINT while it starts, compiles, trains and validates, and by SIGKILL while it
saves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import yaml
from runs import rows_of, same_state, state_of, values

# One process imports everything once. Each training is a fork of it, preempted at a random moment
# and forked again until it is finished. Further runs follow until there were enough preemptions.
# A fork writes a byte when it begins (b), compiles (c), draws a batch (t), validates (v) or saves
# (s); the moment of the preemption is random within each of these.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import jax, orbax.checkpoint
import growkit.checkpoint.orbax, trainer.cli.training, trainer.run.stages
from jax.experimental.compilation_cache import compilation_cache
from growkit.cli import run
from trainer.run import checkpoint
from trainer.log import curves
from trainer.run import loop
from trainer.run import position

config, root, moments = sys.argv[1], Path(sys.argv[2]), random.Random(0)
curves.draw_curves = lambda *given: None
# How often a fork comes to each phase, at most, and for how many seconds, on a small machine.
OFTEN = {"b": 1, "c": 1, "t": 8, "v": 4, "s": 3}
LONG = {"b": 1.5, "c": 2.0, "t": 0.02, "v": 0.05, "s": 0.2}
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}

def telling(owner, name, byte, tell):
    before = getattr(owner, name)
    def told(*given):
        os.write(tell, byte)
        return before(*given)
    setattr(owner, name, told)

def without_programs(run):
    # A program that is read from the cache takes no time to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()

def break_resume(broken):
    if broken == "data":
        begin = position.Position.__init__
        position.Position.__init__ = lambda self, config, model, mixture, record, first: begin(
            self, config, model, mixture, {**record, "stream": None}, first)
    if broken == "optimizer":
        whole = checkpoint.from_tree
        checkpoint.from_tree = lambda tree, like: whole(
            {**tree, "nu": jax.tree.map(jax.numpy.zeros_like, tree["nu"])}, like)

def begin(out, broken, phase):
    hear, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        return child, hear
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if phase == "c":
        train = loop.Run._train
        loop.Run._train = lambda run: (without_programs(run), train(run))
    telling(loop.Run, "_train", b"c", tell)
    telling(position.Position, "next_batch", b"t", tell)
    telling(loop.Run, "validate", b"v", tell)
    telling(checkpoint.Checkpoints, "save", b"s", tell)
    break_resume(broken)
    os.write(tell, b"b")
    os._exit(run(["train", config, "--out", str(out)]))

def trained(out, broken="", phase="", number=0):
    # Returns the exit code, which is also 0 where the run finished before the moment came.
    child, hear = begin(out, broken, phase)
    awaited = moments.randint(1, OFTEN[phase]) if phase else 1
    while awaited and (byte := os.read(hear, 1)):
        awaited -= byte.decode() == phase
    if not awaited:
        time.sleep(moments.uniform(0.01, LONG[phase]))
        os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(hear)
    return code

def preempted(out, broken, phases, wanted, found):
    # Preempt one run until it is finished or fails; after enough preemptions let it finish.
    while True:
        phase, number = "", 0
        if len(found["stops"]) < wanted:
            phase = phases[len(found["stops"]) % len(phases)]
            number = moments.choice((signal.SIGTERM, signal.SIGINT))
            if phase == "s":
                number = signal.SIGKILL
        code = trained(out, broken, phase, number)
        unfinished = list(out.glob("checkpoints/*tmp*"))
        found["cut"] += len(unfinished)
        for half in unfinished if broken == "in place" else ():
            half.rename(half.with_name(half.name.split(".")[0]))
        if code != CODES.get(number):
            return code
        found["stops"].append(phase)

assert trained(root / "whole") == 0
told = {}
for name, (broken, phases, wanted) in json.loads(sys.argv[3]).items():
    told[name] = found = {"stops": [], "cut": 0, "codes": []}
    while len(found["stops"]) < wanted and not any(found["codes"]):
        out = root / f"{name} {len(found['codes'])}"
        found["codes"].append(preempted(out, broken, phases, wanted, found))
print(json.dumps(told))
"""
# name: (what is broken about a resume, the phases to preempt in, how often)
SIBLINGS = {
    "data": ("data", "t", 1),
    "optimizer": ("optimizer", "t", 1),
    "in place": ("in place", "s", 6),
}
SIGNALS = "tvbctv"
CASES = {"signals": ("", SIGNALS, 6), "kills": ("", "s", 5)} | SIBLINGS
MANY = {"signals": ("", SIGNALS, 24), "kills": ("", "s", 24)}
CACHE = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@pytest.fixture(
    scope="module", params=[CASES, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def preempted(request, tmp_path_factory, data):
    """By case: what the driver counted, and how many runs ended as the uninterrupted one did."""
    root = tmp_path_factory.mktemp("preempted")
    (root / "run.yaml").write_text(yaml.safe_dump(values(data)))
    command = [
        sys.executable,
        "-c",
        DRIVER,
        str(root / "run.yaml"),
        str(root),
        json.dumps(request.param),
    ]
    environment = os.environ | CACHE | {"JAX_COMPILATION_CACHE_DIR": str(data / "programs")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, case in found.items():
        runs = [root / f"{name} {number}" for number, code in enumerate(case["codes"]) if code == 0]
        case["same"] = sum(same_state(state_of(run), state_of(root / "whole")) for run in runs)
        case["same rows"] = sum(rows_of(run) == rows_of(root / "whole") for run in runs)
    return found


def assert_all_whole(case):
    assert not any(case["codes"])
    assert case["same"] == case["same rows"] == len(case["codes"])


def test_a_run_signalled_at_any_moment_ends_as_if_it_had_not_been(preempted):
    case = preempted["signals"]
    assert_all_whole(case)
    times = len(case["stops"])
    assert times in (6, 24)
    assert Counter(case["stops"]) == {
        phase: times * count // 6 for phase, count in Counter(SIGNALS).items()
    }


def test_a_run_killed_while_it_saves_goes_on_from_a_whole_checkpoint(preempted):
    case = preempted["kills"]
    assert_all_whole(case)
    assert len(case["stops"]) >= 5
    assert case["cut"], "no kill came while a checkpoint was being written"


@pytest.mark.parametrize("preempted", [CASES], indirect=True, ids=["few"])
@pytest.mark.parametrize("broken", SIBLINGS)
def test_a_resume_that_is_broken_would_be_seen(preempted, broken):
    assert preempted[broken]["same"] < len(preempted[broken]["codes"])
