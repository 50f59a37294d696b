"""`--moments first`: moments stay with the first copy of every unit; other copies begin at zero."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SMALL, save_checkpoint
from trained import STEPS, in_groups, load_state, save_trained

import growkit
import growkit.growth.plan
from growkit.checkpoint.location import open_source
from growkit.cli import run
from growkit.growth.axes import AxisMap
from growkit.growth.plan import FIRST_UNSCALED, set_options
from growkit.growth.width import plan_width

FIRST = ("--moments", "first")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("first") / "source")


def read(path, slot):
    return {name: each.read() for name, each in open_source(str(path)).tensors[slot].items()}


def layer_of(name):
    words = name.split(".")
    return int(words[words.index("layers") + 1]) if "layers" in words else None


@pytest.mark.parametrize(
    "words,index,kept",
    [
        (["--map", "3:5"], [0, 0, 1, 1, 2], {0, 2, 4}),
        (["--map", "3:5", "--method", "stack"], [0, 1, 2, 0, 1], {0, 1, 2}),
        (["--map", "3:4", "--method", "identity"], [0, 0, 1, 2], {0, 2, 3}),
        # The first copy that adds something.
        (["--map", "0,0,1,2", "--scale", "layer=0,1,1,1"], [0, 0, 1, 2], {1, 2, 3}),
    ],
)
def test_depth(source, tmp_path, words, index, kept, capsys):
    out = tmp_path / "out"
    assert run(["depth", *words, *FIRST, str(source), str(out)]) == 0
    said = capsys.readouterr().out
    assert "mu and nu kept for the first copy, zero for the others (approximate)" in said
    assert "count kept (70)" in said
    for slot in ("mu", "nu"):
        before, after = read(source, slot), read(out, slot)
        for name, array in after.items():
            layer = layer_of(name)
            if layer is None or layer in kept:
                old = name if layer is None else name.replace(f".{layer}.", f".{index[layer]}.")
                assert np.array_equal(array, before[old]) and array.any(), name
            else:
                assert not array.any(), name
    grown = open_source(str(out))
    assert grown.record["count"] == 70 and grown.lineage[-1]["moments"] == "first"
    assert run(["verify", str(source), str(out)]) == 0


def test_width(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ["width", "--embed", "2x", str(source), str(out)]
    assert run([*words, *FIRST]) == 0
    entry = open_source(str(out)).lineage[-1]
    # No factors with which training would go on exactly.
    assert entry["function"] == "preserved" and "optimizer" not in entry
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    for slot, scale in (("mu", 0.5), ("nu", 0.25)):
        old, new = read(source, slot)[name], read(out, slot)[name]
        assert np.array_equal(new[:64, :32], old * np.float32(scale))
        assert not new[64:].any() and not new[:, 32:].any()
    assert run(["verify", str(source), str(out)]) == 0
    # A sibling that keeps all copies' moments is told from it.
    monkeypatch.setattr(AxisMap, "added", property(lambda self: np.zeros(len(self), bool)))
    assert run(["verify", str(source), str(out)]) == 1


def test_pytorch_counts_the_steps_of_each_parameter(tmp_path):
    path = save_trained(tmp_path / "checkpoint-20")
    assert run(["depth", "--map", "3:4", *FIRST, str(path), str(tmp_path / "out")]) == 0
    state = load_state(tmp_path / "out")
    names = [name for group in in_groups(SMALL.change(layer=4)) for name in group]
    entries = [state["state"][n] for group in state["param_groups"] for n in group["params"]]
    for name, entry in zip(names, entries, strict=True):
        new = layer_of(name) == 1
        assert float(entry["step"]) == (0 if new else STEPS), name
        assert bool(entry["exp_avg"].any()) == bool(entry["exp_avg_sq"].any()) == (not new), name
    assert run(["verify", str(path), str(tmp_path / "out")]) == 0


def test_averages_of_normalised_steps_take_no_shares():
    model = growkit.describe_model(
        "up  /inputs mlp  normal  matrix\ndown  /mlp outputs  normal  matrix",
        {"inputs": 3, "mlp": 4, "outputs": 2},
    )
    plan = set_options(plan_width(model, mlp=8), moments="first")
    params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    optimizer = optax.rmsprop(1e-2, momentum=0.9)
    _, state = optimizer.update(params, optimizer.init(params), params)
    grown = growkit.grow(state, plan)
    for slot, scale in (("nu", 0.25), ("trace", 1.0)):
        old, new = optax.tree.get(state, slot)["up"], optax.tree.get(grown, slot)["up"]
        assert np.allclose(new[:, :4], np.asarray(old) * scale) and not new[:, 4:].any()
        old, new = optax.tree.get(state, slot)["down"], optax.tree.get(grown, slot)["down"]
        assert np.array_equal(new[:4], old) and not new[4:].any()


def test_no_user_asks_for_what_has_no_name(source, tmp_path, capsys):
    words = ["depth", "--map", "3:4", "--moments", "frist", str(source), str(tmp_path / "out")]
    assert run(words) != 0
    assert "did you mean 'first'?" in capsys.readouterr().err
    assert FIRST_UNSCALED not in growkit.growth.plan.MOMENT_OPTIONS


def test_a_dry_run_says_it(source, tmp_path, capsys):
    words = ["depth", "--map", "3:4", *FIRST, "--dry-run", str(source), str(tmp_path / "out")]
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["moments"] == "first"
    assert run(words) == 0
    assert "optimizer.new.rewarmup=200" in capsys.readouterr().out


@pytest.mark.parametrize(
    "beta2,warm,most,warmed",
    [(0.95, 20, 1.10, 1.10), (0.99, 100, 2.13, 1.26), (0.999, 1000, 6.57, 1.26)],
)
def test_first_steps_of_moments_that_begin_at_zero(beta2, warm, most, warmed):
    """docs/operators.md: how long Adam's steps get by a count that is large already."""
    step = np.arange(1, 3000)
    ratio = (1 - 0.9**step) / np.sqrt(1 - beta2**step)
    assert ratio.max() == pytest.approx(most, abs=0.01)
    assert (ratio * np.minimum(1.0, step / warm)).max() == pytest.approx(warmed, abs=0.01)


def test_the_plan_says_that_training_is_another():
    plan = plan_width(SMALL, embed="2x")
    assert plan.continues
    assert not dataclasses.replace(plan, moments="first").continues
