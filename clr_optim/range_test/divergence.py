"""End a range test when the loss grows."""

from __future__ import annotations

import math

import numpy as np

from clr_optim.range_test.curve import MIN_POINTS, spread_of

__all__ = ["Divergence"]


class Divergence:
    """Watch the loss of each step.

    Args:
        factor: a mean that rises to this multiple of its lowest value ends the test.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._losses: list[float] = []
        self._mean = 0.0
        self._weight = 0.0
        self._highest, self._lowest = -math.inf, math.inf
        self._fall = 0.0

    def is_reached(self, loss: float) -> bool:
        """Return whether the next loss ends the test."""
        if not math.isfinite(loss):
            return True
        self._losses.append(loss)
        # A mean over about ten losses. The weight gives the first losses their share.
        self._mean = 0.9 * self._mean + 0.1 * loss
        self._weight = 0.9 * self._weight + 0.1
        mean = self._mean / self._weight
        self._highest = max(self._highest, mean)
        self._lowest = min(self._lowest, mean)
        self._fall = max(self._fall, self._highest - mean)
        rise = mean - self._lowest
        allowed = (self._factor - 1.0) * max(abs(self._lowest), self._fall)
        # Fewer losses have no known spread, and too few points for bounds.
        if len(self._losses) < MIN_POINTS or not rise > allowed:
            return False
        # A single hard batch lifts the mean for long. The median of the last losses ignores it.
        if not float(np.median(self._losses[-5:])) > self._lowest + allowed:
            return False
        return rise > 6.0 * spread_of(np.array(self._losses))
