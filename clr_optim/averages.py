"""Averages of parameters: in which steps one falls due, and with which weight.

An average is a state tensor beside a parameter. A step that falls due moves the average toward the
new parameter by a weight: ``average + weight·(parameter − average)``. Steps and weights are closed
forms of the position, so that graphs and resumed runs need no counter.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from clr_optim.checks import as_position, check_int, check_number, item, shown
from clr_optim.keys import AVERAGE_KIND, AVERAGES
from clr_optim.rules import AverageSlot
from clr_optim.schedule import Schedule

__all__ = [
    "Average", "CycleEnd", "Ema", "are_counted", "check_average", "check_count", "check_counts",
    "closed_form", "done", "due", "kind_of", "offsets", "put_count", "slot_of",
    "take_over_kind", "unmoved_averages_warning", "weights", "weights_ahead",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class Average:
    """When an average falls due, and with which weight.

    Args:
        start: steps before the first one that may take an average, an integer >= 0.
        dtype: ``torch.float32`` keeps averages of float16 and bfloat16 parameters in float32. With
            ``None`` each average has the dtype of its parameter.
    """

    start: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", check_int("start", self.start, minimum=0))
        if self.dtype not in (None, torch.float32):
            raise ValueError(
                f"dtype must be None or torch.float32, got {self.dtype!r}: None keeps the dtype of "
                "each parameter"
            )

    def __repr__(self) -> str:
        given = (
            f"{each.name}={getattr(self, each.name)!r}"
            for each in sorted(fields(self), key=lambda each: each.kw_only is True)
            if getattr(self, each.name) != each.default
        )
        return f"{type(self).__name__}({', '.join(given)})"

    def _done(self, schedule: Schedule, position: int) -> int:
        """Return how many averages fall due in the steps before a position."""
        raise NotImplementedError

    def _next(self, schedule: Schedule, position: int) -> int | None:
        """Return the first step from a position on that takes an average; None if none does."""
        raise NotImplementedError

    def _weight(self, count: int) -> float:
        """Return the weight of the next parameter, after ``count`` >= 1 averages."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class CycleEnd(Average):
    """Average the parameters at the ends of cycles, with equal weights.

    This is stochastic weight averaging: each cycle's end gives one point of the average.

    Args:
        start: steps before the first one that may take an average, an integer >= 0.
        dtype: ``torch.float32`` keeps averages of float16 and bfloat16 parameters in float32. With
            ``None`` each average has the dtype of its parameter.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: P. Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*,
    arXiv 1803.05407.

    Example:
        >>> swa = CycleEnd(start=1000)
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), average=swa)
    """

    def _done(self, schedule: Schedule, position: int) -> int:
        if position <= self.start:
            return 0
        before = schedule.cycle_ends(self.start) if self.start else 0
        return schedule.cycle_ends(position) - before

    def _next(self, schedule: Schedule, position: int) -> int | None:
        position = max(position, self.start)
        steps = schedule.steps_to_cycle_end(position)
        return None if steps is None else position + steps - 1

    def _weight(self, count: int) -> float:
        return 1.0 / (count + 1)


