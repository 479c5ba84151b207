"""The plan of one optimizer: which tensors one kernel call updates, kept while nothing changes.

torch collects, groups, checks and allocates at every step. A plan does this once. Each step then
asks only whether everything that the plan was built from is still the same, down to the addresses.
If not, the plan takes in the change or is built anew. No kernel ever uses an unchecked address.
"""

from __future__ import annotations

import ctypes
import operator
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.plan.placement import Placement, Target
from clr_optim.plan.reading import GroupReadings, why_unreadable
from clr_optim.plan.structures import Answer, View
from clr_optim.rules import UpdateRule
from clr_optim.sharding import Spread

__all__ = ["Plan"]

_PAUSE_S = 1e-4

# Answers that need no change of the plan, and answers while a step uses the rows.
_CURRENT = (Answer.ALL_ACTIVE, Answer.SOME_IDLE)
_IN_USE = (Answer.BUSY, Answer.NESTED)

# Up to this number, rows are replaced one by one within one step. For more, the plan is built anew.
_FEW_ROWS = 8

# How often one step builds a plan and looks again, while other code keeps changing things.
_BUILDS = 3


class Plan:
    """The buckets of one optimizer.

    Args:
        optimizer: the wrapped optimizer, of the class of ``rule``.
        rule: its update rule.
        lib: the compiled kernels, loaded so that calls keep the GIL.
        device: the type of the devices whose tensors are planned for. Others are left to torch.
        capturable: whether the kernels can be captured into a graph.
        by_alignment: whether tensors that all begin at a multiple of 16 bytes have buckets apart
            from the others.
        lock: lets one thread at a time build the plan. None makes a new lock.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: UpdateRule,
        lib: ctypes.PyDLL,
        device: str,
        *,
        capturable: bool = False,
        by_alignment: bool = False,
        lock: threading.RLock | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._lib = lib
        self._target = Target(optimizer, rule, device, capturable, by_alignment)
        self._lock = threading.RLock() if lock is None else lock
        #: two numbers: all kernel calls, and the calls that advanced the position
        self.tally = (ctypes.c_int64 * 2)()
        #: the scan compares with this view; kernels read the rows through it
        self.view = View()
        #: the kernel's scalars, a row per group; each step fills in the rates
        self.scalars = self.view.scalars
        #: whether a parameter of the buckets lacks a gradient
        self.partial = False
        # The groups and the state that the plan was built from. No groups: to be built anew.
        self._groups: Sequence[dict[str, Any]] | None = None
        self._state: Any = None
        self._dicts: list[Any] = []  # the values of the state
        self._answer = 0
        self._begin(GroupReadings(rule))

    def _begin(self, readings: GroupReadings) -> None:
        """Start with empty buckets."""
        self._readings = readings
        self._placement = placement = Placement(self._target, readings, self.tally)
        self.buckets = placement.buckets
        #: parameters with a gradient that torch's own step must serve, and why
        self.rest = placement.rest

    @property
    def pending(self) -> bool:
        """Whether the next step creates state."""
        return bool(self._placement.unfilled)

    @property
    def spreads(self) -> list[Spread | None]:
        """How the parameters, also those left to torch, are divided over ranks."""
        return self._readings.spreads

    @property
    def wide(self) -> bool:
        """Whether all parameters are float64."""
        return self._readings.wide

    # ---- before a step

    def refresh(self) -> None:
        """Bring the plan up to date: at least the addresses of gradients, at most all of it."""
        with self._lock:
            builds = replaced = 0
            while builds < _BUILDS:
                if self._placement.unfit and self._placement.unfit_changed():
                    self._groups = None
                if self.is_current():
                    return
                replaced += self._answer == Answer.CHANGED
                if self._groups is None or replaced > _FEW_ROWS or not self._adopt():
                    builds += 1
                    self._build()
                    if self._groups is None:
                        return  # no kernel serves these groups
            # Other threads keep changing things. Take the plan as just built: each of its rows is
            # right for one reading of the tensors.
            self._build()

    def is_current(self) -> bool:
        """Return whether everything that the plan was built from is the same.

        Takes in the addresses of the gradients, which change at every ``zero_grad``.
        """
        optimizer = self._optimizer
        self._answer = 0
        if optimizer.state is not self._state or not self._are_planned(optimizer.param_groups):
            return False
        readings = self._readings
        if readings.mutables and readings.changed_in_place() and not self._take_settings():
            return False
        answer = self._ask()
        if answer == Answer.SETTINGS_CHANGED and self._take_settings():
            answer = self._ask()
        self.partial = answer == Answer.SOME_IDLE
        if self.partial and not self._placement.unfilled_are_active():
            return False  # a gradient was taken away before the step that creates its state
        self._answer = answer
        return answer in _CURRENT

    def forget(self) -> None:
        """Have the next :meth:`refresh` build the plan anew."""
        with self._lock:
            self._groups = None
            self.release()

    def release(self) -> None:
        """Let go of the gradients, if no step follows a :meth:`refresh`."""
        with self._lock:
            if not self.view.busy:
                self.view.ready = 0
                self.view.table["held"] = 0
                for bucket in self.buckets:
                    bucket.release()

    def after_fork(self, lock: threading.RLock) -> None:
        """Start anew in a forked process, where no thread finishes what another one began.

        Args:
            lock: a new lock.
        """
        self._lock = lock
        self.view.busy = 0
        self.forget()

    def _are_planned(self, groups: Any) -> bool:
        """Return whether the plan was built from these groups; take in another list of them."""
        known = self._groups
        if groups is known or known is None:
            return known is not None
        if type(groups) not in (list, tuple) or len(groups) != len(known):
            return False
        if not all(map(operator.is_, groups, known)):
            return False
        self._groups = self.view.groups = groups
        return True

    def _take_settings(self) -> bool:
        """Take in changed settings; return False if the plan must be built anew."""
        return self._readings.take_settings(list(self._optimizer.param_groups), self.scalars)

    def _ask(self) -> int:
        """Return the answer of a scan, made when no other thread is in the middle of a step."""
        view = self.view
        while True:
            answer: int = self._lib.clr_current(view.address)
            if answer not in _IN_USE:
                return answer
            if answer == Answer.NESTED:
                raise RuntimeError(
                    "step() was called within a step of the same optimizer, by a finalizer or a "
                    "signal handler: call it after that step"
                )
            time.sleep(_PAUSE_S)

    # ---- changes

    def _adopt(self) -> bool:
        """Take in the change that the scan found; return False if the plan must be built anew."""
        adopt = {
            Answer.GROUPS_CHANGED: self._adopt_members,
            Answer.STATE_CHANGED: self._adopt_state,
            Answer.WOKEN: self._adopt_gradients,
            Answer.CHANGED: self._adopt_row,
        }.get(self._answer)
        if adopt is None:
            return False
        self.view.ready = 0  # no step begins while the tables grow
        while self.view.busy:
            time.sleep(_PAUSE_S)
        # An interrupt may leave the plan half changed. It is then built anew.
        groups, self._groups = self._groups, None
        if not adopt():
            return False
        self._groups = groups
        return True

    def _adopt_members(self) -> bool:
        added = self._readings.take_members(list(self._optimizer.param_groups))
        if added is None:
            return False
        self._placement.add_idle(added)
        self._write_scalars(self.view)
        return True

    def _adopt_row(self) -> bool:
        return self._placement.replace(self.buckets[self.view.bucket], self.view.row)

    def _adopt_state(self) -> bool:
        state = self._optimizer.state
        entries = list(state.values())
        if not self._placement.take_state(state, _FEW_ROWS):
            return False
        self._dicts[:] = entries
        return True

    def _adopt_gradients(self) -> bool:
        if not self._placement.take_gradients():
            return False
        self.view.point_to_buckets(self.buckets, self.tally)
        return True

    # ---- building

    def _build(self) -> None:
        optimizer, target = self._optimizer, self._target
        self._groups = None  # remains so if an exception ends the building
        groups, state = optimizer.param_groups, optimizer.state
        why = why_unreadable(groups, state)
        self._begin(GroupReadings(target.rule, list(groups), capturable=target.capturable, why=why))
        self._placement.place_all(why)
        if why is None:
            self._show(groups, state)
            self._groups, self._state = groups, state
        else:
            self._show([], {})

    def _show(self, groups: Sequence[dict[str, Any]], state: dict[Tensor, Any]) -> None:
        """Make a new view of the plan; another thread may use it at once."""
        self._dicts = list(state.values())
        readings = self._readings
        view = View(
            groups=groups,
            members=readings.members,
            keys=readings.keys,
            settings=readings.settings,
            state=state,
            dicts=self._dicts,
            idle=self._placement.idle,
            params="params",
            grad="grad",
            none=None,
            has_mode=torch._C._is_torch_function_mode_enabled,
            no=False,
            tally=ctypes.addressof(self.tally),
        )
        view.address = ctypes.addressof(view)
        view.ready = 1
        self._write_scalars(view)
        view.point_to_buckets(self.buckets, self.tally)
        self.view = view

    def _write_scalars(self, view: View) -> None:
        self.scalars = self._readings.scalar_table()
        view.point_to_scalars(self.scalars)

    # ---- after a step

    def take_momenta(self, settings: Sequence[object], momenta: Sequence[float]) -> None:
        """Take in the momenta that the optimizer wrote into its groups after a step.

        Args:
            settings: the new ``momentum`` or ``betas`` of each group.
            momenta: the number of each.
        """
        self._readings.take_momenta(settings, momenta, self.scalars)

    def active_params(self) -> list[Tensor]:
        """Return the parameters of the buckets that have a gradient."""
        return self._placement.active_params() if self.partial else self._placement.params

    def commit(self) -> None:
        """Mark the parameters as changed, and put new state into the optimizer, after a step."""
        # As after any in-place update: a backward pass through an older graph must raise.
        torch.autograd.graph.increment_version(self.active_params())
        if not self._placement.unfilled:
            return
        with self._lock:
            state = self._optimizer.state
            self._placement.hand_over_state(state)
            self._dicts[:] = state.values()
            self.release()

    def commit_if_called(self) -> None:
        """Call :meth:`commit` after an exception, if the kernel was called before it."""
        if not self._placement.unfilled or self._placement.was_called():
            self.commit()
