"""What is settled before a run's first step: its models, and what RUN says of its source."""

from __future__ import annotations

import shutil
import weakref

import pytest
import yaml
from runs import TINY, new_run, values

from growkit.errors import GrowkitError, UsageError
from trainer.config.sections import build_architecture, build_section, resolve
from trainer.run.begin import begin, prepare, take_model
from trainer.run.loop import Run
from trainer.run.stages import train


def taken(section):
    """The configuration of a run from TINY whose model section states these values."""
    stated = {"seed": 3} if section is None else {"model": section}
    return take_model(resolve(stated), stated, build_section(TINY), "here")


def test_a_source_fills_the_model_section():
    assert build_architecture(taken(None).model) == TINY and taken(None).seed == 3
    longer = taken({"context": 32, "layer": 2})
    assert build_architecture(longer.model) == TINY.change(context=32)


def test_a_stated_value_is_compared_as_the_number_it_is():
    """YAML reads 1e-5 as text; it equals the source's 1e-05 all the same."""
    assert taken({"layer_norm_eps": "1e-5", "rotary_base": 10000}).model == build_section(TINY)


@pytest.mark.parametrize(
    "section,fragment",
    [
        (
            {"layer": 3, "tied": False},
            "than here: layer is 3 in the one and 2 in the other, tied is False",
        ),
        ({"layers": 2}, "unknown key model.layers; the keys here are layer, "),
        ("large", "model is a section of values, got 'large'"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps is 1e-06 in the one and 1e-05 in the other"),
    ],
)
def test_a_model_section_that_is_not_the_sources(section, fragment):
    with pytest.raises(UsageError) as caught:
        taken(section)
    assert fragment in str(caught.value)


def test_a_length_in_tokens_is_of_the_sources_context():
    """The context is known with the source: at the default of 1024, 10k tokens are 2 steps."""
    stated = {"schedule": {"tokens": "10k", "warmup": 9}, "batch": {"sequences": 4}}
    config = take_model(resolve(stated, takes_model=True), stated, build_section(TINY), "here")
    assert config.schedule.steps == 10_000 // (4 * TINY.context)
    short = {"schedule": {"tokens": 60}, "batch": {"sequences": 4}}
    with pytest.raises(UsageError, match=f"less than one step, .* of {TINY.context} tokens"):
        take_model(resolve(short, takes_model=True), short, build_section(TINY), "here")


def test_nothing_is_written_before_a_run_begins(data, tmp_path):
    setup = prepare(values(data, grow={"map": "2:3", "at": 6}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # Both of its models are known by now, and each has a configuration of its own.
    assert (setup.first.model.layer, setup.grown.model.layer) == (2, 3)
    assert setup.grown.model == setup.later_growth.grown
    assert (setup.first.config.schedule.continued, setup.grown.config.schedule.continued) == (
        False,
        True,
    )


def test_a_loop_keeps_only_one_state(data, tmp_path):
    """A second reference to the first state would cost its memory where a step donates none."""
    beginning = begin(prepare(values(data), tmp_path / "run"))
    kept = weakref.ref(beginning.snapshot)
    run = Run(beginning)
    assert kept() is beginning.snapshot
    del beginning
    assert kept() is None
    run.close()


def origin_of(out):
    return yaml.safe_load((out / "config.yaml").read_text())["from"]


def test_a_run_without_a_checkpoint_begins_anew_and_says_so(data, tmp_path):
    """RUN was begun with a source, killed before its first checkpoint, and begun without it."""
    source, out = tmp_path / "source", tmp_path / "run"
    train(values(data), source)
    setup = prepare(values(data), out, str(source))
    begin(setup).directory.close()
    assert origin_of(out) == {"path": str(source), "fingerprint": setup.source.fingerprint}
    run = new_run(data, out)
    assert not run.resumed and origin_of(out) is None
    run.close()


def test_a_directory_that_is_refused_is_not_left_locked(data, tmp_path):
    train(values(data), tmp_path / "run")
    other = prepare(values(data, seed=6), tmp_path / "run")
    with pytest.raises(UsageError, match="seed") as kept:  # with its traceback, and so its frames
        begin(other)
    run = new_run(data, tmp_path / "run")
    assert run.resumed and kept is not None
    run.close()


@pytest.mark.parametrize(
    "change", [{"schedule": {"steps": 24}}, {"optimizer": {"learning_rate": 1e-3}}]
)
def test_another_schedule_is_refused_with_the_ways_to_it(change, data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    new_run(data, out).go()
    with pytest.raises(UsageError) as caught:
        new_run(data, out, **change)
    said = str(caught.value)
    assert f"begin a new run with --from {out}" in said and f"`growkit anneal {out}`" in said
    with pytest.raises(UsageError) as caught:
        new_run(data, out, seed=6)
    assert "anneal" not in str(caught.value)


def test_tokens_of_another_tokenizer_are_not_resumed_on(data, tmp_path):  # noqa: F811
    tokens, out = tmp_path / "tokens", tmp_path / "run"
    shutil.copytree(data / "text", tokens)
    (tokens / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    new_run(tmp_path, out, data={"train": [str(tokens)]}).go()
    (tokens / "tokenizer.json").write_text('{"padding": null, "model": {"vocab": {"a": 0}}}')
    new_run(tmp_path, out, data={"train": [str(tokens)]}).close()
    (tokens / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}}')
    with pytest.raises(UsageError) as caught:
        new_run(tmp_path, out, data={"train": [str(tokens)]})
    assert f"{tokens} was tokenized with another tokenizer than the one {out}@12" in str(
        caught.value
    )


def test_a_state_that_does_not_fit_is_refused_before_anything_is_made(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("trainer.plan.memory.find_available_memory", lambda devices: 10_000)
    monkeypatch.setattr("trainer.run.begin.open_corpus", None)
    with pytest.raises(GrowkitError, match="the model does not fit: its parameters take"):
        prepare(values(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
