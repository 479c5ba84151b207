"""The policies: functions that return schedules, and POLICIES, those that go by name.

Each policy arranges phases. The formula of the phases is in ``phase.py``; no policy has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from clr_optim.checks import LAST_STEP, check_choice, check_int, check_number
from clr_optim.schedule.curve import marked_phases
from clr_optim.schedule.phase import BOTTOM, TOP, WINDOWS, Phase, ScaleFn, hold
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
        gamma=_check_gamma(gamma),
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
    gamma = _check_gamma(gamma)
    return _cyclic(
        "exp_range_bounds", step_size_up, step_size_down, window, base_lr, max_lr,
        gamma=gamma, base_gamma=gamma,
    )  # fmt: skip


#: The policies that an optimizer and the command take by name.
POLICIES: Mapping[str, Callable[..., Schedule]] = {
    policy.__name__: policy for policy in (triangular, triangular2, exp_range, exp_range_bounds)
}


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
    return Schedule("exp", [hold(base_gamma=_check_gamma(gamma), **_both_bounds(lr))])


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


def sequence(parts: Sequence[tuple[Schedule, int | None]]) -> Schedule:
    """Run schedules one after the other, each for a number of steps.

    Each part counts steps and cycles from its own start, as in the code of the paper. The last part
    goes on after its steps, which may be ``None``.

    Args:
        parts: ``[(schedule, steps), …]``, at least one, ``steps`` integers >= 1.

    Raises:
        TypeError, ValueError: naming the part and what would be right.

    Example:
        The paper's Table 2:

        >>> table2 = sequence([
        ...     (triangular2(2000, base_lr=0.001, max_lr=0.005), 16_000),
        ...     (triangular2(1000, base_lr=0.0001, max_lr=0.0005), 6_000),
        ...     (triangular2(500, base_lr=0.00001, max_lr=0.00005), 3_000),
        ... ])
        >>> table2([2_000, 17_000, 22_500]).tolist()
        [0.005, 0.0005, 5e-05]
    """
    if isinstance(parts, (str, bytes)) or not isinstance(parts, Sequence):
        raise TypeError(f"parts must be a list of (schedule, steps) pairs, got {parts!r}")
    if not parts:
        raise ValueError("parts is empty: give at least one (schedule, steps) pair")
    phases: list[Phase] = []
    for i, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise TypeError(f"parts[{i}] must be a pair (schedule, steps), got {part!r}")
        schedule, steps = part
        if not isinstance(schedule, Schedule):
            raise TypeError(f"parts[{i}][0] must be a Schedule, got {schedule!r}")
        last = i + 1 == len(parts)
        if steps is None and not last:
            raise ValueError(
                f"parts[{i}] has steps=None, so that parts[{i + 1}] would never begin: "
                "give steps to all parts but the last"
            )
        left = None if steps is None else check_int(f"parts[{i}][1]", steps, minimum=1)
        if last and len(schedule.phases) > 1:
            phases += marked_phases(
                schedule
            )  # all phases, since the last part goes on after its steps
            break
        for j, phase in enumerate(marked_phases(schedule)):
            if left == 0:
                break
            length = phase.steps if j + 1 < len(schedule.phases) else None
            if left is not None:
                length = left if length is None else min(length, left)
                left -= length
            phases.append(replace(phase, steps=length))
    return Schedule("sequence", phases)


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


def _check_gamma(gamma: object) -> float:
    return check_number("gamma", gamma, open_minimum=True, maximum=1.0)


def _both_bounds(lr: float | None) -> dict[str, Any]:
    """Return both bounds of a phase of one rate; None leaves them to the groups."""
    lr = None if lr is None else check_number("lr", lr)
    return {"base_lr": lr, "max_lr": lr}
