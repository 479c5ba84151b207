"""What the optimizer and its fused backends say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from clr_optim.plan import Plan

__all__ = ["Course", "FusedBackend", "Gradients"]


class Course(NamedTuple):
    """Where in the schedule a step stands.

    Args:
        position: the step's number, counted from 0.
        rates: the learning rate of each group.
        bounds: ``(base_lr, max_lr)`` of each group.
        momenta: ``(base_momentum, max_momentum)`` of each group where momentum cycles, else None.
        kept: the learning rates that are tensors for the device to keep current, by group.
        moves: whether the cycle advances; where it does not, the schedule has no say in the rates.
    """

    position: int
    rates: Sequence[float]
    bounds: Sequence[tuple[float, float]]
    momenta: Sequence[tuple[float, float]] | None
    kept: Sequence[tuple[int, Tensor]]
    moves: bool


class Gradients(NamedTuple):
    """What is to be done to the gradients on their way in; memory keeps them as they are.

    Args:
        scale: what a GradScaler has multiplied them by, to be divided out; a tensor of one element.
        found_inf: likewise, nonzero if one of them is infinite or NaN, and the step is to do
            nothing. Left out where the host has looked into it.
        max_norm: of the norm over all of them together, on all ranks; what is above it is clipped.
    """

    scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_norm: float | None = None


class FusedBackend(Protocol):
    """Steps the tensors of a plan, which must be fresh whenever :meth:`step` is called."""

    plan: Plan
    #: whether the kernels look into ``found_inf`` themselves
    sees_overflows: bool

    @property
    def uncertain(self) -> bool:
        """Whether only the device knows the position.

        After steps that it may have skipped, and for good once a step was captured into a graph.
        """

    def position(self) -> int:
        """The position, by the device's own count; waits for it."""

    def move_to(self, course: Course, *, there: bool = False) -> None:
        """Take in a position and bounds before the next step, which may be a graph's replay.

        Args:
            course: where to go.
            there: whether the device has just told that this is where it is.
        """

    def keeps(self, lr: Tensor) -> bool:
        """Whether steps write the next rate into this tensor."""

    def step(self, course: Course, gradients: Gradients) -> Tensor | None:
        """Update all tensors of the plan; the gradients' norm if they are clipped by it."""
