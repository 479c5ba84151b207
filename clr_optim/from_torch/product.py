"""Multiply schedules: the phases of a product, or a ``scale_fn`` where no phase has its rate."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from clr_optim.from_torch.functions import by_function
from clr_optim.from_torch.shapes import straight
from clr_optim.schedule import Phase, Schedule
from clr_optim.schedule.phase import hold

__all__ = ["product"]

# Cycles of a staircase that become phases, at most.
_MOST_CYCLES = 64


@dataclass(frozen=True)
class Product:
    """The product of schedules between 0 and 1: a ``scale_fn``."""

    factors: tuple[Schedule, ...]

    def __call__(self, step: float) -> float:
        return math.prod(factor(int(step)) for factor in self.factors)


def product(factors: Sequence[list[Phase]]) -> list[Phase]:
    """Return the phases of a product.

    Args:
        factors: the phases of each factor, which scale the upper bound and ignore the lower.
    """
    try:
        return functools.reduce(_multiply, factors)
    except _NoPhaseError:
        schedules = tuple(Schedule("factor", phases) for phases in factors)
        return [by_function(Product(schedules))]


class _NoPhaseError(ValueError):
    """No phase has the product of two phases."""


def _multiply(one: list[Phase], other: list[Phase]) -> list[Phase]:
    """Return the phases of the product of two factors."""
    one, other = _unrolled(one, _start_of_last(other)), _unrolled(other, _start_of_last(one))
    factors = Schedule("one", one), Schedule("other", other)
    starts = sorted({start for factor in factors for start in factor._timeline.starts})
    phases = []
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        mine, others = (_piece(factor, start) for factor in factors)
        phases.append(_times(mine, others, None if end is None else end - start))
    return phases


def _start_of_last(phases: Sequence[Phase]) -> int:
    return sum(phase.steps or 0 for phase in phases[:-1])


def _unrolled(phases: list[Phase], until: int) -> list[Phase]:
    """Return phases whose last, if it is a staircase, has a phase per stair up to a step."""
    *before, last = phases
    until -= _start_of_last(phases)
    if last.window != "boxcar" or until <= 0:
        return phases
    cycles = -(-until // last.period)
    if cycles > _MOST_CYCLES:
        raise _NoPhaseError
    by_cycle = replace(last, gamma=1.0, base_gamma=1.0)
    stairs = [
        hold(
            (0.0, last.upper[1] * by_cycle.amplitude(start)),
            steps=last.period,
            base_gamma=last.gamma,
            first_step=last.first_step + start,
        )
        for start in range(0, cycles * last.period, last.period)
    ]
    rest = replace(
        last,
        first_cycle=last.first_cycle + cycles,
        first_step=last.first_step + cycles * last.period,
    )
    return [*before, *stairs, rest]


def _piece(factor: Schedule, step: int) -> Phase:
    """Return the rest of the phase that holds a step, from the step on."""
    index, local = factor.locate(step)
    phase = factor.phases[index]
    if local == 0 or (phase.window == "constant" and phase.base_gamma == 1.0):
        if phase.scale_fn is None:
            return phase
    elif phase.window == "constant" and phase.scale_fn is None:
        return replace(phase, first_step=phase.first_step + local)
    elif phase.window == "triangle" and phase.power == 1.0 and phase.steps == phase.period:
        line = Schedule("line", [replace(phase, gamma=1.0, base_gamma=1.0)])
        end = phase.upper if phase.step_size_up else phase.lower
        return straight(
            line(local),
            end[1],
            phase.period - local,
            gamma=phase.gamma,
            base_gamma=phase.base_gamma,
            first_step=phase.first_step + local,
        )
    raise _NoPhaseError


def _times(one: Phase, other: Phase, steps: int | None) -> Phase:
    """Return the product of two phases that begin together."""
    if one.window != "constant":
        one, other = other, one
    if one.window != "constant":
        raise _NoPhaseError
    if one.base_gamma != 1.0:
        if other.base_gamma != 1.0 and one.first_step != other.first_step:
            raise _NoPhaseError
        other = replace(
            other,
            first_step=one.first_step,
            gamma=other.gamma * one.base_gamma,
            base_gamma=other.base_gamma * one.base_gamma,
        )
    scale = one.lower[1]
    return replace(
        other,
        steps=steps,
        lower=(0.0, scale * other.lower[1]),
        upper=(0.0, scale * other.upper[1]),
    )
