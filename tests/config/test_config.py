"""Configuration: a run gets the values that are written, or one sentence names the wrong key.

The sentence also says what would be right.
"""

from __future__ import annotations

import dataclasses
import os

import pytest

from growkit.errors import UsageError
from trainer.config.description import describe_batch, describe_sizes
from trainer.config.model import build_section, describe_differences
from trainer.config.rules import Bounds, check_rules
from trainer.config.sections import (
    Config,
    Dropout,
    Model,
    Plateau,
    Schedule,
    build_architecture,
    resolve,
)
from trainer.config.values import (
    apply_overrides,
    list_presets,
    merge_values,
    place_key,
    read_values,
)
from trainer.run.directory import find_changed_keys


def refusal(values, *fragments):
    """Resolving the values raises UsageError: one sentence, with these fragments in it."""
    with pytest.raises(UsageError) as caught:
        resolve(values)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_defaults_are_the_recipe():
    config = Config()
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.eps) == (
        2.0e-4,
        0.9,
        0.95,
        1e-8,
    )
    assert (optimizer.weight_decay, optimizer.clip) == (0.1, 1.0)
    assert (schedule.steps, schedule.warmup, schedule.floor) == (82_000, 2_000, 0.1)
    assert config.dropout == Dropout(hidden=0.1, attention=0.1, embedding=0.0)
    assert (config.model.context, config.batch.sequences) == (1024, 512)
    assert (config.precision.params, config.precision.compute) == ("float32", "bfloat16")


@pytest.mark.parametrize("preset", ["760m", "recipe"])
def test_the_presets_of_the_recipe_state_the_defaults(preset):
    different = find_changed_keys(Config().to_dict(), resolve(read_values(preset, [])).to_dict())
    assert set(different) <= {"remat"}


# Millions of parameters: of the tied model, of the untied one, without the embedding.
SIZES = {
    "580m": (587, 665, 510),
    "760m": (757, 834, 680),
    "1b": (1097, 1174, 1020),
    "small": (124, 162, 85),
}


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_resolves_to_the_size_it_states(preset):
    config = resolve(read_values(preset, []))
    model = build_architecture(config.model)
    tied, untied = (model.change(tied=tied).parameters for tied in (True, False))
    beside = tied - model.vocab * model.embed
    if preset in SIZES:
        assert tuple(round(count / 1e6) for count in (tied, untied, beside)) == SIZES[preset]
    if preset == "tiny":
        assert round(beside / 1e6, 1) == 1.2


def test_a_file_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "optimizer: {learning_rate: 2e-4, clip: 1}\n"
        "schedule:\n  steps: 50\neval:\ndata: {train: a}\n"
    )
    overrides = [
        "schedule.warmup=5",
        "schedule.steps=60",
        "eval.every=7",
        "optimizer.eps=1e-9",
        "data.held_out=0",
    ]
    config = resolve(read_values(str(path), overrides))
    # YAML reads 2e-4 as text and 1 as a whole number; the fields are floats.
    assert (config.optimizer.learning_rate, config.optimizer.clip, config.optimizer.eps) == (
        0.0002,
        1.0,
        1e-9,
    )
    numbers = dataclasses.asdict(config.optimizer) | {"multipliers": 0.0, "new": 0.0}
    assert {type(value) for value in numbers.values()} == {float}
    assert (config.schedule.steps, config.schedule.warmup, config.eval.every) == (60, 5, 7)
    assert config.data.train == {"a": 1.0}


@pytest.mark.parametrize(
    "text,expected",
    [
        ("a", {"a": 1.0}),
        ("[a, b]", {"a": 1.0, "b": 1.0}),
        ("{a: 3, b: 2e-1}", {"a": 3.0, "b": 0.2}),
    ],
)
def test_data_by_path_list_or_weights(text, expected):
    assert resolve(read_values("tiny", [f"data.train={text}"])).data.train == expected


