"""The LR range test: a short training while the rate rises, and both bounds of a cycle read off it.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186,
section 3.3: base_lr is where the curve begins to improve, max_lr where it slows, turns ragged or
falls.
"""

from __future__ import annotations

import contextlib
import csv
import inspect
import json
import math
import reprlib
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from clr_optim.checks import (
    LAST_STEP,
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_path,
)
from clr_optim.console import show_progress, shows_progress
from clr_optim.optimizer import CyclicalOptimizer
from clr_optim.schedule import (
    ramp,
)
from clr_optim.sharding import DTensor
from clr_optim.snapshot import Snapshot as _Snapshot

__all__ = ["Bounds", "BoundsDict", "RangeTest", "lr_range_test"]

MODES = ("linear", "exponential")
METRICS = ("loss", "accuracy", "validation_loss", "validation_accuracy")
METHODS = ("range", "steepest", "minimum/10", "valley")
BASES = ("curve", "max/4", "max/3")

#: Version of the dictionary that :meth:`RangeTest.to_dict` writes.
FORMAT_VERSION = 1

# Fewer points than this say nothing about a curve.
_MIN_POINTS = 10

# A break is where a curve has lost this share of what it had gained.
_LOST = 0.1

# max_lr, as a share of the rate at which training breaks: there it must not go.
_MARGIN = 0.75

# Overflows in a row under a GradScaler, each halving the scale, after which training is lost.
_MAX_OVERFLOWS = 50

# So fast may the rate rise: on the digits 32 steps a decade found 0.45, 80 found 0.26, and with
# cycles up to 0.3 training is at its best, up to 0.45 it fails.
_STEPS_PER_DECADE = 60

_Floats = npt.NDArray[np.float64]
_StepFn = Callable[[Any, Any], Any]


class BoundsDict(TypedDict):
    """Arguments of :class:`~clr_optim.CyclicalOptimizer`: numbers, or one per parameter group.

    Args:
        base_lr, max_lr: the bounds of a cycle, a float or a list of floats.

    Example:
        >>> bounds: BoundsDict = {"base_lr": 0.001, "max_lr": 0.004}
        >>> model = nn.Linear(2, 1)
        >>> CyclicalOptimizer(torch.optim.SGD(model.parameters()), **bounds).lr_at(2000)
        [0.004]
    """

    base_lr: float | list[float]
    max_lr: float | list[float]


@dataclass(frozen=True)
class Bounds:
    """Both bounds of a cycle, and why.

    Args:
        base_lr, max_lr: the bounds, for the parameter group with the largest rate.
        ratios: each group's rate as a share of that one's.
        confidence: in [0, 1]; below about 0.5 look at the curve, or repeat with more steps.
        reason: in words, with the numbers it rests on.
        method: what they were found by.

    Example:
        >>> Bounds(0.001, 0.004).asdict()
        {'base_lr': 0.001, 'max_lr': 0.004}
        >>> Bounds(0.001, 0.004, ratios=(1.0, 0.5)).asdict()
        {'base_lr': [0.001, 0.0005], 'max_lr': [0.004, 0.002]}
    """

    base_lr: float
    max_lr: float
    ratios: tuple[float, ...] = (1.0,)
    confidence: float = 1.0
    reason: str = ""
    method: str = "range"

    def asdict(self) -> BoundsDict:
        """``base_lr`` and ``max_lr`` as :class:`~clr_optim.CyclicalOptimizer` takes them.

        Returns:
            Numbers; or lists with one for each parameter group, if their rates differ.
        """
        if all(ratio == 1.0 for ratio in self.ratios):
            return {"base_lr": self.base_lr, "max_lr": self.max_lr}
        return {
            "base_lr": [self.base_lr * ratio for ratio in self.ratios],
            "max_lr": [self.max_lr * ratio for ratio in self.ratios],
        }


@dataclass(frozen=True)
class _Curve:
    """A range test's curve turned so that lower is better, and what all methods ask of it."""

    lrs: _Floats
    steps: _Floats
    x: _Floats  #: lrs, or their logarithms
    raw: _Floats  #: values without outbreaks, which would drown all else when smoothed
    smooth: _Floats
    noise: float  #: standard deviation of a single value, for most of them
    rough: _Floats  #: the same about each
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


