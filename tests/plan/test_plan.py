"""The plan: facts and formulas, a compiler's refusals read, remedies in order, and steps compiled for TPUs not here."""

from __future__ import annotations

import importlib.util
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growkit.cli import run
from growkit.errors import GrowkitError, UsageError
from trainer.config.sections import resolve
from trainer.config.values import read_values
from trainer.data.tokens import TokenWriter
from trainer.devices.accelerators import TPUS, parse_slice, peak_flops
from trainer.devices.sharding import make_single_device_layout
from trainer.model.kernels import splash_attention
from trainer.plan import plan
from trainer.run.checkpoint import find_last_step
from trainer.step.update import State, forget_programs

GIB = 2**30
libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPUs' compiler, is not here"
)


def tiny(*changes: str):
    return resolve(read_values("tiny", list(changes)))


@pytest.mark.parametrize(
    ("name", "native", "chips", "devices"),
    [
        ("v2-8", "v2:2x2", 4, 8),
        ("v3-32", "v3:4x4", 16, 32),
        ("v3-128", "v3:8x8", 64, 128),
        ("v3:4x8", "v3:4x8", 32, 64),
        ("v4-8", "v4:2x2x1", 4, 4),
        ("v4-32", "v4:2x2x4", 16, 16),
        ("v4:4x4x12", "v4:4x4x12", 192, 192),
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5e-16", "v5e:4x4", 16, 16),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("v5p-16", "v5:2x2x2", 8, 8),
        ("v6e-8", "v6e:2x4", 8, 8),
    ],
)
def test_slices_by_their_names(name, native, chips, devices):
    found = parse_slice(name)
    assert (found.native, found.chips, found.devices) == (native, chips, devices)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9-8", "v3-16"),
        ("v3", "natively v3:4x4"),
        ("v3-7", "2 cores a chip"),
        ("v4-24", "no power of two"),
        ("v4:4x4", "3 dimensions"),
    ],
)
def test_a_name_of_no_slice_is_refused(name, words):
    with pytest.raises(UsageError, match=words):
        parse_slice(name)


def test_devices_have_less_than_their_chips_and_known_peaks():
    for accelerator in TPUS.values():
        assert (
            accelerator.memory * 0.9
            < accelerator.usable * accelerator.devices
            <= accelerator.memory * 1.01
        )

    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    assert peak_flops(Device()) == 989e12
    Device.device_kind = "TPU v5 lite"
    assert peak_flops(Device()) == 197e12
    assert peak_flops(jax.devices("cpu")[0]) is None


def test_time_and_cost_by_the_formula():
    config = resolve(read_values("760m", []))
    slice_ = parse_slice("v3-32")
    on = plan.Target(
        "v3-32", [None] * 32, slice_.chips, GIB, slice_.chips * slice_.accelerator.peak, "core"
    )
    made = plan.Plan(
        config,
        plan.build_architecture(config.model),
        on,
        {},
        plan.Choice("xla", ""),
        plan.Memory(0, 0, 0, 0, 1),
        0.0,
    )
    # 24 blocks of 12 d^2 and a tied head are multiplied; the attention's 12 layer d context.
    weights, attention = 24 * 12 * 1536**2 + 50304 * 1536, 12 * 24 * 1536 * 1024
    flops = 512 * 1024 * (6 * weights + attention)
    assert made.flops == flops
    assert made.estimate_step_seconds(0.5) == pytest.approx(flops / (0.5 * 16 * 123e12))
    assert made.estimate_hours(0.5) == pytest.approx(82000 * made.estimate_step_seconds(0.5) / 3600)
    assert made.estimate_cost(0.5, 2.0) == pytest.approx(made.estimate_hours(0.5) * 16 * 2.0)
    assert made.estimate_cost(0.25, 2.0) == pytest.approx(2 * made.estimate_cost(0.5, 2.0))


def test_products_are_counted_as_often_as_they_run():
    def once(x):
        return x @ x

    def looped(x):
        return jax.lax.scan(lambda y, _: (y @ y, None), x, length=5)[0]

    counted = [
        plan.count_product_flops(jax.make_jaxpr(f)(jnp.ones((8, 8))).jaxpr) for f in (once, looped)
    ]
    assert counted == [2 * 8**3, 5 * 2 * 8**3]
    # A kernel's blocks and a mesh's devices: two products forward, three for q's gradient, four for k's and v's, and
    # the output times its gradient.
    made = make_single_device_layout()
    spec = made.make_sharding("data").spec

    def attention(q):
        each = jax.shard_map(
            splash_attention, mesh=made.mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
        )
        return each(q, q, q).sum()

    traced = jax.make_jaxpr(jax.grad(attention))(jnp.ones((3, 2, 256, 16)))
    assert plan.count_product_flops(traced.jaxpr) == 3 * 2 * (2 * 256 * 16) * (9 * 256 + 1)


