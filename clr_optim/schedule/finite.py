"""Policies that fall, rise or stay. Each arranges phases; the formula is in ``phase.py``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from clr_optim.checks import LAST_STEP, check_choice, check_int, check_number
from clr_optim.schedule.cyclic import check_gamma
from clr_optim.schedule.phase import BOTTOM, TOP, WINDOWS, Phase, hold
from clr_optim.schedule.schedule import Schedule


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
    return Schedule("fixed", [hold(**_both_bounds(lr))])


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
    return Schedule("exp", [hold(base_gamma=check_gamma(gamma), **_both_bounds(lr))])


def one_cycle(
    total_steps: int,
    *,
    pct_start: float = 0.45,
    final_div_factor: float = 1e4,
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
        final_div_factor: ``base_lr`` divided by the last rate, >= 1.
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
    bounds: dict[str, Any] = {"base_lr": base_lr, "max_lr": max_lr}
    end = (1.0 / final_div_factor, 0.0)
    phases = [Phase(step_size_up=half, window=window, steps=2 * half, **bounds)]
    if annealing:
        phases.append(
            Phase(
                step_size_up=0,
                step_size_down=annealing,
                window=window,
                steps=annealing,
                lower=end,
                upper=BOTTOM,
                cycle_momentum=False,
                **bounds,
            )
        )
    phases.append(hold(end, **bounds))
    return Schedule("one_cycle", phases)


def ramp(
    num_steps: int,
    start_lr: float | None = None,
    end_lr: float | None = None,
    *,
    mode: str = "linear",
    ratio: float | None = None,
) -> Schedule:
    """Raise the rate once, from step 0 to step ``num_steps − 1``: the ramp of the LR range test.

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
    if mode == "linear":
        rise = Phase(step_size_up=last, step_size_down=0, steps=last, **bounds)
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
        rise = hold(BOTTOM, steps=last, base_gamma=ratio ** (1.0 / last), **bounds)
    top = replace(hold(TOP, **bounds), cycle_momentum=mode == "linear")
    return Schedule("ramp", [rise, top])


def _both_bounds(lr: float | None) -> dict[str, Any]:
    """Return both bounds of a phase of one rate; None leaves them to the groups."""
    lr = None if lr is None else check_number("lr", lr)
    return {"base_lr": lr, "max_lr": lr}
