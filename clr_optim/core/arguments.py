"""Check the constructor's arguments, and turn them into settings, bounds and a position."""

from __future__ import annotations

import difflib
import inspect
import itertools
import sys
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from clr_optim import backends
from clr_optim.averages import (
    CycleEnd,
    check_average,
    check_counts,
    unmoved_averages_warning,
)
from clr_optim.checks import (
    check_bool,
    check_choice,
    check_momenta,
    check_number,
    item,
    shown,
)
from clr_optim.core import leftover
from clr_optim.core.checkpoint.state import check_momentum_state
from clr_optim.core.followed import cycled_momentum, number_of, place_of
from clr_optim.core.mastering import check_master_weights
from clr_optim.core.per_group import optional_per_group, per_group
from clr_optim.core.rates import check_tensor_lr
from clr_optim.core.saved import (
    are_close,
    bounds_shown,
    edited_rates_warning,
    initial_bounds,
    read_position,
    unread_base_warning,
)
from clr_optim.core.scheduled import check_schedules
from clr_optim.core.settings import HIGH_MOMENTUM, LOW_MOMENTUM, Settings
from clr_optim.core.warn import callers_level, warn_each
from clr_optim.gate import Statistics, check_skip_above, saved_statistics
from clr_optim.keys import BASE, MAX, SCHEDULE, SCHEDULES
from clr_optim.rules import reads_first_rate_alone
from clr_optim.schedule import POLICIES, SCALE_MODES, Schedule, check_growth, triangular

__all__ = [
    "Start",
    "check_arguments",
    "check_cycled_momentum",
    "check_optimizer",
    "make_schedule",
    "separate_defaults",
]


@dataclass(frozen=True)
class Start:
    """Where a new CyclicalOptimizer starts, from checked arguments.

    Args:
        settings: the settings.
        chosen: the backend's name, and why it was chosen.
        position: the number of the first step.
        resumed: whether the position is a checkpoint's.
        bounds: ``(base_lr, max_lr)`` of each group.
        constructor_bounds: the same by the arguments alone; ``None`` is the default base_lr.
        momentum_bounds: ``(base_momentum, max_momentum)`` of each group.
        note: the note of an earlier wrapper that left its rates in the groups, if any.
        own: the settings of each group before it was cycled.
        saved_policy: the policy in a checkpoint that the optimizer has loaded, if any.
        saved_schedules: the schedules of each group's settings in that checkpoint.
        warnings: messages for the user.
        statistics: those of the gate in that checkpoint.
    """

    settings: Settings
    chosen: tuple[str, str]
    position: int
    resumed: bool
    bounds: list[tuple[float, float]]
    constructor_bounds: list[tuple[float | None, float]]
    momentum_bounds: list[tuple[float, float]]
    note: dict[str, Any] | None
    own: list[dict[str, Any]]
    saved_policy: object
    saved_schedules: list[object]
    warnings: list[str | None]
    statistics: Statistics


