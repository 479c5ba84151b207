"""How the wrapped optimizer loads: by torch's own method or another, with which hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

__all__ = [
    "load_errors_as_value_errors",
    "loads_as_torch",
    "run_load_pre_hooks",
    "without_load_pre_hooks",
]


def loads_as_torch(optimizer: Optimizer) -> bool:
    """Whether ``load_state_dict`` is torch's own, so that a checkpoint has torch's layout."""
    method = getattr(optimizer.load_state_dict, "__func__", None)
    return method is Optimizer.load_state_dict


def run_load_pre_hooks(optimizer: Optimizer, state_dict: Any) -> Any:
    """Run the load pre-hooks that are registered on an optimizer; return what they leave."""
    for hook in getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", {}).values():
        result = hook(optimizer, state_dict)
        if result is not None:
            state_dict = result
    return state_dict


@contextmanager
def without_load_pre_hooks(optimizer: Any) -> Iterator[None]:
    """Keep torch from running the load pre-hooks a second time."""
    hooks = optimizer._optimizer_load_state_dict_pre_hooks
    optimizer._optimizer_load_state_dict_pre_hooks = {}
    try:
        yield
    finally:
        optimizer._optimizer_load_state_dict_pre_hooks = hooks


@contextmanager
def load_errors_as_value_errors(optimizer: Optimizer) -> Iterator[None]:
    """If loading raises one of these errors, raise a ValueError that names the wrapped class."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"state_dict does not load into {type(optimizer).__name__} "
            f"({type(error).__name__}: {error}): give what the state_dict() of such an "
            "optimizer returned"
        ) from error
