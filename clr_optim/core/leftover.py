"""The note that a wrapper leaves on its optimizer, for a wrapper that comes later.

The note tells a user's own settings from those that a cycle wrote. The note also tells the groups
of an earlier wrapper from a checkpoint: a new wrapper starts at step 0 after a wrapper, and at the
checkpoint's position after a checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch.optim import Optimizer

from clr_optim.checks import as_position, item
from clr_optim.core.followed import cycled_momentum, number_of, write_number
from clr_optim.core.saved import is_rate, written_rates
from clr_optim.keys import BASE_MOMENTUM, KEYS, MAX, MAX_MOMENTUM, NOTE, SCHEDULES, STEP
from clr_optim.schedule import Schedule

__all__ = [
    "clear",
    "forget_removed_groups",
    "note_group",
    "note_of",
    "noted_settings",
    "own_settings",
    "scheduled_settings",
    "starts_anew_warning",
    "take_note",
]


def take_note(
    optimizer: Optimizer,
    own: Sequence[Mapping[str, Any]],
    schedule: Schedule,
    loaded: int | None,
    names: Iterable[str],
) -> None:
    """Leave a note on an optimizer.

    Args:
        optimizer: the wrapped optimizer.
        own: the settings of each group before it was cycled.
        schedule: the policy.
        loaded: the position of the checkpoint that was loaded, if any.
        names: the settings that follow schedules.
    """
    groups = optimizer.param_groups
    vars(optimizer)[NOTE] = {
        # By id: an id names one group as long as the note keeps the group alive.
        "own": {id(group): (group, each) for group, each in zip(groups, own, strict=False)},
        "schedule": schedule,
        "loaded": loaded,
        "names": [*names],
    }


def note_group(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Add to the note the settings of a group that joined a cycled optimizer."""
    if NOTE in vars(optimizer):
        own: dict[str, Any] = {"lr": item(group["lr"])}
        momentum = number_of(group, cycled_momentum(group))
        if momentum is not None:
            own["momentum"] = momentum
        own["scheduled"] = scheduled_settings(group, {}, vars(optimizer)[NOTE]["names"])
        vars(optimizer)[NOTE]["own"][id(group)] = group, own


def forget_removed_groups(optimizer: Optimizer) -> None:
    """Drop groups from the note that the optimizer has no more: their memory may be freed."""
    if NOTE in vars(optimizer):
        noted = vars(optimizer)[NOTE]["own"]
        for key in noted.keys() - set(map(id, optimizer.param_groups)):
            del noted[key]


