"""Measure whole iterations: forward, backward and step, for each variant of the step."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clr_optim.bench.models import make_training
from clr_optim.bench.throughput.timing import Step, orders
from clr_optim.bench.throughput.variants import (
    ON_CPU,
    ON_GPU,
    drop_failing_steps,
    our_optimizer,
    torch_steps,
)
from clr_optim.bench.workloads import RULES

__all__ = ["measure_iterations", "measure_workload_iterations"]

# A round of a large model takes seconds, and each round measures the passes once per variant.
_LEAST_ROUNDS = 3


def measure_workload_iterations(
    workload: str, rule: str, seconds: float, *, device: torch.device | str, seed: int
) -> dict[str, Any]:
    """Measure whole iterations of a workload's model, see :func:`measure_iterations`."""
    training = make_training(workload, device, seed)
    measured = measure_iterations(
        training.model, lambda: None, lambda _: training.loss(), rule, seconds
    )
    return {"workload": workload, "batch": training.batch, **measured}


def measure_iterations(
    model: nn.Module,
    fetch: Callable[[], Any],
    loss: Callable[[Any], Tensor],
    rule: str,
    seconds: float,
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure whole iterations. All variants share the model and take turns.

    Forward and backward do not depend on the variant: their time is the median over all rounds. On
    a GPU the host waits for the device after the backward pass and after the step. The time to
    fetch a batch does not count.

    Args:
        model: the model, in train mode.
        fetch: returns the next batch.
        loss: runs the model on a batch and returns the loss.
        rule: the update rule.
        seconds: how long to measure; at least 3 rounds.
        compiled: measure torch.compile too.

    Returns:
        Seconds: ``forward_backward_s``, and ``step_s`` by variant.
    """
    params: list[Tensor] = [param for param in model.parameters() if param.requires_grad]
    on_gpu = params[0].device.type != "cpu"
    kind = RULES[rule]
    steps: dict[str, Step] = {
        **torch_steps(kind, params, compiled, plain=ON_GPU if on_gpu else ON_CPU),
        "ours": our_optimizer(kind, params).step,
    }
    wait: Step = torch.cuda.synchronize if on_gpu else (lambda: None)

    def backward(batch: Any) -> None:
        for param in params:
            param.grad = None
        loss(batch).backward()  # type: ignore[no-untyped-call]

    model.train()
    drop_failing_steps(steps, ["fused", "compile"], lambda: backward(fetch()), rule)
    for name in steps:  # the first step creates state
        backward(fetch())
        steps[name]()
    before: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for order in orders(list(steps), seconds, least=_LEAST_ROUNDS):
        for name in order:
            batch = fetch()
            wait()
            begin = perf_counter()
            backward(batch)
            wait()
            middle = perf_counter()
            steps[name]()
            wait()
            taken[name].append(perf_counter() - middle)
            before.append(middle - begin)
    return {
        "rule": rule,
        "rounds": len(taken["ours"]),
        "forward_backward_s": float(np.median(before)),
        "step_s": {name: float(np.median(values)) for name, values in taken.items()},
    }
