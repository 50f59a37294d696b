"""The verb that makes a mixture of experts of a dense model, or gives a mixture more experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from growkit.cli.arguments import parse_whole
from growkit.cli.growing import Growing, add_growing_options, plan_and_grow
from growkit.cli.options import combine_options

if TYPE_CHECKING:
    import numpy as np

    from growkit.checkpoint.tensor import Source
    from growkit.growth.plan import Plan

    # The worth of each expert in each layer of a mixture.
    Measure = Callable[[Source], np.ndarray]

CHOICES = ("all", "use", "fisher")
# What the growth of a dense model alone is told.
DENSE = ("to", "every", "granularity", "shared", "router", "gate")

add_dense_options = combine_options(
    click.option(
        "--from-dense",
        metavar="EXPERTS",
        help="Make a mixture of so many experts of a dense SRC, each a copy of its mlp.",
    ),
    click.option(
        "--to",
        metavar="TYPE",
        help="The mixture's model type. Default: mixtral for Llama and Mistral, qwen2_moe for "
        "Qwen2, qwen3_moe for Qwen3.",
    ),
    click.option(
        "--every",
        metavar="N",
        help="Experts in every N-th layer only; the others keep their mlp. Default 1.",
    ),
    click.option(
        "--granularity",
        metavar="G",
        help="Divide each copy of the mlp into G experts, so that there are G times as many. "
        "Default 1.",
    ),
    click.option(
        "--shared",
        is_flag=True,
        default=None,
        help="Make the shared expert a copy of the mlp too, for types that have one.",
    ),
    click.option(
        "--router",
        metavar="random|zero|copy",
        help="Rows of the router: of a new one random, the default where that is exact, or zero; "
        "of a mixture's copies.",
    ),
    click.option(
        "--gate",
        metavar="normalised|softmax",
        help="Whether the weights of the chosen experts sum to 1 (default), or are those of a "
        "softmax over all experts.",
    ),
)


@dataclass(frozen=True)
class Asked:
    """What the user asks for. dense: the values of DENSE, None where not given. measure: what finds
    the worth of experts, None for all alike.
    """

    top: str | None
    exact: bool
    noise: float
    dense: Mapping[str, Any]
    measure: Measure | None


class Mixing(Growing):
    """The verb's command: FROM:TO is left out where a dense model is the source."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        dense = any(word.partition("=")[0] == "--from-dense" for word in args)
        return super().parse_args(ctx, ["", *args] if dense else args)


@click.command(cls=Mixing)
@click.argument("count", metavar="[FROM:TO]")
@add_dense_options
@click.option(
    "--top",
    metavar="FROM:TO|N",
    help="Experts that are chosen per token, as 2:4. Default: they grow as the experts do, which "
    "preserves the function. With --from-dense a number; default 2.",
)
@click.option(
    "--choose",
    default="all",
    metavar="all|use|fisher",
    help="Which experts of a mixture are copied more often: all as often (default), those that a "
    "text uses most, or those of the largest sum of w^2 nu in a checkpoint with moments.",
)
@click.option(
    "--choose-text",
    metavar="FILE",
    help="The text of --choose use. Without it a text that comes with Python.",
)
@click.option("--exact", is_flag=True, help="Refuse what would change the function.")
@add_growing_options
def experts(
    count: str,
    from_dense: str | None,
    top: str | None,
    choose: str,
    choose_text: str | None,
    exact: bool,
    src: str,
    out: str,
    **options: Any,
) -> None:
    """Grow the mixture of experts SRC in its number of experts: 8:16 copies each of 8 once.

    Every expert gets as many copies, and so does its row of the router. A token goes through all
    copies of the experts that it went through before, so the function is preserved; moments grow by
    the same rule. Copies stay equal unless --noise makes their rows of the router differ. With
    --top 2:2 a token goes through fewer different experts, so the function changes.

    With --from-dense 8 and without FROM:TO, a dense SRC becomes a mixture whose 8 experts are
    copies of its mlp: the function is preserved where the weights of the chosen sum to 1.
    """
    from growkit.growth.separation import parse_noise

    dense = {name: options.pop(name) for name in DENSE}
    noise = parse_noise(options["noise"])[0]
    asked = Asked(top, exact, noise, dense, _select_scores(choose, choose_text))
    if from_dense is None:
        plan = _plan_more(count, asked)
    else:
        plan = _plan_dense(from_dense, asked)
    plan_and_grow("experts", src, out, plan, options)