@pytest.mark.parametrize(
    "values,fragments",
    [
        ({"optimiser": {}}, ["optimiser", "did you mean 'optimizer'"]),
        (
            {"optimizer": {"learning_rat": 1}},
            ["optimizer.learning_rat;", "did you mean 'learning_rate'"],
        ),
        ({"optimizer": {"lr": 1}}, ["optimizer.lr", "the keys here are learning_rate, beta1"]),
        ({"batch": {"sequences": "many"}}, ["batch.sequences must be a whole number", "'many'"]),
        ({"batch": {"sequences": 4.0}}, ["batch.sequences must be a whole number", "4.0"]),
        ({"batch": {"sequences": True}}, ["batch.sequences must be a whole number", "True"]),
        (
            {"batch": {"sequences": 6, "accumulation": 4}},
            ["(6) must be a multiple of batch.accumulation (4)"],
        ),
        (
            {"optimizer": {"learning_rate": "fast"}},
            ["optimizer.learning_rate must be a number", "'fast'"],
        ),
        (
            {"optimizer": {"learning_rate": float("nan")}},
            ["optimizer.learning_rate must be a number", "nan"],
        ),
        (
            {"optimizer": {"learning_rate": "inf"}},
            ["optimizer.learning_rate must be a number", "'inf'"],
        ),
        ({"optimizer": {"learning_rate": -1e-4}}, ["optimizer.learning_rate must be above 0"]),
        ({"optimizer": {"beta2": 1}}, ["optimizer.beta2 must lie in [0, 1)"]),
        ({"optimizer": 3}, ["optimizer is a section of values, got 3"]),
        ({"model": {"tied": "yes"}}, ["model.tied must be true or false", "'yes'"]),
        ({"remat": "ful"}, ["must be one of auto, none, dots, half, full", "did you mean 'full'"]),
        ({"remat": 1}, ["remat must be text"]),
        ({"loss_chunk": 0}, ["loss_chunk must be auto, none or a number from 1, got '0'"]),
        ({"loss_chunk": "nome"}, ["got 'nome'", "did you mean 'none'"]),
        ({"precision": {"compute": "fp32"}}, ["precision.compute must be one of", "'fp32'"]),
        (
            {"schedule": {"steps": 10, "warmup": 11}},
            ["schedule.warmup must be at most schedule.steps (10), got 11"],
        ),
        ({"schedule": {"steps": 0}}, ["schedule.steps must be at least 1"]),
        ({"checkpoint": {"keep_last": 0}}, ["checkpoint.keep_last must be at least 1"]),
        ({"seed": 2**31}, ["seed must lie between 0 and 2147483647"]),
        ({"data": {"train": {"a": 0}}}, ["a weight must be above 0, a has 0"]),
        ({"data": {"train": 3}}, ["data.train must be a path, a list of paths"]),
    ],
)
def test_refusals(values, fragments):
    refusal(values, *fragments)


@pytest.mark.parametrize(
    "override,fragment",
    [
        ("seed", "an override is key=value"),
        ("=3", "an override is key=value"),
        ("seed=[1", "the value of seed cannot be read"),
        ("remat.x=1", "remat is a value, not a section"),
    ],
)
def test_overrides_that_cannot_be_read(override, fragment):
    with pytest.raises(UsageError, match="(?s)" + fragment):
        read_values("760m", [override])


@pytest.mark.parametrize(
    "bounds,words,inside,outside",
    [
        (Bounds(at_least=1, whole=True), "be at least 1", [1, 9], [0]),
        (Bounds(above=0), "be above 0", [1e-9], [0.0, -1.0]),
        (Bounds(at_least=0, below=1), "lie in [0, 1)", [0.0, 0.5], [-0.1, 1.0]),
        (Bounds(at_least=0, at_most=1), "lie in [0, 1]", [0.0, 1.0], [-0.1, 1.1]),
        (Bounds(above=0, at_most=1), "lie in (0, 1]", [0.1, 1.0], [0.0, 1.1]),
        (Bounds(at_least=0, at_most=7, whole=True), "lie between 0 and 7", [0, 7], [-1, 8]),
    ],
)
def test_bounds_hold_what_they_say(bounds, words, inside, outside):
    for value in inside:
        bounds.check("key", value)
    for value in outside:
        with pytest.raises(UsageError) as caught:
            bounds.check("key", value)
        assert str(caught.value) == f"key must {words}, got {value}"


