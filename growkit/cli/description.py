"""A growth plan described to a reader: sizes, map, padding, function, optimizer, next step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growkit.errors import UsageError
from growkit.growth.plan import MUP
from growkit.models import list_trained, require_trained
from growkit.models.fused import find_fused

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source
    from growkit.growth.plan import Plan
    from growkit.growth.upcycling import Upcycling
    from growkit.models.architecture import Architecture

KINDS = {
    "checkpoint": "trainer checkpoint",
    "huggingface": "Hugging Face directory",
    "hf_trainer": "checkpoint of transformers' Trainer",
    "dcp": "distributed checkpoint of PyTorch",
    "universal": "universal checkpoint of DeepSpeed",
    "olmo": "checkpoint of OLMo",
    "neox": "checkpoint of gpt-neox",
}
# Source kinds that PyTorch trains on.
TORCH = ("hf_trainer", "universal", "dcp")
NOT_PRESERVED = (
    "not preserved: each copied layer adds its output once more, so the loss rises until training "
    "recovers it"
)
NOT_PRESERVED_BY_SHARES = (
    "not preserved: each layer's output is multiplied by its share and added, so the loss changes "
    "until training recovers it"
)
SPLIT = (
    "split by learning rate, eps and new layers: build the optimizer from "
    "growkit.torch.param_groups(model, OUT)"
)
# What new entries of the residual stream are filled with, by the model's norm.
FILLS = {"layer": "the mean of their old entries", "rms": "zeros"}


def describe(source: Source, plan: Plan, size: int, out: Path, groups: str = "keep") -> str:
    """What a plan will do, for a reader at a terminal.

    size: bytes of the output. groups: what becomes of parameter groups, 'keep' or 'split'.
    """
    before = source.model
    after = plan.grown
    ratio = after.parameters / before.parameters
    lines = [
        f"source      {source.path} ({KINDS[source.kind]}, {source.dtype})",
        *(f"note        {note}" for note in source.notes),
        f"output      {out}",
        f"sizes       {format_changes(plan.model.sizes, after.sizes)}",
        *_describe_growth(plan),
        f"parameters  {before.parameters:,} -> {after.parameters:,} ({ratio:.2f}x)",
        f"on disk     {source.size / 1e6:,.1f} MB -> {size / 1e6:,.1f} MB",
        f"function    {_describe_function(source, plan)}",
        f"optimizer   {_describe_optimizer(source, plan)}",
    ]
    if source.torch_optimizer is not None and groups == "split":
        lines.append(f"groups      {SPLIT}")
    elif _has_split_groups(source):
        lines.append(f"groups      kept as the source's, {SPLIT}")
    if plan.preserved or plan.rates == MUP:
        lines.append(f"rate        {_describe_rates(source, plan, groups)}")
    if plan.tied_copies:
        lines.append(f"warning     {_warn_of_tied_copies(plan)}")
    lines.append(f"next        {_suggest_next(source, plan, out)}")
    return "\n".join(lines)


def summarize(source: Source, plan: Plan, size: int, out: Path, dry_run: bool) -> dict[str, Any]:
    """The same for a program: every value of the plan, in JSON's types."""
    from growkit.entries import Growth

    summary = {
        "source": str(source.path),
        "out": str(out),
        "kind": source.kind,
        "dry_run": dry_run,
        "parameters": {"before": source.model.parameters, "after": plan.grown.parameters},
        "bytes": {"before": source.size, "after": size},
        "notes": plan.notes,
        "tied_copies": plan.tied_copies,
    }
    return summary | Growth.of(plan).resolved()


