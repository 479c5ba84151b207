"""The variants of a step: torch's own ways to take it, and ours."""

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
from clr_optim.bench.throughput.timing import Step
from clr_optim.bench.workloads import Rule

__all__ = [
    "LR",
    "ON_CPU",
    "ON_GPU",
    "drop_failing_steps",
    "our_optimizer",
    "torch_optimizers",
    "torch_steps",
    "with_scheduler",
    "wrong_variants",
]

LR, _STEP_SIZE = 1e-3, 2000

#: torch's plain variants. The default is the for-loop on a CPU, and foreach on a GPU.
ON_CPU: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}}
ON_GPU: dict[str, dict[str, Any]] = {"default": {}, "forloop": {"foreach": False}}


def our_optimizer(
    rule: Rule, params: list[Tensor], lr: float | Tensor = LR, backend: str = "auto", **more: Any
) -> CyclicalOptimizer[Any]:
    """Make the optimizer that the benchmark is about, with the same bounds as torch's variants."""
    inner = rule.optimizer(params, lr=lr, **rule.settings)
    return CyclicalOptimizer(
        inner, policy="triangular", step_size_up=_STEP_SIZE, backend=backend, **more
    )


def torch_optimizers(
    rule: Rule,
    params: list[Tensor],
    compiled: bool = False,
    lr: float = LR,
    plain: Mapping[str, dict[str, Any]] = ON_CPU,
) -> dict[str, torch.optim.Optimizer]:
    """Make an optimizer for each of torch's variants of a step."""
    flags = dict(plain)
    known = inspect.signature(rule.optimizer).parameters
    if "fused" in known:
        flags["fused"] = {"fused": True}
    if compiled:
        # torch.compile would compile a rate that is a number anew at each change. If the rate is a
        # tensor, torch asks for `capturable`.
        flags["compile"] = {"foreach": True, "lr": torch.tensor(lr, device=params[0].device)}
        if "capturable" in known:
            flags["compile"]["capturable"] = True

    return {
        name: rule.optimizer(params, **{"lr": lr, **rule.settings, **flags[name]}) for name in flags
    }


def torch_steps(
    rule: Rule,
    params: list[Tensor],
    compiled: bool = False,
    lr: float = LR,
    plain: Mapping[str, dict[str, Any]] = ON_CPU,
) -> dict[str, Step]:
    """Make torch's variants of a step, each with its own optimizer and scheduler."""
    return {
        name: with_scheduler(optimizer, lr, torch.compile if name == "compile" else None)
        for name, optimizer in torch_optimizers(rule, params, compiled, lr, plain).items()
    }


def with_scheduler(
    optimizer: torch.optim.Optimizer, lr: float = LR, convert: Callable[[Step], Step] | None = None
) -> Step:
    """Return a function that takes the optimizer's step and then its ``CyclicLR``'s.

    Args:
        optimizer: one of torch's.
        lr: the upper bound of the cycle.
        convert: compiles or captures the optimizer's step; ``None`` leaves the step alone.
    """
    scheduler = CyclicLR(optimizer, lr / 4, lr, step_size_up=_STEP_SIZE, cycle_momentum=False)
    update: Step = optimizer.step if convert is None else convert(optimizer.step)

    def both() -> None:
        update()
        scheduler.step()

    return both


def drop_failing_steps(
    steps: dict[str, Step], names: Iterable[str], prepare: Step, cell: str
) -> None:
    """Remove the named variants whose first step fails: no kernel, or no extension."""
    if "compile" in steps:
        torch.compiler.reset()  # torch limits how much one process compiles
    for name in names:
        if name not in steps:
            continue
        prepare()
        try:
            steps[name]()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: the other variants are measured anyway
            del steps[name]
            title = "torch.compile" if name == "compile" else f"torch's {name}"
            print(f"{title} of {cell}: {error}", file=sys.stderr)


def wrong_variants(
    rule: Rule,
    dtype: torch.dtype,
    among: Collection[str] = ("foreach", "fused", "ours"),
    gpu: Gpu | None = None,
) -> list[str]:
    """Find variants whose first three steps give other parameters than torch's default.

    A variant that computes wrong values must not count as the fastest. torch 2.13's fused SGD, for
    one, leaves most of a 16-bit parameter unchanged (pytorch/pytorch issue 191763). A variant is
    wrong if most values differ: where a gradient is almost 0, rounding in 16 bits decides alone.

    Args:
        rule: the optimizer and its settings.
        dtype: of parameters and gradients.
        among: the variants to check. A variant that the rule lacks is left out.
        gpu: the device for the steps; ``None`` is the CPU.
    """
    start = torch.linspace(-1.0, 1.0, 99, dtype=torch.float64).to(dtype)
    if gpu is not None:
        start = start.to(gpu.device)
    plain, backend = (ON_CPU, "auto") if gpu is None else (ON_GPU, gpu.backend)

    def after_steps(variant: str) -> Tensor:
        param = start.clone().requires_grad_()
        own = our_optimizer(rule, [param], lr=0.5, backend=backend)
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
            off = ~torch.isclose(after_steps(variant), expected, rtol=0.0, atol=tolerance)
            if 2 * int(off.sum()) > off.numel():
                wrong.append(variant)
    return wrong
