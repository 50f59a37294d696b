"""The command line: one group, its verbs imported only when called, and one way to fail.

A refusal is one sentence on standard error: exit code 2 for usage, 1 for failures, 130 after Ctrl-C, 75
after SIGTERM. Knows how verbs are found and how errors are shown; each verb's file knows its options.
This folder is the only place that joins growkit, trainer and convert.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys

import click

from growkit import __version__
from growkit.errors import GrowkitError

# verb: (file that holds it, one line for the list of verbs)
VERBS = {
    "quickstart": (
        "growkit.cli.quickstart",
        "Train, grow, train on and export a small model on this machine's own text.",
    ),
    "tokenize": ("trainer.cli.training", "Turn text into token files."),
    "train": ("trainer.cli.training", "Train a new model, or train on a grown or imported one."),
    "plan": (
        "trainer.cli.planning",
        "Say what a run would need, by compiling its step for a slice of TPUs, a GPU or this CPU.",
    ),
    "advise": (
        "trainer.cli.advising",
        "Say what published laws and your own studies say about when to grow, and from what.",
    ),
    "anneal": (
        "trainer.cli.training",
        "Bring a run's learning rate down over some more tokens, in a run of its own.",
    ),
    "depth": ("growkit.cli.growing", "Grow a model in depth, optimizer state included."),
    "width": ("growkit.cli.growing", "Grow a model in width, its function preserved."),
    "grow": (
        "growkit.cli.growing",
        "Grow a model to the sizes of another, in depth and width at once.",
    ),
    "derive": (
        "growkit.derive.cli",
        "Derive and prove the table of a model type of transformers.",
    ),
    "average": ("growkit.cli.averaging", "Average the parameters of several checkpoints."),
    "inspect": ("growkit.cli.comparing", "Say what a model on disk is."),
    "diff": ("growkit.cli.comparing", "Compare two models, tensor by tensor."),
    "verify": (
        "growkit.cli.comparing",
        "Recompute a grown model from its source and compare every byte.",
    ),
    "import": ("convert.cli", "Turn a Hugging Face directory into a trainer checkpoint."),
    "export": ("convert.cli", "Turn a model into a Hugging Face directory."),
    "evaluate": ("growkit.cli.evaluating", "Measure models on benchmarks and on text."),
    "study": (
        "trainer.cli.studying",
        "Measure what growth saves on your data: from scratch beside grown, many ways.",
    ),
    "generate": ("trainer.cli.training", "Continue a text with a model."),
}
TERMINATED = 75
INTERRUPTED = 130


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that nothing mistakes it for a failure."""


class Verbs(click.Group):
    """A group that imports a verb's file when the verb is used, so that --help imports nothing heavy."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        _import_numpy()
        module = importlib.import_module(VERBS[name][0])
        return module.COMMANDS[name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])

    def resolve_command(self, ctx, args):
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from growkit.errors import did_you_mean

            raise click.UsageError(
                f"there is no verb {args[0]!r}{did_you_mean(args[0], VERBS)}", ctx
            ) from None


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="growkit")
def growkit() -> None:
    """Grow trained GPT-NeoX models, optimizer state included, and train them on.

    SRC is a Hugging Face directory, a Hub id with an optional @revision, a trainer checkpoint, a run
    directory (its last checkpoint), RUN@STEP or RUN@best.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    code = run(arguments)
    # The process ends: to look for garbage among all that JAX made takes a third of a second and frees nothing more.
    gc.freeze()
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = growkit(arguments, prog_name="growkit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.UsageError as problem:
        verb = problem.ctx.command_path if problem.ctx else "growkit"
        words = " ".join(problem.format_message().split()).rstrip(".")
        click.echo(f"growkit: {words[:1].lower()}{words[1:]}; see {verb} --help", err=True)
        return problem.exit_code
    except click.ClickException as problem:
        problem.show()
        return problem.exit_code
    except GrowkitError as problem:
        click.echo(f"growkit: {problem}", err=True)
        return problem.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("growkit: interrupted", err=True)
        return INTERRUPTED
    except Terminated:
        click.echo("growkit: terminated", err=True)
        return TERMINATED
    except BrokenPipeError:
        # The reader of our output went away (as `| head` does): nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as problem:
        click.echo(
            f"growkit: {problem.strerror or problem}{f': {problem.filename}' if problem.filename else ''}",
            err=True,
        )
        return 1


def _import_numpy() -> None:
    """Import numpy without the threads of its OpenBLAS, unless the user asks for some.

    They spin for a tenth of a second on cores that growth would use, and growkit multiplies no matrices in numpy.
    """
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ:
        return
    os.environ[name] = "1"
    try:
        importlib.import_module("numpy")
    finally:
        # Other libraries, and processes that are started later, are not told.
        del os.environ[name]


def _terminate(number, frame):
    raise Terminated
