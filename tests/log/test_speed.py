"""Speed in the log: by its formula, compilation excluded; and where compiled programs are kept."""

from __future__ import annotations

import time
from types import SimpleNamespace

import jax
import pytest
from runs import new_run

import trainer.run.loop
from trainer.devices import programs
from trainer.log import speed
from trainer.log.speed import Stopwatch, Utilization

pytestmark = pytest.mark.usefixtures("compiled_once")


def on(kind, devices=4):
    return Utilization(SimpleNamespace(device_kind=kind), devices, 2.0e9)


def test_utilization_is_the_formula_that_is_printed():
    speed = on("TPU v3")
    assert speed.formula == (
        "MFU = FLOPs a token (2e+09) x tokens/s / (devices (4) x peak); "
        "peak of TPU v3, dense bfloat16: 61.5 TFLOP/s"
    )
    assert (
        speed.compute_mfu(49_200)
        == pytest.approx(2.0e9 * 49_200 / (4 * 61.5e12))
        == pytest.approx(0.4)
    )
    assert speed.describe(49_200) == "49.2K tokens/s (12.3K a device)  MFU 40.0%"


def test_a_device_that_is_not_known_has_no_number():
    speed = on("abacus", 1)
    assert speed.formula == "" and speed.compute_mfu(100.0) is None
    assert speed.describe(100.0) == "100 tokens/s"
    assert speed.describe(None) == "tokens/s unknown yet"


def test_a_stopwatch_counts_from_where_it_was_set(monkeypatch):
    clock = SimpleNamespace(now=10.0)
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: clock.now))
    watch = Stopwatch(100)
    assert watch.read(100) is None
    clock.now = 12.0
    assert watch.read(160) == 30.0
    clock.now = 99.0
    watch.restart(200)
    clock.now = 100.0
    assert watch.read(210) == 10.0


def first_row(data, out, monkeypatch, **log):
    """(seconds a step in the first row with a speed, the step that the time left counts from).

    The first step takes a second more to compile.
    """
    make, said = trainer.run.loop.make_train_step, []

    def slow(*given):
        step, begun = make(*given), []

        def stepped(*arguments):
            if not begun:
                time.sleep(1.0)
            begun.append(True)
            return step(*arguments)

        stepped.trace, stepped.memory = step.trace, step.memory
        return stepped

    monkeypatch.setattr(trainer.run.loop, "make_train_step", slow)
    run = new_run(data, out, log={"every": 2}, eval={"every": 100}, checkpoint={"every": 100})
    row = trainer.run.loop.Report.show_row

    def told(report, step, *rest):
        said.append((step, report.clock))
        row(report, step, *rest)

    monkeypatch.setattr(trainer.run.loop.Report, "show_row", told)
    run.go()
    first = next(row for row in run.history.rows if row["tokens_per_second"])
    tokens = 4 * 16  # those of step 2 alone: step 1 compiled
    return tokens / float(first["tokens_per_second"]), said[0][1][1]


def test_the_first_row_does_not_count_compiling(data, tmp_path, monkeypatch):
    seconds, counted_from = first_row(data, tmp_path / "run", monkeypatch)
    assert seconds < 0.5
    assert counted_from == 1


def test_a_first_row_that_counted_compiling_would_be_seen(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.run.loop.Run, "_first_done", lambda run, metrics: None)
    seconds, counted_from = first_row(data, tmp_path / "run", monkeypatch)
    assert seconds > 0.5
    assert counted_from == 0


@pytest.fixture
def setting(monkeypatch):
    """What is set as JAX's directory, which a test need not change for others."""
    for name in (programs.DIRECTORY, programs.SWITCH):
        monkeypatch.delenv(name, raising=False)
    config = SimpleNamespace(jax_compilation_cache_dir=None)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(
        programs, "jax", SimpleNamespace(config=config, default_backend=jax.default_backend)
    )
    return config


def test_programs_are_kept_with_the_user(setting, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    programs.enable_program_cache()
    # A CPU's go by the machine's name.
    kept = tmp_path / "growkit" / "programs" / programs.platform.node()
    assert setting.jax_compilation_cache_dir == str(kept)


@pytest.mark.parametrize(
    ("name", "value"), [(programs.DIRECTORY, "/elsewhere"), (programs.SWITCH, "false")]
)
def test_programs_are_kept_where_the_environment_says(name, value, setting, monkeypatch):
    monkeypatch.setenv(name, value)
    programs.enable_program_cache()
    assert setting.jax_compilation_cache_dir is None
