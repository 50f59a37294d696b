"""The verb that gives a mixture more experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from growkit.cli.growing import Growing, add_growing_options, plan_and_grow

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source
    from growkit.growth.plan import Plan


@click.command(cls=Growing)
@click.argument("count", metavar="FROM:TO")
@click.option(
    "--top",
    metavar="FROM:TO",
    help="Experts that are chosen per token, as 2:4. Default: they grow as the experts do, which "
    "preserves the function.",
)
@click.option("--exact", is_flag=True, help="Refuse what would change the function.")
@add_growing_options
def experts(count: str, top: str | None, exact: bool, src: str, out: str, **options: Any) -> None:
    """Grow the mixture of experts SRC in its number of experts: 8:16 copies each of 8 once.

    Every expert gets as many copies, and so does its row of the router. A token goes through all
    copies of the experts that it went through before, so the function is preserved; moments grow by
    the same rule. Copies stay equal unless --noise makes their rows of the router differ. With
    --top 2:2 a token goes through fewer different experts, so the function changes.
    """
    from growkit.errors import UsageError
    from growkit.growth.experts import plan_experts
    from growkit.growth.separation import parse_noise

    if exact and parse_noise(options["noise"])[0]:
        raise UsageError(
            "--exact refuses --noise: it sets copies of a router row apart, so their scores differ"
        )

    def plan(source: Source) -> Plan:
        return plan_experts(source.model, source.config, count, top, exact)

    plan_and_grow("experts", src, out, plan, options)


COMMANDS = {"experts": experts}
