"""Check the constructor's ``schedules``: which settings follow which schedules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.checks import item, shown
from clr_optim.core.followed import cycled_momentum, place_of, schedules_json
from clr_optim.core.settings import Settings
from clr_optim.keys import KEYS, SCHEDULES
from clr_optim.schedule import Schedule, check_growth

__all__ = ["check_new_group", "check_schedules", "warn_other_schedules"]

#: Settings whose numbers torch takes up to 1, and betas, which must be below.
_AT_MOST_ONE = frozenset({"momentum", "rho", "dampening", "alpha"})

# The text of a group without schedules.
_NO_SCHEDULES = schedules_json({})

_WHOLE = "the optimizer needs a whole number"
#: Settings that cannot follow a schedule, and why.
_READ_ONCE = {
    "initial_accumulator_value": "the optimizer reads it once",
    "initial_lr": "the optimizer does not read it",
    **dict.fromkeys(("max_iter", "max_eval", "history_size", "ns_steps"), _WHOLE),
}

# How many steps of a phase show its range.
_SAMPLED = 500


def check_schedules(
    optimizer: Optimizer,
    schedules: object,
    own: Sequence[Mapping[str, Any]],
    *,
    cycle_momentum: bool,
) -> dict[str, Schedule | tuple[Schedule | None, ...]]:
    """Return the schedules of settings by name, checked against the groups.

    Args:
        optimizer: the optimizer.
        schedules: the argument.
        own: the settings of each group as the user chose them, before a schedule wrote them.
        cycle_momentum: whether momentum cycles.

    Raises:
        TypeError, ValueError: naming the setting, its schedule and what would be right.
    """
    if schedules is None:
        return {}
    if not isinstance(schedules, Mapping):
        raise TypeError(
            "schedules must be a dictionary from a setting's name to a Schedule, as "
            f"{{'weight_decay': triangular(2000).between(0.0, 0.1)}}, got {shown(schedules)}"
        )
    groups = optimizer.param_groups
    checked: dict[str, Schedule | tuple[Schedule | None, ...]] = {}
    for name, given in schedules.items():
        if not isinstance(name, str):
            raise TypeError(f"schedules: a setting's name must be a string, got {name!r}")
        per_group = _per_group(name, given, len(groups))
        checked[name] = given if isinstance(given, Schedule) else per_group
        _check_name(name, checked)
        for i, (group, schedule) in enumerate(zip(groups, per_group, strict=True)):
            if schedule is not None:
                _check_setting(name, i, group)
                _check_dampening(name, group, schedules)
                _check_cycled(name, i, group, cycle_momentum=cycle_momentum)
                _check_schedule(name, schedule)
        if isinstance(given, Schedule) and name == "weight_decay":
            _check_weight_decay([each["scheduled"].get(name) for each in own])
    return checked


def check_new_group(
    settings: Settings,
    group: Mapping[str, Any],
    given: Collection[str],
    own: Sequence[Mapping[str, Any]],
) -> str | None:
    """Check a group that joins an optimizer whose groups follow schedules.

    Args:
        settings: the settings of the optimizer.
        group: the group, with torch's defaults.
        given: the keys that the user has given.
        own: the settings of the other groups as the user chose them.

    Returns:
        A warning if a number that the user has given has no effect, or None.

    Raises:
        TypeError, ValueError: if a setting of the group cannot follow.
    """
    names = [name for name in settings.common_schedules if place_of(name)[0] in group]
    for name in names:
        _check_setting(name, len(own), group)
        decays = any(each.get("scheduled", {}).get(name, 0.0) != 0.0 for each in own)
        if name == "weight_decay" and decays and item(group[name]) == 0.0:
            raise ValueError(
                "param_group has weight_decay=0, and schedules['weight_decay'] is for all groups: "
                "construct CyclicalOptimizer with a list, which leaves groups that join alone"
            )
    lacking = [name for name in settings.common_schedules if name not in names]
    if lacking:
        return (
            f"param_group lacks {', '.join(lacking)}, so the constructor's schedules have no "
            "effect there: give the group the settings"
        )
    keys = sorted({place_of(name)[0] for name in names} & set(given))
    if not keys:
        return None
    return (
        f"param_group: {', '.join(keys)} has no effect, since the constructor's schedules decide: "
        "leave it out, or give a list to the constructor, which leaves groups that join alone"
    )


def _per_group(name: str, given: object, count: int) -> tuple[Schedule | None, ...]:
    """Return a schedule, or None, for each group."""
    if isinstance(given, Schedule):
        return (given,) * count
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(
            f"schedules[{name!r}] must be a Schedule, or a list with a Schedule or None for each "
            f"parameter group, got {shown(given)}"
        )
    for i, each in enumerate(given):
        if not (each is None or isinstance(each, Schedule)):
            raise TypeError(f"schedules[{name!r}][{i}] must be a Schedule or None, got {each!r}")
    if len(given) != count:
        raise ValueError(
            f"schedules[{name!r}] has {len(given)} entries and the optimizer {count} parameter "
            "groups: give one Schedule, or a list with a Schedule or None for each group"
        )
    if given and not any(given):
        raise ValueError(f"schedules[{name!r}] has no Schedule for any group: leave it out")
    return tuple(given)


def _check_name(name: str, checked: Mapping[str, object]) -> None:
    """Raise if a name is no setting, or a setting that another schedule writes."""
    key, place = place_of(name)
    if key in ("lr", "params", *KEYS):
        remedy = (
            "the policy decides the rate: give it as policy=" if key == "lr" else "leave it out"
        )
        raise ValueError(f"schedules: {name!r} cannot follow a schedule: {remedy}")
    if key in _READ_ONCE:
        raise ValueError(
            f"schedules: {name!r} cannot follow a schedule: leave it out, since {_READ_ONCE[key]}"
        )
    others = {other for other in checked if other != name and place_of(other)[0] == key}
    if place is None and others:
        raise ValueError(f"schedules: {name!r} includes {min(others)!r}: leave one of them out")


def _check_dampening(name: str, group: Mapping[str, Any], schedules: Iterable[object]) -> None:
    """Raise if SGD does not read its dampening."""
    if name != "dampening":
        return
    if group.get("nesterov"):
        raise ValueError("schedules: 'dampening' must be 0 with nesterov=True: leave it out")
    if group.get("momentum") == 0 and "momentum" not in schedules:
        raise ValueError("schedules: 'dampening' has no effect without momentum: leave it out")


def _check_cycled(name: str, index: int, group: Mapping[str, Any], *, cycle_momentum: bool) -> None:
    """Raise if the policy already cycles a setting of a group."""
    if cycle_momentum and name == cycled_momentum(group):
        raise ValueError(
            f"schedules: {name!r} cycles with cycle_momentum=True in parameter group {index}: "
            "leave one of them out"
        )


def _check_schedule(name: str, schedule: Schedule) -> None:
    """Raise unless a schedule has bounds, and bounds that the setting may have."""
    if not schedule.has_bounds:
        raise ValueError(
            f"schedules[{name!r}] has no bounds, and those of the groups are learning rates: give "
            f"the schedule its own, as {schedule.name}(...).between(low, high)"
        )
    if schedule.scale_fn is not None:
        raise ValueError(
            f"schedules[{name!r}] has a scale_fn, which only the policy may have: write the "
            "schedule as a sequence of phases"
        )
    check_growth(schedule)
    key, _ = place_of(name)
    low, high = _range(schedule)
    if low < 0.0:
        raise ValueError(f"schedules[{name!r}] falls to {low:g}, and must stay at or above 0")
    if key == "momentum" and low <= 0.0:
        raise ValueError(
            f"schedules[{name!r}] falls to {low:g}, and a momentum of 0 has no buffer: keep it "
            "above 0"
        )
    if (key == "betas" and high >= 1.0) or (key in _AT_MOST_ONE and high > 1.0):
        limit = "below 1" if key == "betas" else "at or below 1"
        raise ValueError(f"schedules[{name!r}] rises to {high:g}, and must stay {limit}")


def _range(schedule: Schedule) -> tuple[float, float]:
    """Return the lowest and the highest value that a schedule takes, from many of its steps."""
    start, values = 0, []
    for phase in schedule.phases:
        length = phase.steps or 2 * max(phase.period, 1)
        steps = {*range(min(length, _SAMPLED)), length - 1}
        steps |= {phase.step_size_up, *range(0, length, -(-length // _SAMPLED))}
        values += [schedule.rates(start + s, [(0.0, 0.0)])[0] for s in steps if s < length]
        start += length
    last = schedule.phases[-1]
    if last.steps is None and last.base_gamma < 1.0:
        values.append(0.0)  # in the end
    return min(values), max(values)


def _check_setting(name: str, index: int, group: Mapping[str, Any]) -> None:
    """Raise unless a group has a number under a setting's name."""
    key, place = place_of(name)
    where = f"schedules: {name!r} in parameter group {index}"
    if key not in group:
        raise ValueError(
            f"{where} is no setting of the optimizer: use one of {_numbers_in(group)}, or None "
            "for this group in a list"
        )
    value = group[key]
    if place is None and isinstance(value, (tuple, list)):
        raise ValueError(f"{where} has {len(value)} numbers: name one of them, as {key + '[0]'!r}")
    if place is not None:
        if isinstance(value, np.ndarray) or (isinstance(value, Tensor) and value.dim()):
            raise ValueError(f"{where}: {key!r} is an array: give the optimizer a tuple")
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{where}: {key!r} is a single number, {shown(value)}: use {key!r}")
        if place >= len(value):
            raise ValueError(f"{where}: give a place below {len(value)}, the count of numbers")
        value = value[place]
    number = item(value)
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    if not is_number or (isinstance(value, Tensor) and not value.is_floating_point()):
        raise ValueError(f"{where} is no number, but {shown(value)}: only numbers can follow")


