"""The page that repeats the 760M run: its commands are ones that growkit takes, and they run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from growkit.cli.verbs import growkit
from growkit.quantity import parse_count
from trainer.config.sections import Config, resolve
from trainer.config.values import apply_overrides, read_values

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "repeat_760m.py"
PAGE = ROOT / "docs" / "runs" / "repeat-760m.md"


def load_script():
    spec = importlib.util.spec_from_file_location("repeat_760m", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_of_the_page_parses_and_its_keys_are_known():
    script = load_script()
    commands = script.read_commands()
    assert len(commands) > 12
    verbs = {words[0] for words in commands}
    assert verbs == {"tokenize", "plan", "train", "depth", "anneal", "evaluate"}
    for words in [*commands, *map(script.shrink, commands)]:
        command = growkit.get_command(click.Context(growkit), words[0])
        with command.make_context(words[0], list(words[1:])) as context:
            given = context.params
        if words[0] in ("train", "plan"):
            values = read_values(given["config"], list(given["overrides"]))
            resolve(values, takes_model=bool(given.get("start")))
    # What is replaced is there to be replaced.
    told = {word for words in commands for word in words}
    assert told >= script.INSTEAD.keys()
    starts = [" ".join(words) for words in commands]
    assert all(any(line.startswith(key) for line in starts) for key in script.MORE)


def test_the_keys_of_the_pages_tables_are_the_defaults():
    """What the page says is the default is, and what it names as a key is one."""
    named = re.findall(r"`([A-Za-z_.0-9 =-]+)`", PAGE.read_text().partition("## Training")[2])
    keys = [word for words in named for word in words.split() if re.match(r"[a-z]+\.\w+=", word)]
    assert len(keys) > 12
    defaults = Config().to_dict()
    for word in keys:
        config = resolve(apply_overrides(Config().to_dict(), [word]))
        section, key = word.partition("=")[0].split(".")[:2]
        changed = getattr(getattr(config, section), key) != defaults[section][key]
        assert changed == word.startswith(("batch.tokens", "schedule.tokens", "schedule.plateau"))
    assert parse_count("82k", "steps") == Config().schedule.steps


@pytest.mark.slow
def test_the_whole_way_runs_at_tiny_scale(tmp_path):
    pytest.importorskip("lm_eval", reason="growkit[eval] is not installed")
    environ = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--work", str(tmp_path)],
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert said.count("the nearest is taken: 8 sequences, 512 tokens") >= 2
    assert "context: 32 tokens by model.context; grown-1b states 64" in said
    assert re.search(r"mesh data 2 x .*, ZeRO-1", said)
    *_, last = done.stdout.strip().splitlines()
    assert last == "every command of the page ran, and what they wrote is as it should be"
    # The last evaluation prints both tables: measured rows, then published ones.
    shown = done.stdout.partition("--reference 760m")[2].split("\n\n")[:2]
    for table, column in zip(shown, ("LAMBADA", "OpenWebText2"), strict=True):
        names = [line.split()[0] for line in table.splitlines() if line.startswith("GPT")]
        assert names == ["GPT-760M", "GPT2-Large", "GPT2-XL", "GPT2-Large,", "GPT2-XL,"]
        assert column in table and max(map(len, table.strip().splitlines())) <= 80
