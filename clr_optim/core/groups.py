"""GroupMirror: what we wrote into the parameter groups, and what other code has written since."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from clr_optim.averages import check_counts, take_over_kind
from clr_optim.core.followed import followed_by, held_by
from clr_optim.core.rates import momentum_bounds, never_driven, write_rate, written_rate
from clr_optim.core.records import (
    Record,
    are_untouched,
    have_counts,
    hold_ours,
    schedules_of,
    write_keys,
    write_settings,
)
from clr_optim.core.saved import found_bounds, written_position
from clr_optim.core.settings import HIGH_MOMENTUM, LOW_MOMENTUM, Settings
from clr_optim.core.values import Values, evaluate
from clr_optim.core.warn import warn_each
from clr_optim.gate import Gate, put_statistics
from clr_optim.keys import BASE, BASE_MOMENTUM, MAX, MAX_MOMENTUM, STEP
from clr_optim.schedule import Schedule

__all__ = ["GroupMirror"]

_BOUNDS_OF, _RATE_OF = operator.itemgetter(BASE, MAX), operator.itemgetter("lr")


class GroupMirror:
    """One record per group, in the order of the groups.

    :meth:`is_untouched` and :meth:`is_known` are cheap, and may answer False for untouched groups.
    :meth:`changed_rates` reads the values. The answers to a change are :meth:`adopt` (take over
    bounds that other code wrote) and :meth:`write` (overrule rates and settings).

    Args:
        settings: the optimizer and its policy.
        is_kept: returns whether the device keeps a group's ``lr`` current.
        gate: whose statistics the groups hold, if any.
    """

    def __init__(
        self, settings: Settings, is_kept: Callable[[dict[str, Any]], bool], gate: Gate | None
    ) -> None:
        self._settings = settings
        self._optimizer: Any = settings.optimizer
        self._is_kept = is_kept
        self._gate = gate
        self.records: list[Record] = []
        # The list of groups that was last written. Other code may append to it.
        self._groups: Sequence[dict[str, Any]] = ()
        #: the numbers that we wrote. A tensor may have rounded its rate.
        self.written = Values(0, [], [], [], [])
        # Groups that were loaded into the wrapped optimizer since the last write, and their bounds.
        self._loaded: tuple[Sequence[dict[str, Any]], list[tuple[float, float]]] | None = None
        # What the last look ahead found, for the write that follows it.
        self._ahead: Values | None = None

    # ---- the question

    def changed_rates(self) -> dict[int, float] | None:
        """Return the rates that other code wrote, by group; None if other code wrote nothing.

        The dictionary is empty if other code wrote a setting that follows a schedule, or the same
        rate as a new object.
        """
        groups = self._optimizer.param_groups
        known = min(len(groups), len(self.records))
        changed = [i for i in range(known) if self.is_foreign(i, groups[i])]
        if not changed and self._holds_our_settings(groups):
            return None
        rates = {i: written_rate(groups[i]["lr"], i) for i in changed}
        return {i: lr for i, lr in rates.items() if lr != self.written.rates[i]}

    def is_untouched(self, position: int) -> bool:
        """Return True only if all groups hold the objects that we wrote, and each rate is a float.

        Other code may have filled a tensor, so that a tensor gives False. A step of a small model
        asks this question and little more, so the answer must be cheap.
        """
        records, groups = self.records, self._optimizer.param_groups
        if len(records) != len(groups) or not have_counts(groups, self._settings, self._gate):
            return False
        for group, record, (base, top) in zip(groups, records, self.written.bounds, strict=False):
            rate = record.lr
            if (
                record.group is not group
                or group["lr"] is not rate
                or type(rate) is not float
                or group.get("capturable")
                or group.get(STEP) is not position
                or group.get(BASE) is not base
                or group.get(MAX) is not top
            ):
                return False
        return not self.written.numbers or are_untouched(records, self.written.momentum_bounds)

    def is_settled(self) -> bool:
        """Return whether the groups are ours and hold our bounds. Rates are not compared."""
        groups = self._optimizer.param_groups
        known = self.are_ours(groups) and have_counts(groups, self._settings, self._gate)
        return known and all(
            STEP in group
            and isinstance(group.get(BASE), float)
            and isinstance(group.get(MAX), float)
            and (group[BASE], group[MAX]) == bounds
            for group, bounds in zip(groups, self.written.bounds, strict=False)
        )

    def is_known(self, position: int) -> bool:
        """Return whether the groups hold the position, bounds and rates that we wrote.

        A user may add thousands of groups one by one, so the answer must be cheap.
        """
        groups = self._optimizer.param_groups
        if not self.are_ours(groups):
            return False
        try:
            same = [*map(_BOUNDS_OF, groups)] == self.written.bounds
            same = same and groups[0][STEP] == position
        except LookupError:  # a group without our keys, or no group
            return False
        ours = [record.lr for record in self.records]
        return same and all(map(operator.is_, map(_RATE_OF, groups), ours))

    def are_ours(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether these are the groups that we last wrote, in this or another list."""
        known = [record.group for record in self.records]
        return len(known) == len(groups) and all(map(operator.is_, known, groups))

    def have_ours(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether one of our groups is among these. A load leaves none of them."""
        known = {id(record.group) for record in self.records}
        return not known or not groups or any(id(group) in known for group in groups)

    def is_foreign(self, index: int, group: dict[str, Any]) -> bool:
        """Return whether other code wrote the ``lr`` of a recorded group, by its index."""
        lr = group["lr"]
        if lr is not self.records[index].lr:
            return True
        # To read a tensor on a GPU would wait for the device.
        if not isinstance(lr, Tensor) or lr.device.type != "cpu" or self._is_kept(group):
            return False
        return lr.item() != self.written.rates[index]

    def _holds_our_settings(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether groups hold the settings, and bounds of momentum, that we wrote."""
        if not hold_ours(groups, self.records):
            return False
        cycles = self._settings.cycle_momentum
        return not cycles or [*map(momentum_bounds, groups)] == self.written.momentum_bounds

    def position(self, believed: int) -> int:
        """Return the position that the groups hold; a position that other code wrote counts.

        Args:
            believed: the position that we last wrote.
        """
        groups = self._optimizer.param_groups
        ours = (record.group for record in self.records)
        position = written_position(groups, believed, ours)
        if position is None:
            # Groups that were loaded from a checkpoint without a position start at 0.
            return believed if self.have_ours(groups) else 0
        return position

    # ---- bounds

    def bounds(self, groups: Sequence[dict[str, Any]] | None = None) -> list[tuple[float, float]]:
        """Return ``(base_lr, max_lr)`` of each group: what the group holds, else what we wrote.

        A load into the wrapped optimizer may replace the groups by others without our keys. Those
        keep the bounds of the groups in their places. The mirror remembers the bounds of loaded
        groups for the next call, since a second load may follow.
        """
        groups = list(self._optimizer.param_groups) if groups is None else groups
        records = zip(self.records, self.written.bounds, strict=False)  # another thread may write
        known = {id(record.group): bounds for record, bounds in records}
        if self.have_ours(groups):
            self._loaded = None
            return found_bounds(groups, [known.get(id(group)) for group in groups])
        before = self._groups  # perhaps with groups that were added just before the load
        placed = [known.get(id(group)) for group in before]
        last = found_bounds(*self._loaded) if self._loaded else found_bounds(before, placed)
        found = found_bounds(groups, last)
        self._loaded = groups, found
        return found

    def fill_in_bounds(
        self, index: int, group: dict[str, Any], bounds: tuple[float, float]
    ) -> None:
        """Write a group's bounds, and those of its momentum if the group has none."""
        group[BASE], group[MAX] = bounds
        self.fill_in_momentum_bounds(index, group)

    def fill_in_momentum_bounds(self, index: int, group: dict[str, Any]) -> None:
        """Write the bounds of a group's momentum, if momentum cycles and the group has none.

        A new group gets those of the first group, or torch's if all groups were taken away.
        """
        if not self._settings.cycle_momentum or {BASE_MOMENTUM, MAX_MOMENTUM} <= group.keys():
            return
        known = self.written.momentum_bounds or [(LOW_MOMENTUM, HIGH_MOMENTUM)]
        group[BASE_MOMENTUM], group[MAX_MOMENTUM] = known[index if index < len(known) else 0]

    # ---- values

    def look_ahead(self, position: int, bounds: list[tuple[float, float]] | None = None) -> Values:
        """Return what :meth:`write` will write at a position with these bounds.

        A caller asks before anything changes, since a user's ``scale_fn`` may raise.

        Args:
            position: the number of the step.
            bounds: those of each group; ``None`` for the present ones.
        """
        self._ahead = self.evaluate(position, bounds)
        return self._ahead

    def evaluate(self, position: int, bounds: list[tuple[float, float]] | None = None) -> Values:
        """Return the values of a position with these bounds, or with the present ones."""
        _, present, momentum_bounds, *_ = self.written
        bounds = present if bounds is None else bounds
        settings = self._settings
        followed = [record.followed for record in self.records] if settings.schedules else []
        return evaluate(settings.schedule, position, bounds, momentum_bounds, followed)

    # ---- the answers

    def adopt(self) -> None:
        """Take over the bounds that other code wrote; write the bounds of groups without."""
        groups = list(self._optimizer.param_groups)
        check_counts(groups, "param_groups")
        warn_each([take_over_kind(self._settings.average, groups, "the wrapped optimizer")])
        for i, (group, bounds) in enumerate(zip(groups, self.bounds(groups), strict=True)):
            self.fill_in_bounds(i, group, bounds)
        if self._gate is not None:
            self._gate.adopt(groups)

    def write(self, position: int, is_driven: Callable[[Tensor], bool]) -> None:
        """Write position, policy, rates and settings of a step into all groups.

        Args:
            position: the number of the step.
            is_driven: returns whether the device has already written the rate into a tensor.
        """
        all_groups = self._optimizer.param_groups
        groups = list(all_groups)  # another thread may add a group meanwhile
        cycles = self._settings.cycle_momentum
        momenta = [*map(momentum_bounds, groups)] if cycles else []
        bounds, values = self.bounds(groups), self._ahead
        known = self.records
        schedules = schedules_of(self._settings, known, groups)
        followed = [
            followed_by(g, s, cycles=cycles) for g, s in zip(groups, schedules, strict=True)
        ]
        is_ahead = values is not None and followed == [record.followed for record in known]
        if values is None or not is_ahead or values[:3] != (position, bounds, momenta):
            values = evaluate(self._settings.schedule, position, bounds, momenta, followed)
        records: list[Record] = []
        rates: list[float] = []
        taken: set[int] = set()
        for i, (group, rate) in enumerate(zip(groups, values.rates, strict=True)):
            is_ours = i < len(known) and known[i].group is group
            lr = known[i].lr if is_ours else group["lr"]
            kept = self._write_keys(group, position, schedules[i])
            lr, rate = write_rate(group, lr, rate, taken, is_driven, kept=kept)
            records.append(Record(group, lr, schedules[i], followed[i]))
            rates.append(rate)
        write_settings(records, values.numbers, set(), {id(each.group): each for each in known})
        values = values._replace(rates=rates)
        # An interrupt finds either all as before, or all new.
        self.records, self.written, self._groups = records, values, all_groups
        self._loaded = self._ahead = None

    def advance(self, values: Values) -> None:
        """:meth:`write` the next step into groups that other code has not touched.

        Args:
            values: what :meth:`look_ahead` returned for the next step.
        """
        position = values.position
        for record, rate in zip(self.records, values.rates, strict=False):
            group = record.group
            group["lr"] = record.lr = rate
            group[STEP] = position
        if values.numbers:
            write_settings(self.records, values.numbers, set())
        self.written, self._ahead = values, None

    def take_over(self, values: Values, rates: list[object], settings: list[list[object]]) -> None:
        """Take note of values that native code has written, and of the objects that hold them."""
        for record, rate, held in zip(self.records, rates, settings, strict=True):
            record.lr, record.settings = rate, held
        self.written, self._ahead = values, None

    def join(self, position: int) -> None:
        """:meth:`write` the last group alone, which was added to those that we know."""
        groups = self._optimizer.param_groups
        group = groups[-1]
        bounds = (group[BASE], group[MAX])
        momenta = [momentum_bounds(group)] if self._settings.cycle_momentum else []
        schedules = self._settings.common_schedules
        followed = followed_by(group, schedules, cycles=self._settings.cycle_momentum)
        values = evaluate(self._settings.schedule, position, [bounds], momenta, [followed])
        taken: set[int] = set()
        if isinstance(group["lr"], Tensor):
            taken = {id(record.lr) for record in self.records}
        kept = self._write_keys(group, position, schedules)
        lr, rate = write_rate(group, group["lr"], values.rates[0], taken, never_driven, kept=kept)
        record = Record(group, lr, schedules, followed)
        taken = set()
        if any(isinstance(held_by(group, each), Tensor) for each in record.followed):
            taken = {id(held) for each in self.records for held in each.settings}
        write_settings([record], values.numbers, taken, {})
        values = values._replace(rates=[rate])
        records = [*self.records, record]
        values = Values(position, *map(operator.add, self.written[1:], values[1:]))
        self.records, self.written, self._groups = records, values, groups

    def _write_keys(
        self, group: dict[str, Any], position: int, schedules: Mapping[str, Schedule]
    ) -> bool:
        """Write our keys, apart from bounds; return whether the device keeps the group's rate."""
        write_keys(self._settings, group, position, schedules)
        put_statistics(self._gate, group)
        return self._is_kept(group)
