"""Distributed checkpoints of two processes: saved from FSDP2, grown, and loaded into FSDP2 again.

Two processes load them, and one does.
"""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from distributed import (  # noqa: E402
    dcp,
    load_into,
    make_llama,
    make_optimizer,
    save_config,
    take_state,
    train,
)

from growkit.checkpoint.location import open_source  # noqa: E402
from growkit.cli import run  # noqa: E402

GROWTHS = {
    "depth": ["depth", "--map", "2:4", "--method", "identity"],
    "width": ["width", "--heads", "2x", "--mlp", "2x"],
}
FIELDS = {
    "depth": {"num_hidden_layers": 4},
    "width": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "intermediate_size": 48,
    },
}


def shard(network, mesh):
    """Each layer's parameters over the processes, and the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in network.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def begin(rank: int, world: int, place: Path):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(place), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    return torch.distributed.device_mesh.init_device_mesh("cpu", (world,))


def save(rank: int, world: int, home: Path) -> None:
    """Train and save: groups as they are, and flattened with bare names as torchtitan does."""
    mesh = begin(rank, world, home / "save.store")
    network = make_llama()
    shard(network, mesh)
    optimizer = make_optimizer(network)
    train(network, optimizer)
    model, state = take_state(network, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=home / "own")
    model, state = take_state(network, optimizer, flattened=True)
    dcp.save(model | {"optimizer": state}, checkpoint_id=home / "flattened")
    if rank == 0:
        save_config(home / "own", network)
        save_config(home / "flattened", network)
    torch.distributed.destroy_process_group()


def load(rank: int, world: int, home: Path) -> None:
    """Load every grown checkpoint and compare each tensor with what growkit reads there."""
    mesh = begin(rank, world, home / f"load{world}.store")
    for growth in GROWTHS:
        for layout, flattened in (("own", False), ("flattened", True)):
            path = home / f"{layout}-{growth}"
            network = make_llama(1, **FIELDS[growth])
            shard(network, mesh)
            optimizer = make_optimizer(network, lr=7.0)
            load_into(network, optimizer, path, bare=flattened, flattened=flattened)
            compare(network, optimizer, open_source(str(path)))
            assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]
            train(network, optimizer, 1)
    torch.distributed.destroy_process_group()


def compare(network, optimizer, source) -> None:
    for name, parameter in network.named_parameters():
        state = optimizer.state[parameter]
        held = (parameter, state["exp_avg"], state["exp_avg_sq"])
        for slot, tensor in zip(("params", "mu", "nu"), held, strict=True):
            wanted = torch.from_numpy(source.tensors[slot][name].read())
            assert torch.equal(tensor.detach().full_tensor(), wanted), (slot, name)
        assert float(state["step"]) == source.record["count"] > 0


@pytest.mark.slow
def test_two_processes_save_and_two_and_one_load(tmp_path):
    torch.multiprocessing.spawn(save, args=(2, tmp_path), nprocs=2)
    assert len(list((tmp_path / "own").glob("*.distcp"))) == 2
    assert open_source(str(tmp_path / "own")).tensors["mu"]["lm_head.weight"].span is None
    for growth, words in GROWTHS.items():
        for layout in ("own", "flattened"):
            out = tmp_path / f"{layout}-{growth}"
            assert run([*words, str(tmp_path / layout), str(out)]) == 0
            assert run(["verify", str(tmp_path / layout), str(out)]) == 0
    torch.multiprocessing.spawn(load, args=(2, tmp_path), nprocs=2)
    torch.multiprocessing.spawn(load, args=(1, tmp_path), nprocs=1)


@pytest.mark.slow
def test_a_moment_that_was_changed_is_noticed(tmp_path):
    torch.multiprocessing.spawn(save, args=(1, tmp_path), nprocs=1)
    for growth, words in GROWTHS.items():
        for layout in ("own", "flattened"):
            assert run([*words, str(tmp_path / layout), str(tmp_path / f"{layout}-{growth}")]) == 0
    # Tensors of another growth under the same names.
    again = [*GROWTHS["depth"], "--moments", "reset", "--force"]
    assert run([*again, str(tmp_path / "own"), str(tmp_path / "own-depth")]) == 0
    with pytest.raises(Exception, match="AssertionError"):
        torch.multiprocessing.spawn(load, args=(1, tmp_path), nprocs=1)
