"""Mixtures of experts: grouped products, gradients with the loss that balances, loads, counts."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import EXPERTS, QUICK, save_model
from decoders import compute_theirs as compute_logits

from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.errors import UsageError
from growkit.models import require_trained
from growkit.models.counts import describe_mlp
from trainer.config.model import Model, build_architecture
from trainer.config.sections import Precision
from trainer.devices.sharding import make_single_device_layout
from trainer.model import grouped
from trainer.model.decoder import Decoder
from trainer.model.experts import Routed, permute
from trainer.model.grouped import multiply_groups
from trainer.plan.compiler import count_product_flops
from trainer.step.balance import compute_balance_loss, compute_load
from trainer.step.part import ALL, Part
from trainer.step.update import accumulate_gradients

GROUPS = {
    "even": [4, 4, 4],
    "empty": [0, 12, 0],
    "rows of no group": [5, 0, 2],
    "none at all": [0, 0, 0],
}
TOKENS = np.random.default_rng(0).integers(0, 96, (3, 18), dtype=np.int32)


def multiply_plainly(x, weight, sizes):
    """Row by row, each by its own group's matrix."""
    group = np.repeat(np.arange(len(sizes) + 1), [*sizes, len(x) - sum(sizes)])
    matrices = jnp.concatenate([weight, jnp.zeros_like(weight[:1])])
    return jnp.einsum("mi,moi->mo", x, matrices[group])


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_groups_multiply_as_row_by_row(platform, sizes, monkeypatch, strict_promotion):
    """On a CPU in blocks, elsewhere by jax.lax.ragged_dot, which a CPU computes too."""
    monkeypatch.setattr(grouped, "ROWS", 3)
    draw = np.random.default_rng(1).normal
    x, weight, to = draw(size=(12, 5)), draw(size=(3, 4, 5)), draw(size=(12, 4))

    def differentiate(multiply):
        def loss(x, weight):
            return (multiply(x, weight) * to.astype(np.float32)).sum()

        arguments = (x.astype(np.float32), weight.astype(np.float32))
        return jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=QUICK)(*arguments)

    ours = differentiate(
        lambda x, weight: multiply_groups(x, weight, jnp.asarray(sizes, jnp.int32), platform)
    )
    theirs = differentiate(partial(multiply_plainly, sizes=sizes))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), ours, theirs)
    if 0 < sum(sizes) < 12:
        # Were the rows after the last group of any, the result would be another one.
        other = differentiate(partial(multiply_plainly, sizes=[*sizes[:2], 12 - sum(sizes[:2])]))
        assert abs(float(other[0] - ours[0])) > 1e-2


def test_a_permutation_is_undone_in_the_gradient():
    order = jnp.asarray([2, 0, 1])
    weights = jnp.asarray([[1.0], [10.0], [100.0]])
    rows = jnp.ones((3, 1))
    found = jax.grad(lambda x: (permute(x, order, jnp.argsort(order)) * weights).sum())(rows)
    assert found.ravel().tolist() == [10.0, 100.0, 1.0]


COEFFICIENT = 0.3
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": EXPERTS | {"norm_topk_prob": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind -> (the model opened, its path), made once."""
    made = {}

    def make(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp("mixtures") / kind
            save_model(path, kind, KINDS[kind] | {"router_aux_loss_coef": COEFFICIENT})
            made[kind] = (open_source(str(path)), path)
        return made[kind]

    return make


def compute_theirs(path, *coefficients):
    """transformers' loss, the loss that balances, and for each coefficient of it the gradients by
    name, in float32.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # Matrices this small lose more by threads than they gain.
    torch.set_num_threads(1)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    ids = torch.from_numpy(TOKENS.astype(np.int64))
    found = network(ids[:, :-1], output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), ids[:, 1:].flatten())
    assert network.router_aux_loss_coef == COEFFICIENT
    gradients = []
    for coefficient in coefficients:
        network.zero_grad()
        (loss + coefficient * found.aux_loss).backward(retain_graph=True)
        named = network.named_parameters()
        gradients.append({name: parameter.grad.numpy().copy() for name, parameter in named})
    return loss.item(), found.aux_loss.item(), *gradients


def compute_ours(source, part=ALL):
    """Our losses and loads, and the gradient as a tree."""
    layout = make_single_device_layout()
    network = Decoder(source.model, Precision("float32", "float32"), layout=layout)
    accumulate = partial(accumulate_gradients, network, part=part)
    params = source.stack(dtype="float32")
    compute = jax.jit(lambda params: accumulate(params, TOKENS[None], None), compiler_options=QUICK)
    return jax.device_get(compute(params))


def list_pairs(model, ours, theirs):
    """(ours, theirs) of the gradients of routers, experts, queries and the embedding."""
    names = model.family.computation
    layers = ours["layers"]
    mlp = layers[names.mlp]
    parts = (names.gate, names.up, names.down)
    gate, up, down = (mlp[names.experts][name]["weight"] for name in parts)
    yield ours["embed_tokens"]["weight"], theirs["model.embed_tokens.weight"]
    for layer in range(len(gate)):
        name = f"model.layers.{layer}"
        both = np.concatenate([gate[layer], up[layer]], 1)
        yield both, theirs[f"{name}.mlp.experts.gate_up_proj"]
        yield down[layer], theirs[f"{name}.mlp.experts.down_proj"]
        yield mlp[names.router]["weight"][layer], theirs[f"{name}.mlp.gate.weight"]
        query = layers["self_attn"]["q_proj"]["weight"][layer]
        yield query, theirs[f"{name}.self_attn.q_proj.weight"]


def measure_gap(model, ours, theirs):
    """The largest difference of any gradient, of the largest number of its parameter."""
    pairs = list_pairs(model, ours, theirs)
    return max(np.abs(one - other).max() / np.abs(other).max() for one, other in pairs)


SOME = ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", SOME)
def test_losses_and_gradients_equal_transformers(kind, saved):
    """The sibling's coefficient is a tenth lower."""
    source, path = saved(kind)
    coefficients = (COEFFICIENT, COEFFICIENT * 0.9)
    loss, balance, theirs, others = compute_theirs(path, *coefficients)
    losses, ours = compute_ours(source)
    assert losses["loss"] == pytest.approx(loss, rel=1e-6)
    assert losses["balance_loss"] == pytest.approx(balance, rel=1e-6)
    assert measure_gap(source.model, ours, theirs) < 1e-4
    assert measure_gap(source.model, ours, others) > 1e-3


@pytest.mark.slow
def test_frozen_layers_are_balanced_too(saved):
    """Where two layers are trained their gradients are those of a training of all."""
    source, _ = saved("mixtral")
    losses, whole = compute_ours(source)
    parted, some = compute_ours(source, Part((1, 2)))
    for name, value in losses.items():
        np.testing.assert_allclose(parted[name], value, rtol=1e-6)
    ours = some["layers"]["block_sparse_moe"]["gate"]["weight"]
    theirs = whole["layers"]["block_sparse_moe"]["gate"]["weight"]
    largest = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs[1:3], rtol=0, atol=1e-5 * largest)
    assert np.abs(ours - theirs[:2]).max() > 1e-2 * largest


