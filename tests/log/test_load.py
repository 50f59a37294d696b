"""The loads of experts: a line a row, through a kill and a resumption."""

from __future__ import annotations

import json

import numpy as np
import pytest
from etils import epath

from trainer.log.load import LOADS, Loads, describe_load

LOAD = np.asarray([[0.5, 0.25, 0.25], [0.1, 0.123456, 0.776544]])


def read(path):
    return [json.loads(line) for line in (path / LOADS).read_text().splitlines()]


def test_a_resumed_run_goes_on_after_its_step(tmp_path):
    loads = Loads(epath.Path(tmp_path), 0)
    for step in (2, 4, 6):
        loads.add(step, LOAD)
    assert read(tmp_path)[0] == {"step": 2, "load": [[0.5, 0.25, 0.25], [0.1, 0.1235, 0.7765]]}
    with (tmp_path / LOADS).open("a") as file:
        file.write('{"step": 8, "lo')
    Loads(epath.Path(tmp_path), 4).add(5, LOAD)
    assert [line["step"] for line in read(tmp_path)] == [2, 4, 5]
    assert not list(tmp_path.glob(".*"))


def test_a_model_without_experts_has_no_such_file(tmp_path):
    Loads(epath.Path(tmp_path), 0).flush()
    assert not (tmp_path / LOADS).exists()


def test_the_busiest_and_the_idlest_are_of_all_layers():
    assert describe_load(LOAD) == pytest.approx({"busiest": 0.776544, "idlest": 0.1})