def test_a_rule_is_checked_in_a_section_within_a_section():
    check_rules(Config())
    broken = Config(schedule=Schedule(plateau=Plateau(patience=-1)))
    with pytest.raises(UsageError, match="schedule.plateau.patience must be at least 0, got -1"):
        check_rules(broken)


def test_sizes_that_contradict_each_other():
    with pytest.raises(UsageError, match="multiple of num_attention_heads, got 100 and 12"):
        build_architecture(Model(embed=100))


def test_changed_keys_are_named_and_what_may_change_is_not():
    before = Config().to_dict()
    after = resolve(
        {
            "optimizer": {"clip": 2},
            "seed": 1,
            "data": {"train": ["a"]},
            "checkpoint": {"every": 1},
            "eval": {"windows": 1},
            "log": {"every": 1},
        }
    ).to_dict()
    assert find_changed_keys(before, after) == ["data.train", "optimizer.clip", "seed"]
    assert find_changed_keys(after, after) == []


COUNTS = ["82k", "82K", "0.082M", "82e3", "82_000", "82000", 82000]


@pytest.mark.parametrize("text", COUNTS)
def test_counts_are_read_as_they_are_written(text):
    config = resolve({"schedule": {"steps": text}, "eval": {"every": text, "windows": text}})
    assert (config.schedule.steps, config.eval.every, config.eval.windows) == (82_000,) * 3
    config = resolve(read_values("760m", ["schedule.steps=100k", f"grow.at={text}"]))
    assert config.grow.at == "82000"


@pytest.mark.parametrize("at", [0.8, "0.8", ".8"])
def test_a_growth_may_come_after_a_part_of_the_steps(at):
    schedule = {"steps": 1001, "warmup": 10}
    assert resolve({"schedule": schedule, "grow": {"at": at}}).grow.at == "801"
    # A run's record has the step, so a resumed run reads the same.
    assert resolve({"schedule": schedule, "grow": {"at": "801"}}).grow.at == "801"


@pytest.mark.parametrize("text", ["1e4", "10_000"])
def test_numbers_without_a_unit_are_read_in_every_field(text):
    assert resolve({"model": {"vocab": text}}).model.vocab == 10_000


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"schedule": {"steps": "82q"}}, ["schedule.steps is a whole number above 0", "'82q'"]),
        ({"schedule": {"steps": "1.5"}}, ["schedule.steps is a whole number above 0", "'1.5'"]),
        ({"schedule": {"steps": "-3k"}}, ["schedule.steps must be a whole number", "'-3k'"]),
        # 8k could be 8000 or 8192.
        ({"model": {"context": "8k"}}, ["model.context must be a whole number", "'8k'"]),
        (
            {"schedule": {"steps": "41B"}},
            ["schedule.steps must be at most 1,000,000,000", "schedule.tokens gives the length"],
        ),
        (
            {"schedule": {"tokens": 100}},
            ["schedule.tokens (100) is less than one step", "give at least 524,288"],
        ),
        (
            {"schedule": {"tokens": "100M"}},
            ["schedule.warmup must be at most schedule.steps (190), got 2000"],
        ),
        ({"grow": {"at": "100k"}}, ["grow.at must be a step from 1 to 81999", "'100k'"]),
        ({"data": {"mix": "equal"}}, ["data.mix must be one of weights, proportional"]),
        (
            {"data": {"train": {"~/a": 1, os.path.expanduser("~/a"): 2}}},
            ["data.train names", "twice"],
        ),
        ({"data": {"train": ["/a", "/b", "/a"]}}, ["data.train names /a twice", "{path: weight}"]),
        ({"steps": "82k"}, ["unknown key steps", "did you mean 'schedule.steps'?"]),
        ({"tokens": "5B"}, ["unknown key tokens", "'schedule.tokens'"]),
    ],
)
def test_refusals_of_counts_and_paths(values, fragments):
    refusal(values, *fragments)


