"""The native backend: C++ kernels on CPU tensors, one call per step."""

from __future__ import annotations

import functools
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from clr_optim.backends.base import Course, Gradients, Outcome, WhoKnows
from clr_optim.backends.torch import has_own_step
from clr_optim.kernels.native import NoKernelsError, load
from clr_optim.keys import STEP
from clr_optim.plan import NO_EXTRAS, Extras, Plan
from clr_optim.rules import RULES, UpdateRule, class_name
from clr_optim.schedule import Schedule
from clr_optim.sharding import DTensor, no_sums, sum_over_ranks

__all__ = ["NativeBackend", "NoKernelsError", "library", "rule_for"]


def rule_for(optimizer: Optimizer) -> UpdateRule | str:
    """Return the rule by which a kernel updates this optimizer, or why no kernel does."""
    rule = RULES.get(type(optimizer))
    if rule is None:
        return f"no fused kernel for {class_name(type(optimizer))}"
    if has_own_step(optimizer):
        return "its step was replaced"
    return rule.refuses(optimizer) or rule


# How often a step tries to call the kernels, while other threads keep changing things.
_TRIES = 100


@functools.cache
def library() -> ModuleType:
    """Return the compiled extension, after telling it what it needs of torch.

    Raises:
        NoKernelsError: if the compiled kernels cannot serve here.
    """
    lib = load()
    lib.connect(
        exchange_api=Tensor.__dlpack_c_exchange_api__,
        tensor=Tensor,
        parameter=torch.nn.Parameter,
        dtensor=DTensor,
        has_mode=torch._C._is_torch_function_mode_enabled,
        increment_version=torch._C._increment_version,
        num_threads=torch.get_num_threads,
        # absent from a torch without CUDA and ROCm
        current_stream=getattr(torch._C, "_cuda_getCurrentRawStream", None),
        global_pre_hooks=_global_optimizer_pre_hooks,
        global_post_hooks=_global_optimizer_post_hooks,
        profiler=vars(torch.autograd.profiler),
        position_key=STEP,
    )
    return lib


class NativeBackend:
    """Steps one optimizer with the native kernels.

    Args:
        optimizer: the wrapped optimizer.
        rule: its update rule.
        lock: the lock that a thread holds while it steps the optimizer. None makes a new lock.
        extras: the state that steps keep beside torch's.

    Raises:
        NoKernelsError: if the compiled kernels cannot serve here.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: UpdateRule,
        lock: threading.RLock | None = None,
        extras: Extras = NO_EXTRAS,
    ) -> None:
        self.plan = Plan(optimizer, rule, library(), "cpu", lock=lock, extras=extras)

    name: ClassVar[str] = "native"
    capturable: ClassVar[bool] = False
    counts_on_device: ClassVar[bool] = False
    keeps_rates: ClassVar[bool] = False
    reuses_norm: ClassVar[bool] = False
    steps_alone: ClassVar[bool] = True
    sees_overflows: ClassVar[bool] = False
    steps_in_backward: ClassVar[bool] = True

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
        extras: Extras = NO_EXTRAS,
    ) -> NativeBackend:
        """Return a backend for one optimizer; the host evaluates the schedule."""
        return cls(optimizer, rule, lock, extras)

    def position(self) -> int:
        """Raise: the host counts the steps, so no caller asks the backend."""
        raise AssertionError("the host knows the position")

    def move_to(self, course: Course) -> None:
        """Do nothing: every step gets its course."""

    def take_bounds(self, course: Course) -> None:
        """Do nothing: every step gets its course."""

    def bind_next(self) -> None:
        """Do nothing: native code calls the kernels itself."""

    def agrees(self, course: Course) -> bool:
        """Return True: native code gets all values from the host."""
        return True

    def doubt(self, *, has_begun: bool) -> None:
        """Do nothing: native code counts its steps itself."""

    def keeps(self, lr: Tensor) -> bool:
        """Return False: the host writes the rates."""
        return False

    def open_pass(self, course: Course) -> None:
        """Return None: native code updates each row itself."""

    def step(self, course: Course, gradients: Gradients) -> Outcome:
        """Update all tensors of the plan, or none if the gate closes.

        Args:
            course: the rates of the step.
            gradients: how to scale and clip the gradients, and the gate. The host has dealt with
                ``found_inf``.
        """
        plan = self.plan
        factor = 1.0 if gradients.scale is None else 1.0 / gradients.scale.item()
        length, norm = 0.0, None
        with plan.lock:
            if gradients.needs_norm:
                length = factor * self._norm()
                norm = torch.tensor(length, dtype=plan.norm_dtype, device="cpu")
                if gradients.gate is not None and gradients.gate.closes(norm.item()):
                    plan.release()
                    return Outcome(norm, happened=False)
            if gradients.max_norm is not None:
                clip = gradients.max_norm / (length + 1e-6)
                # A NaN must stay NaN, as in clip_grad_norm_.
                factor = factor if clip > 1.0 else factor * clip
            try:
                self._call_kernels(course, factor)
            except BaseException:
                # Ctrl-C during a kernel is raised after the kernel, which has filled the new state.
                plan.commit_if_called()
                raise
        return Outcome(norm)

    def _call_kernels(self, course: Course, factor: float) -> None:
        update = self.plan.native.update
        self._on_current_plan(
            lambda: (update(course.rates, factor, course.moves, course.weights), None)
        )
        self.plan.commit()

    def _on_current_plan(self, call: Callable[[], tuple[int, Any]]) -> Any:
        """Return what a call of native code finds, made on a plan that is up to date.

        Args:
            call: returns the answer of its scan, and what it finds if nothing has changed.
        """
        for _ in range(_TRIES):
            answer, found = call()
            if self.plan.confirms(answer):
                return found
            self.plan.refresh()
        raise RuntimeError(
            f"step() gave up after {_TRIES} tries: other threads keep changing the tensors or the "
            "settings of the optimizer; have them wait for step()"
        )

    def _norm(self) -> float:
        """Return the norm of all gradients as they are in memory, over all ranks."""
        plan = self.plan
        squares = self._on_current_plan(plan.native.squares)
        found = defaultdict(list)
        for bucket, square in zip(plan.buckets, squares, strict=True):
            found[bucket.spread].append(square)
        sums = no_sums(plan.spreads)
        for spread, of_spread in found.items():
            sums[spread] += _total(of_spread)
        return math.sqrt(sum_over_ranks(sums).item())


def _total(squares: Sequence[float]) -> float:
    """Return the sum of squares, whatever their order, as native code does."""
    try:
        return math.fsum(squares)
    except OverflowError:
        return sum(squares)  # infinite or NaN
