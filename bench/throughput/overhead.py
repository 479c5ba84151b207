"""Measure the cost of a step beside its arithmetic: per call, per tensor, per optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clr_optim import CyclicalOptimizer
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.timing import Step, interleave
from clr_optim.bench.throughput.variants import LR, our_optimizer
from clr_optim.bench.workloads import RULES

__all__ = ["Noop", "measure_calls", "measure_in_backward", "measure_overhead"]

#: Steps in a row, so that all but the first find code and objects in the caches.
_IN_A_ROW = 1000


class Noop(torch.optim.Optimizer):
    """An optimizer whose step does nothing: the least time of a step that torch wraps."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": LR})

    def step(self, closure: Any = None) -> Any:
        """Do nothing. The call still costs torch's profiling wrapper and hooks."""


def measure_overhead(seconds: float, *, backward: bool = False) -> dict[str, float]:
    """Measure Adam's step of one tensor, each further tensor, and a step that does nothing.

    Returns:
        Seconds as ``one_tensor_s``, ``per_tensor_s`` and ``noop_s``.
    """
    median: dict[str, float] = {}
    for count, size in ((1, 1), (100, 16), (1000, 16)):
        # In turns, the step of a thousand tensors would empty the caches before the step of one.
        tensors = Tensors([(size,)] * count, torch.float32, backward=backward)
        steps: dict[str, Step] = {str(count): our_optimizer(RULES["adam"], tensors.params).step}
        if count == 1:
            steps["noop"] = Noop(tensors.params).step
        for name, times in interleave(steps, tensors.move_gradients, seconds).items():
            median[name] = float(np.median(times))
    return {
        "noop_s": median["noop"],
        "one_tensor_s": median["1"],
        "per_tensor_s": (median["1000"] - median["100"]) / 900,
    }


def measure_calls(seconds: float) -> dict[str, float]:
    """Measure SGD's step of one tensor of one value, many in a row, with various settings.

    Returns:
        Seconds: ``plain_s``, three settings beside it, and ``noop_s`` for a step that does nothing.
    """
    tensors = Tensors([(1,)], torch.float32)
    rule, params = RULES["sgd_momentum"], tensors.params
    optimizers: dict[str, torch.optim.Optimizer] = {
        "noop": Noop(params),
        "plain": our_optimizer(rule, params),
        "cycled_momentum": our_optimizer(rule, params, cycle_momentum=True),
        "clipping": our_optimizer(rule, params, max_grad_norm=1.0),
        "tensor_rate": our_optimizer(rule, params, lr=torch.tensor(LR)),
    }
    steps = {name: _each_step([each] * _IN_A_ROW) for name, each in optimizers.items()}
    times = interleave(steps, tensors.move_gradients, seconds)
    return {f"{name}_s": float(np.median(times[name])) / _IN_A_ROW for name in steps}


def _each_step(optimizers: Iterable[torch.optim.Optimizer]) -> Step:
    """Return a function that takes a step of each optimizer, in order."""

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def measure_in_backward(seconds: float, count: int = 1000) -> dict[str, float]:
    """Measure many optimizers of one small parameter each, as used to step while backward runs.

    Args:
        seconds: for the later steps.
        count: how many optimizers.

    Returns:
        Seconds per optimizer: ``wrap_s`` to wrap an Adam, ``first_s`` for its first step,
        ``step_s`` for a later step, ``noop_s`` for a step that does nothing.
    """
    tensors = Tensors([(16,)] * count, torch.float32, backward=False)
    tensors.move_gradients()
    inner = [torch.optim.Adam([p], lr=LR) for p in tensors.params]
    start = perf_counter()
    wrapped = [CyclicalOptimizer(optimizer) for optimizer in inner]
    built = perf_counter()
    for optimizer in wrapped:
        optimizer.step()
    first = perf_counter()
    idle = [Noop([p]) for p in tensors.params]
    steps = {"ours": _each_step(wrapped), "noop": _each_step(idle)}
    times = interleave(steps, tensors.move_gradients, seconds)
    return {
        "wrap_s": (built - start) / count,
        "first_s": (first - built) / count,
        "step_s": float(np.median(times["ours"])) / count,
        "noop_s": float(np.median(times["noop"])) / count,
    }
