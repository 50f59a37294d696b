"""Names of parameters in distributed checkpoints, and those of the axis table.

Programs that train transformers' own classes save transformers' names. torchtitan and OLMo-core
have classes of their own; their names of Llama, Qwen and OLMo models are stated here, with
transformers' names for the same parameters (torchtitan: models/llama3/state_dict_adapter.py,
OLMo-core: nn/hf/convert.py). torchtitan's Llama also keeps the rows of queries and keys in another
order: the two numbers that a rotation turns lie beside each other, and not half a head apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from growkit.checkpoint.tensor import Recipe, Tensor
from growkit.errors import GrowkitError
from growkit.models.architecture import Architecture
from growkit.models.notation import Position, Row

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
LAYER = "model.layers.{}."
TITAN = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.{}.attention.wq.weight": LAYER + "self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": LAYER + "self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": LAYER + "self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": LAYER + "self_attn.o_proj.weight",
    "layers.{}.attention.q_norm.weight": LAYER + "self_attn.q_norm.weight",
    "layers.{}.attention.k_norm.weight": LAYER + "self_attn.k_norm.weight",
    "layers.{}.feed_forward.w1.weight": LAYER + "mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": LAYER + "mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": LAYER + "mlp.up_proj.weight",
    "layers.{}.attention_norm.weight": LAYER + "input_layernorm.weight",
    "layers.{}.ffn_norm.weight": LAYER + "post_attention_layernorm.weight",
}
OLMO = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
    "blocks.{}.attention.w_q.weight": LAYER + "self_attn.q_proj.weight",
    "blocks.{}.attention.w_k.weight": LAYER + "self_attn.k_proj.weight",
    "blocks.{}.attention.w_v.weight": LAYER + "self_attn.v_proj.weight",
    "blocks.{}.attention.w_out.weight": LAYER + "self_attn.o_proj.weight",
    "blocks.{}.attention.w_q.bias": LAYER + "self_attn.q_proj.bias",
    "blocks.{}.attention.w_k.bias": LAYER + "self_attn.k_proj.bias",
    "blocks.{}.attention.w_v.bias": LAYER + "self_attn.v_proj.bias",
    "blocks.{}.attention.q_norm.weight": LAYER + "self_attn.q_norm.weight",
    "blocks.{}.attention.k_norm.weight": LAYER + "self_attn.k_norm.weight",
    "blocks.{}.feed_forward.w1.weight": LAYER + "mlp.gate_proj.weight",
    "blocks.{}.feed_forward.w2.weight": LAYER + "mlp.down_proj.weight",
    "blocks.{}.feed_forward.w3.weight": LAYER + "mlp.up_proj.weight",
}
# OLMo-core's norms before each half of a layer, and behind it (OLMo 2 and 3).
BEFORE = {
    "blocks.{}.attention_norm.weight": LAYER + "input_layernorm.weight",
    "blocks.{}.feed_forward_norm.weight": LAYER + "post_attention_layernorm.weight",
}
BEHIND = {
    "blocks.{}.attention_norm.weight": LAYER + "post_attention_layernorm.weight",
    "blocks.{}.feed_forward_norm.weight": LAYER + "post_feedforward_layernorm.weight",
}
# program, model_type -> names. A model of another type has none.
PROGRAMS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("torchtitan", "llama"): TITAN,
    ("torchtitan", "qwen3"): TITAN,
    ("OLMo-core", "llama"): OLMO | BEFORE,
    ("OLMo-core", "qwen2"): OLMO | BEFORE,
    ("OLMo-core", "qwen3"): OLMO | BEFORE,
    ("OLMo-core", "olmo2"): OLMO | BEHIND,
    ("OLMo-core", "olmo3"): OLMO | BEHIND,
}
# A name that tells the program.
SIGNS = {"tok_embeddings.weight": "torchtitan", "embeddings.weight": "OLMo-core"}
# The rows whose heads torchtitan's Llama keeps in another order.
ROTATED = tuple(f"model.layers.{{layer}}.self_attn.{each}_proj.weight" for each in "qk")


@dataclass(frozen=True)
class Spelling:
    """What a checkpoint calls parameters.

    names: the name in the checkpoint -> the table's, of every parameter that is there. templates:
    row of the table -> the name in the checkpoint, {} for each unit. copies: further names in the
    checkpoint -> the parameter that they mean: a tied head. program: whose names they are, empty
    for transformers'. rotated: the rows whose heads are kept pair by pair.
    """

    names: Mapping[str, str]
    templates: Mapping[str, str]
    copies: Mapping[str, str]
    program: str = ""
    rotated: tuple[str, ...] = ()

    def spell(self, row: Row, position: Position) -> str:
        """The name in the checkpoint of a unit of a row."""
        return self.templates[row.name].format(*position)


def find_program(names: Iterable[str], model: Architecture) -> str:
    """The program whose own names these are; empty where they are the table's."""
    for name in names:
        known = any(row.match(name) is not None for row in model.family.rows)
        if name in SIGNS and not known:
            return SIGNS[name]
    return ""


