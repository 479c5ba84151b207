"""Whether native code repeats a plan's launches, and from which position and bounds on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from clr_optim.backends.base import Course
from clr_optim.backends.triton.prebound import AddressTable, Call, bind
from clr_optim.plan import Plan

__all__ = ["Binding"]


class Binding:
    """The launches that native code repeats, if any.

    Args:
        plan: the plan whose ordinary steps repeat them.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._why_never: str | None = None
        self._launches: Any = None
        self._place: tuple[object, ...] | None = None
        #: whether a step should bind its launches, if it can
        self.is_wanted = False

    def ask(self) -> None:
        """Want the launches of the next step, unless native code can make none here."""
        self.is_wanted = self._why_never is None

    def bind(
        self,
        device: torch.device,
        tables: Sequence[AddressTable],
        calls: Sequence[Call],
        course: Course,
        *,
        clips: bool,
        signals: Collection[str],
        counted: int,
    ) -> None:
        """Have native code repeat the launches of a step, which the plan has counted.

        A step that a signal handler or a finalizer takes meanwhile keeps its own launches.

        Args:
            device: the device of the launches, which must be the current one.
            tables: the tables of gradients' addresses.
            calls: the launches, in order.
            course: the place of the step in the schedule.
            clips: whether the launches clip the gradients.
            signals: the kernels' arguments that a GradScaler gives, by name.
            counted: the plan's count of calls after the step.
        """
        plan = self._plan
        place = self._place_of(course._replace(position=course.position + 1))
        self._why_never = bind(
            plan, device, tables, calls, clips=clips, signals=signals, counted=counted
        )
        if plan.native.calls == counted:
            self._launches, self._place = plan.native.launches, place

    def end(self) -> Any:
        """Forget the launches; return them, or None if none were bound."""
        launches, self._launches = self._launches, None
        return launches

    def agrees(self, course: Course) -> bool:
        """Return whether the device has the position and the bounds of a course."""
        return self._place == self._place_of(course)

    def _place_of(self, course: Course) -> tuple[object, ...]:
        """Return bounds, counts of averages, and the position less the plan's count of steps.

        Ordinary steps change neither.
        """
        momenta = None if course.momenta is None else list(course.momenta)
        place = course.position - self._plan.steps
        return place, list(course.bounds), momenta, list(course.offsets)
