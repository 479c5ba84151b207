"""The C++ kernels on CPU tensors: one call updates every tensor of a bucket."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.backends import gil
from clr_optim.backends.base import Course, Gradients
from clr_optim.backends.torch import has_own_step
from clr_optim.kernels.native import build
from clr_optim.kernels.native.build import BuildError
from clr_optim.plan import Plan, View
from clr_optim.rules import RULES, UpdateRule, class_name
from clr_optim.schedule import Schedule
from clr_optim.sharding import no_sums, sum_over_ranks

__all__ = ["BuildError", "NativeBackend", "library", "rule_for"]


def rule_for(optimizer: Optimizer) -> UpdateRule | str:
    """The rule of a fused kernel for this optimizer, or why there is none."""
    rule = RULES.get(type(optimizer))
    if rule is None:
        return f"no fused kernel for {class_name(type(optimizer))}"
    if has_own_step(optimizer):
        return "its step was replaced"
    return rule


# Answers of clr_step and clr_sums_of_squares.
_UNKNOWN, _UNSCANNED = 1, 2


class _Library:
    """The compiled functions, called with the GIL: they give it away themselves where it pays."""

    def __init__(self) -> None:
        held = ctypes.PyDLL(build.load()._name)
        i64, f64, pointer, obj = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.py_object
        held.clr_step.argtypes = [pointer, pointer, i64, f64, i64, i64]
        held.clr_sums_of_squares.argtypes = [pointer, pointer, i64]
        held.clr_can_scan.argtypes = [obj]
        held.clr_current.argtypes = [pointer]
        self.held = gil.checked(held)
        capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
        if capsule is None or not held.clr_can_scan(capsule):
            raise BuildError(
                f"torch {torch.__version__} does not offer DLPack's C exchange API in version 1"
            )


_library: _Library | None = None


def library() -> _Library:
    """The kernels, compiled if need be; raises :class:`BuildError`."""
    global _library
    if _library is None:
        _library = _Library()
    return _library


class NativeBackend:
    """Steps one optimizer with the native kernels.

    Args:
        optimizer: the wrapped one.
        rule: its update rule.
        lock: held by the thread that steps the optimizer; None makes one.

    Raises:
        BuildError: if the kernels cannot be compiled here.
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
    uncertain = False

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
    ) -> NativeBackend:
        """Return a backend for one optimizer; the host evaluates the schedule."""
        return cls(optimizer, rule, lock)

    def position(self) -> int:
        """Never asked: the host counts the steps."""
        raise AssertionError("the host knows the position")

    def move_to(self, course: Course, *, there: bool = False) -> None:
        """Nothing: every step is told where it stands."""

    def keeps(self, lr: Tensor) -> bool:
        """Never: the host writes rates."""
        return False

    def step(self, course: Course, gradients: Gradients) -> Tensor | None:
        """Update all tensors of the plan, which must be fresh; the norm if they are clipped by it.

        Args:
            course: of which only the rates count.
            gradients: what is done to them on their way in, ``found_inf`` left out.
        """
        plan = self.plan
        factor = 1.0 if gradients.scale is None else 1.0 / gradients.scale.item()
        norm = None
        if gradients.max_norm is not None:
            length = factor * self._norm()
            clip = gradients.max_norm / (length + 1e-6)
            # NaN stays NaN, as in clip_grad_norm_.
            factor = factor if clip > 1.0 else factor * clip
            dtype = torch.float64 if plan.wide else torch.float32
            norm = torch.tensor(length, dtype=dtype, device="cpu")
        try:
            while self._launch(plan.view, course, factor) == _UNSCANNED:
                plan.refresh()  # another thread takes a step of this optimizer, or has just done so
            plan.commit()
        except BaseException:
            # Ctrl-C during a kernel is raised after it: then its state belongs to the parameters.
            plan.commit_if_called()
            raise
        return norm

    def _launch(self, view: View, course: Course, factor: float) -> int:
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
        """Of all gradients as they are; of DTensors those on all ranks, each once."""
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
