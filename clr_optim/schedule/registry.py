"""The registry of policies by name, and what to say to arguments of torch's schedulers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from clr_optim.schedule.schedule import Schedule

_P = ParamSpec("_P")

#: The policies by name.
POLICIES: dict[str, Callable[..., Schedule]] = {}

# Our names for arguments of the schedulers of torch and transformers. The first name that a policy
# has is meant.
_OUR_NAMES: dict[str, tuple[str, ...]] = {
    "T_max": ("steps",),
    "total_iters": ("steps",),
    "total_steps": ("steps",),
    "num_training_steps": ("steps", "total_steps"),
    "steps": ("total_steps", "num_steps"),
    "T_0": ("period",),
    "T_mult": ("period_multiplier",),
    **dict.fromkeys(("eta_min", "min_lr", "lr_min", "end_learning_rate"), ("base_lr", "end")),
    "base_lr": ("end",),
    "end_factor": ("end",),
    "lr_end": ("end",),
    "min_lr_ratio": ("end",),
    "num_warmup_steps": ("warmup",),
    "num_stable_steps": ("stable",),
    "num_decay_steps": ("decay",),
    "decay_type": ("shape",),
    "anneal_strategy": ("window",),
    "lr": ("max_lr",),
    "max_lr": ("lr",),
}
# Arguments that are rates, where ours is a multiple of max_lr.
_RATES = frozenset({"eta_min", "min_lr", "lr_min", "end_learning_rate", "base_lr", "lr_end"})
_OF_OPTIMIZER = "give {name} to CyclicalOptimizer"
_REMEDIES = {
    "optimizer": "a schedule knows no optimizer: wrap that by CyclicalOptimizer(optimizer, "
    "{policy}(...))",
    "last_epoch": "call set_iteration of the optimizer",
    "warmup": "call .with_warmup(steps) of the schedule",
    "num_warmup_steps": "call .with_warmup(steps) of the schedule",
    "epochs": "give total_steps, the epochs times the steps per epoch",
    "steps_per_epoch": "give total_steps, the epochs times the steps per epoch",
    "three_phase": "the rate falls to base_lr, then further; for torch's curve, use "
    "CyclicalOptimizer.from_scheduler(scheduler)",
    "mode": "call the policy of that name",
    **dict.fromkeys(("cycle_momentum", "base_momentum", "max_momentum"), _OF_OPTIMIZER),
    "verbose": "leave it out",
}


def policy(make: Callable[_P, Schedule]) -> Callable[_P, Schedule]:
    """Enter a function that returns a schedule into the registry under its name, as a decorator.

    A call with arguments that the function does not have raises an error that names the right ones.
    """
    signature = inspect.signature(make)

    @functools.wraps(make)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> Schedule:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            why = _explain(make.__name__, signature.parameters, args, kwargs)
            raise TypeError(f"{make.__name__}: {error}{why}") from None
        if args and hasattr(args[0], "param_groups"):
            raise TypeError(
                f"{make.__name__}: the first argument is a {type(args[0]).__name__}, and "
                f"{_REMEDIES['optimizer'].format(policy=make.__name__)}"
            )
        return make(*args, **kwargs)

    POLICIES[make.__name__] = checked
    return checked


def _explain(
    name: str,
    parameters: Mapping[str, inspect.Parameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str:
    """Return the remedy for arguments that do not fit, to follow the message of Python."""
    remedies = []
    if args and hasattr(args[0], "param_groups"):
        remedies.append(_REMEDIES["optimizer"].format(policy=name))
    elif args and type(args[0]) is float and args[0] < 1.0:
        rate = "max_lr" if "max_lr" in parameters else "lr"
        first = next(iter(parameters))
        if first != rate:
            remedies.append(f"the first argument is {first}; give a rate by its name, as {rate}")
    for given in kwargs:
        if given in parameters:
            continue
        ours = next((own for own in _OUR_NAMES.get(given, ()) if own in parameters), None)
        if ours is not None:
            remedies.append(f"the argument {given} is called {ours} here")
            if ours == "end" and given in _RATES:
                remedies[-1] += ", and is the last rate divided by max_lr"
        elif given in _REMEDIES:
            remedies.append(f"{given}: {_REMEDIES[given].format(name=given, policy=name)}")
    if not remedies:
        remedies.append(f"the arguments are {', '.join(parameters)}")
    return "; " + "; ".join(remedies)


def arguments_for(make: Callable[..., Schedule], steps: int, step_size: int) -> dict[str, Any]:
    """Return arguments that fit a policy to a training.

    Args:
        make: the policy.
        steps: the length of the training.
        step_size: half the length of a cycle.
    """
    parameters = inspect.signature(make).parameters
    warmup = steps // 10
    # A policy whose cycles may grow repeats; the others fill the training.
    length = 2 * step_size if "period_multiplier" in parameters else steps - warmup
    values = {
        **dict.fromkeys(("steps", "total_steps", "num_steps"), steps),
        **dict.fromkeys(("step_size_up", "period"), step_size),
        "warmup": warmup,
        "stable": length - max(1, length // 4),
        "decay": max(1, length // 4),
    }
    return {name: values[name] for name in parameters if name in values}
