"""Why this step cannot be captured into a CUDA graph: conditions and reasons, in one list.

The Triton backend adds the reasons that only a launch finds (see its ``cannot_capture``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from clr_optim.backends.torch import is_profiled
from clr_optim.rules import NUMBERS

__all__ = ["cannot_capture", "check_capture"]


def check_capture(wrapper: Any) -> None:
    """Raise a RuntimeError, with reason and remedy, unless a step can be captured now."""
    for condition, reason in REASONS:
        if condition(wrapper):
            raise cannot_capture(reason.format(serving=wrapper._shared.serving))


def cannot_capture(reason: str) -> RuntimeError:
    """Return the error of a step that cannot be captured."""
    return RuntimeError(f"step() cannot be captured into a graph: {reason}")


def _is_not_capturable(wrapper: Any) -> bool:
    shared = wrapper._shared
    traits = shared.serving.traits
    is_capturable = traits is not None and traits.capturable
    return not is_capturable or not is_profiled(shared.settings.optimizer)


def _was_moved(wrapper: Any) -> bool:
    position = wrapper._shared.position
    if wrapper._shared.serving.fused is None:
        return False
    position.catch_up()
    return position.believed() != position.number or not wrapper._shared.mirror.is_settled()


def _has_counters_elsewhere(wrapper: Any) -> bool:
    for param, state in wrapper.state.items():
        for name in NUMBERS if isinstance(state, dict) else ():
            number = state.get(name)
            if isinstance(number, Tensor) and number.device != param.device:
                return True
    return False


#: Each condition of a wrapper, and what to tell the user if the condition holds.
REASONS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        _is_not_capturable,
        "on backend {serving.name!r} ({serving.reason}) a graph would replay the same rate for "
        "ever; use backend='triton', or capture forward and backward only",
    ),
    (
        lambda wrapper: wrapper._shared.settings.has_scale_fn,
        "a scale_fn runs on the host, and no replay calls it; use a schedule without one",
    ),
    (
        lambda wrapper: bool(wrapper._cycle_end_hooks),
        "cycle-end hooks run on the host, and no replay calls them; remove them, and read "
        "opt.cycle between replays",
    ),
    (
        lambda wrapper: wrapper._shared.settings.momentum_vanishes,
        "momentum cycles down to 0, and a step without momentum needs another kernel; "
        "construct CyclicalOptimizer with a base_momentum above 0",
    ),
    (
        _was_moved,
        "position, bounds or groups were changed since the last step; take a step and then capture",
    ),
    (
        _has_counters_elsewhere,
        "a checkpoint left step counters on the CPU; take a step and then capture",
    ),
)