def test_a_length_in_tokens():
    values = {"model": {"context": 128}, "batch": {"sequences": 16}, "schedule": {"warmup": 10}}
    config = resolve(merge_values(values, {"schedule": {"tokens": "5M", "steps": 3}}))
    assert config.schedule.steps == 5_000_000 // (16 * 128)
    # What RUN/config.yaml holds gives the same again.
    assert resolve(config.to_dict()) == config


def test_a_batch_in_tokens():
    """The 760M run's own words; what does not divide by the context is the nearest, and is said."""
    words = ["batch.tokens=0.5M", "schedule.tokens=41B"]
    config = resolve(read_values("760m", words))
    assert (config.batch.sequences, config.schedule.steps) == (488, 41_000_000_000 // (488 * 1024))
    said = "no whole number of sequences of 1,024 tokens; the nearest is taken: 488 sequences, 499"
    assert said in describe_batch(config)
    assert resolve(config.to_dict()) == config
    exact = resolve(read_values("760m", ["batch.tokens=524288", "steps=82k"]))
    assert (exact.batch.sequences, exact.schedule.steps) == (512, 82_000)
    assert describe_batch(exact) == describe_batch(Config()) == ""
    # The last word holds, over one in tokens too.
    last = resolve(apply_overrides(config.to_dict(), ["batch.sequences=16", "schedule.steps=9k"]))
    assert (last.batch.sequences, last.schedule.steps, last.batch.tokens) == (16, 9_000, 0)
    refusal({"batch": {"tokens": 1000}}, "less than one sequence of 1,024 tokens", "least 1,024")
    refusal(
        {"batch": {"tokens": "0.5M", "accumulation": 16}},
        "makes 488 sequences of 1,024 tokens, which must be a multiple of batch.accumulation (16)",
        "the nearest that works is batch.tokens=507904",
    )


def test_keys_without_their_section():
    assert [place_key(key) for key in ("steps", "sequences", "seed", "schedule.steps")] == [
        "schedule.steps",
        "batch.sequences",
        "seed",
        "schedule.steps",
    ]
    for key in ("tokens", "every", "nothing"):
        assert place_key(key) == key
    refusal(read_values("tiny", ["tokens=5B"]), "'batch.tokens' or 'schedule.tokens'")


def test_the_context_of_a_source_is_said():
    values = {"model": {"context": 1024}}
    said = describe_sizes(Config(), values, build_architecture(Model(context=2048)), "src")
    assert said == ("context: 1,024 tokens by model.context; src states 2,048",)
    assert describe_sizes(Config(), values, build_architecture(Model()), "src") == ()
    (taken,) = describe_sizes(Config(), {}, build_architecture(Model()), "src")
    assert taken.startswith("context: 1,024 tokens, as src states it; model.context=N")
    assert describe_sizes(Config(), {}, None, "") == ()


def test_home_is_known_by_its_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        "data:\n  train: {~/a: 3, /b: 1}\n  fraction: {~/a: 0.5}\n  validation: [~/c]\n"
    )
    config = resolve(read_values("~/run.yaml", ["eval.data=~/items"]))
    assert config.data.train == {f"{tmp_path}/a": 3.0, "/b": 1.0}
    assert config.data.fraction == {f"{tmp_path}/a": 0.5}
    assert config.data.validation == {f"{tmp_path}/c": 1.0}
    assert config.eval.data == f"{tmp_path}/items"
    alone = resolve(read_values("tiny", ["data.train=~/d"]))
    assert alone.data.train == {f"{tmp_path}/d": 1.0}


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[" * 5000 + "]" * 5000, "nests too deeply"),
        ("a: " + "{b: " * 5000 + "1" + "}" * 5000, "nests too deeply"),
        ("seed: " + "9" * 5000, "is not valid YAML"),
        (LAUGHS, "aliases stand for more than 100,000 values"),
        ("a: &a [*a]", "a value that it is a part of"),
        ("seed: 1\nseed: 2", "the key 'seed' is there 2 times"),
        ("seed: 1\n" + "#" * (1 << 20), "a configuration has at most 1,048,576"),
    ],
)
def test_yaml_is_bounded(tmp_path, text, fragment):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_values(str(path), [])
    assert fragment in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, "9" * 5000])
