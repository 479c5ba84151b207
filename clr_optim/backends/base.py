"""What the optimizer and its fused backends say to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from clr_optim.plan import Plan

__all__ = ["Course", "FusedBackend"]


class Course(NamedTuple):
    """Where in the schedule a step stands.

    Args:
        position: the step's number, counted from 0.
        rates: the learning rate of each group.
        bounds: ``(base_lr, max_lr)`` of each group.
        momenta: ``(base_momentum, max_momentum)`` of each group where momentum cycles, else None.
        moves: whether the cycle advances; where it does not, the schedule has no say in the rates.
    """

    position: int
    rates: Sequence[float]
    bounds: Sequence[tuple[float, float]]
    momenta: Sequence[tuple[float, float]] | None
    moves: bool


class FusedBackend(Protocol):
    """Steps the tensors of a plan, which must be fresh whenever one of these is called."""

    plan: Plan

    def clip(self, max_norm: float, grad_scale: float = 1.0) -> tuple[Tensor, float | Tensor]:
        """The norm of all gradients times ``grad_scale``; what that and clipping multiply them by.

        Of DTensors the gradients on all ranks count, each once.
        """

    def step(self, course: Course, grad_scale: float | Tensor = 1.0) -> None:
        """Update all tensors of the plan.

        Args:
            course: the learning rates, or where they are to be had.
            grad_scale: multiplies the gradients on their way in; memory keeps them as they are.
        """
