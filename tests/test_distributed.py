"""Several ranks follow one course, equal to that of one process.

The reference is a plain torch optimizer in one process on the whole batch, fed the rates. Each rank
works on its share of the batch, so that gradients are equal up to the order of sums.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from native_helpers import BY_NAME, Case
from torch import Tensor, nn

from clr_optim import CyclicalOptimizer

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)

BATCH, STEPS = 12, 9  # 1, 2 and 3 ranks share the batch evenly
CASES = ["sgd-wd", "sgd-nest-wd", "adam-wd", "adamw-ams", "adagrad-decay", "adadelta",
         "rmsprop-mom-cent", "adam-cycled"]  # fmt: skip


class Model(nn.Module):
    """A model whose sizes no number of ranks divides.

    One bias has one element; one layer is frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7)
        self.last = nn.Linear(7, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


def _loss(model: nn.Module, step: int, rank: int = 0, world: int = 1) -> Tensor:
    """Return the loss of this rank's share of the step's batch."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 5, generator=generator)
    y = torch.randn(BATCH, 1, generator=generator)
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return ((model(x[mine]) - y[mine]) ** 2).mean()


def _wrapped(case: Case, params: Any, backend: str, **more: Any) -> CyclicalOptimizer[Any]:
    return case.ours(params, backend=backend, step_size_up=3, **more)


def reference(case: Case, max_norm: float | None = None) -> tuple[list[Tensor], list[float]]:
    """Return ``(parameters, norms)`` of the plain optimizer in one process."""
    model = Model()
    inner = case.make(model.parameters())
    ours = _wrapped(case, copy.deepcopy(model).parameters(), "torch")
    norms = []
    for step in range(STEPS):
        ours.set_iteration(step)
        for group, our in zip(inner.param_groups, ours.param_groups, strict=True):
            group.update({k: our[k] for k in ("lr", "betas", "momentum") if k in our})
        inner.zero_grad()
        _loss(model, step).backward()
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        inner.step()
    return [p.detach() for p in model.parameters()], norms


def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(name: str, how: str, backend: str, max_norm: float | None) -> dict[str, Any]:
    """Run one rank. Return its course, its norms and the parameters at the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model: Any = Model()
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = _mesh()
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    opt = _wrapped(BY_NAME[name], model.parameters(), backend, max_grad_norm=max_norm)
    course, norms = [], []
    for step in range(STEPS):
        opt.zero_grad()
        _loss(model, step, rank, world).backward()
        opt.step()
        course.append((opt.iteration, opt.cycle, opt.param_groups[0]["lr"]))
        if max_norm is not None:
            norms.append(opt.grad_norm.item())
    for state in opt.state.values():
        assert all(
            type(value) is type(next(model.parameters())) or key == "step" or how == "ddp"
            for key, value in state.items()
        )
    return {
        "course": course,
        "norms": norms,
        "params": [_full(p) for p in model.parameters()],
        "backends": {line.partition(":")[0] for line in opt.explain().splitlines()},
    }


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("how", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does(ranks, name, how, backend, world):
    expected, _ = reference(BY_NAME[name])
    results = ranks.run(world, train, name, how, backend, None)
    for result in results:
        assert result["course"] == results[0]["course"]
        for ours, theirs in zip(result["params"], expected, strict=True):
            torch.testing.assert_close(ours, theirs)
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
        for ours, theirs in zip(result["params"], expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def norm_of_the_first_ranks_gradient(backend: str) -> float:
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = nn.Parameter(distribute_tensor(torch.ones(6), _mesh(), [Shard(0)]))
    opt = _wrapped(BY_NAME["adam-wd"], [weight], backend, max_grad_norm=0.1)
    if dist.get_rank() == 0:
        weight.grad = torch.zeros_like(weight)
        weight.grad.to_local().fill_(2.0)
    opt.step()
    return opt.grad_norm.item()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_norm_is_the_same_on_a_rank_without_gradients(ranks, backend):
    assert ranks.run(2, norm_of_the_first_ranks_gradient, backend) == [pytest.approx(12**0.5)] * 2


def _train_under_a_scaler(backend: str, fused: bool, overflows: list[int]) -> Any:
    """Overflow on the last rank alone, before the named steps. Return course and parameters."""
    from torch.distributed.fsdp import fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()
    model: Any = Model()
    fully_shard(model, mesh=_mesh())
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False, fused=fused)
    opt = CyclicalOptimizer(inner, "triangular2", step_size_up=3, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
    course = []
    pending = list(overflows)
    while opt.iteration < STEPS:
        opt.zero_grad()
        scaler.scale(_loss(model, opt.iteration, rank, world)).backward()
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
    return course, [_full(p) for p in model.parameters()]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_one_rank_is_one_on_all(ranks, fused, backend):
    results = ranks.run(2, _train_under_a_scaler, backend, fused, [0, 3, 3, 7])
    quiet = ranks.run(2, _train_under_a_scaler, backend, fused, [])
    (course, params), (other_course, _) = results
    assert course == other_course
    assert len(course) == STEPS + 4
    for ours, theirs in zip(params, quiet[0][1], strict=True):
        assert torch.equal(ours, theirs)


def _train_in_backward(backend: str) -> list[Tensor]:
    from torch.distributed.fsdp import fully_shard

    model: Any = Model()
    fully_shard(model.first, mesh=_mesh())
    fully_shard(model, mesh=_mesh())
    optimizers = {
        p: _wrapped(BY_NAME["adam-wd"], [p], backend) for p in model.parameters() if p.requires_grad
    }

    def update(param: nn.Parameter) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in optimizers:
        param.register_post_accumulate_grad_hook(update)
    for step in range(STEPS):
        _loss(model, step, dist.get_rank(), dist.get_world_size()).backward()
        assert all(p.grad is None for p in model.parameters())
    assert {opt.iteration for opt in optimizers.values()} == {STEPS}
    return [_full(p) for p in model.parameters()]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_optimizers_in_backward_on_sharded_parameters(ranks, backend):
    expected, _ = reference(BY_NAME["adam-wd"])
    for params in ranks.run(2, _train_in_backward, backend):
        for ours, theirs in zip(params, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
