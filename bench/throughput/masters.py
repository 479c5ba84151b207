"""Measure a step with float32 masters, beside bfloat16 alone and a separate float32 master."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from clr_optim.bench.machine import describe_machine
from clr_optim.bench.throughput.cells import Row, bytes_per_element, measure_each
from clr_optim.bench.throughput.options import seconds_per_cell
from clr_optim.bench.throughput.tensors import Tensors
from clr_optim.bench.throughput.timing import Step, interleave, spread
from clr_optim.bench.throughput.variants import our_optimizer, torch_optimizers, with_scheduler
from clr_optim.bench.workloads import RULES, WORKLOADS, Rule

__all__ = ["bytes_of_variants", "measure_masters"]


def measure_masters(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the step of each rule with and without masters, on the CPU in bfloat16.

    Returns:
        The results, with a row per workload and rule under ``masters``.
    """
    seconds = seconds_per_cell(args)
    rows = measure_each(
        args.masters,
        args.rules or ["adamw"],
        lambda rule, workload: _measure_cell(rule, workload, seconds, args.seed),
    )
    return {"machine": describe_machine(), "rows": [], "masters": rows}


def bytes_of_variants(rule: Rule) -> dict[str, dict[str, int]]:
    """Return the bytes per parameter that a step of each variant moves, and that training keeps.

    Training keeps parameter, gradient, state and master. The separate master needs gradients in
    float32, too.
    """
    slots = (bytes_per_element(rule, torch.float32) // 4 - 3) // 2
    return {
        "bfloat16": {"moved": 2 * (3 + 2 * slots), "kept": 2 * (2 + slots)},
        "separate": {"moved": 2 * 6 + 4 * (3 + 2 * slots), "kept": 2 * 2 + 4 * (2 + slots)},
        "masters": {"moved": 2 * 5 + 4 * 2 * slots, "kept": 2 * 3 + 4 * slots},
    }


def _measure_cell(rule: str, workload: str, seconds: float, seed: int) -> Row:
    """Return one row: the seconds of each variant's step, and its bytes per parameter."""
    kind = RULES[rule]
    tensors = Tensors(WORKLOADS[workload], torch.bfloat16, seed=seed)
    steps: dict[str, Step] = {
        "bfloat16": our_optimizer(kind, tensors.params).step,
        "separate": _separate_master(kind, tensors.params),
        "masters": our_optimizer(kind, tensors.params, master_weights=True).step,
    }
    times = interleave(steps, tensors.move_gradients, seconds, seed)
    return {
        "rule": rule,
        "workload": workload,
        "tensors": len(tensors.params),
        "rounds": len(times["masters"]),
        "times": {name: spread(each) for name, each in times.items()},
        "bytes": bytes_of_variants(kind),
    }


def _separate_master(rule: Rule, params: list[Tensor]) -> Step:
    """Return a function that takes torch's fastest step on float32 copies, and copies them back."""
    masters = [param.detach().float().requires_grad_() for param in params]
    grads = [torch.empty_like(master, requires_grad=False) for master in masters]
    for master, grad in zip(masters, grads, strict=True):
        master.grad = grad
    of_torch = torch_optimizers(rule, masters)
    update = with_scheduler(of_torch.get("fused", of_torch["foreach"]))

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_(grads, [param.grad for param in params if param.grad is not None])
        update()
        torch._foreach_copy_(params, masters)

    return step
