"""Check that a checkpoint of torch's layout fits an optimizer: its groups and their settings."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.checks import check_number, item, shown
from clr_optim.core.checkpoint.state import check_mapping, check_state, other_class, with_momentum
from clr_optim.core.rates import check_tensor_lr
from clr_optim.rules import STATE_SLOTS

__all__ = ["are_groups", "check_for", "check_layout"]

# Schedulers and this library write these keys into groups: they tell nothing about the class.
_NOT_HYPER_PARAMETERS = frozenset(
    {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
)

# Settings that torch has added to its classes over the years: a checkpoint may be older.
_NEWER_DEFAULTS = frozenset(
    {"maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
)


def check_layout(state_dict: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint has torch's layout, with a rate in each group."""
    missing = [k for k in ("state", "param_groups") if k not in state_dict]
    if missing:
        raise ValueError(
            f"state_dict lacks {missing} (it has {sorted(map(str, state_dict))}): give what "
            "an optimizer's state_dict() returned"
        )
    groups = state_dict["param_groups"]
    if not are_groups(groups):
        raise ValueError(
            f"state_dict['param_groups'] must be a list of dictionaries, got {shown(groups)}"
        )
    check_mapping("state_dict['state']", state_dict["state"])
    for i, group in enumerate(groups):
        if "lr" not in group or not _is_collection(group.get("params")):
            raise ValueError(
                f"state_dict['param_groups'][{i}] needs 'lr' and a list of 'params', and has "
                f"{sorted(map(str, group))}"
            )
        lr = group["lr"]
        if type(lr) is not float or not math.isfinite(lr):
            where = f"state_dict['param_groups'][{i}]['lr']"
            check_tensor_lr(lr, where)
            check_number(where, item(lr), minimum=-math.inf)


def are_groups(value: object) -> bool:
    """Whether this is a list of dictionaries, or another sequence of them."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(group, Mapping) for group in value)
    )


def _is_collection(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))


def check_for(
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    cycle_momentum: bool,
    scheduled: Collection[int],
    *,
    masters: bool,
) -> None:
    """Raise unless an optimizer can step with a checkpoint of torch's layout.

    torch's own classes are known by name. Of any other class only the numbers of its parameters
    are checked: its author knows the rest.

    Args:
        optimizer: the optimizer that is to load the checkpoint.
        state_dict: the checkpoint.
        cycle_momentum: whether momentum cycles, whatever the checkpoint's is.
        scheduled: the numbers of the groups whose momentum follows a schedule.
        masters: whether bfloat16 parameters have float32 masters.
    """
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict has groups of {saved_sizes} parameters, the optimizer of {sizes}: "
            "build the optimizer with the groups that it had when it was saved"
        )
    slots = STATE_SLOTS.get(type(optimizer))
    settings: Sequence[Mapping[str, Any]] = saved_groups
    if slots is not None:
        settings = _migrated(optimizer, saved_groups)
    if cycle_momentum:
        for i, group in enumerate(settings):
            if "betas" not in group and "momentum" not in group:
                raise ValueError(
                    f"state_dict['param_groups'][{i}] has neither 'betas' nor 'momentum', which "
                    "are cycled here"
                )
    if slots is not None:
        _check_settings(optimizer, saved_groups, settings)
        settings = [
            with_momentum(group) if cycle_momentum or i in scheduled else group
            for i, group in enumerate(settings)
        ]
    check_state(optimizer, slots, state_dict, settings, masters=masters)


def _migrated(
    optimizer: Optimizer, saved_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The groups of a checkpoint once torch's class has filled in the settings that they lack."""
    cls = type(optimizer)
    probe = cls.__new__(cls)
    groups = [{**saved, "params": []} for saved in saved_groups]
    probe.__setstate__({"defaults": dict(optimizer.defaults), "state": {}, "param_groups": groups})
    return groups


def _check_settings(
    optimizer: Optimizer,
    saved_groups: Sequence[Mapping[str, Any]],
    settings: Sequence[Mapping[str, Any]],
) -> None:
    """Raise unless groups have all settings, each of a kind that torch's class works with."""
    name_of_class, defaults = type(optimizer).__name__, optimizer.defaults
    initial = _initial_settings(cast("Any", type(optimizer)))
    required = frozenset(defaults) - _NEWER_DEFAULTS
    names = [name for name in defaults if name != "lr"]
    for i, (group, saved, whole) in enumerate(
        zip(optimizer.param_groups, saved_groups, settings, strict=True)
    ):
        where = f"state_dict['param_groups'][{i}]"
        if not required <= whole.keys():
            absent = sorted(required - set(whole))
            known = set(group) | set(defaults) | _NOT_HYPER_PARAMETERS
            unknown = {str(k) for k in set(saved) - known if not str(k).startswith("clr_")}
            if unknown:
                raise other_class(optimizer, f"its groups have {sorted(unknown)} and lack {absent}")
            raise ValueError(
                f"{where} lacks {absent}, without which {name_of_class} cannot step: give what "
                "its state_dict() returned"
            )
        for name in names:
            if name not in saved:
                continue
            value, own = saved[name], group.get(name, defaults[name])
            if value is own or (value == own if type(value) is type(own) is float else False):
                continue
            likes = [own, initial[name]] if name in initial else [own]
            if not any(_is_like(value, like) for like in likes):
                raise ValueError(
                    f"{where}[{name!r}] must be a setting such as {own!r}, got "
                    f"{shown(value)}: give what the optimizer's state_dict() returned"
                )


@functools.cache
def _initial_settings(cls: type[Optimizer]) -> Mapping[str, Any]:
    """The defaults of a class's arguments."""
    return {name: each.default for name, each in inspect.signature(cls).parameters.items()}


def _is_like(value: object, like: object) -> bool:
    """Whether a setting is of the kind of another: a flag, a number (not NaN), a sequence of them.

    Of a kind that is none of these only the user knows: torch decides.
    """
    value, like = item(value), item(like)
    if _is_sequence(like):
        if not _is_sequence(value):
            return False
        values, likes = list(cast("Iterable[Any]", value)), list(cast("Iterable[Any]", like))
        return len(values) == len(likes) and all(map(_is_like, values, likes))
    if value is None:  # left to torch, as is what follows
        return like is None or isinstance(like, (bool, str))
    if like is None:
        return isinstance(value, str) or _is_number(value)
    if isinstance(like, str):
        return isinstance(value, str)
    if isinstance(like, bool):
        return isinstance(value, bool) or _is_number(value)
    if _is_number(like):
        return _is_number(value) and not isinstance(value, bool)
    return True


def _is_sequence(value: object) -> bool:
    """Whether a setting holds several values, whatever its type: a list, an array, a tensor."""
    if isinstance(value, (str, bytes, bytearray, Mapping, np.generic)):
        return False
    if isinstance(value, (Tensor, np.ndarray)):
        return len(value.shape) == 1
    # Not hasattr: a class of enumerated numbers has one for its members.
    has_items = any("__getitem__" in vars(cls) for cls in type(value).__mro__)
    return isinstance(value, Iterable) or has_items


def _is_number(value: object) -> bool:
    """Whether torch can compute with a value as a number, other than NaN."""
    if isinstance(value, (str, bytes, Tensor, np.ndarray)):
        return False
    if not isinstance(value, numbers.Real):
        if not hasattr(type(value), "__float__"):
            return False
        try:
            value = float(cast("Any", value))
        except (TypeError, ValueError, OverflowError):
            return False
    return bool(value == value)
