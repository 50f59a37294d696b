"""The model section of a configuration, and the architecture that it describes.

Sizes and options that all families have are keys of their own. What else a family has is stated in
`config`, by the names of config.json, so that a section can describe every model that the trainer
trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from growkit.errors import GrowkitError, UsageError, did_you_mean
from growkit.models import find_family, list_trained
from growkit.models.architecture import Architecture
from growkit.models.family import Family
from growkit.models.fields import RATIO
from growkit.models.gates import check_choice
from trainer.config.rules import number


@dataclass(frozen=True)
class Model:
    """Sizes and options of a new model.

    With --from they are the source's, and those stated here must agree with it, except for context:
    rotary positions have no parameters, so a model can go on with another one.
    """

    layer: int = 24  # blocks
    embed: int = 1536  # width of the residual stream
    head: int = 12  # attention heads; they divide embed, or head_dim is given
    mlp: int = 6144  # hidden units of each block's feed-forward network
    vocab: int = 50304  # token ids, so many rows of the embedding
    context: int = number(1024, at_least=1)  # tokens in a sequence
    rotary_pct: float = 0.25  # fraction of each head that is rotated by position (gpt_neox)
    rotary_base: float = number(10000.0, above=0)  # base of the rotary frequencies
    # Attention and feed-forward read the same residual stream (gpt_neox).
    parallel_residual: bool = True
    tied: bool = True  # the output matrix is the embedding
    layer_norm_eps: float = number(1e-5, above=0)  # added to the variance in each norm
    initializer_range: float = number(0.02, above=0)  # standard deviation of new weights
    kind: str = "gpt_neox"  # the family, a model_type of transformers: llama, qwen3, gemma2, ...
    kv: int = number(0, at_least=0)  # key and value heads; they divide head; 0: as many as head
    head_dim: int = number(0, at_least=0)  # dimensions of a head; 0: embed / head
    # Other fields of the family's config.json, by the names there: {sliding_window: 4096}.
    config: dict[str, Any] = field(default_factory=dict)


# What other families than gpt_neox are in what only gpt_neox can choose.
ELSEWHERE = {"rotary_pct": 1.0, "parallel_residual": False}


def build_architecture(model: Model) -> Architecture:
    """The architecture that a model section describes.

    Raises UsageError for sizes that contradict each other, and for a family that is not trained.
    """
    family = find_trained(model.kind)
    try:
        values = name_values(family, dataclasses.asdict(model))
        built = family.model(**values)
        if model.config:
            written = built.config()
            _check_config(family, model.config, values, written)
            built = family.read(written | family.name_experts(model.config))
        check_choice(built)
    except GrowkitError as problem:
        raise UsageError(f"the model section contradicts itself: {problem}") from None
    return built


def find_trained(kind: str) -> Family:
    """The family of a model type that the trainer trains. Raises UsageError for another."""
    if kind in list_trained():
        family = find_family(kind)
        assert family is not None
        return family
    near = did_you_mean(kind, list_trained())
    known = ", ".join(list_trained())
    raise UsageError(f"model.kind {kind!r} is no family that the trainer trains: {known}{near}")


def name_values(family: Family, stated: dict[str, Any]) -> dict[str, Any]:
    """The stated keys of a model section by the names that a family gives sizes and options.

    Raises GrowkitError for keys that the family does not have, and heads that do not divide.
    """
    values = {key: value for key, value in stated.items() if key not in ("kind", "config")}
    if "layer_norm_eps" in values:
        values["norm_eps"] = values.pop("layer_norm_eps")
    for key, only in ELSEWHERE.items():
        has = key in family.options or (family.rotary and family.rotary.part)
        if key in values and not has:
            _require_default(family, key, values.pop(key), only)
    if family.rotary is None and "rotary_base" in values:
        base = values.pop("rotary_base")
        if "rope_theta" in family.computed_fields:
            values["rope_theta"] = base
    return _name_heads(family, values)


def _require_default(family: Family, key: str, value: Any, only: Any) -> None:
    """Raise GrowkitError for a key that only GPT-NeoX has, unless it says what all others do."""
    default = {field.name: field.default for field in dataclasses.fields(Model)}[key]
    if value not in (default, only):
        raise GrowkitError(f"{key} is {value}, and a {family.title} model has {only} always")


def _name_heads(family: Family, values: dict[str, Any]) -> dict[str, Any]:
    """head, kv and head_dim as the family's axes."""
    head, kv, head_dim = (values.pop(key, 0) for key in ("head", "kv", "head_dim"))
    embed = values.get("embed", 0)
    if family.heads == "head":
        if kv not in (0, head) or head_dim not in (0, embed // max(head, 1)):
            raise GrowkitError(
                f"a {family.title} model has as many key and value heads as heads, each of "
                f"embed / head dimensions: leave kv and head_dim out"
            )
        return values | ({"head": head} if head else {})
    if kv and head % kv:
        raise GrowkitError(f"head must be a multiple of kv, got {head} and {kv}")
    if head:
        values |= {"kv": kv or head, "group": head // (kv or head)}
    if head and embed and not head_dim:
        if embed % head:
            raise GrowkitError(
                f"embed must be a multiple of head where head_dim is not given, got {embed} and "
                f"{head}"
            )
        head_dim = embed // head
    return values | ({"head_dim": head_dim} if head_dim else {})


def _check_config(
    family: Family, config: dict[str, Any], values: dict[str, Any], written: dict[str, Any]
) -> None:
    """Raise GrowkitError for fields that the family does not have, or that have a key here."""
    paths = {**family.fields, **family.options}
    named = {RATIO.sub(r"\1", paths[name]): name for name in values if name in paths}
    known = {*written, *family.computed_fields} - named.keys() - family.new.keys()
    for name in config:
        if name in named:
            raise GrowkitError(f"config.{name} has a key of its own here: {named[name]}")
        if name not in known:
            near = did_you_mean(name, known)
            raise GrowkitError(
                f"config.{name} is no field of a {family.title} model that the trainer reads{near}"
            )


def build_section(model: Architecture) -> Model:
    """The model section that describes an architecture."""
    grouped = model.heads == "kv"
    section = Model(
        kind=model.kind,
        layer=model.layer,
        embed=model.embed,
        head=model.head_count,
        kv=model.sizes["kv"] if grouped else 0,
        head_dim=model.head_dim if grouped else 0,
        mlp=model.mlp,
        vocab=model.vocab,
        context=model.context,
        rotary_pct=model.rotary_pct if model.family.rotary else 1.0,
        rotary_base=_find_base(model),
        parallel_residual=bool(model.options.get("parallel_residual", False)),
        tied=model.tied,
        layer_norm_eps=model.norm_eps,
        initializer_range=model.initializer_range,
    )
    plain = build_architecture(section).config()
    missing = object()
    more = {
        name: value for name, value in model.config().items() if plain.get(name, missing) != value
    }
    return dataclasses.replace(section, config=more)


def _find_base(model: Architecture) -> float:
    """The base of the rotary frequencies, or the default where a model states none."""
    base = model.rotary_base or model.facts.get("rope_theta")
    return float(base or Model.rotary_base)


def describe_differences(stated: Collection[str], mine: Model, theirs: Model) -> str:
    """The stated keys in which two sections differ, in words.

    The context may differ. A count of 0 states nothing, and neither does the default of a key that
    only GPT-NeoX has where the family is another.
    """
    words = []
    for key in stated:
        one, other = getattr(mine, key), getattr(theirs, key)
        if key == "config":
            words += _describe_fields(mine, theirs)
        elif key != "context" and one != other and not _states_nothing(key, one, theirs):
            words.append(f"{key} is {one} in the one and {other} in the other")
    return ", ".join(words)


def _states_nothing(key: str, value: Any, theirs: Model) -> bool:
    """Whether a value is the default of a key that says nothing of a model of this kind."""
    if key in ("kv", "head_dim"):
        return bool(value == 0)
    return key in ELSEWHERE and theirs.kind != Model.kind and value == getattr(Model, key)


def _describe_fields(mine: Model, theirs: Model) -> list[str]:
    """The fields of `config` that one section states and the model of the other has otherwise."""
    if mine.config == theirs.config:
        return []
    model = build_architecture(theirs)
    whole = {**model.config(), **model.facts}
    return [
        f"config.{name} is {value!r} in the one and {whole.get(name)!r} in the other"
        for name, value in mine.config.items()
        if name not in whole or whole[name] != value
    ]


def check_context(model: Architecture, context: int, origin: str) -> None:
    """Raise UsageError for a context with which a model cannot go on.

    Learned positions are as many as they are. Rotary positions that are scaled by YaRN's or Llama
    3's rule reach factor x the original context; a model that states more keeps what it states.
    """
    computation = model.family.computation
    if computation and computation.positions and context != model.context:
        raise UsageError(
            f"{origin} learned {model.context} positions one by one, so model.context stays "
            f"{model.context}, got {context}"
        )
    for rope in model.ropes.values():
        original = rope.get("original_max_position_embeddings")
        factor = rope.get("factor")
        if not original or not factor:
            continue
        longest = max(model.context, int(factor * original))
        if context > longest:
            raise UsageError(
                f"model.context {context} is longer than the rotary scaling of {origin} allows: "
                f"{factor:g} x {original} tokens, so at most {longest}"
            )
