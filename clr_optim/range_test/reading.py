"""Read both bounds of a cycle off a curve.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186,
section 3.3.
"""

from __future__ import annotations

import math

import numpy as np

from clr_optim.range_test.curve import Curve, Measurements, longest_fall
from clr_optim.range_test.usable import usable_curve

__all__ = ["BASES", "METHODS", "read_bounds"]

#: How to find max_lr, and how to find base_lr.
METHODS = ("range", "steepest", "minimum/10", "valley")
BASES = ("curve", "max/4", "max/3")

# A curve breaks where it has lost this share of its drop.
_LOST = 0.1

# max_lr as a share of the rate at which training breaks.
_MARGIN = 0.75

# With fewer steps, the rate rises too fast: on the digits 32 steps per decade found 0.45, and 80
# found 0.26. Cycles up to 0.3 train best there, and cycles up to 0.45 fail.
_STEPS_PER_DECADE = 60


def read_bounds(measured: Measurements, method: str, base: str) -> tuple[float, float, float, str]:
    """Read the bounds.

    Args:
        measured: the measurements.
        method: one of ``METHODS``.
        base: one of ``BASES``.

    Returns:
        ``(base_lr, max_lr, confidence, reason)``.

    Raises:
        ValueError: if the curve has no usable region.
    """
    curve = usable_curve(measured)
    confidence = _confidence(curve)
    if method == "range":
        max_lr, certainty, reason = _max_lr_by_range(curve)
        confidence *= certainty
    else:
        max_lr, why = _max_lr_by_rule(curve, method)
        reason = f"{_describe_fall(curve)}; max_lr={max_lr:.3g} by method {method!r}: {why}"
    rule = base
    if base == "curve":
        improves_at = _first_improving_rate(curve) if method == "range" else math.inf
        # Closer bounds would make no cycle.
        rule = "curve" if improves_at <= max_lr / 2 else "max/4"
    if rule == "curve":
        base_lr = improves_at
        reason += f"; base_lr={base_lr:.3g} is where the curve begins to improve"
    else:
        base_lr = max_lr / float(rule[-1])
        reason += f"; base_lr={base_lr:.3g} by the rule {rule}"
    return base_lr, max_lr, confidence, reason


def _confidence(curve: Curve) -> float:
    """Return how far the fall exceeds the noise, times how far the points suffice, in [0, 1]."""
    clear = curve.drop / (curve.drop + 4.0 * curve.smooth_noise)
    enough = min(1.0, len(curve.capped) / 50)
    if curve.mode == "exponential":
        # A rate that rises fast passes the largest usable rate before the loss shows that.
        decades = (curve.x[-1] - curve.x[0]) / math.log(10.0)
        steps = curve.steps[-1] - curve.steps[0] + 1
        enough *= min(1.0, float(steps / (_STEPS_PER_DECADE * decades)))
    return clear * enough


def _describe_fall(curve: Curve) -> str:
    verb = "rose" if curve.is_accuracy else "fell"
    return (
        f"{curve.metric} {verb} from {curve.format_value(curve.start)} at lr {curve.lrs[0]:.3g} to "
        f"{curve.format_value(float(curve.smooth.min()))} at {curve.lrs[curve.lowest]:.3g}"
    )


