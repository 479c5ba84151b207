"""Measure iterations per second: ours, and torch's with its CyclicLR."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch.nn import functional
from torch.optim.lr_scheduler import CyclicLR

from clr_optim.bench.cifar10 import RATE_RATIOS, Batches, cifar10_full, parameter_groups
from clr_optim.bench.paper.data import Data
from clr_optim.bench.paper.one_run import WARM_UP, Run
from clr_optim.bench.paper.optimizers import MOMENTUM
from clr_optim.bench.paper.rows import BOUNDS, ROWS, Scale

__all__ = ["measure_speed"]

_ROUNDS = 10


def measure_speed(
    data: Data, device: torch.device | str = "cpu", iterations: int = 200
) -> dict[str, Any]:
    """Measure iterations per second of each variant, in turns.

    The variants are our optimizer, on a GPU also as one graph, and torch's SGD with ``CyclicLR``.

    Args:
        data: to train on.
        device: of model and images.
        iterations: of each variant, in ten turns.

    Returns:
        The median over turns by variant under ``"iterations_per_s"``, the device and the threads.
    """
    ours = _speed_run(data, device)
    variants: dict[str, Callable[[], None]] = {"clr_optim": ours.iterate}
    if ours.on_kernels:
        graph = _speed_run(data, device)
        graph.capture()
        variants["clr_optim, one graph"] = graph.iterate
    for name, fused in (("torch.optim.SGD + CyclicLR", None), ("the same, fused", True)):
        variants[name] = _torch_iteration(data, device, fused)
    turn = max(1, iterations // _ROUNDS)
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for iterate in variants.values():
        for _ in range(WARM_UP):
            iterate()
    for _ in range(_ROUNDS):
        for name, iterate in variants.items():
            ours.synchronize()
            begin = perf_counter()
            for _ in range(turn):
                iterate()
            ours.synchronize()
            rates[name].append(turn / (perf_counter() - begin))
    medians = {name: round(statistics.median(each), 2) for name, each in rates.items()}
    return {"device": str(device), "threads": torch.get_num_threads(), "iterations_per_s": medians}


def _speed_run(data: Data, device: torch.device | str) -> Run:
    return Run(ROWS["window-triangle"], 0, Scale(), data, device=device)


def _torch_iteration(
    data: Data, device: torch.device | str, fused: bool | None
) -> Callable[[], None]:
    """Make the iteration that a user of torch alone would write."""
    model = cifar10_full(0).to(device)
    base_lr, max_lr = BOUNDS
    optimizer = torch.optim.SGD(parameter_groups(model, max_lr), momentum=MOMENTUM, fused=fused)
    scheduler = CyclicLR(
        optimizer,
        base_lr=[base_lr * ratio for ratio in RATE_RATIOS],
        max_lr=[max_lr * ratio for ratio in RATE_RATIOS],
        step_size_up=2_000,
        cycle_momentum=False,
    )
    batches = Batches(data.training, data.mean, batch_size=data.batch_size, device=device)

    def iterate() -> None:
        inputs, labels = batches.sample()
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()

    return iterate
