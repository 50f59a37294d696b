"""A plan of growth told to a reader: sizes, map, padding, function, optimizer, what to do next.

Knows plans and sources; leaves options and the doing to the verbs.
"""

from __future__ import annotations

from pathlib import Path

KINDS = {"checkpoint": "trainer checkpoint", "huggingface": "Hugging Face directory"}
TRAINED = "gpt_neox"
WARM = " schedule.warmup=200"
NOT_PRESERVED = "not preserved: a copied layer adds its part once more, so the loss rises until training recovers it"


def describe(source, plan, size: int, out: Path) -> str:
    """What a plan will do, for a reader at a terminal."""
    from growkit.growth.depth import draw_map

    before, after = plan.model, plan.grown
    lines = [
        f"source      {source.path} ({KINDS[source.kind]}, {source.dtype})",
        f"output      {out}",
        f"sizes       {format_changes(before.sizes, after.sizes)}",
        *(f"growth      {words}" for words in plan.method.split("; ")),
        *(f"by rule     {note}" for note in plan.notes),
        *([draw_map(plan.maps["layer"].index.tolist())] if "layer" in plan.maps else []),
        *(f"padding     {words}" for words in _padding(plan)),
        *([f"noise       {_noise(plan)}"] if plan.noise else []),
        f"parameters  {before.parameters:,} -> {after.parameters:,} ({after.parameters / before.parameters:.2f}x)",
        f"on disk     {source.size / 1e6:,.1f} MB -> {size / 1e6:,.1f} MB",
        f"function    {_function(source, plan)}",
        f"optimizer   {_optimizer(source, plan)}",
        *([f"rate        {_rates(source, plan)}"] if plan.preserved else []),
        *([f"warning     {_tied(plan)}"] if plan.tied_copies else []),
        f"next        {_next(source, plan, out)}",
    ]
    return "\n".join(lines)


def format_changes(before: dict[str, int], after: dict[str, int]) -> str:
    """'layer 18 -> 24, mlp 64 -> 128': the axes whose sizes differ."""
    return ", ".join(
        f"{axis} {before[axis]} -> {after[axis]}" for axis in after if before[axis] != after[axis]
    )


def _padding(plan) -> list[str]:
    """What the new units of padded axes hold, in words."""
    fill = {"layer": "the mean of their old entries", "rms": "zeros"}[plan.model.norm]
    words = {
        "embed": f"embed: writers of the residual stream get {fill}, readers random columns "
        f"(seed {plan.seed}); norm weights and eps are scaled to match",
        "head_dim": f"head_dim: new keys are zero, new queries and values random (seed {plan.seed}) and not read yet; "
        "old queries are scaled up",
    }
    return [words[axis] for axis in plan.pads]


def _noise(plan) -> str:
    return (
        f"{plan.noise:g} x initializer_range {plan.model.initializer_range:g}, seed {plan.seed}, on what reads copied "
        "units; it sums to zero over the copies of each"
    )


def _function(source, plan) -> str:
    if not plan.preserved:
        return NOT_PRESERVED
    narrow = source.dtype.itemsize < 4
    return (
        f"preserved, to the rounding of the weights to {source.dtype} (--check measures it)"
        if narrow
        else "preserved"
    )


def _optimizer(source, plan) -> str:
    """What becomes of the moments, in words."""
    if "mu" not in source.tensors:
        return "none in the source: training starts its moments at zero"
    inserted = " (zero in inserted layers)" if "layer" in plan.maps else ""
    mu, nu = (
        (f"grown by the rule{inserted}", "grown by the rule")
        if plan.preserved
        else ("zero", "copied")
    )
    words = {
        "map": f"mu {mu}, nu {nu}",
        "copy": "mu and nu copied as they are",
        "nu-only": f"mu zero, nu {nu}",
        "reset": "mu, nu and count zero",
    }[plan.moments]
    return (
        words
        if plan.moments == "reset"
        else f"{words}, count kept ({source.record.get('count', 0)})"
    )


def _rates(source, plan) -> str:
    """What preserves the training as well as the function: the learning rate's multipliers, where they do."""
    from growkit.growth.shares import share_scale

    if not plan.continues:
        return "the function is the source's now, the training that follows is not"
    tensors: dict[str, list[str]] = {}
    for row in plan.grown.table.rows:
        scales = [share_scale(part.axes, plan.maps) for part in row.parts]
        low = min(float(scale.min()) for scale in scales)
        high = max(float(scale.max()) for scale in scales)
        if (low, high) != (1.0, 1.0):
            factor = f"x{low:.3g}" if low == high else f"x{low:.3g} to x{high:.3g}"
            tensors.setdefault(factor, []).append(".".join(row.path).removeprefix("layers."))
    factors = "; ".join(f"{factor} for {', '.join(names)}" for factor, names in tensors.items())
    exact = "training goes on exactly as the source's would: " if "mu" in source.tensors else ""
    return f"{exact}the trainer multiplies learning rates {factors} (optimizer.multipliers), eps and clip to match"


def _next(source, plan, out: Path) -> str:
    """The command that trains the result."""
    if plan.model.kind != TRAINED:
        return f"transformers loads {out}; growkit's trainer is for {TRAINED}"
    command = f"growkit train recipe --from {out} --out RUN data.train=TOKENS"
    if not plan.continues:
        return command + WARM
    return f"{command} schedule.continued=true" if "mu" in source.tensors else command


def _tied(plan) -> str:
    by = "--noise separates" if "embed" in plan.tied_copies else "--noise or --spread separates"
    return (
        f"copies of {', '.join(plan.tied_copies)} stay equal, for equal copies get equal gradients; only {by} them, "
        "and dropout, slowly"
    )
