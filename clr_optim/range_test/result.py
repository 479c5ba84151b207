"""The result of a range test: the measured curve, and both bounds of a cycle read off it."""

from __future__ import annotations

import csv
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from clr_optim.checks import (
    LAST_STEP,
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_path,
)
from clr_optim.range_test.curve import (
    MIN_POINTS,
    Curve,
    Floats,
    longest_fall,
    noise_of,
    raggedness_of,
    smooth_lines,
)

MODES = ("linear", "exponential")
METRICS = ("loss", "accuracy", "validation_loss", "validation_accuracy")
METHODS = ("range", "steepest", "minimum/10", "valley")
BASES = ("curve", "max/4", "max/3")


#: Version of the dictionary that :meth:`RangeTest.to_dict` writes.
FORMAT_VERSION = 1


# A break is where a curve has lost this share of what it had gained.
_LOST = 0.1


# max_lr, as a share of the rate at which training breaks: there it must not go.
_MARGIN = 0.75


# So fast may the rate rise: on the digits 32 steps a decade found 0.45, 80 found 0.26, and with
# cycles up to 0.3 training is at its best, up to 0.45 it fails.
_STEPS_PER_DECADE = 60


class BoundsDict(TypedDict):
    """Arguments of :class:`~clr_optim.CyclicalOptimizer`: numbers, or one per parameter group.

    Args:
        base_lr, max_lr: the bounds of a cycle, a float or a list of floats.

    Example:
        >>> bounds: BoundsDict = {"base_lr": 0.001, "max_lr": 0.004}
        >>> import torch
        >>> from clr_optim import CyclicalOptimizer
        >>> model = torch.nn.Linear(2, 1)
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
        smooth, _ = smooth_lines(self._x(), np.array(self.values, dtype=np.float64), self.smoothing)
        # No more digits than a fitted line has.
        return [float(f"{value:.12g}") for value in smooth]

    def _x(self) -> Floats:
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
                begin, end = longest_fall(curve.smooth)
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

    def _usable_curve(self) -> Curve:
        """The curve, if there is something to be seen in it."""
        n = len(self.values)
        if n < MIN_POINTS:
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
                f"the curve has {n} points, and nothing can be read from fewer than {MIN_POINTS}: "
                f"{advice}"
            )
        y = self._sign * np.array(self.values, dtype=np.float64)
        x = self._x()
        # All that is worse than this is as bad.
        first = float(np.median(y[: max(3, n // 20)]))
        gain = first - float(np.quantile(y, 0.05))
        raw = np.minimum(y, max(first, y[0]) + max(gain, 0.1 * abs(first)))
        smooth, width = smooth_lines(x, raw, self.smoothing)
        noise, rough = noise_of(raw), raggedness_of(raw, width)
        curve = Curve(
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

    def _fall(self, curve: Curve) -> str:
        verb = "rose" if self._sign < 0 else "fell"
        return (
            f"{self.metric} {verb} from {self._show(curve.start)} at lr {curve.lrs[0]:.3g} to "
            f"{self._show(float(curve.smooth.min()))} at {curve.lrs[curve.lowest]:.3g}"
        )

    def _confidence(self, curve: Curve) -> float:
        """How far the curve's fall stands out of its noise, and has points to show it."""
        clear = curve.drop / (curve.drop + 4.0 * curve.smooth_noise)
        enough = min(1.0, len(curve.raw) / 50)
        if self.mode == "exponential":
            # A rate that rises faster is past the largest usable one before training shows it.
            decades = (curve.x[-1] - curve.x[0]) / math.log(10.0)
            steps = curve.steps[-1] - curve.steps[0] + 1
            enough *= min(1.0, float(steps / (_STEPS_PER_DECADE * decades)))
        return clear * enough

    def _where_it_begins(self, curve: Curve) -> float:
        """The first rate from which on, up to its lowest point, the curve is below its start."""
        least = max(0.05 * curve.drop, min(curve.bumps, 0.5 * curve.drop))
        level = np.flatnonzero(curve.smooth[: curve.lowest] >= curve.start - least)
        return float(curve.lrs[int(level[-1]) + 1])

    def _where_it_breaks(self, curve: Curve) -> tuple[float, float, str]:
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

    def _limit(self, curve: Curve, at: int, floor: float) -> float:
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


# Pickles and documentation name the public module. doctest looks for the names under __test__.
for _public in (BoundsDict, Bounds, RangeTest):
    _public.__module__ = "clr_optim.range_test"
__test__ = {"BoundsDict": BoundsDict, "Bounds": Bounds, "RangeTest": RangeTest}
