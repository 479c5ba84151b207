"""The native backend: C++ kernels on CPU tensors, one call per step."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.backends.base import Course, Gradients, WhoKnows
from clr_optim.backends.torch import has_own_step
from clr_optim.kernels.native import NoKernelsError, load
from clr_optim.plan import Plan, View
from clr_optim.rules import RULES, UpdateRule, class_name
from clr_optim.schedule import Schedule
from clr_optim.sharding import no_sums, sum_over_ranks

__all__ = ["NativeBackend", "NoKernelsError", "library", "rule_for"]


def rule_for(optimizer: Optimizer) -> UpdateRule | str:
    """Return the rule by which a kernel updates this optimizer, or why no kernel does."""
    rule = RULES.get(type(optimizer))
    if rule is None:
        return f"no fused kernel for {class_name(type(optimizer))}"
    if has_own_step(optimizer):
        return "its step was replaced"
    return rule.refuses(optimizer) or rule


# Answers of clr_step and clr_sums_of_squares, see multi_tensor.cpp.
_UNKNOWN, _UNSCANNED = 1, 2


class _Library:
    """The compiled functions. Calls keep the GIL; long ones give it away by themselves."""

    def __init__(self) -> None:
        held = ctypes.PyDLL(str(load().__file__))
        i64, f64, pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
        held.clr_step.argtypes = [pointer, pointer, i64, f64, i64, i64]
        held.clr_sums_of_squares.argtypes = [pointer, pointer, i64]
        held.clr_current.argtypes = [pointer]
        self.held = held


_library: _Library | None = None


def library() -> _Library:
    """Return the compiled functions, loaded once per process; may raise :class:`NoKernelsError`."""
    global _library
    if _library is None:
        _library = _Library()
    return _library


class NativeBackend:
    """Steps one optimizer with the native kernels.

    Args:
        optimizer: the wrapped optimizer.
        rule: its update rule.
        lock: the lock that a thread holds while it steps the optimizer. None makes a new lock.

    Raises:
        NoKernelsError: if the compiled kernels cannot serve here.
    """

    def __init__(
        self, optimizer: Optimizer, rule: UpdateRule, lock: threading.RLock | None = None
    ) -> None:
        self._lib = library().held
        self.plan = Plan(optimizer, rule, self._lib, "cpu", lock=lock)

    name: ClassVar[str] = "native"
    capturable: ClassVar[bool] = False
    counts_on_device: ClassVar[bool] = False
    keeps_rates: ClassVar[bool] = False
    reuses_norm: ClassVar[bool] = False
    sees_overflows: ClassVar[bool] = False

    who_knows = WhoKnows.HOST

    @classmethod
    def device_types(cls) -> tuple[str, ...]:
        """Return the types of the devices whose tensors the kernels update."""
        return ("cpu",)

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
    ) -> NativeBackend:
        """Return a backend for one optimizer; the host evaluates the schedule."""
        return cls(optimizer, rule, lock)

    def position(self) -> int:
        """Raise: the host counts the steps, so no caller asks the backend."""
        raise AssertionError("the host knows the position")

    def move_to(self, course: Course) -> None:
        """Do nothing: every step gets its course."""

    def take_bounds(self, course: Course) -> None:
        """Do nothing: every step gets its course."""

    def keeps(self, lr: Tensor) -> bool:
        """Return False: the host writes the rates."""
        return False

    def step(self, course: Course, gradients: Gradients) -> Tensor | None:
        """Update all tensors of the plan; return the norm of the gradients if a norm limits them.

        Args:
            course: the rates of the step.
            gradients: how to scale and clip the gradients. The host has dealt with ``found_inf``.
        """
        plan = self.plan
        factor = 1.0 if gradients.scale is None else 1.0 / gradients.scale.item()
        norm = None
        if gradients.max_norm is not None:
            length = factor * self._norm()
            clip = gradients.max_norm / (length + 1e-6)
            # A NaN must stay NaN, as in clip_grad_norm_.
            factor = factor if clip > 1.0 else factor * clip
            dtype = torch.float64 if plan.wide else torch.float32
            norm = torch.tensor(length, dtype=dtype, device="cpu")
        try:
            while self._call_kernels(plan.view, course, factor) == _UNSCANNED:
                plan.refresh()  # another thread has just stepped this optimizer, or still does
            plan.commit()
        except BaseException:
            # Ctrl-C during a kernel is raised after the kernel, which has filled the new state.
            plan.commit_if_called()
            raise
        return norm

    def _call_kernels(self, view: View, course: Course, factor: float) -> int:
        scalars = view.scalars
        for i, rate in zip(range(len(scalars)), course.rates, strict=False):
            scalars[i, 0] = rate
        answer: int = self._lib.clr_step(
            view.address,
            view.scalars_address,
            scalars.shape[1],
            factor,
            torch.get_num_threads(),
            course.moves,
        )
        if answer == _UNKNOWN:
            raise RuntimeError("the compiled kernels do not match this version: rebuild them")
        return answer

    def _norm(self) -> float:
        """Return the norm of all gradients as they are in memory, over all ranks."""
        plan = self.plan
        while True:
            view, squares = plan.view, np.zeros(len(plan.buckets))
            answer = self._lib.clr_sums_of_squares(
                view.address, squares.ctypes.data, torch.get_num_threads()
            )
            if answer != _UNSCANNED:
                break
            plan.refresh()
        sums = no_sums(plan.spreads)
        for bucket, square in zip(plan.buckets, squares.tolist(), strict=True):
            sums[bucket.spread] += square
        return math.sqrt(sum_over_ranks(sums).item())
