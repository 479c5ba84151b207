"""Policies that cycle without end. Each arranges phases; the formula is in ``phase.py``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clr_optim.checks import LAST_STEP, check_choice, check_int
from clr_optim.schedule.parts import check_gamma, stable_decay, warmed_up
from clr_optim.schedule.phase import WINDOWS, Phase, ScaleFn
from clr_optim.schedule.registry import POLICIES, policy
from clr_optim.schedule.schedule import Schedule

# Growing cycles have a phase each: so many phases reach beyond the last step of an int64.
_MAX_PHASES = 62


@policy
def triangular(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
    scale_fn: ScaleFn | None = None,
    scale_mode: str = "cycle",
    period_multiplier: int = 1,
) -> Schedule:
    """Cycle between ``base_lr`` and ``max_lr`` without end.

    Args:
        step_size_up: steps of the rising half, an integer >= 0.
        step_size_down: steps of the falling half, ``step_size_up`` if ``None``; not both 0.
        window: ``"triangle"``, ``"welch"`` (parabolic), ``"hann"`` (sinusoidal) or ``"sqrt"``
            (1 − √(1 − x)).
        base_lr, max_lr: absolute bounds, both or neither; neither takes each group's bounds.
        scale_fn, scale_mode: as in :class:`torch.optim.lr_scheduler.CyclicLR`. The amplitude is
            multiplied by ``scale_fn(cycle)``, with cycles counted from 1, or by ``scale_fn(step)``
            for ``scale_mode="iterations"``.
        period_multiplier: the length of each cycle divided by the length of the cycle before, an
            integer >= 1. With a multiplier above 1, at most 62 cycles grow (they reach beyond step
            2**62); the last one then repeats. If cycles double, one run shows the accuracy that
            1, 3, 7, 15, ... first cycles reach (arXiv 2206.00832).

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> triangular(2)([0, 1, 2, 3, 4, 5], base_lr=1.0, max_lr=3.0).tolist()
        [1.0, 2.0, 3.0, 2.0, 1.0, 2.0]
    """
    return _cyclic(
        "triangular", step_size_up, step_size_down, window, base_lr, max_lr, period_multiplier,
        scale_fn=scale_fn, scale_mode=scale_mode,
    )  # fmt: skip


@policy
def triangular2(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
    period_multiplier: int = 1,
) -> Schedule:
    """Cycle as :func:`triangular`, and halve the amplitude after each cycle.

    Args:
        step_size_up, step_size_down, window, base_lr, max_lr, period_multiplier: as in
            :func:`triangular`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> triangular2(1)([1, 3, 5], base_lr=0.0, max_lr=1.0).tolist()
        [1.0, 0.5, 0.25]
    """
    return _cyclic(
        "triangular2",
        step_size_up,
        step_size_down,
        window,
        base_lr,
        max_lr,
        period_multiplier,
        cycle_gamma=0.5,
    )


@policy
def exp_range(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    gamma: float = 0.99994,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
    period_multiplier: int = 1,
) -> Schedule:
    """Cycle as :func:`triangular`, and multiply the amplitude by gamma^step.

    The upper bound falls towards ``base_lr``, as in :class:`torch.optim.lr_scheduler.CyclicLR`. In
    the words of the paper both bounds fall: use :func:`exp_range_bounds`.

    Args:
        gamma: factor per step, in (0, 1]; the paper's value is 0.99994.
        step_size_up, step_size_down, window, base_lr, max_lr, period_multiplier: as in
            :func:`triangular`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> exp_range(1, gamma=0.5)([1, 3], base_lr=0.0, max_lr=1.0).tolist()
        [0.5, 0.125]
    """
    return _cyclic(
        "exp_range", step_size_up, step_size_down, window, base_lr, max_lr, period_multiplier,
        gamma=check_gamma(gamma),
    )  # fmt: skip


@policy
def exp_range_bounds(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    gamma: float = 0.99994,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
    period_multiplier: int = 1,
) -> Schedule:
    """Cycle as :func:`triangular`, and multiply both bounds by gamma^step.

    The paper says so: "each boundary value declines by an exponential factor of gamma^iteration".
    Its figures agree. torch reads the paper as :func:`exp_range`.

    Args:
        gamma: factor per step, in (0, 1]; the paper's value is 0.99994.
        step_size_up, step_size_down, window, base_lr, max_lr, period_multiplier: as in
            :func:`triangular`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> exp_range_bounds(1, gamma=0.5)([0, 1, 2, 3], base_lr=1.0, max_lr=2.0).tolist()
        [1.0, 1.0, 0.25, 0.25]
    """
    gamma = check_gamma(gamma)
    return _cyclic(
        "exp_range_bounds", step_size_up, step_size_down, window, base_lr, max_lr,
        period_multiplier, gamma=gamma, base_gamma=gamma,
    )  # fmt: skip


@policy
def warm_restarts(
    period: int,
    *,
    period_multiplier: int = 1,
    base_lr: float | None = None,
    max_lr: float | None = None,
) -> Schedule:
    """Lower the rate from ``max_lr`` to ``base_lr`` along half a cosine, then start again.

    Args:
        period: steps of the first fall, an integer >= 1.
        period_multiplier: the length of each fall divided by the length of the fall before, an
            integer >= 1. With a multiplier above 1, at most 62 falls grow (they reach beyond step
            2**62); the last one then repeats.
        base_lr, max_lr: absolute bounds, both or neither; neither takes each group's bounds.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: I. Loshchilov, F. Hutter, *SGDR*, arXiv 1608.03983; as
    :class:`torch.optim.lr_scheduler.CosineAnnealingWarmRestarts` with ``T_0``, ``T_mult``.

    Example:
        >>> warm_restarts(2)([0, 1, 2, 3]).round(12).tolist()
        [1.0, 0.5, 1.0, 0.5]
    """
    return _cyclic(
        "warm_restarts", 0, check_int("period", period, minimum=1), "hann", base_lr, max_lr,
        period_multiplier,
    )  # fmt: skip


@policy
def wsd_cycles(
    warmup: int,
    stable: int,
    decay: int,
    *,
    shape: str = "linear",
    end: float = 0.0,
    max_lr: float | None = None,
    period_multiplier: int = 1,
) -> Schedule:
    """Warm up, then repeat: stay at the peak, decay, and return to the peak.

    Each period is ``stable`` steps at ``max_lr`` and a fall of ``decay`` steps to ``end · max_lr``,
    as in :func:`wsd`. The next period begins at the peak again. So each period's end gives a model
    that has decayed, and the run goes on from there. A period is a cycle; the warm-up is none.

    Args:
        warmup, stable, decay, shape, end, max_lr: as in :func:`wsd`.
        period_multiplier: as in :func:`triangular`, for both parts of a period.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: K. Wen et al., *Understanding Warmup-Stable-Decay Learning Rates*, arXiv 2410.05192,
    where the schedule is called WSD-S.

    Example:
        >>> wsd_cycles(0, 2, 2)([0, 1, 2, 3, 4, 5, 6, 7]).tolist()
        [1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5]
    """
    phase = stable_decay(stable, decay, shape, end, max_lr)
    multiplier = check_int("period_multiplier", period_multiplier, minimum=1)
    return warmed_up(Schedule("wsd_cycles", _growing(phase, multiplier)), warmup)


def _cyclic(
    name: str,
    step_size_up: int,
    step_size_down: int | None,
    window: str,
    base_lr: float | None,
    max_lr: float | None,
    period_multiplier: int,
    **settings: Any,
) -> Schedule:
    """Return a schedule of one endless phase, or of a phase per cycle if cycles grow."""
    check_choice("window", window, WINDOWS)
    phase = Phase(
        step_size_up=step_size_up,
        step_size_down=step_size_down,
        window=window,
        base_lr=base_lr,
        max_lr=max_lr,
        **settings,
    )
    multiplier = check_int("period_multiplier", period_multiplier, minimum=1)
    return Schedule(name, _growing(phase, multiplier))


def _growing(phase: Phase, multiplier: int) -> list[Phase]:
    """Return a phase per cycle, each cycle ``multiplier`` times as long as the one before."""
    phases: list[Phase] = []
    start = 0
    counts_cycles = phase.cycle_gamma != 1.0 or phase.scale_fn is not None
    counts_steps = counts_cycles or (phase.gamma, phase.base_gamma) != (1.0, 1.0)
    while (
        multiplier > 1
        and len(phases) + 1 < _MAX_PHASES
        and start + phase.period < 2**62
        and multiplier * phase.period <= LAST_STEP
    ):
        phases.append(replace(phase, steps=phase.period))
        start += phase.period
        phase = replace(
            phase,
            step_size_up=multiplier * phase.step_size_up,
            step_size_top=multiplier * phase.step_size_top,
            step_size_down=multiplier * (phase.step_size_down or 0),
            first_step=start if counts_steps else 0,
            first_cycle=len(phases) if counts_cycles else 0,
        )
    return [*phases, phase]


# doctest finds a decorated function here.
__test__ = {name: made for name, made in POLICIES.items() if made.__module__ == __name__}