def noted_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the noted settings of each group; an empty dictionary for a group without any."""
    own = vars(optimizer).get(NOTE, {"own": {}})["own"]
    return [own.get(id(group), (group, {}))[1] for group in optimizer.param_groups]


def note_of(optimizer: Optimizer) -> dict[str, Any] | None:
    """Return the note of an earlier wrapper, if the groups hold what that wrapper wrote.

    A checkpoint that was loaded since has replaced the groups: then there is no such note.
    """
    note: dict[str, Any] | None = vars(optimizer).get(NOTE)
    groups = optimizer.param_groups
    if note is None or not any(STEP in group for group in groups):
        return None
    if not any(id(group) in note["own"] for group in groups):
        return None
    loaded = note["loaded"]
    steps = [group.get(STEP) for group in groups]
    if loaded is not None and all(type(step) is int and step == loaded for step in steps):
        return None  # no step since the checkpoint was loaded
    return note


def own_settings(
    optimizer: Optimizer,
    schedule: Schedule,
    note: Mapping[str, Any] | None,
    given: bool,
    names: object = (),
) -> list[dict[str, Any]]:
    """Return each group's ``lr`` and momentum as the user chose them, before any cycle.

    Args:
        optimizer: the optimizer that is being wrapped.
        schedule: the policy.
        note: the note of an earlier wrapper whose rates are in the groups.
        given: whether the user gives bounds, so that ``lr`` belongs to the cycle.
        names: the settings that are to follow schedules.
    """
    wanted = (
        [name for name in names if isinstance(name, str)] if isinstance(names, Iterable) else []
    )
    groups = optimizer.param_groups
    noted = noted_settings(optimizer)
    cycling = schedule if note is None else note["schedule"]
    settings = []
    for i, (group, rate) in enumerate(zip(groups, written_rates(groups, cycling), strict=True)):
        own: dict[str, Any] = {"lr": item(group["lr"])}
        before = noted[i]
        # A rate that is not the cycle's was written by other code since: the user's choice.
        cycled = STEP in group and (rate is None or is_rate(group["lr"], rate))
        if "lr" in before and (cycled or (given and STEP not in group)):
            own["lr"] = before["lr"]
        elif cycled and MAX in group:
            own["lr"] = item(group[MAX])
        name = cycled_momentum(group)
        momentum = number_of(group, name)
        is_ours = note is not None and (
            _is_cycled(group, cycling, momentum) or _is_scheduled(group, name)
        )
        if momentum is not None:
            own["momentum"] = before.get("momentum", momentum) if is_ours else momentum
        # A later wrapper may schedule other settings: restore those of the earlier one, too.
        scheduled = dict.fromkeys([*before.get("scheduled", {}), *wanted])
        own["scheduled"] = scheduled_settings(group, before, scheduled)
        if is_ours and name in own["scheduled"]:
            own["scheduled"][name] = own["momentum"]
        settings.append(own)
    return settings


def _is_cycled(group: Mapping[str, Any], schedule: Schedule, momentum: object) -> bool:
    """Return whether a schedule has written a group's momentum."""
    try:
        ends = (float(group[BASE_MOMENTUM]), float(group[MAX_MOMENTUM]))
        (written,) = schedule.momenta(as_position(group[STEP], STEP), [ends])
        return math.isclose(float(cast("float", momentum)), written, rel_tol=1e-6)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return False


def scheduled_settings(
    group: Mapping[str, Any], before: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Any]:
    """Return the numbers of settings as the user chose them, before they followed a schedule.

    Args:
        group: the group.
        before: the noted settings of the group.
        names: the settings.
    """
    known = before.get("scheduled", {})
    found = {}
    for name in names:
        number = number_of(group, name)
        if number is not None:
            found[name] = known.get(name, number) if _is_scheduled(group, name) else number
    return found


def _is_scheduled(group: Mapping[str, Any], name: str) -> bool:
    """Return whether a schedule has written a group's setting."""
    try:
        schedule = Schedule.from_dict(json.loads(group[SCHEDULES])[name])
        (written,) = schedule.rates(as_position(group[STEP], STEP), [(0.0, 0.0)])
        return math.isclose(float(number_of(group, name)), written, rel_tol=1e-6)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return False


def clear(groups: Sequence[dict[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Remove an earlier wrapper's keys from the groups, and restore the settings that it wrote.

    Args:
        groups: the groups.
        own: the settings of each before it was cycled.
    """
    for group, settings in zip(groups, own, strict=True):
        if BASE_MOMENTUM in group and settings.get("momentum") != number_of(
            group, cycled_momentum(group)
        ):
            write_number(group, cycled_momentum(group), settings["momentum"])
        for name, number in settings.get("scheduled", {}).items():
            if _is_scheduled(group, name):
                write_number(group, name, number)
        for key in KEYS:
            group.pop(key, None)


def starts_anew_warning(groups: Sequence[Mapping[str, Any]], loaded: int | None) -> str | None:
    """Return a warning if the new cycle does not continue one that came from a checkpoint.

    Args:
        groups: the groups, with the keys of the earlier wrapper.
        loaded: the position of the checkpoint that the earlier wrapper continued, if any.
    """
    if loaded is None:
        return None
    step = next(group[STEP] for group in groups if STEP in group)
    return (
        f"an earlier CyclicalOptimizer continued a checkpoint of step {loaded}, and stopped at "
        f"step {step}: this one starts at step 0. To continue there, call set_iteration({step})."
    )
