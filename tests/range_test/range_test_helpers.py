"""Data, a model and a comparison that the tests of the range test share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clr_optim.range_test import RangeTest


def make_data(n: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(n)
    ]


def linear_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, bit for bit, NaN included."""
    if isinstance(a, Tensor):
        plain = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return plain and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def accuracy_curve(n: int = 200, noise: float = 0.0) -> RangeTest:
    """Return the paper's curve: it rises from 0.001, is best near 0.006, and then falls."""
    lrs = np.linspace(0.0001, 0.02, n)
    values = 10 + 60 * np.clip((lrs - 0.001) / 0.005, 0, 1) - 4000 * np.clip(lrs - 0.007, 0, None)
    values += noise * np.random.default_rng(0).standard_normal(n)
    return RangeTest(lrs.tolist(), values.tolist(), metric="accuracy")