def _max_lr_by_rule(curve: Curve, method: str) -> tuple[float, str]:
    """Return ``(max_lr, reason)`` by a method that looks for one point of the curve."""
    if method == "steepest":
        slopes = np.gradient(curve.smooth, curve.x)
        # Skip the first rate, which may be 0.
        index = 1 + int(slopes[1 : curve.lowest + 1].argmin())
        return float(curve.lrs[index]), "the curve falls fastest there"
    if method == "minimum/10":
        lowest = float(curve.lrs[curve.lowest])
        return lowest / 10, f"the curve is lowest at {lowest:.3g}"
    begin, end = longest_fall(curve.smooth)
    return (
        float(curve.lrs[max(1, (begin + end) // 2)]),
        f"the longest fall is from {curve.lrs[begin]:.3g} to {curve.lrs[end]:.3g}",
    )


def _first_improving_rate(curve: Curve) -> float:
    """Return the first rate from which the curve stays below its start, to its lowest point."""
    least = max(0.05 * curve.drop, min(curve.noise_at_start, 0.5 * curve.drop))
    level = np.flatnonzero(curve.smooth[: curve.lowest] >= curve.start - least)
    return float(curve.lrs[int(level[-1]) + 1])


def _max_lr_by_range(curve: Curve) -> tuple[float, float, str]:
    """Return ``(max_lr, certainty, reason)`` by the paper: a margin below the curve's break."""
    smooth, drop, local = curve.smooth, curve.drop, curve.local_noise
    best = np.minimum.accumulate(smooth)
    # A curve breaks only after it has improved.
    has_improved = best <= curve.start - min(max(0.75 * drop, curve.noise_at_start), 0.9 * drop)
    # The noise at the best point so far: later noise may be a part of the break.
    places = np.maximum.accumulate(np.where(smooth == best, np.arange(len(smooth)), 0))
    noise = np.maximum(local[places], curve.noise) / curve.averaging
    lost = np.maximum(_LOST * drop, 4.0 * noise)
    worse = np.flatnonzero(has_improved & (smooth > best + lost))
    calm = np.array([np.median(local[: i + 1]) for i in range(len(local))])
    # A steep fall is ragged too, and is no break.
    has_settled = best <= smooth.min() + 0.15 * drop
    ragged = np.flatnonzero(has_settled & (local > np.maximum(4.0 * calm, 0.25 * drop)))
    end = len(smooth) - 1
    at = int(min([*worse[:1], *ragged[:1], end + 1]))
    if at > end and curve.diverged:
        at = end
    if at > end:
        # Noise may exceed the whole drop.
        near = min(lost[-1], 0.5 * drop)
        plateau = int(np.flatnonzero(smooth <= smooth.min() + near)[0])
        max_lr = float(curve.lrs[max(plateau, 1)])
        return max_lr, 0.4, (
            f"{_describe_fall(curve)}; the curve did not get worse up to the last rate, "
            f"{curve.lrs[end]:.3g}, so the test did not reach the largest usable rate (raise "
            f"end_lr); max_lr={max_lr:.3g} is where the curve almost stopped improving"
        )  # fmt: skip
    floor = float(best[at])
    limit = min(_rate_where_growth_began(curve, at, floor), float(curve.lrs[at]))
    # A break at the curve's very end may be a bump.
    certainty = 1.0 if curve.diverged or at + max(3, curve.width) <= end else 0.7
    max_lr = _MARGIN * limit
    if ragged.size and at == ragged[0] and not (worse.size and at == worse[0]):
        how = f"the curve was ragged (± {local[at]:.2g}, ± {calm[at]:.2g} before)"
    elif curve.is_accuracy:
        how = f"the curve had fallen by {smooth[at] - floor:.1f} points"
    elif smooth[at] > floor:
        how = f"the curve had risen by {smooth[at] - floor:.2g}"
    else:
        how = "the loss diverged"
    reason = f"{_describe_fall(curve)}; at {curve.lrs[at]:.3g} {how}"
    if limit < 0.99 * curve.lrs[at]:
        reason += f", so fast that the growth began near {limit:.3g}"
    return max_lr, certainty, f"{reason}; max_lr={max_lr:.3g} is {_MARGIN:g} of {limit:.3g}"


def _rate_where_growth_began(curve: Curve, at: int, floor: float) -> float:
    """Return the rate at which the growth seen at point ``at`` began.

    Gradient descent multiplies the excess loss in a direction of curvature L by (L·lr − 1)²
    each step. The excess loss grows if lr > 2/L. From a growth g at lr follows
    2/L = 2·lr / (1 + √g).

    Args:
        curve: the curve.
        at: number of the point where the smoothed curve breaks.
        floor: the lowest smoothed value up to that point.
    """
    if curve.is_accuracy:
        return float(curve.lrs[at])  # accuracies follow no such law
    y = curve.y
    # Smoothing shows a jump too early: look for the jump in the values.
    level = floor + max(_LOST * curve.drop, 4.0 * curve.noise)
    near = slice(at, at + 1 + math.ceil(3 * curve.width))
    above = np.flatnonzero(y[near] > level)
    at += int(above[0]) if above.size else 0
    reach = max(3, int(curve.width))
    excess = y - floor
    pairs = [
        i
        for i in range(max(0, at - reach), min(len(y) - 1, at + reach))
        if excess[i] > curve.noise and excess[i + 1] > 0.0
    ]
    # Cap the growth of a jump: if the excess before it is almost 0, the true growth is unknown.
    largest_growth = 1e4
    # Take a jump out of the noise too, with a lower cap, as the jump may be an outlier.
    if not pairs and at > 0 and excess[at] > 0.0:
        pairs, largest_growth = [at - 1], 25.0
    limits = []
    for i in pairs:
        steps = curve.steps[i + 1] - curve.steps[i]
        growth = excess[i + 1] / max(excess[i], curve.noise, excess[i + 1] / largest_growth)
        growth = max(1.0, growth) ** (1.0 / steps)
        limits.append(2.0 * curve.lrs[i] / (1.0 + math.sqrt(growth)))
    return float(np.median(limits)) if limits else float(curve.lrs[at])
