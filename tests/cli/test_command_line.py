"""The command line itself: the list of verbs, verbs without arguments, completion, exit codes."""

from __future__ import annotations

import shlex
import string
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from growkit.cli import run
from growkit.cli.guide import (
    EXAMPLES,
    GROUPS,
    NEXT,
    OTHERS,
    add_guidance,
    describe_next,
    list_groups,
)
from growkit.cli.verbs import VERBS, growkit

ROOT = Path(__file__).parents[2]
GROWING = ["depth", "width", "grow"]


def test_growkit_alone_prints_its_verbs(capsys):
    assert run([]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(f"\n  {verb} " in out for verb in VERBS)
    assert run(["--help"]) == 0
    assert capsys.readouterr().out == out


def test_the_package_runs_as_a_module(tmp_path):
    def start(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "growkit", *arguments]
        environ = {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)

    done = start("--version")
    assert done.returncode == 0 and done.stdout.startswith("growkit, version ")
    done = start("depht")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("growkit: there is no verb 'depht'; did you mean 'depth'?")


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help_of_its_own(capsys, verb):
    assert run([verb, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"Usage: growkit {verb} ")


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--check", "64"]], ids=" ".join)
@pytest.mark.parametrize("verb", GROWING)
def test_a_growing_verb_without_its_arguments_says_what_is_missing(capsys, verb, arguments):
    assert run([verb, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("growkit: missing ") and err.endswith(f"see growkit {verb} --help\n")


def complete(arguments: list[str], word: str) -> list[str]:
    """What a shell would offer for `word` after `growkit arguments`."""
    shell = ShellComplete(growkit, {}, "growkit", "_GROWKIT_COMPLETE")
    return [found.value for found in shell.get_completions(arguments, word)]


@pytest.mark.parametrize("verb", GROWING)
def test_completion_offers_verbs_and_their_options(verb):
    assert verb in complete([], verb[:2])
    assert complete([], "zzz") == []
    assert "--moments" in complete([verb], "--mo")
    assert "--moments" in complete([verb, "--check", "64"], "--mo")


def test_options_of_other_verbs_are_not_offered():
    assert "--map" in complete(["depth"], "--") and "--map" not in complete(["width"], "--")


@pytest.mark.parametrize("name", ["trainer.py", "convert/__init__.py"])
@pytest.mark.parametrize("verb", ["train", "export"])
def test_a_file_of_the_users_that_has_the_name_of_a_package(tmp_path, name, verb):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise SystemExit('not that one')\n")
    code = f"import sys; from growkit.cli import run; sys.exit(run(['{verb}']))"
    environ = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("growkit: missing argument")


def test_every_verb_is_in_a_group():
    assert sorted(verb for group in GROUPS.values() for verb in group) == sorted(VERBS)
    assert list_groups(["new", "depth"]) == {"Grow": ["depth"], OTHERS: ["new"]}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_help_has_an_example_that_parses_and_its_defaults(capsys, verb):
    assert run([verb, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    command = growkit.get_command(click.Context(growkit), verb)
    for example in EXAMPLES[verb]:
        assert example in words.partition("Example:")[2]
        arguments = shlex.split(example.removeprefix('eval "$(').removesuffix(')"'))
        assert arguments[:2] == ["growkit", verb]
        command.make_context(verb, arguments[2:]).close()
    for option in command.params:
        shown = isinstance(option, click.Option) and not option.is_flag
        if shown and isinstance(option.default, str | int | float):
            assert f"[default: {option.default}" in words


def test_what_comes_next_is_told_on_a_terminal_alone(capsys, monkeypatch):
    command = click.Command("import", callback=lambda out: None, params=[click.Argument(["out"])])
    add_guidance("import", command)
    line = "next: growkit train recipe --from OUT --out RUN data.train=TOKENS\n"
    command.main(["OUT"], standalone_mode=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    command.main(["OUT"], standalone_mode=False)
    assert capsys.readouterr().err == line
    failed = click.Command("import", callback=lambda out: 1, params=[click.Argument(["out"])])
    add_guidance("import", failed)
    assert failed.main(["OUT"], standalone_mode=False) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verb", sorted(NEXT))
def test_what_comes_next_names_parameters_that_the_verb_has(verb):
    command = growkit.get_command(click.Context(growkit), verb)
    names = {option.name for option in command.params}
    fields = {name for _, name, _, _ in string.Formatter().parse(NEXT[verb]) if name}
    assert fields <= names
    given = dict.fromkeys(fields, "PATH")
    assert "PATH" in describe_next(verb, given)
    assert describe_next(verb, given | {"dry_run": True}) == ""
    assert describe_next(verb, dict.fromkeys(fields)) == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(capsys, shell):
    assert run(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert f"_GROWKIT_COMPLETE={shell}_complete" in out and "growkit" in out


def test_completion_refuses_other_shells(capsys):
    assert run(["completion", "bsh"]) == 2
    assert "bash, zsh, fish, got 'bsh'; did you mean 'bash'?" in capsys.readouterr().err
