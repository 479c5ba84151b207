"""A measured curve: smoothing, and how noisy and how ragged it is."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


# Fewer points than this say nothing about a curve.
MIN_POINTS = 10


@dataclass(frozen=True)
class Curve:
    """A range test's curve turned so that lower is better, and what all methods ask of it."""

    lrs: Floats
    steps: Floats
    x: Floats  #: lrs, or their logarithms
    raw: Floats  #: values without outbreaks, which would drown all else when smoothed
    smooth: Floats
    noise: float  #: standard deviation of a single value, for most of them
    rough: Floats  #: the same about each
    width: float  #: standard deviation of the smoothing window, in points

    @property
    def averaging(self) -> float:
        """By how much smoothing divides the noise."""
        # That of a Gaussian window, and of a window no wider than one point.
        return max(1.0, math.sqrt(2.0 * math.sqrt(math.pi) * self.width))

    @property
    def smooth_noise(self) -> float:
        """Standard deviation of a smoothed value, for most of them."""
        return self.noise / self.averaging

    @property
    def bumps(self) -> float:
        """What the smoothed curve may fall by noise alone at its start, where losses have most.

        The first point, with neighbours on one side only, has twice as much of it.
        """
        return 6.0 * float(self.rough[0]) / self.averaging

    @property
    def start(self) -> float:
        return float(self.smooth[0])

    @property
    def lowest(self) -> int:
        return int(self.smooth.argmin())

    @property
    def drop(self) -> float:
        """How far the curve falls in all."""
        return self.start - float(self.smooth.min())


def smooth_lines(x: Floats, y: Floats, smoothing: float) -> tuple[Floats, float]:
    """Local lines, and the standard deviation of their Gaussian window in points."""
    n = len(y)
    width = max(0.5, 0.5 * smoothing * n)
    if n < 3 or smoothing == 0.0:
        return y.copy(), 0.0
    # In units of the mean distance of two points.
    u = (x - x[0]) / (x[-1] - x[0]) * (n - 1)
    begins = np.searchsorted(u, u - 3 * width, side="left")
    ends = np.searchsorted(u, u + 3 * width, side="right")
    smooth = np.empty(n)
    for i, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        d, part = u[begin:end] - u[i], y[begin:end]
        w = np.exp(-0.5 * (d / width) ** 2)
        s0, s1, s2 = w.sum(), (w * d).sum(), (w * d * d).sum()
        spread = s0 * s2 - s1 * s1
        if spread > 1e-9 * s0 * s0:
            smooth[i] = (w * (s2 - s1 * d) * part).sum() / spread
        else:
            smooth[i] = (w * part).sum() / s0
    return smooth, width


def _second_differences(y: Floats) -> Floats:
    """Of a straight line 0; of noise, noise of the same standard deviation."""
    return (y[:-2] - 2.0 * y[1:-1] + y[2:]) / math.sqrt(6.0)


def noise_of(y: Floats) -> float:
    """Standard deviation of single values about the curve, whatever a few outliers do."""
    return 1.4826 * float(np.median(np.abs(_second_differences(y))))


def spread_of(y: Floats) -> float:
    """Standard deviation of losses about what they do in all, whatever the last of them do.

    Losses of both signs have no scale but their own: how far they are from their median.
    """
    spread = float(np.quantile(np.abs(_second_differences(y)), 0.75)) / 1.15
    if y.min() < 0.0 < y.max():
        spread = max(spread, 1.4826 * float(np.median(np.abs(y - np.median(y)))))
    return spread


def raggedness_of(y: Floats, width: float) -> Floats:
    """The same in the neighbourhood of each point."""
    size = np.pad(np.abs(_second_differences(y)), 1, mode="edge")
    reach = max(3, round(2 * width))
    # Medians, so that a jump alone is none.
    around = [np.median(size[max(0, i - reach) : i + reach + 1]) for i in range(len(y))]
    return 1.4826 * np.array(around, dtype=np.float64)


def longest_fall(y: Floats) -> tuple[int, int]:
    """``(begin, end)`` of as many points as the longest falling subsequence has, to its end."""
    tails: list[float] = []  # of -y: the smallest end of a rising subsequence of each length
    last = 0
    for i, value in enumerate((-y).tolist()):
        place = bisect_left(tails, value)
        if place == len(tails):
            tails.append(value)
            last = i
        else:
            tails[place] = value
    return last - len(tails) + 1, last
