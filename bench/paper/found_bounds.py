"""Find the bounds of a run by a range test."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from torch import nn
from torch.nn import functional
from torch.optim import Optimizer

from clr_optim.bench.cifar10 import Batches
from clr_optim.range_test import lr_range_test

__all__ = ["find_bounds"]

# 60 steps per power of ten: the fewest that the range test's documentation advises.
_START, _END, _STEPS = 1e-5, 1.0, 300


def find_bounds(model: nn.Module, optimizer: Optimizer, batches: Batches) -> dict[str, Any]:
    """Run a range test on a run before its training; the test puts model and optimizer back.

    Args:
        model: the model of the run.
        optimizer: of the model's parameters; the first group has the network's rate.
        batches: to train on.

    Returns:
        ``"bounds"`` (``base_lr`` and ``max_lr`` of the network's rate), ``"confidence"``,
        ``"reason"``, ``"steps"`` (how many the test took) and ``"seconds"``.

    Raises:
        ValueError: if the curve has no usable region.
    """
    begin = perf_counter()
    result = lr_range_test(
        model,
        optimizer,
        batches,
        functional.cross_entropy,
        start_lr=_START,
        end_lr=_END,
        num_steps=_STEPS,
        mode="exponential",
        progress=False,
    )
    found = result.suggest()
    # The rates of the curve belong to the group with the largest rate, here a group of biases.
    ratio = found.ratios[0]
    return {
        "bounds": [found.base_lr * ratio, found.max_lr * ratio],
        "confidence": found.confidence,
        "reason": found.reason,
        "steps": len(result.lrs),
        "seconds": round(perf_counter() - begin, 2),
    }
