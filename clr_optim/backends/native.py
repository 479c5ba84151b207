"""The C++ kernels on CPU tensors: one call updates every tensor of a bucket."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.backends.base import Course
from clr_optim.backends.torch import has_own_step
from clr_optim.kernels.native import build
from clr_optim.kernels.native.build import BuildError
from clr_optim.plan import Plan
from clr_optim.rules import RULES, UpdateRule
from clr_optim.sharding import no_sums, sum_over_ranks

__all__ = ["BuildError", "NativeBackend", "library", "rule_for"]


def rule_for(optimizer: Optimizer) -> UpdateRule | str:
    """The rule of a fused kernel for this optimizer, or why there is none."""
    rule = RULES.get(type(optimizer))
    if rule is None:
        return f"no fused kernel for {type(optimizer).__name__}"
    if has_own_step(optimizer):
        return "its step was replaced"
    return rule


class _Library:
    """The compiled functions, twice: called without the GIL, and with it to look at objects."""

    def __init__(self) -> None:
        released = build.load()
        held = ctypes.PyDLL(released._name)
        i64, f64, pointer, obj = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.py_object
        self.step = released.clr_step
        self.step.argtypes = [pointer, pointer, i64, f64, i64]
        self.sums_of_squares = released.clr_sums_of_squares
        self.sums_of_squares.argtypes = [pointer, pointer, i64]
        self.sums_of_squares.restype = None
        held.clr_can_scan.argtypes = [obj]
        held.clr_current.argtypes = [pointer]
        self.held = held
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

    Raises:
        BuildError: if the kernels cannot be compiled here.
    """

    def __init__(self, optimizer: Optimizer, rule: UpdateRule) -> None:
        self._lib = library()
        self.plan = Plan(optimizer, rule, self._lib.held, "cpu")

    def clip(self, max_norm: float, grad_scale: float = 1.0) -> tuple[Tensor, float]:
        """The norm of all gradients times ``grad_scale``; what that and clipping multiply them by.

        Of DTensors the gradients on all ranks count, each once.
        """
        plan = self.plan
        squares = np.zeros(len(plan.buckets))
        self._lib.sums_of_squares(plan.view_address, squares.ctypes.data, torch.get_num_threads())
        sums = no_sums(plan.spreads)
        for bucket, square in zip(plan.buckets, squares.tolist(), strict=True):
            sums[bucket.spread] += square
        norm = math.sqrt(sum_over_ranks(sums).item()) * grad_scale
        scale = max_norm / (norm + 1e-6)
        # NaN stays NaN, as in clip_grad_norm_.
        return (
            torch.tensor(norm, dtype=torch.float64 if plan.wide else torch.float32),
            grad_scale if scale > 1.0 else grad_scale * scale,
        )

    def step(self, course: Course, grad_scale: float | Tensor = 1.0) -> None:
        """Update all tensors of the plan, which must be fresh.

        Args:
            course: of which only the rates count.
            grad_scale: multiplies the gradients on their way in; memory keeps them as they are.
        """
        plan = self.plan
        for i, rate in enumerate(course.rates):
            plan.scalars[i, 0] = rate
        failed = self._lib.step(
            plan.view_address,
            plan.scalars_address,
            plan.scalars.shape[1],
            float(grad_scale),
            torch.get_num_threads(),
        )
        if failed:
            raise RuntimeError("the compiled kernels do not match this version: rebuild them")
        plan.commit()
