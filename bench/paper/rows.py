"""The rows of the paper's tables, and rows beyond the paper, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from clr_optim.bench.paper.networks import FULL, Network
from clr_optim.schedule import (
    Schedule,
    decay,
    exp,
    exp_range,
    exp_range_bounds,
    fixed,
    one_cycle,
    sequence,
    triangular,
    triangular2,
    warm_restarts,
)

__all__ = ["BOUNDS", "FIXED", "ROWS", "Row", "Scale", "stages", "times"]

_GAMMA = 0.99994


@dataclass(frozen=True)
class Scale:
    """Multiply lengths and step sizes by a factor, and adapt decays to the new lengths."""

    factor: Fraction = Fraction(1)

    def steps(self, count: int) -> int:
        """Return the scaled length for ``count`` iterations of the paper.

        Raises:
            ValueError: if the scaled length is no whole number >= 1.
        """
        scaled = count * self.factor
        if scaled.denominator != 1 or scaled < 1:
            raise ValueError(
                f"--scale {float(self.factor):g} turns {count:,} iterations into "
                f"{float(scaled):g}, which must be a whole number >= 1"
            )
        return int(scaled)

    def gamma(self, gamma: float) -> float:
        """Return the decay per iteration that leaves the same amplitude at the end."""
        return float(gamma ** (1 / self.factor))


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        table: ``"1"``, ``"3"``, ``"beyond"`` the paper, ``"figure 6"``, ``"resnet"`` or
            ``"resnet-100"``.
        name: unique among all tables.
        rule: the optimizer, a key of :data:`~clr_optim.bench.paper.optimizers.RULES`.
        bounds: ``(base_lr, max_lr)`` of the groups with the network's rate; others have a multiple.
            With ``None``, each run finds its bounds by a range test.
        iterations: the length in the paper.
        schedule: makes the schedule at a scale.
        published: the paper's accuracy in percent, if it has the row.
        references: the names of the rows to compare this row with.
        network: the network to train.
        quarters: whether a run measures its accuracy on all test images after each quarter.
        evaluations: how many accuracies a run measures, at equal distances.
    """

    table: str
    name: str
    rule: str
    bounds: tuple[float, float] | None
    iterations: int
    schedule: Callable[[Scale], Schedule]
    published: float | None = None
    references: tuple[str, ...] = ()
    network: Network = FULL
    quarters: bool = False
    evaluations: int = 28

    @property
    def label(self) -> str:
        """The name in a picture of one optimizer."""
        return self.name.removeprefix(f"{self.rule}-")


def times(factor: float, schedule: Schedule) -> Schedule:
    """Multiply all rates of a schedule by a factor, for any bounds."""

    def multiply(end: tuple[float, float]) -> tuple[float, float]:
        return (factor * end[0], factor * end[1])

    return Schedule(
        schedule.name,
        [replace(p, lower=multiply(p.lower), upper=multiply(p.upper)) for p in schedule.phases],
    )


def _stepped(scale: Scale) -> Schedule:
    """Caffe's schedule: 0.001, from iteration 60,000 a tenth of 0.001, from 65,000 a hundredth."""
    return sequence(
        [
            (fixed(), scale.steps(60_000)),
            (times(0.1, fixed()), scale.steps(5_000)),
            (times(0.01, fixed()), scale.steps(5_000)),
        ]
    )


#: Table 2: a factor for the bounds 0.001 and 0.005, step size, start and end.
STAGES = ((1.0, 2_000, 0, 16_000), (0.1, 1_000, 16_000, 22_000), (0.01, 500, 22_000, 25_000))


def _table2(scale: Scale) -> Schedule:
    # Factors of each group's bounds: with absolute bounds, biases would not have twice the rate.
    return sequence(
        [
            (times(factor, triangular2(scale.steps(size))), scale.steps(end - start))
            for factor, size, start, end in STAGES
        ]
    )


def _triangular(scale: Scale) -> Schedule:
    return triangular(scale.steps(2_000))


def _windowed(window: str) -> Callable[[Scale], Schedule]:
    return lambda scale: triangular(scale.steps(2_000), window=window)


def _fixed(scale: Scale) -> Schedule:
    return fixed()


