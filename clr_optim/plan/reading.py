"""The parameter groups as the plan last read them: settings, scalars and members."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from clr_optim.rules import Slot, UpdateRule
from clr_optim.sharding import Spread, is_wide, spread_of, spreads

__all__ = ["GroupReadings", "Reading", "why_unreadable"]

# Values of these types cannot change in place.
_IMMUTABLE = frozenset({bool, int, float, complex, str, bytes, tuple, type(None)})


class Reading(NamedTuple):
    """One group's settings, all read at once, since other threads may change them at any time.

    Args:
        why: why no kernel serves the group, or None.
        kernel: the kernel that serves it.
        slots: the state of the rule, in the kernel's order.
        scalars: the scalars of the kernel, with a 0 for the rate; empty if no kernel serves.
        fused: torch's flag of that name.
        keys: the names of the settings, see :attr:`UpdateRule.settings`.
        values: the settings.
    """

    why: str | None
    kernel: str
    slots: tuple[Slot, ...]
    scalars: list[float]
    fused: bool
    keys: list[str]
    values: list[Any]

    def differs_in_values_only(self, other: Reading) -> bool:
        """Return whether both readings lead to the same buckets."""
        return (self.why, self.kernel) == (other.why, other.kernel) and self.keys == other.keys


class GroupReadings:
    """The readings of all groups.

    The lists that the scan compares (``members``, ``keys``, ``settings``) are changed in place,
    since the native plan holds them.

    Args:
        rule: the update rule.
        groups: the groups.
        capturable: whether the kernels can be captured into a graph.
        why: why no native code may read the groups, see :func:`why_unreadable`.
    """

    def __init__(
        self,
        rule: UpdateRule,
        groups: Sequence[Mapping[str, Any]] = (),
        capturable: bool = False,
        why: str | None = None,
    ) -> None:
        self._rule = rule
        self._capturable = capturable
        unread = Reading(why, "", (), [], False, [], [])
        self.readings = [self._read(group) if why is None else unread for group in groups]
        #: the parameters of each group
        self.members: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self.keys = [reading.keys for reading in self.readings]
        self.settings = [reading.values for reading in self.readings]
        #: settings that can change in place, each with a copy of its contents
        self.mutables = _mutables_in(self.readings)
        everything = [param for members in self.members for param in members]
        #: how the parameters are divided over ranks
        self.spreads: list[Spread | None] = spreads(everything)
        #: whether all parameters are float64
        self.wide = is_wide(everything)

    def changed_in_place(self) -> bool:
        """Return whether one of the ``mutables`` (a list of betas, say) has other contents.

        A scan compares objects only, and does not notice such a change.
        """
        return any(_differ(_contents(setting), before) for setting, before in self.mutables)

    def scalar_table(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the scalars of all groups, a row each."""
        rows = [reading.scalars for reading in self.readings]
        width = max([1, *map(len, rows)])  # column 0 takes the rate even if no kernel serves
        table = np.array([row or [0.0] * width for row in rows], dtype=np.float64)
        return table.reshape(len(rows), width)  # without groups, numpy knows no width

    def take_settings(
        self,
        groups: Iterable[Mapping[str, Any]],
        scalars: np.ndarray[Any, np.dtype[np.float64]],
    ) -> bool:
        """Take in changed settings; return False if the buckets must be built anew.

        Args:
            groups: the groups.
            scalars: the table to update.
        """
        readings = [self._read(group) for group in groups]
        known = self.readings
        if len(readings) != len(known) or not all(
            map(Reading.differs_in_values_only, readings, known)
        ):
            return False
        self.readings[:] = readings
        for i, reading in enumerate(readings):
            if reading.scalars:
                scalars[i] = reading.scalars
        self.settings[:] = [reading.values for reading in readings]
        self.mutables = _mutables_in(readings)
        return True

    def take_setting(
        self,
        group: int,
        key: str,
        members: tuple[int, ...],
        value: object,
        numbers: Sequence[float],
        scalars: np.ndarray[Any, np.dtype[np.float64]],
    ) -> None:
        """Take in a setting that the optimizer wrote, so that the next scan finds no change.

        A momentum of 0 has another kernel: the next scan then finds the change.

        Args:
            group: the group's number.
            key, members: the setting, see :meth:`places_of`.
            value: the new setting.
            numbers: the numbers that were written.
            scalars: the table to update.
        """
        if group >= len(self.readings):
            return  # another thread has just added the group
        columns, place = self.places_of(group, key, members)
        reading = self.readings[group]
        row = reading.scalars
        pairs = [(c, n) for c, n in zip(columns, numbers, strict=True) if c >= 0]
        if place < 0 or not row or type(reading.values[place]) is not type(value):
            return
        if key == "momentum" and any(0.0 in (number, row[column]) for column, number in pairs):
            return
        # The setting last: after an interrupt in between, the next scan finds the change.
        for column, number in pairs:
            row[column] = scalars[group, column] = number
        reading.values[place] = value

    def places_of(self, group: int, key: str, members: tuple[int, ...]) -> tuple[list[int], int]:
        """Return the columns of a setting's numbers in the scalars, and its place in the settings.

        Args:
            group: the group's number.
            key: the setting's name.
            members: the places of its numbers in a tuple; empty if the setting is a number.

        Returns:
            A column for each number, and the place; -1 for those that no kernel reads.
        """
        reading = self.readings[group]
        if reading.why is not None or key not in reading.keys:
            return [-1] * (len(members) or 1), -1
        settings = dict(zip(reading.keys, reading.values, strict=True))
        return self._rule.columns_of(settings, key, members), reading.keys.index(key)

    def take_members(self, groups: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, int]] | None:
        """Take in groups added at the end of all groups, and parameters at the end of a group.

        Returns:
            Each added parameter with the number of its group, or None if other changes were made.
        """
        readings = [self._read(group) for group in groups[len(self.members) :]]
        members = [list(group["params"]) for group in groups]
        if len(groups) < len(self.members) or any(reading.why for reading in readings):
            return None
        known = [*self.members, *([] for _ in readings)]
        for was, now in zip(known, members, strict=True):
            if len(now) < len(was) or not all(map(operator.is_, was, now)):
                return None
        added = [
            (param, number)
            for number, (was, now) in enumerate(zip(known, members, strict=True))
            for param in now[len(was) :]
        ]
        new = [param for param, _ in added]
        if new:
            self.spreads = list(dict.fromkeys([*self.spreads, *map(spread_of, new)]))
            self.wide = self.wide and is_wide(new)
        self.members[:] = members
        self.readings += readings
        self.keys += [reading.keys for reading in readings]
        self.settings += [reading.values for reading in readings]
        self.mutables += _mutables_in(readings)
        return added

    def _read(self, group: Mapping[str, Any]) -> Reading:
        settings, rule = dict(group), self._rule
        why = rule.not_fused(settings, capturable=self._capturable)
        known = {name: value for name, value in settings.items() if name in rule.settings}
        return Reading(
            why,
            rule.kernel(settings) if why is None else "",
            rule.slots(settings) if why is None else (),
            list(rule.row(settings)) if why is None else [],
            bool(settings.get("fused")),
            list(known),
            list(known.values()),
        )


