"""The order of parameters is transformers' own: `named_parameters` of its classes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from growkit.checkpoint.naming import find_name
from growkit.checkpoint.optimizer import list_undecayed
from growkit.errors import GrowkitError
from growkit.models import FAMILIES, list_trained, read_config
from growkit.models.definition import list_defined
from growkit.models.fused import find_fused
from growkit.models.tables import list_shipped

OPTIONS = {
    "gpt_neox": [{"use_parallel_residual": False}, {"attention_bias": False}],
    "llama": [{"attention_bias": True}, {"mlp_bias": True}],
    "qwen3": [{"attention_bias": True}],
}
CASES = [
    (kind, {"tie_word_embeddings": tied} | options)
    for kind in FAMILIES
    for tied in (False, True)
    for options in [{}, *OPTIONS.get(kind, [])]
]


def compare(kind, options):
    """Compare names and the Trainer's groups with those of transformers' class, on no device."""
    network = pytest.importorskip("growkit.derive.network")
    from growkit.derive.tiny import shrink, tiny_fields

    shipped = kind in list_shipped()
    fields = (tiny_fields(kind) if shipped else shrink(kind)) | options
    config = network.make_config(kind, fields)
    model = network.build(config, meta=not shipped)
    table = read_config(config.to_dict() | {"model_type": kind})
    own = {name: name for name, _ in model.named_parameters()}
    if shipped:
        shapes = {name: tuple(each.shape) for name, each in network.file_state(model).items()}
        table = table.measure(shapes)
        # Experts that memory holds as one are called as there.
        named = {memory: name for name, memory in network.memory_names(model).items()}
        fused = [each.row for each in find_fused(table).values()]
        own |= {name: named[name] for name in named if not any(row.match(name) for row in fused)}
    names = [find_name(own[name], table) for name, _ in model.named_parameters()]
    try:
        defined = list_defined(table)
    except GrowkitError:
        pytest.skip("refused: the order is not known")
    assert [name for name, _ in defined] == names
    # A tied head is named there too.
    kept = {find_name(own[name], table) for name in decayed(model) if name in own}
    assert frozenset(names) - kept in list_undecayed(defined)
    if kind in list_trained():
        assert frozenset(names) - kept == list_undecayed(defined)[0]


def decayed(model):
    """What transformers' Trainer lets decay."""
    from transformers import Trainer

    return Trainer.get_decay_parameter_names(None, model)


@pytest.mark.parametrize("kind,options", CASES)
def test_order_of_tables_by_hand(kind, options):
    compare(kind, options)


@pytest.mark.parametrize(
    "kind",
    ["gemma2", "gemma3_text", "gpt2", "granite", "mixtral", "olmo2", "phi3", "qwen3_moe"],
)
def test_order_of_some_derived_tables(kind):
    compare(kind, {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", list_shipped())
def test_order_of_all_derived_tables(kind):
    compare(kind, {})


def test_an_unknown_order_is_refused():
    fields = {"model_type": "dots1", "n_routed_experts": 2}
    with pytest.raises(GrowkitError, match="the parameters of a Dots1 model is not known"):
        list_defined(read_config(fields))
    with pytest.raises(GrowkitError, match="is not known"):
        list_defined(read_config({"model_type": "granitemoe"}))
    llama = read_config({"model_type": "llama"})
    given = replace(llama, family=replace(llama.family, text=f"# given\n{llama.family.text}"))
    with pytest.raises(GrowkitError, match="its table is not one that growkit ships"):
        list_defined(given)
