"""Refuse writes of attributes that would change nothing, and name what would work.

Python lets anyone set any attribute of an object: ``opt.max_lr = 0.8`` would pass in silence, and
the run would continue at the old rate.
"""

from __future__ import annotations

import inspect
import reprlib
from typing import Any, NoReturn, TypeVar

__all__ = ["refuse_writes"]

T = TypeVar("T")

_BOUNDS = "the policy decides the rate; opt.set_bounds(base_lr=..., max_lr=...) changes its bounds"
_POSITION = "the position decides; opt.set_iteration(...) changes the position"
_ANEW = (
    "it is fixed by the constructor; note position = opt.iteration, construct another "
    "CyclicalOptimizer around opt.optimizer with {name}=..., and call its set_iteration(position)"
)
_SCHEDULE = _ANEW.replace("{name}", "policy")
_STEP_SIZE = _ANEW.replace("{name}", "step_size_up")
_GROUPS = (
    "groups hold the settings; write group[{name!r}] for each group of opt.param_groups, or give a "
    "schedule to the constructor, as schedules={{{name!r}: ...}}"
)
_MOMENTUM = (
    _GROUPS + "; with cycle_momentum=True the cycle writes it, between the constructor's "
    "base_momentum and max_momentum"
)
_READ_ONLY = "it tells what the optimizer has done, and is for reading only"

#: What would work in place of ``opt.NAME = value``, by name.
_REMEDIES = {
    **dict.fromkeys(("lr", "learning_rate", "base_lr", "max_lr"), _BOUNDS),
    **dict.fromkeys(("iteration", "cycle", "steps_to_cycle_end", "last_epoch"), _POSITION),
    **dict.fromkeys(
        (
            "policy", "step_size_up", "step_size_down", "gamma", "window", "scale_fn", "scale_mode",
            "cycle_momentum", "base_momentum", "max_momentum", "schedules", "max_grad_norm",
            "skip_above", "average", "master_weights", "backend",
        ),
        _ANEW,
    ),
    "schedule": _SCHEDULE,
    "step_size": _STEP_SIZE,
    "optimizer": "construct another CyclicalOptimizer around the other one",
    **dict.fromkeys(("momentum", "betas"), _MOMENTUM),
    **dict.fromkeys(
        (
            "weight_decay", "eps", "nesterov", "dampening", "maximize", "amsgrad", "alpha", "rho",
            "lr_decay", "centered",
        ),
        _GROUPS,
    ),
    **dict.fromkeys(("grad_norm", "scheduler", "skipped"), _READ_ONLY),
}  # fmt: skip


def _refuse(wrapper: Any, name: str, value: object) -> NoReturn:
    remedy = _REMEDIES[name].format(name=name)
    inner = wrapper.__dict__.get("_inner")
    if hasattr(inner, name):
        remedy += f"; {type(inner).__name__}'s own attribute is opt.optimizer.{name}"
    raise AttributeError(f"opt.{name} = {reprlib.repr(value)} has no effect: {remedy}")


class _NoAttribute:
    """Refuses writes of a name; to read it is left to the class's ``__getattr__``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: object, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self._name!r}")

    def __set__(self, wrapper: object, value: object) -> NoReturn:
        _refuse(wrapper, self._name, value)


def refuse_writes(cls: type[T]) -> type[T]:
    """Have a class refuse each write that would have no effect, naming what would work.

    A descriptor for each name, since a ``__setattr__`` would be called at every step.
    """
    for name in _REMEDIES:
        known = inspect.getattr_static(cls, name, None)
        if isinstance(known, property):
            setattr(cls, name, known.setter(_NoAttribute(name).__set__))
        else:
            setattr(cls, name, _NoAttribute(name))
    return cls
