"""A checkpoint, checked before the optimizer loads it, and put back if loading fails.

torch takes whatever it is given and fails steps later, or trains on in silence: with the state of
another class, two parameters under one number, a moment of another shape, a step of NaN.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.checks import check_int, check_number, item, shown
from clr_optim.rules import STATE_SLOTS, Shape, StateSlots
from clr_optim.sharding import local_part

# Schedulers and this library write these keys into groups: they tell nothing about the class.
_NOT_HYPER_PARAMETERS = frozenset(
    {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
)

# Settings that torch has added to its classes over the years: a checkpoint may be older.
_NEWER_DEFAULTS = frozenset(
    {"maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
)


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


# ---- how the wrapped optimizer loads


def loads_as_torch(optimizer: Optimizer) -> bool:
    """Whether ``load_state_dict`` is torch's own, so that a checkpoint has torch's layout."""
    method = getattr(optimizer.load_state_dict, "__func__", None)
    return method is Optimizer.load_state_dict


def after_load_hooks(optimizer: Optimizer, state_dict: Any) -> Any:
    """Run the load pre-hooks that are registered on an optimizer; return what they leave."""
    for hook in getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", {}).values():
        result = hook(optimizer, state_dict)
        if result is not None:
            state_dict = result
    return state_dict


@contextmanager
def without_load_hooks(optimizer: Any) -> Iterator[None]:
    """Keep torch from running the load pre-hooks a second time."""
    hooks = optimizer._optimizer_load_state_dict_pre_hooks
    optimizer._optimizer_load_state_dict_pre_hooks = {}
    try:
        yield
    finally:
        optimizer._optimizer_load_state_dict_pre_hooks = hooks


@contextmanager
def in_our_words(optimizer: Optimizer) -> Iterator[None]:
    """Say what is wrong with a checkpoint where loading stumbles over it."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"state_dict does not load into {type(optimizer).__name__} "
            f"({type(error).__name__}: {error}): give what the state_dict() of such an "
            "optimizer returned"
        ) from error


@contextmanager
def undone_on_error(optimizer: Optimizer, *objects: object) -> Iterator[None]:
    """Put an optimizer, the optimizers inside it and other objects back if loading fails."""
    written: list[dict[Any, Any]] = [vars(each) for each in objects]
    for each in _with_those_inside(optimizer):
        written.append(vars(each))
        state = getattr(each, "state", None)
        if isinstance(state, dict):
            written += [state, *(values for values in state.values() if isinstance(values, dict))]
        written += [group for group in getattr(each, "param_groups", ()) if type(group) is dict]
    kept = [(items, dict(items)) for items in written]
    try:
        yield
    except BaseException:
        for items, before in kept:
            for key in [key for key in items if key not in before]:
                del items[key]
            if [*map(id, items)] != [*map(id, before)]:
                items.clear()  # for the old order
            items.update(before)
        raise


def _with_those_inside(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and the optimizers that its attributes hold, singly or in a container."""
    found: list[Optimizer] = [optimizer]
    for each in found:
        for value in list(vars(each).values()):
            inside: Iterable[object] = (value,)
            if isinstance(value, (list, tuple)):
                inside = value
            elif isinstance(value, dict):
                inside = value.values()
            for other in inside:
                if isinstance(other, Optimizer) and all(other is not known for known in found):
                    found.append(other)
    return found


def holds_key(value: object, key: str, depth: int = 8) -> bool:
    """Whether a dictionary has a key, or one that is nested in it has."""
    if isinstance(value, Mapping):
        if key in value:
            return True
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    return depth > 0 and any(holds_key(each, key, depth - 1) for each in value)


# ---- what a checkpoint of torch's layout must look like


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


def check_for(optimizer: Optimizer, state_dict: Mapping[str, Any], cycle_momentum: bool) -> None:
    """Raise unless an optimizer can step with a checkpoint of torch's layout.

    torch's own classes are known by name. Of any other class only the numbers of its parameters
    are checked: its author knows the rest.

    Args:
        optimizer: the optimizer that is to load the checkpoint.
        state_dict: the checkpoint.
        cycle_momentum: whether momentum is going to be written, whatever the checkpoint's is.
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
        if cycle_momentum:
            settings = [_with_momentum(group) for group in settings]
    _check_state(optimizer, slots, state_dict, settings)


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
                raise _other_class(
                    optimizer, f"its groups have {sorted(unknown)} and lack {absent}"
                )
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


def _other_class(optimizer: Optimizer, reason: str) -> ValueError:
    return ValueError(
        f"state_dict is of another optimizer class than {type(optimizer).__name__}: {reason}; "
        "load it into an optimizer of the class that wrote it"
    )


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


def _check_state(
    optimizer: Optimizer,
    slots: StateSlots | None,
    state_dict: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
) -> None:
    """Raise where a checkpoint holds state that this optimizer could not step with."""
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
        if slots is None or not values:
            continue
        param, settings_of = owners[index]
        kind = (param.shape, None if slots.rule is None else slots.rule.kernel(settings_of))
        if kind not in forms:
            shape = tuple(param.shape)
            forms[kind] = slots.needed(settings_of, shape), slots.used(settings_of, shape)
        needed, used = forms[kind]
        _check_complete(optimizer, slots, index, values, needed)
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
                    f"state_dict['state'][{index!r}][{name!r}] is the very memory of {first}: each "
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
            raise _other_class(
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
    """The state of a checkpoint in which no two parameters share a step counter.

    One that writes it for each of them may well have written one tensor for all; the first step
    would then count as many times.
    """
    seen: set[int] = set()
    own: dict[Any, Any] = dict(state)
    for index, values in state.items():
        counter = values.get("step") if isinstance(values, Mapping) else None
        if isinstance(counter, Tensor):
            if id(counter) in seen:
                own[index] = {**values, "step": counter.clone()}
            seen.add(id(counter))
    return own


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
