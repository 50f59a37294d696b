"""`growkit completion`: the script with which a shell completes verbs and their options."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", metavar="|".join(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes growkit's verbs and options in a shell.

    Bash and zsh: eval "$(growkit completion bash)" in ~/.bashrc, or with zsh in ~/.zshrc. Fish:
    growkit completion fish > ~/.config/fish/completions/growkit.fish
    """
    from click.shell_completion import get_completion_class

    from growkit.cli.verbs import growkit
    from growkit.errors import UsageError, did_you_mean

    found = get_completion_class(shell) if shell in SHELLS else None
    if found is None:
        near = did_you_mean(shell, SHELLS)
        raise UsageError(f"the shell is one of {', '.join(SHELLS)}, got {shell!r}{near}")
    click.echo(found(growkit, {}, "growkit", "_GROWKIT_COMPLETE").source())


COMMANDS = {"completion": completion}
