"""The plan of one optimizer: which tensors one kernel call updates, kept while nothing changes.

torch collects, groups, checks and allocates at every step. A plan does this once. Each step then
asks only whether everything that the plan was built from is still the same, down to the addresses.
If not, the plan takes in the change or is built anew. No kernel ever uses an unchecked address.

The rows and the scan are native code (``kernels/native/plan.h``); this module decides what goes
into them.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.plan.placement import Placement, Target
from clr_optim.plan.reading import GroupReadings, why_unreadable
from clr_optim.plan.row import NO_EXTRAS, Extras
from clr_optim.rules import UpdateRule
from clr_optim.sharding import Spread

__all__ = ["Plan"]

# Up to this number, a step takes in changes one by one. For more, it builds the plan anew.
_FEW_CHANGES = 8

# How often one step builds a plan and looks again, while other code keeps changing things.
_BUILDS = 3


class Plan:
    """The buckets of one optimizer.

    Args:
        optimizer: the wrapped optimizer, of the class of ``rule``.
        rule: its update rule.
        lib: the compiled extension.
        device: the type of the devices whose tensors are planned for. Others are left to torch.
        capturable: whether a device runs the kernels, so that a graph can capture them.
        lock: lets one thread at a time use the plan. None makes a new lock.
        extras: the state that steps keep beside torch's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: UpdateRule,
        lib: ModuleType,
        device: str,
        *,
        capturable: bool = False,
        lock: threading.RLock | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> None:
        self._optimizer = optimizer
        #: the compiled extension
        self.lib = lib
        self._target = Target(optimizer, rule, lib, device, capturable, extras)
        self.lock = threading.RLock() if lock is None else lock
        #: the plan in native code: scans, kernel calls, whole steps
        self.native: Any = lib.Plan(optimizer, type(optimizer).step, capturable)
        #: whether a parameter of the buckets lacks a gradient
        self.partial = False
        # The groups and the state that the plan was built from. None: the next refresh builds it.
        self._groups: Sequence[dict[str, Any]] | None = None
        self._state: Any = None
        self._dicts: dict[Any, Any] = {}  # the items of the state
        self._answer = 0
        readings = GroupReadings(rule)
        self._publish(readings, Placement(self._target, readings, self.native))
        self._write_scalars()

    def _publish(self, readings: GroupReadings, placement: Placement) -> None:
        """Take a new reading of the groups, and the places of their parameters."""
        self._readings, self._placement = readings, placement
        self.buckets = placement.buckets
        #: parameters with a gradient that torch's own step must serve, and why
        self.fallback = placement.fallback

    @property
    def steps(self) -> int:
        """The number of kernel calls that advanced the position."""
        steps: int = self.native.steps
        return steps

    @property
    def pending(self) -> bool:
        """Whether the next step creates state."""
        return bool(self._placement.unfilled)

    @property
    def unserved(self) -> list[Tensor]:
        """The parameters that are in no bucket: torch's own step or no step updates them."""
        return [*self._placement.idle, *(param for param, _ in self.fallback)]

    @property
    def spreads(self) -> list[Spread | None]:
        """How the parameters, also those left to torch, are divided over ranks."""
        return self._readings.spreads

    def places_of(self, group: int, key: str, members: tuple[int, ...]) -> tuple[list[int], int]:
        """Return where the kernels have a setting, see :meth:`GroupReadings.places_of`."""
        return self._readings.places_of(group, key, members)

    @property
    def norm_dtype(self) -> torch.dtype:
        """The dtype of the norm of all gradients."""
        return torch.float64 if self._readings.wide else torch.float32

    @property
    def needs_python(self) -> bool:
        """Whether a step needs more of the plan than native code asks."""
        placement = self._placement
        return bool(
            self._groups is None or self.fallback or placement.unfilled or self._readings.mutables
        )

    # ---- before a step

    def refresh(self) -> None:
        """Bring the plan up to date: at least the addresses of gradients, at most all of it.

        The plan then holds the gradients, until :meth:`release` or a step.
        """
        with self.lock:
            builds = adopted = 0
            while builds < _BUILDS:
                if self._placement.unfit and self._placement.unfit_changed():
                    self._groups = None
                if self.is_current():
                    return
                adopted += 1
                if self._groups is None or adopted > _FEW_CHANGES or not self._adopt():
                    builds += 1
                    self._build()
                    if self._groups is None:
                        return  # no kernel serves these groups
            # Other threads keep changing things. Take the plan as just built: each of its rows is
            # right for one reading of the tensors.
            self._build()

    def is_current(self) -> bool:
        """Return whether all sources of the plan are the same; take in the gradients' addresses."""
        optimizer, lib = self._optimizer, self.lib
        self._answer = lib.ALL_ACTIVE
        if optimizer.state is not self._state or not self._are_planned(optimizer.param_groups):
            return False
        readings = self._readings
        if readings.mutables and readings.changed_in_place() and not self._take_settings():
            return False
        answer = self.native.scan()
        if answer == lib.SETTINGS_CHANGED and self._take_settings():
            answer = self.native.scan()
        self.partial = answer == lib.SOME_IDLE
        if self.partial and not self._placement.unfilled_are_active():
            return False  # a gradient was taken away before the step that creates its state
        self._answer = answer
        return self.confirms(answer)

    def confirms(self, answer: int) -> bool:
        """Return whether an answer of native code says that the plan is up to date.

        Raises:
            RuntimeError: if the plan is in the middle of a step.
        """
        if answer == self.lib.NESTED:
            raise RuntimeError(
                "step() was called within a step of the same optimizer, by a finalizer or a "
                "signal handler: call it after that step"
            )
        return answer in (self.lib.ALL_ACTIVE, self.lib.SOME_IDLE)

    def forget(self) -> None:
        """Have the next :meth:`refresh` build the plan anew."""
        with self.lock:
            self._groups = None
            self.native.end_course()
            self.release()

    def release(self) -> None:
        """Let go of the gradients, if no step follows a :meth:`refresh`."""
        with self.lock:
            self.native.release()

    def after_fork(self, lock: threading.RLock) -> None:
        """Start anew, with a new lock, in a forked process: it lacks the other threads."""
        self.lock = lock
        self.native.after_fork(lock)
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
        # First native code, which refuses within a step.
        self.native.groups = groups
        self._groups = groups
        return True

    def _take_settings(self) -> bool:
        """Take in changed settings; return False if the plan must be built anew."""
        self.native.bind(None)  # launches that repeat a step have its settings
        return self._readings.take_settings(list(self._optimizer.param_groups), self.scalars)

    # ---- changes

    def _adopt(self) -> bool:
        """Take in the change that the scan found; return False if the plan must be built anew."""
        lib = self.lib
        adopt = {
            lib.GROUPS_CHANGED: self._adopt_members,
            lib.STATE_CHANGED: self._adopt_state,
            lib.WOKEN: self._adopt_gradients,
            lib.CHANGED: self._adopt_row,
        }.get(self._answer)
        if adopt is None:
            return False
        # An interrupt may leave the plan half changed. It is then built anew.
        groups, self._groups = self._groups, None
        if not adopt():
            return False
        self._groups = groups
        return True

    def _adopt_members(self) -> bool:
        known = len(self._readings.members)
        added = self._readings.take_members(list(self._optimizer.param_groups))
        if added is None or not (added or len(self._readings.members) > known):
            return False
        self._placement.add_idle(added)
        self._write_scalars()
        return True

    def _adopt_row(self) -> bool:
        bucket, row = self.native.place
        return self._placement.replace(self.buckets[bucket], row)

    def _adopt_state(self) -> bool:
        state = self._optimizer.state
        items = dict(state)
        if not self._placement.take_state(state, _FEW_CHANGES):
            return False
        self._note_state(items)
        return True

    def _note_state(self, items: dict[Any, Any]) -> None:
        # In place: native code holds the dictionary.
        self._dicts.clear()
        self._dicts.update(items)

    def _adopt_gradients(self) -> bool:
        if not self._placement.take_gradients():
            return False
        self._set_buckets()
        return True

    # ---- building

    def _build(self) -> None:
        optimizer, target = self._optimizer, self._target
        self._groups = None  # remains so if an exception ends the building
        while True:
            calls = self.native.calls
            groups, state = optimizer.param_groups, optimizer.state
            why = why_unreadable(groups, state)
            readings = GroupReadings(target.rule, list(groups), target.capturable, why)
            placement = Placement(target, readings, self.native)
            placement.place_all(why)
            # If a signal handler has taken a step meanwhile, it has created the state itself.
            if self.native.calls == calls:
                break
        self._publish(readings, placement)
        if why is None:
            self._set_sources(groups, state)
        else:
            self.native.set_sources([], [], [], [], {}, {}, [])
        self._write_scalars()
        self._set_buckets()
        if why is None:
            self._groups, self._state = groups, state

    def _set_sources(self, groups: Sequence[dict[str, Any]], state: dict[Tensor, Any]) -> None:
        """Show native code what the plan was built from."""
        self._dicts = dict(state)
        read, idle = self._readings, self._placement.idle
        self.native.set_sources(
            groups, read.members, read.keys, read.settings, state, self._dicts, idle
        )

    def _set_buckets(self) -> None:
        self.native.set_buckets([bucket.native for bucket in self.buckets], self._placement.params)

    def _write_scalars(self) -> None:
        #: the kernel's scalars, a row per group; each step fills in the rates
        self.scalars = self._readings.scalar_table()
        self.native.set_scalars(self.scalars)

    # ---- after a step

    def take_setting(
        self, group: int, key: str, members: tuple[int, ...], value: object, numbers: list[float]
    ) -> None:
        """Take in a written setting, see :meth:`GroupReadings.take_setting`."""
        self._readings.take_setting(group, key, members, value, numbers, self.scalars)

    def active_params(self) -> list[Tensor]:
        """Return the parameters of the buckets that have a gradient."""
        return self._placement.active_params() if self.partial else self._placement.params

    def commit(self) -> None:
        """Put the state that a step has filled into the optimizer."""
        if not self._placement.unfilled:
            return
        with self.lock:
            state = self._optimizer.state
            self._placement.hand_over_state(state)
            self._note_state(state)
            self.release()

    def commit_if_called(self) -> None:
        """Call :meth:`commit` after an exception, if the kernel was called before it."""
        if self._placement.was_called():
            self.commit()
