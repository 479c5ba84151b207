"""What a checkpoint must look like, asked before anything of it is loaded.

torch takes what it is given and fails steps later, or trains on in silence: a state of another
class, two parameters under one number, a moment of another shape, a step of NaN.
"""

from __future__ import annotations

import inspect
import json
import math
import numbers
import reprlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.rules import STATE_SLOTS
from clr_optim.schedule import LAST_STEP, check_int, check_number
from clr_optim.sharding import local_part

# Written into groups by schedulers and by us: they say nothing about the optimizer's class.
_NOT_HYPER_PARAMETERS = frozenset(
    {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
)

# Settings that torch has added to its classes over the years: a checkpoint may be older.
NEWER_DEFAULTS = frozenset(
    {"maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
)


def item(value: object) -> object:
    """The number in a tensor of one element; anything else, and no number, as it is."""
    there = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
    return value.item() if isinstance(value, Tensor) and there else value


def as_position(step: object, name: str) -> int:
    """A step's number that host and devices can count on from."""
    return check_int(name, item(step), minimum=0, maximum=LAST_STEP)


def check_mapping(name: str, value: object) -> Mapping[str, Any]:
    """``value`` if it is a dictionary."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a dictionary from an optimizer's state_dict(), got {shown(value)}"
        )
    return value


def check_tensor_lr(lr: object, name: str) -> None:
    """Raise for a tensor that cannot hold a rate."""
    if isinstance(lr, Tensor) and (not lr.is_floating_point() or lr.numel() != 1 or lr.is_meta):
        raise ValueError(
            f"{name} must be a number or a floating point tensor of one element, got {shown(lr)}"
        )


def other_class(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> str | None:
    """Why a checkpoint cannot be of this optimizer's class, or None.

    torch loads an SGD's checkpoint into an Adam without a word and fails at the next step. But keys
    come and go with torch's versions, and users add their own: what counts is state that another
    class keeps, and settings both of which the other side has not heard.
    """
    slots = STATE_SLOTS.get(type(optimizer))
    if slots is not None:
        others = frozenset().union(*(each.names for each in STATE_SLOTS.values())) - slots.names
        for values in state_dict["state"].values():
            strange = sorted(others & set(values)) if isinstance(values, Mapping) else []
            if strange:
                return f"it has the state {strange}, and that class keeps {sorted(slots.names)}"
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        names = {k for k in saved if not str(k).startswith("clr_")} - _NOT_HYPER_PARAMETERS
        unknown = names - set(group) - set(optimizer.defaults)
        absent = set(optimizer.defaults) - names
        if unknown and absent - NEWER_DEFAULTS:
            return f"its groups have {sorted(map(str, unknown))} and lack {sorted(absent)}"
    return None


def policy_name(saved: object, where: str) -> str:
    """The name in a policy that a checkpoint remembers, of whatever version."""
    try:
        name = json.loads(cast("str", saved))["name"]
    except (TypeError, ValueError, LookupError, RecursionError):
        name = None
    if not isinstance(saved, str) or not isinstance(name, str):
        raise ValueError(
            f"{where} must be a policy as Schedule.to_json() writes it, got {shown(saved)}: "
            "delete that key from the groups to load the rest"
        )
    return name


def check_settings(
    optimizer: Optimizer, group: Mapping[str, Any], saved: Mapping[str, Any], where: str
) -> None:
    """Raise unless a checkpoint's settings are of the kinds that torch's class works with.

    Of a class that is not torch's only its author knows.
    """
    if type(optimizer) not in STATE_SLOTS:
        return
    initial = inspect.signature(type(optimizer)).parameters
    for name in set(optimizer.defaults) & set(saved) - {"lr"}:
        likes = [group.get(name, optimizer.defaults[name])]
        if name in initial:
            likes.append(initial[name].default)
        if not any(_is_like(saved[name], like) for like in likes):
            raise ValueError(
                f"{where}[{name!r}] must be a setting such as {likes[0]!r}, got "
                f"{shown(saved[name])}: give what the optimizer's state_dict() returned"
            )


def _is_like(value: object, like: object) -> bool:
    """Whether a setting is of the kind of another: a flag, a number (not NaN), a list of them."""
    value, like = item(value), item(like)
    if isinstance(like, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(like)
            and all(map(_is_like, value, like))
        )
    if value is None:  # left to torch, as is what follows
        return like is None or isinstance(like, (bool, str))
    if like is None:
        return isinstance(value, (str, numbers.Real)) and value == value
    if isinstance(like, (bool, str)):
        return isinstance(value, type(like))
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value


def check_momentum_state(optimizer: Optimizer) -> None:
    """Raise where state was made without momentum, and the class cannot begin one in mid-run."""
    slots = STATE_SLOTS.get(type(optimizer))
    if slots is None:
        return
    for i, group in enumerate(optimizer.param_groups):
        for param in group["params"] if group.get("momentum") == 0 else ():
            values = optimizer.state.get(param)
            needed = slots.needed(_with_momentum(group), tuple(param.shape))
            absent = sorted(needed - set(values)) if values else []
            if absent:
                raise ValueError(
                    f"cycle_momentum=True needs the state {absent}, and a parameter in group {i} "
                    f"of this {type(optimizer).__name__} has stepped without momentum: leave it "
                    "False, or clear the optimizer's state to begin anew"
                )


def _with_momentum(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """A group's settings once its momentum cycles."""
    return {**group, "momentum": 1.0} if "momentum" in group else group


def check_state(
    optimizer: Optimizer, state_dict: Mapping[str, Any], cycle_momentum: bool = False
) -> None:
    """Raise where the state of a checkpoint is none that this optimizer could step with.

    torch's own classes are known by name; of another class only that its state is per parameter.

    Args:
        optimizer: the one that is to load it.
        state_dict: the checkpoint.
        cycle_momentum: whether momentum is going to be written, whatever the checkpoint's is.
    """
    owners: dict[object, tuple[Tensor, Mapping[str, Any]]] = {}
    for i, (group, saved) in enumerate(
        zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ):
        for param, index in zip(group["params"], saved["params"], strict=True):
            where = f"state_dict['param_groups'][{i}]['params']"
            if not isinstance(index, (int, str)) or isinstance(index, bool):
                raise TypeError(
                    f"{where} must hold numbers or names of parameters, got {shown(index)}: "
                    "give what the optimizer's state_dict() returned"
                )
            # A parameter that is in a group twice has its number twice.
            if index in owners and owners[index][0] is not param:
                raise ValueError(
                    f"{where} has {index!r} again, and each parameter has its own number: give "
                    "what the optimizer's state_dict() returned"
                )
            owners[index] = param, {**optimizer.defaults, **saved}
    slots = STATE_SLOTS.get(type(optimizer))
    places: dict[int, str] = {}
    for index, values in state_dict["state"].items():
        where = f"state_dict['state'][{index!r}]"
        if index not in owners:
            # Users may keep what is of no parameter under a name of their own, as torch lets them;
            # a dictionary under one that is not known here would be some parameter's.
            known = index in optimizer.state or not isinstance(values, Mapping)
            if isinstance(index, int) or not known:
                raise ValueError(
                    f"{where} belongs to no parameter: the 'params' of the groups are "
                    f"{shown(list(owners))}"
                )
            continue
        check_mapping(where, values)
        if slots is None or not values:
            continue
        param, settings = owners[index]
        settings = _with_momentum(settings) if cycle_momentum else settings
        needed = slots.needed(settings, tuple(param.shape))
        absent = sorted(needed - set(values))
        if absent:
            raise ValueError(
                f"{where} lacks {absent}, and has {sorted(map(str, values))}: without all of it "
                "the optimizer cannot step; leave a parameter's state out as a whole to begin anew"
            )
        for name, value in values.items():
            here = f"{where}[{name!r}]"
            if name == "step" and name in slots.numbers:
                check_int(here, item(value), minimum=0)
            elif name in slots.numbers:
                check_number(here, item(value), minimum=-math.inf)
            form = slots.tensors.get(name)
            shape = None if form is None else form(tuple(param.shape))
            # SGD's buffer may be None until it is the first gradient.
            if shape is None or (value is None and name not in needed):
                continue
            _check_state_tensor(here, value, param, shape)
            place = local_part(value).data_ptr()
            if place and places.setdefault(place, here) != here:
                raise ValueError(
                    f"{here} is the very memory of {places[place]}: each needs its own; clone "
                    "one of them"
                )


def own_counters(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The state of a checkpoint in which no two parameters share a step counter.

    One that writes it for each of them may well have written one tensor for all; the first step
    would then count as many times.
    """
    seen: set[int] = set()
    own: dict[Any, Mapping[str, Any]] = {}
    for index, values in state.items():
        own[index] = values
        counter = values.get("step") if isinstance(values, Mapping) else None
        if isinstance(counter, Tensor):
            if id(counter) in seen:
                own[index] = {**values, "step": counter.clone()}
            seen.add(id(counter))
    return own


def _check_state_tensor(name: str, value: object, param: Tensor, shape: tuple[int, ...]) -> None:
    kind = "complex" if param.is_complex() else "floating point"
    if (
        not isinstance(value, Tensor)
        or tuple(value.shape) != shape
        or value.is_complex() != param.is_complex()
        or not (value.is_complex() or value.is_floating_point())
        or value.layout is not torch.strided
        or (value.is_meta and not param.is_meta)
        # Several elements in one place: it could not be written to.
        or any(
            n > 1 and s == 0 for n, s in zip(value.shape, local_part(value).stride(), strict=True)
        )
    ):
        raise ValueError(
            f"{name} must be a dense {kind} tensor of shape {list(shape)}, got {shown(value)}: "
            "give the state of an optimizer of the same parameters in the same order"
        )


def shown(value: object) -> str:
    """A value in a message, briefly: checkpoints are large."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_meta):
        kind = f"{value.dtype}, {value.layout} on {value.device}"
        return f"a tensor of shape {list(value.shape)}, {kind}"
    return reprlib.repr(value)