def translate(name: str, program: str, model: Architecture) -> str:
    """transformers' name for a parameter of a program's own model; others as they are.

    Raises GrowkitError for a model_type whose names in the program growkit does not know.
    """
    if not program:
        return name
    pairs = PROGRAMS.get((program, model.kind))
    if pairs is None:
        kinds = ", ".join(kind for own, kind in PROGRAMS if own == program)
        raise GrowkitError(
            f"these are {program}'s own names of parameters, which growkit knows of {kinds}, and "
            f"config.json says {model.kind!r}; give a table with these names (--table)"
        )
    template = pairs.get(NUMBER.sub("{}", name))
    return name if template is None else template.format(*NUMBER.findall(name))


def find_rotated(program: str, model: Architecture) -> tuple[str, ...]:
    """The rows of the table whose heads a program keeps pair by pair."""
    return ROTATED if (program, model.kind) == ("torchtitan", "llama") else ()


def make_templates(pairs: Mapping[str, str], model: Architecture) -> dict[str, str]:
    """Row -> the name in a checkpoint with {} for each unit. pairs: table's name -> the other.

    Raises GrowkitError where units are numbered otherwise than the table's.
    """
    templates: dict[str, str] = {}
    for known, name in pairs.items():
        for row in model.family.rows:
            position = row.match(known)
            if position is None:
                continue
            template = NUMBER.sub("{}", name) if position else name
            if NUMBER.findall(name) != [str(unit) for unit in position] and position:
                raise GrowkitError(f"{name!r} has other numbers than {known!r}")
            if templates.setdefault(row.name, template) != template:
                raise GrowkitError(f"{name!r} is named otherwise than {templates[row.name]!r}")
            break
    return templates


def list_rotation(head_dim: int) -> np.ndarray:
    """For each number of a head in transformers' order its place in the order of pairs [D]."""
    return np.arange(head_dim).reshape(-1, 2).T.reshape(-1)


def rotate_rows(tensor: Tensor, head_dim: int) -> Tensor:
    """A tensor whose heads lie pair by pair, with its rows in transformers' order."""
    order = list_rotation(head_dim)

    def rows(start: int, stop: int) -> np.ndarray:
        # Whole heads are read; the rows that were asked for are cut from them.
        first = start // head_dim
        last = -(-stop // head_dim)
        heads = tensor.rows(first * head_dim, last * head_dim)
        turned = heads.reshape(last - first, head_dim, -1)[:, order].reshape(heads.shape)
        return turned[start - first * head_dim : stop - first * head_dim]

    return Tensor(tensor.shape, tensor.dtype, rows, stride=head_dim, sampled=True)


def rotate_recipe(recipe: Recipe, head_dim: int) -> Recipe:
    """A recipe of heads in transformers' order, changed to make them pair by pair."""
    if recipe.is_zeros:
        return recipe
    order = list_rotation(head_dim)
    width = recipe.size // recipe.shape[0]

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        for start, block in recipe.make_blocks():
            first = start * recipe.dtype.itemsize // width
            rows = block.reshape(-1, width // recipe.dtype.itemsize)
            # Where it may, a head is written at once.
            at = 0
            while at < len(rows):
                head, place = divmod(first + at, head_dim)
                if place == 0 and at + head_dim <= len(rows):
                    turned = np.empty_like(rows[at : at + head_dim])
                    turned[order] = rows[at : at + head_dim]
                    yield (first + at) * width, turned
                    at += head_dim
                else:
                    yield (head * head_dim + int(order[place])) * width, rows[at]
                    at += 1

    return Recipe(recipe.shape, recipe.dtype, pieces=pieces)
