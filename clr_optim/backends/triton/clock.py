"""The position in the schedule on one device, and the tables that the schedule needs there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clr_optim.averages import Average, closed_form
from clr_optim.backends import device as current
from clr_optim.backends.base import Course, Gradients
from clr_optim.backends.triton.launch import Launch
from clr_optim.backends.triton.mirror import Mirror
from clr_optim.backends.triton.prebound import Call, launch
from clr_optim.gate import NO_STATISTICS, Gate, Statistics
from clr_optim.plan import Plan
from clr_optim.schedule import Schedule

__all__ = ["OWN", "Clock", "fill_gate", "fill_open_gate"]

#: Columns of the groups' table before the kernel's own scalars. A test compares it with ``GROUP``.
OWN = 9

# The column of a scalar in the groups' table, less its column in the plan's scalars.
_SHIFT = 5
_AVERAGES = 5  # the column of that name in the groups' table

_INT64_MAX = np.iinfo(np.int64).max

# One program adds all sums of squares, so it takes many at a time.
_GATE_OPTIONS = {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": False}

_ONE_WARP = {"num_warps": 1, "enable_fp_fusion": False}

# The table of a step without rates: an empty tensor has no address to load from.
_NO_RATE = np.zeros((1, 3), dtype=np.int64)


class Clock:
    """The position in the schedule, and the phases, on one device.

    Args:
        device: the device.
        schedule: the policy.
        plan: the plan, which counts the steps. The position minus this count changes only if the
            position is moved.
        average: which average of the parameters the steps keep, if any.
    """

    def __init__(
        self, device: torch.device, schedule: Schedule, plan: Plan, average: Average | None = None
    ) -> None:
        from clr_optim.kernels.triton.schedule import held_tables, phase_tables

        self.device = device
        self._plan = plan
        # The device's position minus the plan's count of steps, and the steps to add.
        self._expected: tuple[int, int] | None = None
        self._control = _new_control(device, schedule, average)
        self._moving = schedule.scale_fn is None
        self._uploaded = upload = [Mirror(device) for _ in range(4)]
        constant = held_tables(schedule)
        own = phase_tables(schedule) if self._moving else constant
        self._own = tuple(m.put(t) for m, t in zip(upload[:2], own, strict=True))
        self._constant = tuple(m.put(t) for m, t in zip(upload[2:], constant, strict=True))
        # Two tables: one with rates of the host, and one with bounds, which graphs read. A table
        # that grew too small for a new group stays, as a graph may read it.
        self._groups = [[Mirror(device)] for _ in range(2)]
        self._groups_of: tuple[Any, ...] = ()
        self._rates = Mirror(device)
        self._limits = Mirror(device)
        # The settings that follow schedules, and the phases of these.
        self._followed = [Mirror(device) for _ in range(3)]
        self._rows: list[tuple[int, int, Schedule]] = []
        self._columns: tuple[tuple[int, int], ...] = ()
        #: scale and overflow without a GradScaler, in the dtype of a GradScaler
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.zero = torch.zeros((), dtype=torch.float32, device=device)
        #: the gate of a step that always happens and leaves its gradients unscaled
        self.open = torch.empty(2, dtype=torch.float64, device=device)
        #: the gate of a step that clips, may be skipped or has a GradScaler; statistics follow
        self.gate = torch.zeros(2 + len(NO_STATISTICS), dtype=torch.float64, device=device)
        # The statistics of the host from which those of the device have come.
        self._statistics: Statistics | None = None
        # Launch the kernel here: a capture cannot load a kernel that was never launched.
        fill_open_gate(self.open, self.one, self.zero)
        #: the norm of the last step, eager or replayed
        self.norm: Tensor | None = None
        #: the stream of the last step, if tables were made there alone
        self.stream: Any = None

    def enter_stream(self, launches: Sequence[Launch]) -> None:
        """Have the tables outlive the work of the current stream, if it is another than before.

        The allocator knows only the stream on which a table was made. Without this, it may give a
        dropped table's memory away while a kernel of another stream still reads it.
        """
        stream = current.stream(self.device)
        if stream == self.stream:
            return
        self.stream = stream
        tables = [table for launch in launches for table in launch.tables()]
        for table in [*tables, *self._tables()]:
            if table is not None and table.is_cuda:
                table.record_stream(stream)

    def leave_stream(self) -> None:
        """Note that tables may have been made outside of a step, perhaps on another stream."""
        self.stream = None

    def _tables(self) -> Iterator[Tensor | None]:
        """Return all tensors that live as long as the clock, or until a table is made anew."""
        mirrors = [*self._uploaded, *self._followed, self._rates, self._limits]
        mirrors += [mirror for both in self._groups for mirror in both]
        yield from (mirror.table for mirror in mirrors)
        yield from (self._control, self.one, self.zero, self.open, self.gate, self.norm)

    def join(self, other: Clock) -> None:
        """Take over position and statistics of another device, which the host may not know."""
        self._control.copy_(other._control)
        self._expected = other._expected
        self.gate.copy_(other.gate)
        self._statistics = other._statistics

    # ---- the statistics of skip_above

    def take_statistics(self, gate: Gate) -> None:
        """Write the host's statistics to the device, if the host has others than it has told.

        Raises:
            RuntimeError: if a write is needed and the step is being captured.
        """
        if self._statistics is gate.statistics:
            return
        if current.is_capturing():
            raise RuntimeError(
                "step() cannot be captured now: the statistics of skip_above changed since the "
                "last step; take a step and then capture"
            )
        self._statistics = None  # remains so if an interrupt ends the writes
        for i, value in enumerate(gate.statistics):
            self.gate[2 + i].fill_(value)
        self._statistics = gate.statistics

    def ask_gate(self) -> tuple[bool, Statistics]:
        """Return whether the gate is closed, and the device's statistics; wait for the device."""
        _, closed, count, mean, variance, in_a_row, skipped = self.gate.tolist()
        return closed != 0.0, (count, mean, variance, in_a_row, skipped)

    def note_statistics(self, statistics: Statistics | None) -> None:
        """Note that the host knows the device's statistics; with None, write them again."""
        self._statistics = statistics

    # ---- the position

    def ask(self) -> int:
        """Return the position that the device has counted; wait for the device.

        All streams must have finished: replays run on streams that the host does not know.
        """
        current.wait_for(self.device)
        position = int(self._control[0].item())
        if self._expected is not None:
            self._expected = (position - self._plan.steps, self._expected[1])
        return position

    def move_to(self, course: Course) -> None:
        """Write another position to the device."""
        self._expected = None
        self.control(course)

    def control(self, course: Course) -> Tensor:
        """Return the ``CONTROL`` of prepare.py, of which the host writes only what it moved.

        Raises:
            RuntimeError: if a write is needed and the step is being captured.
        """
        wanted = course.position - self._plan.steps, int(course.moves)
        if self._expected != wanted:
            if current.is_capturing():
                raise RuntimeError(
                    "step() cannot be captured now: the position in the cycle was moved since the "
                    "last step; take a step and then capture"
                )
            # Write only the values that differ: the device may know a later position than the host.
            for i, value in enumerate((course.position, wanted[1])):
                if self._expected is None or self._expected[i] != wanted[i]:
                    self._control[i].fill_(value)
            self._expected = wanted
        return self._control

    def advanced(self, course: Course) -> None:
        """Note that a step has run, before the plan counts it."""
        if not course.moves:  # the next replay of a graph advances again
            self._control[1].fill_(1)
        self._expected = course.position - self._plan.steps, 1

    def reads(self, signal: Tensor | None) -> bool:
        """Return whether kernels read a GradScaler's tensor itself, and not a copy."""
        return signal is None or (signal.device == self.device and signal.dtype == self.one.dtype)

    def decides(self, course: Course) -> bool:
        """Return whether the device evaluates the rates, and not the host."""
        return self._moving and course.moves

    def groups(
        self, course: Course, scalars: npt.NDArray[np.float64], momentum: int | None
    ) -> Tensor:
        """Return the groups' table on the device.

        Args:
            course: the place of the step in the schedule.
            scalars: the plan's scalars, a row per group, the learning rate first.
            momentum: the kernel's own scalar that is the momentum, or None.
        """
        on_device = self.decides(course)
        mirrors = self._groups[on_device]
        self._rows = _followed_rows(self._plan, course, len(scalars)) if on_device else []
        scalars = scalars.copy()
        for group, column, _ in self._rows:
            scalars[group, column - _SHIFT] = 0.0  # a kernel writes it: no change needs an upload
        columns = tuple((group, column) for group, column, _ in self._rows)
        if on_device and columns != self._columns:
            self._columns = columns
            for mirror in mirrors:
                mirror.forget()  # the kernel may have written a column that the host owns now
        made_of = (
            on_device, tuple(course.bounds if on_device else course.rates), course.momenta,
            columns, scalars[:, 1:].tobytes(), len(scalars), tuple(course.offsets),
        )  # fmt: skip
        if made_of == self._groups_of:
            return cast("Tensor", mirrors[-1].table)
        table = np.zeros((len(scalars), scalars.shape[1] + _SHIFT))
        table[:, 1 + _SHIFT :] = scalars[:, 1:]  # all but the rate
        offsets = course.offsets[: len(table)]
        table[: len(offsets), _AVERAGES] = offsets
        # The course may have a group that the plan has not seen yet.
        rates = zip(course.rates, course.bounds, strict=True)
        for i, (rate, bounds) in zip(range(len(table)), rates, strict=False):
            table[i, :2] = bounds if on_device else (rate, rate)
            if course.momenta is not None and on_device:
                table[i, 2:4] = course.momenta[i]
                table[i, 4] = 1.0
                # The kernel ignores the group's own momentum, which follows the cycle. Set it to
                # 0, so that its changes cause no upload. Without kernels the column is missing.
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

    def follow(self, tables: tuple[Any, ...]) -> list[Call]:
        """Write the settings that follow schedules into the groups' table, for this step.

        Args:
            tables: as :meth:`tables` returns them.
        """
        from clr_optim.kernels.triton.schedule import follow_schedules, phase_tables

        if not self._rows:
            return []
        groups, width, _, _, _, control, *_ = tables
        schedules = list(dict.fromkeys(schedule for *_, schedule in self._rows))
        ints, floats = zip(*map(phase_tables, schedules), strict=True)
        firsts = dict(zip(schedules, np.cumsum([0, *map(len, ints)]), strict=False))
        rows = [(g, c, firsts[s], len(s.phases)) for g, c, s in self._rows]
        followed, all_ints, all_floats = self._followed
        arguments = (
            followed.put(np.array(rows, dtype=np.int64)),
            all_ints.put(np.concatenate(ints)),
            all_floats.put(np.concatenate(floats)),
            groups, width, control,
        )  # fmt: skip
        return [launch(follow_schedules, (len(rows),), arguments, _ONE_WARP)]

    def rates(self, course: Course) -> tuple[Tensor, int]:
        """Return the addresses of the learning rates that the device keeps, and their number."""
        lines = [
            (lr.data_ptr(), lr.dtype == torch.float64, group)
            for group, lr in course.kept
            if lr.device == self.device and self.decides(course)
        ]
        table = np.array(lines, dtype=np.int64).reshape(-1, 3)
        return self._rates.put(table if lines else _NO_RATE), len(lines)

    def limits(self, gradients: Gradients) -> Tensor:
        """Return the largest norm that the step leaves unclipped, and the gate's limits."""
        max_norm = np.inf if gradients.max_norm is None else gradients.max_norm
        of_gate = () if gradients.gate is None else gradients.gate.limits
        return self._limits.put(np.array([max_norm, *of_gate]))

    def tables(
        self,
        course: Course,
        scalars: npt.NDArray[np.float64],
        momentum: int | None,
        gate: Tensor,
    ) -> tuple[Any, ...]:
        """Return what the kernels read beside a bucket's tables, in the order of their arguments.

        Args:
            course, scalars, momentum: as for :meth:`groups`.
            gate: the gate of the step.
        """
        groups = self.groups(course, scalars, momentum)
        ints, floats = self._own if self.decides(course) else self._constant
        rates, kept = self.rates(course)
        control = self.control(course)
        return groups, groups.shape[1], ints, floats, len(ints), control, gate, rates, kept

    def advance(self, tables: tuple[Any, ...]) -> Call:
        """Advance the position in a step that has no launch on this device."""
        from clr_optim.kernels.triton import prepare

        return launch(prepare.advance, (1,), tables, _ONE_WARP)

    def give_up(self) -> list[object]:
        """Return all tables, which a graph reads; a change of tensors makes new tables."""
        return [
            self._rates.lend(),
            *(mirror.table for mirrors in self._groups for mirror in mirrors),
            self._limits.table,
            *(mirror.lend() for mirror in self._followed),
        ]


