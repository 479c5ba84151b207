"""The position in the schedule on one device."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clr_optim.backends.base import Course
from clr_optim.backends.triton import device as current
from clr_optim.backends.triton.launch import Launch
from clr_optim.backends.triton.mirror import Mirror
from clr_optim.schedule import Schedule, fixed

__all__ = ["OWN", "SUMMED_AT_ONCE", "Clock", "fill_open_gate"]

#: Where a kernel's own scalars begin in the groups' table, in step with its ``GROUP``.
OWN = 7

SUMMED_AT_ONCE = 1024
# An empty table has no address to load from.
_NO_COUNTER = np.zeros((1, 2), dtype=np.int64)
_NO_RATE = np.zeros((1, 3), dtype=np.int64)


class Clock:
    """The position in the schedule, and the phases, on one device."""

    def __init__(self, device: torch.device, schedule: Schedule) -> None:
        from clr_optim.kernels.triton.schedule import phase_tables

        self.device = device
        self._expected: tuple[int, int] | None = None
        self._control = torch.zeros(2, dtype=torch.int64, device=device)
        self._moving = schedule.scale_fn is None
        upload = [Mirror(device) for _ in range(4)]
        constant = phase_tables(fixed())
        own = phase_tables(schedule) if self._moving else constant
        self._own = tuple(m.put(t) for m, t in zip(upload[:2], own, strict=True))
        self._constant = tuple(m.put(t) for m, t in zip(upload[2:], constant, strict=True))
        # Rates that the host decides are not to be left where a graph looks for bounds.
        # Those that were too small for a group added later are still some graph's to read.
        self._groups = [[Mirror(device)] for _ in range(2)]
        self._groups_of: tuple[Any, ...] = ()
        self._counters = Mirror(device)
        self._counters_of: list[npt.NDArray[np.int64]] = []
        self._rates = Mirror(device)
        self._limit = Mirror(device)
        #: scale and overflow where there is no GradScaler, in the dtype in which that has them
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.zero = torch.zeros((), dtype=torch.float32, device=device)
        #: the gate of a step that surely happens, its gradients as they are
        self.open = torch.empty(2, dtype=torch.float64, device=device)
        # By the kernel itself: first launched in a capture, it could not be loaded.
        fill_open_gate(self.open, self.one, self.zero)
        #: where norms go, of replayed steps too
        self.norm: Tensor | None = None

    def join(self, other: Clock) -> None:
        """Stand where another device does, which may be known to that device alone."""
        self._control.copy_(other._control)
        self._expected = other._expected

    def ask(self) -> int:
        """The position, by the device's own count; waits for it."""
        position = int(self._control[0].item())
        if self._expected is not None:
            self._expected = (position, self._expected[1])
        return position

    def move_to(self, course: Course) -> None:
        """Go somewhere else at once."""
        self._expected = None
        self.control(course)

    @staticmethod
    def _wanted(course: Course) -> tuple[int, int]:
        return course.position, int(course.moves)

    def control(self, course: Course) -> Tensor:
        """``(position, what the step adds to it)``: written only if something else moved it."""
        wanted = self._wanted(course)
        if self._expected != wanted:
            if current.is_capturing():
                raise RuntimeError(
                    "step() cannot be captured now: the position in the cycle was moved since the "
                    "last step; take a step and then capture"
                )
            # By itself the position stays the device's: it may be another than the host believes.
            for i, value in enumerate(wanted):
                if self._expected is None or self._expected[i] != value:
                    self._control[i].fill_(value)
            self._expected = wanted
        return self._control

    def advanced(self, course: Course) -> None:
        """Remember where the device has gone; as far as the host knows."""
        step = 0 if current.is_capturing() else int(course.moves)
        if not course.moves:  # a graph's next replay does
            self._control[1].fill_(1)
        self._expected = (course.position + step, 1)

    def decides(self, course: Course) -> bool:
        """Whether the rates are evaluated on the device, not handed down by the host."""
        return self._moving and course.moves

    def groups(
        self, course: Course, scalars: npt.NDArray[np.float64], momentum: int | None
    ) -> Tensor:
        """The groups' table: what the schedule needs of each, and then the kernel's scalars."""
        on_device = self.decides(course)
        mirrors = self._groups[on_device]
        made_of = (
            on_device, tuple(course.bounds if on_device else course.rates), course.momenta,
            scalars[:, 1:].tobytes(), len(scalars),
        )  # fmt: skip
        if made_of == self._groups_of:
            return cast("Tensor", mirrors[-1].table)
        table = np.zeros((len(scalars), scalars.shape[1] + 4))
        table[:, 5:] = scalars[:, 1:]  # without the rate
        # A group may have been added since the last step, which the plan has not seen.
        rates = zip(course.rates, course.bounds, strict=True)
        for i, (rate, bounds) in zip(range(len(table)), rates, strict=False):
            table[i, :2] = bounds if on_device else (rate, rate)
            if course.momenta is not None and on_device:
                table[i, 2:4] = course.momenta[i]
                table[i, 4] = 1.0
                # The group's own follows the cycle; not looked at, it would change the table. Where
                # no kernel serves any group there is none.
                if momentum is not None and OWN + momentum < table.shape[1]:
                    table[i, OWN + momentum] = 0.0
        last = mirrors[-1].table
        if last is not None and last.shape != table.shape:
            mirrors.append(Mirror(self.device))
        for older in mirrors[:-1]:
            older.renew(table)
        found = mirrors[-1].put(table)
        self._groups_of = made_of
        return found

    def counters(self, launches: list[Launch]) -> tuple[Tensor, int]:
        """The step counters of all tensors that were updated, and how many there are."""
        tables = [launch.counters for launch in launches]
        count = sum(map(len, tables))
        there = self._counters.table
        if there is None or [*map(id, tables)] != [*map(id, self._counters_of)]:
            there = self._counters.put(np.concatenate(tables) if count else _NO_COUNTER)
            self._counters_of = tables
        return there, count

    def rates(self, course: Course) -> tuple[Tensor, int]:
        """Where the learning rates lie that are to be kept current, and how many there are."""
        lines = [
            (lr.data_ptr(), lr.dtype == torch.float64, group)
            for group, lr in course.kept
            if lr.device == self.device and self.decides(course)
        ]
        table = np.array(lines, dtype=np.int64).reshape(-1, 3)
        return self._rates.put(table if lines else _NO_RATE), len(lines)

    def limit(self, max_norm: float) -> Tensor:
        """What norms are clipped to."""
        return self._limit.put(np.array([max_norm]))

    def phases(self, course: Course) -> tuple[Tensor, ...]:
        """The phases' tables: the schedule's own, or those of a rate that is the group's upper."""
        return self._own if self.decides(course) else self._constant

    def give_up(self) -> list[object]:
        """The tables that describe tensors, a graph's from now on; and others, to be kept alive."""
        return [
            self._counters.give_up(),
            self._rates.give_up(),
            *(mirror.table for mirrors in self._groups for mirror in mirrors),
            self._limit.table,
        ]


def fill_open_gate(gate: Tensor, one: Tensor, zero: Tensor) -> None:
    """Fill the gate of a step that surely happens, its gradients as they are."""
    from clr_optim.kernels.triton import multi_tensor

    multi_tensor.open_gate[(1,)](
        one, 0, one, one, zero, one, gate, CLIPS=False, BLOCK=SUMMED_AT_ONCE
    )
