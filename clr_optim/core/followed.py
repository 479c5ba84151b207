"""The settings of a parameter group that follow a schedule: which they are, how to write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from clr_optim.core.rates import fill

__all__ = ["Followed", "cycled_momentum", "held_by", "numbers_of", "write_setting"]


class Followed(NamedTuple):
    """A setting of a group that follows a schedule.

    Args:
        key: its name in the group.
        members: the places of the numbers that follow, if the setting is a tuple; else empty.
    """

    key: str
    members: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How many numbers of the setting follow."""
        return len(self.members) or 1


def cycled_momentum(group: Mapping[str, Any]) -> Followed:
    """Return the setting that cycles as momentum: ``betas[0]`` or ``momentum``."""
    return Followed("betas", (0,)) if "betas" in group else Followed("momentum")


def held_by(group: Mapping[str, Any], setting: Followed) -> object:
    """Return the object that shows a change of a setting.

    It is the setting itself, or a tensor in its tuple, since other code may fill that in place.
    """
    value = group.get(setting.key)
    if setting.members and value is not None:
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
    group: dict[str, Any], setting: Followed, numbers: Sequence[float], taken: set[int]
) -> object:
    """Write a setting, filling tensors in place; return what :func:`held_by` returns then.

    Args:
        group: the group.
        setting: the setting.
        numbers: its numbers.
        taken: ids of the tensors that serve other groups; the group's tensors are added.
    """
    key = setting.key
    if not setting.members:
        group[key] = numbers[0]
        return group[key]
    values = list(group[key])
    is_new = not isinstance(group[key], tuple)
    for member, number in zip(setting.members, numbers, strict=True):
        value = values[member]
        if not isinstance(value, Tensor):
            values[member], is_new = number, True
            continue
        if id(value) in taken:  # torch's default, which groups share
            values[member] = value = value.clone()
            is_new = True
        taken.add(id(value))
        fill(value, number)
    if is_new:
        group[key] = tuple(values)
    return held_by(group, setting)
