"""Measure whole iterations whose updates come in the backward pass, beside ordinary ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from clr_optim.bench.machine import describe_machine
from clr_optim.bench.models import make_training
from clr_optim.bench.throughput.options import seconds_per_cell
from clr_optim.bench.throughput.processes import measure_iteration_memory
from clr_optim.bench.throughput.timing import Step, orders, spread
from clr_optim.bench.throughput.variants import LR, our_optimizer
from clr_optim.bench.workloads import IN_BACKWARD, RULES

__all__ = ["make_variants", "measure_step_in_backward"]

# Models of equal linear layers, by their width.
_WIDTHS = {"linear": 1024, "linear_100m": 2048}
_LAYERS, _BATCH = 24, 64
_LEAST_ROUNDS = 5

#: Begins to train by a variant, and yields the function that runs an iteration.
Variant = Callable[[], AbstractContextManager[Step]]


def measure_step_in_backward(args: argparse.Namespace) -> dict[str, Any]:
    """Measure time and memory of each chosen model's iterations by AdamW.

    Returns:
        The results, with a row per model under ``step_in_backward``.
    """
    seconds = seconds_per_cell(args, usual=60.0)
    return {
        "machine": describe_machine(),
        "rows": [],
        "step_in_backward": [
            _measure_model(name, seconds, args.seed) for name in args.step_in_backward
        ],
    }


def _measure_model(name: str, seconds: float, seed: int) -> dict[str, Any]:
    counted, uncounted = IN_BACKWARD[name]
    params, variants = make_variants(name, seed)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for order in orders(list(variants), seconds, seed, _LEAST_ROUNDS):
        for variant in order:
            with variants[variant]() as iterate:
                for number in range(uncounted + counted):
                    begin = perf_counter()
                    iterate()
                    if number >= uncounted:
                        times[variant].append(perf_counter() - begin)
    return {
        "model": name,
        "values": sum(param.numel() for param in params),
        "gradient_bytes": sum(param.numel() * param.element_size() for param in params),
        "times": {variant: spread(taken) for variant, taken in times.items()},
        "memory": {variant: measure_iteration_memory(name, variant, seed) for variant in variants},
    }


def make_variants(name: str, seed: int = 0) -> tuple[list[nn.Parameter], dict[str, Variant]]:
    """Make a model's parameters, and the variants, which share the model and take turns."""
    model, loss = _make_model(name, seed)
    params = list(model.parameters())
    kind = RULES["adamw"]
    settings = {"lr": LR, **kind.settings, "fused": True}
    own = our_optimizer(kind, list(params))
    fused = kind.optimizer(params, **settings)
    small = {param: kind.optimizer([param], **settings) for param in params}
    return params, {
        "torch": partial(_ordinary, fused, loss),
        "torch_in_backward": partial(_recipe, small, loss),
        "ours": partial(_ordinary, own, loss),
        "ours_in_backward": partial(_in_backward, own, loss),
    }


def _make_model(name: str, seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    if name not in _WIDTHS:
        training = make_training(name, "cpu", seed)
        return training.model, training.loss
    torch.manual_seed(seed)
    width = _WIDTHS[name]
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(_LAYERS)))
    x = torch.randn(_BATCH, width)
    return model, lambda: model(x).square().mean()


@contextmanager
def _ordinary(optimizer: Any, loss: Callable[[], Tensor]) -> Iterator[Step]:
    def iterate() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    yield iterate
    optimizer.zero_grad()


@contextmanager
def _in_backward(optimizer: Any, loss: Callable[[], Tensor]) -> Iterator[Step]:
    def iterate() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    with optimizer.step_in_backward():
        yield iterate


@contextmanager
def _recipe(optimizers: dict[nn.Parameter, Any], loss: Callable[[], Tensor]) -> Iterator[Step]:
    """Train by the recipe of torch's tutorial: an optimizer for each parameter, in a hook."""

    def update(param: Any) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    def iterate() -> None:
        loss().backward()  # type: ignore[no-untyped-call]

    add: Any = torch.Tensor.register_post_accumulate_grad_hook
    handles = [add(param, update) for param in optimizers]
    try:
        yield iterate
    finally:
        for handle in handles:
            handle.remove()