def _adaptive(
    rule: str, bounds: tuple[float, float], at_fixed: float, *cyclic: tuple[int, float]
) -> list[Row]:
    """Return Table 3's rows of an optimizer: fixed at the lower bound, and cyclic ones.

    Args:
        rule: the optimizer.
        bounds: ``(base_lr, max_lr)``.
        at_fixed: the paper's accuracy at the fixed rate, after 70,000 iterations.
        cyclic: length and published accuracy of each cyclic row.
    """
    name = f"{rule}-fixed"
    rows = [Row("3", name, rule, (bounds[0], bounds[0]), 70_000, _fixed, at_fixed)]
    for length, published in cyclic:
        suffix = "" if length == 25_000 else f"-{length // 1000}k"
        rows.append(
            Row(
                "3",
                f"{rule}-triangular{suffix}",
                rule,
                bounds,
                length,
                _triangular,
                published,
                (name,),
            )
        )
    return rows


BOUNDS = (0.001, 0.006)
_BASE = (0.001, 0.001)
FIXED = ("fixed", "fixed-stepped")
_BEYOND = 24_000  # six whole cycles

ROWS: dict[str, Row] = {
    row.name: row
    for row in [
        Row("1", "fixed", "sgd", _BASE, 70_000, _fixed, 81.4),
        Row("1", "fixed-stepped", "sgd", _BASE, 70_000, _stepped, 81.4, ("fixed",)),
        Row("1", "triangular2", "sgd", (0.001, 0.005), 25_000, _table2, 81.4, FIXED),
        Row(
            "1", "decay", "sgd", (0.001, 0.007), 25_000, lambda s: decay(s.steps(4_000)), 78.5,
            FIXED,
        ),
        Row(
            "1", "exp", "sgd", _BASE, 70_000, lambda s: exp(gamma=s.gamma(_GAMMA)), 79.1, FIXED
        ),
        Row(
            "1", "exp_range", "sgd", BOUNDS, 42_000,
            lambda s: exp_range(s.steps(2_000), gamma=s.gamma(_GAMMA)), 82.2, FIXED,
        ),
        Row(
            "1", "exp_range_bounds", "sgd", BOUNDS, 42_000,
            lambda s: exp_range_bounds(s.steps(2_000), gamma=s.gamma(_GAMMA)), 82.2, FIXED,
        ),
        *_adaptive("nesterov", (0.001, 0.006), 82.1, (25_000, 81.3)),
        *_adaptive("adam", (0.0005, 0.002), 81.4, (25_000, 79.8), (70_000, 81.1)),
        *_adaptive("rmsprop", (0.0001, 0.0003), 75.2, (25_000, 72.8), (70_000, 75.1)),
        *_adaptive("adagrad", (0.003, 0.035), 74.6, (25_000, 76.0)),
        *_adaptive("adadelta", (0.01, 0.1), 67.3, (25_000, 67.3)),
        Row("beyond", "window-triangle", "sgd", BOUNDS, _BEYOND, _windowed("triangle"), None,
            FIXED),
        Row("beyond", "window-welch", "sgd", BOUNDS, _BEYOND, _windowed("welch"), None,
            ("window-triangle",)),
        Row("beyond", "window-hann", "sgd", BOUNDS, _BEYOND, _windowed("hann"), None,
            ("window-triangle",)),
        Row("beyond", "one_cycle", "sgd", BOUNDS, _BEYOND,
            lambda s: one_cycle(s.steps(_BEYOND)), None, FIXED),
        Row("beyond", "warm_restarts", "sgd", BOUNDS, _BEYOND,
            lambda s: warm_restarts(s.steps(1_600), period_multiplier=2), None, FIXED),
    ]
}  # fmt: skip


def stages(scale: Scale) -> str:
    """Return Table 2 as Markdown."""
    base_lr, max_lr = ROWS["triangular2"].bounds or BOUNDS
    return "\n".join(
        [
            "| base_lr | max_lr | step size | start | end |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {factor * base_lr:g} | {factor * max_lr:g} | {scale.steps(size):,} | "
                f"{scale.steps(start) if start else 0:,} | {scale.steps(end):,} |"
                for factor, size, start, end in STAGES
            ),
        ]
    )