def format_changes(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """'layer 18 -> 24, mlp 64 -> 128': the axes whose sizes differ."""
    grown = [axis for axis in after if before[axis] != after[axis]]
    return ", ".join(f"{axis} {before[axis]} -> {after[axis]}" for axis in grown)


def is_loaded_by_transformers(source: Source) -> bool:
    """Whether transformers loads the source's directory as it is."""
    if source.kind in ("huggingface", "hf_trainer"):
        return True
    universal = source.torch_optimizer.universal if source.torch_optimizer else None
    return universal is not None and universal.weights


def is_trained(source: Source) -> bool:
    """Whether growkit's trainer computes this model."""
    return is_computed(source.model)


def is_computed(model: Architecture) -> bool:
    """Whether growkit's trainer computes models like this."""
    try:
        require_trained(model, "the model")
    except UsageError:
        return False
    return True


def _describe_growth(plan: Plan) -> list[str]:
    """The lines of method, map, padding and noise."""
    from growkit.growth.depth import draw_map
    from growkit.growth.layer_shares import has_own_shares
    from growkit.growth.separation import RMS

    lines = [f"growth      {words}" for words in plan.method.split("; ")]
    lines += [f"by rule     {note}" for note in plan.notes]
    if "layer" in plan.maps:
        layers = plan.maps["layer"]
        shares = layers.share.tolist() if has_own_shares(layers) else ()
        lines.append(draw_map(layers.index.tolist(), shares))
    lines += [f"padding     {words}" for words in _describe_padding(plan)]
    if plan.noise:
        unit = f"initializer_range {plan.model.initializer_range:g}"
        if plan.noise_unit == RMS:
            unit = "the root mean square of each tensor"
        lines.append(
            f"noise       {plan.noise:g} x {unit}, seed {plan.seed}, on weights that read copied "
            "units; it sums to zero over the copies of each unit"
        )
    return lines


def _describe_padding(plan: Plan) -> list[str]:
    """What the new units of each padded axis hold."""
    words = {
        "embed": (
            f"embed: writers of the residual stream get {FILLS[plan.model.norm]}, readers get "
            f"random columns (seed {plan.seed}); norm weights and eps are scaled to match"
        ),
        "head_dim": (
            f"head_dim: new keys are zero, new queries and values are random (seed {plan.seed}) "
            "and not read yet; old queries are scaled up"
        ),
        "vocab": _describe_tokens(plan),
    }
    return [words[axis] for axis in plan.pads]


def _describe_tokens(plan: Plan) -> str:
    """What the rows of new tokens hold."""
    from growkit.growth.vocabulary import has_bias, shares_embedding

    fills = {"mean": "the mean of the old ones", "zero": "zero"}
    words = f"vocab: new rows of the embedding are {fills[plan.vocab_fill]}"
    if plan.vocab_row:
        words += ", those of the head were measured to stay below the old tokens"
    elif shares_embedding(plan.model):
        words += ", and the head's with them"
    else:
        words += ", new rows of the head the mean of the old ones"
    if has_bias(plan.model):
        words += "; their biases hold them far below the old tokens"
    return words


def _describe_function(source: Source, plan: Plan) -> str:
    from growkit.growth.layer_shares import has_own_shares
    from growkit.growth.vocabulary import describe_shift

    if not plan.preserved:
        if plan.experts and not plan.experts.exact:
            return plan.experts.describe_gap()
        if plan.upcycling:
            return (
                "not preserved: noise sets apart rows of the router that must be equal for all "
                "parts of the mlp to be chosen"
            )
        if plan.experts and plan.noise:
            return "not preserved: noise sets the scores of copies of an expert apart"
        own = "layer" in plan.maps and has_own_shares(plan.maps["layer"])
        return NOT_PRESERVED_BY_SHARES if own else NOT_PRESERVED
    shift = describe_shift(plan)
    if shift:
        return f"logits of old tokens preserved; {shift} (--check measures it)"
    if source.dtype.itemsize < 4:
        return f"preserved, to the rounding of the weights to {source.dtype} (--check measures it)"
    return "preserved"


def _describe_optimizer(source: Source, plan: Plan) -> str:
    """What becomes of the moments and of Adam's count."""
    if "mu" not in source.tensors:
        where = "none in the source"
        if source.optimizer:
            where = f"{source.optimizer} in the source, which growkit does not read yet"
        return f"{where}: training starts its moments at zero"
    both = "nu" in source.tensors
    if plan.moments == "reset":
        return "mu, nu and count zero" if both else "mu zero"
    count = f"count kept ({source.record.get('count', 0)})"
    if plan.moments == "first":
        slots = "mu and nu" if both else "mu"
        return f"{slots} kept for the first copy, zero for the others (approximate), {count}"
    mu = "zero"
    nu = "copied"
    if plan.preserved:
        mu = "grown by the rule"
        nu = "grown by the rule"
        if "layer" in plan.maps:
            mu += " (zero in inserted layers)"
    if plan.upcycling:
        mu = "copied (zero in experts)" if plan.preserved else "zero"
        nu = f"copied ({_describe_experts(plan.upcycling)})"
    if not both:
        # Lion, Muon, SGD: one buffer, which grows as mu does.
        return {"map": f"mu {mu}", "copy": "mu copied as it is", "nu-only": "mu zero"}[plan.moments]
    words = {
        "map": f"mu {mu}, nu {nu}",
        "copy": "mu and nu copied as they are",
        "nu-only": f"mu zero, nu {nu}",
    }[plan.moments]
    return f"{words}, {count}"


def _describe_experts(upcycling: Upcycling) -> str:
    """What becomes of nu in experts, in words."""
    factor = upcycling.part**2 / (upcycling.chosen * upcycling.copies)
    return f"x {factor:.3g} in experts, by the noise of gradients: an approximation"


def _has_split_groups(source: Source) -> bool:
    """Whether an earlier growth split the groups of the source's optimizer."""
    from growkit.surgery.groups import RATE

    optimizer = source.torch_optimizer
    return optimizer is not None and any(RATE in group.options for group in optimizer.groups)


def _describe_rates(source: Source, plan: Plan, groups: str) -> str:
    """The learning-rate multipliers that preserve the training, if any do."""
    from growkit.growth.shares import share_scale

    if plan.rates == MUP and not plan.continues:
        return _describe_mup(source, plan, groups)
    if not plan.continues:
        return "the function is the source's, but the training that follows will differ"
    rows: dict[str, list[str]] = {}
    for row in plan.grown.table.rows:
        scales = [share_scale(part.axes, plan.maps) for part in row.parts]
        low = min(float(scale.min()) for scale in scales)
        high = max(float(scale.max()) for scale in scales)
        if (low, high) != (1.0, 1.0):
            factor = f"x{low:.3g}" if low == high else f"x{low:.3g} to x{high:.3g}"
            name = ".".join(row.path).removeprefix("layers.")
            rows.setdefault(factor, []).append(name)
    changes = "eps and clip weights of experts"
    if rows:
        listed = "; ".join(f"{factor} for {', '.join(names)}" for factor, names in rows.items())
        changes = f"learning rates {listed}"
    return _describe_factors(source, changes, groups, _find_ungrouped(source, plan, changes))


def _describe_mup(source: Source, plan: Plan, groups: str) -> str:
    """The learning rates by muP, and who multiplies them."""
    from growkit.growth.multipliers import describe_rates

    rows: dict[float | str, list[str]] = {}
    for name, rate in describe_rates(plan).items():
        row = next(row for row in plan.grown.table.rows if row.name == name)
        rows.setdefault(rate, []).append(".".join(row.path).removeprefix("layers."))
    factors = "; ".join(f"x{rate:.3g} for {', '.join(names)}" for rate, names in rows.items())
    who = "growkit.torch.param_groups multiplies"
    if source.kind not in TORCH and is_trained(source):
        who = "the trainer multiplies (optimizer.multipliers)"
    elif groups == "split":
        who = "the split multiplies"
    return f"by muP, approximate: {who} learning rates {factors}"


def _find_ungrouped(source: Source, plan: Plan, changes: str) -> str:
    """Why parameter groups of PyTorch cannot hold the factors, empty where they can."""
    inner = {part for fused in find_fused(plan.grown).values() for part in fused.parts}
    if " to x" in changes:
        return "they differ within a parameter"
    if any(len(row.stacked) > 1 and row not in inner for row in plan.grown.table.rows):
        return "the experts of a layer are one parameter there"
    if source.torch_optimizer is not None and source.torch_optimizer.universal is not None:
        return "a universal checkpoint keeps the groups of its source"
    return ""


def _describe_factors(source: Source, changes: str, groups: str, ungrouped: str) -> str:
    """Who applies the factors. ungrouped: why PyTorch's groups cannot, or ""."""
    rates = changes.startswith("learning rates")
    stay = "" if rates else "learning rates stay; "
    exact = ""
    if "mu" in source.tensors:
        exact = "training continues exactly as the source's would: "
    if source.kind not in TORCH and is_trained(source):
        more = ", eps and clip to match" if rates else ""
        return f"{stay}{exact}the trainer multiplies {changes} (optimizer.multipliers){more}"
    if ungrouped:
        needed = changes if rates else f"factors on {changes}"
        return (
            f"{stay}training would continue exactly with {needed}, but parameter groups of PyTorch "
            f"cannot hold them: {ungrouped}"
        )
    more = ", eps, decay and clip weights to match" if rates else ""
    matched = f"multiplies {changes}{more}"
    if source.kind not in TORCH:
        return f"{stay}growkit.torch.param_groups {matched}"
    if source.kind == "dcp":
        return f"{stay}training would continue exactly as the source's if the optimizer {matched}"
    if groups == "split":
        return f"{stay}{exact}the split {matched}"
    return (
        f"{stay}training would continue exactly as the source's with --groups split, which "
        f"{matched}"
    )


def _warn_of_tied_copies(plan: Plan) -> str:
    if plan.upcycling:
        return (
            "all rows of the router are zero, so every token goes to the same experts until the "
            "auxiliary loss moves it; --noise or --router random separates them"
        )
    if plan.tied_copies == ("expert",):
        return (
            "copies of experts stay equal where they are chosen together, because equal copies get "
            "equal gradients; --noise on their rows of the router separates them"
        )
    if "embed" in plan.tied_copies:
        separate = "only --noise separates them"
    else:
        separate = "only --noise or --spread separates them"
    return (
        f"copies of {', '.join(plan.tied_copies)} stay equal, because equal copies get equal "
        f"gradients; {separate} (and dropout, slowly)"
    )


def _suggest_next(source: Source, plan: Plan, out: Path) -> str:
    """The command that trains the result."""
    if source.kind == "universal":
        return f"DeepSpeed's load_checkpoint({str(out)!r}) with load_universal (docs/pytorch.md)"
    if source.kind == "dcp":
        return f"load {out} where the source was loaded, into a model of {out}/config.json"
    if source.kind in TORCH:
        return f"trainer.train(resume_from_checkpoint={str(out)!r}), the model loaded from there"
    if source.model.family.given:
        return f"transformers loads {out}; growkit's trainer takes no given table"
    if not is_computed(plan.grown) and source.kind == "checkpoint":
        known = ", ".join(list_trained())
        return f"growkit's trainer is for {known}; a directory (growkit export) is for transformers"
    if not is_computed(plan.grown):
        return f"transformers loads {out}; growkit's trainer is for {', '.join(list_trained())}"
    command = f"growkit train recipe --from {out} --out RUN data.train=TOKENS"
    if plan.keeps_first and "mu" in source.tensors:
        return f"{command} schedule.continued=true optimizer.new.rewarmup=200"
    if not plan.continues:
        return f"{command} schedule.warmup=200"
    return f"{command} schedule.continued=true" if "mu" in source.tensors else command
