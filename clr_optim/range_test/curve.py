"""A measured curve: how to smooth it, and how large its noise is."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Bounds need at least so many points.
MIN_POINTS = 10


@dataclass(frozen=True)
class Measurements:
    """The measurements of a range test, and how the test ended.

    Args:
        lrs, values, steps: one entry per measurement.
        mode, metric, diverged, interrupted, smoothing: as in :class:`~clr_optim.RangeTest`.
    """

    lrs: Floats
    values: Floats
    steps: Floats
    mode: str
    metric: str
    diverged: bool
    interrupted: bool
    smoothing: float

    @property
    def x(self) -> Floats:
        """The rates; for an exponential test their logarithms."""
        lrs = np.array(self.lrs, dtype=np.float64)
        return lrs if self.mode == "linear" else np.log(lrs)

    @property
    def is_accuracy(self) -> bool:
        return self.metric.endswith("accuracy")

    @property
    def y(self) -> Floats:
        """The values, with the sign that makes lower values better."""
        return self._sign * self.values

    def format_value(self, y: float) -> str:
        """Return a value of ``y`` as text, in the metric's own sign and unit."""
        value = self._sign * y
        return f"{value:.1f} %" if self.is_accuracy else f"{value:.3g}"

    @property
    def _sign(self) -> float:
        return -1.0 if self.is_accuracy else 1.0


@dataclass(frozen=True)
class Curve(Measurements):
    """Measurements with a smoothed curve, where lower is better, and estimates of the noise."""

    capped: Floats  #: y without extreme values, which would dominate the smoothed curve
    smooth: Floats  #: capped, smoothed
    noise: float  #: standard deviation of a typical value about the curve
    local_noise: Floats  #: standard deviation of the values near each point
    width: float  #: standard deviation of the smoothing window, in points

    @property
    def averaging(self) -> float:
        """The factor by which smoothing divides the noise."""
        # The factor of a Gaussian window; 1 for a window no wider than one point.
        return max(1.0, math.sqrt(2.0 * math.sqrt(math.pi) * self.width))

    @property
    def smooth_noise(self) -> float:
        """Standard deviation of a typical smoothed value."""
        return self.noise / self.averaging

    @property
    def noise_at_start(self) -> float:
        """How far noise alone may move the smoothed curve near its start, where noise is largest.

        Three standard deviations of the first point. Neighbours on one side only double its noise.
        """
        return 6.0 * float(self.local_noise[0]) / self.averaging

    @property
    def start(self) -> float:
        """The smoothed value at the first rate."""
        return float(self.smooth[0])

    @property
    def lowest(self) -> int:
        """The number of the lowest point."""
        return int(self.smooth.argmin())

    @property
    def drop(self) -> float:
        """How far the curve falls from its start to its lowest point."""
        return self.start - float(self.smooth.min())


def make_curve(measured: Measurements) -> Curve:
    """Cap, smooth, and estimate the noise of some measurements, of which there is at least one."""
    y = measured.y
    # Cap outliers.
    first = float(np.median(y[: max(3, len(y) // 20)]))
    gain = first - float(np.quantile(y, 0.05))
    capped = np.minimum(y, max(first, y[0]) + max(gain, 0.1 * abs(first)))
    smooth, width = smooth_lines(measured.x, capped, measured.smoothing)
    return Curve(
        **vars(measured),
        capped=capped,
        smooth=smooth,
        noise=noise_of(capped),
        local_noise=local_noise_of(capped, width),
        width=width,
    )


def smooth_lines(x: Floats, y: Floats, smoothing: float) -> tuple[Floats, float]:
    """Fit a line around each point, weighted by a Gaussian window.

    Args:
        x, y: the points, in the order of ``x``.
        smoothing: share of the points that the window covers, in [0, 1].

    Returns:
        The lines' values at the points, and the window's standard deviation in points.
    """
    n = len(y)
    width = max(0.5, 0.5 * smoothing * n)
    if n < 3 or smoothing == 0.0:
        return y.copy(), 0.0
    # x in units of the mean distance between two points.
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
        else:  # one point in the window
            smooth[i] = (w * part).sum() / s0
    return smooth, width


def noise_of(y: Floats) -> float:
    """Return the standard deviation of single values about the curve. Outliers count little."""
    return 1.4826 * float(np.median(np.abs(_second_differences(y))))


def local_noise_of(y: Floats, width: float) -> Floats:
    """Return the standard deviation of the values near each point.

    Medians keep a single jump from counting as noise.
    """
    size = np.pad(np.abs(_second_differences(y)), 1, mode="edge")
    reach = max(3, round(2 * width))
    around = [np.median(size[max(0, i - reach) : i + reach + 1]) for i in range(len(y))]
    return 1.4826 * np.array(around, dtype=np.float64)


def spread_of(losses: Floats) -> float:
    """Return the standard deviation of losses about their trend. The last losses count little.

    Losses of both signs have no natural scale: for them the distance from their median counts too.
    """
    spread = float(np.quantile(np.abs(_second_differences(losses)), 0.75)) / 1.15
    if losses.min() < 0.0 < losses.max():
        spread = max(spread, 1.4826 * float(np.median(np.abs(losses - np.median(losses)))))
    return spread


def _second_differences(y: Floats) -> Floats:
    """Return scaled second differences: 0 for a straight line; noise keeps its deviation."""
    return (y[:-2] - 2.0 * y[1:-1] + y[2:]) / math.sqrt(6.0)


def longest_fall(y: Floats) -> tuple[int, int]:
    """Return the first and the last point of the longest fall.

    The last point ends the longest falling subsequence. The range has the subsequence's length.
    """
    tails: list[float] = []  # the smallest end of a rising subsequence of -y, for each length
    last = 0
    for i, value in enumerate((-y).tolist()):
        place = bisect_left(tails, value)
        if place == len(tails):
            tails.append(value)
            last = i
        else:
            tails[place] = value
    return last - len(tails) + 1, last
