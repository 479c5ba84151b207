"""Updates of single tensors in the backward pass, at the position of the coming step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clr_optim.backends import device as current
from clr_optim.backends.base import Course
from clr_optim.backends.triton.clock import Clock
from clr_optim.backends.triton.launch import Launch
from clr_optim.backends.triton.prebound import RowCall, bind_rows
from clr_optim.plan import Plan

__all__ = ["RowUpdates"]


class RowUpdates:
    """Launches that update one row each, until the plan changes or a step ends the pass.

    The device's own position decides the rate, as in a step, so the host waits for nothing. The
    backward pass of a GPU runs on threads that no signal handler interrupts: after a launch, the
    row is certainly noted as updated.

    Args:
        plan: the plan.
        momentum: the kernel's own scalar that is the momentum, or None.
    """

    def __init__(self, plan: Plan, momentum: int | None) -> None:
        self._plan, self._momentum = plan, momentum
        self._clocks: Mapping[torch.device, Clock] = {}
        self._launches: list[Launch] = []
        self._by_device: dict[torch.device, list[Launch]] = {}
        self._tables: dict[torch.device, tuple[Any, ...]] = {}
        # Native code's launches, and the arguments that they were bound with.
        self._bound: Any = None
        self._bound_with: list[object] = []

    def open(
        self, launches: Sequence[Launch], clocks: Mapping[torch.device, Clock], course: Course
    ) -> Callable[[int, int], object]:
        """Return the function that updates a row, for the present pass.

        Args:
            launches: the launches of all buckets, in the plan's order.
            clocks: the clock of each device.
            course: the place of the coming step in the schedule.
        """
        self._launches, self._clocks = list(launches), clocks
        self._by_device = {}
        for launch in launches:
            self._by_device.setdefault(launch.bucket.device, []).append(launch)
        for device, own in self._by_device.items():
            clock = clocks[device]
            with current.guard(device):
                _follow_stream(clock, own)
                for launch in own:
                    launch.refresh_rows()
                tables = clock.tables(course, self._plan.scalars, self._momentum, clock.open)
                clock.follow(tables)
            self._tables[device] = tables
        self._bind()
        # Native code belongs to the plan, which the clocks keep alive.
        return weakref.proxy(self) if self._bound is None else self._bound.run_row

    def __call__(self, bucket: int, row: int) -> None:
        """Update a row by its gradient, and move its average if that is due.

        Args:
            bucket: the number of its bucket.
            row: the number of the row there.
        """
        launch = self._launches[bucket]
        device = launch.bucket.device
        with current.no_inference_mode(), current.guard(device):
            _follow_stream(self._clocks[device], self._by_device[device])
            launch.update_row(row, int(launch.bucket.gradients[row]), self._tables[device])

    def _bind(self) -> None:
        """Have native code launch the kernels of rows, if it can."""
        calls = self._calls()
        arguments = [
            value.data_ptr() if isinstance(value, Tensor) else value
            for each in calls
            for value in (*each.call.arguments, each.bucket.edition)
        ]
        if self._bound is not None:
            if arguments == self._bound_with and self._bound.can_run():
                return
            self._bound = None
        # A pass on several streams, or one that creates state, would bind for each parameter.
        if calls and not (self._plan.native.in_pass or self._plan.pending):
            (device,) = self._by_device
            with current.guard(device):
                bound = bind_rows(self._plan.lib, device, calls)
            if not isinstance(bound, str):
                self._bound, self._bound_with = bound, arguments

    def _calls(self) -> list[RowCall]:
        """Return a launch for each bucket; none if Triton must make some of them."""
        if len(self._by_device) != 1 or next(iter(self._by_device)).type != "cuda":
            return []
        (tables,) = (self._tables[device] for device in self._by_device)
        calls = [launch.row_call(tables) for launch in self._launches]
        return [call for call in calls if call is not None] if None not in calls else []


def _follow_stream(clock: Clock, launches: Sequence[Launch]) -> None:
    """Have the current stream come after the stream before, on which launches use the same tables.

    Autograd may run the hooks of one backward pass on several streams.
    """
    stream, before = current.stream(clock.device), clock.stream
    if before is not None and stream != before:
        stream.wait_stream(before)
    clock.enter_stream(launches)
