"""The verb that measures what growth saves on the user's own data: study."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out",
    default="study",
    show_default=True,
    metavar="DIR",
    help="Where all runs and the report go.",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the study in DIR; runs that are done are kept."
)
def study(config: str, overrides: tuple[str, ...], out: str, resume: bool) -> int:
    """Train CONFIG's model from scratch, and grow it in the ways of its study section, and compare.

    DIR gets a table (report.md) and every run (runs.csv, results.json), after each of them, and a picture (study.png)
    at the end. Stopped by Ctrl-C or SIGTERM, or killed, the same command with --resume goes on.
    """
    from growkit.errors import UsageError
    from trainer.cli.training import exit_code
    from trainer.config.values import read_values
    from trainer.log.report import Result
    from trainer.run.stages import train
    from trainer.study import report
    from trainer.study.course import Course
    from trainer.study.design import read_design

    made = read_design(read_values(config, list(overrides)))
    directory = Path(out)
    if directory.exists() and not resume and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(
            f"{directory} exists; --resume goes on with the study in it, or name another --out"
        )
    course = Course(
        made, directory, train, lambda known: report.write_report(known, directory, picture=False)
    )
    signal = course.go()
    if signal is not None:
        click.echo(f"{directory}: stopped; the same command with --resume goes on")
        return exit_code(Result(0, signal, None))
    report.write_report(course.outcome, directory)
    report.show_report(course.outcome)
    click.echo(f"wrote {directory}/report.md, runs.csv, results.json and study.png")
    return 0


COMMANDS = {"study": study}
