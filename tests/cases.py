"""The one table of optimizer cases, and a problem that each of them can train on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clr_optim import CyclicalOptimizer, register_rule


class SignDescent(torch.optim.Optimizer):
    """An optimizer that no library has: it steps by the sign of a running mean of gradients."""

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


class Lion(torch.optim.Optimizer):
    """The optimizer of lion-pytorch, in its order of operations. It ignores torch's flags."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **flags):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                mean = state["exp_avg"]
                p.mul_(1.0 - lr * group["weight_decay"])
                p.add_(mean.clone().mul_(beta1).add(p.grad, alpha=1.0 - beta1).sgn_(), alpha=-lr)
                mean.mul_(beta2).add_(p.grad, alpha=1.0 - beta2)
        return loss


register_rule(Lion, "lion")


@dataclass(frozen=True)
class Case:
    """An optimizer class with settings, and settings of its wrapper.

    Args:
        name: the row's name, and the test's.
        cls: the class.
        options: settings of the optimizer.
        lr: its learning rate.
        wrap: settings of the wrapper.
        kernel: the kernel that must serve this row; None if only torch's own step can.
        sparse: whether it takes sparse gradients only.
        closure: whether it needs a closure.
        only_2d: whether it takes matrices only.
        dtypes: the dtypes that it can train.
    """

    name: str
    cls: type[torch.optim.Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: Any = 0.01
    wrap: Mapping[str, Any] = field(default_factory=dict)
    kernel: str | None = None
    sparse: bool = False
    closure: bool = False
    only_2d: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)

    def make(self, params: Any, **more: Any) -> torch.optim.Optimizer:
        """Return the plain optimizer of these parameters or groups."""
        return self.cls(params, **{"lr": self.lr, **self.options, **more})

    def ours(self, params: Any, **more: Any) -> CyclicalOptimizer[Any]:
        """Return the wrapped optimizer of these parameters or groups."""
        return wrapped(self.make(params), **{**self.wrap, **more})

    def as_for_loop(self) -> Case:
        """Return the same case on torch's for-loop, whose order of operations kernels follow."""
        return replace(self, options={"foreach": False, **self.options})


def wrapped(optimizer: torch.optim.Optimizer, **options: Any) -> CyclicalOptimizer[Any]:
    return CyclicalOptimizer(optimizer, **{"backend": "auto", "step_size_up": 7, **options})


