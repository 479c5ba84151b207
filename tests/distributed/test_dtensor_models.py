"""Models divided by rows, columns and FSDP2 train as undivided ones do.

The reference is one process, or torch's own step on equal parts of the same model.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import Ranks
from dtensor_helpers import Block, Pair, loss, spread
from native_helpers import BY_NAME, feed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Shard,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

STEPS = 5


# ---- reference: one process


def _divided_by_tensor(model: nn.Module, mesh: DeviceMesh) -> None:
    plan = {
        "up": ColwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "down": RowwiseParallel(input_layouts=Shard(1)),
    }
    parallelize_module(model, mesh, plan)


def _divided(how: str, shape: tuple[int, ...], **options: Any) -> tuple[Any, int, int]:
    """Return ``(model, this rank's part of the batch, number of parts)``."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # views are not changed
    model = Block()
    if how == "tp":
        _divided_by_tensor(model, init_device_mesh("cpu", shape))
        return model, 0, 1
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner"))
    if how == "hsdp":
        fully_shard(model.down, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
        return model, dist.get_rank(), dist.get_world_size()
    _divided_by_tensor(model, mesh["inner"])
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh["outer"], **options)
    return model, mesh.get_local_rank("outer"), shape[0]


Run = tuple[list[float], list[Tensor]]  # norms, and the parameters at the end


def _train(opt: Any, model: nn.Module, part: int = 0, parts: int = 1, steps: int = STEPS) -> Run:
    norms = []
    for step in range(steps):
        opt.zero_grad()
        loss(model, step, part, parts).backward()
        opt.step()
        norms.append(opt.grad_norm.item() if opt.grad_norm is not None else 0.0)
    return norms, [_full(p) for p in model.parameters()]


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _undivided(name: str, max_norm: float | None) -> Run:
    """Train in one process with the plain torch optimizer, fed our rates."""
    model, case = Block(), BY_NAME[name]
    inner = case.make(model.parameters())
    ours = case.ours(copy.deepcopy(model).parameters(), backend="torch", step_size_up=3)
    norms = []
    for step in range(STEPS):
        ours.set_iteration(step)
        feed(inner, ours)
        inner.zero_grad()
        loss(model, step).backward()
        clip = max_norm is not None
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item() if clip else 0.0)
        inner.step()
    return norms, [p.detach() for p in model.parameters()]


def _trained(how: str, shape: tuple[int, ...], name: str, backend: str, max_norm: float | None):
    model, part, parts = _divided(how, shape)
    opt = BY_NAME[name].ours(
        model.parameters(), backend=backend, step_size_up=3, max_grad_norm=max_norm
    )
    norms, params = _train(opt, model, part, parts)
    kinds = {p for w in model.parameters() if type(w) is DTensor for p in w.placements}
    return norms, params, opt.explain(), {str(type(kind).__name__) for kind in kinds}


def _assert_trained(results: list[Any], expected: Run) -> None:
    for norms, params, *_ in results:
        assert norms == results[0][0]
        assert norms == pytest.approx(expected[0], rel=1e-5)
        for ours, reference in zip(params, expected[1], strict=True):
            torch.testing.assert_close(ours, reference)


COURSES = pytest.mark.parametrize(
    ("name", "max_norm"), [("sgd-nest-wd", None), ("adamw-ams", 0.1)], ids=["sgd", "adamw-clipped"]
)


@COURSES
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("how", "shape"),
    [("tp", (2,)), ("fsdp+tp", (2, 1)), ("fsdp+tp", (1, 2)), ("hsdp", (2, 1)), ("hsdp", (1, 2))],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_divided_models_train_as_undivided_ones(ranks, how, shape, backend, name, max_norm):
    results = ranks.run(2, _trained, how, shape, name, backend, max_norm)
    _assert_trained(results, _undivided(name, max_norm))
    if backend == "auto":
        # With tensor parallelism alone, torch leaves the gradient of a norm's weights as summands.
        assert [("torch: 2 param" in r[2], "torch:" in r[2]) for r in results] == (
            [(how == "tp", how == "tp")] * 2
        )
    if shape == (1, 2) and how == "fsdp+tp":
        assert "_StridedShard" in results[0][3]


def test_both_dimensions_of_a_mesh(tmp_path):
    four = Ranks(4, tmp_path)
    try:
        for how, name, max_norm in (("fsdp+tp", "adamw-ams", 0.1), ("hsdp", "sgd-nest-wd", 0.1)):
            results = four.run(4, _trained, how, (2, 2), name, "native", max_norm)
            _assert_trained(results, _undivided(name, max_norm))
        assert all(four.run(4, _orders))
    finally:
        four.close()


def _orders() -> bool:
    """Give a gradient the parameter's placements, but deal its parts out in another order."""
    mesh = init_device_mesh("cpu", (2, 2))
    case = BY_NAME["adamw-ams"]
    pair = Pair(
        case, lambda: [nn.Parameter(spread(torch.ones(8).double(), mesh, Shard(0), Shard(0)))]
    )
    pair.run(1)
    pair.draw()

    def other(_: Any, p: Any) -> None:
        turned = spread(p.grad.full_tensor(), _transposed(mesh), Shard(0), Shard(0))
        spec = copy.copy(p.grad._spec)
        spec.shard_order = (type(spec.shard_order[0])(0, (1, 0)),)
        p.grad = DTensor(turned._local_tensor, spec, requires_grad=False)

    pair.on(0, other)
    pair.step()
    return True


def _transposed(mesh: DeviceMesh) -> DeviceMesh:
    return DeviceMesh("cpu", mesh.mesh.t().contiguous())


# ---- FSDP2 with each of its options, beside torch's own step


class Mixed(Block):
    """A model whose first layer is in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.up.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x.to(torch.bfloat16))).float()
        return self.head(torch.tanh(self.down(self.norm(h))))


FSDP: dict[str, dict[str, Any]] = {
    "reshard": {"reshard_after_forward": True},
    "keep": {"reshard_after_forward": False},
    "half": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    "half-sums": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "by-column": {"shard_placement_fn": lambda p: Shard(p.dim() - 1)},
    "mixed": {},
    "frozen": {},
    "compiled": {},
}


def _beside_torch(how: str, name: str, backend: str) -> None:
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    warnings.filterwarnings("ignore", message="The .grad attribute")  # torch.compile reads it
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    models: list[nn.Module] = []

    def make() -> Any:
        model = Mixed() if how == "mixed" else Block()
        if how == "frozen":
            model.down.requires_grad_(False)
        for module in (model.up, model.down, model):
            fully_shard(module, mesh=mesh, **FSDP[how])
        models.append(torch.compile(model, backend="eager") if how == "compiled" else model)
        return model.parameters()

    pair = Pair(BY_NAME[name], make, backend=backend)
    for step in range(4):
        for model in models:
            model.zero_grad()
            loss(model, step, rank, world).backward()
        pair.step(2e-2 if how == "mixed" else 1e-5)


@pytest.mark.parametrize(
    ("how", "world"), [*((how, 2) for how in FSDP), ("reshard", 3), ("mixed", 3)]
)
def test_fsdp_beside_torch(ranks, how, world):
    ranks.run(world, _beside_torch, how, "adamw-ams", "native")
