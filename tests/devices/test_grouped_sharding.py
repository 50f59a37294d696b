"""Grouped heads on a mesh: the losses are one device's, and groups that do not divide are refused.

The eight devices are emulated in a process of their own, as in `test_sharding`: run as a script,
this file is that process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import test_sharding

from growkit.errors import UsageError
from trainer.config.model import Model, build_architecture
from trainer.config.sections import Batch, Mesh
from trainer.devices.sharding import make_layout

SECTION = Model(
    kind="gemma2",
    layer=2,
    embed=32,
    head=8,
    kv=4,
    head_dim=8,
    mlp=64,
    vocab=128,
    context=16,
    config={"sliding_window": 5},
)
NAMES = ("one", "tp", "mixed")


@pytest.fixture(scope="module")
def found():
    return test_sharding.run_emulated("grouped", script=__file__)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp", "mixed"])
def test_eight_devices_train_a_grouped_model_as_one(name, found):
    for key in ("steps", "evaluation"):
        np.testing.assert_allclose(found[name][key], found["one"][key], rtol=2e-5)
    assert found[name]["bytes"][0] < 0.6 * found["one"]["bytes"][0]


def test_groups_that_do_not_divide_are_refused():
    model = build_architecture(replace(SECTION, kv=2))
    config = replace(test_sharding.CONFIG, mesh=Mesh(tensor=4), batch=Batch(16, 1))
    words = "kv 2 does not divide over mesh.tensor = 4; it may be 1 or 2"
    with pytest.raises(UsageError, match=words):
        make_layout(config, model, test_sharding.make_devices())


if __name__ == "__main__":
    test_sharding.MODEL = build_architecture(SECTION)
    made = {
        name: test_sharding.run_steps(test_sharding.configure(name, 2, False)) for name in NAMES
    }
    print(json.dumps(made))
    sys.exit(0)
