"""A mesh of devices changes where a step is computed, not what: losses are the same on any mesh.

The eight devices are emulated, in a process of their own, because XLA must be told before it
starts. Run as a script, this file is that process: it prints what it found as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import trainer.devices.sharding as sharding
from growkit.checkpoint.location import open_source
from growkit.errors import UsageError
from growkit.lineage import Lineage
from growkit.models.gpt_neox import GPT_NEOX
from trainer.config.sections import Batch, Config, Dropout, Mesh, Optimizer, Precision, Schedule
from trainer.model import kernels
from trainer.model.attention import causal_attention
from trainer.model.decoder import init_params
from trainer.run.checkpoint import Checkpoints, Snapshot
from trainer.run.state import from_source, to_tree
from trainer.step.update import abstract_state, init_state, make_eval_step, make_train_step

MODEL = GPT_NEOX.model(layer=2, embed=32, head=4, mlp=64, vocab=128, context=16, tied=False)
CONFIG = Config(
    dropout=Dropout(0.0, 0.0, 0.0),
    precision=Precision("float32", "float32"),
    batch=Batch(16, 1),
    optimizer=Optimizer(learning_rate=1e-2),
    schedule=Schedule(steps=20, warmup=2),
)
DROPPED = replace(CONFIG, dropout=Dropout(0.1, 0.1, 0.1))
MESHES = {
    "one": Mesh(data=1),
    "dp": Mesh(zero1=False),
    "zero1": Mesh(),
    "fsdp": Mesh(fsdp=8),
    "tp": Mesh(data=2, tensor=4, zero1=False),
    "mixed": Mesh(fsdp=2, tensor=2),
}
STEPS = 4


def configure(name, parts, dropped):
    return replace(DROPPED if dropped else CONFIG, mesh=MESHES[name], batch=Batch(16, parts))


def draw_tokens(step, parts=1):
    drawn = np.random.default_rng(step).integers(
        0, MODEL.vocab, (16, MODEL.context + 1), dtype=np.int32
    )
    return drawn.reshape(parts, 16 // parts, -1)


def start_state(config, layout):
    """A new state on the mesh."""
    params = jax.device_get(init_params(MODEL, config.precision, 0))
    like = abstract_state(config, MODEL, layout)
    return jax.tree.map(
        lambda array, leaf: sharding.place(np.asarray(array), leaf.sharding),
        init_state(config, MODEL, params),
        like,
    )


def run_steps(config):
    """Train for some steps: their losses and gradient norms, and the validation loss after them.

    Also the bytes of parameters and moments on the first device, and the step's collectives.
    """
    layout = sharding.make_layout(config, MODEL)
    state = start_state(config, layout)
    parts = config.batch.accumulation
    found = []
    train_step = make_train_step(config, MODEL, None, layout)
    step = train_step.trace(state, draw_tokens(0, parts)).lower().compile()
    for number in range(STEPS):
        batch = sharding.place(draw_tokens(number, parts), layout.batch_sharding(1))
        state, metrics = step(state, batch, train_step.numbers)
        found.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    mask = np.arange(16) < 13
    loss = float(make_eval_step(config, MODEL, layout)(state.params, draw_tokens(99)[0], mask))
    held_bytes = [count_bytes(state.params), count_bytes(state.optimizer)]
    return {
        "steps": found,
        "evaluation": loss,
        "bytes": held_bytes,
        "collectives": count_collectives(step),
    }


def count_bytes(tree):
    """Bytes of a tree on the first device."""
    first = jax.devices()[0]
    parts = (
        part
        for leaf in jax.tree.leaves(tree)
        for part in leaf.addressable_shards
        if part.device == first
    )
    return sum(part.data.nbytes for part in parts)


def count_collectives(compiled):
    """How many collectives of each kind a compiled step has."""
    names = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
    return {name: len(re.findall(rf" {name}(?:-start)?\(", compiled.as_text())) for name in names}


def run_emulated(*arguments, script=__file__):
    """What this file, or another, prints in a process that has eight devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# (mesh, accumulated parts, dropout): the default tests take these, the slow one all others too.
SOME = [(name, 2, True) for name in MESHES]
ALL = [(name, parts, dropped) for name in MESHES for parts in (1, 2) for dropped in (False, True)]


def run_cases(cases):
    return {json.dumps(case): run_steps(configure(*case)) for case in map(tuple, cases)}


@pytest.fixture(scope="module")
def found():
    return run_emulated("trajectories", json.dumps(SOME))


