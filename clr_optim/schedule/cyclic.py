"""Policies that cycle without end. Each arranges phases; the formula is in ``phase.py``."""

from __future__ import annotations

from typing import Any

from clr_optim.checks import check_choice, check_int, check_number
from clr_optim.schedule.phase import WINDOWS, Phase, ScaleFn
from clr_optim.schedule.schedule import Schedule

# Warm restarts have a phase per period: so many phases reach beyond the last step of an int64.
_MAX_PHASES = 62


def triangular(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
    scale_fn: ScaleFn | None = None,
    scale_mode: str = "cycle",
) -> Schedule:
    """Cycle between ``base_lr`` and ``max_lr`` without end.

    Args:
        step_size_up: steps of the rising half, an integer >= 0.
        step_size_down: steps of the falling half, ``step_size_up`` if ``None``; not both 0.
        window: ``"triangle"``, ``"welch"`` (parabolic) or ``"hann"`` (sinusoidal).
        base_lr, max_lr: absolute bounds, both or neither; neither takes each group's bounds.
        scale_fn, scale_mode: as in :class:`torch.optim.lr_scheduler.CyclicLR`. The amplitude is
            multiplied by ``scale_fn(cycle)``, with cycles counted from 1, or by ``scale_fn(step)``
            for ``scale_mode="iterations"``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> triangular(2)([0, 1, 2, 3, 4, 5], base_lr=1.0, max_lr=3.0).tolist()
        [1.0, 2.0, 3.0, 2.0, 1.0, 2.0]
    """
    return _cyclic(
        "triangular", step_size_up, step_size_down, window, base_lr, max_lr,
        scale_fn=scale_fn, scale_mode=scale_mode,
    )  # fmt: skip


def triangular2(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
) -> Schedule:
    """Cycle as :func:`triangular`, and halve the amplitude after each cycle.

    Args:
        step_size_up, step_size_down, window, base_lr, max_lr: as in :func:`triangular`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> triangular2(1)([1, 3, 5], base_lr=0.0, max_lr=1.0).tolist()
        [1.0, 0.5, 0.25]
    """
    return _cyclic(
        "triangular2", step_size_up, step_size_down, window, base_lr, max_lr, cycle_gamma=0.5
    )


def exp_range(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    gamma: float = 0.99994,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
) -> Schedule:
    """Cycle as :func:`triangular`, and multiply the amplitude by gamma^step.

    The upper bound falls towards ``base_lr``, as in :class:`torch.optim.lr_scheduler.CyclicLR`. In
    the words of the paper both bounds fall: use :func:`exp_range_bounds`.

    Args:
        gamma: factor per step, in (0, 1]; the paper's value is 0.99994.
        step_size_up, step_size_down, window, base_lr, max_lr: as in :func:`triangular`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.1.

    Example:
        >>> exp_range(1, gamma=0.5)([1, 3], base_lr=0.0, max_lr=1.0).tolist()
        [0.5, 0.125]
    """
    return _cyclic(
        "exp_range", step_size_up, step_size_down, window, base_lr, max_lr,
        gamma=check_gamma(gamma),
    )  # fmt: skip


def exp_range_bounds(
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    *,
    gamma: float = 0.99994,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
) -> Schedule:
    """Cycle as :func:`triangular`, and multiply both bounds by gamma^step.

    The paper says so: "each boundary value declines by an exponential factor of gamma^iteration".
    Its figures agree. torch reads the paper as :func:`exp_range`.

    Args:
        gamma: factor per step, in (0, 1]; the paper's value is 0.99994.
        step_size_up, step_size_down, window, base_lr, max_lr: as in :func:`triangular`.

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
        gamma=gamma, base_gamma=gamma,
    )  # fmt: skip


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
    period = check_int("period", period, minimum=1)
    multiplier = check_int("period_multiplier", period_multiplier, minimum=1)
    lengths = [period]
    while multiplier > 1 and len(lengths) < _MAX_PHASES and sum(lengths) < 2**62:
        lengths.append(lengths[-1] * multiplier)
    phases = [
        Phase(
            step_size_up=0,
            step_size_down=length,
            window="hann",
            steps=None if i + 1 == len(lengths) else length,
            base_lr=base_lr,
            max_lr=max_lr,
        )
        for i, length in enumerate(lengths)
    ]
    return Schedule("warm_restarts", phases)


def _cyclic(
    name: str,
    step_size_up: int,
    step_size_down: int | None,
    window: str,
    base_lr: float | None,
    max_lr: float | None,
    **settings: Any,
) -> Schedule:
    """Return a schedule of one endless phase."""
    check_choice("window", window, WINDOWS)
    phase = Phase(
        step_size_up=step_size_up,
        step_size_down=step_size_down,
        window=window,
        base_lr=base_lr,
        max_lr=max_lr,
        **settings,
    )
    return Schedule(name, [phase])


def check_gamma(gamma: object) -> float:
    """Return a factor per step, in (0, 1]."""
    return check_number("gamma", gamma, open_minimum=True, maximum=1.0)
