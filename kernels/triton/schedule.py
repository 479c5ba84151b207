"""The learning rate on the device: the formula of :mod:`clr_optim.schedule` over a table of phases.

As on the host, steps are int64 and all other values float64. Only the last rounding, to the
tensors' arithmetic type, differs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from clr_optim.schedule import Phase, Schedule, fixed
from clr_optim.schedule.timeline import Span

__all__ = [
    "FLOATS", "FOLLOWED", "INTS", "cycle_ends", "follow_schedules", "held_tables", "phase_tables",
    "rate_and_momentum",
]  # fmt: skip

#: Columns of the two tables, a row per phase. The last four integers tell the cycle ends: those
#: before the phase, the steps of the first cycle before it, the steps of a cycle, and at most how
#: many cycles end in the phase.
INTS = (
    "start", "step_size_up", "period", "window", "step_size_down", "stride", "first_step",
    "first_cycle", "ended", "cycle_start", "cycle_steps", "most_ends",
)  # fmt: skip
FLOATS = (
    "log2_gamma", "log2_cycle_gamma", "log2_base_gamma", "has_bounds", "base_lr", "max_lr",
    "lower_base", "lower_max", "upper_base", "upper_max", "cycle_momentum", "power_less_1",
    "log2_base_drop",
)  # fmt: skip

# The numbers of the windows; both flat ones are 0.
_WINDOWS = {
    "constant": 0, "boxcar": 0, "triangle": 1, "welch": 2, "hann": 3, "sqrt": 4, "inverse": 5,
}  # fmt: skip

#: Columns of the table of settings that follow schedules, int64: the group's number, the column of
#: the groups' table, and the first phase and the number of phases of the schedule.
FOLLOWED = ("group", "column", "first", "phases")

_N_INTS: tl.constexpr = tl.constexpr(len(INTS))
_N_FLOATS: tl.constexpr = tl.constexpr(len(FLOATS))
_N_FOLLOWED: tl.constexpr = tl.constexpr(len(FOLLOWED))

_LARGEST: tl.constexpr = tl.constexpr(sys.float_info.max)


def phase_tables(schedule: Schedule) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the phases as ``(phases, len(INTS))`` int64 and ``(phases, len(FLOATS))`` float64.

    Raises:
        ValueError: if the schedule has a ``scale_fn``, which only the host can call.
    """
    if schedule.scale_fn is not None:
        raise ValueError(f"schedule {schedule.name!r} has a scale_fn: evaluate it on the host")
    return _tables(schedule, schedule.phases)


def held_tables(schedule: Schedule) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the tables of a schedule whose cycles end as these, and whose rate is ``max_lr``.

    The host evaluates the rates of the steps that read these tables.
    """
    return _tables(schedule, fixed().phases * len(schedule.phases))


def _tables(
    schedule: Schedule, phases: Sequence[Phase]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the tables of these phases, with the starts and the cycle ends of a schedule."""
    timeline = schedule._timeline
    ints = [
        (
            start, phase.step_size_up, phase.period, _WINDOWS[phase.window], phase.step_size_down,
            phase.stride, phase.first_step, phase.first_cycle, ended, *_ends(span),
        )
        for phase, start, ended, span in zip(
            phases, timeline.starts, timeline.ended, timeline.spans, strict=True
        )
    ]  # fmt: skip
    floats = [_floats(phase) for phase in phases]
    return np.array(ints, dtype=np.int64), np.array(floats, dtype=np.float64)


def _ends(span: Span) -> tuple[int, int, int]:
    """Return the columns from ``cycle_start`` on."""
    if span.steps == 0:
        return 0, 1, 0
    return span.start, span.steps, np.iinfo(np.int64).max if span.repeats else 1


def _floats(phase: Phase) -> tuple[float, ...]:
    return (
        math.log2(phase.gamma),
        math.log2(phase.cycle_gamma),
        math.log2(phase.base_gamma),
        float(phase.has_bounds),
        phase.base_lr or 0.0,
        phase.max_lr or 0.0,
        *phase.lower,
        *phase.upper,
        float(phase.cycle_momentum),
        phase.power - 1.0,
        math.log2(phase.base_drop),
    )


@triton.jit
def _hann(x):
    # sin²(πx/2) for x in [0, 1] by the Taylor series of the sine. The first omitted term is below
    # 1e-18. The device's own cosine would need a stack.
    h = x * 1.5707963267948966
    q = h * h
    s = -1.9572941063391263e-20
    s = s * q + 8.22063524662433e-18
    s = s * q + -2.8114572543455206e-15
    s = s * q + 7.647163731819816e-13
    s = s * q + -1.6059043836821613e-10
    s = s * q + 2.505210838544172e-08
    s = s * q + -2.7557319223985893e-06
    s = s * q + 0.0001984126984126984
    s = s * q + -0.008333333333333333
    s = s * q + 0.16666666666666666
    s = h - h * q * s
    return s * s