def why_unreadable(groups: object, state: object) -> str | None:
    """Return why native code cannot look through these groups and this state, or None."""
    if not _reads_as_a_dict(state):
        return f"state in a {type(state).__name__}, which is no plain dict"
    if not isinstance(groups, (list, tuple)):
        return f"param_groups in a {type(groups).__name__}, which is no list"
    for group in groups:
        if not _reads_as_a_dict(group) or hasattr(type(group), "__missing__"):
            return f"a parameter group that is a {type(group).__name__} and no plain dict"
        if not isinstance(group["params"], (list, tuple)):
            return f"params in a {type(group['params']).__name__}, which is no list"
    return None


def _reads_as_a_dict(value: object) -> bool:
    """Return whether native code, which calls no overridden method, finds what Python finds."""
    return isinstance(value, dict) and type(value).__getitem__ is dict.__getitem__


def _contents(setting: Any) -> Any:
    """Return a copy of a mutable setting's contents, or None for an immutable setting."""
    if type(setting) in _IMMUTABLE:
        return None
    if isinstance(setting, np.ndarray):
        return setting.tolist()
    return list(setting) if isinstance(setting, Sequence) else None


def _mutables_in(readings: Iterable[Reading]) -> list[tuple[Any, Any]]:
    """Return the mutable settings, each with a copy of its contents."""
    pairs = ((value, _contents(value)) for reading in readings for value in reading.values)
    return [(value, contents) for value, contents in pairs if contents is not None]


def _differ(now: object, before: object) -> bool:
    """Return whether contents differ, or cannot be compared (arrays in a list)."""
    try:
        return bool(now != before)
    except (ValueError, TypeError, RuntimeError):
        return True
