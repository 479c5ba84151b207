"""The optimizers that every test crosses with the rest, and a problem they can all work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clr_optim import CyclicalOptimizer


class SignDescent(torch.optim.Optimizer):
    """An optimizer that no library has: the sign of a running mean of gradients."""

    def __init__(self, params, lr=1e-3, decay=0.5):
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - group["decay"])
                    p.sub_(mean.sign() * group["lr"])
        return loss


@dataclass(frozen=True)
class Case:
    """An optimizer with settings: ``make(params_or_groups)`` builds it at its rate ``lr``."""

    name: str
    cls: type[torch.optim.Optimizer]
    options: dict[str, Any]
    lr: float = 0.01
    sparse: bool = False
    closure: bool = False
    only_2d: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)

    def make(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        return self.cls(params, **{"lr": self.lr, **self.options, **more})


_optim = torch.optim
CASES = [
    Case("sgd", _optim.SGD, {}),
    Case("sgd-momentum", _optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    Case("sgd-nesterov", _optim.SGD, {"momentum": 0.9, "nesterov": True}),
    Case(
        "sgd-dampening-maximize", _optim.SGD, {"momentum": 0.8, "dampening": 0.1, "maximize": True}
    ),
    Case("sgd-fused", _optim.SGD, {"momentum": 0.9, "fused": True}),
    Case("adam", _optim.Adam, {}),
    Case(
        "adam-amsgrad-foreach", _optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "foreach": True}
    ),
    Case("adam-fused", _optim.Adam, {"fused": True}),
    Case("adamw", _optim.AdamW, {}),
    Case("adamw-fused-maximize", _optim.AdamW, {"fused": True, "maximize": True}),
    Case("adagrad", _optim.Adagrad, {"lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    Case("adagrad-fused", _optim.Adagrad, {"fused": True}),
    Case("adadelta", _optim.Adadelta, {}, lr=0.5),
    Case("rmsprop", _optim.RMSprop, {}),
    Case(
        "rmsprop-momentum-centered", _optim.RMSprop, {"momentum": 0.9, "centered": True}, lr=0.001
    ),
    Case("adamax", _optim.Adamax, {}),
    Case("nadam", _optim.NAdam, {}),
    Case("radam", _optim.RAdam, {}),
    Case("asgd", _optim.ASGD, {}),
    Case("rprop", _optim.Rprop, {}),
    Case("adafactor", _optim.Adafactor, {}),
    Case("muon", _optim.Muon, {"ns_steps": 2}, only_2d=True, dtypes=(torch.float32,)),
    Case("lbfgs", _optim.LBFGS, {"max_iter": 4, "history_size": 3}, lr=0.1, closure=True),
    Case("sparse-adam", _optim.SparseAdam, {}, sparse=True),
    Case("sign-descent", SignDescent, {}),
]
BY_NAME = {case.name: case for case in CASES}


class Problem:
    """Parameters pulled towards targets, with noise that depends on the step only.

    Two problems of the same case and dtype start equal and give equal gradients.
    """

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        shapes = [(4, 3), (6, 5)] if case.only_2d else [(4, 3), (7,), ()]
        if case.sparse:
            shapes = [(4, 3), (6, 2)]
        generator = torch.Generator().manual_seed(20)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.params = [torch.nn.Parameter(draw(s).to(device, dtype)) for s in shapes]
        self.targets = [draw(s).to(device, dtype) for s in shapes]
        self.sparse = case.sparse

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + step)
        total = torch.zeros((), dtype=self.params[0].dtype, device=self.params[0].device)
        for p, target in zip(self.params, self.targets, strict=True):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            total = total + ((p - target - 0.3 * noise) ** 2).sum()
        return total

    def backward(self, step: int) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = self.loss(step)
        loss.backward()
        if self.sparse:
            for p in self.params:
                rows = torch.tensor([step % p.shape[0], 0], device=p.device)
                p.grad = torch.sparse_coo_tensor(
                    rows[None], p.grad[rows], p.shape, check_invariants=True
                ).coalesce()
        return loss

    def step(self, optimizer: torch.optim.Optimizer, step: int, closure: bool = False) -> Any:
        """One training step, with or without a closure."""
        if closure:
            return optimizer.step(lambda: self.backward(step))
        self.backward(step)
        return optimizer.step()

    def run(
        self,
        optimizer: torch.optim.Optimizer,
        steps: range,
        *,
        closure: bool = False,
        before: Callable[[int], None] = lambda k: None,
        after: Callable[[int], None] = lambda k: None,
    ) -> None:
        for k in steps:
            before(k)
            self.step(optimizer, k, closure)
            after(k)

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Bit for bit, NaN counting as equal to NaN."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        a, b = a.detach(), b.detach()
        same = (a == b) | (a.isnan() & b.isnan())
        assert same.all(), (a, b)


def feed(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """Write the rates into a plain torch optimizer, as a user without this library would."""
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


def assert_equals_torch_fed_our_rates(
    case: Case, dtype: torch.dtype, device: str = "cpu", steps: int = 200
) -> None:
    """A run of ours and one of the plain torch optimizer fed `lr_at(k)`: bit for bit the same."""
    mine, torchs = Problem(case, dtype, device), Problem(case, dtype, device)
    opt = CyclicalOptimizer(case.make(mine.params), "triangular2", step_size_up=9, max_lr=case.lr)
    reference = case.make(torchs.params)
    for k in range(steps):
        feed(reference, opt.lr_at(k))
        mine.step(opt, k, case.closure)
        torchs.step(reference, k, case.closure)
    assert_same(mine.values(), torchs.values())
