"""Read a scheduler of torch, at any step of its run, as a schedule of ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from clr_optim.checks import check_int, check_number
from clr_optim.from_torch.cyclic import read_cyclic, read_one_cycle
from clr_optim.schedule import Schedule

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
        schedule, bounds, momenta = read_cyclic(scheduler, len(groups))
    else:
        schedule, bounds, momenta = read_one_cycle(scheduler, groups)
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
