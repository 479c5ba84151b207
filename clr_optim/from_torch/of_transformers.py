"""Read the functions behind transformers' ``get_*_schedule``, without importing transformers.

Each is a :func:`functools.partial` of a module-level function, known by its name. The phases are
compared with the function at their boundaries, since another version may compute another rate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from clr_optim.from_torch.shapes import straight
from clr_optim.schedule import Phase, Schedule
from clr_optim.schedule.phase import TOP, hold

__all__ = ["known_phases"]

_MODULE = "transformers.optimization"

# A difference between formula and phases beyond rounding.
_ROUNDING = 1e-9


def known_phases(function: Any) -> list[Phase] | None:
    """Return the phases of a function of transformers; None for any other function.

    Args:
        function: what a LambdaLR calls with the step.
    """
    is_partial = isinstance(function, functools.partial)
    inner = function.func if is_partial else function
    read = _READERS.get(getattr(inner, "__name__", ""))
    if read is None or getattr(inner, "__module__", None) != _MODULE:
        return None
    if is_partial and function.args:
        return None
    try:
        phases = read(**(function.keywords if is_partial else {}))
        return phases if phases and _agree(phases, function) else None
    except (ArithmeticError, TypeError, ValueError):
        return None  # settings for which no phase exists


def _agree(phases: list[Phase], function: Callable[[int], float]) -> bool:
    """Return whether phases give the values of a function, in and around each phase."""
    schedule = Schedule("LambdaLR", phases)
    steps = {0, 1, 2, 10**6}
    start = 0
    for phase in phases:
        length = phase.steps or phase.period or 1000
        for part in range(15):
            at = start + round(part * length / 7)
            steps |= {max(at - 1, 0), at, at + 1}
        start += phase.steps or 0
    return all(
        math.isclose(schedule(k), function(k), rel_tol=_ROUNDING, abs_tol=_ROUNDING)
        for k in sorted(steps)
    )


# ---- the functions, with the names of their arguments


def _warm_up(steps: int, rest: list[Phase]) -> list[Phase]:
    return [straight(0.0, 1.0, steps), *rest] if steps else rest


def _constant() -> list[Phase]:
    return [hold(TOP)]


def _constant_with_warmup(*, num_warmup_steps: int) -> list[Phase]:
    return _warm_up(num_warmup_steps, [hold(TOP)])


def _linear(*, num_warmup_steps: int, num_training_steps: int) -> list[Phase]:
    fall = straight(1.0, 0.0, num_training_steps - num_warmup_steps)
    return _warm_up(num_warmup_steps, [fall, hold((0.0, 0.0))])


def _cosine(
    *, num_warmup_steps: int, num_training_steps: int, num_cycles: float, min_lr_rate: float = 0.0
) -> list[Phase] | None:
    """The rate rises again after the training steps, as that of CosineAnnealingLR."""
    half = (num_training_steps - num_warmup_steps) / (2.0 * num_cycles)
    if not half.is_integer():
        return None
    steps, lower = int(half), (0.0, min_lr_rate)
    fall = Phase(step_size_up=0, step_size_down=steps, steps=steps, window="hann", lower=lower)
    return _warm_up(num_warmup_steps, [fall, Phase(step_size_up=steps, window="hann", lower=lower)])


def _hard_restarts(
    *, num_warmup_steps: int, num_training_steps: int, num_cycles: int
) -> list[Phase] | None:
    steps = num_training_steps - num_warmup_steps
    if steps % num_cycles:
        return None
    falls = Phase(step_size_up=0, step_size_down=steps // num_cycles, steps=steps, window="hann",
                  lower=(0.0, 0.0))  # fmt: skip
    return _warm_up(num_warmup_steps, [falls, hold((0.0, 0.0))])


def _polynomial(
    *, num_warmup_steps: int, num_training_steps: int, lr_end: float, power: float, lr_init: float
) -> list[Phase]:
    end = lr_end / lr_init
    fall = straight(1.0, end, num_training_steps - num_warmup_steps, power=power)
    return _warm_up(num_warmup_steps, [fall, hold((0.0, end))])


def _inverse_sqrt(*, num_warmup_steps: int, timescale: int) -> list[Phase]:
    fall = Phase(window="inverse", step_size_up=0, step_size_down=timescale, power=0.5,
                 lower=(0.0, 0.0))  # fmt: skip
    return _warm_up(num_warmup_steps, [fall])


_WINDOWS = {"linear": "triangle", "cosine": "hann", "1-sqrt": "sqrt"}


def _wsd(
    *,
    num_warmup_steps: int,
    num_stable_steps: int,
    num_decay_steps: int,
    warmup_type: str,
    decay_type: str,
    min_lr_ratio: float,
    num_cycles: float,
) -> list[Phase] | None:
    if decay_type == "cosine" and num_cycles != 0.5:
        return None
    end = float(min_lr_ratio)
    phases = []
    if num_warmup_steps:
        phases.append(straight(end, 1.0, num_warmup_steps, window=_WINDOWS[warmup_type]))
    if num_stable_steps:
        phases.append(hold(TOP, steps=num_stable_steps))
    if num_decay_steps:
        phases.append(straight(1.0, end, num_decay_steps, window=_WINDOWS[decay_type]))
    return [*phases, hold((0.0, end))]


_READERS: dict[str, Callable[..., list[Phase] | None]] = {
    "_get_constant_lambda": _constant,
    "_get_constant_schedule_with_warmup_lr_lambda": _constant_with_warmup,
    "_get_linear_schedule_with_warmup_lr_lambda": _linear,
    "_get_cosine_schedule_with_warmup_lr_lambda": _cosine,
    "_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda": _hard_restarts,
    "_get_polynomial_decay_schedule_with_warmup_lr_lambda": _polynomial,
    "_get_inverse_sqrt_schedule_lr_lambda": _inverse_sqrt,
    "_get_wsd_scheduler_lambda": _wsd,
}
