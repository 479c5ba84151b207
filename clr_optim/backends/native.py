"""The C++ kernels on CPU tensors: one call updates every tensor of a bucket."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.backends.base import Course, Gradients
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

    sees_overflows = False
    uncertain = False

    def position(self) -> int:
        """Never asked: the host counts the steps."""
        raise AssertionError("the host knows the position")

    def move_to(self, course: Course) -> None:
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
            norm = torch.tensor(length, dtype=torch.float64 if plan.wide else torch.float32)
        for i, rate in enumerate(course.rates):
            plan.scalars[i, 0] = rate
        failed = self._lib.step(
            plan.view_address,
            plan.scalars_address,
            plan.scalars.shape[1],
            factor,
            torch.get_num_threads(),
        )
        if failed:
            raise RuntimeError("the compiled kernels do not match this version: rebuild them")
        plan.commit()
        return norm

    def _norm(self) -> float:
        """Of all gradients as they are; of DTensors those on all ranks, each once."""
        plan = self.plan
        squares = np.zeros(len(plan.buckets))
        self._lib.sums_of_squares(plan.view_address, squares.ctypes.data, torch.get_num_threads())
        sums = no_sums(plan.spreads)
        for bucket, square in zip(plan.buckets, squares.tolist(), strict=True):
            sums[bucket.spread] += square
        return math.sqrt(sum_over_ranks(sums).item())
