"""Steps that are captured into CUDA graphs: ours, and torch's if torch can capture it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from clr_optim.bench.gpu import Gpu
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.timing import Step
from clr_optim.bench.throughput.variants import LR, our_optimizer, with_scheduler
from clr_optim.bench.workloads import Rule

__all__ = ["captured_steps"]


def captured_steps(
    gpu: Gpu, rule: Rule, tensors: Tensors, fused: bool, cell: str
) -> dict[str, Step]:
    """Capture our step, and torch's fused one, or its foreach one if the rule has no fused one.

    torch captures a step only if the rule has the flag ``capturable``. Its rate is a tensor then,
    and its ``CyclicLR`` fills the tensor after each replay. Each graph has its own optimizer.

    Args:
        gpu: the device.
        rule: the optimizer and its settings.
        tensors: the parameters and gradients.
        fused: whether torch has a fused step for the rule.
        cell: the cell's name, for messages on stderr about a step that cannot be captured.
    """
    captured: dict[str, Step] = {}

    def torch_graph(flag: str, grads: list[Tensor | None]) -> Step:
        rate = torch.tensor(LR, device=gpu.device)
        flags = {"lr": rate, flag: True, "capturable": True, **rule.settings}
        optimizer = rule.optimizer(tensors.params, **flags)
        return with_scheduler(optimizer, LR, lambda step: gpu.capture(step, grads))

    makers: dict[str, Callable[[list[Tensor | None]], Step]] = {
        "ours_graph": lambda grads: gpu.capture(
            our_optimizer(rule, tensors.params, backend=gpu.backend).step, grads
        )
    }
    if "capturable" in inspect.signature(rule.optimizer).parameters:
        flag = "fused" if fused else "foreach"
        makers[f"{flag}_graph"] = lambda grads: torch_graph(flag, grads)
    for name, make in makers.items():
        tensors.move_gradients()
        try:
            captured[name] = make([param.grad for param in tensors.params])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: the other variants are measured anyway
            print(f"{name} of {cell}: {error}", file=sys.stderr)
    return captured
