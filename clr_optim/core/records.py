"""Record: one parameter group, and the objects that we put there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from clr_optim.averages import are_counted, put_count
from clr_optim.checks import shown
from clr_optim.core.followed import (
    Followed,
    held_by,
    number_of,
    numbers_of,
    schedules_json,
    write_setting,
)
from clr_optim.core.settings import Settings
from clr_optim.gate import Gate, are_held
from clr_optim.keys import BASE_MOMENTUM, MAX_MOMENTUM, SCHEDULE, SCHEDULES, STEP
from clr_optim.plan import Plan
from clr_optim.schedule import Schedule

__all__ = [
    "Record",
    "are_untouched",
    "course_of",
    "have_counts",
    "have_plan_take",
    "hold_ours",
    "schedules_of",
    "write_keys",
    "write_settings",
    "written_settings_warning",
]


class Record:
    """One group, and the objects that we put there. :class:`Values` has their numbers."""

    __slots__ = ("followed", "group", "lr", "schedules", "settings")

    def __init__(
        self,
        group: dict[str, Any],
        lr: object,
        schedules: Mapping[str, Schedule],
        followed: list[Followed],
    ) -> None:
        self.group = group
        #: the object in ``group["lr"]``: a float, or the user's tensor
        self.lr = lr
        #: the schedules of the group's settings by name
        self.schedules = schedules
        #: the settings that follow a schedule, momentum included
        self.followed = followed
        #: the object that holds each of them, see :func:`held_by`
        self.settings: list[object] = []


def are_untouched(
    records: Sequence[Record], momentum_bounds: Sequence[tuple[float, float]]
) -> bool:
    """Return whether all groups certainly hold the settings that we wrote, without a tensor.

    Args:
        records: the records of all groups.
        momentum_bounds: ``(base_momentum, max_momentum)`` of each group, if momentum cycles.
    """
    for record, (low, high) in zip(records, momentum_bounds, strict=False):
        group = record.group
        if group.get(BASE_MOMENTUM) is not low or group.get(MAX_MOMENTUM) is not high:
            return False
    return all(
        record.group.get(each.key) is held and type(held) in (float, tuple)
        for record in records
        for each, held in zip(record.followed, record.settings, strict=True)
    )


def hold_ours(groups: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> bool:
    """Return whether groups hold the settings that we wrote; False for any tensor.

    Other code may have filled a tensor: the object does not show it.
    """
    return all(
        held_by(group, each) is held and type(held) is not Tensor
        for group, record in zip(groups, records, strict=False)
        for each, held in zip(record.followed, record.settings, strict=True)
    )


def have_counts(groups: Sequence[Mapping[str, Any]], settings: Settings, gate: Gate | None) -> bool:
    """Return whether groups hold the gate's statistics, and the number of averages taken."""
    return are_held(gate, groups) and are_counted(settings.average, groups)


def schedules_of(
    settings: Settings, records: Sequence[Record], groups: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Schedule]]:
    """Return the schedules of each group's settings.

    A known group keeps its own, also in another place. A group that was away for a while names its
    schedules, and so does a copy. If a load has replaced all groups, a group that names none takes
    those of its place. A group that joins follows the schedules of all groups.
    """
    if not settings.schedules:
        return [{}] * len(groups)
    known = {id(record.group): record.schedules for record in records}
    is_loaded = not any(id(group) in known for group in groups)
    by_text = settings.schedules_by_text
    found: list[Mapping[str, Schedule]] = []
    for i, group in enumerate(groups):
        text = group.get(SCHEDULES)
        if id(group) in known:
            found.append(known[id(group)])
        elif isinstance(text, str) and text in by_text:
            found.append(by_text[text])
        elif is_loaded and i < len(records):
            found.append(records[i].schedules)
        else:
            found.append(settings.common_schedules)
    return found


