"""Shared: the changing objects of one optimizer, shared by copies of a wrapper, and a lock."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from clr_optim.core.averaging import Averaging
from clr_optim.core.groups import GroupMirror
from clr_optim.core.in_backward import InBackward
from clr_optim.core.ordinary import OrdinarySteps
from clr_optim.core.position import Position
from clr_optim.core.serving import Serving
from clr_optim.core.settings import Settings
from clr_optim.core.warn import warn_each
from clr_optim.gate import Gate, Statistics

__all__ = ["Shared", "alone"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Shared:
    """The objects of one optimizer that change from step to step.

    Frameworks copy a wrapper's ``__dict__`` (Lightning does); the copies share this object.

    Args:
        settings: the optimizer and its policy.
        chosen: the backend's name, and why it was chosen.
        statistics: those of a gate that a checkpoint has.
    """

    def __init__(self, settings: Settings, chosen: tuple[str, str], statistics: Statistics) -> None:
        #: held by the thread that steps the optimizer, changes its course or copies its state
        self.lock = threading.RLock()
        self.settings = settings
        self.serving = Serving(settings, chosen)
        skip_above = settings.skip_above
        #: decides which steps are skipped; None without ``skip_above``
        self.gate = None if skip_above is None else Gate(skip_above, statistics)
        self.mirror = GroupMirror(settings, self.serving.is_kept, self.gate)
        self.position = Position(settings, self.mirror, self.serving)
        #: bounds by the constructor's arguments; ``None`` stands for the default base_lr
        self.constructor_bounds: list[tuple[float | None, float]] = []
        self.averaging = Averaging(settings, self.position)
        self.ordinary = OrdinarySteps(
            settings, self.mirror, self.position, self.serving, self.averaging, self.gate
        )
        self.in_backward = InBackward(
            settings, self.mirror, self.position, self.serving, self.averaging, self.ordinary.leave
        )
        _alive.add(self)

    def grad_norm(self) -> Tensor | None:
        """Return the norm of all gradients before clipping, of the last step."""
        with self.lock:
            return self.ordinary.last_norm()

    def skipped(self) -> int:
        """Return how many steps the gate has skipped; wait for the device if only it knows."""
        if self.gate is None:
            return 0
        with self.lock:
            self.position.catch_up()
            self.position.ask()
            self.gate.adopt(self.settings.optimizer.param_groups)
            self.warn_of_skips()
            return int(self.gate.statistics[-1])

    def warn_of_skips(self) -> None:
        """Warn if the gate has skipped many steps, as far as the host knows."""
        if self.gate is not None:
            warn_each([self.gate.warning(self.position.number)])

    def write_notes(self) -> None:
        """Write averages' counts and the gate's statistics into the groups, for a checkpoint."""
        self.averaging.note()
        if self.gate is not None:
            self.gate.write(self.settings.optimizer.param_groups)

    def refuse_unsettled(self, what: str) -> None:
        """Raise if the parameters hold their averages, or if some are a step ahead of the others.

        Args:
            what: what cannot be done meanwhile.

        Raises:
            RuntimeError: naming the remedy.
        """
        self.averaging.refuse_exchanged(what)
        self.in_backward.refuse_in_pass(what)

    def take_ordinary_step(self, attributes: dict[str, Any]) -> bool:
        """Take the next step in one call of native code; return False if nothing was done.

        Args:
            attributes: the dictionary of the CyclicalOptimizer.
        """
        with self.lock:
            return not self.in_backward.takes_part and self.ordinary.take(attributes)


# A forked process has a copy of each lock, perhaps held by a thread that the process lacks.
_alive: weakref.WeakSet[Shared] = weakref.WeakSet()


def _renew_locks() -> None:
    for shared in list(_alive):
        shared.lock = threading.RLock()
        if shared.serving.fused is not None:
            shared.serving.fused.plan.after_fork(shared.lock)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def alone(
    method: Callable[Concatenate[Any, _Arguments], _Result],
) -> Callable[Concatenate[Any, _Arguments], _Result]:
    """Make a method of a wrapper hold the lock, so that no other thread steps meanwhile."""

    @functools.wraps(method)
    def with_lock(self: Any, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        shared = self._shared
        with shared.lock:
            shared.position.catch_up()
            return method(self, *args, **kwargs)

    return with_lock
