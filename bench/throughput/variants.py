"""The steps that are compared."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR

from clr_optim import CyclicalOptimizer
from clr_optim.bench.gpu import Gpu
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.timing import Step
from clr_optim.bench.workloads import Rule

__all__ = ["LR", "ON_GPU", "graphs", "leave_out_failing", "ours", "torch_steps", "wrong_variants"]

LR, _STEP_SIZE = 1e-3, 2000


#: Torch's plain variants; its default is the for-loop on a CPU and foreach on a GPU.
ON_CPU: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}}
ON_GPU: dict[str, dict[str, Any]] = {"default": {}, "forloop": {"foreach": False}}


def ours(
    rule: Rule, params: list[Tensor], lr: float = LR, backend: str = "auto"
) -> CyclicalOptimizer[Any]:
    """What the benchmark is about, cycling between the bounds that torch's are given."""
    inner = rule.optimizer(params, lr=lr, **rule.settings)
    return CyclicalOptimizer(inner, policy="triangular", step_size_up=_STEP_SIZE, backend=backend)


def torch_steps(
    rule: Rule,
    params: list[Tensor],
    compiled: bool = False,
    lr: float = LR,
    plain: Mapping[str, dict[str, Any]] = ON_CPU,
) -> dict[str, Step]:
    """Torch's own ways to take the step, each with its scheduler."""
    flags = dict(plain)
    known = inspect.signature(rule.optimizer).parameters
    if "fused" in known:
        flags["fused"] = {"fused": True}
    if compiled:
        # A rate that is a number would be compiled in anew at each change; and for a tensor torch
        # asks for capturable, where there is such a flag.
        flags["compile"] = {"foreach": True, "lr": torch.tensor(lr, device=params[0].device)}
        if "capturable" in known:
            flags["compile"]["capturable"] = True

    def step(name: str) -> Step:
        optimizer = rule.optimizer(params, **{"lr": lr, **rule.settings, **flags[name]})
        return _scheduled(optimizer, lr, torch.compile if name == "compile" else None)

    return {name: step(name) for name in flags}


def _scheduled(
    optimizer: torch.optim.Optimizer, lr: float, made: Callable[[Step], Step] | None = None
) -> Step:
    """The optimizer's step, or what is made of it, and then its scheduler's."""
    scheduler = CyclicLR(optimizer, lr / 4, lr, step_size_up=_STEP_SIZE, cycle_momentum=False)
    update: Step = optimizer.step if made is None else made(optimizer.step)

    def both() -> None:
        update()
        scheduler.step()

    return both


def graphs(gpu: Gpu, rule: Rule, tensors: Tensors, fused: bool, cell: str) -> dict[str, Step]:
    """The step as a graph: ours, and torch's fused one, or its foreach one where there is no other.

    Torch's only where it can be captured at all, which is said by ``capturable``: its rate is a
    tensor then, which its ``CyclicLR`` fills after each replay. Each has an optimizer of its own.
    """
    captured: dict[str, Step] = {}

    def theirs(flag: str, grads: list[Tensor | None]) -> Step:
        rate = torch.tensor(LR, device=gpu.device)
        flags = {"lr": rate, flag: True, "capturable": True, **rule.settings}
        optimizer = rule.optimizer(tensors.params, **flags)
        return _scheduled(optimizer, LR, lambda step: gpu.capture(step, grads))

    makers: dict[str, Callable[[list[Tensor | None]], Step]] = {
        "ours_graph": lambda grads: gpu.capture(
            ours(rule, tensors.params, backend=gpu.backend).step, grads
        )
    }
    if "capturable" in inspect.signature(rule.optimizer).parameters:
        flag = "fused" if fused else "foreach"
        makers[f"{flag}_graph"] = lambda grads: theirs(flag, grads)
    for name, make in makers.items():
        tensors.move_gradients()
        try:
            captured[name] = make([param.grad for param in tensors.params])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the eager steps are still worth measuring
            print(f"{name} of {cell}: {error}", file=sys.stderr)
    return captured


def leave_out_failing(
    steps: dict[str, Step], names: Iterable[str], tensors: Tensors, cell: str
) -> None:
    """Drop those of torch's that cannot take a first step: there is no kernel, or no compiler."""
    if "compile" in steps:
        torch.compiler.reset()  # what other cells compiled counts against a limit
    for name in names:
        if name not in steps:
            continue
        tensors.move_gradients()
        try:
            steps[name]()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # many kinds; the other variants are still worth measuring
            del steps[name]
            title = "torch.compile" if name == "compile" else f"torch's {name}"
            print(f"{title} of {cell}: {error}", file=sys.stderr)


def wrong_variants(
    rule: Rule,
    dtype: torch.dtype,
    among: Collection[str] = ("foreach", "fused", "ours"),
    gpu: Gpu | None = None,
) -> list[str]:
    """Variants whose first steps end, for most values, elsewhere than those of torch's default.

    What does not do the work has no place among the fastest: torch 2.13's fused SGD leaves most of
    a 16-bit parameter as it was (pytorch/pytorch issue 191763).

    Args:
        rule: with its settings.
        dtype: of parameters and gradients.
        among: the variants that are looked at, as far as the rule has them.
        gpu: where there is one, the steps are taken there.
    """
    start = torch.linspace(-1.0, 1.0, 99, dtype=torch.float64).to(dtype)
    if gpu is not None:
        start = start.to(gpu.device)
    plain, backend = (ON_CPU, "auto") if gpu is None else (ON_GPU, gpu.backend)

    def after_steps(variant: str) -> Tensor:
        param = start.clone().requires_grad_()
        own = ours(rule, [param], lr=0.5, backend=backend)
        steps = torch_steps(rule, [param], lr=0.5, plain=plain)
        steps["ours"] = own.step
        if variant == "ours_graph" and gpu is not None:
            param.grad = start + 0.25
            own.step()
            replay = gpu.capture(own.step, warm_up=0)
            for shift in (0.5, 0.75):
                param.grad.copy_(start + shift)
                replay()
            return param.detach().double()
        for shift in (0.25, 0.5, 0.75):
            param.grad = start + shift
            steps[variant]()
        return param.detach().double()

    expected = after_steps("default")
    tolerance = 16 * torch.finfo(dtype).eps
    wrong = []
    for variant in among:
        known = variant != "fused" or "fused" in inspect.signature(rule.optimizer).parameters
        if known:
            # Most, since where a gradient is next to nothing rounding in 16 bits decides it all.
            off = ~torch.isclose(after_steps(variant), expected, rtol=0.0, atol=tolerance)
            if 2 * int(off.sum()) > off.numel():
                wrong.append(variant)
    return wrong
