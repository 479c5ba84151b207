"""Two equal optimizers on a rank, parameters and a model, for the tests of DTensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from internals import plan_of
from native_helpers import Case, assert_close, failure, feed, held, members
from torch import Tensor, nn

from clr_optim.plan import Plan

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
)

# ---- two optimizers on one rank


def spread(values: Tensor, mesh: DeviceMesh, *placements: Any) -> DTensor:
    """Return this rank's part of a tensor that every rank holds whole, without communication."""
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def assert_same(ours: Any, expected: Any, tolerance: float, what: object) -> None:
    """Assert that both have the same type, division and values on this rank."""
    assert type(ours) is type(expected), what
    if not isinstance(expected, Tensor):
        assert ours == expected, what
        return
    assert ours.requires_grad == expected.requires_grad, what
    assert ours.shape == expected.shape, what
    if isinstance(expected, DTensor):
        assert ours.device_mesh == expected.device_mesh, what
        assert ours.placements == expected.placements, what
        assert ours.stride() == expected.stride(), what
        ours, expected = ours._local_tensor, expected._local_tensor
        assert type(ours) is type(expected), what
    assert ours.stride() == expected.stride(), what
    assert_close(ours, expected, tolerance, what)


class Pair:
    """Our optimizer and torch's on equal parameters, as :class:`native_helpers.Twins`.

    Args:
        make: makes new, equal parameters at each call.
        case: the optimizer of both.
    """

    def __init__(self, case: Case, make: Callable[[], Any], **wrap: Any) -> None:
        self.twin = case.make(make())
        self.ours = case.ours(make(), **{"step_size_up": 3, **wrap})
        self.generator = torch.Generator().manual_seed(5)

    @property
    def plan(self) -> Plan:
        return plan_of(self.ours)

    def each(self, change: Callable[[Any], object]) -> bool:
        """Do the same to both.

        If torch raises, ours must raise too. Return whether neither raised.
        """
        twin_error, error = failure(change, self.twin), failure(change, self.ours)
        if type(error) is not type(twin_error):
            raise AssertionError(f"torch raises {twin_error!r}, ours {error!r}") from error
        return twin_error is None

    def on(self, index: int, change: Callable[[Any, Any], object]) -> None:
        """Call ``change(optimizer, parameter)`` with this parameter of both optimizers."""
        assert self.each(lambda opt: change(opt, members(opt)[index]))

    def draw(self, idle: Sequence[int] = ()) -> None:
        """Draw new gradients for all but the idle parameters.

        Both get equal values, divided as the parameters are.
        """
        for i, pair in enumerate(zip(members(self.ours), members(self.twin), strict=True)):
            values = torch.randn(pair[0].shape, generator=self.generator, dtype=torch.float64)
            for p in pair:
                whole = values.to(p.dtype, copy=True)
                if isinstance(p, DTensor):
                    whole = spread(whole, p.device_mesh, *p.placements)
                p.grad = None if i in idle or not p.requires_grad else whole

    def step(self, tolerance: float = 1e-12) -> bool:
        """Step both and compare them. Return False if both raised."""
        feed(self.twin, self.ours)
        good = self.each(lambda opt: opt.step())
        if good:
            self.compare(tolerance)
        return good

    def compare(self, tolerance: float = 1e-12) -> None:
        for i, (p, q) in enumerate(zip(members(self.ours), members(self.twin), strict=True)):
            assert_same(p, q, tolerance, i)
        for i, (mine, other) in enumerate(zip(held(self.ours), held(self.twin), strict=True)):
            assert [name for name, _ in mine] == [name for name, _ in other], i
            for (name, a), (_, b) in zip(mine, other, strict=True):
                assert_same(a, b, tolerance, (i, name))

    def run(self, steps: int, idle: Sequence[int] = ()) -> None:
        for _ in range(steps):
            self.draw(idle)
            self.step()


#: Shapes and placements: uneven, empty on some rank, one element, a scalar, plain.
LAYOUTS: list[tuple[tuple[int, ...], Any]] = [
    ((5, 3), Shard(0)),
    ((1,), Shard(0)),
    ((2, 4), Shard(1)),
    ((), Replicate()),
    ((3,), Replicate()),
    ((4,), None),
]
UNEVEN, EMPTY, BY_COLUMN, SCALAR, WHOLE, PLAIN = range(len(LAYOUTS))


def dtensors(mesh: DeviceMesh, dtype: torch.dtype = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s, _ in LAYOUTS]
    return [
        nn.Parameter(x.to(dtype) if place is None else spread(x.to(dtype), mesh, place))
        for x, (_, place) in zip(drawn, LAYOUTS, strict=True)
    ]


# ---- a model


class Block(nn.Module):
    """Layers to divide by rows or by columns, and a norm, whose weights every rank holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(self.norm(torch.tanh(self.up(x))))))


def loss(model: nn.Module, step: int, part: int = 0, parts: int = 1) -> Tensor:
    """Return the loss of this part of the step's batch."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(12, 4, 6, generator=generator).to(next(model.parameters()).dtype)
    y = torch.randn(12, 4, 1, generator=generator)
    mine = slice(part * 12 // parts, (part + 1) * 12 // parts)
    return ((model(x[mine]) - y[mine]) ** 2).mean()