def _numbers_in(group: Mapping[str, Any]) -> list[str]:
    """Return the names of a group's settings that are numbers."""
    names = []
    for key, value in group.items():
        if key in ("lr", "params", *KEYS):
            continue
        if isinstance(value, (tuple, list)):
            names += [f"{key}[{i}]" for i in range(len(value))]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            names.append(key)
    return names


def _check_weight_decay(numbers: Sequence[object]) -> None:
    """Raise if one schedule would let groups decay that the user keeps from decaying."""
    still = [i for i, number in enumerate(numbers) if number == 0.0]
    if still and len(still) < len(numbers):
        raise ValueError(
            f"schedules['weight_decay'] is one schedule for all groups, and parameter group "
            f"{', '.join(map(str, still))} has weight_decay=0, as biases and norms have: give a "
            "list with a Schedule for each group that decays and None for the others"
        )


def warn_other_schedules(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[object], source: str
) -> str | None:
    """Return a warning if a checkpoint was written under other schedules of settings.

    Args:
        groups: the groups, which hold the schedules in use.
        saved: the schedules in each group of the checkpoint, as JSON, or None.
        source: the checkpoint in the message.
    """
    for i, (group, text) in enumerate(zip(groups, saved, strict=False)):
        own, text = group.get(SCHEDULES) or _NO_SCHEDULES, text or _NO_SCHEDULES
        if text != own:
            return (
                f"{source} was written with the schedules {text} of settings in "
                f"parameter group {i}; this optimizer's, {own}, decide from here on. To "
                "continue under the old ones, give them to the constructor as schedules=."
            )
    return None
