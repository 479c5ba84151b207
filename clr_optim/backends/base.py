"""The interface of fused backends: the methods, the arguments of a step, who knows the position."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

from clr_optim.gate import Gate
from clr_optim.plan import NO_EXTRAS, Extras, Plan
from clr_optim.rules import UpdateRule
from clr_optim.schedule import Schedule

__all__ = ["Course", "FusedBackend", "Gradients", "Outcome", "WhoKnows"]


class Course(NamedTuple):
    """The place of one step in the schedule, for a backend (no wrapper, as ``core.course`` has).

    Args:
        position: the step's number, counted from 0.
        rates: the learning rate of each group.
        bounds: ``(base_lr, max_lr)`` of each group.
        momenta: ``(base_momentum, max_momentum)`` of each group where momentum cycles, else None.
        kept: ``(group, lr)`` of each learning rate that is a tensor and that the device keeps
            current.
        moves: whether the position advances. If not, the step uses ``rates`` and no schedule.
        followed: settings that follow schedules: the group's number, the setting's name, the places
            of its numbers in a tuple (empty if it is a number), and their schedules.
        weights: the weight of each group's parameters in the average that falls due, as far as the
            host knows; empty if none does.
        offsets: what a group's count of averages lacks, see :func:`clr_optim.averages.offsets`;
            empty without averages.
    """

    position: int
    rates: Sequence[float]
    bounds: Sequence[tuple[float, float]]
    momenta: Sequence[tuple[float, float]] | None
    kept: Sequence[tuple[int, Tensor]]
    moves: bool
    followed: Sequence[tuple[int, str, tuple[int, ...], Sequence[Schedule]]] = ()
    weights: Sequence[float] = ()
    offsets: Sequence[int] = ()


class Gradients(NamedTuple):
    """How a step changes gradients while it reads them. The gradients in memory stay.

    Args:
        scale: the factor of a GradScaler, which the step divides out; a tensor of one element.
        found_inf: the GradScaler's answer, a tensor of one element. If it is not 0, a gradient is
            infinite or NaN, and the step does nothing. None if the host has read the answer.
        max_norm: the largest norm over all gradients of all ranks; the step clips a larger one.
        gate: decides by this norm whether the step happens.
        waits: whether the host must know the gate's decision before any tensor changes.
    """

    scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_norm: float | None = None
    gate: Gate | None = None
    waits: bool = False

    @property
    def fills_gate(self) -> bool:
        """Whether the gate of this step may close, or its gradients have a factor."""
        return self.needs_norm or self.scale is not None or self.found_inf is not None

    @property
    def leave_doubt(self) -> bool:
        """Whether kernels may skip the step without the host's knowledge."""
        return self.found_inf is not None or (self.gate is not None and not self.waits)

    @property
    def needs_norm(self) -> bool:
        """Whether the step depends on the norm of all gradients."""
        return self.max_norm is not None or self.gate is not None


class Outcome(NamedTuple):
    """The outcome of a step.

    Args:
        norm: the norm of all gradients, if the step depends on it.
        happened: False if the host knows that the step was skipped.
    """

    norm: Tensor | None
    happened: bool = True


class WhoKnows(enum.Enum):
    """Who knows the position: the number of the next step."""

    HOST = "the host has counted all steps"
    MAYBE = "the device may have skipped a step, and knows"
    DEVICE = "a graph's replays count on the device alone, for good"


class FusedBackend(Protocol):
    """Steps the tensors of a plan, which must be fresh at every :meth:`step`."""

    name: ClassVar[str]
    """The name in ``backend=`` and ``CLR_OPTIM_BACKEND``."""

    capturable: ClassVar[bool]
    """Whether a graph can capture a step: the position then lives on the device."""

    counts_on_device: ClassVar[bool]
    """Whether step counters lie on the device of their parameter, and not on the CPU."""

    keeps_rates: ClassVar[bool]
    """Whether the device keeps the ``lr`` of groups with ``capturable=True`` current."""

    reuses_norm: ClassVar[bool]
    """Whether every step writes its norm into the same tensor."""

    steps_alone: ClassVar[bool]
    """Whether native code can take an ordinary step whole, see :mod:`clr_optim.core.ordinary`."""

    sees_overflows: ClassVar[bool]
    """Whether the kernels read ``found_inf``, so that the host need not wait for it."""

    steps_in_backward: ClassVar[bool]
    """Whether single parameters can be updated in the backward pass, see :meth:`open_pass`."""

    plan: Plan
    """The tensors that the kernels update, bucket by bucket."""

    @classmethod
    def device_types(cls) -> tuple[str, ...]:
        """Return the types of the devices whose tensors the kernels update."""

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
    ) -> FusedBackend:
        """Return a backend for one optimizer.

        Args:
            optimizer: the wrapped optimizer.
            rule: its update rule.
            schedule: the policy.
            device: one of :meth:`device_types`.
            lock: the lock that a thread holds while it steps the optimizer. None makes a new lock.
            asked: whether the user named the backend. If not, a missing extension must raise here,
                so that torch's step can serve.
            extras: the state that steps keep beside torch's.

        Raises:
            NoKernelsError: if the kernels cannot serve here.
        """

    who_knows: WhoKnows
    """Who knows the position. A step changes the answer, and so does an answer of the device."""

    def position(self) -> int:
        """Return the position that the device has counted; wait for the device."""

    def move_to(self, course: Course) -> None:
        """Take in a position and bounds before the next step, which may be a graph's replay."""

    def take_bounds(self, course: Course) -> None:
        """Take in bounds alone: the device itself has just reported the position."""

    def keeps(self, lr: Tensor) -> bool:
        """Return whether steps write the next rate into this tensor."""

    def bind_next(self) -> None:
        """Have the next step make its launches ready for native code, which takes those after it.

        The native code of an ordinary step asks for this if no launches are ready.
        """

    def agrees(self, course: Course) -> bool:
        """Return whether native code may take the steps from this position on, with these bounds.

        If not, the next step must tell the device.
        """

    def doubt(self, *, has_begun: bool) -> None:
        """Take note that an ordinary step has raised.

        Args:
            has_begun: whether native code had begun to change tensors, and has counted the step.
        """

    def open_pass(self, course: Course) -> Callable[[int, int], object] | None:
        """Make ready to update single parameters with the values of the coming step.

        The plan is up to date. For each complete gradient, native code checks the row, has the row
        updated, counts up the parameter's version, frees the gradient and notes the parameter as
        done (``plan.native.is_done``). A change of the plan closes the pass, and the core opens the
        pass again with the same course. Then :meth:`step` ends the pass: the step updates the other
        parameters, and leaves the averages of the done ones alone.

        Args:
            course: the place of the coming step in the schedule.

        Returns:
            A function of the numbers of a bucket and of a row, which updates this one row and moves
            its average if that is due. ``plan.buckets[b].gradients[row]`` has the address of the
            gradient. The call comes on the thread and the stream of the backward pass. The answer
            False tells that nothing was done, and that the core must open the pass again. None:
            native code updates the row with the CPU's kernels.
        """

    def step(self, course: Course, gradients: Gradients) -> Outcome:
        """Update all tensors of the plan, or none if the gate closes.

        Args:
            course: the place of this step in the schedule.
            gradients: how the step changes its gradients, and the gate.
        """
