"""Measure what clipping, skipping and averages add to a step, beside the memory that they move."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clr_optim import Ema, Spike
from clr_optim.bench.machine import describe_machine
from clr_optim.bench.throughput.cells import Row, bytes_per_element, measure_each
from clr_optim.bench.throughput.options import seconds_per_cell
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.timing import Step, interleave, spread
from clr_optim.bench.throughput.variants import our_optimizer, torch_optimizers, with_scheduler
from clr_optim.bench.workloads import RULES, WORKLOADS

__all__ = ["FEATURES", "measure_features"]

_DECAY = 0.999

#: The arguments of our optimizer with each feature, and the accesses of 4 bytes per value that the
#: feature adds: a norm reads the gradient once more, an average is read and written.
FEATURES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 0),
    "max_grad_norm": ({"max_grad_norm": 1.0}, 1),
    "skip_above": ({"skip_above": math.inf}, 1),
    "spike": ({"skip_above": Spike()}, 1),
    "ema": ({"average": Ema(_DECAY)}, 2),
    "cycle_end": ({"average": "cycle_end"}, 0),
}


def measure_features(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the step of each rule with each feature, on the CPU in float32.

    Returns:
        The results, with a row per workload and rule under ``features``.
    """
    seconds = seconds_per_cell(args)
    rows = measure_each(
        args.features,
        args.rules or ["adam"],
        lambda rule, workload: _measure_cell(rule, workload, seconds, args.seed),
    )
    return {"machine": describe_machine(), "rows": [], "features": rows}


def _measure_cell(rule: str, workload: str, seconds: float, seed: int) -> Row:
    """Return one row: the seconds of each step, and the share of memory that each moves.

    torch's fastest step stands beside: alone, and with an ``AveragedModel`` that follows it.
    """
    kind = RULES[rule]
    tensors = Tensors(WORKLOADS[workload], torch.float32, seed=seed)
    steps: dict[str, Step] = {
        name: our_optimizer(kind, tensors.params, **options).step
        for name, (options, _) in FEATURES.items()
    }
    for name in ("torch", "torch_ema"):
        of_torch = torch_optimizers(kind, tensors.params)
        update = with_scheduler(of_torch.get("fused", of_torch["foreach"]))
        steps[name] = _averaging(update, tensors) if name == "torch_ema" else update
    times = interleave(steps, tensors.move_gradients, seconds, seed)
    moved = bytes_per_element(kind, torch.float32)
    return {
        "rule": rule,
        "workload": workload,
        "tensors": len(tensors.params),
        "rounds": len(times["plain"]),
        "times": {name: spread(each) for name, each in times.items()},
        "moved": {name: 1.0 + 4 * more / moved for name, (_, more) in FEATURES.items()},
    }


def _averaging(step: Step, tensors: Tensors) -> Step:
    """Return a function that takes a step and then updates torch's exponential average."""
    model = torch.nn.Module()
    model.params = torch.nn.ParameterList(tensors.params)
    rule: Any = get_ema_multi_avg_fn(_DECAY)  # type: ignore[no-untyped-call]
    averaged = AveragedModel(model, multi_avg_fn=rule)

    def both() -> None:
        step()
        averaged.update_parameters(model)

    return both
