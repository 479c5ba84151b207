"""Read the schedulers of torch that scale each group's initial rate by one formula.

If ``low`` is the lower bound and the initial rate of each group the upper, the phases below give
the rates of the closed forms in torch's documentation. torch's own recursive forms drift from these
by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.optim import lr_scheduler as torchs

from clr_optim.checks import check_int, check_number
from clr_optim.schedule import Phase, warm_restarts
from clr_optim.schedule.phase import TOP, hold

__all__ = ["READERS", "straight"]


def straight(start: float, end: float, steps: int, **settings: Any) -> Phase:
    """Return a phase from one multiple of the initial rate to another, in a straight line.

    Args:
        start, end: the multiples.
        steps: the length.
        **settings: of the phase, such as another window.
    """
    if start == end:
        return hold((0.0, start), steps=steps)
    rises = start < end
    low, high = sorted((start, end))
    return Phase(
        step_size_up=steps if rises else 0,
        step_size_down=0 if rises else steps,
        steps=steps,
        lower=(0.0, low),
        upper=(0.0, high),
        cycle_steps=0 if rises else None,  # a warm-up is no cycle
        **settings,
    )


def _linear(scheduler: torchs.LinearLR, _: float) -> list[Phase]:
    steps = _whole(scheduler, "total_iters")
    start, end = (_number(scheduler, name, maximum=1.0) for name in ("start_factor", "end_factor"))
    return [straight(start, end, steps), hold((0.0, end))]


def _constant(scheduler: torchs.ConstantLR, _: float) -> list[Phase]:
    steps = _whole(scheduler, "total_iters")
    return [hold((0.0, _number(scheduler, "factor", maximum=1.0)), steps=steps), hold(TOP)]


def _steps(scheduler: torchs.StepLR, _: float) -> list[Phase]:
    size = _whole(scheduler, "step_size")
    return [
        Phase(
            window="boxcar",
            step_size_up=size,
            step_size_down=0,
            cycle_gamma=_falling_gamma(scheduler),
            lower=(0.0, 0.0),
            cycle_steps=0,
        )
    ]


def _milestones(scheduler: torchs.MultiStepLR, _: float) -> list[Phase]:
    gamma = _number(scheduler, "gamma")
    phases: list[Phase] = []
    before, count = 0, 0
    for milestone in sorted(scheduler.milestones):
        number = check_int("scheduler: a milestone of MultiStepLR", milestone, minimum=0)
        if number > before:
            phases.append(hold((0.0, gamma**count), steps=number - before))
        before, count = number, count + scheduler.milestones[milestone]
    return [*phases, hold((0.0, gamma**count))]


def _exponential(scheduler: torchs.ExponentialLR, _: float) -> list[Phase]:
    return [hold(TOP, base_gamma=_falling_gamma(scheduler))]


def _polynomial(scheduler: torchs.PolynomialLR, _: float) -> list[Phase]:
    steps, power = _whole(scheduler, "total_iters"), _number(scheduler, "power")
    if power == 0.0:
        return [hold(TOP)]
    return [straight(1.0, 0.0, steps, power=power), hold((0.0, 0.0))]


def _cosine(scheduler: torchs.CosineAnnealingLR, low: float) -> list[Phase]:
    steps, lower = _whole(scheduler, "T_max"), _lower_end(scheduler, low)
    fall = Phase(step_size_up=0, step_size_down=steps, steps=steps, window="hann", lower=lower)
    # torch's rate rises again after T_max, and cycles.
    return [fall, Phase(step_size_up=steps, window="hann", lower=lower)]


def _restarts(scheduler: torchs.CosineAnnealingWarmRestarts, low: float) -> list[Phase]:
    first, multiplier = _whole(scheduler, "T_0"), _whole(scheduler, "T_mult")
    lower = _lower_end(scheduler, low)
    length, position = first, scheduler.last_epoch
    done = position - position % first if multiplier == 1 else 0
    while position - done >= length:
        done, length = done + length, length * multiplier
    has_begun = position >= 0  # a sequence has not reached the others
    if has_begun and (scheduler.T_cur, scheduler.T_i) != (position - done, length):
        raise ValueError(
            f"scheduler has T_cur={scheduler.T_cur:g} and T_i={scheduler.T_i:g} at its step "
            f"{position}, where steps without an argument give T_cur={position - done} and "
            f"T_i={length}: for step(epoch + i / iters) construct CyclicalOptimizer(optimizer, "
            f"warm_restarts({first} * iters, period_multiplier={multiplier}), ...), then call "
            "set_iteration with the run's step"
        )
    phases = warm_restarts(first, period_multiplier=multiplier).phases
    return [replace(phase, lower=lower) for phase in phases]


#: A function for each class: from a scheduler and the lower bound of all groups to phases.
READERS: dict[type, Callable[[Any, float], list[Phase]]] = {
    torchs.LinearLR: _linear,
    torchs.ConstantLR: _constant,
    torchs.StepLR: _steps,
    torchs.MultiStepLR: _milestones,
    torchs.ExponentialLR: _exponential,
    torchs.PolynomialLR: _polynomial,
    torchs.CosineAnnealingLR: _cosine,
    torchs.CosineAnnealingWarmRestarts: _restarts,
}


def _whole(scheduler: Any, name: str) -> int:
    return check_int(_named(scheduler, name), getattr(scheduler, name), minimum=1)


def _number(scheduler: Any, name: str, **limits: Any) -> float:
    return check_number(_named(scheduler, name), getattr(scheduler, name), **limits)


def _named(scheduler: object, name: str) -> str:
    return f"scheduler: {name} of {type(scheduler).__name__}"


def _falling_gamma(scheduler: Any) -> float:
    """Return a gamma above 0 and at most 1."""
    gamma = check_number(_named(scheduler, "gamma"), scheduler.gamma, open_minimum=True)
    if gamma > 1.0:
        raise ValueError(
            f"{_named(scheduler, 'gamma')} is {gamma!r}: the rate grows without end, beyond every "
            "float; construct CyclicalOptimizer(optimizer, Schedule(name, [Phase(base_gamma=..., "
            "window='constant', steps=...), ...])) with the steps of the run, then call "
            "set_iteration with the run's step"
        )
    return gamma


def _lower_end(scheduler: Any, low: float) -> tuple[float, float]:
    """Return eta_min as multiples of the bounds, where ``low`` is the lower bound."""
    eta_min = _number(scheduler, "eta_min")
    return (eta_min / low if low else 1.0, 0.0)