def test_what_is_computed_again_counts_again():
    def computed(config):
        model = plan.build_architecture(config.model)
        made = plan.make_layout(config, model, jax.devices("cpu")[:1])
        step = plan.make_train_step(config, model, layout=made)
        traced = step.trace(plan.abstract_state(config, model, made), plan.abstract_batch(config, made))
        return plan.count_product_flops(traced.jaxpr), 16 * 128 * model.flops_per_token(128)

    kept, formula = computed(tiny())
    again, _ = computed(tiny("remat=full"))
    assert kept == formula < again < 1.34 * formula


def test_a_refusal_is_read_in_both_of_its_forms():
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.92G) exceeds "
        "available HBM (15.48G)."
    )
    late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.30G of 15.48G hbm. Exceeded hbm capacity"
    assert plan.parse_refusal(early, 3 * GIB) == (int(16.92 * GIB), int(15.48 * GIB))
    assert plan.parse_refusal(late, 3 * GIB) == (int(17.30 * GIB) - 3 * GIB, int(15.48 * GIB))
    assert plan.parse_refusal("RESOURCE_EXHAUSTED: something else", 1) == (0, None)


class Refuses:
    """A lowered step whose compilation fails."""

    def __init__(self, words: str):
        self.words = words

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.words)


def test_a_program_that_was_refused_never_fits():
    like = State(jax.ShapeDtypeStruct((4,), jnp.float32, sharding=make_single_device_layout().replicated), {}, None, None)
    memory = plan.measure_memory(Refuses("RESOURCE_EXHAUSTED: of no known form"), like, 100 * GIB)
    assert memory.parameters == 16 and not memory.fits
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan.measure_memory(Refuses("INTERNAL: a bug"), like, 1)


def tried(needs: dict[str, int], config=None, mesh=None):
    """The changes tried when a step needs so many bytes with each of them, 100 being there."""

    def measure(changed):
        need = 1000
        for words, bytes_ in needs.items():
            if plan.apply_changes(changed, words.split()) == changed:
                need = min(need, bytes_)
        return plan.Memory(need, 0, 0, 0, 100)

    mesh = mesh or {"data": 4, "fsdp": 1, "tensor": 1}
    return [
        " ".join(trial.changes)
        for trial in plan.try_remedies(config or tiny("mesh.zero1=false"), mesh, measure)
    ]


def test_remedies_come_in_order_and_end_with_the_first_that_fits():
    order = [
        "remat=dots", "remat=full", "mesh.zero1=true", "mesh.data=1 mesh.fsdp=4", "batch.accumulation=2",
        "batch.accumulation=4",
    ]  # fmt: skip
    for number, words in enumerate(order):
        assert tried({words: 50}) == order[: number + 1]
    # No step of the context's: 128 is the shortest. Nothing helps alone: then together.
    both = tried({"remat=full mesh.zero1=true": 50})
    assert both == [*order, "remat=full mesh.zero1=true"]
    assert tried({})[-1] == "remat=full mesh.data=1 mesh.fsdp=4 batch.accumulation=4"
    assert tried({}, tiny("model.context=512", "remat=full"), {"data": 1, "fsdp": 1, "tensor": 1})[
        -1
    ].endswith("model.context=128")


def test_advice_names_the_remedy_or_says_that_there_is_none():
    fits, short = plan.Memory(GIB, 0, 0, 0, 2 * GIB), plan.Memory(3 * GIB, 0, 0, 0, 2 * GIB)
    assert "remat=full would make it fit" in plan.describe_remedy([plan.Trial(("remat=full",), fits)])
    assert "larger devices" in plan.describe_remedy([plan.Trial(("remat=full",), short)])
    assert "needs 3.0 GiB a core and there are 2.0, 1.0 too few" in plan.describe_shortage(short, "core")