def rates_in_groups(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def step_in_backward(optimizers: Mapping[torch.nn.Parameter, torch.optim.Optimizer]) -> None:
    """Let each optimizer step and free its parameter's gradient when the gradient is complete."""

    def update(param: torch.nn.Parameter) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in optimizers:
        param.register_post_accumulate_grad_hook(update)


# ---- the one table of optimizers


_optim = torch.optim
#: A setting that rows are crossed with: its label, the options, and what it adds to the kernel.
Flag = tuple[str, dict[str, Any], str]


def _crossed(
    name: str,
    cls: type[torch.optim.Optimizer],
    kernel: str,
    *flags: Flag,
    lr: float = 0.01,
    **always: Any,
) -> Iterator[Case]:
    """Return a case for each subset of the flags."""
    for chosen in itertools.product(*[[None, flag] for flag in flags]):
        there = [flag for flag in chosen if flag]
        yield Case(
            "-".join([name, *(label for label, _, _ in there)]),
            cls,
            {**always, **{key: value for _, options, _ in there for key, value in options.items()}},
            lr,
            kernel=kernel + "".join(part for _, _, part in there),
        )


def _with_kernels() -> Iterator[Case]:
    decay, maximize = ("wd", {"weight_decay": 0.1}, ""), ("max", {"maximize": True}, "")
    no_decay = ("wd0", {"weight_decay": 0.0}, "")
    amsgrad = ("ams", {"amsgrad": True}, "_amsgrad")
    yield from _crossed("sgd", _optim.SGD, "sgd", decay, maximize)
    for name, options in (
        ("sgd-mom", {}),
        ("sgd-damp", {"dampening": 0.3}),
        ("sgd-nest", {"nesterov": True}),
    ):
        yield from _crossed(
            name, _optim.SGD, "sgd_momentum", decay, maximize, momentum=0.9, **options
        )
    yield from _crossed("adam", _optim.Adam, "adam", amsgrad, decay, maximize)
    yield from _crossed("adamw", _optim.AdamW, "adam", amsgrad, no_decay, maximize)
    yield from _crossed(
        "adagrad", _optim.Adagrad, "adagrad", ("decay", {"lr_decay": 0.01}, ""),
        ("init", {"initial_accumulator_value": 0.5}, ""), decay, maximize,
    )  # fmt: skip
    yield from _crossed("adadelta", _optim.Adadelta, "adadelta", decay, maximize, lr=0.5)
    yield from _crossed(
        "rmsprop", _optim.RMSprop, "rmsprop", ("mom", {"momentum": 0.9}, "_momentum"),
        ("cent", {"centered": True}, "_centered"), decay, maximize, lr=0.005,
    )  # fmt: skip
    cycled = {"cycle_momentum": True, "base_momentum": 0.4, "max_momentum": 0.95}
    for name, cls, options, kernel, lr, wrap in (
        ("sgd-momentum", _optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}, "sgd_momentum",
         0.01, {}),
        ("sgd-dampening-maximize", _optim.SGD,
         {"momentum": 0.8, "dampening": 0.1, "maximize": True}, "sgd_momentum", 0.01, {}),
        ("adam-decoupled", _optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1},
         "adam", 0.01, {}),
        ("adam-betas-eps", _optim.Adam, {"betas": (0.4, 0.9), "eps": 1e-3}, "adam", 0.01, {}),
        ("adagrad-decay-start", _optim.Adagrad,
         {"lr_decay": 0.01, "initial_accumulator_value": 0.1}, "adagrad", 0.01, {}),
        ("adadelta-rho-eps", _optim.Adadelta, {"rho": 0.7, "eps": 1e-3}, "adadelta", 0.5, {}),
        ("rmsprop-alpha-eps", _optim.RMSprop, {"alpha": 0.3, "eps": 1e-3}, "rmsprop", 0.005, {}),
        ("sgd-mom-cycled", _optim.SGD, {"momentum": 0.9}, "sgd_momentum", 0.005, cycled),
        ("sgd-nest-cycled", _optim.SGD, {"momentum": 0.9, "nesterov": True}, "sgd_momentum",
         0.005, cycled),
        ("adam-cycled", _optim.Adam, {}, "adam", 0.005, cycled),
        ("adamw-ams-cycled", _optim.AdamW, {"amsgrad": True}, "adam_amsgrad", 0.005, cycled),
        ("rmsprop-mom-cycled", _optim.RMSprop, {"momentum": 0.9}, "rmsprop_momentum", 0.005,
         cycled),
        ("adamax", _optim.Adamax, {}, "adamax", 0.01, {}),
        ("adamax-wd-max", _optim.Adamax,
         {"weight_decay": 0.1, "maximize": True, "betas": (0.4, 0.9), "eps": 1e-3}, "adamax",
         0.01, {}),
        ("adamax-cycled", _optim.Adamax, {}, "adamax", 0.005, cycled),
        ("radam", _optim.RAdam, {}, "radam", 0.01, {}),
        ("radam-wd-max", _optim.RAdam,
         {"weight_decay": 0.1, "maximize": True, "betas": (0.4, 0.9), "eps": 1e-3}, "radam",
         0.01, {}),
        ("radam-decoupled-cycled", _optim.RAdam,
         {"weight_decay": 0.1, "decoupled_weight_decay": True}, "radam", 0.005, cycled),
        ("nadam", _optim.NAdam, {}, "nadam", 0.01, {}),
        ("nadam-wd-max", _optim.NAdam,
         {"weight_decay": 0.1, "maximize": True, "betas": (0.4, 0.9), "eps": 1e-3,
          "momentum_decay": 0.1}, "nadam", 0.01, {}),
        ("nadam-decoupled-cycled", _optim.NAdam,
         {"weight_decay": 0.1, "decoupled_weight_decay": True}, "nadam", 0.005, cycled),
        # With these betas a mean of 16-bit values is exact in float32. If the mean were rounded,
        # its sign could differ from the reference's.
        ("lion", Lion, {"betas": (0.75, 0.5)}, "lion", 0.01, {}),
        ("lion-wd-cycled", Lion, {"weight_decay": 0.1, "betas": (0.8, 0.7)}, "lion", 0.005,
         cycled),
    ):  # fmt: skip
        yield Case(name, cls, options, lr, wrap, kernel)


