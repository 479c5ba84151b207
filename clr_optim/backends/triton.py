"""The Triton kernels: one launch per bucket updates its tensors at the device's own position.

Everything a kernel reads beside the tensors lies in tables on the device, uploaded only when they
changed: pointers, groups, phases, the position in the schedule. The last is advanced on the device
too, so that nothing has to come from the host for the next step but where the gradients lie.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.backends.base import Course
from clr_optim.backends.native import library
from clr_optim.backends.torch import clip_factor
from clr_optim.plan import Bucket, Plan
from clr_optim.rules import UpdateRule
from clr_optim.schedule import Schedule, fixed
from clr_optim.sharding import global_norm

__all__ = ["DEVICES", "TritonBackend", "is_interpreted", "why_no_triton"]

#: Device types that Triton compiles for; ROCm calls itself CUDA.
DEVICES = ("cuda", "xpu")

_ADVANCED_AT_ONCE = 256
_NO_COUNTER = np.zeros((1, 2), dtype=np.int64)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: for tests, not for training."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def why_no_triton() -> str | None:
    """Why there are no Triton kernels here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'clr-optim[triton]'"
    return None


class _Mirror:
    """A table of the host on the device, uploaded when it has changed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = b""
        self._table: Tensor | None = None

    def put(self, table: npt.NDArray[Any]) -> Tensor:
        """The table on the device; a copy under way does not hold up the host."""
        now = table.tobytes()
        if self._table is None or self._table.shape != table.shape:
            dtype = torch.from_numpy(np.empty(0, table.dtype)).dtype
            self._table = torch.empty(table.shape, dtype=dtype, device=self._device)
        elif now == self._last:
            return self._table
        host = torch.from_numpy(table.copy())
        if self._device.type != "cpu":
            host = host.pin_memory()
        self._table.copy_(host, non_blocking=True)
        self._last = now
        return self._table


class _Launch:
    """A bucket's tables: its rows, and which chunks of them there are to update."""

    def __init__(self, bucket: Bucket) -> None:
        from clr_optim.kernels.triton import multi_tensor

        self.bucket = bucket
        block = multi_tensor.shape_of(bucket.dtype.itemsize).block
        self._chunk = block * multi_tensor.BLOCKS_PER_CHUNK
        # Compiled for aligned tensors and for others, though mostly only one of them is.
        self._compiled_for = [
            {
                **multi_tensor.constexprs(
                    bucket.kernel, len(bucket.slots), bucket.dtype, bucket.counter_dtype, aligned
                ),
                **multi_tensor.options(bucket.dtype, _warp(bucket.device)),
            }
            for aligned in (False, True)
        ]
        self._active = b""
        self._rows = _Mirror(bucket.device)
        self._chunks = _Mirror(bucket.device)
        self.chunks: Tensor | None = None
        #: how many programs that takes
        self.count = 0
        #: (address, whether it is a float64) of the step counters that this step moves on
        self.counters = np.zeros((0, 2), dtype=np.int64)

    def refresh(self) -> Tensor:
        """The rows on the device, chunks and counters in step with which of them are active."""
        table = self.bucket.table
        active = table["active"]
        now = active.tobytes()
        if now != self._active:
            rows = np.flatnonzero(active)
            chunks = -(-table["numel"][rows] // self._chunk)
            first = np.cumsum(chunks) - chunks
            of_row = np.repeat(rows, chunks)
            index = np.arange(len(of_row)) - np.repeat(first, chunks)
            pairs = np.stack([of_row, index], axis=1).astype(np.int32)
            self.count = len(pairs)
            self.chunks = self._chunks.put(pairs) if self.count else None
            addresses = table["counter"][rows]
            wide = np.full(len(rows), self.bucket.wide_counter, dtype=np.int64)
            self.counters = np.stack([addresses, wide], axis=1)[addresses != 0]
            self._active = now
        return self._rows.put(table.view(np.int64).reshape(len(table), -1))

    @property
    def compiled_for(self) -> dict[str, Any]:
        """Constants and options of the kernel, by whether gradients are as aligned as all else."""
        grads = self.bucket.table["grad"]
        return self._compiled_for[self.bucket.aligned and not int(np.bitwise_or.reduce(grads)) & 15]


class _Position:
    """The position in the schedule, and the phases, on one device."""

    def __init__(self, device: torch.device, schedule: Schedule) -> None:
        from clr_optim.kernels.triton.schedule import phase_tables

        self.device = device
        self._expected: tuple[int, int] | None = None
        self._control = torch.zeros(2, dtype=torch.int64, device=device)
        self._moving = schedule.scale_fn is None
        upload = [_Mirror(device) for _ in range(4)]
        constant = phase_tables(fixed())
        own = phase_tables(schedule) if self._moving else constant
        self._own = tuple(m.put(t) for m, t in zip(upload[:2], own, strict=True))
        self._constant = tuple(m.put(t) for m, t in zip(upload[2:], constant, strict=True))
        self._groups = _Mirror(device)
        self._groups_of: object = None
        self._counters = _Mirror(device)
        self._counters_of: list[npt.NDArray[Any]] = []
        self.one = torch.ones((), dtype=torch.float64, device=device)

    def control(self, course: Course) -> Tensor:
        """``(position, what the step adds to it)``: written only if something else moved it."""
        wanted = (course.position, int(course.moves))
        if self._expected != wanted:
            self._control.copy_(torch.tensor(wanted), non_blocking=True)
        self._expected = None  # until the step is done
        return self._control

    def advanced(self, course: Course) -> None:
        """Remember where the device has gone."""
        self._expected = (course.position + int(course.moves), int(course.moves))

    def decides(self, course: Course) -> bool:
        """Whether the rates are evaluated on the device, not handed down by the host."""
        return self._moving and course.moves

    def groups(self, course: Course, scalars: npt.NDArray[np.float64]) -> Tensor:
        """The groups' table: what the schedule needs of each, and then the kernel's scalars."""
        on_device = self.decides(course)
        changing = (tuple(course.bounds), course.momenta) if on_device else course.rates
        known = (scalars.shape, scalars.tobytes(), on_device, changing)
        if known != self._groups_of:
            table = np.zeros((len(scalars), scalars.shape[1] + 4))
            for i, (rate, bounds) in enumerate(zip(course.rates, course.bounds, strict=True)):
                table[i, :2] = bounds if on_device else (rate, rate)
                if course.momenta is not None and on_device:
                    table[i, 2:4] = course.momenta[i]
                    table[i, 4] = 1.0
            table[:, 5:] = scalars[:, 1:]  # without the rate
            self._there = self._groups.put(table)
            self._groups_of = known
        return self._there

    def counters(self, launches: list[_Launch]) -> tuple[Tensor, int]:
        """The step counters of all tensors that were updated, and how many there are."""
        now = [launch.counters for launch in launches]
        if [id(table) for table in now] != [id(table) for table in self._counters_of]:
            table = np.concatenate(now)
            self._count = len(table)
            # An empty table has no address to load from.
            self._addresses = self._counters.put(table if len(table) else _NO_COUNTER)
            self._counters_of = now
        return self._addresses, self._count

    def phases(self, course: Course) -> tuple[Tensor, ...]:
        """The phases' tables: the schedule's own, or those of a rate that is the group's upper."""
        return self._own if self.decides(course) else self._constant


class TritonBackend:
    """Steps one optimizer with the Triton kernels.

    Args:
        optimizer: the wrapped one.
        rule: its update rule.
        schedule: the policy. One with a ``scale_fn`` is evaluated on the host at each step.
        device: the type of the devices whose tensors it updates.

    Raises:
        BuildError: if the host's part, which looks after the tensors, cannot be compiled here.
    """

    def __init__(
        self, optimizer: Optimizer, rule: UpdateRule, schedule: Schedule, device: str
    ) -> None:
        self.plan = Plan(optimizer, rule, library().held, device)
        self._schedule = schedule
        self._launches: list[_Launch] = []
        self._positions: dict[torch.device, _Position] = {}

    def clip(self, max_norm: float, grad_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The norm of all gradients times ``grad_scale``; what that and clipping multiply them by.

        Both on the device. Of DTensors the gradients on all ranks count, each once.
        """
        grads = [p.grad for p in self.plan.active_params() if p.grad is not None]
        norm = global_norm(grads, self.plan.spreads, self.plan.wide) * grad_scale
        return norm, grad_scale * clip_factor(norm, max_norm)

    def step(self, course: Course, grad_scale: float | Tensor = 1.0) -> None:
        """Update all tensors of the plan, which must be fresh: a launch per bucket, and one more.

        Args:
            course: where the schedule stands.
            grad_scale: multiplies the gradients on their way in; memory keeps them as they are.
        """
        plan = self.plan
        if [id(launch.bucket) for launch in self._launches] != [id(b) for b in plan.buckets]:
            self._launches = [_Launch(bucket) for bucket in plan.buckets]
        for device in dict.fromkeys(launch.bucket.device for launch in self._launches):
            if device not in self._positions:
                self._positions[device] = _Position(device, self._schedule)
            with _guard(device):
                self._step_on(self._positions[device], course, grad_scale)
        plan.commit()

    def _step_on(self, position: _Position, course: Course, grad_scale: float | Tensor) -> None:
        from clr_optim.kernels.triton import multi_tensor

        scale = position.one
        if isinstance(grad_scale, Tensor):
            scale = grad_scale.to(position.device, torch.float64)
        elif grad_scale != 1.0:
            scale = position.one * grad_scale
        groups = position.groups(course, self.plan.scalars)
        width = groups.shape[1]
        ints, floats = position.phases(course)
        phases = len(ints)
        control = position.control(course)
        launches = [x for x in self._launches if x.bucket.device == position.device]
        for launch in launches:
            rows = launch.refresh()
            if launch.count:
                multi_tensor.multi_tensor[(launch.count,)](
                    launch.chunks, rows, groups, width, ints, floats, phases, control, scale,
                    **launch.compiled_for,
                )  # fmt: skip
        counters, count = position.counters(launches)
        programs = max(1, -(-count // _ADVANCED_AT_ONCE))
        multi_tensor.advance[(programs,)](counters, count, control, BLOCK=_ADVANCED_AT_ONCE)
        position.advanced(course)


def _warp(device: torch.device) -> int:
    """Threads of a warp: 64 on most of AMD's GPUs."""
    if device.type == "cuda" and torch.version.hip:
        return int(torch.cuda.get_device_properties(device).warp_size)
    return 32


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