def test_a_plan_for_this_machine(capsys):
    assert run(["plan", "tiny", "--topology", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] and said["step_seconds"] is None and said["tried"] == []
    # parameters and both moments, float32, whole on one device
    assert said["memory"]["parameters"] == 4 * said["parameters"]
    assert said["memory"]["optimizer"] == 8 * said["parameters"] + 4
    assert said["tokens"] == 500 * 16 * 128
    assert said["attention"]["name"] == "xla"


def test_a_plan_that_does_not_fit_ends_with_one_sentence_and_exit_code_1(monkeypatch, capsys):
    assert run(["plan", "tiny", "--topology", "cpu", "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["memory"]["peak"]
    monkeypatch.setattr(plan, "find_available_memory", lambda devices: needed - 1)
    assert run(["plan", "tiny", "--topology", "cpu"]) == 1
    said = capsys.readouterr()
    assert "does not fit" in said.out
    *_, sentence = said.err.splitlines()
    assert (
        sentence.startswith("growkit: the step does not fit: it needs")
        and "would make it fit, at" in sentence
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe", "--topology", "cpu"], "no model section"),
        (["tiny", "--topology", "v3_32"], "--topology is cpu, gpu or a slice"),
        (["tiny", "--topology", "cpu", "--mfu", "1.5"], "--mfu"),
    ],
)
def test_refusals(arguments, words, capsys):
    assert run(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_the_compiler_a_plan_says_what_to_install(monkeypatch):
    from jax.experimental import topologies

    def missing(*_, **__):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(GrowkitError, match="growkit\\[tpu\\]"):
        plan.find_target("v3-32")


@libtpu
@pytest.mark.parametrize(
    "name", ["v2-8", "v3-32", "v4-32", "v5e-1", "v5e-4", "v5litepod-16", "v5p-16", "v6e-8"]
)
def test_the_compiler_knows_the_slices(name):
    on = plan.find_target(name)
    assert len(on.devices) == parse_slice(name).devices
    assert peak_flops(on.devices[0]) * len(on.devices) == on.peak


@libtpu
def test_a_step_compiled_for_a_slice_and_one_that_does_not_fit(monkeypatch, capsys):
    small = ["model.layer=2", "model.context=64", "schedule.steps=100"]
    assert run(["plan", "tiny", "--topology", "v3-8", "--json", *small]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (
        said["devices"] == 8
        and said["chips"] == 4
        and said["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    )
    assert said["memory"]["optimizer"] < 8 * said["parameters"] / 4, "ZeRO-1 spreads the moments"
    assert said["step_seconds"] == pytest.approx(said["flops_per_step"] / (0.4 * 4 * 123e12))
    monkeypatch.setattr(plan, "list_remedies", lambda config, mesh: [[("batch.accumulation=65536",)]])
    assert run(["plan", "tiny", "--topology", "v3-8", *small, "batch.sequences=4194304"]) == 1
    said = capsys.readouterr()
    sentence = said.err.splitlines()[-1]
    assert "at least" in said.out and sentence.startswith(
        "growkit: the step does not fit: it needs at least"
    )
    assert "; batch.accumulation=65536 would make it fit" in sentence


@pytest.fixture
def arguments(tmp_path):
    """A small run's command line."""
    (tmp_path / "tokens").mkdir()
    with TokenWriter(tmp_path / "tokens", 64) as writer:
        writer.add(np.random.default_rng(0).integers(0, 64, 2000))
    manifest = {**writer.summary(), "vocab_size": 64, "end_of_text": 0}
    (tmp_path / "tokens" / "manifest.json").write_text(json.dumps(manifest))
    model = "model={layer: 2, embed: 16, head: 2, mlp: 32, vocab: 64, context: 64, rotary_pct: 0.5}"
    sizes = [
        "batch.sequences=16",
        "schedule.steps=2",
        "schedule.warmup=1",
        "eval.windows=2",
        "data.held_out=0.3",
    ]
    data = f"data.train={tmp_path / 'tokens'}"
    return ["train", "tiny", "--out", str(tmp_path / "run"), model, data, *sizes]


def test_a_run_that_does_not_fit_ends_before_it_begins(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "find_available_memory", lambda devices: 2**20)
    monkeypatch.setattr(plan, "list_remedies", lambda config, mesh: [[("batch.accumulation=16",)]])
    assert run(arguments) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("growkit: the step does not fit: it needs")
    assert "; batch.accumulation=16 would make it fit, at" in sentence
    assert find_last_step(tmp_path / "run") is None
    # The sibling: with the memory that there is, the same command begins and ends.
    monkeypatch.undo()
    assert run(arguments) == 0
    said = capsys.readouterr().err
    assert (
        "memory: a step takes" in said and "attention: XLA, because a cpu has no kernel" in said
    )


def test_the_mildest_policy_that_fits_is_settled_on():
    peaks = {"none": 30, "dots": 20, "full": 10}

    def settled(policy, available):
        config = tiny(f"remat={policy}")
        return plan.select_remat(
            config, lambda each: plan.Memory(0, 0, peaks[each.remat], 0, available)
        ).remat

    assert [settled("auto", available) for available in (35, 25, 15, 5)] == [
        "none",
        "dots",
        "full",
        "full",
    ]
    assert [settled("dots", available) for available in (35, 5)] == ["dots", "dots"]


def test_a_run_takes_the_policy_that_fits(arguments, monkeypatch, capsys):
    """Without any the step is pretended to need twice what there is, with dots little."""
    sizes = {"none": 2**21, "dots": 2**10}

    def pretended(lowered, like, available):
        policy = "dots" if asked else "none"
        asked.append(policy)
        return plan.Memory(0, 0, sizes[policy], 0, available)

    asked = []
    monkeypatch.setattr(plan, "find_available_memory", lambda devices: 2**20)
    monkeypatch.setattr(plan, "measure_memory", pretended)
    assert run([*arguments, "remat=auto"]) == 0
    said = capsys.readouterr().err
    assert "with remat dots" in said and asked == ["none", "dots"]
    # The sibling: told to do without, the same run does not begin.
    asked.clear()
    forget_programs()
    monkeypatch.setattr(plan, "list_remedies", lambda config, mesh: [])
    assert run([*arguments[:2], "--out", f"{arguments[3]}2", *arguments[4:], "remat=none"]) == 1
    assert "does not fit" in capsys.readouterr().err


def test_a_run_compiles_its_step_once(arguments, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        assert run(arguments) == 0
    compiled = [
        record
        for record in caplog.messages
        if "Finished XLA compilation of jit(train_step)" in record
    ]
    assert len(compiled) == 1
