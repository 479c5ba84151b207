"""The Triton kernels: one launch per bucket updates its tensors at the device's own position.

Everything a kernel reads beside the tensors lies in tables on the device, uploaded only when they
changed: pointers, groups, phases, the position in the schedule. The last is advanced on the device
too, so that nothing has to come from the host for the next step but where the gradients lie.

**Graphs.** A step captured into a CUDA graph cycles at every replay, since the graph reads and
advances the device's position. It goes on reading the tables it was captured with: those that
describe its tensors are left to it for good, and later steps make themselves new ones; position,
bounds and settings it shares with them. What is uploaded while a graph is captured is read from the
host's memory again at every replay: only the gradients' addresses are, which are new by then, from
memory that is left to the graph as well.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.backends.base import Course, Gradients
from clr_optim.backends.native import library
from clr_optim.backends.triton import device as current
from clr_optim.backends.triton import here
from clr_optim.backends.triton.clock import SUMMED_AT_ONCE, Clock
from clr_optim.backends.triton.launch import Launch
from clr_optim.plan import Plan
from clr_optim.rules import UpdateRule
from clr_optim.schedule import Schedule
from clr_optim.sharding import no_sums, sum_over_ranks

__all__ = ["TritonBackend"]

_ADVANCED_AT_ONCE = 256


class TritonBackend:
    """Steps one optimizer with the Triton kernels.

    Args:
        optimizer: the wrapped one.
        rule: its update rule.
        schedule: the policy. One with a ``scale_fn`` is evaluated on the host at each step.
        device: the type of the devices whose tensors it updates.
        lock: held by the thread that steps the optimizer; None makes one.

    Raises:
        BuildError: if the host's part, which looks after the tensors, cannot be compiled here.
    """

    name: ClassVar[str] = "triton"
    capturable: ClassVar[bool] = True
    counts_on_device: ClassVar[bool] = True
    keeps_rates: ClassVar[bool] = True
    reuses_norm: ClassVar[bool] = True
    sees_overflows: ClassVar[bool] = True

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
    ) -> TritonBackend:
        """Return a backend for one optimizer."""
        return cls(optimizer, rule, schedule, device, lock)

    def __init__(
        self,
        optimizer: Optimizer,
        rule: UpdateRule,
        schedule: Schedule,
        device: str,
        lock: threading.RLock | None = None,
    ) -> None:
        self.plan = Plan(
            optimizer,
            rule,
            library().held,
            device,
            capturable=True,
            by_alignment=True,
            lock=lock,
        )
        self._schedule = schedule
        self._momentum = rule.momentum
        self._launches: list[Launch] = []
        self._by_device: dict[torch.device, list[Launch]] = {}
        self._clocks: dict[torch.device, Clock] = {}
        self._unsure = False
        # Kept for graphs, whose launches read from them: their number is that of captured steps.
        self._given_up: list[Any] = []

    @property
    def uncertain(self) -> bool:
        """Whether only the device knows the position.

        After steps that it may have skipped, and for good once a step was captured into a graph.
        """
        return bool(self._clocks) and (self._unsure or bool(self._given_up))

    def position(self) -> int:
        """The position, by the device's own count; waits for it."""
        found = max(position.ask() for position in self._clocks.values())  # all the same
        self._unsure = False  # a capture may have refused to tell
        return found

    def keeps(self, lr: Tensor) -> bool:
        """Whether steps write the next rate into this tensor, as its device takes part in them."""
        return lr.device in self._clocks

    def move_to(self, course: Course, *, there: bool = False) -> None:
        """Take in a position and bounds before the next step, which may be a graph's replay.

        Args:
            course: where to go.
            there: whether the device has just told that this is where it is. To tell it so in turn
                might take it back, on another stream than that of its steps.
        """
        self._unsure = False
        with current.no_inference_mode():
            for position in self._clocks.values():
                with current.guard(position.device):
                    if not there:
                        position.move_to(course)
                    position.groups(course, self.plan.scalars, self._momentum)

    def step(self, course: Course, gradients: Gradients) -> Tensor | None:
        """Update all tensors of the plan, which must be fresh: a launch per bucket, and one more.

        Args:
            course: where the schedule stands.
            gradients: what is done to them on their way in; a launch per bucket more and another
                if they are clipped, one if they are only scaled.

        Raises:
            RuntimeError: if this is to be captured and something has to be uploaded for it.
        """
        with current.no_inference_mode():
            norm = self._step(course, gradients)
        self.plan.release()
        return norm

    def _step(self, course: Course, gradients: Gradients) -> Tensor | None:
        plan, capturing = self.plan, current.is_capturing()
        if capturing and not plan.buckets and not self._clocks:
            raise RuntimeError(
                "step() cannot be captured now: no parameter has had a gradient yet; take a step "
                "with all gradients and then capture"
            )
        if plan.pending and capturing:
            raise RuntimeError(
                "step() cannot be captured now: it would create the optimizer's state; take a step "
                "with all gradients and then capture"
            )
        if [id(launch.bucket) for launch in self._launches] != [id(b) for b in plan.buckets]:
            self._arrange([Launch(bucket) for bucket in plan.buckets])
        by_device = self._by_device
        rows = {}
        for device, launches in by_device.items():
            with current.guard(device):
                if current.is_capturing() is not capturing:
                    raise RuntimeError(
                        "step() cannot be captured now: a graph is being captured on one of the "
                        "devices that have parameters and not on another; capture on all or none"
                    )
                for launch in launches:
                    rows[launch] = launch.refresh()
                    launch.choose()
        gates, norm = self._gates(by_device, rows, gradients)
        unsure = self._unsure or (gradients.found_inf is not None and bool(by_device))
        done = 0
        try:
            for device, launches in by_device.items():
                position = self._clocks[device]
                with current.guard(device):
                    self._step_on(position, launches, rows, course, gates[device])
                    done += 1
                    position.advanced(course)
        except BaseException:
            if done == len(by_device) and not capturing:
                plan.commit()  # the state belongs to the parameters
            raise
        if not capturing:
            plan.tally[0] += 1
            plan.tally[1] += course.moves
        self._unsure = unsure
        if capturing:
            self._given_up.append([launch.give_up() for launch in self._launches])
            self._given_up.append([p.give_up() for p in self._clocks.values()])
            # And what their addresses are of: a checkpoint's tensors may take their place.
            self._given_up.append((list(plan.buckets), course.kept, gradients, gates))
        created = plan.pending
        plan.commit()
        if created:  # of which the rows tell: a step that is captured next may upload nothing
            for launch in self._launches:
                with current.guard(launch.bucket.device):
                    launch.refresh()
        return norm

    def _arrange(self, launches: list[Launch]) -> None:
        for device in dict.fromkeys(launch.bucket.device for launch in launches):
            if device not in self._clocks:
                others = list(self._clocks.values())
                with current.guard(device):
                    self._clocks[device] = Clock(device, self._schedule)
                if others:
                    self._clocks[device].join(others[0])
        by_device: dict[torch.device, list[Launch]] = {}
        for launch in launches:
            by_device.setdefault(launch.bucket.device, []).append(launch)
        for device in self._clocks:  # none may fall behind
            by_device.setdefault(device, [])
        self._launches, self._by_device = launches, by_device

    def _gates(
        self,
        by_device: dict[torch.device, list[Launch]],
        rows: dict[Launch, Tensor],
        gradients: Gradients,
    ) -> tuple[dict[torch.device, Tensor], Tensor | None]:
        """Each device's gate, and the norm that gradients are clipped by."""
        from clr_optim.kernels.triton import multi_tensor

        positions = {device: self._clocks[device] for device in by_device}
        if all(value is None for value in gradients):
            return {device: position.open for device, position in positions.items()}, None
        scales = {d: _on(gradients.scale, p.one) for d, p in positions.items()}
        sums, count = None, 0
        if gradients.max_norm is not None:
            parts: dict[Launch, Tensor] = {}
            for device, launches in by_device.items():
                with current.guard(device):
                    parts.update(self._squares(device, launches, rows, scales[device]))
            sums = self._together(parts)
            count = len(sums)
        gates: dict[torch.device, Tensor] = {}
        dtype = torch.float64 if self.plan.wide else torch.float32
        norm = None
        if sums is not None and not positions:  # of what other ranks have
            norm = sums.sum().sqrt().to(dtype)
        for device, position in positions.items():
            if gates and norm is not None:  # one device has summed for all
                gates[device] = next(iter(gates.values())).to(device)
                continue
            with current.guard(device):
                gates[device] = torch.empty(2, dtype=torch.float64, device=device)
                limit = position.one
                if sums is not None and gradients.max_norm is not None:
                    if position.norm is None or position.norm.dtype != dtype:
                        position.norm = torch.empty((), dtype=dtype, device=device)
                    norm = position.norm
                    limit = position.limit(gradients.max_norm)
                multi_tensor.open_gate[(1,)](
                    position.one if sums is None else sums.to(device), count, limit,
                    scales[device], _on(gradients.found_inf, position.zero),
                    position.one if norm is None else norm, gates[device],
                    CLIPS=sums is not None, BLOCK=SUMMED_AT_ONCE,
                )  # fmt: skip
        return gates, norm

    def _squares(
        self,
        device: torch.device,
        launches: list[Launch],
        rows: dict[Launch, Tensor],
        scale: Tensor,
    ) -> dict[Launch, Tensor]:
        """Sums of squares of the gradients on one device, one of each chunk, in order."""
        from clr_optim.kernels.triton import multi_tensor

        sums = torch.empty(
            sum(launch.count for launch in launches), dtype=torch.float64, device=device
        )
        counts = [launch.count for launch in launches]
        parts = dict(zip(launches, torch.split(sums, counts), strict=True))
        for launch, part in parts.items():
            if launch.count:
                multi_tensor.sum_of_squares[(launch.count,)](
                    launch.chunks, rows[launch], scale, part, **launch.squares_compiled_for
                )
        return parts

    def _together(self, parts: dict[Launch, Tensor]) -> Tensor:
        """What there is to be summed, on the first device, of all devices and all ranks."""
        sums = list(parts.values())
        meshes = [spread.mesh.device_type for spread in self.plan.spreads if spread]
        if not meshes and len({part.device for part in sums}) <= 1:
            return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64, device="cpu")
        device = sums[0].device if sums else torch.device(meshes[0])
        by_spread = no_sums(self.plan.spreads, device)
        for launch, part in parts.items():
            total = by_spread[launch.bucket.spread]
            total += part.sum().to(total.device)
        return sum_over_ranks(by_spread).reshape(1)

    def _step_on(
        self,
        position: Clock,
        launches: list[Launch],
        rows: dict[Launch, Tensor],
        course: Course,
        gate: Tensor,
    ) -> None:
        from clr_optim.kernels.triton import multi_tensor

        groups = position.groups(course, self.plan.scalars, self._momentum)
        width = groups.shape[1]
        ints, floats = position.phases(course)
        phases = len(ints)
        counters, count = position.counters(launches)
        rates, kept = position.rates(course)
        control = position.control(course)
        for launch in launches:
            if launch.count:
                multi_tensor.multi_tensor[(launch.count,)](
                    launch.chunks, rows[launch], groups, width, ints, floats, phases, control, gate,
                    **launch.compiled_for,
                )  # fmt: skip
        programs = max(1, -(-count // _ADVANCED_AT_ONCE))
        # Ctrl-C may come before the host has made a note of where the device goes: it then asks.
        self._unsure = self._unsure or not current.is_capturing()
        multi_tensor.advance[(programs,)](
            counters, count, rates, kept, groups, width, ints, floats, phases, control, gate,
            BLOCK=_ADVANCED_AT_ONCE, enable_fp_fusion=False,
        )  # fmt: skip


def _on(tensor: Tensor | None, default: Tensor) -> Tensor:
    """A GradScaler's tensor where it is needed, or what stands for it where there is none."""
    if tensor is None:
        return default
    return tensor.to(default.device, default.dtype, non_blocking=True)
