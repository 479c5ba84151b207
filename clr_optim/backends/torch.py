"""The wrapped optimizer's own step, for every optimizer and every setting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from clr_optim.backends.clipping import ClippedGradients, check_clippable

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
    """Return whether other code replaced ``step`` on the object.

    A torch scheduler also replaces ``step``, to see that the user calls it. The step below the
    scheduler's then decides. The class's own step, put back on the object, replaces nothing.
    """
    step = optimizer.__dict__.get("step")
    if step is None:
        return False
    if getattr(step, "__func__", None) is type(optimizer).step:
        return step.__self__ is not optimizer
    if hasattr(step, "_wrapped_by_lr_sched"):
        return getattr(step, "__wrapped__", None) is not type(optimizer).step
    return True


def is_wrapped_by_torch(cls: type[Optimizer]) -> bool:
    """Return whether torch's wrapper, which runs the hooks, is the class's outermost ``step``."""
    return getattr(cls.step, "__code__", None) is _PROFILED


def is_profiled(optimizer: Optimizer) -> bool:
    """Return whether torch's wrapper, which runs the hooks, is the object's outermost ``step``."""
    return is_wrapped_by_torch(type(optimizer)) and not has_own_step(optimizer)


def raw_step(optimizer: Optimizer) -> Callable[..., Any]:
    """Return ``optimizer.step`` beneath torch's profiling wrapper, if that is outermost.

    The wrapper runs the step hooks. The wrapping optimizer has run its own wrapper already, and a
    second one would run every global hook twice.
    """
    if not is_profiled(optimizer):
        return optimizer.step
    profiled: Any = type(optimizer).step
    bound: Callable[..., Any] = profiled.__wrapped__.__get__(optimizer, type(optimizer))
    return bound


class HiddenGradients:
    """Hides gradients from the wrapped step, which skips parameters without a gradient.

    Args:
        params: the parameters to hide.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._hidden = [(p, p.grad) for p in params if p.grad is not None]

    def hide(self) -> None:
        """Set the gradients to None."""
        for param, _ in self._hidden:
            param.grad = None

    def restore(self) -> None:
        """Put the gradients back. A second call changes nothing."""
        for param, grad in self._hidden:
            param.grad = grad
        self._hidden.clear()