GROWTHS = (
    ["depth", "--map", "4:6", "--method", "identity"],
    ["experts", "4:8", "--exact"],
    ["width", "--axis", "moe_intermediate_size=40"],
)


@pytest.mark.slow
def test_a_mixture_grown_as_a_checkpoint_is_the_same_in_transformers(saved, tmp_path):
    """Imported, grown in depth, experts and their units, and exported. Measured: 4e-7."""
    _, path = saved("qwen3_moe")
    assert run(["import", str(path), str(tmp_path / "0")]) == 0
    for number, verb in enumerate(GROWTHS):
        names = [str(tmp_path / str(number + more)) for more in (0, 1)]
        assert run([*verb, *names]) == 0
        assert run(["verify", *names]) == 0
    assert run(["export", str(tmp_path / "3"), str(tmp_path / "out")]) == 0
    before, after = (compute_logits(each, TOKENS, "float32") for each in (path, tmp_path / "out"))
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


def test_the_loss_that_balances_is_least_where_all_are_as_busy():
    even = Routed(jnp.full((2, 4), 5.0), jnp.full((2, 4), 2.5))
    assert float(compute_balance_loss(even, 10)) == pytest.approx(2.0)
    one = Routed(jnp.asarray([[10.0, 10.0, 0, 0]]), jnp.asarray([[5.0, 5.0, 0, 0]]))
    assert float(compute_balance_loss(one, 10)) == pytest.approx(4.0)
    assert compute_load(one.counts).tolist() == [[0.5, 0.5, 0.0, 0.0]]


SIZES = {"layer": 2, "embed": 16, "head": 4, "kv": 2, "head_dim": 4, "vocab": 64, "context": 16}


def make_qwen3_moe(**config):
    config = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12} | config
    return build_architecture(Model(kind="qwen3_moe", mlp=48, config=config, **SIZES))


def test_a_token_passes_the_experts_that_it_chooses():
    model = make_qwen3_moe()
    whole = 2 * 8 * 3 * 16 * 12
    assert model.sizes["expert"] == 8 and model.config()["num_local_experts"] == 8
    assert model.parameters - model.active_parameters == whole * 3 // 4
    assert describe_mlp(model) == "8 experts of 12, 2 per token"
    more = make_qwen3_moe(num_experts_per_tok=4)
    assert more.flops_per_token() - model.flops_per_token() == 6 * whole // 4
    assert "layers.mlp.gate_proj" not in [".".join(row.path[:-1]) for row in model.table.rows]


def test_flops_of_grouped_products_are_those_of_their_rows():
    x, weight, sizes = jnp.ones((12, 5)), jnp.ones((3, 4, 5)), jnp.asarray([4, 4, 4])

    def loss(x, weight):
        return multiply_groups(x, weight, sizes, "tpu").sum()

    forward = jax.make_jaxpr(loss)(x, weight)
    assert count_product_flops(forward.jaxpr) == 2 * 12 * 5 * 4
    backward = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weight)
    assert count_product_flops(backward.jaxpr) == 3 * 2 * 12 * 5 * 4


def test_mixtures_that_are_not_computed_are_refused():
    with pytest.raises(UsageError, match="num_experts_per_tok is 9, and there are 8 experts"):
        make_qwen3_moe(num_experts_per_tok=9)
    model = make_qwen3_moe(mlp_only_layers=[1])
    with pytest.raises(UsageError, match="mlp_only_layers .1., and the trainer computes"):
        require_trained(model, "SRC")
    with pytest.raises(UsageError, match="no field of a Mixtral model"):
        build_architecture(Model(kind="mixtral", config={"norm_topk_prob": True}, **SIZES))
