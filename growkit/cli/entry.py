"""Run the command line: every command ends with an exit code, and an error is one line.

Exit codes: 0, or 1 for failures, 2 for wrong usage, 130 after Ctrl-C, 75 after SIGTERM.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

import click

from growkit.cli.signals import INTERRUPTED, TERMINATED
from growkit.cli.terminal import say
from growkit.cli.verbs import growkit
from growkit.errors import GrowkitError


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no handler of failures catches it."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    code = run(arguments)
    # Collecting garbage among all of JAX's objects at exit takes a third of a second for nothing.
    gc.freeze()
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Without arguments, those of the process."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = growkit(arguments, prog_name="growkit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader of our output is gone (as with `| head`): nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except Terminated:
        return _fail("terminated", TERMINATED)
    except click.UsageError as problem:
        return _fail(_describe_usage(problem), problem.exit_code)
    except click.ClickException as problem:
        problem.show()
        return problem.exit_code
    except GrowkitError as problem:
        return _fail(str(problem), problem.exit_code)
    except OSError as problem:
        where = f": {problem.filename}" if problem.filename else ""
        return _fail(f"{problem.strerror or problem}{where}", 1)


def _fail(words: str, code: int) -> int:
    """Print one line on standard error; returns the exit code."""
    say(f"growkit: {words}", err=True)
    return code


def _describe_usage(problem: click.UsageError) -> str:
    """click's message as one sentence, and where to find help."""
    command = problem.ctx.command_path if problem.ctx else "growkit"
    words = " ".join(problem.format_message().split()).rstrip(".")
    return f"{words[:1].lower()}{words[1:]}; see {command} --help"


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
