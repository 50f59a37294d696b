"""Remedies come in order, alone and then together, up to the first that fits."""

from __future__ import annotations

from trainer.config.sections import resolve
from trainer.config.values import read_values
from trainer.devices.accelerators import GIB
from trainer.plan.compiler import Memory
from trainer.plan.remedies import (
    Trial,
    apply_changes,
    describe_remedy,
    describe_shortage,
    try_remedies,
)

FOUR_DEVICES = {"data": 4, "fsdp": 1, "expert": 1, "tensor": 1}
ONE_DEVICE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


def tiny(*changes: str):
    return resolve(read_values("tiny", list(changes)))


def list_tried(needs: dict[str, int], config=None, mesh=FOUR_DEVICES):
    """The changes tried when 100 bytes are available and a step needs `needs` with each change."""

    def measure(changed):
        need = 1000
        for words, bytes_ in needs.items():
            if apply_changes(changed, words.split()) == changed:
                need = min(need, bytes_)
        return Memory(need, 0, 0, 0, 100)

    trials = try_remedies(config or tiny("mesh.zero1=false"), mesh, measure)
    return [" ".join(trial.changes) for trial in trials]


def test_remedies_come_in_order_and_end_with_the_first_that_fits():
    order = [
        "remat=dots",
        "remat=half",
        "remat=full",
        "mesh.zero1=true",
        "mesh.data=1 mesh.fsdp=4",
        "batch.accumulation=2",
        "batch.accumulation=4",
    ]
    for number, words in enumerate(order):
        assert list_tried({words: 50}) == order[: number + 1]
    # No context is tried: 128 is the shortest already. Where nothing helps alone, all together.
    both = "remat=full mesh.zero1=true"
    assert list_tried({both: 50}) == [*order, both]
    assert list_tried({})[-1] == "remat=full mesh.data=1 mesh.fsdp=4 batch.accumulation=4"


def test_the_shortest_context_is_tried_last():
    tried = list_tried({}, tiny("model.context=512", "remat=full"), ONE_DEVICE)
    assert tried[-1].endswith("model.context=128")


def test_a_loss_in_one_piece_is_cut_first():
    assert list_tried({"loss_chunk=auto": 50}, tiny("loss_chunk=none")) == ["loss_chunk=auto"]
    assert "loss_chunk=auto" not in list_tried({}, tiny("loss_chunk=64"))


def test_with_remat_auto_no_policy_is_a_remedy():
    tried = list_tried({}, tiny("remat=auto"))
    assert tried
    assert not any("remat" in words for words in tried)


def test_advice_names_the_remedy_or_says_that_there_is_none():
    fits = Memory(GIB, 0, 0, 0, 2 * GIB)
    short = Memory(3 * GIB, 0, 0, 0, 2 * GIB)
    assert "remat=full would make it fit" in describe_remedy([Trial(("remat=full",), fits)])
    assert "larger devices" in describe_remedy([Trial(("remat=full",), short)])
    assert "larger devices" in describe_remedy([])
    said = describe_shortage(short, "core")
    assert "needs 3.0 GiB a core and there are 2.0, 1.0 too few" in said
