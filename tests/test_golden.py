"""Growth gives the bits that are on record, and training the same losses; see tests/golden.

Where a change is meant, `python tests/golden/record.py --store` rewrites the record.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from golden.cases import CASES
from golden.compare import EXACT_OF_GROWTH, EXACT_OF_TRAINING, close, differences, without
from golden.growths import growths
from golden.inputs import Inputs
from golden.record import GROWTH, TRAINING
from golden.trainings import trainings

# Orbax may leave coroutines behind that complain when they are collected, whenever that is.


@pytest.fixture
def directory():
    """A directory that is removed at once: the inputs and runs are a few hundred megabytes."""
    with TemporaryDirectory(prefix="golden-") as path:
        yield Path(path)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def on_record(*names: str) -> dict:
    """The record of some cases of growth."""
    record = read(GROWTH)
    return record | {"cases": {name: record["cases"][name] for name in names}}


def grown(directory: Path, *names: str, **changed: str) -> dict:
    """What some cases give now; those of `changed` by other commands."""
    commands = {name: CASES[name] for name in names} | changed
    return without(growths(directory, commands), EXACT_OF_GROWTH)


def test_growth_is_the_recorded_one(directory):
    assert differences(read(GROWTH), grown(directory, *CASES)) == []


def test_training_is_nearly_the_recorded_one(directory):
    found = without(trainings(directory), EXACT_OF_TRAINING)
    assert differences(read(TRAINING), found, close) == []
    assert sum(len(case.get("rows", ())) for case in found["cases"].values()) > 45


def flip(path: Path, place: int) -> None:
    """Change the lowest bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def prepared(directory: Path, source: str) -> Path:
    """A source where `growths` finds it and takes it as it is."""
    inputs = directory / "inputs"
    inputs.mkdir()
    return Inputs(inputs).path(source)


def test_one_bit_of_a_directory_is_found(directory):
    # The first byte of the last float32 but one: the low end of its mantissa.
    flip(prepared(directory, "small") / "model.safetensors", -8)
    names = ("depth-replicate", "width-embed-small")
    found = grown(directory, *names)
    assert differences(on_record(*names), found) == [
        "depth-replicate, params: the tensors differ",
        "width-embed-small, params: the tensors differ",
    ]


@pytest.mark.parametrize("slot", ["params", "mu", "nu"])
def test_one_bit_of_a_checkpoint_is_found(directory, slot):
    array = f"{slot}.layers.mlp.dense_4h_to_h.weight"
    flip(prepared(directory, "ck_small") / "state" / array / "0.0.0", 0)
    names = ("depth-ck-copy", "depth-ck-reset")
    found = differences(on_record(*names), grown(directory, *names))
    # Moments that are reset do not depend on the source's.
    touched = names if slot == "params" else names[:1]
    assert found == [f"{name}, {slot}: the tensors differ" for name in touched]


@pytest.mark.parametrize(
    "name,command,parts",
    [
        ("depth-list", "depth small OUT --map 0,1,1,2,2,3,4", ["lineage", "params"]),
        ("depth-ck-map", "depth ck_small OUT --map 5:8 --moments copy", ["lineage", "mu"]),
        ("noise-spread", CASES["noise-spread"] + " --seed 1", ["lineage", "params"]),
        ("pad-small", CASES["pad-small"] + " --seed 1", ["lineage", "params"]),
        ("import", "export neox OUT", ["config", "counters", "lineage", "record"]),
    ],
)
def test_another_growth_is_found(directory, name, command, parts):
    found = differences(on_record(name), grown(directory, **{name: command}))
    assert {words.split(":")[0] for words in found} >= {f"{name}, {part}" for part in parts}


def test_another_configuration_is_printed(directory):
    found = grown(directory, **{"depth-replicate": "depth small OUT --map 5:9"})
    words = differences(on_record("depth-replicate"), found)
    assert "depth-replicate, config: num_hidden_layers was 8, is 9" in words


def test_a_command_that_fails_is_named(directory):
    found = grown(directory, **{"depth-replicate": "depth small OUT --map 4:9"})
    words = differences(on_record("depth-replicate"), found)
    assert any(word.startswith("depth-replicate, failed: only in the new record") for word in words)
    assert "the source has 5" in found["cases"]["depth-replicate"]["failed"]


def test_cases_that_one_record_lacks_are_named():
    record, less = on_record("pad", "import"), on_record("pad")
    assert differences(record, less) == ["import: only in the old record"]
    assert differences(less, record) == ["import: only in the new record"]


def test_tensors_are_named_one_by_one_where_both_records_have_them(directory):
    before = growths(directory, {"depth-list": CASES["depth-list"]})
    after = deepcopy(before)
    case = after["cases"]["depth-list"]
    case["tensors"]["params"]["embed_out.weight"] = "0" * 16
    case["slots"]["params"] = "0" * 16
    total = len(case["tensors"]["params"])
    assert differences(before, after) == [
        f"depth-list, params: the tensors differ: 1 of {total}, embed_out.weight"
    ]


def changed(column: str, factor: float) -> list[str]:
    """What is found when the first number of a column of the training on record is another."""
    record = read(TRAINING)
    other = deepcopy(record)
    rows = other["cases"]["depth-on-the-way"]["rows"]
    row = next(row for row in rows if column in row)
    row[column] = str(float(row[column]) * factor)
    return differences(record, other, close)


def test_a_loss_may_differ_by_rounding_and_no_more():
    assert changed("loss", 1.0001) == changed("validation_loss", 0.9999) == []
    assert changed("loss", 1.01)[0].startswith("depth-on-the-way, rows: loss at step 1 was '5.6")
    assert changed("validation_loss", 0.99)[0].startswith("depth-on-the-way, rows: validation_loss")
    assert len(changed("learning_rate", 1.01)) == len(changed("gradient_norm", 1.01)) == 1


def test_whole_numbers_and_words_of_rows_do_not_differ():
    assert not close("256", "257") and not close("1000000", "1000001")
    assert not close("start", "begin") and not close("", "1.0")
    assert close("1.0", "1") and close("1e-05", "1.0001e-05")
