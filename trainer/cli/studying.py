"""The verb that measures what growth saves on your own data: study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from growkit.cli.options import PATH
from growkit.cli.output import is_quiet, show_result, tell

if TYPE_CHECKING:
    from trainer.study.outcome import Outcome


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out",
    type=PATH,
    default="study",
    show_default=True,
    metavar="DIR",
    help="The directory of all runs and of the report.",
)
@click.option("--resume", is_flag=True, help="Resume the study in DIR; finished runs are kept.")
def study(config: str, overrides: tuple[str, ...], out: str, resume: bool) -> int:
    """Train CONFIG's model from scratch, grow it in the ways of its study section, and compare.

    After each run DIR gets a table (report.md) and all runs so far (runs.csv, results.json); at the
    end a picture (study.png). After Ctrl-C, SIGTERM or a kill, the same command with --resume
    continues.
    """
    from trainer.cli.training import exit_code
    from trainer.config.values import read_values
    from trainer.log.report import Result
    from trainer.run.stages import train
    from trainer.study.course import Course
    from trainer.study.report import show_report, write_report
    from trainer.study.section import read_design

    design = read_design(read_values(config, list(overrides)))
    directory = Path(out)
    _require_new(directory, resume)

    def write_tables(outcome: Outcome) -> None:
        write_report(outcome, directory, picture=False)

    course = Course(design, directory, train, write_tables, quiet=is_quiet())
    signal = course.go()
    if signal is not None:
        show_result(
            f"{directory}: stopped; the same command with --resume continues",
            {"study": str(directory), "finished": False, "signal": signal},
        )
        return exit_code(Result(0, signal, None))
    write_report(course.outcome, directory)
    show_result(lambda: show_report(course.outcome), course.outcome.summarize)
    tell(f"wrote {directory}/report.md, runs.csv, results.json and study.png")
    return 0


def _require_new(directory: Path, resume: bool) -> None:
    """Raise UsageError for a directory that has content, unless the study in it is resumed."""
    from growkit.errors import UsageError

    if resume or not directory.exists():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise UsageError(
            f"{directory} exists; --resume continues the study in it, or name another --out"
        )


COMMANDS = {"study": study}