def _select_scores(choose: str, text: str | None) -> Measure | None:
    """What finds the worth of experts, None for all alike. Raises UsageError."""
    from growkit.errors import UsageError, did_you_mean
    from growkit.surgery.scores import score_experts

    if choose not in CHOICES:
        near = did_you_mean(choose, CHOICES)
        raise UsageError(f"--choose is one of {', '.join(CHOICES)}, got {choose!r}{near}")
    if text is not None and choose != "use":
        raise UsageError("--choose-text is the text of --choose use; give both, or neither")
    if choose == "use":
        from growkit.cli.measuring import measure_use

        return lambda source: measure_use(source, text)
    return score_experts if choose == "fisher" else None


def _plan_more(count: str, asked: Asked) -> Callable[[Source], Plan]:
    """What plans more experts of a mixture. Raises UsageError for options of a dense source."""
    import numpy as np

    from growkit.errors import UsageError
    from growkit.growth.experts import plan_experts

    given = [name for name in DENSE if asked.dense[name] is not None]
    if given and not (given == ["router"] and asked.dense["router"] == "copy"):
        raise UsageError(
            f"--{given[0]} is for the growth of a dense model, with --from-dense; the experts of a "
            f"mixture are copied with their rows of the router"
        )
    if asked.exact and asked.noise:
        raise UsageError(
            "--exact refuses --noise: it sets copies of a router row apart, so their scores differ"
        )

    def plan(source: Source) -> Plan:
        model, config = source.model, source.config
        if asked.measure is None:
            return plan_experts(model, config, count, asked.top, asked.exact)
        # What makes no plan is refused before anything is measured.
        alike = np.ones((model.layer, model.sizes.get("expert", 1)))
        plan_experts(model, config, count, asked.top, asked.exact, alike)
        scores = asked.measure(source)
        return plan_experts(model, config, count, asked.top, asked.exact, scores)

    return plan


def _plan_dense(count: str, asked: Asked) -> Callable[[Source], Plan]:
    """What plans a mixture of a dense model. Raises UsageError."""
    from growkit.errors import UsageError
    from growkit.growth.mixture import GATES, plan_mixture

    _check_dense(asked)
    dense = asked.dense
    experts = parse_whole("from-dense", count)
    top = None if asked.top is None else parse_whole("top", asked.top)
    options: dict[str, Any] = {name: dense[name] for name in ("to", "router")}
    options |= {name: parse_whole(name, dense[name] or "1") for name in ("every", "granularity")}
    options |= {"gate": dense["gate"] or GATES[0], "shared": bool(dense["shared"])}

    def plan(source: Source) -> Plan:
        model, config = source.model, source.config
        made = plan_mixture(model, config, experts, top, exact=asked.exact, **options)
        if asked.exact and asked.noise and made.upcycling and not made.upcycling.noisy:
            raise UsageError(
                "--exact refuses --noise here: it sets apart rows of the router that must be equal"
            )
        return made

    return plan


def _check_dense(asked: Asked) -> None:
    """Raise UsageError for options that are for mixtures alone."""
    from growkit.errors import UsageError

    if asked.measure is not None:
        raise UsageError(
            "--choose is for a mixture, whose experts differ; those made of a dense model are alike"
        )
    if asked.dense["router"] == "copy":
        raise UsageError(
            "--router copy copies rows of a mixture's router, and a dense model has none; it takes "
            "random or zero"
        )


COMMANDS = {"experts": experts}
