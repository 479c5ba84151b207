"""Several ranks follow one course, equal to that of one process.

The reference is a plain torch optimizer in one process on the whole batch, fed the rates. Each rank
works on its share of the batch, so that gradients are equal up to the order of sums.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import step_in_backward
from native_helpers import BY_NAME
from sharded_training import (
    STEPS,
    Model,
    loss_of_share,
    mesh_of_all,
    norm_of_the_first_ranks_gradient,
    reference,
    train,
    whole_copy,
    wrap_case,
)
from torch import Tensor

from clr_optim import CyclicalOptimizer

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)

CASES = ["sgd-wd", "sgd-nest-wd", "adam-wd", "adamw-ams", "adagrad-decay", "adadelta",
         "rmsprop-mom-cent", "adam-cycled"]  # fmt: skip


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("how", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does(ranks, name, how, backend, world):
    expected, _ = reference(BY_NAME[name])
    results = ranks.run(world, train, name, how, backend, None)
    for result in results:
        assert result["course"] == results[0]["course"]
        for param, expected_param in zip(result["params"], expected, strict=True):
            torch.testing.assert_close(param, expected_param)
        assert result["backends"] == {backend}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("how", ["fsdp", "ddp"])
def test_the_norm_is_over_all_ranks(ranks, how, backend, world):
    expected, norms = reference(BY_NAME["adam-wd"], max_norm=0.1)
    results = ranks.run(world, train, "adam-wd", how, backend, 0.1)
    for result in results:
        assert result["norms"] == results[0]["norms"]
        assert result["norms"] == pytest.approx(norms, rel=1e-5)
        for param, expected_param in zip(result["params"], expected, strict=True):
            torch.testing.assert_close(param, expected_param)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_norm_is_the_same_on_a_rank_without_gradients(ranks, backend):
    assert ranks.run(2, norm_of_the_first_ranks_gradient, backend) == [pytest.approx(12**0.5)] * 2


def _train_under_a_scaler(backend: str, fused: bool, overflows: list[int]) -> Any:
    """Overflow on the last rank alone, before the named steps. Return course and parameters."""
    from torch.distributed.fsdp import fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()
    model: Any = Model()
    fully_shard(model, mesh=mesh_of_all())
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False, fused=fused)
    opt = CyclicalOptimizer(inner, "triangular2", step_size_up=3, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
    course = []
    pending = list(overflows)
    while opt.iteration < STEPS:
        opt.zero_grad()
        scaler.scale(loss_of_share(model, opt.iteration, rank, world)).backward()
        before = (opt.iteration, opt.get_last_lr())
        skip = bool(pending) and pending[0] == opt.iteration
        if skip:
            pending.pop(0)
            if rank == world - 1:
                next(model.parameters()).grad.to_local().fill_(float("inf"))
        scaler.step(opt)
        scaler.update()
        assert (before == (opt.iteration, opt.get_last_lr())) == skip
        course.append((opt.iteration, opt.get_last_lr(), scaler.get_scale()))
    return course, [whole_copy(p) for p in model.parameters()]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_one_rank_is_one_on_all(ranks, fused, backend):
    results = ranks.run(2, _train_under_a_scaler, backend, fused, [0, 3, 3, 7])
    quiet = ranks.run(2, _train_under_a_scaler, backend, fused, [])
    (course, params), (other_course, _) = results
    assert course == other_course
    assert len(course) == STEPS + 4
    for param, expected_param in zip(params, quiet[0][1], strict=True):
        assert torch.equal(param, expected_param)


def _train_in_backward(backend: str) -> list[Tensor]:
    from torch.distributed.fsdp import fully_shard

    model: Any = Model()
    fully_shard(model.first, mesh=mesh_of_all())
    fully_shard(model, mesh=mesh_of_all())
    optimizers = {
        p: wrap_case(BY_NAME["adam-wd"], [p], backend)
        for p in model.parameters()
        if p.requires_grad
    }

    step_in_backward(optimizers)
    for step in range(STEPS):
        loss_of_share(model, step, dist.get_rank(), dist.get_world_size()).backward()
        assert all(p.grad is None for p in model.parameters())
    assert {opt.iteration for opt in optimizers.values()} == {STEPS}
    return [whole_copy(p) for p in model.parameters()]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_optimizers_in_backward_on_sharded_parameters(ranks, backend):
    expected, _ = reference(BY_NAME["adam-wd"])
    for params in ranks.run(2, _train_in_backward, backend):
        for param, expected_param in zip(params, expected, strict=True):
            torch.testing.assert_close(param, expected_param)