def check_arguments(
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    base_lr: object,
    max_lr: object,
    cycle_momentum: object,
    base_momentum: object,
    max_momentum: object,
    max_grad_norm: object,
    backend: Any,
    schedules: object,
    average: object,
    skip_above: object,
    master_weights: object,
) -> Start:
    """Check the constructor's arguments; change nothing.

    Raises:
        TypeError, ValueError: naming the argument, its value and what would be right.
    """
    groups = optimizer.param_groups
    for i, group in enumerate(groups):
        if "lr" not in group:
            raise ValueError(
                f"optimizer: parameter group {i} of {type(optimizer).__name__} has no 'lr', "
                "so there is no rate to cycle"
            )
        check_tensor_lr(group["lr"], f"optimizer: lr of parameter group {i}")
    if schedule.has_bounds and not (base_lr is None and max_lr is None):
        raise ValueError(
            f"base_lr={base_lr!r} and max_lr={max_lr!r} have no effect: every phase of the "
            f"schedule {schedule.name!r} has bounds already; leave them out"
        )
    note = leftover.note_of(optimizer)
    # The user may have loaded a checkpoint before wrapping the optimizer.
    position, resumed = read_position(groups, "optimizer") if note is None else (0, False)
    own = leftover.own_settings(optimizer, schedule, note, max_lr is not None, schedules)
    bounds = [
        initial_bounds(group, f" in parameter group {i}", base, top)
        for i, (group, base, top) in enumerate(
            zip(
                groups if note is None else own,
                optional_per_group("base_lr", base_lr, groups),
                optional_per_group("max_lr", max_lr, groups),
                strict=True,
            )
        )
    ]
    if base_lr is not None:
        warn_each([unread_base_warning(schedule, [base for base, _ in bounds])])
    if max_lr is None and not schedule.has_bounds:
        _warn_scheduled_rates(groups)
    cycles = check_bool("cycle_momentum", cycle_momentum)
    if cycles and not schedule.moves_momentum:
        raise ValueError(
            f"cycle_momentum=True has no effect with the schedule {schedule.name!r}, under which "
            "momentum stays: leave it out, or use a policy with cycles, such as 'triangular'"
        )
    momenta = _check_momenta(optimizer, cycles, base_momentum, max_momentum)
    scheduled = check_schedules(optimizer, schedules, own, cycle_momentum=cycles)
    if max_grad_norm is not None:
        max_grad_norm = check_number(
            "max_grad_norm", max_grad_norm, open_minimum=True, finite=False
        )
    kept = check_average(average)
    if isinstance(kept, CycleEnd):
        _check_cycle_ends(kept, average, schedule)
    skips = check_skip_above(skip_above)
    statistics = saved_statistics(groups if resumed else [], "optimizer")
    has_averages = check_counts(groups if resumed else [], "optimizer.param_groups")
    schedule.rates(position, bounds)  # a scale_fn may raise
    chosen = backends.resolve(backend, optimizer)
    masters = check_master_weights(optimizer, master_weights, chosen)
    settings = Settings(
        optimizer, schedule, cycles, max_grad_norm, backend, scheduled, skips, kept, masters
    )
    if cycles:
        check_momentum_state(optimizer, range(len(groups)), "cycle_momentum=True")
    with_momentum = settings.with_momentum_schedule(len(groups))
    check_momentum_state(optimizer, with_momentum, "schedules['momentum']")
    warned: list[str | None] = []
    if note is not None:
        warned = [leftover.starts_anew_warning(groups, note["loaded"])]
    elif resumed and not schedule.has_bounds:
        arguments = base_lr is not None or max_lr is not None
        warned = [
            _other_bounds_warning(groups, bounds)
            if arguments
            else edited_rates_warning(groups, schedule)
        ]
    warned.append(_first_rate_warning(optimizer, schedule))
    if kept is None and has_averages:
        warned.append(unmoved_averages_warning("the wrapped optimizer"))
    return Start(
        settings,
        chosen,
        position,
        resumed,
        bounds,
        [(None if base_lr is None else base, top) for base, top in bounds],
        momenta,
        note,
        own,
        groups[0].get(SCHEDULE) if resumed and groups else None,
        [group.get(SCHEDULES) for group in groups] if resumed else [],
        warned,
        statistics,
    )


def _check_cycle_ends(kept: CycleEnd, average: object, schedule: Schedule) -> None:
    """Raise unless the schedule has a cycle that ends after the average's start.

    Args:
        kept: the average.
        average: the constructor's argument, for the message.
        schedule: with cycles or without.
    """
    if schedule.steps_to_cycle_end(kept.start) is not None:
        return
    if schedule.steps_to_cycle_end(0) is None:
        raise ValueError(
            f"average={average!r} needs cycles that end, and the schedule {schedule.name!r} has "
            "none: use Ema(decay), or another policy"
        )
    last = bisect_left(
        range(min(kept.start, sys.maxsize)),
        schedule.cycle_ends(kept.start),
        key=schedule.cycle_ends,
    )
    raise ValueError(
        f"average={average!r} starts after the last cycle of the schedule {schedule.name!r}, which "
        f"ends after {last} steps: give a start below {last}"
    )


