"""Values: the numbers that the groups hold at a position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from clr_optim.core.followed import Followed
from clr_optim.schedule import Schedule, rates_and_momenta

__all__ = ["Values", "evaluate"]

# A setting's schedule has bounds in every phase, and ignores those of groups.
_NO_BOUNDS = [(0.0, 0.0)]


class Values(NamedTuple):
    """What the groups hold at a position.

    Args:
        position: the number of the step.
        bounds: ``(base_lr, max_lr)`` of each group.
        momentum_bounds: ``(base_momentum, max_momentum)`` of each group; empty if momentum does
            not cycle.
        rates: the rate of each group.
        numbers: the numbers of the settings that follow a schedule, group by group.
    """

    position: int
    bounds: list[tuple[float, float]]
    momentum_bounds: list[tuple[float, float]]
    rates: list[float]
    numbers: list[float]


def evaluate(
    schedule: Schedule,
    position: int,
    bounds: list[tuple[float, float]],
    momentum_bounds: list[tuple[float, float]],
    followed: Sequence[Sequence[Followed]],
) -> Values:
    """Return the values of a position.

    Args:
        schedule: the policy.
        position: the number of the step.
        bounds, momentum_bounds: as in :class:`Values`.
        followed: the settings of each group that follow a schedule; empty if momentum alone does,
            or none.
    """
    rates, momenta = rates_and_momenta(schedule, position, bounds, momentum_bounds)
    if not followed:
        return Values(position, bounds, momentum_bounds, rates, momenta)
    numbers: list[float] = []
    known: dict[int, float] = {}  # groups share schedules
    for i, settings in enumerate(followed):
        for setting in settings:
            for own in setting.schedules:
                if own is None:
                    numbers.append(momenta[i])
                    continue
                if id(own) not in known:
                    (known[id(own)],) = own.rates(position, _NO_BOUNDS)
                numbers.append(known[id(own)])
    return Values(position, bounds, momentum_bounds, rates, numbers)
