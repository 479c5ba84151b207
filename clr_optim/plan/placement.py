"""Which parameters kernels update, in which bucket, and which are left to torch's own step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.plan.bucket import Bucket, BucketKey
from clr_optim.plan.eligible import why_not
from clr_optim.plan.overlap import Memory, sharing
from clr_optim.plan.reading import GroupReadings
from clr_optim.plan.row import NO_EXTRAS, Extras, Row, make_row
from clr_optim.rules import UpdateRule
from clr_optim.sharding import local_part, spread_of

__all__ = ["Placement", "Target"]

# Up to this number, parameters are deleted from a list one by one. For more, the list is made anew.
_FEW = 16


@dataclass(frozen=True)
class Target:
    """What a plan is made for.

    Args:
        optimizer: the wrapped optimizer, of the class of ``rule``.
        rule: its update rule.
        lib: the compiled extension.
        device: the type of the devices whose tensors kernels update.
        capturable: whether the kernels can be captured into a graph.
        extras: the state that steps keep beside torch's.
    """

    optimizer: Optimizer
    rule: UpdateRule
    lib: ModuleType
    device: str
    capturable: bool = False
    extras: Extras = NO_EXTRAS


class Placement:
    """The place of every parameter.

    Args:
        target: the optimizer and the kernels.
        groups: the readings of its groups.
        native: the plan in native code, which counts kernel calls.
    """

    def __init__(self, target: Target, groups: GroupReadings, native: Any) -> None:
        self._target = target
        self._groups = groups
        self._native = native
        self.buckets: list[Bucket] = []
        #: the parameters of all buckets
        self.params: list[Tensor] = []
        #: parameters with a gradient that torch's own step must serve, and why
        self.fallback: list[tuple[Tensor, str]] = []
        #: the part of ``fallback`` that is there because of the parameter or its gradient
        self.unfit: list[tuple[Tensor, str]] = []
        #: whether a part of ``fallback`` is there because of its state, or because of shared memory
        self.fallback_by_state = False
        #: parameters without a gradient, in no bucket, and the number of each one's group
        self.idle: list[Tensor] = []
        self._idle_groups: list[int] = []
        #: rows whose state the next step creates
        self.unfilled: list[tuple[Bucket, int]] = []
        self._calls_before_unfilled = 0
        self._by_key: dict[BucketKey, Bucket] = {}
        self._memory = Memory()

    # ---- all parameters at once

    def place_all(self, why: str | None) -> None:
        """Place every parameter of the groups.

        Args:
            why: why torch must serve all groups, or None.
        """
        placed: list[tuple[Row, Tensor]] = []
        for number, members in enumerate(self._groups.members):
            for param in members:
                grad = param.grad
                if why is not None:
                    if grad is not None:
                        self.fallback.append((param, why))
                elif grad is None:
                    self.add_idle([(param, number)])
                else:
                    row = self._row_of(param, grad, number)
                    if row is not None:
                        placed.append((row, grad))
        for row, grad in self._leave_shared_memory(placed):
            self._append(row, grad)

    def add_idle(self, added: Iterable[tuple[Tensor, int]]) -> None:
        """Take in parameters without a gradient, each with the number of its group."""
        for param, number in added:
            self.idle.append(param)
            self._idle_groups.append(number)

    def _leave_shared_memory(self, placed: list[tuple[Row, Tensor]]) -> list[tuple[Row, Tensor]]:
        """Leave rows that share memory to torch, which updates one tensor after the other."""
        device = self._target.device
        others = [p for p, _ in self.fallback if local_part(p).device.type == device]
        owners = [*([p] for p in others), *([row.param, *row.state_tensors] for row, _ in placed)]
        shared = sharing(owners)
        self._memory = Memory(tensor for tensors in owners for tensor in tensors)
        alone: list[tuple[Row, Tensor]] = []
        for index, (row, grad) in enumerate(placed, len(others)):
            if index in shared:
                self.fallback.append((row.param, "tensors that share memory"))
                self.fallback_by_state = True
            else:
                alone.append((row, grad))
        return alone

    # ---- changes. Each method returns False if the change needs a new plan.

    def unfit_changed(self) -> bool:
        """Return whether a kernel may now take a gradient that no kernel could take."""
        device = self._target.device
        return any(
            grad is not None and why_not(p, grad, device) != why
            for p, why, grad in ((p, why, p.grad) for p, why in self.unfit)
        )

    def take_gradients(self) -> bool:
        """Take in parameters whose first gradient has come."""
        found = [(i, p.grad) for i, p in enumerate(self.idle) if p.grad is not None]
        woken = [(self.idle[i], self._idle_groups[i], grad) for i, grad in found]
        if len(found) > _FEW:
            still_idle = sorted({*range(len(self.idle))} - {i for i, _ in found})
            self.idle[:] = [self.idle[i] for i in still_idle]
            self._idle_groups = [self._idle_groups[i] for i in still_idle]
        else:
            for i, _ in reversed(found):
                del self.idle[i], self._idle_groups[i]
        for param, number, grad in woken:
            if grad is None:  # another thread has just taken the gradient away
                self.add_idle([(param, number)])
                continue
            row = self._row_of(param, grad, number)
            tensors = [param] if row is None else [param, *row.state_tensors]
            here = local_part(param).device.type == self._target.device
            if here and not self._memory.add(tensors):
                return False
            if row is not None:
                self._append(row, grad)
        return True

    def take_state(self, state: Mapping[Any, Any], limit: int) -> bool:
        """Take in state that was made, replaced or taken away.

        Args:
            state: ``optimizer.state``.
            limit: the largest number of rows that may have changed.
        """
        changed = [
            (bucket, index)
            for bucket in self.buckets
            for index, (row, entry) in enumerate(
                zip(bucket.rows, bucket.native.entries(), strict=False)
            )
            if state.get(row.param) is not entry and not row.pending
        ]
        if self.fallback_by_state or len(changed) > limit:
            return False  # with other state, a kernel may serve a part of `fallback`
        return all(self.replace(bucket, index) for bucket, index in changed)

    def replace(self, bucket: Bucket, index: int) -> bool:
        """Look at a row's parameter again; the new row must fit into the same bucket."""
        old = bucket.rows[index]
        grad = old.param.grad
        # A captured launch remembers more of a row than its line in the table.
        if self._target.capturable or old.pending or grad is None:
            return False
        row = self._row_of(old.param, grad, old.group)
        if row is None or self._by_key.get(self._key_of(row)) is not bucket:
            return False
        tensors = [row.param, *row.state_tensors]
        if not (self._memory.remove(bucket.spans(index)) and self._memory.add(tensors)):
            return False
        if not bucket.replace(index, row, grad, self._entry_of(row)):
            return False
        self._note_pending(row, bucket, index)
        return True

    # ---- steps

    def active_params(self) -> list[Tensor]:
        """Return the parameters of the buckets that have a gradient."""
        return [
            bucket.params[i]
            for bucket in self.buckets
            for i in np.flatnonzero(bucket.gradients).tolist()
        ]

    def unfilled_are_active(self) -> bool:
        """Return whether every row whose state the next step creates has a gradient."""
        gradients = {id(bucket): bucket.gradients for bucket, _ in self.unfilled}
        return all(gradients[id(bucket)][index] for bucket, index in self.unfilled)

    def was_called(self) -> bool:
        """Return whether a kernel was called since the first of the ``unfilled`` rows came."""
        return bool(self._native.calls != self._calls_before_unfilled)

    def hand_over_state(self, state: Any) -> None:
        """Put the state that was filled into ``optimizer.state``, under torch's names.

        A step fills the state of each row with a gradient, and a backward pass that of one row.
        """
        gradients = {id(bucket): bucket.gradients for bucket, _ in self.unfilled}
        left: list[tuple[Bucket, int]] = []
        for bucket, index in self.unfilled:
            row = bucket.rows[index]
            in_pass = self._native.in_pass
            is_filled = self._native.is_done(row.param) if in_pass else gradients[id(bucket)][index]
            if not is_filled:
                left.append((bucket, index))  # another thread may have taken the gradient away
                continue
            entry = state[row.param]
            entry.update(row.pending)
            bucket.note_filled(index, entry)
        self.unfilled = left

    # ---- one parameter

    def _row_of(self, param: Tensor, grad: Tensor, number: int) -> Row | None:
        """Return the parameter's row; or add the parameter to ``fallback`` and return None."""
        target, reading = self._target, self._groups.readings[number]
        why, unfit = reading.why, None
        if why is None:
            why = unfit = why_not(param, grad, target.device)
        if why is None:
            row = make_row(
                param,
                number,
                reading,
                optimizer=target.optimizer,
                rule=target.rule,
                device=target.device,
                extras=target.extras,
            )
            if isinstance(row, Row):
                return row
            why, self.fallback_by_state = row, True
        self.fallback.append((param, why))
        if unfit is not None:
            self.unfit.append((param, unfit))
        return None

    def _append(self, row: Row, grad: Tensor) -> None:
        key = self._key_of(row)
        bucket = self._by_key.get(key)
        if bucket is None:
            numbers = tuple(self._target.rule.numbers)
            bucket = self._by_key[key] = Bucket(*key, row.kinds, numbers)
            bucket.begin(row, self._target.lib)
            self.buckets.append(bucket)
        self.params.append(row.param)
        bucket.add(row, grad, self._entry_of(row))
        self._note_pending(row, bucket, len(bucket.rows) - 1)

    def _key_of(self, row: Row) -> BucketKey:
        param = row.param
        slots, numbers = (tuple(t.dtype for t in each) for each in (row.slots, row.numbers))
        kernel = self._groups.readings[row.group].kernel
        return BucketKey(kernel, param.dtype, slots, numbers, param.device, spread_of(param))

    def _entry_of(self, row: Row) -> dict[str, Any]:
        """Return the dictionary of a row's state, or a draft of it while state is pending."""
        state: dict[str, Any] = self._target.optimizer.state.get(row.param, {})
        return {**state, **row.pending} if row.pending else state

    def _note_pending(self, row: Row, bucket: Bucket, index: int) -> None:
        if row.pending:
            if not self.unfilled:
                self._calls_before_unfilled = self._native.calls
            self.unfilled.append((bucket, index))