def _new_control(device: torch.device, schedule: Schedule, average: Average | None) -> Tensor:
    """Return the ``CONTROL`` of prepare.py at position 0."""
    from clr_optim.kernels.triton.prepare import CONTROL

    control = torch.zeros(len(CONTROL), dtype=torch.int64, device=device)
    if average is not None:
        *numbers, weight = closed_form(average, schedule)
        for i, number in enumerate(numbers, CONTROL.index("every")):
            control[i].fill_(min(number, _INT64_MAX))
        control[CONTROL.index("share") :].view(torch.float64).fill_(weight)
    return control


def fill_gate(
    sums: Tensor,
    count: int,
    limits: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    norm: Tensor,
    gate: Tensor,
    *,
    clips: bool,
    skips: bool = False,
) -> Call:
    """Launch ``open_gate`` of :mod:`clr_optim.kernels.triton.gate` with its arguments."""
    from clr_optim.kernels.triton import gate as kernels

    arguments = (sums, count, limits, grad_scale, found_inf, norm, gate)
    compiled_for = {"CLIPS": clips, "SKIPS": skips, **_GATE_OPTIONS}
    return launch(kernels.open_gate, (1,), arguments, compiled_for)


def fill_open_gate(gate: Tensor, one: Tensor, zero: Tensor) -> None:
    """Fill the gate of a step that always happens and leaves its gradients unscaled."""
    fill_gate(one, 0, one, one, zero, one, gate, clips=False)


def _followed_rows(plan: Plan, course: Course, groups: int) -> list[tuple[int, int, Schedule]]:
    """Return group, column of the groups' table and schedule of settings that kernels read."""
    rows = []
    for group, key, members, schedules in course.followed:
        if group < groups:  # another thread may just have added the group
            columns, _ = plan.places_of(group, key, members)
            pairs = zip(columns, schedules, strict=True)
            rows += [(group, column + _SHIFT, each) for column, each in pairs if column >= 0]
    return rows
