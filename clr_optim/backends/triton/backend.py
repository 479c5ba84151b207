"""The Triton backend: kernels update tensors at the device's own position.

Beside the tensors a kernel reads only tables on the device: addresses, groups, phases, the position
in the schedule. The host uploads a table when it changed. The device advances the position, so an
ordinary step needs only the gradients' addresses from the host.

**Graphs.** A captured step cycles at every replay: the graph reads and advances the device's
position. A graph keeps the tables that describe its tensors. Later steps read the same tables, and
make new ones where anything changed. Position, bounds and settings are shared. A replay repeats the
uploads of the capture from the host's memory. The only such upload is the gradients' addresses,
from memory that the graph keeps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.backends import device as current
from clr_optim.backends.base import Course, Gradients, Outcome, WhoKnows
from clr_optim.backends.native import library
from clr_optim.backends.triton import here
from clr_optim.backends.triton.binding import Binding
from clr_optim.backends.triton.clock import Clock
from clr_optim.backends.triton.gate import DeviceStatistics, fill_gates
from clr_optim.backends.triton.launch import Launch
from clr_optim.backends.triton.prebound import Call
from clr_optim.backends.triton.row_updates import RowUpdates
from clr_optim.plan import NO_EXTRAS, Extras, Plan
from clr_optim.rules import UpdateRule
from clr_optim.schedule import Schedule

__all__ = ["TritonBackend"]


class TritonBackend:
    """Steps one optimizer with the Triton kernels.

    Args:
        optimizer: the wrapped optimizer.
        rule: its update rule.
        schedule: the policy. The host evaluates a policy with a ``scale_fn`` at each step.
        device: the type of the devices whose tensors the kernels update.
        lock: the lock that a thread holds while it steps the optimizer. None makes a new lock.
        extras: the state that steps keep beside torch's.

    Raises:
        NoKernelsError: if the extension, which scans the tensors, cannot serve here.
    """

    name: ClassVar[str] = "triton"
    capturable: ClassVar[bool] = True
    counts_on_device: ClassVar[bool] = True
    keeps_rates: ClassVar[bool] = True
    reuses_norm: ClassVar[bool] = True
    steps_alone: ClassVar[bool] = True
    sees_overflows: ClassVar[bool] = True
    steps_in_backward: ClassVar[bool] = True

    @classmethod
    def device_types(cls) -> tuple[str, ...]:
        """Return the types of the devices whose tensors the kernels update."""
        return ("cpu",) if here.is_interpreted() else here.DEVICES

    @classmethod
    def make(
        cls,
        optimizer: Optimizer,
        rule: UpdateRule,
        schedule: Schedule,
        device: str,
        lock: threading.RLock | None,
        *,
        asked: bool,
        extras: Extras = NO_EXTRAS,
    ) -> TritonBackend:
        """Return a backend for one optimizer; try a kernel out if the user did not name Triton."""
        if not asked and not current.is_capturing():
            params = (p for group in optimizer.param_groups for p in group["params"])
            here.try_out(next(p.device for p in params if p.device.type == device))
        return cls(optimizer, rule, schedule, device, lock, extras)

    def __init__(
        self,
        optimizer: Optimizer,
        rule: UpdateRule,
        schedule: Schedule,
        device: str,
        lock: threading.RLock | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> None:
        self.plan = Plan(
            optimizer, rule, library(), device, capturable=True, lock=lock, extras=extras
        )
        self._schedule, self._average = schedule, extras.average
        self._momentum = rule.momentum
        self._launches: list[Launch] = []
        self._by_device: dict[torch.device, list[Launch]] = {}
        self._clocks: dict[torch.device, Clock] = {}
        self.who_knows = WhoKnows.HOST
        self._statistics = DeviceStatistics(self._clocks)
        self._binding = Binding(self.plan)
        self._row_updates = RowUpdates(self.plan, rule.momentum)
        # Tables and tensors that captured graphs still read; three entries per captured step.
        self._given_up: list[Any] = []

    def position(self) -> int:
        """Return the position that the device has counted; wait for the device."""
        found = max(clock.ask() for clock in self._clocks.values())  # all are equal
        self._statistics.ask()
        self._believe_host()  # after asking: during a capture ask() raises
        return found

    def keeps(self, lr: Tensor) -> bool:
        """Return whether steps write the next rate into this tensor: its device has a clock."""
        return lr.device in self._clocks

    def move_to(self, course: Course) -> None:
        """Take in a position and bounds before the next step, which may be a graph's replay."""
        self._write(course, moves=True)

    def take_bounds(self, course: Course) -> None:
        """Take in bounds alone: the device itself has just reported the position.

        The host does not write the position back: on another stream a write could undo a later
        step.
        """
        self._write(course, moves=False)

    def _write(self, course: Course, *, moves: bool) -> None:
        self._believe_host()
        with current.no_inference_mode():
            for clock in self._clocks.values():
                with current.guard(clock.device):
                    if moves:
                        clock.move_to(course)
                        self._statistics.send(clock)
                    clock.groups(course, self.plan.scalars, self._momentum)
                    # A graph may run next on a stream that does not wait for this one.
                    current.wait_for(clock.device)
                clock.leave_stream()

    def _believe_host(self) -> None:
        """Take note that host and device agree now; after a capture the device counts for good."""
        if self.who_knows is WhoKnows.MAYBE:
            self.who_knows = WhoKnows.HOST

    def bind_next(self) -> None:
        """Have the next step bind its launches, so that native code takes the steps after it."""
        self._binding.ask()

    def agrees(self, course: Course) -> bool:
        """Return whether the device has this position and these bounds, for bound launches."""
        return self._binding.agrees(course)

    def doubt(self, *, has_begun: bool) -> None:
        """Take note that an ordinary step has raised; if native code failed, ask the device."""
        if self.plan.native.launches is not None or self._binding.end() is None:
            return  # native code has changed nothing
        for launch in self._launches:
            launch.doubt_uploads()
        if has_begun and self.who_knows is WhoKnows.HOST:
            self.who_knows = WhoKnows.MAYBE

    def open_pass(self, course: Course) -> Callable[[int, int], object]:
        """Return the function that updates a row in the backward pass: see :class:`RowUpdates`.

        Args:
            course: the place of the coming step in the schedule.
        """
        with current.no_inference_mode():
            self._arrange()
            return self._row_updates.open(self._launches, self._clocks, course)

    def step(self, course: Course, gradients: Gradients) -> Outcome:
        """Update all tensors of the plan, and advance the position: see :meth:`Launch.update`.

        Args:
            course: the place of this step in the schedule.
            gradients: how the step changes its gradients, and the gate. Scaling takes one launch
                more; clipping and a gate take one launch more per bucket and another.

        Raises:
            RuntimeError: if the step is being captured and a changed table needs an upload.
        """
        with current.no_inference_mode():
            try:
                outcome = self._step(course, gradients)
            except BaseException:
                self._statistics.doubt(self.who_knows)
                raise
        self.plan.release()
        return outcome

    def _step(self, course: Course, gradients: Gradients) -> Outcome:
        plan, capturing = self.plan, current.is_capturing()
        before = plan.native.calls
        # A pass in backward belongs to the count of steps, which moves with this step.
        is_done = plan.native.is_done if plan.native.in_pass else None
        if capturing:
            _check_capture(plan, self._clocks)
        self._arrange()
        bound = self._binding.end()
        if bound is not None:
            for launch in self._launches:
                launch.note_uploads(bound)
        by_device, clips = self._by_device, gradients.needs_norm
        self._statistics.follow(gradients.gate)
        calls: list[Call] = []
        for device, launches in by_device.items():
            with current.guard(device):
                if current.is_capturing() is not capturing:
                    raise RuntimeError(
                        "step() cannot be captured now: a graph is being captured on one of the "
                        "devices that have parameters and not on another; capture on all or none"
                    )
                if not capturing:  # what a graph reads is kept for good
                    self._clocks[device].enter_stream(launches)
                _refresh(launches, clips=clips, is_done=is_done)
                if gradients.gate is not None or not capturing:
                    self._statistics.send(self._clocks[device])
        gates, norm = fill_gates(plan, self._clocks, by_device, gradients, calls)
        if not self._statistics.opens(gradients, norm):
            self._binding.is_wanted = False
            return Outcome(norm, happened=False)
        doubts = gradients.leave_doubt and bool(by_device)
        afterwards = WhoKnows.MAYBE if doubts else self.who_knows
        if capturing or self.who_knows is WhoKnows.DEVICE:
            afterwards = WhoKnows.DEVICE
        done = 0
        try:
            for device, launches in by_device.items():
                clock = self._clocks[device]
                with current.guard(device):
                    calls += self._step_on(clock, launches, course, gates[device])
                    done += 1
                    clock.advanced(course)
        except BaseException:
            if done == len(by_device) and not capturing:
                self._note_changes()  # every device has stepped: the new state counts
            raise
        if not capturing:
            plan.native.calls += 1
            plan.native.steps += course.moves
        self.who_knows = afterwards
        if capturing:
            read = gradients._replace(gate=None)
            self._keep_for_graph((list(plan.buckets), course.kept, read, gates))
        created = plan.pending
        self._note_changes()
        if created:  # upload the rows with the new state now, as a capture could not
            for device, launches in by_device.items():
                with current.guard(device):
                    _refresh(launches, clips=clips, is_done=is_done)
        elif (
            is_done is None
            and self._binding.is_wanted
            and not capturing
            and _is_ordinary(plan, self._clocks, self.who_knows, course, gradients)
        ):
            self._bind(course, gradients, calls, before + 1)
        self._binding.is_wanted = False
        return Outcome(norm)

    def _keep_for_graph(self, tensors: object) -> None:
        """Keep all that the graph reads: tables, and tensors, which a checkpoint may replace."""
        self._given_up.append([launch.give_up() for launch in self._launches])
        self._given_up.append([clock.give_up() for clock in self._clocks.values()])
        self._given_up.append(tensors)

    def _bind(
        self, course: Course, gradients: Gradients, calls: Sequence[Call], counted: int
    ) -> None:
        """Have native code repeat the launches of a step, see :meth:`Binding.bind`."""
        (clock,) = self._clocks.values()
        signals = {"grad_scale": gradients.scale, "found_inf": gradients.found_inf}
        names = [name for name, tensor in signals.items() if tensor is not None]
        tables = [launch.address_table() for launch in self._launches]
        with current.guard(clock.device):
            self._binding.bind(
                clock.device, tables, calls, course,
                clips=gradients.max_norm is not None, signals=names, counted=counted,
            )  # fmt: skip

    def _note_changes(self) -> None:
        """Mark the parameters as changed, and put new state into the optimizer, after a step."""
        # As after any in-place update: a backward pass through an older graph must raise.
        torch.autograd.graph.increment_version(self.plan.active_params())
        self.plan.commit()

    def _arrange(self) -> None:
        """Have a launch for each bucket of the plan, and a clock for each device."""
        buckets = self.plan.buckets
        if [id(launch.bucket) for launch in self._launches] == [id(bucket) for bucket in buckets]:
            return
        launches = [Launch(bucket) for bucket in buckets]
        for device in dict.fromkeys(launch.bucket.device for launch in launches):
            if device not in self._clocks:
                others = list(self._clocks.values())
                with current.guard(device):
                    self._clocks[device] = Clock(device, self._schedule, self.plan, self._average)
                if others:
                    self._clocks[device].join(others[0])
        by_device: dict[torch.device, list[Launch]] = {}
        for launch in launches:
            by_device.setdefault(launch.bucket.device, []).append(launch)
        for device in self._clocks:  # a device without launches advances too
            by_device.setdefault(device, [])
        self._launches, self._by_device = launches, by_device

    def _step_on(
        self, clock: Clock, launches: list[Launch], course: Course, gate: Tensor
    ) -> list[Call]:
        tables = clock.tables(course, self.plan.scalars, self._momentum, gate)
        # If Ctrl-C comes between a launch and the host's note of it, the host asks the device.
        if self.who_knows is WhoKnows.HOST and not current.is_capturing():
            self.who_knows = WhoKnows.MAYBE
        follows = clock.follow(tables)
        if not launches:
            return [*follows, clock.advance(tables)]
        updates = [launch.update(tables, is_last=launch is launches[-1]) for launch in launches]
        return [*follows, *(call for each in updates for call in each)]