def get_case(found, *case):
    return found[json.dumps(case)]


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours["steps"], theirs["steps"], rtol=1e-5)
    np.testing.assert_allclose(ours["evaluation"], theirs["evaluation"], rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_eight_devices_train_as_one(name, found):
    assert_same(get_case(found, name, 2, True), get_case(found, "one", 2, True))


@pytest.mark.slow
def test_every_mesh_with_every_accumulation():
    found = run_emulated("trajectories", json.dumps(ALL))
    for name, parts, dropped in ALL:
        assert_same(get_case(found, name, parts, dropped), get_case(found, "one", parts, dropped))


def test_each_device_holds_its_part(found):
    params, moments = get_case(found, "one", 2, True)["bytes"]
    part = {
        name: [
            ours / all
            for ours, all in zip(
                get_case(found, name, 2, True)["bytes"], (params, moments), strict=True
            )
        ]
        for name in MESHES
    }
    assert part["dp"] == [1, 1]
    # Biases without an embed axis stay whole: a little more than an eighth.
    assert part["zero1"][0] == 1 and 1 / 8 < part["zero1"][1] < 0.14
    assert 1 / 8 < part["fsdp"][0] < 0.14 and 1 / 8 < part["fsdp"][1] < 0.14
    assert 1 / 4 < part["tp"][0] < 0.27
    assert 1 / 4 < part["mixed"][0] < 0.27 and 1 / 8 < part["mixed"][1] < 0.14


def test_devices_that_all_see_the_same_sequences_train_another_model(found):
    """The classic mistake of data parallelism."""
    wrong = run_emulated(
        "trajectories", json.dumps([("zero1", 2, True)]), "the first device's sequences"
    )
    with pytest.raises(AssertionError):
        assert_same(get_case(wrong, "zero1", 2, True), get_case(found, "one", 2, True))


def test_the_collectives_of_the_compiled_step(found):
    """XLA for CPU sums whole gradients and slices them, so ZeRO saves memory only.

    Updates are gathered once for each parameter.
    """
    found = {name: get_case(found, name, 2, True)["collectives"] for name in MESHES}
    assert not any(found["one"].values())
    assert found["dp"]["all-reduce"] and not found["dp"]["all-gather"]
    leaves = len(MODEL.table.rows)
    assert 0 < found["zero1"]["all-gather"] <= leaves
    assert found["fsdp"]["all-gather"] > 0
    assert found["tp"]["all-reduce"] > found["dp"]["all-reduce"]


def find_specs(name, **rules):
    """The mesh axes of a row on eight devices, by name of the row's path."""
    mesh = jax.sharding.AbstractMesh((2, 2, 1, 2), sharding.MESH_AXES)
    layout = sharding.Layout(mesh, **rules)
    row = next(row for row in MODEL.table.rows if ".".join(row.path) == name)
    return tuple(layout.parameter_sharding(row).spec), tuple(layout.moment_sharding(row).spec)


def test_rows_lie_by_their_axes():
    both = ("fsdp", "data")
    qkv, dense = "layers.attention.query_key_value", "layers.attention.dense"
    assert find_specs(f"{qkv}.weight") == ((None, "tensor", "fsdp"), (None, "tensor", both))
    assert find_specs(f"{qkv}.bias") == ((None, "tensor"), (None, "tensor"))
    assert find_specs(f"{dense}.weight") == ((None, "fsdp", "tensor"), (None, both, "tensor"))
    assert find_specs("embed_out.weight", zero1=False) == (("tensor", "fsdp"), ("tensor", "fsdp"))


REFUSED = {
    "heads": (
        Mesh(data=1, tensor=8),
        "head 4 does not divide over mesh.tensor = 8; it may be 1, 2 or 4",
    ),
    "devices": (
        Mesh(data=4, fsdp=4),
        "4 x 4 x 1 x 1 asks for 16 devices, and there are 8; mesh.data=0 takes as many as",
    ),
    "rest": (
        Mesh(fsdp=3),
        "mesh.fsdp x mesh.expert x mesh.tensor = 3 x 1 x 1 does not divide the 8 devices; .* may "
        "be 1, 2, 4 or 8",
    ),
}


class Device:
    """The attributes of a device that a mesh needs."""

    platform, process_index, device_kind = "cpu", 0, "cpu"

    def __init__(self, number):
        self.id = number


def make_devices():
    return [Device(number) for number in range(8)]


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_divide_is_refused_in_a_sentence(name):
    mesh, words = REFUSED[name]
    with pytest.raises(UsageError, match=words):
        sharding.make_layout(replace(CONFIG, mesh=mesh), MODEL, make_devices())


def test_a_batch_that_does_not_divide_is_refused():
    devices = make_devices()
    with pytest.raises(
        UsageError,
        match="= 4 sequences do not divide over .* = 8 x 1 x 1; their product may be 1, 2 or 4",
    ):
        sharding.make_layout(replace(CONFIG, batch=Batch(16, 4)), MODEL, devices)
    narrow = MODEL.change(embed=36, head=6, rotary_pct=1.0)
    with pytest.raises(
        UsageError,
        match="embed 36 does not divide over mesh.fsdp x mesh.data = 8; .*mesh.zero1=false",
    ):
        sharding.make_layout(CONFIG, narrow, devices)
    plain = replace(CONFIG, mesh=MESHES["dp"])
    assert sharding.make_layout(plain, narrow, devices).batch_shards == 8


# Checkpoints move between topologies.
PLACES = {
    "eight": MESHES["mixed"],
    "one": Mesh(data=1),
    "four": Mesh(data=2, fsdp=2),
    "zero1": Mesh(),
}


def digest(tree):
    """A hash of every byte of the parameters and moments of a state as `to_tree` gives it."""
    arrays = (
        np.asarray(leaf) for slot in ("params", "mu", "nu") for leaf in jax.tree.leaves(tree[slot])
    )
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def move_state(directory):
    """Digests of a state that was trained on eight devices, then moved to others in turn.

    For each place it is saved there, read as a source, and restored in the next place.
    """
    like = {name: make_abstract_state(mesh) for name, mesh in PLACES.items()}
    eight = sharding.make_layout(replace(CONFIG, mesh=PLACES["eight"]), MODEL)
    state = start_state(CONFIG, eight)
    state, _ = make_train_step(CONFIG, MODEL, None, eight)(state, draw_tokens(0))
    found = {"trained": digest(to_tree(state))}
    previous = None
    for name in PLACES:
        if previous:
            checkpoints = Checkpoints(Path(directory) / previous, CONFIG.checkpoint)
            state = checkpoints.restore(1, like[name]).state
            assert list_shardings(state) == list_shardings(like[name])
        save(state, Path(directory) / name)
        source = open_source(f"{directory}/{name}")
        stacked = {slot: source.stack(slot) for slot in source.tensors}
        found[f"read from {name}"] = digest(stacked)
        found[f"begun from {name}"] = digest(to_tree(from_source(source, like["eight"])))
        previous = name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.run.state._key", len)
        wrong = from_source(source, like[previous])
        found["begun with the first device's parts"] = digest(to_tree(wrong))
    return found


def make_abstract_state(mesh):
    return abstract_state(CONFIG, MODEL, sharding.make_layout(replace(CONFIG, mesh=mesh), MODEL))


def list_shardings(state):
    return [leaf.sharding for leaf in jax.tree.leaves(state)]


def save(state, directory):
    checkpoints = Checkpoints(directory, CONFIG.checkpoint)
    checkpoints.save(1, Snapshot(state, MODEL.config(), Lineage(), {}, {}))
    checkpoints.close()


def test_a_state_moves_between_topologies_bit_for_bit(tmp_path):
    found = run_emulated("moved", str(tmp_path))
    wrong = found.pop("begun with the first device's parts")
    assert len(found) == 9 and set(found.values()) == {found["trained"]}, found
    assert wrong != found["trained"]


def compare_kernel(*over):
    """How far splash attention's gradients on the mesh are from XLA's on one device.

    over: the mesh axes over which heads and then time are split.
    """
    layout = sharding.make_layout(replace(CONFIG, mesh=MESHES["mixed"]), MODEL)
    q, k, v = (
        np.random.default_rng(seed).normal(size=(4, 4, 256, 16)).astype(np.float32)
        for seed in range(3)
    )

    def gradients(attention):
        return jax.jit(jax.grad(lambda *a: (attention(*a) ** 2).sum(), (0, 1, 2)))(q, k, v)

    def spread(*inputs):
        return kernels.kernel_attention("splash", inputs, layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            kernels.KERNEL_FUNCTIONS, "splash", partial(kernels.splash_attention, interpret=True)
        )
        patch.setitem(kernels.COMPUTE_RULES, "head", over)
        ours, theirs = gradients(spread), gradients(lambda *a: causal_attention(*a, None, 0.0))
    return max(float(abs(mine - plain).max()) for mine, plain in zip(ours, theirs, strict=True))


def test_a_kernel_on_eight_devices_computes_what_one_does():
    right, wrong = run_emulated("kernel")
    assert right < 1e-4 < 0.1 < wrong, "each device its own heads, and not its own part of the past"


def draw_for_first_device(draw, step, parts=1):
    """The mutation: every device gets the sequences of the first of eight."""
    first = draw(step, parts)[:, : 16 // parts // 8]
    return np.tile(first, (1, 8, 1))


def main(what, cases="", mutation=""):
    """What the process with eight devices prints."""
    global draw_tokens
    if mutation:
        draw_tokens = partial(draw_for_first_device, draw_tokens)
    if what == "trajectories":
        print(json.dumps(run_cases(json.loads(cases))))
    elif what == "kernel":
        print(json.dumps([compare_kernel("tensor"), compare_kernel(None, "tensor")]))
    else:
        print(json.dumps(move_state(cases)))


if __name__ == "__main__":
    main(*sys.argv[1:])