@triton.jit
def _phase_at(ints, phases, step):
    index = 0
    for i in range(1, phases):
        index = tl.where(step >= tl.load(ints + i * _N_INTS), i, index)
    return index


@triton.jit
def cycle_ends(ints, phases, step):
    """Return how many cycles have ended up to a step, as ``Timeline.ends`` on the host.

    Args:
        ints, phases, step: as for :func:`rate_and_momentum`.
    """
    ints += _phase_at(ints, phases, step) * _N_INTS
    done = (step - tl.load(ints) + tl.load(ints + 9)) // tl.load(ints + 10)
    return tl.load(ints + 8) + tl.minimum(done, tl.load(ints + 11))


@triton.jit
def rate_and_momentum(ints, floats, phases, step, base_lr, max_lr, base_momentum, max_momentum):
    """Return ``(learning rate, momentum)`` at a step, both float64.

    Args:
        ints, floats: pointers to the tables of :func:`phase_tables`.
        phases: the number of phases.
        step: int64, counted from 0.
        base_lr, max_lr, base_momentum, max_momentum: the group's bounds, float64.
    """
    index = _phase_at(ints, phases, step)
    ints += index * _N_INTS
    floats += index * _N_FLOATS
    local = step - tl.load(ints)
    up = tl.load(ints + 1)
    period = tl.load(ints + 2)
    window = tl.load(ints + 3)
    down = tl.load(ints + 4).to(tl.float64)
    stride = tl.load(ints + 5)
    local = local // stride * stride

    # A phase without a cycle stays at its top. Here its divisors only must not be 0.
    cycle = local // tl.maximum(period, 1)
    offset = local - cycle * period
    rising = offset.to(tl.float64) / tl.maximum(up, 1).to(tl.float64)
    endless = window == 5
    above = tl.where(endless, down, (period - offset).to(tl.float64))
    falling = above / tl.where(endless, down + offset.to(tl.float64), tl.maximum(down, 1.0))
    x = tl.where(offset < up, rising, tl.minimum(falling, 1.0))
    w = tl.where(window == 2, x * (2.0 - x), x)
    w = tl.where(window == 3, _hann(x), w)
    w = tl.where(window == 4, x / (1.0 + tl.sqrt(1.0 - x)), w)
    w = tl.where(window == 0, 1.0, w)
    cycle = tl.where(period == 0, 0, cycle)

    time = (local + tl.load(ints + 6)).to(tl.float64)
    cycle += tl.load(ints + 7)
    decay = time * tl.load(floats) + cycle.to(tl.float64) * tl.load(floats + 1)
    # w^power is w·w^(power − 1), which is w if the power is 1, and 0 if w is 0.
    decay += tl.load(floats + 11) * tl.log2(tl.maximum(w, 1e-200))
    amplitude = w * tl.exp2(decay)
    own = tl.load(floats + 3) != 0.0
    base_lr = tl.where(own, tl.load(floats + 4), base_lr)
    max_lr = tl.where(own, tl.load(floats + 5), max_lr)
    # Hold each term at the largest float, as the host does: infinity times 0 is NaN. The difference
    # of the ends needs no limit, since both have the same sign.
    lower = tl.minimum(tl.load(floats + 6) * base_lr + tl.load(floats + 7) * max_lr, _LARGEST)
    upper = tl.minimum(tl.load(floats + 8) * base_lr + tl.load(floats + 9) * max_lr, _LARGEST)
    fall = time * tl.load(floats + 2) + (1.0 - x) * tl.load(floats + 12)
    growth = tl.minimum(tl.exp2(fall), _LARGEST)
    rate = tl.minimum(growth * lower, _LARGEST) + (upper - lower) * amplitude
    rate = tl.minimum(rate, _LARGEST)
    cycles = tl.load(floats + 10) != 0.0
    momentum = max_momentum - (max_momentum - base_momentum) * amplitude
    return rate, tl.where(cycles, momentum, max_momentum)


@triton.jit(
    do_not_specialize=["width"],
    do_not_specialize_on_alignment=["followed", "ints", "floats", "groups", "control"],
)
def follow_schedules(followed, ints, floats, groups, width, control):
    """Write a setting that follows a schedule into the groups' table, in each program.

    Args:
        followed: a table with the columns of ``FOLLOWED``, a row per program.
        ints, floats: the tables of :func:`phase_tables` of all schedules, one after the other.
        groups, width, control: as for :func:`~.prepare.prepare`.
    """
    followed += tl.program_id(0) * _N_FOLLOWED
    first = tl.load(followed + 2)
    number, _ = rate_and_momentum(
        ints + first * _N_INTS, floats + first * _N_FLOATS, tl.load(followed + 3).to(tl.int32),
        tl.load(control), 0.0, 0.0, 0.0, 0.0,
    )  # fmt: skip
    tl.store(groups + tl.load(followed) * width + tl.load(followed + 1), number)