def check_optimizer(optimizer: object, wrapper: type[Optimizer]) -> None:
    """Raise unless an object is a torch optimizer that is not wrapped yet.

    Args:
        optimizer: the object.
        wrapper: the class of wrappers.
    """
    if isinstance(optimizer, wrapper):
        raise ValueError(
            f"optimizer is already a {wrapper.__name__}: wrap its .optimizer, or change its "
            "course with set_bounds and set_iteration"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be an instance of torch.optim.Optimizer, got {optimizer!r} "
            f"of type {type(optimizer).__name__}"
        )


# ---- the policy

_CYCLIC = ("gamma", "scale_fn", "scale_mode")


def make_schedule(policy: object, constructor: Callable[..., Any], **options: Any) -> Schedule:
    """Return the schedule that a policy's name and options describe.

    Args:
        policy: a name in :data:`POLICIES`, in any case, or a schedule, which needs no options.
        constructor: the function whose signature has the options' defaults.
        **options: step sizes, gamma, window, scale_fn and scale_mode.
    """
    if isinstance(policy, Schedule):
        for name, value in _given(constructor, options):
            raise ValueError(
                f"{name}={value!r} has no effect with policy={policy.name!r}, a "
                f"Schedule: give {name} to the schedule's constructor"
            )
        check_growth(policy)
        return policy
    lowered = policy.lower() if isinstance(policy, str) else ""
    if lowered not in POLICIES:
        remedy = "; call it: what it returns may be a Schedule" if callable(policy) else ""
        if isinstance(policy, (int, float)):
            remedy = f"; if that is a rate, give it by name, as max_lr={policy!r}"
        if close := difflib.get_close_matches(lowered, POLICIES, n=1):
            remedy = f"; did you mean {close[0]!r}?"
        raise ValueError(
            f"policy must be one of {', '.join(map(repr, POLICIES))} or a Schedule "
            f"(see clr_optim.schedule), got {policy!r}{remedy}"
        )
    make = POLICIES[lowered]
    parameters = inspect.signature(make).parameters
    needed = [name for name, each in parameters.items() if each.default is each.empty]
    if needed:
        arguments = ", ".join(f"{name}=..." for name in needed)
        raise ValueError(
            f"policy={policy!r} needs {', '.join(needed)}: give what the policy returns, as "
            f"policy=clr_optim.schedule.{lowered}({arguments})"
        )
    # As CyclicLR does, every policy with cycles takes gamma, and a scale_fn that replaces decays.
    taken = {*parameters, *(_CYCLIC if "step_size_up" in parameters else ())}
    for name, value in _given(constructor, options):
        if name not in taken:
            raise ValueError(f"{name}={value!r} has no effect with policy={policy!r}: leave it out")
    check_choice("scale_mode", options["scale_mode"], SCALE_MODES)
    check_number("gamma", options["gamma"], open_minimum=True, maximum=1.0)
    if options["scale_fn"] is not None:
        del options["gamma"]
        return Schedule(lowered, triangular(**options).phases)
    return make(**{name: value for name, value in options.items() if name in parameters})


