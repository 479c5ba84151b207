"""Refuse arguments that the constructor does not have, and name the argument that is meant."""

from __future__ import annotations

import difflib
import functools
import inspect
import reprlib
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from clr_optim.schedule import Schedule

__all__ = ["refuse_misnamed"]

_Arguments = ParamSpec("_Arguments")
_Self = TypeVar("_Self")

#: Arguments of other tools, and the argument of the same meaning here.
_RENAMED = {
    **dict.fromkeys(("mode", "schedule", "schedule_name"), "policy"),
    **dict.fromkeys(("step_size", "stepsize", "half_cycle"), "step_size_up"),
    **dict.fromkeys(
        ("lr", "learning_rate", "lr_max", "max_lrs", "max_learning_rate", "eta_max", "peak_lr"),
        "max_lr",
    ),
    **dict.fromkeys(("base_lrs", "initial_lr"), "base_lr"),
    **dict.fromkeys(
        ("max_norm", "clip", "clip_norm", "grad_clip", "clip_grad_norm", "gradient_clip_val"),
        "max_grad_norm",
    ),
    "min_momentum": "base_momentum",
}

_ONE_CYCLE = (
    "a schedule has the length of the run: give policy=one_cycle(total_steps, ...) of "
    "clr_optim.schedule, or take torch's scheduler over with "
    "CyclicalOptimizer.from_scheduler(OneCycleLR(...))"
)
_COSINE = (
    "give policy=cosine(steps) of clr_optim.schedule, or take torch's scheduler over with "
    "CyclicalOptimizer.from_scheduler(CosineAnnealingLR(...))"
)
_END = (
    "give {name} as base_lr={value}, or, if the schedule falls to a multiple of max_lr as cosine, "
    "linear, polynomial and wsd do, divided by max_lr as end= of the schedule"
)
_OF_TORCH = "take a scheduler over with CyclicalOptimizer.from_scheduler(scheduler)"

_RESTARTS = (
    "give policy=warm_restarts(period, period_multiplier=...) of clr_optim.schedule, or take "
    "torch's scheduler over with CyclicalOptimizer.from_scheduler(...)"
)
_WARM_UP = (
    "a schedule of clr_optim.schedule has its warm-up: give "
    "policy=cosine(total_steps - warmup).with_warmup(warmup), or another schedule"
)
_SKIP = "give skip_above=math.inf, or the largest norm, or clr_optim.Spike()"
_POSITION = "call opt.set_iteration(...) afterwards; a checkpoint brings the position"

#: What would work in place of arguments that have no equal here.
_REMEDIES = {
    **dict.fromkeys(
        (
            "total_steps", "epochs", "steps_per_epoch", "pct_start", "anneal_strategy",
            "div_factor", "final_div_factor", "three_phase",
        ),
        _ONE_CYCLE,
    ),
    "T_max": _COSINE,
    **dict.fromkeys(("T_0", "T_mult"), _RESTARTS),
    **dict.fromkeys(
        ("warmup", "warmup_steps", "num_warmup_steps", "num_training_steps", "warmup_ratio"),
        _WARM_UP,
    ),
    **dict.fromkeys(("last_epoch", "last_step", "iteration", "start_step"), _POSITION),
    **dict.fromkeys(("lr_min", "min_lr", "min_learning_rate", "eta_min", "end_lr"), _END),
    **dict.fromkeys(("scheduler", "lr_scheduler"), _OF_TORCH),
    **dict.fromkeys(("skip_nonfinite", "skip_nan", "skip_step", "skip_steps"), _SKIP),
    **dict.fromkeys(
        ("on_cycle_end", "cycle_end_hook"), "call opt.register_cycle_end_hook(hook) afterwards"
    ),
    **dict.fromkeys(
        ("cycle_length", "cycle_len", "cycle_size"),
        "give half of {value} as step_size_up, since a cycle has two halves",
    ),
    "cycle_mult": "give policy=triangular(step_size_up, period_multiplier=...)",
}  # fmt: skip

#: The arguments of torch's CyclicLR in their order, after the optimizer.
_BY_POSITION = ("base_lr", "max_lr", "step_size_up", "step_size_down")


def refuse_misnamed(
    init: Callable[Concatenate[_Self, _Arguments], None],
) -> Callable[Concatenate[_Self, _Arguments], None]:
    """Make a constructor raise a TypeError that names the argument that the caller meant.

    The signature stays: type checkers and :func:`inspect.signature` see no other arguments.
    """
    parameters = list(inspect.signature(init).parameters.values())[1:]
    known = [each.name for each in parameters]
    places = sum(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)

    @functools.wraps(init)
    def checked(self: _Self, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        cls = next(c.__name__ for c in type(self).__mro__ if c.__module__.startswith("clr_optim."))
        if len(args) > places:
            raise TypeError(_too_many(cls, args))
        optimizer: object = args[0] if args else kwargs.get("optimizer")
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            remedies = [_remedy(name, kwargs[name], optimizer, cls, known) for name in unknown]
            raise TypeError("; ".join(remedies))
        init(self, *args, **kwargs)

    return checked


def _too_many(cls: str, args: Sequence[object]) -> str:
    """Return the message for more arguments by position than optimizer and policy."""
    has_policy = isinstance(args[1], (str, Schedule))
    others = args[2 if has_policy else 1 :]
    named = [f"{name}={reprlib.repr(value)}" for name, value in zip(_BY_POSITION, others)]  # noqa: B905
    if len(others) > len(named):
        named.append("...")
    return (
        f"{cls} takes optimizer and policy by position, and got {len(args)} arguments: give the "
        f"others by name, as in {cls}(optimizer, "
        f"{reprlib.repr(args[1]) + ', ' if has_policy else ''}{', '.join(named)})"
    )


def _remedy(name: str, value: object, optimizer: object, cls: str, known: Sequence[str]) -> str:
    """Return what is wrong with an unknown argument, and what would be right."""
    wrong = f"{name}={reprlib.repr(value)} is no argument of {cls}: "
    if name in _RENAMED:
        return f"{wrong}give {_RENAMED[name]}={reprlib.repr(value)}"
    if name in _REMEDIES:
        return wrong + _REMEDIES[name].format(name=name, value=reprlib.repr(value))
    inner = type(optimizer)
    if hasattr(optimizer, "param_groups") and name in inspect.signature(inner).parameters:
        return f"{wrong}give {name} to {inner.__name__}, which is wrapped"
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"{wrong}give {close[0]}={reprlib.repr(value)}"
    return f"{wrong}give one of {', '.join(known)}"
