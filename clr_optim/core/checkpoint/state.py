"""Check the state in a checkpoint of torch's layout: what each parameter must have and may have."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.checks import check_int, check_number, item, shown
from clr_optim.core.checkpoint.rests import check_rest
from clr_optim.keys import AVERAGE, REST
from clr_optim.rules import NUMBERS, STATE_SLOTS, Shape, StateSlots
from clr_optim.sharding import local_part

__all__ = [
    "check_mapping",
    "check_momentum_state",
    "check_state",
    "other_class",
    "own_counters",
    "restore_dtypes",
    "with_momentum",
]


def check_mapping(name: str, value: object) -> Mapping[str, Any]:
    """``value`` if it is a dictionary."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a dictionary from an optimizer's state_dict(), got {shown(value)}"
        )
    return value


def other_class(optimizer: Optimizer, reason: str) -> ValueError:
    return ValueError(
        f"state_dict is of another optimizer class than {type(optimizer).__name__}: {reason}; "
        "load it into an optimizer of the class that wrote it"
    )


def check_momentum_state(optimizer: Optimizer, numbers: Collection[int], argument: str) -> None:
    """Raise where state was made without momentum, and the class cannot begin one in mid-run.

    Args:
        optimizer: the optimizer.
        numbers: the numbers of the groups whose momentum is going to be written.
        argument: the argument that says so.
    """
    slots = STATE_SLOTS.get(type(optimizer))
    if slots is None:
        return
    for i, group in enumerate(optimizer.param_groups):
        for param in group["params"] if i in numbers and group.get("momentum") == 0 else ():
            values = optimizer.state.get(param)
            needed = slots.needed(with_momentum(group), tuple(param.shape))
            absent = sorted(needed - set(values)) if values else []
            if absent:
                raise ValueError(
                    f"{argument} needs the state {absent}, and a parameter in group {i} "
                    f"of this {type(optimizer).__name__} has stepped without momentum: leave it "
                    "out, or clear the optimizer's state to begin anew"
                )


