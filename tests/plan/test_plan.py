"""The plan: slices by their names, time and cost by formula, and steps compiled for absent TPUs."""

from __future__ import annotations

import importlib.util
import json

import jax
import pytest

from growkit.cli import run
from growkit.errors import GrowkitError, UsageError
from trainer.config.sections import build_architecture, resolve
from trainer.config.values import read_values
from trainer.devices.accelerators import GIB, TPUS, parse_slice, peak_flops
from trainer.model.kernels import Choice
from trainer.plan import remedies, topology
from trainer.plan.compiler import Memory
from trainer.plan.cost import find_devices
from trainer.plan.plan import Plan
from trainer.plan.topology import Target, find_target

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPUs' compiler, is missing"
)


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
        ("v4-24", "not a power of two"),
        ("v4:4x4", "3 dimensions"),
    ],
)
def test_a_name_of_no_slice_is_refused(name, words):
    with pytest.raises(UsageError, match=words):
        parse_slice(name)


def test_devices_have_less_than_their_chips_and_known_peaks():
    for accelerator in TPUS.values():
        usable = accelerator.usable * accelerator.devices
        assert accelerator.memory * 0.9 < usable <= accelerator.memory * 1.01

    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    assert peak_flops(Device()) == 989e12
    Device.device_kind = "TPU v5 lite"
    assert peak_flops(Device()) == 197e12
    assert peak_flops(jax.devices("cpu")[0]) is None


def make_known_plan(topology_name: str) -> Plan:
    """A plan of the 760m preset for a slice, with nothing compiled."""
    config = resolve(read_values("760m", []))
    found = parse_slice(topology_name)
    peak = found.chips * found.accelerator.peak
    target = Target(topology_name, [None] * found.devices, found.chips, GIB, peak, "core")
    model = build_architecture(config.model)
    return Plan(config, model, target, {}, Choice("xla", ""), Memory(0, 0, 0, 0, 1), 0.0)


def test_time_and_cost_by_the_formula():
    plan = make_known_plan("v3-32")
    # 24 blocks of 12 d^2 and a tied head are multiplied; the attention's 12 layer d context.
    weights = 24 * 12 * 1536**2 + 50304 * 1536
    attention = 12 * 24 * 1536 * 1024
    flops = 512 * 1024 * (6 * weights + attention)
    assert plan.flops == flops
    assert plan.estimate_step_seconds(0.5) == pytest.approx(flops / (0.5 * 16 * 123e12))
    hours = 82000 * plan.estimate_step_seconds(0.5) / 3600
    assert plan.estimate_hours(0.5) == pytest.approx(hours)
    assert plan.estimate_cost(0.5, 2.0) == pytest.approx(hours * 16 * 2.0)
    assert plan.estimate_cost(0.25, 2.0) == pytest.approx(2 * plan.estimate_cost(0.5, 2.0))


def test_days_of_a_topology_are_those_of_a_plan():
    plan = make_known_plan("v3-32")
    devices = find_devices("v3-32", 0.3, 2.0)
    flops = plan.flops * plan.config.schedule.steps
    assert devices.estimate_days(flops) == pytest.approx(plan.estimate_hours(0.3) / 24)
    assert devices.estimate_cost(flops) == pytest.approx(plan.estimate_cost(0.3, 2.0))
    assert devices.estimate_days(None) is None
    assert find_devices("v3-32", 0.3, None).estimate_cost(flops) is None
    assert find_devices("cpu", 0.3, 2.0).estimate_days(flops) is None


def test_a_plan_for_this_machine(capsys):
    assert run(["plan", "tiny", "--topology", "cpu", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"]
    assert said["step_seconds"] is None
    assert said["tried"] == []
    # Parameters and both moments, float32, whole on one device.
    assert said["memory"]["parameters"] == 4 * said["parameters"]
    assert said["memory"]["optimizer"] == 8 * said["parameters"] + 4
    assert said["tokens"] == 500 * 16 * 128
    assert said["attention"]["name"] == "xla"


def test_a_plan_that_does_not_fit_ends_with_one_sentence_and_exit_code_1(monkeypatch, capsys):
    assert run(["plan", "tiny", "--topology", "cpu", "--json"]) == 0
    needed = json.loads(capsys.readouterr().out)["memory"]["peak"]
    monkeypatch.setattr(topology, "find_available_memory", lambda devices: needed - 1)
    assert run(["plan", "tiny", "--topology", "cpu"]) == 1
    said = capsys.readouterr()
    assert "does not fit" in said.out
    *tried, sentence = said.err.splitlines()
    assert tried[0].startswith("tried remat=dots: ")
    assert sentence.startswith("growkit: the step does not fit: it needs")
    assert "would make it fit, at" in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipe", "--topology", "cpu"], "no model section"),
        (["tiny", "--topology", "v3_32"], "--topology is cpu, gpu or a slice"),
        (["tiny", "--topology", "cpu", "--mfu", "1.5"], "--mfu must be above 0 and at most 1"),
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
        find_target("v3-32")


@libtpu
@pytest.mark.parametrize(
    "name", ["v2-8", "v3-32", "v4-32", "v5e-1", "v5e-4", "v5litepod-16", "v5p-16", "v6e-8"]
)
def test_the_compiler_knows_the_slices(name):
    target = find_target(name)
    assert len(target.devices) == parse_slice(name).devices
    assert peak_flops(target.devices[0]) * len(target.devices) == target.peak


@libtpu
def test_a_step_compiled_for_a_slice(capsys):
    small = ["model.layer=2", "model.context=64", "schedule.steps=100"]
    assert run(["plan", "tiny", "--topology", "v3-8", "--json", *small]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["devices"] == 8
    assert said["chips"] == 4
    assert said["mesh"] == {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}
    assert said["memory"]["optimizer"] < 8 * said["parameters"] / 4, "ZeRO-1 spreads the moments"
    assert said["step_seconds"] == pytest.approx(said["flops_per_step"] / (0.4 * 4 * 123e12))


@libtpu
def test_a_step_that_does_not_fit_a_slice(monkeypatch, capsys):
    small = ["model.layer=2", "model.context=64", "schedule.steps=100"]
    groups = [[("batch.accumulation=65536",)]]
    monkeypatch.setattr(remedies, "list_remedies", lambda config, mesh: groups)
    assert run(["plan", "tiny", "--topology", "v3-8", *small, "batch.sequences=4194304"]) == 1
    said = capsys.readouterr()
    assert "at least" in said.out
    sentence = said.err.splitlines()[-1]
    assert sentence.startswith("growkit: the step does not fit: it needs at least")
    assert "; batch.accumulation=65536 would make it fit" in sentence
