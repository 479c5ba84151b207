"""Policies that fall, rise or stay. Each arranges phases; the formula is in ``phase.py``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from clr_optim.checks import LAST_STEP, check_choice, check_int, check_number
from clr_optim.schedule.parts import both_bounds, check_gamma, stable_decay, warmed_up
from clr_optim.schedule.phase import BOTTOM, TOP, WINDOWS, Phase, hold
from clr_optim.schedule.registry import POLICIES, policy
from clr_optim.schedule.schedule import Schedule


@policy
def fixed(lr: float | None = None) -> Schedule:
    """Keep the rate constant.

    Args:
        lr: the rate, >= 0; ``None`` is each group's ``max_lr``.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Example:
        >>> fixed()([0, 10**12], base_lr=0.1, max_lr=0.4).tolist()
        [0.4, 0.4]
    """
    return Schedule("fixed", [hold(**both_bounds("lr", lr))])


@policy
def decay(steps: int, *, base_lr: float | None = None, max_lr: float | None = None) -> Schedule:
    """Lower the rate in a straight line from ``max_lr`` to ``base_lr``, and keep it there.

    The paper compares cycles with this policy: a fall alone does not do what cycles do (Table 1,
    from 0.007 to 0.001 over 4,000 iterations).

    Args:
        steps: length of the fall, an integer >= 1; ``lr(steps)`` is ``base_lr``.
        base_lr, max_lr: absolute bounds, both or neither; neither takes each group's bounds.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, Table 1.

    Example:
        >>> decay(2)([0, 1, 2, 3], base_lr=1.0, max_lr=2.0).tolist()
        [2.0, 1.5, 1.0, 1.0]
    """
    steps = check_int("steps", steps, minimum=1)
    fall = Phase(step_size_up=0, step_size_down=steps, steps=steps, base_lr=base_lr, max_lr=max_lr)
    return Schedule("decay", [fall, hold(BOTTOM, base_lr=base_lr, max_lr=max_lr)])


@policy
def exp(lr: float | None = None, *, gamma: float = 0.99994) -> Schedule:
    """Lower the rate exponentially, to ``lr``·gamma^step.

    Args:
        lr: the rate of step 0, >= 0; ``None`` is each group's ``max_lr``.
        gamma: factor per step, in (0, 1].

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, which compares cycles with this policy.

    Example:
        >>> exp(gamma=0.5)([0, 1, 2], max_lr=2.0).tolist()
        [2.0, 1.0, 0.5]
    """
    return Schedule("exp", [hold(base_gamma=check_gamma(gamma), **both_bounds("lr", lr))])


@policy
def linear(steps: int, *, end: float = 0.0, max_lr: float | None = None) -> Schedule:
    """Lower the rate in a straight line from ``max_lr`` to ``end · max_lr``, and keep it there.

    ``lr(t) = max_lr·(end + (1 − end)·(1 − t/steps))``. With a warm-up, as
    ``linear(steps).with_warmup(warmup)``, this is the schedule of most fine-tuning.

    Args:
        steps: length of the fall, an integer >= 1; ``lr(steps)`` is ``end · max_lr``. The only
            cycle ends after these steps.
        end: the last rate divided by ``max_lr``, in [0, 1].
        max_lr: the peak, absolute; ``None`` is each group's ``max_lr``. The lower bound is unused.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: ``get_linear_schedule_with_warmup`` of transformers;
    :class:`torch.optim.lr_scheduler.LinearLR` with ``start_factor=1``.

    Example:
        >>> linear(4)([0, 1, 2, 3, 4, 5]).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return _fall("linear", steps, end, max_lr)


@policy
def cosine(steps: int, *, end: float = 0.0, max_lr: float | None = None) -> Schedule:
    """Lower the rate along half a cosine from ``max_lr`` to ``end · max_lr``, and keep it there.

    ``lr(t) = max_lr·(end + (1 − end)·(1 + cos(π·t/steps))/2)``. torch's ``CosineAnnealingLR`` rises
    again after ``T_max``; :func:`warm_restarts` begins anew.

    Args:
        steps, end, max_lr: as in :func:`linear`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: I. Loshchilov, F. Hutter, *SGDR*, arXiv 1608.03983, without its restarts;
    ``get_cosine_schedule_with_warmup`` of transformers.

    Example:
        >>> cosine(4, end=0.5)([0, 2, 4, 5]).round(12).tolist()
        [1.0, 0.75, 0.5, 0.5]
    """
    return _fall("cosine", steps, end, max_lr, window="hann")


