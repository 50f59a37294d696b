"""Small runs of the trainer: their configuration, how they are stopped and what they left."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import trainer.run.loop
import trainer.run.state
from growkit.checkpoint.location import open_source
from growkit.models.architecture import Architecture
from growkit.models.gpt_neox import GPT_NEOX
from trainer.config.sections import build_section
from trainer.data.tokens import TokenWriter
from trainer.log.history import parse_rows
from trainer.run.begin import begin, prepare
from trainer.run.loop import Run
from trainer.step.optimizer import Multipliers

TINY = GPT_NEOX.model(layer=2, embed=16, head=2, mlp=32, vocab=64, context=16, rotary_pct=0.5)
SEQUENCES, STEPS = 4, 12
NO_DROPOUT = {"hidden": 0.0, "attention": 0.0, "embedding": 0.0}
RECIPE = {"dropout": NO_DROPOUT, "batch": {"accumulation": 1}, "eval": {"every": 4}}


def write_tokens(root: Path) -> Path:
    """Make two token directories of random ids, text and code, in a directory."""
    for number, name in enumerate(("text", "code")):
        (root / name).mkdir()
        with TokenWriter(root / name, TINY.vocab) as writer:
            writer.add(np.random.default_rng(number).integers(0, TINY.vocab, 4000 + 500 * number))
    return root


@contextmanager
def share_programs() -> Iterator[None]:
    """Share programs and new models between runs: compiling is most of a small run."""
    programs = {}

    def shared(make):
        def of(config, *rest):
            if any(isinstance(part, Multipliers) for part in rest):
                return make(config, *rest)
            parts = config
            if not isinstance(config, Architecture):
                parts = [
                    getattr(config, name)
                    for name in ("dropout", "precision", "batch", "optimizer", "schedule")
                ]
            key = repr((make.__name__, parts, getattr(config, "seed", None), rest))
            if key not in programs:
                programs[key] = make(config, *rest)
            return programs[key]

        return of

    initial = shared(trainer.run.state.init_params)

    def init_params(*given):
        with jax.ensure_compile_time_eval():  # also where only shapes are asked for
            params = initial(*given)
        # A copy each time, because a step takes over the memory of its argument.
        return jax.tree.map(jnp.array, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.run.loop, "make_train_step", shared(trainer.run.loop.make_train_step))
        patch.setattr(trainer.run.loop, "make_eval_step", shared(trainer.run.loop.make_eval_step))
        patch.setattr(trainer.run.state, "init_params", init_params)
        yield


def values(root, **sections):
    """The nested values of a small run, some sections changed or added to."""
    base = {
        "model": asdict(build_section(TINY)),
        "dropout": {"hidden": 0.1, "attention": 0.0},
        "precision": {"compute": "float32"},
        "data": {"train": [str(root / "text")]},
        "batch": {"sequences": SEQUENCES, "accumulation": 2},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"steps": STEPS, "warmup": 3},
        "checkpoint": {"every": 4, "minutes": 0},
        "eval": {"every": 3, "windows": 6},
        "log": {"every": 2},
        "seed": 5,
    }
    for name, section in sections.items():
        base[name] = base[name] | section if isinstance(section, dict) and name in base else section
    return base


def configuration(path, root):
    """The configuration of a small run, written to a file."""
    path.write_text(yaml.safe_dump(values(root)))
    return path


def recipe(root, **sections):
    """A configuration without a model section, for --from."""
    settings = values(root, **(RECIPE | sections))
    settings.pop("model")
    return settings


def new_run(root, out, **sections):
    return Run(begin(prepare(values(root, **sections), out)))


def state_of(out):
    """Every array and counter of a run's last checkpoint, by name."""
    source = open_source(str(out))
    arrays = {
        f"{slot} {name}": tensor.read()
        for slot, some in source.tensors.items()
        for name, tensor in some.items()
    }
    return arrays | {
        name: np.asarray(source.record[name]) for name in ("count", "step", "schedule_step")
    }


def rows_of(out):
    """The rows of a run's metrics, without the column that depends on a clock."""
    with open(Path(out) / "metrics.csv") as file:
        return [
            {key: text for key, text in row.items() if key != "tokens_per_second"}
            for row in csv.DictReader(file)
        ]


def rows(out):
    """The rows of a run's metrics, as the trainer reads them."""
    return parse_rows((out / "metrics.csv").read_text())


def same_state(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], theirs[name]) for name in ours
    )


def assert_as_if_uninterrupted(out, whole):
    assert same_state(state_of(out), state_of(whole))
    assert rows_of(out) == rows_of(whole)


def send_at(run, step, number, times=1):
    """Have a run send its own process a signal while it draws the batch after `step` steps."""
    batch = run.position.stream.batch

    def drawing(drawn, count):
        if drawn == run.position.drawn(step):
            for _ in range(times):
                os.kill(os.getpid(), number)
        return batch(drawn, count)

    run.position.stream.batch = drawing
    return run


class Killed(BaseException):
    """Ends a run as a kill does: no handler in the trainer catches it."""
