"""Tensors grown a block at a time: bit for bit what growing them whole gives, at every border of
the blocks.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import random_tensors
from in_memory import held

from growkit.checkpoint.tensor import Tensor
from growkit.growth.axes import make_map, repeat
from growkit.growth.head_row import HeadRow
from growkit.growth.plan import build_plan, combine_plans, set_options
from growkit.growth.rule import PartGrowth
from growkit.growth.separation import Separation
from growkit.growth.vocabulary import plan_vocabulary
from growkit.growth.width import plan_width
from growkit.models.gpt_neox import GPT_NEOX
from growkit.models.llama import LLAMA
from growkit.surgery import blocks
from growkit.surgery import grow as surgery

TINY = GPT_NEOX.model(
    layer=2, embed=16, head=2, mlp=12, vocab=24, context=16, rotary_pct=0.5, tied=False
)
SMALL_LLAMA = LLAMA.model(
    layer=1, embed=16, kv=2, group=2, head_dim=8, mlp=20, vocab=24, context=16
)
UNEVEN_COPIES = {
    "head": make_map([0, 0, 1, 0], 2, [0.5, 0.3, 1.0, 0.2]),
    "mlp": make_map(
        [*range(12), 3, 3, 7, 0],
        12,
        [0.5, 1, 1, 0.25, 1, 1, 1, 0.9, 1, 1, 1, 1, 0.25, 0.5, 0.1, 0.5],
    ),
}
PLANS = {
    "clone": plan_width(TINY, embed="2x"),
    "three": plan_width(TINY, embed="3x", mlp=40, spread=0.5),
    "noise": dataclasses.replace(plan_width(TINY, embed="3x"), noise=0.3, seed=7),
    "mlp": plan_width(TINY, mlp=30),
    "heads out of order": build_plan(
        "width", "test", TINY, UNEVEN_COPIES | {"embed": repeat(16, 32)}
    ),
    "mean-pad": plan_width(TINY, embed=24, mlp=16),
    "head_dim": plan_width(TINY, head_dim=12),
    "head_dim and heads": plan_width(TINY, heads=4, head_dim=12, embed=48),
    "copied moments": dataclasses.replace(plan_width(TINY, embed="2x"), moments="copy"),
    "copied moments, padded": dataclasses.replace(plan_width(TINY, head_dim=12), moments="copy"),
    "noise of its size": set_options(plan_width(TINY, embed="3x"), noise="0.3rms", seed=7),
    "llama": plan_width(SMALL_LLAMA, embed="2x"),
    "llama, padded": plan_width(SMALL_LLAMA, embed=24, mlp=40),
    "llama, noise": dataclasses.replace(
        plan_width(SMALL_LLAMA, heads=8, mlp=40), noise=0.3, seed=3
    ),
}
TOKENS = plan_vocabulary(TINY, "+9")
PLANS |= {
    "vocab": TOKENS,
    "vocab, copies": combine_plans("grow", [plan_width(TINY, embed="2x"), TOKENS], TINY),
    "vocab, padded": combine_plans("grow", [plan_width(TINY, embed=24), TOKENS], TINY),
    "vocab, noise": dataclasses.replace(
        combine_plans("grow", [plan_width(TINY, embed="3x"), TOKENS], TINY), noise=0.3, seed=5
    ),
    "vocab, zero": combine_plans(
        "grow",
        [plan_width(SMALL_LLAMA, embed=24), plan_vocabulary(SMALL_LLAMA, "x32", "zero")],
        SMALL_LLAMA,
    ),
}
NUMBERS = tuple(np.random.default_rng(4).normal(size=16).tolist())
PLANS |= {
    f"{name}, measured": dataclasses.replace(PLANS[name], vocab_row=HeadRow(NUMBERS, 0.0, 1, ""))
    for name in ("vocab", "vocab, copies", "vocab, padded")
}
SIZES = (64, 300, 1000, 5000)


def recipes(plan, dtype="float32"):
    slots = {
        slot: random_tensors(plan.model, dtype, seed)
        for seed, slot in enumerate(surgery.SLOT_MOMENTS)
    }
    return surgery.prepare_growth(held(plan.model, **slots), plan).recipes


def arrays(plan, dtype="float32"):
    return {
        (slot, name): recipe.make_array()
        for slot, part in recipes(plan, dtype).items()
        for name, recipe in part.items()
    }


def whole(plan, monkeypatch, dtype="float32"):
    """What growing whole tensors gives: the rule itself, no block being as large as any tensor
    here.
    """
    monkeypatch.setattr(blocks, "BLOCK", 1 << 30)
    return arrays(plan, dtype)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_give_the_bits_of_the_whole(name, dtype, monkeypatch):
    expected = whole(PLANS[name], monkeypatch, dtype)
    for size in SIZES:
        monkeypatch.setattr(blocks, "BLOCK", size)
        for key, array in arrays(PLANS[name], dtype).items():
            assert array.tobytes() == expected[key].tobytes(), (size, key)


@pytest.mark.parametrize("name", PLANS)
def test_every_byte_is_written_exactly_once(name, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 300)
    for slot, part in recipes(PLANS[name]).items():
        for parameter, recipe in part.items():
            if recipe.pieces is None:
                continue
            written = np.zeros(recipe.size, int)
            for offset, piece in recipe.pieces():
                written[offset : offset + piece.nbytes] += 1
            assert (written == 1).all(), (slot, parameter)


@pytest.mark.parametrize("name,copies,times", [("clone", 2, 1), ("noise of its size", 3, 2)])
def test_source_rows_are_read_a_block_at_a_time(name, copies, times, monkeypatch):
    """Once, and once before where the size of the noise is that of the numbers."""
    monkeypatch.setattr(blocks, "BLOCK", 512)
    plan = PLANS[name]
    row = next(row for row in plan.model.table.rows if "dense_h_to_4h.weight" in row.name)
    array = np.ones(row.shape(plan.model.sizes), np.float32)
    read = []

    def rows(start, stop):
        read.append((start, stop))
        return array[start:stop]

    list(blocks.grown_recipe(Tensor(array.shape, array.dtype, rows), row, plan, 0, (0,)).pieces())
    rows_read = [row for start, stop in read for row in range(start, stop)]
    assert rows_read == list(range(len(array))) * times
    assert max(stop - start for start, stop in read) * copies * array[0].nbytes <= 512


def first_units(call):
    """A method that takes the units of a block for those from the first one on."""
    return lambda self, units, *xp: call(self, units - units[0], *xp)


def forgetting_earlier_blocks(call):
    def pad(self, array, units, xp):
        self.sum = None
        return call(self, array, units, xp)

    return pad


def one_block_late(call):
    return lambda self, start, stop: call(self, max(0, start - 1), max(0, start - 1) + stop - start)


BROKEN = {
    "the first units' shares for all": ("three", PartGrowth, "factor_at", first_units),
    "noise numbered anew in each block": ("noise", Separation, "_numbers", first_units),
    "the mean of the last block alone": ("mean-pad", PartGrowth, "_pad", forgetting_earlier_blocks),
    "rows of the block before": ("clone", blocks.Blocks, "_read", one_block_late),
}


@pytest.mark.parametrize("name", BROKEN)
def test_blocks_cut_wrongly_are_found_out(name, monkeypatch):
    plan, where, method, wrong = BROKEN[name]
    expected = whole(PLANS[plan], monkeypatch)
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(where, method, wrong(getattr(where, method)))
    assert any(
        array.tobytes() != expected[key].tobytes() for key, array in arrays(PLANS[plan]).items()
    )