@dataclass
class RangeTest:
    """The curve that :func:`lr_range_test` measured.

    Args:
        lrs: learning rate per measurement, of the parameter group with the largest one; rising.
        values: what was measured: a loss, or an accuracy in percent.
        steps: number of the optimizer step of each measurement, counted from 0.
        mode: ``"linear"`` or ``"exponential"``: how the rate rose.
        metric: ``"loss"``, ``"accuracy"``, ``"validation_loss"`` or ``"validation_accuracy"``.
        num_steps: steps the test was to have; it may have ended earlier.
        diverged: whether it was stopped because the loss had grown or was no longer finite.
        interrupted: whether it was stopped by Ctrl-C.
        smoothing: share of the curve that :meth:`smoothed` averages over, in [0, 1].
        ratios: each parameter group's rate as a share of the largest.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        >>> curve = RangeTest([0.1, 0.2, 0.3], [2.0, 1.0, 1.5])
        >>> curve.steps, curve.num_steps
        ([0, 1, 2], 3)
    """

    lrs: list[float]
    values: list[float]
    steps: list[int] = field(default_factory=list)
    mode: str = "linear"
    metric: str = "loss"
    num_steps: int = 0
    diverged: bool = False
    interrupted: bool = False
    smoothing: float = 0.05
    ratios: list[float] = field(default_factory=lambda: [1.0])

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("metric", self.metric, METRICS)
        self.smoothing = check_number("smoothing", self.smoothing, maximum=1.0)
        check_bool("diverged", self.diverged)
        check_bool("interrupted", self.interrupted)
        for name in ("lrs", "values", "ratios"):
            _check_list(name, getattr(self, name))
            for i, number in enumerate(getattr(self, name)):
                check_number(f"{name}[{i}]", number, minimum=-math.inf)
        _check_list("steps", self.steps)
        for i, step in enumerate(self.steps):
            check_int(f"steps[{i}]", step, minimum=0)
        check_int("num_steps", self.num_steps, minimum=0)
        if not self.steps:
            self.steps = list(range(len(self.lrs)))
        if not self.num_steps:
            self.num_steps = self.steps[-1] + 1 if self.steps else 0
        for name in ("values", "steps"):
            if len(getattr(self, name)) != len(self.lrs):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries and lrs {len(self.lrs)}: "
                    "give one for each rate"
                )
        lowest = 0.0 if self.mode == "linear" else 5e-324
        if any(b <= a for a, b in zip(self.lrs, self.lrs[1:], strict=False)) or any(
            lr < lowest for lr in self.lrs
        ):
            raise ValueError(
                f"lrs must rise, from {'0' if self.mode == 'linear' else 'above 0'}: {self.lrs!r}"
            )

    # ---- the curve

    def smoothed(self) -> list[float]:
        """The curve without its noise: lines fitted to windows of it, weighted by a Gaussian.

        Windows are symmetric, so that the curve is not shifted to larger rates, and as wide in
        rates (``mode="exponential"``: in their logarithms) at every place.

        Returns:
            As many values as were measured.

        Example:
            >>> RangeTest([1.0, 2.0, 3.0, 4.0], [8.0, 6.0, 4.0, 2.0]).smoothed()
            [8.0, 6.0, 4.0, 2.0]
        """
        smooth, _ = _smooth(self._x(), np.array(self.values, dtype=np.float64), self.smoothing)
        # No more digits than a fitted line has.
        return [float(f"{value:.12g}") for value in smooth]

    def _x(self) -> _Floats:
        lrs = np.array(self.lrs, dtype=np.float64)
        return lrs if self.mode == "linear" else np.log(lrs)

    # ---- keeping it

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of numbers, strings and lists, for :meth:`from_dict`.

        Example:
            >>> RangeTest([0.1, 0.2], [2.0, 1.0]).to_dict()["values"]
            [2.0, 1.0]
        """
        return {"format": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RangeTest:
        """The range test that :meth:`to_dict` described.

        Args:
            data: the dictionary.

        Raises:
            TypeError, ValueError: if it is none, or was written by a newer version.

        Example:
            >>> curve = RangeTest([0.1, 0.2], [2.0, 1.0])
            >>> RangeTest.from_dict(curve.to_dict()) == curve
            True
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"data must be a dictionary from RangeTest.to_dict, got {data!r}")
        version = data.get("format")
        if not isinstance(version, int) or version != FORMAT_VERSION:
            raise ValueError(
                f"data has format={version!r}, and this version reads {FORMAT_VERSION}: "
                "take a dictionary from RangeTest.to_dict of this version, or update clr_optim"
            )
        names = {f.name for f in fields(cls)}
        given = set(data) - {"format"}
        if given != names:
            unknown = sorted(map(str, given - names))
            raise ValueError(
                f"data lacks {sorted(names - given)} and has unknown {unknown}: take a dictionary "
                "from RangeTest.to_dict"
            )
        return cls(**{name: data[name] for name in names})

    def save(self, path: str | Path) -> None:
        """Write the curve to a file.

        Args:
            path: ``*.json`` for all of it, which :meth:`from_dict` reads back, or ``*.csv`` for a
                table with the columns step, lr, the metric's name, and smoothed.

        Raises:
            ValueError: for any other name.
            OSError: if the file cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     RangeTest([0.1, 0.2], [2.0, 1.0]).save(f"{folder}/curve.csv")
            ...     print(Path(folder, "curve.csv").read_text().splitlines()[:2])
            ['step,lr,loss,smoothed', '0,0.1,2.0,2.0']
        """
        path = check_path("path", path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        elif path.suffix == ".csv":
            with path.open("w", newline="") as file:
                table = csv.writer(file)
                table.writerow(["step", "lr", self.metric, "smoothed"])
                table.writerows(
                    zip(self.steps, self.lrs, self.values, self.smoothed(), strict=True)
                )
        else:
            raise ValueError(f"path must end in .json or .csv, got {str(path)!r}")

    # ---- what to make of it

    def suggest(self, method: str = "range", *, base: str = "curve") -> Bounds:
        """Both bounds of a cycle.

        Args:
            method: how to find ``max_lr``:

                - ``"range"``, as in the paper: where the smoothed curve stops improving, turns
                  ragged or falls, and a margin (a quarter) below. A loss that blows up shows it
                  late, and the faster the further the rate has gone too far; for a quadratic with
                  largest curvature L and plain gradient descent, the excess loss grows by
                  (L·lr − 1)² a step, from which the rate 2/L at which it begins is taken.
                - ``"steepest"``: where the smoothed curve falls fastest, per unit of rate
                  (linear) or of its logarithm (exponential).
                - ``"minimum/10"``: a tenth of the rate where it is lowest.
                - ``"valley"``: the middle of the longest fall.
            base: how to find ``base_lr``: ``"curve"``, where the smoothed curve begins to improve
                (``"range"`` only; the other methods know one rate and take ``max_lr / 4``); or the
                paper's rules ``"max/4"`` and ``"max/3"``.

        Raises:
            ValueError: for a method or base that there is not, and where the curve has no usable
                region, with what to change.

        Source: arXiv 1506.01186, section 3.3.

        Example:
            >>> lrs = [0.01 * (i + 1) for i in range(50)]
            >>> losses = [1 / (1 + 20 * lr) + 100 * max(0, lr - 0.3) ** 2 for lr in lrs]
            >>> bounds = RangeTest(lrs, losses).suggest(base="max/3")
            >>> 0.2 < bounds.max_lr < 0.33
            True
        """
        check_choice("method", method, METHODS)
        check_choice("base", base, BASES)
        curve = self._usable_curve()
        confidence = self._confidence(curve)
        if method == "range":
            max_lr, sure, why = self._where_it_breaks(curve)
            confidence *= sure
        else:
            if method == "steepest":
                slopes = np.gradient(curve.smooth, curve.x)
                # The first rate may be 0, which is of no use.
                index = 1 + int(slopes[1 : curve.lowest + 1].argmin())
                max_lr, why = float(curve.lrs[index]), "the curve falls fastest there"
            elif method == "minimum/10":
                lowest = float(curve.lrs[curve.lowest])
                max_lr, why = lowest / 10, f"the curve is lowest at {lowest:.3g}"
            else:
                begin, end = _longest_fall(curve.smooth)
                max_lr = float(curve.lrs[max(1, (begin + end) // 2)])
                why = f"its longest fall is from {curve.lrs[begin]:.3g} to {curve.lrs[end]:.3g}"
            why = f"{self._fall(curve)}; max_lr={max_lr:.3g} by method {method!r}: {why}"
        rule = base
        if base == "curve":
            begins = self._where_it_begins(curve) if method == "range" else math.inf
            # Bounds as close as that make no cycle.
            rule = "curve" if begins <= max_lr / 2 else "max/4"
        if rule == "curve":
            base_lr = begins
            why += f"; base_lr={base_lr:.3g} is where it had begun to improve"
        else:
            base_lr = max_lr / float(rule[-1])
            why += f"; base_lr={base_lr:.3g} by the rule {rule}"
        return Bounds(base_lr, max_lr, tuple(self.ratios), round(confidence, 2), why, method)

    @property
    def _sign(self) -> float:
        return -1.0 if self.metric.endswith("accuracy") else 1.0

    def _usable_curve(self) -> _Curve:
        """The curve, if there is something to be seen in it."""
        n = len(self.values)
        if n < _MIN_POINTS:
            if self.diverged:
                which = "start_lr and end_lr" if self._starts_above_0 else "end_lr"
                advice = f"the rates are too large from the start: divide {which} by 10 or more"
            elif self.interrupted:
                advice = "the test was interrupted: let it run longer"
            elif self.metric.startswith("validation"):
                advice = "raise num_steps or epochs, or validate more often (validate_every)"
            else:
                advice = "raise num_steps or epochs"
            raise ValueError(
                f"the curve has {n} points, and nothing can be read from fewer than {_MIN_POINTS}: "
                f"{advice}"
            )
        y = self._sign * np.array(self.values, dtype=np.float64)
        x = self._x()
        # All that is worse than this is as bad.
        first = float(np.median(y[: max(3, n // 20)]))
        gain = first - float(np.quantile(y, 0.05))
        raw = np.minimum(y, max(first, y[0]) + max(gain, 0.1 * abs(first)))
        smooth, width = _smooth(x, raw, self.smoothing)
        noise, rough = _noise(raw), _raggedness(raw, width)
        curve = _Curve(
            np.array(self.lrs), np.array(self.steps, dtype=np.float64), x, raw, smooth,
            noise, rough, width,
        )  # fmt: skip
        # What noise alone does not do, even to the lowest of many points (the first one, with
        # neighbours on one side only, has twice as much of it); 1 % of a loss, a point of accuracy.
        least = max(1.0 if self._sign < 0 else 0.01 * abs(curve.start), 9.0 * curve.smooth_noise)
        if curve.drop > least:
            return curve
        seen = (
            f"{self.metric} is {self._show(curve.start)} at lr {self.lrs[0]:.3g} and at best "
            f"{self._show(curve.start - curve.drop)} (noise ± {curve.noise:.2g} a value)"
        )
        if self.diverged or float(smooth[-1]) - curve.start > least:
            which = "start_lr" if self._starts_above_0 else "end_lr"
            raise ValueError(
                f"the curve gets worse and has not improved before, beyond its noise: {seen}. "
                f"Lower {which} (by 10 or more) so that the test begins with rates that train, or "
                "give it more steps"
            )
        if self.interrupted:
            raise ValueError(
                f"the curve is flat: {seen}. The test was interrupted at lr {self.lrs[-1]:.3g}. "
                "Let it run to its end"
            )
        if curve.drop > 0.5 * least and curve.smooth_noise > 0.0:
            raise ValueError(
                f"the curve is flat, as far as its noise shows: {seen}. Give it more steps or less "
                "noise (larger batches, or accumulate), or widen the range (raise end_lr)"
            )
        raise ValueError(
            f"the curve is flat: {seen}. Widen the range (raise end_lr), or give it more steps so "
            "that a change can be told from the noise"
        )

    @property
    def _starts_above_0(self) -> bool:
        return not self.lrs or self.lrs[0] > 0.0

    def _show(self, value: float) -> str:
        value *= self._sign
        return f"{value:.1f} %" if self._sign < 0 else f"{value:.3g}"

    def _fall(self, curve: _Curve) -> str:
        verb = "rose" if self._sign < 0 else "fell"
        return (
            f"{self.metric} {verb} from {self._show(curve.start)} at lr {curve.lrs[0]:.3g} to "
            f"{self._show(float(curve.smooth.min()))} at {curve.lrs[curve.lowest]:.3g}"
        )

    def _confidence(self, curve: _Curve) -> float:
        """How far the curve's fall stands out of its noise, and has points to show it."""
        clear = curve.drop / (curve.drop + 4.0 * curve.smooth_noise)
        enough = min(1.0, len(curve.raw) / 50)
        if self.mode == "exponential":
            # A rate that rises faster is past the largest usable one before training shows it.
            decades = (curve.x[-1] - curve.x[0]) / math.log(10.0)
            steps = curve.steps[-1] - curve.steps[0] + 1
            enough *= min(1.0, float(steps / (_STEPS_PER_DECADE * decades)))
        return clear * enough

    def _where_it_begins(self, curve: _Curve) -> float:
        """The first rate from which on, up to its lowest point, the curve is below its start."""
        least = max(0.05 * curve.drop, min(curve.bumps, 0.5 * curve.drop))
        level = np.flatnonzero(curve.smooth[: curve.lowest] >= curve.start - least)
        return float(curve.lrs[int(level[-1]) + 1])

    def _where_it_breaks(self, curve: _Curve) -> tuple[float, float, str]:
        """``(max_lr, confidence, reason)`` by the paper's reading of the curve."""
        smooth, drop = curve.smooth, curve.drop
        best = np.minimum.accumulate(smooth)
        # Only what has got somewhere can break.
        arrived = best <= curve.start - min(max(0.75 * drop, curve.bumps), 0.9 * drop)
        rough = curve.rough
        # Which of the points so far is the best, and how much of that may be noise: that of what
        # comes later is part of the break.
        places = np.maximum.accumulate(np.where(smooth == best, np.arange(len(smooth)), 0))
        noise = np.maximum(rough[places], curve.noise) / curve.averaging
        lost = np.maximum(_LOST * drop, 4.0 * noise)
        worse = np.flatnonzero(arrived & (smooth > best + lost))
        # As it was on the way: the middle one of all places so far.
        calm = np.array([np.median(rough[: i + 1]) for i in range(len(rough))])
        # A steep fall is ragged too, and no break.
        settled = best <= smooth.min() + 0.15 * drop
        ragged = np.flatnonzero(settled & (rough > np.maximum(4.0 * calm, 0.25 * drop)))
        end = len(smooth) - 1
        at = min([*worse[:1], *ragged[:1], end + 1])
        if at > end and self.diverged:
            at = end
        if at > end:
            near = min(lost[-1], 0.5 * drop)  # noise may be more than all that was gained
            plateau = int(np.flatnonzero(smooth <= smooth.min() + near)[0])
            max_lr = float(curve.lrs[max(plateau, 1)])
            return max_lr, 0.4, (
                f"{self._fall(curve)}, and did not get worse up to the last rate, "
                f"{curve.lrs[end]:.3g}, so that the largest usable rate was not seen (raise "
                f"end_lr); max_lr={max_lr:.3g} is where it had all but stopped improving"
            )  # fmt: skip
        floor = float(best[at])
        limit = min(self._limit(curve, int(at), floor), float(curve.lrs[at]))
        # With nothing after it, it may be a bump.
        sure = 1.0 if self.diverged or at + max(3, curve.width) <= end else 0.7
        max_lr = _MARGIN * limit
        if ragged.size and at == ragged[0] and not (worse.size and at == worse[0]):
            how = f"was ragged (± {rough[at]:.2g}, ± {calm[at]:.2g} before)"
        elif self._sign < 0:
            how = f"had fallen by {smooth[at] - floor:.1f} points"
        elif smooth[at] > floor:
            how = f"had risen by {smooth[at] - floor:.2g}"
        else:
            how = "had grown beyond all bounds"
        why = f"{self._fall(curve)}; at {curve.lrs[at]:.3g} it {how}"
        if limit < 0.99 * curve.lrs[at]:
            why += f", so fast that it must have begun at {limit:.3g}"
        return max_lr, sure, f"{why}; max_lr={max_lr:.3g} is {_MARGIN:g} of that rate"

    def _limit(self, curve: _Curve, at: int, floor: float) -> float:
        """The rate at which the growth seen at point ``at`` began.

        Gradient descent multiplies the excess loss in a direction of curvature L by (L·lr − 1)²
        each step, and so grows from lr = 2/L on: of a growth g at lr, that is 2·lr / (1 + √g).
        """
        if self._sign < 0:
            return float(curve.lrs[at])  # an accuracy has no such law
        y = self._sign * np.array(self.values, dtype=np.float64)
        # Smoothing shows a jump before it comes.
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
        most = 1e4  # a jump out of nothing at all says little
        # A jump out of the noise is no smaller than it seems, and may be no more than an outlier.
        if not pairs and at > 0 and excess[at] > 0.0:
            pairs, most = [at - 1], 25.0
        limits = []
        for i in pairs:
            steps = curve.steps[i + 1] - curve.steps[i]
            growth = excess[i + 1] / max(excess[i], curve.noise, excess[i + 1] / most)
            growth = max(1.0, growth) ** (1.0 / steps)
            limits.append(2.0 * curve.lrs[i] / (1.0 + math.sqrt(growth)))
        return float(np.median(limits)) if limits else float(curve.lrs[at])

    # ---- the length of a training

    @staticmethod
    def suggest_step_size(steps_per_epoch: int, epochs: float = 4) -> int:
        """Half a cycle in steps: the paper advises 2 to 10 epochs.

        Args:
            steps_per_epoch: optimizer steps in an epoch, an integer >= 1.
            epochs: a number from 2 to 10.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Source: arXiv 1506.01186, section 3.2.

        Example:
            >>> RangeTest.suggest_step_size(500)
            2000
        """
        steps_per_epoch = check_int(
            "steps_per_epoch", steps_per_epoch, minimum=1, maximum=LAST_STEP
        )
        return round(check_number("epochs", epochs, minimum=2, maximum=10) * steps_per_epoch)

    @staticmethod
    def total_steps(cycles: int, steps_per_epoch: int, epochs: float = 4) -> int:
        """Length of a training of whole cycles in steps: it is to stop at the end of one.

        Args:
            cycles: an integer >= 1; the paper advises at least 3, better 4.
            steps_per_epoch, epochs: as in :meth:`suggest_step_size`.

        Raises:
            TypeError, ValueError: naming the argument, its value and what would be right.

        Source: arXiv 1506.01186, section 3.2.

        Example:
            >>> RangeTest.total_steps(4, 500)
            16000
        """
        cycles = check_int("cycles", cycles, minimum=1)
        return cycles * 2 * RangeTest.suggest_step_size(steps_per_epoch, epochs)


def _check_list(name: str, value: object) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of numbers, got {reprlib.repr(value)}")


def _smooth(x: _Floats, y: _Floats, smoothing: float) -> tuple[_Floats, float]:
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


def _second_differences(y: _Floats) -> _Floats:
    """Of a straight line 0; of noise, noise of the same standard deviation."""
    return (y[:-2] - 2.0 * y[1:-1] + y[2:]) / math.sqrt(6.0)


def _noise(y: _Floats) -> float:
    """Standard deviation of single values about the curve, whatever a few outliers do."""
    return 1.4826 * float(np.median(np.abs(_second_differences(y))))


def _spread(y: _Floats) -> float:
    """Standard deviation of losses about what they do in all, whatever the last of them do.

    Losses of both signs have no scale but their own: how far they are from their median.
    """
    spread = float(np.quantile(np.abs(_second_differences(y)), 0.75)) / 1.15
    if y.min() < 0.0 < y.max():
        spread = max(spread, 1.4826 * float(np.median(np.abs(y - np.median(y)))))
    return spread


def _raggedness(y: _Floats, width: float) -> _Floats:
    """The same in the neighbourhood of each point."""
    size = np.pad(np.abs(_second_differences(y)), 1, mode="edge")
    reach = max(3, round(2 * width))
    # Medians, so that a jump alone is none.
    around = [np.median(size[max(0, i - reach) : i + reach + 1]) for i in range(len(y))]
    return 1.4826 * np.array(around, dtype=np.float64)


def _longest_fall(y: _Floats) -> tuple[int, int]:
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


# ---- measuring


def lr_range_test(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    start_lr: float,
    end_lr: float,
    num_steps: int | None = None,
    epochs: float | None = None,
    mode: str = "linear",
    metric: str = "loss",
    step_fn: _StepFn | None = None,
    target_key: str = "labels",
    accumulate: int = 1,
    val_loader: Iterable[Any] | None = None,
    validate_every: int | None = None,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    max_grad_norm: float | None = None,
    backend: str | None = None,
    offload: bool = False,
    diverge_factor: float = 3.0,
    smoothing: float = 0.05,
    average_ranks: bool | None = None,
    progress: bool | None = None,
) -> RangeTest:
    """Train for a while as the rate rises, measure, and put everything back as it was.

    The test puts back bit for bit, also after an exception or Ctrl-C, and into the same objects:

    - parameters and buffers with shape, stride, dtype and memory, gradients, ``requires_grad``;
    - the optimizer's groups, attributes and state of any type (what Python cannot look into, by a
      deep copy in its place);
    - attributes of all submodules: tensors, arrays, containers, generators of random numbers, and
      objects of other classes that hold nothing but such data; and ``get_extra_state``;
    - of loaders, samplers and datasets: attributes, and the data that they lead to;
    - the random state of torch (CPU and the model's GPUs), Python and NumPy.

    Workers that persist keep their state: the test starts workers of its own, or warns where it
    cannot. Hooks are kept, and run.

    The test leaves as they are: objects that hold a file, a lock, a thread, a stream, a graph or
    other things that cannot be copied (if training changes one in a module, give the module
    ``get_extra_state`` and ``set_extra_state``); data of a loader, or of an object in a module,
    beyond 20,000 objects, or beyond both 64 MiB and the model's size; batches taken from an
    iterator; global variables, and variables of your functions. A warning names what could not be
    put back.

    The optimizer's step runs in :class:`~clr_optim.CyclicalOptimizer`, on the kernels that will
    train. Parameter groups keep the ratio of their rates; ``start_lr`` and ``end_lr`` are those
    of the group with the largest, and the others stay below. A model in eval mode is put in train
    mode; of one in train mode, submodules in eval mode stay so.

    The loss is that of each step's batch before its update. If the mean of the last ten or so grows
    to ``diverge_factor`` times its lowest and out of the losses' noise, or a loss is no longer
    finite, the test ends (``result.diverged``); Ctrl-C ends it too and keeps what was measured
    (``result.interrupted``).

    Under DistributedDataParallel and FSDP2 every rank calls this with its part of the data;
    measurements are averaged, so that all ranks get the same result. (Ctrl-C or an exception on
    one rank alone leaves the others waiting, as in any training.)

    Args:
        model: the model, on its device.
        optimizer: its optimizer, or a :class:`~clr_optim.CyclicalOptimizer`, of which the wrapped
            one is tested, with its ``max_grad_norm`` and backend.
        loader: batches, gone through again from the start when it ends. A batch is a tuple or list
            ``(*inputs, target)`` for ``loss_fn(model(*inputs), target)``, or a dictionary for
            ``loss_fn(model(**rest), batch[target_key])``. All else: ``step_fn``.
        loss_fn: as above; ``None`` for dictionaries of which the model itself returns the loss
            (``output.loss`` or ``output["loss"]`` of ``model(**batch)``).
        start_lr, end_lr: the range of rates, >= 0, or > 0 for ``mode="exponential"``.
        num_steps, epochs: length in optimizer steps (an integer >= 2) or epochs (a number > 0, for
            loaders with a length): one of them. The paper took 8 epochs, of 500 steps each. With
            fewer than 60 steps for each power of ten the rates found are too large.
        mode: ``"linear"``, as in the paper, or ``"exponential"``, for ranges over decades.
        metric: ``"loss"`` or ``"accuracy"`` (in percent) of the batches trained on, or
            ``"validation_loss"`` or ``"validation_accuracy"`` after every ``validate_every`` steps.
        step_fn: ``step_fn(model, batch)`` instead of ``loss_fn``: returns the loss, a dictionary
            with ``"loss"``, or ``(loss, correct, count)`` where accuracy is asked for. A Lightning
            module's: ``lambda model, batch: model.training_step(batch, 0)``.
        target_key: of dictionaries.
        accumulate: batches per optimizer step, whose losses are averaged.
        val_loader: batches for validation, all of them each time.
        validate_every: steps; ``None`` makes about 50 validations.
        device: where batches are moved; ``None`` is that of the model's first parameter.
        amp_dtype: autocast to this dtype; ``torch.float16`` comes with a GradScaler, and steps
            that it skips are not counted.
        max_grad_norm, backend: as in :class:`~clr_optim.CyclicalOptimizer`.
        offload: keep the copy of all that is put back in the CPU's memory.
        diverge_factor: > 1. Of a small minimum this is too little to go by: the mean must rise by
            ``diverge_factor - 1`` times its largest fall, too, and by six standard deviations of
            the losses' noise. Losses of both signs, and all losses before the tenth, have no other
            scale. ``math.inf`` waits for a loss that is not finite.
        smoothing: of the result.
        average_ranks: whether to average over all ranks; ``None`` does so for
            DistributedDataParallel and DTensors, over theirs.
        progress: a line on stderr; ``None`` if that is a terminal.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.
        BaseException: what loader, model or optimizer raise, after all has been put back.

    Source: arXiv 1506.01186, section 3.3.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)  # its loss: (3·w₀)²/2 + w₁²/2, curved by 9 at most
        >>> data = [(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))]
        >>> result = lr_range_test(model, torch.optim.SGD(model.parameters(), lr=0.1), data,
        ...                        nn.functional.mse_loss, start_lr=1e-3, end_lr=10.0,
        ...                        num_steps=100, mode="exponential")
        >>> result.diverged
        True
        >>> 1 / 9 < result.suggest().max_lr < 2 / 9
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    check_choice("mode", mode, MODES)
    check_choice("metric", metric, METRICS)
    start_lr = check_number("start_lr", start_lr, open_minimum=mode == "exponential")
    end_lr = check_number("end_lr", end_lr)
    if start_lr >= end_lr:
        raise ValueError(
            f"start_lr={start_lr!r} must be below end_lr={end_lr!r}: the rate rises; swap the two"
        )
    accumulate = check_int("accumulate", accumulate, minimum=1, maximum=LAST_STEP)
    diverge_factor = check_number(
        "diverge_factor", diverge_factor, minimum=1.0, open_minimum=True, finite=False
    )
    smoothing = check_number("smoothing", smoothing, maximum=1.0)
    check_bool("offload", offload)
    _check_model(model)
    inner = _check_optimizer(model, optimizer)
    if step_fn is not None and loss_fn is not None:
        raise ValueError("step_fn and loss_fn are both given: step_fn returns the loss by itself")
    for name, function in (("step_fn", step_fn), ("loss_fn", loss_fn)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {function!r}")
    validates = metric.startswith("validation")
    if validates != (val_loader is not None):
        raise ValueError(
            f"metric={metric!r} needs a val_loader: give one, or metric='loss'"
            if validates
            else f"val_loader has no effect with metric={metric!r}: use 'validation_loss' or "
            "'validation_accuracy'"
        )
    if validate_every is not None and not validates:
        raise ValueError(f"validate_every={validate_every!r} has no effect with metric={metric!r}")
    if progress is not None:
        check_bool("progress", progress)
    if not any(amp_dtype is dtype for dtype in (None, torch.float16, torch.bfloat16)):
        raise ValueError(
            f"amp_dtype must be torch.float16, torch.bfloat16 or None, got {amp_dtype!r}"
        )
    for name, batches in (("loader", loader), ("val_loader", val_loader)):
        _check_loader(name, batches)
    here = next(model.parameters()).device if device is None else _as_device(device)
    ranks = _Ranks(model, average_ranks, here)
    steps = ranks.largest(_check_length(num_steps, epochs, loader, accumulate))
    every = 0
    if validates and validate_every is None:
        every = max(1, steps // 50)
    elif validates:
        every = check_int("validate_every", validate_every, minimum=1)
        if every > steps:
            raise ValueError(f"validate_every={every} is beyond the end, at step {steps}: lower it")

    groups = inner.param_groups
    rates = [_own_rate(group) for group in groups]
    largest = max(rates)
    ratios = [rate / largest if largest > 0.0 else 1.0 for rate in rates]
    reference = ratios.index(1.0)
    given = optimizer if isinstance(optimizer, CyclicalOptimizer) else None
    if given is not None:
        max_grad_norm = (
            given._shared.settings.max_grad_norm if max_grad_norm is None else max_grad_norm
        )
        backend = given._shared.settings.backend if backend is None else backend

    result = RangeTest(
        [], [], mode=mode, metric=metric, num_steps=steps, smoothing=smoothing, ratios=ratios
    )
    forward = _Forward(model, loss_fn, step_fn, target_key, metric.endswith("accuracy"), here)
    called = [getattr(function, "__self__", function) for function in (loss_fn, step_fn)]
    modules = [m for m in (model, *called) if isinstance(m, nn.Module)]
    snapshot = _Snapshot(modules, optimizer, [loader, val_loader], here, offload)
    try:
        snapshot.set_workers_aside()
        # A cycle that the optimizer is in the middle of is not the ramp's.
        for group in groups:
            for key in [key for key in group if key.startswith("clr_")]:
                del group[key]
        if not model.training:
            model.train()
        ours = CyclicalOptimizer(
            inner,
            ramp(steps, mode=mode, ratio=None if mode == "linear" else end_lr / start_lr),
            base_lr=[start_lr * ratio for ratio in ratios],
            max_lr=[end_lr * ratio for ratio in ratios],
            max_grad_norm=max_grad_norm,
            backend="auto" if backend is None else backend,
        )
        scaler = torch.amp.GradScaler(here.type) if amp_dtype is torch.float16 else None
        line = _Line(result, progress)
        batches = _endless(loader)
        stop = _Divergence(diverge_factor)
        overflows = 0
        try:
            while ours.iteration < steps and not result.diverged:
                step, lr = ours.iteration, ours.get_last_lr()[reference]
                for param in snapshot.params:
                    param.grad = None
                sums = forward.train(batches, accumulate, amp_dtype, scaler, ranks)
                loss = sums[0] / sums[3]
                if stop.is_reached(loss):
                    if not result.lrs and step == 0:
                        raise ValueError(
                            f"the loss of the first batch is {loss}: no rate can mend that; look "
                            "at the data, the model and loss_fn"
                        )
                    result.diverged = True
                if not math.isfinite(loss):
                    break
                if scaler is None:
                    ours.step()
                else:
                    scaler.step(ours)
                    scaler.update()
                    if ours.iteration == step:
                        overflows += 1
                        result.diverged = overflows > _MAX_OVERFLOWS
                        continue
                    overflows = 0
                if every:
                    if (step + 1) % every:
                        continue
                    assert val_loader is not None
                    sums = forward.validate(val_loader, amp_dtype, ranks)
                value = _value(metric, sums)
                if math.isfinite(value):
                    result.lrs.append(lr)
                    result.values.append(value)
                    result.steps.append(step)
                else:
                    result.diverged = True
                line.show()
        except KeyboardInterrupt:
            result.interrupted = True
        finally:
            line.close()
    finally:
        interrupted = False
        while True:
            # What is half put back must not be left so.
            try:
                snapshot.restore()
                break
            except KeyboardInterrupt:
                interrupted = True
        result.interrupted |= interrupted
    return result


def _value(metric: str, sums: Sequence[float]) -> float:
    loss, correct, count, batches = sums
    return 100.0 * correct / count if metric.endswith("accuracy") else loss / batches


def _check_model(model: nn.Module) -> None:
    if any(is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError(
            "model has lazy parameters, which have no values yet: run one batch through it first"
        )
    if not any(param.requires_grad for param in model.parameters()):
        raise ValueError("model has no parameter with requires_grad: there is nothing to train")


def _check_optimizer(model: nn.Module, optimizer: Optimizer) -> Optimizer:
    """The optimizer to wrap."""
    inner = optimizer.optimizer if isinstance(optimizer, CyclicalOptimizer) else optimizer
    name = type(inner).__name__
    try:
        closure = inspect.signature(type(inner).step).parameters.get("closure")
    except (TypeError, ValueError):
        closure = None
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optimizer is a {name}, whose step needs a closure and searches for its own way: a "
            "range test says nothing about it; use one of gradient descent's kind"
        )
    own = {id(param) for param in model.parameters() if param.requires_grad}
    if not any(id(param) in own for group in inner.param_groups for param in group["params"]):
        raise ValueError(
            f"optimizer: none of the {name}'s parameters is a trainable one of the model: build it "
            "from this model's parameters(), after the model was wrapped or moved"
        )
    return inner


def _as_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"device must be one that is here, such as 'cpu' or 'cuda:0', got {device!r} ({error})"
        ) from error


def _check_loader(name: str, loader: object) -> None:
    if loader is None and name == "val_loader":
        return
    if not isinstance(loader, Iterable):
        raise TypeError(f"{name} must be an iterable of batches, got {loader!r}")
    if _length(loader) == 0:
        raise _empty(name)
    if name == "val_loader" and isinstance(loader, Iterator):
        raise ValueError(
            f"{name} is an iterator, which can be gone through only once, and every validation "
            "goes through it: give a DataLoader or a list"
        )


def _empty(name: str) -> ValueError:
    return ValueError(
        f"{name} is empty: it has no batch (a DataLoader with drop_last=True has none if the data "
        "are fewer than batch_size)"
    )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _check_length(num_steps: object, epochs: object, loader: Iterable[Any], accumulate: int) -> int:
    if (num_steps is None) == (epochs is None):
        raise ValueError(
            f"num_steps={num_steps!r} and epochs={epochs!r}: give the test's length by one of them"
        )
    if num_steps is not None:
        return check_int("num_steps", num_steps, minimum=2)
    length = _length(loader)
    if length is None:
        raise ValueError(f"epochs={epochs!r} needs a loader with a length: give num_steps instead")
    steps = int(check_number("epochs", epochs, open_minimum=True) * length / accumulate)
    if steps < 2:
        raise ValueError(
            f"epochs={epochs!r} of {length} batches, {accumulate} a step, make {steps} steps: at "
            "least 2 are needed; raise epochs"
        )
    return steps


def _own_rate(group: Mapping[str, Any]) -> float:
    """The rate that the user chose for a group, whatever a schedule has made of it since."""
    for key in ("clr_max_lr", "initial_lr", "lr"):
        if key in group:
            return float(group[key])
    raise ValueError("optimizer: a parameter group has no 'lr', so there is no rate to test")


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches, again and again."""
    seen = 0
    while True:
        before = seen
        for batch in loader:
            seen += 1
            yield batch
        if seen == 0:
            raise _empty("loader")
        if seen == before:
            raise ValueError(
                f"loader ended after {seen} batches and cannot be started again: give an iterable "
                "that can (a DataLoader, a list), or fewer num_steps"
            )


class _Divergence:
    """Watches the loss of each step."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._losses: list[float] = []
        self._mean = 0.0
        self._weight = 0.0
        self._highest, self._lowest = -math.inf, math.inf
        self._fall = 0.0

    def is_reached(self, loss: float) -> bool:
        """Whether this loss, the next, ends the test."""
        if not math.isfinite(loss):
            return True
        self._losses.append(loss)
        # Over the last ten or so; the first ones weigh no more than the others.
        self._mean = 0.9 * self._mean + 0.1 * loss
        self._weight = 0.9 * self._weight + 0.1
        mean = self._mean / self._weight
        self._highest = max(self._highest, mean)
        self._lowest = min(self._lowest, mean)
        self._fall = max(self._fall, self._highest - mean)
        rise = mean - self._lowest
        allowed = (self._factor - 1.0) * max(abs(self._lowest), self._fall)
        # The spread of fewer losses is unknown, and no bounds can be read from them.
        if len(self._losses) < _MIN_POINTS or not rise > allowed:
            return False
        # A hard batch is no divergence: it lifts the mean for long, and most of the losses never.
        if not float(np.median(self._losses[-5:])) > self._lowest + allowed:
            return False
        return rise > 6.0 * _spread(np.array(self._losses))


class _Forward:
    """From batches to losses; all of its sums are (loss, correct, count, batches)."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        step_fn: _StepFn | None,
        target_key: str,
        wants_accuracy: bool,
        device: torch.device,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._step_fn = step_fn
        self._target_key = target_key
        self._wants_accuracy = wants_accuracy
        self._device = device

    def train(
        self,
        batches: Iterator[Any],
        accumulate: int,
        amp_dtype: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        ranks: _Ranks,
    ) -> list[float]:
        """Gradients of the mean over some batches."""
        total = [0.0] * 4
        for i in range(accumulate):
            batch = next(batches)
            last = i + 1 == accumulate
            no_sync = getattr(self._model, "no_sync", None)
            with contextlib.nullcontext() if last or no_sync is None else no_sync():
                loss, correct, count = self._losses(batch, amp_dtype)
                if not loss.requires_grad:
                    raise ValueError(
                        "the loss does not depend on a parameter with requires_grad: it must come "
                        "from the model, without detach() or no_grad()"
                    )
                value = float(loss.detach())
                total = [a + b for a, b in zip(total, (value, correct, count, 1.0), strict=True)]
                # All ranks go on to the sums, whichever of them met it.
                share = loss / accumulate
                (share if scaler is None else scaler.scale(share)).backward()  # type: ignore[no-untyped-call]
        return ranks.sums(total)

    def validate(
        self, loader: Iterable[Any], amp_dtype: torch.dtype | None, ranks: _Ranks
    ) -> list[float]:
        """A pass over the loader in eval mode."""
        flags = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        total = [0.0] * 4
        with torch.no_grad():
            for batch in loader:
                loss, correct, count = self._losses(batch, amp_dtype)
                total = [
                    a + b for a, b in zip(total, (float(loss), correct, count, 1.0), strict=True)
                ]
        for module, flag in flags:
            module.training = flag
        total = ranks.sums(total)
        if total[3] == 0.0:
            raise _empty("val_loader")
        return total

    def _losses(self, batch: Any, amp_dtype: torch.dtype | None) -> tuple[Tensor, float, float]:
        batch = _moved(batch, self._device)
        autocast: Any = contextlib.nullcontext()
        if amp_dtype is not None:
            autocast = torch.autocast(self._device.type, dtype=amp_dtype)
        with autocast:
            loss, correct, count = self._outcome(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = (
                f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            )
            raise ValueError(
                f"the loss must be one number, a scalar tensor, got {what}: average it"
            )
        if self._wants_accuracy and float(count) <= 0:
            raise ValueError(f"count must be above 0 for an accuracy, got {count!r}")
        return loss.reshape(()), float(correct), float(count)

    def _outcome(self, batch: Any) -> tuple[Any, Any, Any]:
        if self._step_fn is not None:
            return self._outcome_of_step_fn(self._step_fn(self._model, batch))
        target: Any
        if isinstance(batch, Mapping):
            if self._loss_fn is None:
                if self._wants_accuracy:
                    raise ValueError(
                        "accuracy needs a loss_fn, or a step_fn that returns (loss, correct, "
                        "count): the model's own loss says nothing of it"
                    )
                return self._loss_of_model(self._called((), batch)), 0.0, 1.0
            if self._target_key not in batch:
                raise ValueError(
                    f"target_key={self._target_key!r} is not in the batch, which has "
                    f"{sorted(map(str, batch))}: name the one that loss_fn is to compare with, or "
                    "give a step_fn"
                )
            target = batch[self._target_key]
            named = {k: v for k, v in batch.items() if k != self._target_key}
            output = self._called((), named)
        elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
            target = batch[-1]
            output = self._called(batch[:-1], {})
        else:
            size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise ValueError(
                f"a batch is a {type(batch).__name__}{size}, and neither a tuple (*inputs, target) "
                "nor a dictionary: give step_fn=lambda model, batch: ... that returns the loss"
            )
        if self._loss_fn is None:
            raise ValueError("loss_fn=None needs a step_fn, or dictionaries and a model's own loss")
        place = -1 if isinstance(batch, (tuple, list)) else self._target_key
        with _noting(f"loss_fn(output, batch[{place!r}])"):
            loss = self._loss_fn(output, target)
        if not self._wants_accuracy:
            return loss, 0.0, 1.0
        if (
            not isinstance(output, Tensor)
            or not isinstance(target, Tensor)
            or target.is_floating_point()
            or output.dim() != target.dim() + 1
        ):
            raise ValueError(
                "accuracy needs scores of shape (n, classes, ...) and whole numbers of shape "
                "(n, ...) as targets: give a step_fn that returns (loss, correct, count)"
            )
        right = (output.detach().argmax(dim=1) == target).sum()
        return loss, right, target.numel()

    def _outcome_of_step_fn(self, outcome: Any) -> tuple[Any, Any, Any]:
        if outcome is None:
            raise ValueError("step_fn returned None: it must return the loss, a scalar tensor")
        if isinstance(outcome, Mapping):
            if "loss" not in outcome:
                raise ValueError(
                    f"step_fn returned a dictionary with no 'loss', but with "
                    f"{sorted(map(str, outcome))}: return the loss, or a dictionary with it"
                )
            outcome = outcome["loss"]
        if isinstance(outcome, (tuple, list)):
            if len(outcome) != 3:
                raise ValueError(
                    "step_fn must return the loss or (loss, correct, count), got "
                    f"{len(outcome)} values"
                )
            return outcome[0], outcome[1], outcome[2]
        if self._wants_accuracy:
            raise ValueError(
                "step_fn must return (loss, correct, count) where accuracy is the metric, got "
                "a loss alone"
            )
        return outcome, 0.0, 1.0

    def _called(self, inputs: Sequence[Any], named: Mapping[Any, Any]) -> Any:
        """What the model returns for a batch, if it takes such inputs at all."""
        signature = None
        with contextlib.suppress(TypeError, ValueError):  # not every callable has one
            signature = inspect.signature(self._model.forward)
        try:
            if signature is not None:
                signature.bind(*inputs, **named)
        except TypeError as error:
            given = [*(type(value).__name__ for value in inputs), *map(str, named)]
            raise ValueError(
                f"a batch does not fit {type(self._model).__name__}.forward{signature}, which was "
                f"to be called with {', '.join(given)} ({error}): give "
                "step_fn=lambda model, batch: ... that returns the loss"
            ) from error
        with _noting("model(*batch[:-1])" if inputs else "model(**batch)"):
            return self._model(*inputs, **named)

    def _loss_of_model(self, output: Any) -> Any:
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if found is None:
            raise ValueError(
                f"{type(self._model).__name__} returned a {type(output).__name__} without a loss: "
                "give a loss_fn, or step_fn=lambda model, batch: ... that returns the loss"
            )
        return found


@contextlib.contextmanager
def _noting(call: str) -> Iterator[None]:
    """Tell with an error how the function was called."""
    try:
        yield
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(f"lr_range_test called {call}: for other batches give step_fn")
        raise


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    if callable(getattr(batch, "to", None)):
        moved = batch.to(device)
        return batch if moved is None else moved  # it may have moved itself
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        values = [_moved(value, device) for value in batch]
        return tuple(values) if isinstance(batch, tuple) else values
    return batch


class _Ranks:
    """Sums over the ranks that train one model, the same on each."""

    def __init__(self, model: nn.Module, average: bool | None, device: torch.device) -> None:
        self._device = device
        self._groups: list[Any] = []
        dist = torch.distributed
        if average is not None:
            check_bool("average_ranks", average)
        if average is False or not dist.is_available() or not dist.is_initialized():
            if average:
                raise ValueError(
                    "average_ranks=True needs ranks: call torch.distributed.init_process_group "
                    "first, or leave it out"
                )
            return
        params: list[Any] = list(model.parameters())
        sharded = [param for param in params if type(param) is DTensor]
        if average:
            self._groups = [dist.group.WORLD]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            self._groups = [model.process_group]
        elif sharded:
            mesh = sharded[0].device_mesh
            self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Element by element."""
        if not self._groups:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(total, group=group)
        return [float(value) for value in total.tolist()]

    def largest(self, value: int) -> int:
        """Loaders need not have the same length on all ranks, but tests must."""
        if not self._groups:
            return value
        most = torch.tensor(value, dtype=torch.int64, device=self._device)
        for group in self._groups:
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
        return int(most)


class _Line:
    """The progress, on one line of a terminal."""

    def __init__(self, result: RangeTest, wanted: bool | None) -> None:
        self._result = result
        self._next = 0.0
        if wanted is None:
            dist = torch.distributed
            first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
            wanted = first and shows_progress()
        self._wanted = wanted
        self._shown = False

    def show(self) -> None:
        result, now = self._result, time.monotonic()
        if not self._wanted or not result.lrs or now < self._next:
            return
        self._next, self._shown = now + 0.1, True
        done = f"{result.steps[-1] + 1}/{result.num_steps}"
        text = (
            f"range test {done}  lr {result.lrs[-1]:.3g}  {result.metric} {result.values[-1]:.4g}"
        )
        show_progress(f"\r{text:<70}")

    def close(self) -> None:
        if self._shown:
            show_progress("\n")
