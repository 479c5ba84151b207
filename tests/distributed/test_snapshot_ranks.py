"""Snapshots on several ranks: rank 0 writes the folder, and every rank reads it."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from clr_optim import CyclicalOptimizer, Snapshots

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


def take(folder):
    """Two cycles under DDP. Return what rank and folder have, and predictions."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), step_size_up=2)
    memory = Snapshots(opt, model)
    disk = Snapshots(opt, model, folder=folder)
    writes = []
    torch_save = torch.save
    torch.save = lambda *args: (writes.append(1), torch_save(*args))
    try:
        for step in range(8):
            opt.zero_grad()
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            model(inputs[dist.get_rank() :: 2]).square().mean().backward()
            opt.step()
    finally:
        torch.save = torch_save
    dist.barrier()
    found = [each.predict(torch.ones(1, 3)).tolist() for each in (memory, disk)]
    return len(writes), disk.steps, memory.steps, found


def test_rank_0_writes_and_all_ranks_predict_alike(ranks, tmp_path):
    results = ranks.run(2, take, str(tmp_path / "run"))
    assert [writes for writes, *_ in results] == [2, 0]
    assert results[0][1:] == results[1][1:]
    _, on_disk, in_memory, (one, other) = results[0]
    assert on_disk == in_memory == [4, 8]
    assert one == other
    assert sorted(os.listdir(tmp_path / "run")) == ["snapshot-4.pt", "snapshot-8.pt"]


def refused(how, folder):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if how == "fsdp2":
        dist.fsdp.fully_shard(model[1], mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    else:
        model = dist.fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        ValueError, match=r"is sharded: save snapshots by torch.distributed"
    ) as error:
        Snapshots(opt, model, folder=folder)
    assert not opt._cycle_end_hooks
    return str(error.value)


@pytest.mark.parametrize(("how", "name"), [("fsdp2", "'1.weight'"), ("fsdp1", "'the model'")])
def test_sharded_models_are_refused(ranks, tmp_path, how, name):
    for message in ranks.run(2, refused, how, str(tmp_path / "run")):
        assert name in message
    assert os.listdir(tmp_path) == []
