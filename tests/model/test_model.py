"""The model is Hugging Face's: from files on disk its logits equal transformers'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, save_transformers_model, transformers_logits

from growkit.checkpoint.location import open_source
from trainer.config.sections import Dropout, Precision
from trainer.model.decoder import Decoder, init_params
from trainer.model.parameters import find_row

pytestmark = pytest.mark.usefixtures("strict_promotion")

VARIANTS = [
    (pct, parallel, tied)
    for pct in (0.25, 1.0)
    for parallel in (True, False)
    for tied in (True, False)
]


def our_logits(source, tokens, dtype, rotary=None, **change):
    model = source.model.change(**change)
    network = Decoder(model, Precision(params=dtype, compute=dtype))
    params = source.stack(dtype=dtype)
    return np.asarray(jax.jit(network.apply)({"params": params}, tokens, rotary=rotary))


def test_strict_promotion_is_on():
    """Otherwise the tests of this folder would not notice an unnamed promotion."""
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((3, 2)) + jnp.ones(2)


@pytest.mark.parametrize("pct,parallel,tied", VARIANTS)
@pytest.mark.parametrize("dtype,bound", [("float32", 1e-4), ("float64", 1e-10)])
def test_logits_equal_transformers(tmp_path, tokens, pct, parallel, tied, dtype, bound):
    model = SMALL.change(rotary_pct=pct, parallel_residual=parallel, tied=tied)
    source = open_source(save_transformers_model(tmp_path / "hf", model, dtype).as_posix())
    theirs, rotary = transformers_logits(tmp_path / "hf", tokens, dtype)
    with jax.enable_x64(dtype == "float64"):
        # transformers computes sine and cosine in float32 whatever the dtype, right to one unit in
        # the last place. In float64 that unit is the whole difference, so ours takes its tables.
        ours = our_logits(source, tokens, dtype, rotary if dtype == "float64" else None)
    assert ours.dtype == dtype
    assert np.abs(ours - theirs).max() < bound
    assert np.abs(theirs).max() > 1


@pytest.mark.parametrize(
    "change", [{"parallel_residual": False}, {"rotary_pct": 1.0}, {"norm_eps": 1e-2}]
)
def test_a_changed_model_has_other_logits(tmp_path, tokens, change):
    source = open_source(save_transformers_model(tmp_path / "hf", SMALL).as_posix())
    theirs, _ = transformers_logits(tmp_path / "hf", tokens)
    assert np.abs(our_logits(source, tokens, "float32", **change) - theirs).max() > 1e-3


def test_heads_split_any_other_way_have_other_logits(tmp_path, tokens):
    source = open_source(save_transformers_model(tmp_path / "hf", SMALL).as_posix())
    theirs, _ = transformers_logits(tmp_path / "hf", tokens)
    params = source.stack()
    fused = params["layers"]["attention"]["query_key_value"]["weight"]
    apart = fused.reshape(SMALL.layer, 3, SMALL.head_count, SMALL.head_dim, -1)
    wrong = apart.swapaxes(1, 2).reshape(fused.shape)
    params["layers"]["attention"]["query_key_value"]["weight"] = wrong
    network = Decoder(SMALL, Precision("float32", "float32"))
    ours = np.asarray(jax.jit(network.apply)({"params": params}, tokens))
    assert np.abs(ours - theirs).max() > 1e-3


def test_bfloat16_compute_keeps_logits_wide(tmp_path, tokens):
    source = open_source(save_transformers_model(tmp_path / "hf", SMALL).as_posix())
    theirs, _ = transformers_logits(tmp_path / "hf", tokens)
    network = Decoder(SMALL, Precision("float32", "bfloat16"))
    ours = np.asarray(jax.jit(network.apply)({"params": source.stack()}, tokens))
    assert ours.dtype == np.float32
    assert 1e-4 < np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()


def test_initial_parameters_are_as_the_table_says():
    params = init_params(SMALL, Precision("float32", "float32"), seed=0)
    leaves = {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert set(leaves) == {row.path for row in SMALL.table.rows}
    for path, leaf in leaves.items():
        row = find_row(SMALL, path)
        expected = row.stacked_shape(SMALL.sizes)
        assert leaf.shape == expected
        spread = float(np.std(leaf))
        wanted = {"ones": 0.0, "zeros": 0.0, "normal": SMALL.initializer_range}[row.begins]
        if row.writes_stream and row.begins == "normal":
            wanted /= np.sqrt(2 * SMALL.layer)
        assert spread == pytest.approx(wanted, rel=0.1), path


def test_layers_begin_different():
    params = init_params(SMALL, Precision("float32", "float32"), seed=0)
    weight = params["layers"]["mlp"]["dense_h_to_4h"]["weight"]
    assert not np.array_equal(weight[0], weight[1])


@pytest.mark.parametrize("where", ["hidden", "attention", "embedding"])
def test_each_dropout_acts_and_only_when_training(where, tokens):
    params = init_params(SMALL, Precision("float32", "float32"), seed=0)
    rates = {"hidden": 0.0, "attention": 0.0, "embedding": 0.0} | {where: 0.5}
    network = Decoder(SMALL, Precision("float32", "float32"), Dropout(**rates))
    apply = jax.jit(
        lambda key: network.apply({"params": params}, tokens, False, rngs={"dropout": key})
    )
    plain = jax.jit(network.apply)({"params": params}, tokens)
    key = jax.random.key(0)
    assert not np.allclose(plain, apply(key))
    assert np.array_equal(apply(key), apply(key))
    assert not np.array_equal(apply(key), apply(jax.random.key(1)))


@pytest.mark.parametrize("remat", ["dots", "half", "full"])
def test_rematerialising_changes_no_gradient(remat, tokens):
    params = init_params(SMALL, Precision("float32", "float32"), seed=0)

    def gradient(policy):
        network = Decoder(SMALL, Precision("float32", "float32"), Dropout(0.1, 0.1, 0.0), policy)
        keys = {"dropout": jax.random.key(0)}

        def spread(params):
            return network.apply({"params": params}, tokens, False, rngs=keys).var()

        return jax.tree.leaves(jax.jit(jax.grad(spread))(params))

    for ours, theirs in zip(gradient(remat), gradient("none"), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
