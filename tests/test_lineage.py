"""A lineage is read into typed entries and written as it was; what follows from its order."""

from __future__ import annotations

import json

import pytest

from growkit.entries import (
    Average,
    Branch,
    Conversion,
    Growth,
    Origin,
    Training,
    Unknown,
    read_entry,
)
from growkit.errors import GrowkitError, UsageError
from growkit.growth.plan import build_plan, set_options
from growkit.growth.width import plan_width
from growkit.lineage import Lineage
from growkit.models.gpt_neox import GPT_NEOX

MODEL = GPT_NEOX.model(layer=2, embed=16, head=2, mlp=32, vocab=64, context=16, rotary_pct=0.5)
SOURCE = {"path": "run", "kind": "checkpoint", "fingerprint": "f0", "step": 6, "schedule_step": 4}
SCHEDULE = {"schedule": {"steps": 9, "continued": False}}
# As growkit writes them, key by key.
DEPTH = {
    "growkit": "0.1.0",
    "source": SOURCE,
    "operation": "depth",
    "method": "replicate: floor(i*2/3)",
    "maps": {"layer": {"index": [0, 0, 1], "share": [1.0, 1.0, 1.0]}},
    "pads": {},
    "sizes": {"before": MODEL.sizes, "after": MODEL.sizes | {"layer": 3}},
    "moments": "map",
    "count": "kept",
    "noise": 0.0,
    "seed": 0,
    "function": "not preserved",
}
NEW = {"growkit": "0.1.0", "operation": "train", "multipliers": False, "config": SCHEDULE}
ANNEALED = {
    "growkit": "0.1.0",
    "source": SOURCE,
    "operation": "train",
    "multipliers": True,
    "config": SCHEDULE,
    "branch": {"verb": "anneal", "from": 0.001, "to": 0.0, "tokens": 64},
}
MEAN = {
    "growkit": "0.1.0",
    "source": SOURCE,
    "operation": "average",
    "averaged": [SOURCE | {"path": "other"}, SOURCE],
    "weights": [0.25, 0.75],
}
EXPORT = {"growkit": "0.1.0", "source": SOURCE, "operation": "export", "dtype": "bfloat16"}
KINDS = [
    (DEPTH, Growth),
    (DEPTH | {"optimizer": {"embed_out.weight": {"clip": 2.0}}}, Growth),
    (DEPTH | {"operation": "widen", "later": [1]}, Growth),
    (DEPTH | {"noise": "0.5rms"}, Growth),
    (NEW, Training),
    (ANNEALED, Training),
    (MEAN, Average),
    (EXPORT, Conversion),
    (EXPORT | {"operation": "import"}, Conversion),
    ({"operation": "prune", "growkit": "9.0", "maps?": 3}, Unknown),
    ("by hand", Unknown),
    ({}, Unknown),
]


@pytest.mark.parametrize("stored,kind", KINDS)
def test_an_entry_is_written_as_it_was_read(stored, kind):
    before = json.dumps(stored)
    entry = read_entry(stored)
    assert type(entry) is kind
    assert json.dumps(entry.to_json()) == before
    assert json.dumps(Lineage.read([stored, stored]).to_json()) == f"[{before}, {before}]"


def test_an_entry_that_is_made_is_the_one_that_is_read():
    branch = Branch("anneal", 0.001, 0.0, 64)
    origin = Origin("run", "checkpoint", "f0", {"step": 6, "schedule_step": 4})
    entry = Training(
        source=origin, growkit="0.1.0", multipliers=True, config=SCHEDULE, branch=branch
    )
    assert entry == read_entry(ANNEALED)
    assert list(entry.to_json()) == list(ANNEALED)


