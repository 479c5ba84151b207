"""Read a CyclicLR or OneCycleLR of torch, at any step of its run, as a schedule of ours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from clr_optim.checks import check_int, check_number
from clr_optim.schedule import Phase, Schedule, exp_range, triangular, triangular2
from clr_optim.schedule.phase import BOTTOM, TOP, hold, window_value

__all__ = ["TorchsCourse", "read_scheduler"]


class TorchsCourse(NamedTuple):
    """The schedule, the position and the bounds per group that equal those of a torch scheduler."""

    schedule: Schedule
    position: int
    bounds: list[tuple[float, float]]
    momenta: list[tuple[float, float]] | None


# The methods that decide on the rates. If other code replaced one, the rates are unknown.
_RATE_METHODS = ("step", "get_lr", "_update_lr", "scale_fn", "_anneal_func")

# Far above the drift of CyclicLR from its closed form, and above rounding to float32.
_SAME_RATE = 1e-6


def read_scheduler(scheduler: object) -> TorchsCourse:
    """Return the course of a torch scheduler from its current step on.

    Args:
        scheduler: a CyclicLR or OneCycleLR.

    Raises:
        TypeError: for another class, or a method that other code replaced.
        ValueError: for a course that no schedule of ours has, or groups whose rates and momenta
            are not those of the scheduler.
    """
    if not isinstance(scheduler, (CyclicLR, OneCycleLR)):
        raise TypeError(
            "scheduler must be a CyclicLR or a OneCycleLR of torch.optim.lr_scheduler, got an "
            f"object of type {type(scheduler).__name__}: for other schedulers construct "
            "CyclicalOptimizer(optimizer, policy) with a policy of clr_optim.schedule (for "
            "schedulers one after the other, sequence), then call set_iteration with the run's step"
        )
    torchs = CyclicLR if isinstance(scheduler, CyclicLR) else OneCycleLR
    for method in _RATE_METHODS:
        present = getattr(scheduler, method, None)
        if getattr(present, "__func__", present) is not getattr(torchs, method, None):
            raise TypeError(
                f"scheduler is a {type(scheduler).__name__} with another {method} than "
                f"{torchs.__name__}'s, so its rates are not known: construct "
                "CyclicalOptimizer(optimizer, policy) with a policy or scale_fn that gives these "
                "rates, then call set_iteration with the run's step"
            )
    position = check_int("scheduler.last_epoch", scheduler.last_epoch, minimum=0)
    groups = scheduler.optimizer.param_groups
    is_over = False
    if isinstance(scheduler, CyclicLR):
        schedule, bounds, momenta = _read_cyclic(scheduler, len(groups))
    else:
        schedule, bounds, momenta = _read_one_cycle(scheduler, groups)
        # After its last step OneCycleLR overshoots: its rates are not compared.
        is_over = position > scheduler._schedule_phases[-1]["end_step"]
    for i, (base, top) in enumerate(bounds):
        for name, bound in (("base_lr", base), ("max_lr", top)):
            check_number(f"scheduler: {name} of parameter group {i}", bound)
        if base > top:
            raise ValueError(
                f"scheduler: base_lr={base!r} is above max_lr={top!r} in parameter group {i}, and "
                "a cycle here begins at its lower bound: construct "
                "CyclicalOptimizer(optimizer, policy, ...) with the two in order, then call "
                "set_iteration with a step half a cycle later"
            )
    if not is_over:
        for i, rate in enumerate(schedule.rates(position, bounds)):
            _check_unchanged(i, "lr", groups[i]["lr"], rate, bounds[i][1], position)
        for i, momentum in enumerate(schedule.momenta(position, momenta or [])):
            name = "betas" if "betas" in groups[i] else "momentum"
            found = groups[i][name][0] if name == "betas" else groups[i][name]
            _check_unchanged(i, name, found, momentum, 1.0, position)
    return TorchsCourse(schedule, position, bounds, momenta)


def _check_unchanged(
    group: int, name: str, found: Any, due: float, scale: float, position: int
) -> None:
    """Raise unless a group holds the value that its scheduler wrote, up to rounding."""
    rounding = torch.finfo(found.dtype).eps if isinstance(found, Tensor) else 0.0
    is_same = abs(float(found) - due) <= max(_SAME_RATE, rounding) * scale  # False for NaN
    if not is_same:
        raise ValueError(
            f"scheduler: parameter group {group} has {name}={float(found):.9g}, and at its step "
            f"{position} the scheduler says {due:.9g}: another scheduler or other code wrote "
            f"{name}, or only one of optimizer and scheduler was restored. Correct the wrong "
            "value, or restore both from one checkpoint; replace several schedulers by one sequence"
        )


def _read_cyclic(
    scheduler: CyclicLR, groups: int
) -> tuple[Schedule, list[tuple[float, float]], list[tuple[float, float]] | None]:
    """Return policy, bounds and bounds of momentum of a CyclicLR."""
    total = scheduler.total_size
    sizes = (total * scheduler.step_ratio, total - total * scheduler.step_ratio)
    up, down = (round(size) for size in sizes)
    for name, size in zip(("step_size_up", "step_size_down"), sizes, strict=True):
        if abs(size - round(size)) > 1e-9 * total:
            raise ValueError(
                f"scheduler has {name}={size:g}, and the halves of a cycle are whole steps here: "
                f"construct CyclicalOptimizer(optimizer, step_size_up={max(up, 1)}, "
                f"step_size_down={down}, ...), whose rates are nearly the same, then call "
                "set_iteration with the run's step"
            )
    if len(scheduler.base_lrs) != groups or len(scheduler.max_lrs) != groups:
        raise ValueError(
            f"scheduler has base_lrs={scheduler.base_lrs} and max_lrs={scheduler.max_lrs} for "
            f"{groups} parameter groups: append the bounds of groups that were added later"
        )
    if scheduler._scale_fn_custom is not None:
        schedule = triangular(
            up,
            down,
            scale_fn=scheduler._scale_fn_custom,
            scale_mode="cycle" if scheduler.scale_mode == "cycle" else "iterations",
        )
    elif scheduler.mode == "exp_range":
        schedule = exp_range(up, down, gamma=scheduler.gamma)
    else:
        schedule = (triangular2 if scheduler.mode == "triangular2" else triangular)(up, down)
    momenta = None
    if scheduler.cycle_momentum:
        momenta = _pairs(scheduler.base_momentums, scheduler.max_momentums)
    return schedule, _pairs(scheduler.base_lrs, scheduler.max_lrs), momenta


def _read_one_cycle(
    scheduler: OneCycleLR, groups: list[dict[str, Any]]
) -> tuple[Schedule, list[tuple[float, float]], list[tuple[float, float]] | None]:
    """Return policy, bounds and bounds of momentum of a OneCycleLR, which stores them in groups."""
    keys = ["initial_lr", "max_lr", "min_lr"]
    if scheduler.cycle_momentum:
        keys += ["base_momentum", "max_momentum"]
    for i, group in enumerate(groups):
        missing = [key for key in keys if key not in group]
        if missing:
            raise ValueError(
                f"scheduler needs {missing} in parameter group {i}, which was added later or "
                "loaded from a checkpoint without them: write these keys, as the constructor of "
                "OneCycleLR does"
            )
    initial, top, low = ([float(group[key]) for group in groups] for key in keys[:3])
    # Skip frozen groups: at rate 0 every factor is right.
    finals = [end / start for start, end in zip(initial, low, strict=True) if start > 0.0] or [1.0]
    if max(finals) - min(finals) > 1e-9 * max(finals):
        raise ValueError(
            f"scheduler: min_lr={low} divided by initial_lr={initial} differs between parameter "
            "groups, and OneCycleLR has one factor: give all groups the same factor"
        )
    turns = [float(phase["end_step"]) for phase in scheduler._schedule_phases]
    schedule = _torch_one_cycle(
        int(turns[-1]) + 1,
        turns[:-1],
        final=finals[0],
        window="hann" if scheduler._anneal_func_type == "cos" else "triangle",
    )
    momenta = None
    if scheduler.cycle_momentum:
        momenta = _pairs(*([group[key] for group in groups] for key in keys[3:]))
    return schedule, list(zip(initial, top, strict=True)), momenta


def _pairs(low: Iterable[Any], high: Iterable[Any]) -> list[tuple[float, float]]:
    return [(float(b), float(m)) for b, m in zip(low, high, strict=True)]


@dataclass(frozen=True)
class _Stretch:
    """A rise or fall that may begin and end between two steps: the ``scale_fn`` of its phase.

    Args:
        first: the step at which the phase begins.
        last: the step after which the curve is constant.
        start, end: the ends of the curve, in steps.
        rises: whether the curve rises from 0 to 1; otherwise the curve falls from 1 to 0.
        window: the form of the curve.
    """

    first: int
    last: int
    start: float
    end: float
    rises: bool
    window: str

    def __call__(self, step: float) -> float:
        x = (min(self.first + step, self.last) - self.start) / (self.end - self.start)
        return window_value(self.window, x if self.rises else 1.0 - x)


def _torch_one_cycle(
    total_steps: int, turns: Sequence[float], *, final: float, window: str
) -> Schedule:
    """Return the curve of :class:`torch.optim.lr_scheduler.OneCycleLR`.

    The rate rises from ``base_lr`` to ``max_lr`` until ``turns[0]`` and falls to
    ``final · base_lr``. The last step, ``total_steps − 1``, uses that rate, and so does any step
    after it. With two turns the rate first falls to ``base_lr``, until ``turns[1]``.

    torch turns at ``pct_start · total_steps − 1``, which may lie between two steps, while a cycle
    of a phase has whole steps. (:func:`one_cycle` rounds.) A curve that turns between two steps
    becomes a ``scale_fn`` without cycles.

    Args:
        total_steps: an integer >= 1.
        turns: one or two turns, in steps.
        final: the last rate divided by ``base_lr``.
        window: ``"triangle"`` or ``"hann"``.
    """
    last, end = total_steps - 1, (final, 0.0)
    top, last_turn = round(turns[0]), round(turns[-1])
    are_whole = all(abs(turn - round(turn)) < 1e-9 for turn in turns)
    if are_whole and 0 < top <= last_turn < last:
        left = last - last_turn
        halves: dict[str, Any] = {"step_size_up": 0, "step_size_down": left, "steps": left}
        if len(turns) == 1:
            # The phase ends at the top of its cycle, so that no cycle is complete there.
            rise = Phase(step_size_up=top, step_size_down=left, window=window, steps=top)
            fall = Phase(window=window, lower=end, **halves)
        else:
            rise = Phase(step_size_up=top, window=window, steps=last_turn)
            fall = Phase(window=window, lower=end, upper=BOTTOM, cycle_momentum=False, **halves)
        return Schedule("one_cycle", [rise, fall, hold(end)])
    ends = [(BOTTOM, TOP), (end, TOP)]
    if len(turns) == 2:
        ends = [(BOTTOM, TOP), (BOTTOM, TOP), (end, BOTTOM)]
    phases = []
    first, start = 0, 0.0
    for i, ((lower, upper), turn) in enumerate(zip(ends, [*turns, float(last)], strict=True)):
        # As in torch, a phase ends with the last step that is not beyond its turn.
        next_first = math.floor(turn) + 1
        is_last = i + 1 == len(ends) or next_first > last
        if is_last or next_first > first:
            phases.append(
                Phase(
                    window="constant",
                    steps=None if is_last else next_first - first,
                    lower=lower,
                    upper=upper,
                    cycle_momentum=i < 2,
                    scale_fn=_Stretch(first, last, start, turn, i == 0, window),
                    scale_mode="iterations",
                )
            )
            first = next_first
        if is_last:
            break
        start = turn
    return Schedule("one_cycle", phases)