@policy
def polynomial(
    steps: int, power: float = 1.0, *, end: float = 0.0, max_lr: float | None = None
) -> Schedule:
    """Lower the rate by a power of the steps left, from ``max_lr`` to ``end · max_lr``.

    ``lr(t) = max_lr·(end + (1 − end)·(1 − t/steps)^power)``; from ``steps`` on, ``end · max_lr``.

    Args:
        steps, end, max_lr: as in :func:`linear`.
        power: the exponent, above 0. 0.9 is common for segmentation.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: :class:`torch.optim.lr_scheduler.PolynomialLR`;
    ``get_polynomial_decay_schedule_with_warmup`` of transformers.

    Example:
        >>> polynomial(4, 2)([0, 1, 2, 3, 4, 5]).tolist()
        [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """
    return _fall("polynomial", steps, end, max_lr, power=power)


@policy
def inverse_sqrt(
    warmup: int, *, timescale: int | None = None, max_lr: float | None = None
) -> Schedule:
    """Warm up in a straight line, then fall with the inverse square root of the step.

    ``lr(t) = max_lr·t/warmup`` up to step ``warmup``, then
    ``max_lr·√(timescale/(timescale + t − warmup))``, without end: by default
    ``max_lr·√(warmup/t)``.

    Args:
        warmup: length of the warm-up in steps, an integer >= 0.
        timescale: steps after the warm-up until the rate is ``max_lr/√2``, an integer >= 1.
            ``None`` is ``warmup``, which must then be above 0.
        max_lr: the peak, absolute; ``None`` is each group's ``max_lr``. The lower bound is unused.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: A. Vaswani et al., *Attention Is All You Need*, arXiv 1706.03762, section 5.3;
    ``get_inverse_sqrt_schedule`` of transformers.

    Example:
        >>> inverse_sqrt(4)([0, 2, 4, 16, 64]).tolist()
        [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    warmup = check_int("warmup", warmup, minimum=0)
    if timescale is None:
        if warmup == 0:
            raise ValueError(
                "warmup=0 and timescale=None: the fall needs a length; give a warmup above 0, or a "
                "timescale such as 10_000"
            )
        timescale = warmup
    fall = Phase(
        step_size_up=0,
        step_size_down=check_int("timescale", timescale, minimum=1, maximum=LAST_STEP),
        window="inverse",
        power=0.5,
        lower=(0.0, 0.0),
        **both_bounds("max_lr", max_lr),
    )
    return warmed_up(Schedule("inverse_sqrt", [fall]), warmup)


@policy
def wsd(
    warmup: int,
    stable: int,
    decay: int,
    *,
    shape: str = "linear",
    end: float = 0.0,
    max_lr: float | None = None,
) -> Schedule:
    """Warm up, stay at the peak, then decay: a schedule whose length may be decided late.

    The rate rises in a straight line from 0 to ``max_lr`` for ``warmup`` steps, stays there for
    ``stable`` steps and falls to ``end · max_lr`` for ``decay`` steps. The last rate stays. With
    the progress ``p`` of the decay from 0 to 1, the rate divided by ``max_lr`` is

    - ``end + (1 − end)·(1 − p)`` for ``shape="linear"``,
    - ``end + (1 − end)·(1 + cos(π·p))/2`` for ``shape="cosine"``,
    - ``end + (1 − end)·(1 − √p)`` for ``shape="sqrt"``,
    - ``end^p`` for ``shape="exp"``, which needs an ``end`` above 0.

    The only cycle is the stable part with the decay, and ends after the last step. The warm-up is
    no cycle. :func:`wsd_cycles` returns to the peak.

    Args:
        warmup: steps of the warm-up, an integer >= 0.
        stable: steps at the peak, an integer >= 0.
        decay: steps of the decay, an integer >= 1.
        shape: ``"linear"``, ``"cosine"``, ``"sqrt"`` or ``"exp"``.
        end: the last rate divided by ``max_lr``, in [0, 1].
        max_lr: the peak, absolute; ``None`` is each group's ``max_lr``. The lower bound is unused.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: S. Hu et al., *MiniCPM*, arXiv 2404.06395; the shape ``"sqrt"`` by A. Hägele et al.,
    arXiv 2405.18392.

    Example:
        >>> wsd(2, 2, 2)([0, 1, 2, 3, 4, 5, 6, 7]).tolist()
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
        >>> wsd(0, 1, 2, shape="exp", end=0.25)([0, 1, 2, 3]).tolist()
        [1.0, 1.0, 0.5, 0.25]
    """
    phase = stable_decay(stable, decay, shape, end, max_lr)
    rest = hold((0.0, float(end)), **both_bounds("max_lr", max_lr))
    schedule = Schedule("wsd", [replace(phase, steps=phase.period), rest])
    return warmed_up(schedule, warmup)


@policy
def one_cycle(
    total_steps: int,
    *,
    pct_start: float = 0.45,
    final_div_factor: float = 1e4,
    div_factor: float | None = None,
    window: str = "triangle",
    base_lr: float | None = None,
    max_lr: float | None = None,
) -> Schedule:
    """Run one cycle, then anneal far below it.

    The rate rises from ``base_lr`` to ``max_lr`` for ``pct_start`` of the steps and falls back for
    as many. In the remaining steps the rate falls to ``base_lr / final_div_factor``. The last step,
    ``total_steps − 1``, uses that rate, and so does any step after it. Momentum mirrors the cycle
    and stays at its maximum during the annealing. The whole schedule is one cycle, which ends after
    ``total_steps`` steps.

    Args:
        total_steps: length of the training in steps, an integer >= 3.
        pct_start: the share of the rising part, in (0, 0.5].
        final_div_factor: the first rate divided by the last rate, >= 1.
        div_factor: ``max_lr`` divided by the first rate, >= 1, in place of a ``base_lr``; torch
            takes 25. ``None`` begins at ``base_lr``.
        window, base_lr, max_lr: as in :func:`triangular`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: L. N. Smith, N. Topin, *Super-Convergence*, arXiv 1708.07120.

    Example:
        >>> one_cycle(6, pct_start=0.34, final_div_factor=10)(
        ...     [0, 1, 2, 3, 4, 5], base_lr=1.0, max_lr=3.0).tolist()
        [1.0, 2.0, 3.0, 2.0, 1.0, 0.1]
    """
    total_steps = check_int("total_steps", total_steps, minimum=3, maximum=LAST_STEP)
    pct_start = check_number("pct_start", pct_start, open_minimum=True, maximum=0.5)
    final_div_factor = check_number("final_div_factor", final_div_factor, minimum=1.0)
    check_choice("window", window, WINDOWS)
    half = min(max(1, round(pct_start * total_steps)), (total_steps - 1) // 2)
    annealing = total_steps - 1 - 2 * half
    if div_factor is not None:
        if base_lr is not None:
            raise ValueError(
                f"base_lr={base_lr!r} and div_factor={div_factor!r}: both give the first rate; "
                "leave one of them out"
            )
        low = (0.0, 1.0 / check_number("div_factor", div_factor, minimum=1.0))
        bounds = both_bounds("max_lr", max_lr)
    elif base_lr is None and max_lr is not None:
        raise ValueError(
            f"base_lr=None and max_lr={max_lr!r}: give base_lr too, or div_factor=25 as OneCycleLR "
            "has it"
        )
    else:
        low, bounds = BOTTOM, {"base_lr": base_lr, "max_lr": max_lr}
    end = (low[0] / final_div_factor, low[1] / final_div_factor)
    phases = [Phase(step_size_up=half, window=window, steps=2 * half, lower=low, **bounds)]
    if annealing:
        phases.append(
            Phase(
                step_size_up=0,
                step_size_down=annealing,
                window=window,
                steps=annealing,
                lower=end,
                upper=low,
                cycle_momentum=False,
                **bounds,
            )
        )
    phases.append(hold(end, **bounds))
    return Schedule("one_cycle", phases)


@policy
def ramp(
    num_steps: int,
    start_lr: float | None = None,
    end_lr: float | None = None,
    *,
    mode: str = "linear",
    ratio: float | None = None,
) -> Schedule:
    """Raise the rate once, from step 0 to step ``num_steps − 1``: the ramp of the LR range test.

    The whole ramp is one cycle, which ends after ``num_steps`` steps. For a warm-up, use
    :meth:`Schedule.with_warmup`, which is no cycle.

    Args:
        num_steps: an integer >= 2; the last of these steps, and any later step, uses the upper end.
        start_lr, end_lr: the ends, both or neither; neither takes each group's ``base_lr`` and
            ``max_lr``.
        mode: ``"linear"``, as in the paper, or ``"exponential"`` for searches over decades.
            ``"exponential"`` needs a ``start_lr`` above 0, and keeps momentum at its maximum.
        ratio: each group's ``max_lr`` divided by its ``base_lr``, a number above 1, the same for
            all groups. Only for an exponential ramp between the bounds of groups.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.

    Source: arXiv 1506.01186, section 3.3.

    Example:
        >>> ramp(3, 0.0, 1.0)([0, 1, 2, 3]).tolist()
        [0.0, 0.5, 1.0, 1.0]
        >>> ramp(3, mode="exponential", ratio=16)([0, 1, 2], base_lr=0.5, max_lr=8.0).tolist()
        [0.5, 2.0, 8.0]
    """
    num_steps = check_int("num_steps", num_steps, minimum=2, maximum=LAST_STEP)
    check_choice("mode", mode, ("linear", "exponential"))
    if (start_lr is None) != (end_lr is None):
        raise ValueError(
            f"start_lr={start_lr!r} and end_lr={end_lr!r}: give both ends of the ramp, or neither"
        )
    if start_lr is not None and end_lr is not None:
        start_lr = check_number("start_lr", start_lr, open_minimum=mode == "exponential")
        end_lr = check_number("end_lr", end_lr)
        if end_lr <= start_lr:
            raise ValueError(f"end_lr={end_lr!r} must be above start_lr={start_lr!r}")
    if ratio is not None:
        ratio = check_number("ratio", ratio, minimum=1.0, open_minimum=True)
        if mode == "linear" or start_lr is not None:
            raise ValueError(
                f"ratio={ratio!r} is for exponential ramps between each group's own bounds: leave "
                f"it out with mode={mode!r}, start_lr={start_lr!r}, end_lr={end_lr!r}"
            )
    last = num_steps - 1
    bounds: dict[str, Any] = {"base_lr": start_lr, "max_lr": end_lr}
    cycle: dict[str, Any] = {"cycle_steps": num_steps}
    if mode == "linear":
        rise = Phase(step_size_up=last, step_size_down=0, steps=last, **cycle, **bounds)
    else:
        if start_lr is not None and end_lr is not None:
            ratio = end_lr / start_lr
            if math.isinf(ratio):
                raise ValueError(
                    f"end_lr={end_lr!r} is more times start_lr={start_lr!r} than a float can hold: "
                    "raise start_lr"
                )
        if ratio is None:
            raise ValueError(
                "start_lr=None and end_lr=None: an exponential ramp needs both ends as numbers, "
                "or the ratio of each group's bounds"
            )
        rise = hold(BOTTOM, steps=last, base_gamma=ratio ** (1.0 / last), **cycle, **bounds)
    top = hold(TOP, cycle_start=last, **cycle, **bounds)
    top = replace(top, cycle_momentum=mode == "linear")
    return Schedule("ramp", [rise, top])


def _fall(name: str, steps: int, end: float, max_lr: float | None, **settings: Any) -> Schedule:
    """Return a schedule that falls once from ``max_lr`` to ``end · max_lr``."""
    steps = check_int("steps", steps, minimum=1, maximum=LAST_STEP)
    lower = (0.0, check_number("end", end, maximum=1.0))
    bounds = both_bounds("max_lr", max_lr)
    fall = Phase(
        step_size_up=0, step_size_down=steps, steps=steps, lower=lower, **settings, **bounds
    )
    return Schedule(name, [fall, hold(lower, **bounds)])


# doctest finds a decorated function here.
__test__ = {name: made for name, made in POLICIES.items() if made.__module__ == __name__}