def _given(
    constructor: Callable[..., Any], options: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the options whose values are not the defaults of a constructor."""
    parameters = inspect.signature(constructor).parameters
    for name, value in options.items():
        default = parameters[name].default
        if value is not default and not (type(value) is type(default) and value == default):
            yield name, value


# ---- bounds


def _check_momenta(
    optimizer: Optimizer, cycles: bool, base_momentum: object, max_momentum: object
) -> list[tuple[float, float]]:
    """Return the bounds of each group's momentum; raise if momentum is to cycle and cannot."""
    groups = optimizer.param_groups
    low = per_group("base_momentum", base_momentum, groups, maximum=1.0)
    high = per_group("max_momentum", max_momentum, groups, maximum=1.0)
    for i, (group, b, m) in enumerate(zip(groups, low, high, strict=True)):
        if cycles and "betas" not in group and "momentum" not in group:
            raise ValueError(
                f"cycle_momentum=True needs a 'momentum' or 'betas' to cycle, and "
                f"parameter group {i} of {type(optimizer).__name__} has neither: "
                "leave it False"
            )
        if cycles:
            check_cycled_momentum(group, f" in parameter group {i}")
        check_momenta(b, m, f" for parameter group {i}", beta=cycles and "betas" in group)
    momenta = list(zip(low, high, strict=True))
    if not cycles and any(each != (LOW_MOMENTUM, HIGH_MOMENTUM) for each in momenta):
        raise ValueError(
            f"base_momentum={base_momentum!r} and max_momentum={max_momentum!r} have no effect "
            "without cycle_momentum=True, which is CyclicLR's default and not ours: give it too, "
            "or leave them out"
        )
    return momenta


def check_cycled_momentum(group: Mapping[str, Any], where: str) -> None:
    """Raise unless a group holds a number where momentum is to cycle.

    Args:
        group: the group, with torch's defaults.
        where: the group in the message.
    """
    name = cycled_momentum(group)
    if isinstance(number_of(group, name), Real):
        return
    key, place = place_of(name)
    raise TypeError(
        f"{key}{where} must be {'a number' if place is None else 'a tuple of numbers'}, got "
        f"{shown(group.get(key))}: cycle_momentum=True writes {name} at each step"
    )


def separate_defaults(optimizer: Optimizer) -> None:
    """Give the defaults tensors that no group shares.

    torch puts one tensor into the defaults and into groups. Steps fill a group's tensor, and a
    group that is added later starts with the user's value.
    """
    defaults = getattr(optimizer, "defaults", None)
    if not isinstance(defaults, dict):
        return
    if isinstance(defaults.get("lr"), Tensor):
        defaults["lr"] = defaults["lr"].detach().clone()
    betas = defaults.get("betas")
    if isinstance(betas, Tensor):
        defaults["betas"] = betas.detach().clone()
    elif isinstance(betas, (list, tuple)) and any(isinstance(beta, Tensor) for beta in betas):
        defaults["betas"] = tuple(
            beta.detach().clone() if isinstance(beta, Tensor) else beta for beta in betas
        )


# ---- warnings about the arguments


def _warn_scheduled_rates(groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn if the top of the cycle becomes a rate that a torch scheduler has written."""
    for i, group in enumerate(groups):
        lr, initial = item(group["lr"]), item(group.get("initial_lr"))
        if MAX not in group and isinstance(initial, float) and initial != lr:
            warnings.warn(
                f"lr in parameter group {i} is {lr!r}, to which a scheduler has brought it from "
                f"the initial_lr {initial!r}, and becomes the top of the cycle: give the rate that "
                f"is meant, as max_lr={initial!r}",
                UserWarning,
                stacklevel=callers_level(),
            )
            return


def _first_rate_warning(optimizer: Optimizer, schedule: Schedule) -> str | None:
    """Return a warning if the optimizer reads the rate at its first step only."""
    is_constant = schedule.name == "fixed" and len(schedule.phases) == 1
    if is_constant or not reads_first_rate_alone(optimizer):
        return None
    return (
        f"{type(optimizer).__name__} reads lr at its first step only, so that the schedule "
        f"{schedule.name!r} has no effect after it: use another optimizer, or the policy 'fixed'"
    )


def _other_bounds_warning(
    groups: Sequence[Mapping[str, Any]], bounds: Sequence[tuple[float, float]]
) -> str | None:
    """Return a warning if a checkpoint's bounds differ from the constructor's arguments."""
    saved = [
        (float(group[BASE]), float(group[MAX])) if BASE in group and MAX in group else own
        for group, own in zip(groups, bounds, strict=True)
    ]
    if all(map(are_close, itertools.chain(*saved), itertools.chain(*bounds))):
        return None
    return (
        f"the wrapped optimizer's checkpoint has the bounds {bounds_shown(saved)}, and the "
        f"arguments give {bounds_shown(bounds)}: the arguments hold. To train with the "
        f"checkpoint's, call set_bounds({bounds_shown(saved)})."
    )
