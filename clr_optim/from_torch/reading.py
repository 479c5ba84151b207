"""Read a scheduler of torch, at any step of its run, as a schedule of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from clr_optim.checks import check_int, check_number
from clr_optim.from_torch.cyclic import read_cyclic, read_one_cycle
from clr_optim.from_torch.joined import read_phases
from clr_optim.from_torch.known import known_class, leaves, position_of
from clr_optim.from_torch.per_epoch import stretch
from clr_optim.schedule import Schedule

__all__ = ["TorchsCourse", "read_scheduler"]


class TorchsCourse(NamedTuple):
    """The schedule, the position and the bounds per group that equal those of a torch scheduler."""

    schedule: Schedule
    position: int
    bounds: list[tuple[float, float]]
    momenta: list[tuple[float, float]] | None


# Far above the drift of torch's recursive forms, and above rounding to float32.
_SAME_RATE = 1e-6

# The drift of rates near 0, where torch subtracts, relative to the upper bound.
_NEAR_ZERO = 1e-9

# The largest rounding, for rates in tensors that torch's recursive forms have rounded at each step.
_MOST_ROUNDING = 1e-2


def read_scheduler(scheduler: Any, steps_per_epoch: object = 1) -> TorchsCourse:
    """Return the course of a torch scheduler from its current step on.

    Args:
        scheduler: a scheduler of torch.
        steps_per_epoch: the steps between two calls of ``scheduler.step()``, an integer >= 1.

    Raises:
        TypeError: for another class, or a method that other code replaced.
        ValueError: for a course that no schedule of ours has, or groups whose rates and momenta
            are not those of the scheduler.
    """
    cls = known_class(scheduler)
    steps = check_int("steps_per_epoch", steps_per_epoch, minimum=1)
    position = position_of(scheduler)
    groups = scheduler.optimizer.param_groups
    momenta, is_over = None, False
    if cls is CyclicLR:
        schedule, bounds, momenta = read_cyclic(scheduler, len(groups))
    elif cls is OneCycleLR:
        schedule, bounds, momenta = read_one_cycle(scheduler, groups)
        # After its last step OneCycleLR overshoots: its rates are not compared.
        is_over = position > scheduler._schedule_phases[-1]["end_step"]
    else:
        bounds = _bounds(scheduler, len(groups))
        low = bounds[0][0] if bounds else 0.0
        schedule = Schedule(cls.__name__, read_phases(scheduler, low))
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
    return TorchsCourse(stretch(schedule, steps), position * steps, bounds, momenta)


def _bounds(scheduler: Any, groups: int) -> list[tuple[float, float]]:
    """Return eta_min and the initial rate of each group, which scale a scheduler's formula."""
    brings_bounds = (CyclicLR, OneCycleLR)
    parts = [each for each in leaves(scheduler) if known_class(each) not in brings_bounds]
    if not parts:
        raise ValueError(
            "scheduler is made of CyclicLR or OneCycleLR alone: construct "
            "CyclicalOptimizer(optimizer, sequence([...])) of clr_optim.schedule, then call "
            "set_iteration with the run's step"
        )
    low = max((float(each.eta_min) for each in parts if hasattr(each, "eta_min")), default=0.0)
    initial = [[float(lr) for lr in each.base_lrs] for each in parts]
    if len(initial[0]) != groups or any(each != initial[0] for each in initial):
        raise ValueError(
            f"scheduler has base_lrs={initial[0]} for {groups} parameter groups: append the "
            "initial lr of groups that were added later, the same for all schedulers"
        )
    for i, top in enumerate(initial[0]):
        if low > top:
            raise ValueError(
                f"scheduler has eta_min={low!r} above the initial lr {top!r} of parameter group "
                f"{i}, so that its rate rises where it should fall: construct CyclicalOptimizer("
                "optimizer, policy, ...) with the bounds that are meant, then call set_iteration "
                "with the run's step"
            )
    return [(low, top) for top in initial[0]]


def _check_unchanged(
    group: int, name: str, found: Any, due: float, scale: float, position: int
) -> None:
    """Raise unless a group holds the value that its scheduler wrote, up to rounding."""
    tolerance = _SAME_RATE
    if isinstance(found, Tensor):
        rounding = torch.finfo(found.dtype).eps * (position + 1)
        tolerance = max(tolerance, min(rounding, _MOST_ROUNDING))
    is_same = abs(float(found) - due) <= tolerance * abs(due) + _NEAR_ZERO * scale  # not NaN
    if not is_same:
        raise ValueError(
            f"scheduler: parameter group {group} has {name}={float(found):.9g}, and at its step "
            f"{position} the scheduler says {due:.9g}: another scheduler or other code wrote "
            f"{name}, or only one of optimizer and scheduler was restored. Correct the wrong "
            "value, or restore both from one checkpoint; take several schedulers over together, as "
            "one SequentialLR or ChainedScheduler"
        )
