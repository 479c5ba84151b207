"""The settings of a parameter group that follow a schedule: which they are, how to write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from clr_optim.checks import item, shown
from clr_optim.core.rates import fill
from clr_optim.schedule import Schedule

__all__ = [
    "Followed",
    "cycled_momentum",
    "followed_by",
    "held_by",
    "number_of",
    "numbers_of",
    "place_of",
    "schedules_json",
    "write_number",
    "write_setting",
]


class Followed(NamedTuple):
    """A setting of a group that follows a schedule.

    Args:
        key: its name in the group.
        members: the places of the numbers that follow, if the setting is a tuple; else empty.
        schedules: the schedule of each number; ``None`` for momentum, which mirrors the policy.
    """

    key: str
    members: tuple[int, ...]
    schedules: tuple[Schedule | None, ...]

    @property
    def size(self) -> int:
        """How many numbers of the setting follow."""
        return len(self.schedules)

    @property
    def names(self) -> list[str]:
        """The name of each number, as :func:`place_of` reads it."""
        return [f"{self.key}[{member}]" for member in self.members] or [self.key]


def place_of(name: str) -> tuple[str, int | None]:
    """Return the key and the place of a setting: ``"betas[1]"`` is 1 of ``"betas"``.

    Raises:
        ValueError: if the name has another form.
    """
    found = re.fullmatch(r"([^\[\]]+)(?:\[(0|[1-9][0-9]*)\])?", name)
    if found is None:
        raise ValueError(
            f"schedules: {name!r} names no setting: use 'weight_decay', or 'betas[1]' for a "
            "member of a tuple"
        )
    key, place = found.groups()
    return key, None if place is None else int(place)


def cycled_momentum(group: Mapping[str, Any]) -> str:
    """Return the name of the setting that cycles as momentum."""
    return "betas[0]" if "betas" in group else "momentum"


def followed_by(
    group: Mapping[str, Any], schedules: Mapping[str, Schedule], *, cycles: bool
) -> list[Followed]:
    """Return the settings of a group that follow a schedule.

    Args:
        group: the group.
        schedules: the schedules by name; those of settings that the group lacks do not count.
        cycles: whether momentum cycles, which is ``betas[0]`` or ``momentum``.
    """
    found: dict[str, dict[int | None, Schedule | None]] = {}
    if cycles:
        key, place = place_of(cycled_momentum(group))
        found[key] = {place: None}
    for name, schedule in schedules.items():
        key, place = place_of(name)
        if key in group:
            found.setdefault(key, {})[place] = schedule
    return [
        Followed(key, tuple(p for p in places if p is not None), tuple(places.values()))
        for key, places in found.items()
    ]


def schedules_json(schedules: Mapping[str, Schedule]) -> str:
    """Return the schedules of a group's settings as one line of JSON."""
    parts = (f"{json.dumps(name)}:{each.to_json()}" for name, each in sorted(schedules.items()))
    return "{" + ",".join(parts) + "}"


def _has(value: Any, members: Sequence[int]) -> bool:
    """Return whether a setting is a sequence with these members, as an array or a tensor is."""
    try:
        return all(member < len(value) for member in members)
    except TypeError:
        return False


def number_of(group: Mapping[str, Any], name: str) -> Any:
    """Return the number of a setting, from its name; None if the group has no such setting."""
    key, place = place_of(name)
    try:
        return item(group[key] if place is None else group[key][place])
    except (TypeError, LookupError):
        return None


def held_by(group: Mapping[str, Any], setting: Followed) -> object:
    """Return the object that shows a change of a setting.

    It is the setting itself, or a tensor in its tuple, since other code may fill that in place.
    """
    value: Any = group.get(setting.key)
    if _has(value, setting.members):
        for member in setting.members:
            if isinstance(value[member], Tensor):
                return value[member]
    return value


def numbers_of(
    settings: Sequence[Sequence[Followed]], numbers: Sequence[float]
) -> Iterator[list[list[float]]]:
    """Yield for each group a list with the numbers of each setting.

    Args:
        settings: the settings of each group.
        numbers: the numbers of all settings of all groups, in order.
    """
    first = 0
    for each in settings:
        found = []
        for setting in each:
            found.append(list(numbers[first : first + setting.size]))
            first += setting.size
        yield found


def write_setting(
    group: dict[str, Any],
    setting: Followed,
    numbers: Sequence[float],
    taken: set[int],
    held: object = None,
) -> object:
    """Write a setting; return what :func:`held_by` returns then.

    A tensor is filled in place. If other code has put a tensor in a float's place, a float follows.

    Args:
        group: the group.
        setting: the setting.
        numbers: its numbers.
        taken: ids of the tensors that serve other groups; the group's tensors are added.
        held: what :func:`held_by` returned after the last write; None if there was none.
    """
    key = setting.key
    value = group[key]
    if not setting.members:
        is_float = held is not None and not isinstance(held, Tensor)
        group[key] = _written(value, numbers[0], setting.schedules[0], taken, held, is_float)
        return group[key]
    if not _has(value, setting.members):
        if not isinstance(held, tuple):
            raise TypeError(
                f"{key} must be a tuple of numbers in each parameter group, got {shown(value)}: "
                "the cycle and the constructor's schedules write its members"
            )
        value = held
    values = list(value)
    for member, number, schedule in zip(setting.members, numbers, setting.schedules, strict=True):
        is_float = isinstance(held, tuple) and not isinstance(held[member], Tensor)
        values[member] = _written(values[member], number, schedule, taken, held, is_float)
    if not isinstance(value, tuple) or any(a is not b for a, b in zip(value, values, strict=True)):
        group[key] = tuple(values)
    return held_by(group, setting)


def write_number(group: dict[str, Any], name: str, number: float) -> None:
    """Write the number of a setting, from its name; fill a tensor in place."""
    key, place = place_of(name)
    members = () if place is None else (place,)
    write_setting(group, Followed(key, members, (None,)), [number], set())


def _written(
    value: object,
    number: float,
    schedule: Schedule | None,
    taken: set[int],
    held: object,
    is_float: bool,
) -> object:
    """Return what holds a number from now on: a tensor, filled in place, or a float."""
    if is_float or not isinstance(value, Tensor):
        return number
    # A tensor may serve other groups and torch's defaults, which do not follow.
    if id(value) in taken or (held is None and schedule is not None):
        value = value.clone()
    taken.add(id(value))
    fill(value, number)
    return value
