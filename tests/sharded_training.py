"""A small model that several ranks train, and the course of one process to compare with."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from native_helpers import BY_NAME, Case
from torch import Tensor, nn

from clr_optim import CyclicalOptimizer

BATCH, STEPS = 12, 9  # 1, 2 and 3 ranks share the batch evenly


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


def loss_of_share(model: nn.Module, step: int, rank: int = 0, world: int = 1) -> Tensor:
    """Return the loss of this rank's share of the step's batch."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 5, generator=generator)
    y = torch.randn(BATCH, 1, generator=generator)
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return ((model(x[mine]) - y[mine]) ** 2).mean()


def wrap_case(case: Case, params: Any, backend: str, **more: Any) -> CyclicalOptimizer[Any]:
    return case.ours(params, backend=backend, step_size_up=3, **more)


def reference(case: Case, max_norm: float | None = None) -> tuple[list[Tensor], list[float]]:
    """Return ``(parameters, norms)`` of the plain optimizer in one process."""
    model = Model()
    inner = case.make(model.parameters())
    ours = wrap_case(case, copy.deepcopy(model).parameters(), "torch")
    norms = []
    for step in range(STEPS):
        ours.set_iteration(step)
        for group, our in zip(inner.param_groups, ours.param_groups, strict=True):
            group.update({k: our[k] for k in ("lr", "betas", "momentum") if k in our})
        inner.zero_grad()
        loss_of_share(model, step).backward()
        if max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        inner.step()
    return [p.detach() for p in model.parameters()], norms


def mesh_of_all() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole_copy(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(name: str, how: str, backend: str, max_norm: float | None) -> dict[str, Any]:
    """Run one rank. Return its course, its norms and the parameters at the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model: Any = Model()
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = mesh_of_all()
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    opt = wrap_case(BY_NAME[name], model.parameters(), backend, max_grad_norm=max_norm)
    course, norms = [], []
    for step in range(STEPS):
        opt.zero_grad()
        loss_of_share(model, step, rank, world).backward()
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
        "params": [whole_copy(p) for p in model.parameters()],
        "backends": {line.partition(":")[0] for line in opt.explain().splitlines()},
    }


def norm_of_the_first_ranks_gradient(backend: str) -> float:
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = nn.Parameter(distribute_tensor(torch.ones(6), mesh_of_all(), [Shard(0)]))
    opt = wrap_case(BY_NAME["adam-wd"], [weight], backend, max_grad_norm=0.1)
    if dist.get_rank() == 0:
        weight.grad = torch.zeros_like(weight)
        weight.grad.to_local().fill_(2.0)
    opt.step()
    return opt.grad_norm.item()
