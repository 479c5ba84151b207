"""GroupMirror: what we wrote into the parameter groups, and what other code has written since."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from clr_optim.core.rates import (
    momentum_bounds,
    momentum_of,
    write_momentum,
    write_rate,
    written_rate,
)
from clr_optim.core.saved import found_bounds, written_position
from clr_optim.core.settings import HIGH_MOMENTUM, LOW_MOMENTUM, Settings
from clr_optim.keys import BASE, BASE_MOMENTUM, MAX, MAX_MOMENTUM, SCHEDULE, STEP

__all__ = ["UNCHANGED", "Changes", "GroupMirror", "Record", "Values"]

_BOUNDS_OF, _RATE_OF = operator.itemgetter(BASE, MAX), operator.itemgetter("lr")


def _never(_: Tensor) -> bool:
    return False


class Record:
    """One group as we wrote it."""

    __slots__ = ("bounds", "group", "lr", "momenta", "momentum", "rate")

    def __init__(
        self, group: dict[str, Any], bounds: tuple[float, float], lr: object, rate: float
    ) -> None:
        self.group = group
        #: ``(base_lr, max_lr)``
        self.bounds = bounds
        #: the object in ``group["lr"]``, and its value
        self.lr, self.rate = lr, rate
        #: ``(base_momentum, max_momentum)`` if momentum cycles, and the object that holds momentum
        self.momenta: tuple[float, float] | None = None
        self.momentum: object = None


class Changes(NamedTuple):
    """What other code has written since the last write."""

    #: the list of groups, a group's bounds, or the position
    course: bool
    #: the numbers of the groups whose ``lr`` was written
    rates: Sequence[int]
    #: a group's momentum, or the bounds of one
    momentum: bool


class Values(NamedTuple):
    """What the groups hold at a position.

    Args:
        position: the number of the step.
        bounds: ``(base_lr, max_lr)`` of each group.
        momentum_bounds: ``(base_momentum, max_momentum)`` of each group; empty if momentum does
            not cycle.
        rates: the rate of each group.
        momenta: the momentum of each group; empty if momentum does not cycle.
    """

    position: int
    bounds: list[tuple[float, float]]
    momentum_bounds: list[tuple[float, float]]
    rates: list[float]
    momenta: list[float]


#: The answer of :meth:`GroupMirror.changes` if other code has written nothing.
UNCHANGED = Changes(course=False, rates=(), momentum=False)


class GroupMirror:
    """One record per group, in the order of the groups.

    :meth:`changes` compares the groups with the records. :meth:`adopt`, :meth:`overrule` and
    :meth:`write` are the three answers to a change. No other code asks whether groups changed.

    Args:
        settings: the optimizer and its policy.
        is_kept: returns whether the device keeps a group's ``lr`` current.
    """

    def __init__(self, settings: Settings, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        self._settings = settings
        self._optimizer: Any = settings.optimizer
        self._is_kept = is_kept
        #: the list of groups that was last written; some optimizers make a new list at each access
        self.groups: Sequence[dict[str, Any]] | None = None
        self.records: list[Record] = []
        # What the last look ahead found, for the write that follows it.
        self._ahead: Values | None = None

    # ---- the question

    def changes(self, position: int) -> Changes:
        """Return what other code has written, compared with the records and a position."""
        if self.is_untouched(position):
            return UNCHANGED
        course = not self.is_settled() or self.position(position) != position
        rates = [
            i
            for i, (group, record) in enumerate(
                zip(self._optimizer.param_groups, self.records, strict=False)
            )
            if self.is_foreign(group, record)
        ]
        momentum = not self._is_momentum_ours()
        return Changes(course, rates, momentum) if course or rates or momentum else UNCHANGED

    def is_untouched(self, position: int) -> bool:
        """Return whether all groups certainly hold what we wrote, without any tensor.

        A step of a small model asks this question and little more, so the answer must be cheap.
        """
        records, groups = self.records, self._optimizer.param_groups
        if len(records) != len(groups):
            return False
        if self.groups is not groups and not self.are_ours(groups):
            return False
        for group, record in zip(groups, records, strict=False):
            rate = record.lr
            base, top = record.bounds
            if (
                group["lr"] is not rate
                or type(rate) is not float
                or group.get("capturable")
                or type(group.get(STEP)) is not int
                or group[STEP] != position
                or group.get(BASE) is not base
                or group.get(MAX) is not top
            ):
                return False
        return not self._settings.cycle_momentum or self._is_momentum_untouched()

    def _is_momentum_untouched(self) -> bool:
        """Return whether all groups certainly hold the momentum that we wrote, without a tensor."""
        for record in self.records:
            group, momentum = record.group, record.momentum
            betas = group.get("betas")
            if (
                (group.get("momentum") if betas is None else betas) is not momentum
                or type(momentum) not in (float, tuple)
                or record.momenta is None
                or group.get(BASE_MOMENTUM) is not record.momenta[0]
                or group.get(MAX_MOMENTUM) is not record.momenta[1]
            ):
                return False
        return True

    def is_settled(self) -> bool:
        """Return whether the groups are those that we wrote, with our keys and bounds."""
        groups = self._optimizer.param_groups
        return (
            self.are_ours(groups)
            and len(self.records) == len(groups)
            and all(
                STEP in group
                and isinstance(group.get(BASE), float)
                and isinstance(group.get(MAX), float)
                and (group[BASE], group[MAX]) == record.bounds
                for group, record in zip(groups, self.records, strict=False)
            )
        )

    def is_known(self, position: int) -> bool:
        """Return whether the groups hold the position, bounds and rates that we wrote.

        A user may add thousands of groups one by one, so the question is as cheap as torch's own
        check of a new group.
        """
        groups = self._optimizer.param_groups
        if not self.are_ours(groups) or len(self.records) != len(groups):
            return False
        try:
            same = [*map(_BOUNDS_OF, groups)] == [record.bounds for record in self.records]
            same = same and groups[0][STEP] == position
        except LookupError:  # a group without our keys, or no group
            return False
        rates = [record.lr for record in self.records]
        return same and all(map(operator.is_, map(_RATE_OF, groups), rates))

    def are_ours(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether these are the groups that were last written, in this or another list."""
        known = self.groups
        if known is groups or known is None:
            return known is groups
        return len(known) == len(groups) and all(map(operator.is_, known, groups))

    def is_foreign(self, group: dict[str, Any], record: Record) -> bool:
        """Return whether other code wrote a group's ``lr``."""
        lr = group["lr"]
        if lr is not record.lr:
            return True
        # To read a tensor on a GPU would wait for the device.
        if not isinstance(lr, Tensor) or lr.device.type != "cpu" or self._is_kept(group):
            return False
        return lr.item() != record.rate

    def _is_momentum_ours(self) -> bool:
        """Return whether the groups hold the momenta, and the bounds of momentum, that we wrote."""
        if not self._settings.cycle_momentum:
            return True
        groups, records = self._optimizer.param_groups, self.records
        if len(groups) != len(records):
            return False
        if [record.momenta for record in records] != [*map(momentum_bounds, groups)]:
            return False
        # Other code may have filled a tensor: the object does not show it.
        return all(
            momentum_of(group) is record.momentum and type(record.momentum) is not Tensor
            for group, record in zip(groups, records, strict=False)
        )

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
            return believed if self.are_ours(groups) else 0
        return position

    # ---- bounds

    def bounds(self, groups: Sequence[dict[str, Any]] | None = None) -> list[tuple[float, float]]:
        """Return ``(base_lr, max_lr)`` of each group: what the group holds, else what we wrote.

        A load into the wrapped optimizer may replace the groups by others without our keys. Those
        keep the bounds of the groups in their places.
        """
        groups = list(self._optimizer.param_groups) if groups is None else groups
        known: list[tuple[float, float]] = []
        if self.groups is not None and not self.are_ours(groups):
            before = [record.bounds for record in self.records]
            known = found_bounds(self.groups, before)
        return found_bounds(groups, known)

    def set_bounds(self, index: int, group: dict[str, Any], bounds: tuple[float, float]) -> None:
        """Write a group's bounds, and those of its momentum if the group has none."""
        group[BASE], group[MAX] = bounds
        if self._settings.cycle_momentum and not (BASE_MOMENTUM in group and MAX_MOMENTUM in group):
            # The first group's, if this group is new. If all groups were taken away: torch's.
            known = [record.momenta for record in self.records]
            low, high = (known[index if index < len(known) else 0] if known else None) or (
                LOW_MOMENTUM,
                HIGH_MOMENTUM,
            )
            group[BASE_MOMENTUM], group[MAX_MOMENTUM] = low, high

    # ---- values

    def look_ahead(self, position: int) -> Values:
        """Return what :meth:`write` will write at a position, if the bounds stay the same.

        A step asks before the kernels change anything, since a user's ``scale_fn`` may raise.
        """
        records = self.records
        momenta: list[Any] = []
        if self._settings.cycle_momentum:
            momenta = [record.momenta for record in records]
        return self._values(position, [record.bounds for record in records], momenta)

    def _values(
        self,
        position: int,
        bounds: list[tuple[float, float]],
        momentum_bounds: list[tuple[float, float]],
    ) -> Values:
        """Evaluate the policy, or return the last look ahead if it was at the same values."""
        ahead = self._ahead
        if ahead is not None and ahead[:3] == (position, bounds, momentum_bounds):
            return ahead
        schedule = self._settings.schedule
        rates = schedule.rates(position, bounds)
        momenta = schedule.momenta(position, momentum_bounds) if momentum_bounds else []
        self._ahead = Values(position, bounds, momentum_bounds, rates, momenta)
        return self._ahead

    # ---- the three verbs

    def adopt(self) -> None:
        """Take over the bounds that other code wrote; give groups without bounds theirs."""
        groups = list(self._optimizer.param_groups)
        for i, (group, bounds) in enumerate(zip(groups, self.bounds(groups), strict=True)):
            self.set_bounds(i, group, bounds)

    def overrule(self, changes: Changes) -> dict[int, float]:
        """Return the rates that other code wrote and that :meth:`write` will replace, by group."""
        groups = self._optimizer.param_groups
        written = {i: written_rate(groups[i]["lr"], i) for i in changes.rates}
        return {i: lr for i, lr in written.items() if lr != self.records[i].rate}

    def write(self, position: int, is_driven: Callable[[Tensor], bool]) -> None:
        """Write position, policy, rates and momenta of a step into all groups.

        Args:
            position: the number of the step.
            is_driven: returns whether the device has already written the rate into a tensor.
        """
        all_groups = self._optimizer.param_groups
        groups = list(all_groups)  # another thread may add a group meanwhile
        momenta: list[tuple[float, float]] = []
        if self._settings.cycle_momentum:
            momenta = [*map(momentum_bounds, groups)]
        values = self._values(position, self.bounds(groups), momenta)
        before = self.records if self.are_ours(all_groups) else []
        records: list[Record] = []
        taken: set[int] = set()
        for i, (group, rate) in enumerate(zip(groups, values.rates, strict=True)):
            lr = before[i].lr if i < len(before) else group["lr"]
            lr, rate = self._write_rate(group, position, lr, rate, taken, is_driven)
            records.append(Record(group, values.bounds[i], lr, rate))
        _write_momenta(records, values, set())
        self.groups, self.records, self._ahead = all_groups, records, None

    def advance(self, values: Values) -> None:
        """:meth:`write` the next step into groups that other code has not touched.

        Args:
            values: what :meth:`look_ahead` returned for the next step.
        """
        position, rates = values.position, values.rates
        for record, rate in zip(self.records, rates, strict=False):
            group = record.group
            group["lr"] = rate
            group[STEP] = position
            record.lr = record.rate = rate
        if values.momenta:
            _write_momenta(self.records, values, set())

    def join(self, position: int) -> None:
        """:meth:`write` the last group alone, which was added to those that we know."""
        groups = self._optimizer.param_groups
        group = groups[-1]
        bounds = (group[BASE], group[MAX])
        momenta = [momentum_bounds(group)] if self._settings.cycle_momentum else []
        values = self._values(position, [bounds], momenta)
        taken: set[int] = set()
        if isinstance(group["lr"], Tensor):
            taken = {id(record.lr) for record in self.records}
        lr, rate = self._write_rate(group, position, group["lr"], values.rates[0], taken, _never)
        record = Record(group, bounds, lr, rate)
        taken = set()
        if momenta and isinstance(momentum_of(group), Tensor):
            taken = {id(each.momentum) for each in self.records}
        _write_momenta([record], values, taken)
        self.groups = groups
        self.records.append(record)

    def _write_rate(
        self,
        group: dict[str, Any],
        position: int,
        lr: object,
        rate: float,
        taken: set[int],
        is_driven: Callable[[Tensor], bool],
    ) -> tuple[object, float]:
        """Write position, policy and rate into a group; return the object in ``lr`` and its value.

        The arguments are those of :func:`write_rate`.
        """
        group[STEP] = position
        group[SCHEDULE] = self._settings.schedule_json
        return write_rate(group, lr, rate, taken, is_driven, kept=self._is_kept(group))


def _write_momenta(records: Sequence[Record], values: Values, taken: set[int]) -> None:
    """Write the momenta of a step, if momentum cycles, into the groups of some records.

    Args:
        records: the records, which take note of the momenta.
        values: the momenta and their bounds.
        taken: ids of what other groups have for their ``betas[0]``; tensors are added.
    """
    for record, each, momentum in zip(
        records, values.momentum_bounds, values.momenta, strict=False
    ):
        write_momentum(record.group, momentum, taken)
        record.momenta = each
        record.momentum = momentum_of(record.group)