@dataclass(frozen=True, repr=False)
class Ema(Average):
    """Average the parameters exponentially: ``decay·average + (1 − decay)·parameter``.

    Args:
        decay: the weight of the average before, in [0, 1].
        every: the steps from one average to the next, an integer >= 1.
        start: steps before the first one that may take an average, an integer >= 0.
        dtype: ``torch.float32`` keeps averages of float16 and bfloat16 parameters in float32. With
            ``None`` each average has the dtype of its parameter.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: :func:`torch.optim.swa_utils.get_ema_avg_fn`.

    Example:
        >>> ema = Ema(0.999, every=10)
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.4), average=ema)
    """

    decay: float
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "decay", check_number("decay", self.decay, maximum=1.0))
        object.__setattr__(self, "every", check_int("every", self.every, minimum=1))

    def _done(self, schedule: Schedule, position: int) -> int:
        return max(position - self.start, 0) // self.every

    def _next(self, schedule: Schedule, position: int) -> int | None:
        passed = max(position - self.start, 0)
        return self.start + (passed // self.every + 1) * self.every - 1

    def _weight(self, count: int) -> float:
        return 1.0 - self.decay


def check_average(average: object) -> Average | None:
    """Return the constructor's ``average``, checked.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if average is None or isinstance(average, (CycleEnd, Ema)):
        return average
    if isinstance(average, str) and average == "cycle_end":
        return CycleEnd()
    remedy = (
        f"; for an exponential average, give Ema({average})"
        if isinstance(average, float) and 0.0 <= average <= 1.0
        else ""
    )
    raise (ValueError if isinstance(average, str) else TypeError)(
        f"average must be 'cycle_end', CycleEnd(...), Ema(decay) or None, got {average!r}{remedy}"
    )


def check_count(value: object, name: str) -> list[int]:
    """Return the averages taken and the position at that time, as a group holds them, checked.

    Raises:
        TypeError, ValueError: for what no optimizer here writes.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(
            f"{name} must be a list of two integers, got {shown(value)}: delete that key from the "
            "groups to load the rest"
        )
    taken, position = (as_position(item(each), name) for each in value)
    return [taken, position]


def check_counts(groups: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Check the averages taken in each group; return whether a group holds their number.

    Raises:
        TypeError, ValueError: for what no optimizer here writes.
    """
    held = [(i, group[AVERAGES]) for i, group in enumerate(groups) if AVERAGES in group]
    for i, count in held:
        check_count(count, f"{name}[{i}][{AVERAGES!r}]")
    return bool(held)


@functools.cache
def kind_of(average: Average) -> str:
    """Return an average as text, apart from its dtype, as groups hold it."""
    return repr(replace(average, dtype=None))


def take_over_kind(
    average: Average | None, groups: Sequence[dict[str, Any]], source: str
) -> str | None:
    """Take over groups that may have averages of another kind; return a warning if they have.

    A mean does not go on from averages that decay, nor the reverse: the groups' counts are then
    removed, so that the next average copies its parameter.

    Args:
        average: the average.
        groups: the groups.
        source: where they come from, for the message.
    """
    own = None if average is None else kind_of(average)
    others = [group for group in groups if own and group.get(AVERAGE_KIND, own) != own]
    if not others:
        return None
    saved, course = str(others[0][AVERAGE_KIND]), "goes on from its averages"
    if saved.partition("(")[0] not in [cls.__name__ for cls in type(average).__mro__]:
        course = "starts anew, with a copy of each parameter"
        for group in others:
            group.pop(AVERAGES, None)
    return (
        f"{source} has averages of average={saved}; this optimizer's average={average!r} decides "
        f"from here on, and {course}. To continue the old ones, construct with the old average."
    )


def are_counted(average: Average | None, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all groups hold the number of averages taken, if there is an average."""
    return average is None or all(AVERAGES in group for group in groups)


def put_count(average: Average | None, group: dict[str, Any], position: int) -> None:
    """Begin to count the averages of a group that has no count; without an average, remove it."""
    if average is not None:
        group.setdefault(AVERAGES, [0, position])
        group[AVERAGE_KIND] = kind_of(average)
    else:
        group.pop(AVERAGES, None)
        group.pop(AVERAGE_KIND, None)


def unmoved_averages_warning(source: str) -> str:
    """Return the warning that a source has averages, and that the optimizer moves none."""
    return (
        f"{source} has averages, and this optimizer has average=None: no step moves them. To go on "
        "averaging, construct with average=..., as the checkpoint's optimizer was."
    )


def slot_of(average: Average | None, *, masters: bool = False) -> AverageSlot | None:
    """Return the state tensor that holds an average, if any.

    Args:
        average: the average.
        masters: whether bfloat16 parameters have float32 masters: averages of these are float32.
    """
    if average is None:
        return None
    return AverageSlot(wide=torch.float32 if masters else average.dtype)


def closed_form(average: Average, schedule: Schedule) -> tuple[int, int, int, float]:
    """Return the numbers from which kernels compute steps and weights.

    Returns:
        The steps from one average to the next, or 0 for averages at cycle ends with equal weights;
        the steps before the first one that may take an average; the cycles that end in these; and
        the weight of a new parameter, if weights are not equal.
    """
    if isinstance(average, Ema):
        return average.every, average.start, 0, average._weight(1)
    return 0, average.start, schedule.cycle_ends(average.start), 0.0


def done(average: Average, schedule: Schedule, position: int) -> int:
    """Return how many averages fall due in the steps before a position."""
    return average._done(schedule, position)


def offsets(average: Average, schedule: Schedule, groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return for each group the number of averages due, less the number of those taken.

    Args:
        average: the average.
        schedule: the policy.
        groups: the groups, which hold ``[averages taken, position at that time]``.
    """
    pairs = (group[AVERAGES] for group in groups)
    return [done(average, schedule, position) - taken for taken, position in pairs]


def weights(
    average: Average, schedule: Schedule, position: int, offsets: Sequence[int]
) -> list[float]:
    """Return the weight of each group's new parameters in a step; an empty list if none is due.

    Args:
        average: the average.
        schedule: the policy.
        position: the number of the step.
        offsets: as :func:`offsets` returns them.
    """
    if average._next(schedule, position) != position:
        return []
    return _weights_of(average, done(average, schedule, position), offsets)


def _weights_of(average: Average, before: int, offsets: Sequence[int]) -> list[float]:
    """Return the weight of each group in a step that takes an average, after ``before`` others."""
    counts = (before - offset for offset in offsets)
    return [average._weight(count) if count > 0 else 1.0 for count in counts]


def weights_ahead(
    average: Average | None,
    schedule: Schedule,
    steps: range,
    groups: Sequence[Mapping[str, Any]],
) -> list[list[float]]:
    """Return the :func:`weights` of consecutive steps; an empty list without averages.

    Steps that take no average cost nothing.
    """
    if average is None:
        return []
    found: list[list[float]] = [[] for _ in steps]
    lacks = offsets(average, schedule, groups)
    step, before = average._next(schedule, steps.start), done(average, schedule, steps.start)
    while step is not None and step < steps.stop:
        found[step - steps.start] = _weights_of(average, before, lacks)
        step, before = average._next(schedule, step + 1), before + 1
    return found


def due(
    average: Average | None, schedule: Schedule, position: int, groups: Sequence[Mapping[str, Any]]
) -> tuple[list[float], list[int]]:
    """Return the :func:`weights` of a step and the :func:`offsets` of the groups, if any."""
    if average is None:
        return [], []
    lacks = offsets(average, schedule, groups)
    return weights(average, schedule, position, lacks), lacks