def test_overrides_are_bounded_too(text):
    with pytest.raises(UsageError, match="the value of seed cannot be read") as caught:
        read_values("tiny", [f"seed={text}"])
    assert len(str(caught.value)) < 500


def test_aliases_of_a_few_values_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfdata:\n  train: &a {x: 1}\n  validation: *a\n")
    assert resolve(read_values(str(path), [])).data.validation == {"x": 1.0}


def test_a_long_value_is_shown_in_part():
    with pytest.raises(UsageError) as caught:
        resolve({"seed": "x" * 100_000})
    assert len(str(caught.value)) < 300


def test_a_map_of_layers_is_not_read_as_a_number_to_the_base_of_60(tmp_path):
    (tmp_path / "grow.yaml").write_text(
        "grow: {map: 18:24, embed: 2x, mlp: 4096, vocab: +64}\noptimizer: {multipliers: on}\n"
    )
    config = resolve(read_values(str(tmp_path / "grow.yaml"), ["grow.heads=16"]))
    assert (config.grow.map, config.grow.embed, config.grow.mlp, config.grow.heads) == (
        "18:24",
        "2x",
        "4096",
        "16",
    )
    assert config.optimizer.multipliers == "on"
    # A number with a plus is one of tokens to add, and a number elsewhere.
    assert config.grow.vocab == "+64"
    config = resolve(read_values("recipe", ["grow.vocab=+128", "seed=+7", "log.every=+5"]))
    assert (config.grow.vocab, config.seed, config.log.every) == ("+128", 7, 5)
    assert (
        resolve(read_values("recipe", ["grow.map=18:24", "optimizer.multipliers=off"])).grow.map
        == "18:24"
    )


def test_noise_is_a_number_or_has_a_unit():
    def read(noise):
        return resolve(read_values("recipe", [f"grow.noise={noise}"])).grow.noise

    assert read("0.5") == 0.5 and type(read("1")) is float and read("1e-2") == 0.01
    assert read("0.5rms") == "0.5rms"
    refusal({"grow": {"noise": [0.5]}}, "grow.noise must be a number or text, got [0.5]")
    refusal({"grow": {"noise": True}}, "grow.noise must be a number or text, got True")
    refusal({"grow": {"noise": "nan"}}, "grow.noise must be a number, got 'nan'")


def test_sections_of_other_families_agree_in_what_they_state():
    """A section with all keys is the source's, whichever defaults of GPT-NeoX it has."""
    section = Model(kind="gemma2", layer=2, config={"sliding_window": 5}, **GEMMA)
    theirs = build_section(build_architecture(section))
    assert theirs != section
    keys = [field.name for field in dataclasses.fields(Model)]
    assert describe_differences(keys, section, theirs) == ""
    other = dataclasses.replace(section, config={"sliding_window": 6})
    found = describe_differences(keys, other, theirs)
    assert "config.sliding_window is 6 in the one and 5 in the other" in found
    neox = Model(layer=2, embed=16, head=4, mlp=24, vocab=64, rotary_pct=1.0)
    stated = dataclasses.replace(neox, rotary_pct=0.25)
    assert "rotary_pct is 0.25" in describe_differences(keys, stated, neox)
    other = dataclasses.replace(section, rotary_pct=0.5)
    assert "rotary_pct is 0.5" in describe_differences(keys, other, theirs)


GEMMA = {"embed": 16, "head": 4, "kv": 2, "head_dim": 4, "mlp": 24, "vocab": 64, "context": 16}
