"""A range test on several ranks: each rank gets the result of a single process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from range_test_helpers import make_data, same
from torch import Tensor, nn
from torch.nn import functional

from clr_optim.range_test import lr_range_test


def range_test_on_ranks(how: str) -> Any:
    """Test with this rank's share of each batch; return the results of all tests."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    data = [(x[rank::world], y[rank::world]) for x, y in make_data(size=12)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    results = []
    for metric, every in (("loss", None), ("validation_accuracy", 3)):
        for end_lr in (0.1, 1e5):
            before = [_local(p).detach().clone() for p in model.parameters()]
            result = lr_range_test(
                model, optimizer, data, functional.cross_entropy, start_lr=1e-3, end_lr=end_lr,
                num_steps=30, mode="exponential", metric=metric, accumulate=2 if every else 1,
                val_loader=data if every else None, validate_every=every,
            )  # fmt: skip
            assert same(before, [_local(p) for p in model.parameters()])
            assert not optimizer.state
            assert all(p.grad is None for p in model.parameters())
            results.append(result.to_dict())
    # Training goes on.
    for x, y in data:
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return results


def _local(param: Any) -> Tensor:
    return param.to_local() if hasattr(param, "to_local") else param


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_get_the_same_result_and_that_of_one_process(ranks, how):
    first, second = ranks.run(2, range_test_on_ranks, how)
    assert first == second
    assert [result["diverged"] for result in first] == [False, True, False, True]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    alone = lr_range_test(
        model, torch.optim.Adam(model.parameters(), lr=0.01), make_data(size=12),
        functional.cross_entropy, start_lr=1e-3, end_lr=0.1, num_steps=30, mode="exponential",
    )  # fmt: skip
    assert first[0]["lrs"] == alone.lrs
    assert first[0]["values"] == pytest.approx(alone.values, rel=1e-3)