def with_momentum(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """A group's settings once its momentum cycles."""
    return {**group, "momentum": 1.0} if "momentum" in group else group


def check_state(
    optimizer: Optimizer,
    slots: StateSlots | None,
    state_dict: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
    *,
    masters: bool,
) -> None:
    """Raise where a checkpoint holds state that this optimizer could not step with.

    Args:
        optimizer: the optimizer that is to load the checkpoint.
        slots: what the optimizer's class keeps, if that is known.
        state_dict: the checkpoint.
        settings: the settings of each group after the load.
        masters: whether bfloat16 parameters have float32 masters.
    """
    owners: dict[object, tuple[Tensor, Mapping[str, Any]]] = {}
    for i, (group, saved, whole) in enumerate(
        zip(optimizer.param_groups, state_dict["param_groups"], settings, strict=True)
    ):
        for param, index in zip(group["params"], saved["params"], strict=True):
            if type(index) is not int and (
                not isinstance(index, (numbers.Integral, str, bytes, tuple))
                or isinstance(index, bool)
            ):
                raise TypeError(
                    f"state_dict['param_groups'][{i}]['params'] must hold numbers or names of "
                    f"parameters, got {shown(index)}: give what the optimizer's state_dict() "
                    "returned"
                )
            # A parameter that is in a group twice has its number twice.
            if index in owners and owners[index][0] is not param:
                raise ValueError(
                    f"state_dict['param_groups'][{i}]['params'] has {index!r} again, and each "
                    "parameter has its own number: give what the optimizer's state_dict() returned"
                )
            owners[index] = param, whole
    state = state_dict["state"]
    _check_strays(owners, slots, state)
    known = [index for index in owners if index in state]
    # A class of the user's own may keep a tensor, or an object, for each parameter.
    if slots is None and not any(isinstance(state[index], Mapping) for index in known):
        return
    forms: dict[object, tuple[frozenset[str], dict[str, Shape]]] = {}
    places: dict[int, tuple[object, str]] = {}
    for index in known:
        values = state[index]
        if type(values) is not dict:
            check_mapping(f"state_dict['state'][{index!r}]", values)
        param, settings_of = owners[index]
        average = values.get(AVERAGE)
        if average is not None and not _is_plain(average, param, tuple(param.shape)):
            _check_state_tensor(index, AVERAGE, average, param, tuple(param.shape), sparse=False)
        if slots is None or not values:
            check_rest(index, values, param, (), masters=masters)
            continue
        kind = (param.shape, None if slots.rule is None else slots.rule.kernel(settings_of))
        if kind not in forms:
            shape = tuple(param.shape)
            forms[kind] = slots.needed(settings_of, shape), slots.used(settings_of, shape)
        needed, used = forms[kind]
        _check_complete(optimizer, slots, index, values, needed)
        check_rest(index, values, param, used, masters=masters)
        for name, shape in used.items():
            # SGD's buffer may be None until it is the first gradient.
            if name not in values or (values[name] is None and name not in needed):
                continue
            value = values[name]
            if not _is_plain(value, param, shape):
                _check_state_tensor(index, name, value, param, shape, sparse=name not in needed)
            part = local_part(value)
            at = part.data_ptr() if part.layout is torch.strided else id(value)
            if at and places.setdefault(at, (index, name)) != (index, name):
                first = "state_dict['state'][{!r}][{!r}]".format(*places[at])
                raise ValueError(
                    f"state_dict['state'][{index!r}][{name!r}] is the same memory as {first}: each "
                    "needs its own; clone one of them"
                )


def _check_complete(
    optimizer: Optimizer,
    slots: StateSlots,
    index: object,
    values: Mapping[str, Any],
    needed: frozenset[str],
) -> None:
    """Raise unless the state of one parameter has all that a step needs, and its numbers are."""
    where = f"state_dict['state'][{index!r}]"
    if not needed <= values.keys():
        absent = sorted(needed - set(values))
        others = frozenset().union(*(each.names for each in STATE_SLOTS.values())) - slots.names
        strange = sorted(others & set(values))
        if strange:
            raise other_class(
                optimizer, f"it has the state {strange}, and that class keeps {sorted(slots.names)}"
            )
        raise ValueError(
            f"{where} lacks {absent}, and has {sorted(map(str, values))}: without all of it "
            "the optimizer cannot step; leave a parameter's state out as a whole to begin anew"
        )
    for name in slots.numbers:
        if name == "step" and name in values:
            check_int(f"{where}[{name!r}]", item(values[name]), minimum=0)
        elif name in values:
            check_number(f"{where}[{name!r}]", item(values[name]), minimum=-math.inf)


def _check_strays(
    owners: Mapping[object, tuple[Tensor, Mapping[str, Any]]],
    slots: StateSlots | None,
    state: Mapping[Any, Any],
) -> None:
    """Raise if a parameter's state is under a number that no parameter has.

    Users may add entries to ``state``, and those load as in torch. An entry is taken for
    a parameter's only if it fits a parameter that lacks its state.
    """
    strays = [index for index in state if index not in owners]
    absent = [index for index in owners if index not in state]
    if not strays or not absent:
        return
    known = [
        values for index in owners if isinstance(values := state.get(index), Mapping) and values
    ]
    for index in strays:
        values, named = state[index], any(type(owner) is type(index) for owner in owners)
        if isinstance(values, Mapping) and (named or not (known or slots is None)):
            names = [set(each) for each in known]
            if any(_fits(values, *owners[owner], slots, names) for owner in absent):
                raise ValueError(
                    f"state_dict['state'][{index!r}] belongs to no parameter: the 'params' of the "
                    f"groups are {shown(list(owners))}"
                )


def _fits(
    values: Mapping[str, Any],
    param: Tensor,
    settings: Mapping[str, Any],
    slots: StateSlots | None,
    names: Sequence[set[str]],
) -> bool:
    """Whether an entry of ``state`` could be the state of a parameter.

    Args:
        values: the entry.
        param: the parameter.
        settings: the settings of its group.
        slots: what the optimizer's class keeps, if that is known.
        names: what the checkpoint holds for other parameters.
    """
    if slots is None:
        shapes = [value.shape for value in values.values() if isinstance(value, Tensor)]
        return set(values) in names or (not names and param.shape in shapes)
    used = slots.used(settings, tuple(param.shape))
    if not used:
        return bool(slots.others & set(values))
    shapes_fit = [
        isinstance(values[name], Tensor) and tuple(values[name].shape) == shape
        for name, shape in used.items()
        if name in values
    ]
    needed = slots.needed(settings, tuple(param.shape))
    return needed <= values.keys() and bool(shapes_fit) and all(shapes_fit)


def own_counters(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the state of a checkpoint with a separate step counter for each parameter.

    A checkpoint may hold one counter tensor for several parameters. A step would then increment
    that tensor once per parameter. The same holds for other states of one element.
    """
    seen: set[int] = set()
    own: dict[Any, Any] = dict(state)
    for index, values in state.items():
        for name in NUMBERS if isinstance(values, Mapping) else ():
            number = values.get(name)
            if isinstance(number, Tensor):
                if id(number) in seen:
                    own[index] = {**own[index], name: number.clone()}
                seen.add(id(number))
    return own


def restore_dtypes(optimizer: Optimizer, state_dict: Mapping[str, Any], *, masters: bool) -> None:
    """Give averages, and states of one element, the dtype that they have in a checkpoint.

    torch's load casts all state but the step counter to the dtype of the parameter. A resumed
    training would then round otherwise than an uninterrupted one.

    Args:
        optimizer: the optimizer that has loaded the checkpoint.
        state_dict: the checkpoint.
        masters: whether bfloat16 parameters have float32 masters. Their state is then float32,
            unless it is bfloat16 in the checkpoint: the next step widens that.
    """
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for param, index in zip(group["params"], saved["params"], strict=True):
            loaded, values = optimizer.state.get(param), state_dict["state"].get(index)
            if not isinstance(loaded, dict) or not isinstance(values, Mapping):
                continue
            has_master = masters and param.dtype == torch.bfloat16
            for name in loaded.keys() & values.keys() - {"step"}:
                tensor = values[name]
                if not isinstance(tensor, Tensor):
                    continue
                if name in NUMBERS or name in (AVERAGE, REST):
                    loaded[name] = tensor.detach().to(loaded[name].device, copy=True)
                elif has_master and tensor.dtype != torch.bfloat16:
                    to = loaded[name].device
                    loaded[name] = tensor.detach().to(to, torch.float32, copy=True)


def _is_plain(value: object, param: Tensor, shape: Shape) -> bool:
    """Whether a state tensor is certainly right: dense, and of the parameter's dtype."""
    return (
        type(value) is Tensor
        and value.dtype is param.dtype
        and value.shape == shape
        and value.layout is torch.strided
        and value.is_contiguous()
        and value.is_floating_point()
        and not value.is_meta
    )


def _check_state_tensor(
    index: object, name: str, value: object, param: Tensor, shape: Shape, *, sparse: bool
) -> None:
    """Raise unless a state tensor fits its parameter.

    Args:
        index: the parameter's number.
        name: the tensor.
        value: the tensor itself.
        param: the parameter.
        shape: the shape that the tensor must have.
        sparse: whether torch keeps it as sparse as the first gradient was.
    """
    if (
        not isinstance(value, Tensor)
        or tuple(value.shape) != shape
        or value.is_complex() != param.is_complex()
        or not (value.is_complex() or value.is_floating_point())
        or (value.layout is not torch.strided and value.layout is not param.layout and not sparse)
        or (value.is_meta and not param.is_meta)
        or _is_expanded(value)
    ):
        kind = "complex" if param.is_complex() else "floating point"
        raise ValueError(
            f"state_dict['state'][{index!r}][{name!r}] must be a dense {kind} tensor of shape "
            f"{list(shape)}, got {shown(value)}: give the state of an optimizer of the same "
            "parameters in the same order"
        )


def _is_expanded(value: Tensor) -> bool:
    """Whether several elements are in one place, so that the tensor could not be written to."""
    part = local_part(value)
    if part.layout is not torch.strided or part.is_contiguous():
        return False
    return any(n > 1 and s == 0 for n, s in zip(part.shape, part.stride(), strict=True))
