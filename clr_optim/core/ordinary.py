"""The ordinary step: one call of native code, with values that Python has computed ahead.

Native code checks whether anything is unusual, updates the parameters, and writes the values of the
next step into the groups. Python evaluates the schedule once per block of up to 64 steps. If
anything is unusual, nothing has changed, and the general way (:mod:`clr_optim.core.step`) takes the
step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clr_optim.averages import are_counted, weights_ahead
from clr_optim.backends import current_device
from clr_optim.backends.base import FusedBackend, WhoKnows
from clr_optim.checks import LAST_STEP
from clr_optim.core.averaging import Averaging
from clr_optim.core.followed import numbers_of
from clr_optim.core.groups import GroupMirror
from clr_optim.core.position import Position
from clr_optim.core.records import Record
from clr_optim.core.serving import Serving
from clr_optim.core.settings import Settings
from clr_optim.core.values import Values
from clr_optim.gate import NO_STATISTICS, Gate
from clr_optim.keys import AVERAGES, BASE, BASE_MOMENTUM, MAX, MAX_MOMENTUM, SKIPS
from clr_optim.plan import Plan

__all__ = ["OrdinarySteps"]

# The largest number of steps whose values are computed at once.
_MOST_AHEAD = 64


class OrdinarySteps:
    """Steps that native code takes alone.

    A caller holds the optimizer's lock.

    Args:
        settings: the optimizer and its policy.
        mirror: what we wrote into the groups.
        position: the position, and who knows it.
        serving: the backend.
        averaging: the averages.
        gate: decides which steps are skipped, if any are.
    """

    def __init__(
        self,
        settings: Settings,
        mirror: GroupMirror,
        position: Position,
        serving: Serving,
        averaging: Averaging,
        gate: Gate | None,
    ) -> None:
        self._settings = settings
        self._mirror = mirror
        self._position = position
        self._serving = serving
        self._averaging = averaging
        self._gate = gate
        # The number of steps that the next values are for. It doubles from 1 up to a block, so that
        # a loop whose steps are all unusual computes few values in vain.
        self._count = 1
        #: the norm of all gradients in the last step that depended on it
        self.norm: Tensor | None = None

    @property
    def _plan(self) -> Plan | None:
        fused = self._serving.fused
        return fused.plan if fused is not None and fused.steps_alone else None

    def take(self, attributes: dict[str, Any]) -> bool:
        """Take the next step, and return True; or change nothing and return False.

        Args:
            attributes: the dictionary of the CyclicalOptimizer.
        """
        fused, plan = self._serving.fused, self._plan
        if fused is None or plan is None or current_device.is_capturing():
            return False
        native, lib = plan.native, plan.lib
        calls, gate = native.calls, self._gate
        before = NO_STATISTICS if gate is None else gate.statistics
        may_skip = gate is not None or "found_inf" in attributes
        if may_skip and native.launches is not None:
            fused.who_knows = WhoKnows.MAYBE  # the device may skip the step
        try:
            outcome = native.step(attributes)
            if outcome == lib.OUT_OF_VALUES and self._hand_down(fused, plan, attributes):
                outcome = native.step(attributes)
        except BaseException:
            fused.doubt(has_begun=native.calls != calls)
            if gate is not None and native.calls == calls:
                gate.take_back(before)
            raise
        if outcome in (lib.TAKEN, lib.SKIPPED):
            return True
        # With a momentum of 0 the host must know whether the step happens.
        waits = may_skip and self._settings.momentum_vanishes
        if outcome == lib.UNSERVED and not waits and self._may_serve(plan):
            fused.bind_next()
        return False

    def leave(self) -> None:
        """Forget the values: the general way takes the next step."""
        plan = self._plan
        if plan is not None:
            self.last_norm()
            plan.native.end_course()
            self._count = 1

    # ---- the norm of the gradients

    def last_norm(self) -> Tensor | None:
        """Return :attr:`norm`, after making a tensor of a number that native code has computed."""
        plan = self._plan
        number = None if plan is None else plan.native.take_norm()
        if plan is not None and number is not None:
            self.norm = torch.tensor(number, dtype=plan.norm_dtype, device="cpu")
        return self.norm

    # ---- values ahead

    def _hand_down(self, fused: FusedBackend, plan: Plan, attributes: dict[str, Any]) -> bool:
        """Give native code the records of the groups and the values of the coming steps.

        Returns:
            Whether an ordinary step may follow. Native code itself looks at the groups.
        """
        settings, mirror, position = self._settings, self._mirror, self._position
        if not self._may_serve(plan):
            return False
        position.catch_up()
        position.warn_unread_bounds()
        gate = self._gate
        needs_norm = settings.max_grad_norm is not None or gate is not None
        if needs_norm and any(plan.spreads):
            return False  # the norm is a sum over ranks
        number, written, records = position.number, mirror.written, mirror.records
        if written.position != number or len(plan.scalars) != len(records):
            return False  # other code has moved the position, or added a group
        if not fused.agrees(position.course()):
            return False
        values = self._values_after(written)
        if not values:
            return False
        ends = []
        if attributes.get("_cycle_end_hooks"):
            ends = [settings.schedule.is_cycle_end(each.position) for each in values]
        rows = [written, *values]
        steps = range(number, number + len(values))
        groups = [record.group for record in records]
        # One call, so that an interrupt finds the old course or the new one.
        plan.native.begin_course(
            [
                (
                    record.group,
                    record.lr,
                    _entries(written, record, i, gate),
                    _settings(plan, record, i),
                )
                for i, record in enumerate(records)
            ],
            written.position,
            [row.rates for row in rows],
            [row.numbers for row in rows] if written.numbers else [],
            ends,
            settings.max_grad_norm,
            gate and (gate.threshold, plan.norm_dtype is torch.float64, gate.judge),
            weights_ahead(settings.average, settings.schedule, steps, groups),
        )
        self._count = min(2 * self._count, _MOST_AHEAD)
        return True

    def _may_serve(self, plan: Plan) -> bool:
        """Return whether native code may take steps, as far as settings and groups tell."""
        average, groups = self._settings.average, self._settings.optimizer.param_groups
        if average is not None and (
            self._averaging.is_exchanged
            or self._averaging.left_to_host(plan.unserved)
            or not are_counted(average, groups)
        ):
            return False
        return not (self._settings.has_scale_fn or plan.needs_python) and all(
            map(_is_plain, self._mirror.records)
        )

    def _values_after(self, written: Values) -> list[Values]:
        """Return the values of the coming positions.

        They end before a momentum of 0, since SGD without momentum has another kernel.
        """
        coming: list[Values] = []
        if not self._has_no_momentum(written):
            last = min(written.position + self._count, LAST_STEP)
            for number in range(written.position + 1, last + 1):
                values = self._mirror.evaluate(number)
                if self._has_no_momentum(values):
                    break
                coming.append(values)
        return coming

    def _has_no_momentum(self, values: Values) -> bool:
        """Return whether a momentum is 0, apart from betas."""
        if not self._settings.cycle_momentum or 0.0 not in values.numbers:
            return False
        found = numbers_of([record.followed for record in self._mirror.records], values.numbers)
        return any(
            numbers == [0.0] and setting.key == "momentum"
            for record, of_group in zip(self._mirror.records, found, strict=True)
            for setting, numbers in zip(record.followed, of_group, strict=True)
        )


def _entries(
    written: Values, record: Record, group: int, gate: Gate | None
) -> list[tuple[str, object]]:
    """Return what a group must still hold in an ordinary step, beside rate and settings."""
    entries: list[tuple[str, object]] = [*zip((BASE, MAX), written.bounds[group], strict=True)]
    if gate is not None:
        entries.append((SKIPS, gate.held))
    if written.momentum_bounds:
        bounds = written.momentum_bounds[group]
        entries += zip((BASE_MOMENTUM, MAX_MOMENTUM), bounds, strict=True)
    if AVERAGES in record.group:
        entries.append((AVERAGES, record.group[AVERAGES]))
    return entries


def _settings(plan: Plan, record: Record, group: int) -> list[tuple[object, ...]]:
    """Return the settings of a group that follow a schedule, as ``begin_course`` takes them."""
    return [
        (each.key, held, each.members, *plan.places_of(group, each.key, each.members))
        for each, held in zip(record.followed, record.settings, strict=True)
    ]


def _is_plain(record: Record) -> bool:
    """Return whether native code can write the group's rate and momentum."""
    lr = record.lr
    is_plain_rate = type(lr) is float or (
        type(lr) is Tensor
        and lr.device.type == "cpu"
        and lr.dtype in (torch.float32, torch.float64)
        and lr.layout is torch.strided
        and lr.numel() == 1
        and not lr.is_neg()
    )
    return is_plain_rate and all(type(held) in (float, tuple) for held in record.settings)