def test_a_plan_comes_back_from_its_entry():
    plan = plan_width(MODEL, embed="2x", heads="2x", spread=0.0)
    entry = read_entry(json.loads(json.dumps(Growth.of(plan).to_json())))
    for read in (entry.plan(MODEL), entry.plan_within(plan.grown)):
        assert read.grown == plan.grown and read.maps.keys() == plan.maps.keys()
        assert all((read.maps[axis].share == plan.maps[axis].share).all() for axis in plan.maps)
    assert plan.continues and entry.continues
    assert entry.changes == {"embed": (16, 32), "head": (2, 4), "mlp": (32, 64)}
    reset = Growth.of(build_plan("width", "test", MODEL, plan.maps, moments="reset"))
    assert (reset.count, reset.continues) == ("reset", False)
    noisy = Growth.of(set_options(plan, noise="0.5rms", seed=3))
    read = read_entry(json.loads(json.dumps(noisy.to_json()))).plan(MODEL)
    assert (read.noise, read.noise_unit, read.seed) == (0.5, "rms", 3)


def lineage(*entries):
    return Lineage.read(entries)


FAR = DEPTH | {"optimizer": {}}
BARE = NEW | {"config": {"schedule": {"continued": True}}}
ON = BARE | {"multipliers": True}


def test_which_growths_no_training_has_followed():
    assert len(lineage(DEPTH, NEW, DEPTH, DEPTH).last_growths()) == 2
    assert lineage(DEPTH, NEW).last_growths() == []
    assert [growth.optimizer for growth in lineage(FAR, EXPORT, DEPTH).last_growths()] == [{}, None]


def test_whose_multipliers_are_owed():
    # A training that applied them still owes them; one that went without ends them.
    assert len(lineage(FAR, ON, FAR).growths_owed()) == 2
    assert len(lineage(FAR, NEW, FAR).growths_owed()) == 1
    assert lineage(FAR, ON, FAR).continues
    assert not lineage(FAR, ON, DEPTH).continues
    assert not lineage(FAR, NEW).continues


def test_a_schedule_begun_again_after_a_growth_knows_it_no_more():
    assert lineage(NEW, DEPTH, BARE).grown_at == lineage(NEW, DEPTH, BARE, BARE).grown_at == 4
    assert lineage(NEW, DEPTH, NEW).grown_at is None
    assert lineage(DEPTH, NEW, BARE).grown_at is None
    assert lineage(NEW, BARE).grown_at is None
    assert lineage(DEPTH, EXPORT, BARE).grown_at is None


# Each claims to be what it cannot be read as, and must not be passed over in silence.
BROKEN = [
    DEPTH | {"maps": None},
    {key: value for key, value in DEPTH.items() if key != "pads"},
    {"operation": "train", "growkit": "0.1.0", "config": SCHEDULE},
    DEPTH | {"source": {"path": "run"}},
    DEPTH | {"noise": "0.5"},
    DEPTH | {"noise": "infrms"},
]


@pytest.mark.parametrize("stored", BROKEN)
def test_an_entry_that_misses_a_part_is_kept_and_not_passed_over(stored):
    broken = lineage(NEW, stored, BARE)
    assert broken.to_json() == [NEW, stored, BARE]
    for ask in (lambda: broken.before_last.last_growths(), lambda: broken.grown_at):
        with pytest.raises(GrowkitError, match=f"an entry of '{stored['operation']}' that cannot"):
            ask()


def test_what_was_done_last():
    assert lineage(NEW, DEPTH).last_growth("out") == read_entry(DEPTH)
    with pytest.raises(UsageError, match="out has no growth in its lineage"):
        lineage(NEW).last_growth("out")
    with pytest.raises(UsageError, match="last thing that was done to out is 'export', not growth"):
        lineage(DEPTH, EXPORT).last_growth("out")
    with pytest.raises(GrowkitError, match="out: the lineage's last entry is not a plan"):
        lineage(DEPTH | {"maps": None}).last_growth("out")
    with pytest.raises(GrowkitError, match="is not a training that can be read"):
        lineage(NEW, DEPTH).last_training  # noqa: B018 (the property raises)
