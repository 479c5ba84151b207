"""A model whose parameters are updated in backward, beside an equal one with ordinary steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from native_helpers import CASES, assert_identical, held
from torch import Tensor, nn

from clr_optim import CyclicalOptimizer

ADAMW = next(case for case in CASES if case.name == "adamw")


class Network(nn.Module):
    """A model with a matrix of one row, a bias of one element and a frozen layer."""

    def __init__(self, dtype: torch.dtype = torch.float32, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(3, width, dtype=dtype)
        self.frozen = nn.Linear(width, width, dtype=dtype).requires_grad_(False)
        self.last = nn.Linear(width, 1, dtype=dtype)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 3, generator=generator).to(self.unused.dtype)
        return (self(x) - x.prod(1, keepdim=True)).square().mean()


class Twins:
    """Two equal models: ours is updated in backward, the other by ordinary steps."""

    def __init__(
        self,
        make: Callable[[nn.Module], Any],
        model: Callable[[], Any] = Network,
    ) -> None:
        self.model, self.other = model(), model()
        self.opt, self.ordinary = make(self.model), make(self.other)
        self.handle = self.opt.step_in_backward()

    def step(
        self,
        k: int,
        loss: Callable[[Any, int], Tensor] = lambda model, k: model.loss(k),
        compares: bool = True,
    ) -> None:
        """Take one step with both, and compare all tensors bit for bit."""
        self.ordinary.zero_grad()
        for model, opt in ((self.model, self.opt), (self.other, self.ordinary)):
            loss(model, k).backward()
            opt.step()
        if compares:
            self.compare()

    def compare(self) -> None:
        assert_identical(self.opt, self.ordinary)
        names = [[name for name, _ in each] for each in held(self.opt)]
        assert names == [[name for name, _ in each] for each in held(self.ordinary)]
        assert self.opt.iteration == self.ordinary.iteration
        assert self.opt.get_last_lr() == self.ordinary.get_last_lr()


def adamw(model: nn.Module, **options: Any) -> CyclicalOptimizer[Any]:
    return ADAMW.ours(model.parameters(), step_size_up=3, **options)
