"""The wrapped optimizer's own step, for every optimizer and every setting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.sharding import global_norm, is_wide, local_part, spreads, whole

__all__ = [
    "ClippedGradients",
    "HiddenGradients",
    "check_clippable",
    "has_own_step",
    "is_profiled",
    "is_wrapped_by_torch",
    "raw_step",
]

# All functions that torch's profiling wrapper has made share this code object.
_PROFILED = Optimizer.profile_hook_step(lambda: None).__code__


def has_own_step(optimizer: Optimizer) -> bool:
    """Whether somebody replaced ``step`` on the object.

    A torch scheduler does so too, to see that it is called; what it wraps then decides.
    """
    step = optimizer.__dict__.get("step")
    if step is None:
        return False
    if hasattr(step, "_wrapped_by_lr_sched"):
        return getattr(step, "__wrapped__", None) is not type(optimizer).step
    return True


def is_wrapped_by_torch(cls: type[Optimizer]) -> bool:
    """Whether the outermost layer of the class's ``step`` is torch's wrapper, with the hooks."""
    return getattr(cls.step, "__code__", None) is _PROFILED


def is_profiled(optimizer: Optimizer) -> bool:
    """Whether the outermost layer of ``step`` is torch's wrapper, which runs the step hooks."""
    return is_wrapped_by_torch(type(optimizer)) and not has_own_step(optimizer)


def raw_step(optimizer: Optimizer) -> Callable[..., Any]:
    """``optimizer.step`` beneath torch's profiling wrapper, if that is its outermost layer.

    The wrapper also runs the step hooks. The wrapping optimizer has been through one already, and
    a second would run every global hook twice.
    """
    if not is_profiled(optimizer):
        return optimizer.step
    profiled: Any = type(optimizer).step
    bound: Callable[..., Any] = profiled.__wrapped__.__get__(optimizer, type(optimizer))
    return bound


_SPARSE = (
    torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc,
)  # fmt: skip


class ClippedGradients:
    """Clips the gradients for the length of a step and puts the user's own back afterwards.

    Args:
        max_norm: of the norm over all gradients together, as in
            :func:`torch.nn.utils.clip_grad_norm_`.
    """

    def __init__(self, max_norm: float) -> None:
        self._max_norm = max_norm
        self._originals: list[tuple[Tensor, Tensor]] = []

    def clip(self, params: Iterable[Tensor], grad_scale: Tensor | None = None) -> Tensor:
        """Swap in clipped copies; returns the norm before clipping, a 0-dim tensor.

        Args:
            params: those of all groups.
            grad_scale: an AMP scale that the gradients still carry, divided out first.
        """
        self.restore()
        params = list(dict.fromkeys(params))
        copies = []
        for param in params:
            grad = param.grad
            if grad is not None:
                self._originals.append((param, grad))
                own = whole(grad)
                if grad_scale is not None:
                    local_part(own).mul_(grad_scale.to(own.device).reciprocal())
                param.grad = own
                copies.append(own)
        ways = spreads(params)
        if not any(ways):
            try:
                return torch.nn.utils.clip_grad_norm_(
                    [p for p, _ in self._originals], self._max_norm
                )
            except (NotImplementedError, RuntimeError) as error:
                self.restore()
                sparse = [p for p in params if p.grad is not None and p.grad.layout in _SPARSE]
                if not sparse:
                    raise
                raise NotImplementedError(
                    f"max_grad_norm={self._max_norm} cannot clip sparse gradients, of which torch "
                    f"takes no norm: a parameter of shape {list(sparse[0].shape)} has one. "
                    "Construct CyclicalOptimizer without max_grad_norm, or have dense gradients, "
                    "as torch.nn.Embedding(..., sparse=False) does"
                ) from error
        # torch's own takes DTensors of one mesh, and none beside other tensors.
        norm = global_norm(copies, ways, is_wide(params))
        factor = (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
        for own in copies:
            local_part(own).mul_(factor.to(own.device))
        return norm

    def restore(self) -> None:
        """Put the user's gradients back, if copies are in their place."""
        for param, grad in self._originals:
            param.grad = grad
        self._originals.clear()


def check_clippable(params: Iterable[Tensor], max_norm: float) -> None:
    """Raise where the gradients have no norm to clip by."""
    clipped = ClippedGradients(max_norm)
    try:
        clipped.clip(params)
    finally:
        clipped.restore()


class HiddenGradients:
    """Hides parameters from the wrapped step, which passes over those without a gradient.

    Args:
        params: the parameters to hide.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._hidden = [(p, p.grad) for p in params if p.grad is not None]

    def hide(self) -> None:
        """Take the gradients away."""
        for param, _ in self._hidden:
            param.grad = None

    def restore(self) -> None:
        """Put the gradients back; may be called again."""
        for param, grad in self._hidden:
            param.grad = grad
        self._hidden.clear()