def course_of(
    records: Sequence[Record],
) -> list[tuple[int, str, tuple[int, ...], list[Schedule]]]:
    """Return the settings that follow schedules, as ``Course.followed`` has them.

    Momentum that mirrors the policy is not among them: the kernels know it.
    """
    found = []
    for i, record in enumerate(records):
        for key, members, schedules in record.followed:
            pairs = [
                (member, schedule)
                for member, schedule in zip(members or (-1,), schedules, strict=True)
                if schedule is not None
            ]
            places = tuple(member for member, _ in pairs if members)
            if pairs:
                found.append((i, key, places, [schedule for _, schedule in pairs]))
    return found


def have_plan_take(records: Sequence[Record], numbers: Sequence[float], plan: Plan) -> None:
    """Have a plan take in the settings that were written into the groups.

    Args:
        records: the records of all groups.
        numbers: the numbers of their settings, in order.
        plan: the plan.
    """
    found = numbers_of([record.followed for record in records], numbers)
    for i, (record, of_group) in enumerate(zip(records, found, strict=True)):
        for setting, held, of_setting in zip(
            record.followed, record.settings, of_group, strict=True
        ):
            plan.take_setting(i, setting.key, setting.members, held, of_setting)


def written_settings_warning(
    groups: Sequence[Mapping[str, Any]],
    records: Sequence[Record],
    numbers: Sequence[float],
    *,
    cycles: bool,
) -> str | None:
    """Return a warning if other code wrote settings that follow a schedule, or cycled momentum.

    Args:
        groups: the groups.
        records: the records of all groups.
        numbers: the numbers of their settings that we wrote, in order.
        cycles: whether to look at momentum, which mirrors the policy.
    """
    scheduled: list[str] = []
    cycled: list[str] = []
    written = numbers_of([record.followed for record in records], numbers)
    for i, (group, record, of_group) in enumerate(zip(groups, records, written, strict=False)):
        if group is not record.group:
            continue
        for setting, held, of_setting in zip(
            record.followed, record.settings, of_group, strict=True
        ):
            if isinstance(held, Tensor) or held_by(group, setting) is held:
                continue  # a tensor may round its number
            for name, number, schedule in zip(
                setting.names, of_setting, setting.schedules, strict=True
            ):
                now = number_of(group, name)
                if now != number:
                    found = cycled if schedule is None else scheduled
                    found.append(f"{name} in parameter group {i} ({shown(now)})")
    if scheduled:
        return (
            f"{', '.join(scheduled)} was written from outside; the schedules decide instead, here "
            "and from now on. Leave the setting out of schedules= to write it."
        )
    if cycled and cycles:
        return (
            f"{', '.join(cycled)} was written from outside; the cycle decides instead, here and "
            "from now on. Leave cycle_momentum=True out to write it."
        )
    return None


def write_keys(
    settings: Settings, group: dict[str, Any], position: int, schedules: Mapping[str, Schedule]
) -> None:
    """Write position, policy, schedules and the count of averages into a group.

    A count that the group already has stays.
    """
    group[STEP] = position
    group[SCHEDULE] = settings.schedule_json
    if settings.schedules:
        group[SCHEDULES] = schedules_json(schedules)
    else:
        group.pop(SCHEDULES, None)
    put_count(settings.average, group, position)


def write_settings(
    records: Sequence[Record],
    numbers: Sequence[float],
    taken: set[int],
    known: Mapping[int, Record] | None = None,
) -> None:
    """Write settings into the groups of some records, which take note of the objects.

    Args:
        records: the records.
        numbers: the numbers of their settings, in order.
        taken: ids of the tensors that serve other groups; tensors are added.
        known: the last records by the ids of their groups; None if these are the last.
    """
    found = numbers_of([each.followed for each in records], numbers)
    for record, of_group in zip(records, found, strict=True):
        before = record if known is None else known.get(id(record.group))
        same = before is not None and [s.key for s in before.followed] == [
            s.key for s in record.followed
        ]
        held = before.settings if before is not None and same else [None] * len(record.followed)
        record.settings = [
            write_setting(record.group, setting, of_setting, taken, last)
            for setting, of_setting, last in zip(record.followed, of_group, held, strict=True)
        ]
