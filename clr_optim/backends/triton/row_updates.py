"""Updates of single tensors in the backward pass, at the position of the coming step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clr_optim.backends import device as current
from clr_optim.backends.base import Course
from clr_optim.backends.triton.clock import Clock
from clr_optim.backends.triton.launch import Launch

__all__ = ["RowUpdates"]


class RowUpdates:
    """Launches that update one row each, until the plan changes or a step ends the pass.

    The device's own position decides the rate, as in a step, so the host waits for nothing. The
    backward pass of a GPU runs on threads that no signal handler interrupts: after a launch, the
    row is certainly noted as updated.

    Args:
        launches: the launches of all buckets, in the plan's order.
        clocks: the clock of each device.
        course: the place of the coming step in the schedule.
        scalars: the plan's scalars, a row per group.
        momentum: the kernel's own scalar that is the momentum, or None.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        clocks: Mapping[torch.device, Clock],
        course: Course,
        scalars: npt.NDArray[np.float64],
        momentum: int | None,
    ) -> None:
        self._launches, self._clocks = list(launches), clocks
        self._by_device: dict[torch.device, list[Launch]] = {}
        for launch in launches:
            self._by_device.setdefault(launch.bucket.device, []).append(launch)
        self._tables: dict[torch.device, tuple[Any, ...]] = {}
        for device, own in self._by_device.items():
            clock = clocks[device]
            with current.guard(device):
                _follow_stream(clock, own)
                for launch in own:
                    launch.refresh_rows()
                tables = clock.tables(course, scalars, momentum, clock.open)
                clock.follow(tables)
            self._tables[device] = tables

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


def _follow_stream(clock: Clock, launches: Sequence[Launch]) -> None:
    """Have the current stream come after the stream before, on which launches use the same tables.

    Autograd may run the hooks of one backward pass on several streams.
    """
    stream, before = current.stream(clock.device), clock.stream
    if before is not None and stream != before:
        stream.wait_stream(before)
    clock.enter_stream(launches)