def _check_capture(plan: Plan, clocks: Mapping[torch.device, Clock]) -> None:
    """Raise a RuntimeError if a captured step would need more than launches."""
    if not plan.buckets and not clocks:
        raise RuntimeError(
            "step() cannot be captured now: no parameter has had a gradient yet; take a step "
            "with all gradients and then capture"
        )
    if plan.native.in_pass:
        raise RuntimeError(
            "step() cannot be captured now: step_in_backward() has updated a part of the "
            "parameters; call step(), remove the handle and then capture"
        )
    if plan.pending:
        raise RuntimeError(
            "step() cannot be captured now: it would create the optimizer's state; take a step "
            "with all gradients and then capture"
        )


def _is_ordinary(
    plan: Plan, clocks: Mapping[torch.device, Clock], who_knows: WhoKnows, course: Course,
    gradients: Gradients,
) -> bool:  # fmt: skip
    """Return whether native code may repeat this step's launches with the next gradients."""
    if len(clocks) != 1:
        return False
    (clock,) = clocks.values()
    # Bound launches go on like this step, if kernels alone know whether a step happens.
    knows = (WhoKnows.HOST, WhoKnows.MAYBE) if gradients.leave_doubt else (WhoKnows.HOST,)
    return (
        clock.device.type == "cuda"
        and clock.decides(course)
        and who_knows in knows
        and clock.reads(gradients.scale)
        and clock.reads(gradients.found_inf)
        and not course.kept
        and not (gradients.needs_norm and any(plan.spreads))
    )


def _refresh(
    launches: list[Launch], *, clips: bool, is_done: Callable[[Tensor], bool] | None
) -> None:
    """Bring the tables of all launches on one device up to date, see :meth:`Launch.refresh`."""
    for launch in launches:
        launch.refresh(is_alone=len(launches) == 1, clips=clips, is_done=is_done)