#: Rows that a kernel serves, with torch's for-loop as the reference.
WITH_KERNEL = list(_with_kernels())
#: Rows that a kernel serves, built with another implementation of torch.
OTHER_IMPLEMENTATIONS = [
    Case("sgd-fused", _optim.SGD, {"momentum": 0.9, "fused": True}, kernel="sgd_momentum"),
    Case(
        "adam-amsgrad-foreach",
        _optim.Adam,
        {"amsgrad": True, "weight_decay": 0.1, "foreach": True},
        kernel="adam_amsgrad",
    ),
    Case("adam-fused", _optim.Adam, {"fused": True}, kernel="adam"),
    Case("adamw-fused-maximize", _optim.AdamW, {"fused": True, "maximize": True}, kernel="adam"),
    Case("adagrad-fused", _optim.Adagrad, {"fused": True}, kernel="adagrad"),
]
#: Rows that only torch's own step serves.
WITHOUT_KERNEL = [
    Case("asgd", _optim.ASGD),
    Case("rprop", _optim.Rprop),
    Case("adafactor", _optim.Adafactor),
    Case("muon", _optim.Muon, {"ns_steps": 2}, only_2d=True, dtypes=(torch.float32,)),
    Case("lbfgs", _optim.LBFGS, {"max_iter": 4, "history_size": 3}, lr=0.1, closure=True),
    Case("sparse-adam", _optim.SparseAdam, sparse=True),
    Case("sign-descent", SignDescent),
]
BY_NAME = {case.name: case for case in [*WITH_KERNEL, *OTHER_IMPLEMENTATIONS, *WITHOUT_KERNEL]}

_COMMON = ("sgd", "sgd-momentum", "sgd-nest", "sgd-dampening-maximize", "adam", "adamw",
           "adagrad-decay-start", "adadelta", "rmsprop", "rmsprop-mom-cent")  # fmt: skip
_of_classes = [BY_NAME[name] for name in _COMMON]
for _case in WITH_KERNEL:
    if _case.cls not in {other.cls for other in _of_classes}:
        _of_classes.append(_case)
#: Each class and each implementation of torch, for tests that concern all of them: the named rows,
#: or else the first row of the class.
EVERY_CLASS = _of_classes + OTHER_IMPLEMENTATIONS + WITHOUT_KERNEL

_OF_KERNELS = ("sgd-wd", "sgd-nest-wd", "adam-wd", "adamw-ams", "adagrad-decay", "adadelta",
               "rmsprop", "rmsprop-mom", "rmsprop-cent", "rmsprop-mom-cent")  # fmt: skip
_of_kernels = {BY_NAME[name].kernel: BY_NAME[name] for name in _OF_KERNELS}
for _case in WITH_KERNEL:
    _of_kernels.setdefault(_case.kernel, _case)
#: One row for each kernel: the named one, or else the kernel's first.
EVERY_KERNEL = list(_of_kernels.values())


class Problem:
    """Parameters that are pulled towards targets, with noise that depends on the step alone.

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
        """Take one training step, with or without a closure."""
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


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    """Assert equality bit for bit. NaN equals NaN."""
    for a, b in zip(ours, expected, strict=True):
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
    """Compare our run bit for bit with the plain torch optimizer, fed ``lr_at(k)``."""
    mine, torchs = Problem(case, dtype, device), Problem(case, dtype, device)
    opt = CyclicalOptimizer(case.make(mine.params), "triangular2", step_size_up=9, max_lr=case.lr)
    reference = case.make(torchs.params)
    for k in range(steps):
        feed(reference, opt.lr_at(k))
        mine.step(opt, k, case.closure)
        torchs.step(reference, k, case.closure)
    assert_same(mine.values(), torchs.values())
