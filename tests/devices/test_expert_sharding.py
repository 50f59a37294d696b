"""Experts on a mesh: losses are one device's, and each device holds its own experts.

The eight devices are emulated in a process of their own, as in `test_sharding`: run as a script,
this file is that process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import test_sharding

import trainer.devices.sharding as sharding
from growkit.errors import UsageError
from trainer.config.model import Model, build_architecture
from trainer.config.sections import Batch, Mesh
from trainer.model import experts

CONFIG = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
SECTION = Model(
    kind="qwen3_moe",
    layer=2,
    embed=32,
    head=4,
    kv=2,
    head_dim=8,
    mlp=64,
    vocab=128,
    context=16,
    initializer_range=0.2,
    config=CONFIG | {"router_aux_loss_coef": 0.1, "norm_topk_prob": True},
)
MESHES = {
    "expert": Mesh(expert=8),
    "expert and tensor": Mesh(expert=4, tensor=2),
    "all four": Mesh(data=1, fsdp=2, expert=2, tensor=2),
}
PLACES = {
    "eight": MESHES["all four"],
    "one": Mesh(data=1),
    "expert": Mesh(data=1, expert=4),
    "zero1": Mesh(),
}


@pytest.fixture(scope="module")
def found():
    return {}


def compute(found, *names):
    """What the process found for these meshes, each asked once."""
    missing = [name for name in names if name not in found]
    if missing:
        found |= test_sharding.run_emulated(*missing, script=__file__)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_train_a_mixture_as_one(name, found):
    compute(found, "one", name)
    # In a process of its own: JAX keeps what it traced for an equal mesh.
    compute(found, "wrong")
    for key in ("steps", "evaluation"):
        np.testing.assert_allclose(found[name][key], found["one"][key], rtol=2e-5)
    assert found[name]["bytes"][0] < 0.5 * found["one"]["bytes"][0]
    # Where every device takes its experts for the first ones, it is another training.
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found["wrong"]["steps"], found["one"]["steps"], rtol=1e-3)


@pytest.mark.slow
def test_experts_move_between_topologies_bit_for_bit(tmp_path):
    found = test_sharding.run_emulated("moved", str(tmp_path), script=__file__)
    wrong = found.pop("begun with the first device's parts")
    assert len(found) == 9 and set(found.values()) == {found["trained"]}, found
    assert wrong != found["trained"]


def find_spec(name, rules):
    mesh = jax.sharding.AbstractMesh((2, 2, 2, 2), sharding.MESH_AXES)
    layout = sharding.Layout(mesh)
    table = build_architecture(SECTION).table
    row = next(row for row in table.rows if ".".join(row.path) == f"layers.mlp.{name}.weight")
    return tuple(layout.row_sharding(row, rules).spec)


def test_experts_lie_by_their_axes():
    rest, moments = sharding.PARAMETER_RULES, sharding.ZERO_RULES
    both = ("fsdp", "data")
    expected = (None, "expert", "tensor", "fsdp")
    assert find_spec("experts.up_proj", rest) == expected
    assert find_spec("experts.down_proj", rest) == (None, "expert", "fsdp", "tensor")
    assert find_spec("experts.up_proj", moments) == (None, "expert", "tensor", both)
    assert find_spec("gate", sharding.COMPUTE_RULES) == (None, "expert", None)


def test_meshes_that_do_not_divide_are_refused():
    devices = test_sharding.make_devices()
    config = replace(test_sharding.CONFIG, batch=Batch(16, 1), mesh=Mesh(expert=8))
    few = replace(SECTION, config=CONFIG | {"num_experts": 4})
    words = "expert 4 does not divide over mesh.expert = 8; it may be 1, 2 or 4"
    with pytest.raises(UsageError, match=words):
        sharding.make_layout(config, build_architecture(few), devices)
    words = "mesh.expert=8 splits the experts of a mixture, and a GPTNeoX model has none"
    with pytest.raises(UsageError, match=words.replace("GPTNeoX", ".*")):
        sharding.make_layout(config, test_sharding.MODEL, devices)


def run_mesh(name):
    """The steps of a mesh; `wrong` is one whose devices all take the first experts."""
    mesh = MESHES.get(name, Mesh(data=1) if name == "one" else Mesh(expert=8))
    with pytest.MonkeyPatch.context() as patch:
        if name == "wrong":
            patch.setattr(experts.jax.lax, "axis_index", lambda axis: 0)
        return test_sharding.run_steps(replace(test_sharding.CONFIG, mesh=mesh, batch=Batch(16, 1)))


if __name__ == "__main__":
    test_sharding.MODEL = build_architecture(SECTION)
    if sys.argv[1] == "moved":
        test_sharding.PLACES = PLACES
        print(json.dumps(test_sharding.move_state(sys.argv[2])))
    else:
        print(json.dumps({name: run_mesh(name) for name in sys.argv[1:]}))
    sys.exit(0)
