"""The result of a range test: the measured curve, and the bounds that were read off it."""

from __future__ import annotations

import csv
import itertools
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from clr_optim.checks import (
    LAST_STEP,
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_path,
)
from clr_optim.pictures import draw
from clr_optim.range_test.curve import Measurements, smooth_lines
from clr_optim.range_test.reading import BASES, METHODS, read_bounds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METRICS", "MODES", "Bounds", "BoundsDict", "RangeTest"]

MODES = ("linear", "exponential")
METRICS = ("loss", "accuracy", "validation_loss", "validation_accuracy")

#: Version of the dictionary that :meth:`RangeTest.to_dict` writes.
FORMAT_VERSION = 1


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
    """Both bounds of a cycle, and the reason for them.

    Args:
        base_lr, max_lr: the bounds, for the parameter group with the largest rate.
        ratios: each group's rate as a share of the largest.
        confidence: in [0, 1]. Below about 0.5 look at the curve, or repeat with more steps.
        reason: the reason in words, with numbers from the curve.
        method: the method that found the bounds.

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
        """Return ``base_lr`` and ``max_lr`` as arguments of :class:`~clr_optim.CyclicalOptimizer`.

        Returns:
            Numbers; or, if the groups' rates differ, lists with one number per group.
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
        lrs: rising learning rates, one per measurement, of the parameter group with the largest
            rate.
        values: the measurements: losses, or accuracies in percent.
        steps: rising numbers of the optimizer step of each measurement, counted from 0.
        mode: how the rate rose, ``"linear"`` or ``"exponential"``.
        metric: ``"loss"``, ``"accuracy"``, ``"validation_loss"`` or ``"validation_accuracy"``.
        num_steps: number of planned steps. The test may have ended earlier.
        diverged: whether the test ended because the loss grew or was no longer finite.
        interrupted: whether Ctrl-C ended the test.
        smoothing: share of the curve over which :meth:`smoothed` averages, in [0, 1].
        ratios: each parameter group's rate as a share of the largest.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        >>> curve = RangeTest([0.1, 0.2, 0.3], [2.0, 1.0, 1.5])
        >>> curve.steps, curve.num_steps
        ([0, 1, 2], 3)
        >>> curve
        RangeTest(loss 2 to 1.5, lr 0.1 to 0.3, linear, 3 of 3 steps, complete)
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
        self.diverged = check_bool("diverged", self.diverged)
        self.interrupted = check_bool("interrupted", self.interrupted)
        for name in ("lrs", "values", "ratios"):
            _check_list(name, getattr(self, name))
            numbers = [
                _plain(f"{name}[{i}]", number) for i, number in enumerate(getattr(self, name))
            ]
            setattr(self, name, numbers)
        _check_list("steps", self.steps)
        self.steps, self.num_steps = _steps(
            self.steps or list(range(len(self.lrs))), self.num_steps
        )
        for name in ("values", "steps"):
            if len(getattr(self, name)) != len(self.lrs):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries and lrs {len(self.lrs)}: "
                    "give one entry per rate"
                )
        lowest = 0.0 if self.mode == "linear" else 5e-324
        if any(b <= a for a, b in zip(self.lrs, self.lrs[1:], strict=False)) or any(
            lr < lowest for lr in self.lrs
        ):
            raise ValueError(
                f"lrs must rise, from {'0' if self.mode == 'linear' else 'above 0'}: {self.lrs!r}"
            )

    def __repr__(self) -> str:
        ends = "diverged" if self.diverged else "interrupted" if self.interrupted else "complete"
        if not self.lrs:
            return f"RangeTest({self.metric}, no measurements, {ends})"
        return (
            f"RangeTest({self.metric} {self.values[0]:.4g} to {self.values[-1]:.4g}, "
            f"lr {self.lrs[0]:.3g} to {self.lrs[-1]:.3g}, {self.mode}, "
            f"{self.steps[-1] + 1} of {self.num_steps} steps, {ends})"
        )

    def smoothed(self) -> list[float]:
        """Return the curve without its noise: lines fitted to windows, weighted by a Gaussian.

        The windows are symmetric, so that smoothing does not shift the curve. All windows are
        equally wide in rates (``mode="exponential"``: in their logarithms).

        Returns:
            One value per measurement.

        Example:
            >>> RangeTest([1.0, 2.0, 3.0, 4.0], [8.0, 6.0, 4.0, 2.0]).smoothed()
            [8.0, 6.0, 4.0, 2.0]
        """
        measured = self._measurements()
        smooth, _ = smooth_lines(measured.x, measured.values, self.smoothing)
        # A fitted line has about 12 correct digits.
        return [float(f"{value:.12g}") for value in smooth]

    def _measurements(self) -> Measurements:
        return Measurements(
            lrs=np.array(self.lrs),
            values=np.array(self.values, dtype=np.float64),
            steps=np.array(self.steps, dtype=np.float64),
            mode=self.mode,
            metric=self.metric,
            diverged=self.diverged,
            interrupted=self.interrupted,
            smoothing=self.smoothing,
        )

    def plot(
        self,
        path: str | Path | None = None,
        *,
        bounds: Bounds | None = None,
        title: str | None = None,
    ) -> Figure:
        """Draw the curve, measured and smoothed, and mark both bounds.

        Args:
            path: a file to write the picture to, such as ``"range-test.png"``; ``None`` writes no
                file.
            bounds: the bounds to mark; ``None`` marks those of :meth:`suggest`.
            title: the title; ``None`` is the two bounds, or "no bounds found".

        Returns:
            The figure. A notebook shows the figure; ``figure.axes[0]`` has the curves.

        Raises:
            ImportError: without matplotlib.
            OSError: if the file cannot be written.
            TypeError, ValueError: naming the argument and what would be right.

        Example:
            >>> curve = RangeTest([0.1, 0.2, 0.3], [2.0, 1.0, 1.5])
            >>> curve.plot(bounds=Bounds(0.1, 0.2)).axes[0].get_title()
            'base_lr 0.1, max_lr 0.2'
        """
        return draw("plot_range_test", self, bounds, title=title, path=path)

    # ---- saving and loading

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary of numbers, strings and lists, for :meth:`from_dict`.

        Example:
            >>> RangeTest([0.1, 0.2], [2.0, 1.0]).to_dict()["values"]
            [2.0, 1.0]
        """
        return {"format": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RangeTest:
        """Return the range test that :meth:`to_dict` described.

        Args:
            data: the dictionary.

        Raises:
            TypeError, ValueError: if ``data`` is not such a dictionary, or if a newer version
                wrote it.

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
            path: ``*.json`` for the dictionary of :meth:`to_dict`, or ``*.csv`` for a table with
                the columns step, lr, the metric's name, and smoothed.

        Raises:
            ValueError: for any other suffix.
            OSError: if the file cannot be written.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
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

    # ---- bounds and lengths of a training

    def suggest(self, method: str = "range", *, base: str = "curve") -> Bounds:
        """Read both bounds of a cycle off the curve.

        Args:
            method: how to find ``max_lr``:

                - ``"range"``, the paper's: find where the smoothed curve stops improving, turns
                  ragged or falls, and stay a quarter below. A loss that blows up shows the break
                  late. For a quadratic with largest curvature L, plain gradient descent
                  multiplies the excess loss by (L·lr − 1)² per step. From that growth follows
                  2/L, the rate at which the growth begins.
                - ``"steepest"``: where the smoothed curve falls fastest, per unit of rate
                  (linear) or of its logarithm (exponential).
                - ``"minimum/10"``: a tenth of the rate at the curve's lowest point.
                - ``"valley"``: the middle of the longest fall.
            base: how to find ``base_lr``: ``"curve"``, where the smoothed curve begins to improve;
                or the paper's rules ``"max/4"`` and ``"max/3"``. The methods other than
                ``"range"`` find one rate, and take ``max_lr / 4`` for ``"curve"``.

        Raises:
            ValueError: for an unknown method or base, or if the curve has no usable region, with
                advice.

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
        base_lr, max_lr, confidence, reason = read_bounds(self._measurements(), method, base)
        return Bounds(base_lr, max_lr, tuple(self.ratios), round(confidence, 2), reason, method)

    @staticmethod
    def suggest_step_size(steps_per_epoch: int, epochs: float = 4) -> int:
        """Return half a cycle in steps. The paper advises 2 to 10 epochs.

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
        """Return the length of a training in steps. A training should stop at the end of a cycle.

        Args:
            cycles: an integer >= 1. The paper advises at least 3, better 4.
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


def _steps(steps: Sequence[object], planned: object) -> tuple[list[int], int]:
    """Return the steps of the measurements, and how many were planned: by default as many."""
    numbers = [check_int(f"steps[{i}]", step, minimum=0) for i, step in enumerate(steps)]
    if any(b <= a for a, b in itertools.pairwise(numbers)):
        raise ValueError(f"steps must rise: {numbers!r}")
    taken = numbers[-1] + 1 if numbers else 0
    planned = check_int("num_steps", planned, minimum=0) or taken
    if planned < taken:
        raise ValueError(
            f"num_steps={planned} is below the {taken} steps of the measurements: give the number "
            "of planned steps, or leave it out"
        )
    return numbers, planned


def _plain(name: str, value: Any) -> float:
    """Return a finite number as Python's own, which JSON and CSV can hold."""
    number = check_number(name, value, minimum=-math.inf)
    return value if type(value) is int else number


# Pickles and documentation name the public module. doctest looks for the names under __test__.
for _public in (BoundsDict, Bounds, RangeTest):
    _public.__module__ = "clr_optim.range_test"
__test__ = {"BoundsDict": BoundsDict, "Bounds": Bounds, "RangeTest": RangeTest}
