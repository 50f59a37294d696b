"""The verbs: where each one is defined, and the group that imports it only when it is called."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from pathlib import Path

import click

from growkit import __version__
from growkit.cli.guide import add_guidance, list_groups
from growkit.cli.output import add_output_options
from growkit.errors import did_you_mean

# verb: (module whose COMMANDS hold it, one line for the list of verbs)
VERBS = {
    "quickstart": (
        "growkit.cli.quickstart",
        "Run the whole pipeline on a tiny model; no data needed.",
    ),
    "tokenize": ("trainer.cli.training", "Turn text into token files."),
    "train": ("trainer.cli.training", "Train a new model, or a grown or imported one."),
    "plan": (
        "trainer.cli.planning",
        "Say what a run needs, by compiling its step for a TPU slice, a GPU or this CPU.",
    ),
    "advise": (
        "trainer.cli.advising",
        "Say when to grow, and from what, by published laws and your own studies.",
    ),
    "anneal": (
        "trainer.cli.training",
        "Continue a run with a falling learning rate, as a run of its own.",
    ),
    "depth": ("growkit.cli.growing", "Grow a model in depth, optimizer state included."),
    "search": (
        "trainer.cli.searching",
        "Score maps of layers on a text before anything is written.",
    ),
    "width": ("growkit.cli.growing", "Grow a model in width without changing its function."),
    "grow": ("growkit.cli.growing", "Grow a model to the sizes of another, in depth and width."),
    "experts": ("growkit.cli.mixing", "Give a mixture more experts, or make one of a dense model."),
    "derive": (
        "growkit.derive.cli",
        "Derive and prove the table of a model type of transformers.",
    ),
    "average": ("growkit.cli.averaging", "Average the parameters of several checkpoints."),
    "inspect": ("growkit.cli.comparing", "Describe a model on disk."),
    "diff": ("growkit.cli.comparing", "Compare two models, tensor by tensor."),
    "verify": (
        "growkit.cli.comparing",
        "Recompute a grown model from its source and compare every byte.",
    ),
    "import": (
        "convert.cli",
        "Turn a Hugging Face directory, or one of gpt-neox or OLMo 2, into a trainer checkpoint.",
    ),
    "export": ("convert.cli", "Turn a model into a Hugging Face directory."),
    "evaluate": ("growkit.cli.evaluating", "Measure models on benchmarks and on text."),
    "study": (
        "trainer.cli.studying",
        "Measure what growth saves on your data, against training from scratch.",
    ),
    "generate": ("trainer.cli.training", "Continue a text with a model."),
    "completion": ("growkit.cli.completion", "Print the completion of a shell: bash, zsh, fish."),
}
# Packages of the same project.
SIBLINGS = ("trainer", "convert")


class Verbs(click.Group):
    """A group that imports a verb's module when it is called; --help imports nothing heavy."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        _import_numpy()
        _find_siblings()
        module = importlib.import_module(VERBS[name][0])
        command: click.Command = module.COMMANDS[name]
        add_output_options(name, command)
        add_guidance(name, command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group, names in list_groups(VERBS).items():
            with formatter.section(group):
                formatter.write_dl([(name, VERBS[name][1]) for name in names])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            near = did_you_mean(args[0], VERBS)
            raise click.UsageError(f"there is no verb {args[0]!r}{near}", ctx) from None


@click.command(
    cls=Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="growkit")
@click.pass_context
def growkit(ctx: click.Context) -> None:
    """Grow trained transformer models, optimizer state included, and train them further.

    SRC is a Hugging Face directory, a Hub id with an optional @revision, a trainer checkpoint, a
    run directory (its last checkpoint), RUN@STEP or RUN@best. Checkpoints of other trainers are
    read too: transformers' Trainer, PyTorch's DCP, DeepSpeed's universal ones, gpt-neox, OLMo 2.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _find_siblings() -> None:
    """Let the packages that are installed beside this one be found before others of their names.

    `python -c` and `python -m` look in the working directory first, where a trainer.py or a
    convert.py of the user's own may lie.
    """
    here = Path(__file__).resolve().parents[2]
    first = importlib.machinery.PathFinder.find_spec
    for name in SIBLINGS:
        found = first(name)
        if name not in sys.modules and found and here not in Path(found.origin or here).parents:
            sys.path.insert(0, str(here))


def _import_numpy() -> None:
    """Import numpy without the threads of its OpenBLAS, unless the user asks for some.

    growkit multiplies no matrices in numpy, and idle OpenBLAS threads spin for a tenth of a second
    on cores that growth would use.
    """
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ:
        return
    os.environ[name] = "1"
    try:
        importlib.import_module("numpy")
    finally:
        # Other libraries, and processes started later, must not see it.
        del os.environ[name]
