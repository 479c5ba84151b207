"""Change the course of an optimizer: begin, add a group, set bounds, leave out our keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from clr_optim.averages import take_over_kind
from clr_optim.checks import check_bounds, shown
from clr_optim.core import leftover
from clr_optim.core.arguments import Start, check_cycled_momentum, separate_defaults
from clr_optim.core.checkpoint import warn_other_policy
from clr_optim.core.followed import schedules_json
from clr_optim.core.mastering import check_params, create_rests
from clr_optim.core.per_group import optional_number, optional_per_group
from clr_optim.core.rates import check_tensor_lr
from clr_optim.core.saved import initial_bounds, unread_base_warning
from clr_optim.core.scheduled import check_new_group, warn_other_schedules
from clr_optim.core.shared import Shared
from clr_optim.core.warn import warn_each
from clr_optim.from_torch import TorchsCourse
from clr_optim.keys import BASE, BASE_MOMENTUM, KEYS, MAX, MAX_MOMENTUM, SCHEDULES
from clr_optim.schedule import Schedule

__all__ = ["add_param_group", "arguments_of", "begin", "set_bounds", "without_our_keys"]


def begin(shared: Shared, start: Start) -> None:
    """Write the start of a new optimizer into its groups, and give the warnings about it."""
    settings, optimizer = start.settings, start.settings.optimizer
    separate_defaults(optimizer)
    create_rests(settings)
    if start.note is not None:
        leftover.clear(optimizer.param_groups, start.own)
    for group, (base, top), (low, high) in zip(
        optimizer.param_groups, start.bounds, start.momentum_bounds, strict=True
    ):
        group[BASE], group[MAX] = base, top
        if settings.cycle_momentum:
            group[BASE_MOMENTUM], group[MAX_MOMENTUM] = low, high
    for i, group in enumerate(optimizer.param_groups):
        group.pop(SCHEDULES, None)
        if settings.schedules:
            group[SCHEDULES] = schedules_json(settings.schedules_of(i))
    average = take_over_kind(settings.average, optimizer.param_groups, "the wrapped optimizer")
    shared.position.go_to(start.position)
    shared.constructor_bounds = start.constructor_bounds
    loaded = start.position if start.resumed else None
    leftover.take_note(optimizer, start.own, settings.schedule, loaded, settings.schedules)
    if start.saved_policy is not None:
        warn_other_policy(shared, start.saved_policy, "the wrapped optimizer")
    groups = optimizer.param_groups
    other = warn_other_schedules(groups, start.saved_schedules, "the wrapped optimizer")
    warn_each([*start.warnings, average, other])
    shared.position.warn_unread_bounds()


def arguments_of(taken: TorchsCourse) -> dict[str, Any]:
    """Return the constructor's arguments that continue a torch scheduler."""
    base, top = zip(*taken.bounds, strict=True)
    arguments = {"policy": taken.schedule, "base_lr": base, "max_lr": top}
    if taken.momenta is not None and taken.schedule.moves_momentum:
        low, high = zip(*taken.momenta, strict=True)
        arguments.update(cycle_momentum=True, base_momentum=low, max_momentum=high)
    return arguments


@contextmanager
def without_our_keys(groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Take our keys out of the groups; restore the groups if the body raises."""
    before = [dict(group) for group in groups]
    for group in groups:
        for key in KEYS:
            group.pop(key, None)
    try:
        yield
    except BaseException:
        for group, items in zip(groups, before, strict=True):
            group.clear()
            group.update(items)
        raise


def set_bounds(shared: Shared, base_lr: object, max_lr: object) -> None:
    """Change the bounds, from the next step on; the caller holds the lock."""
    schedule, groups = shared.settings.schedule, shared.settings.optimizer.param_groups
    if base_lr is None and max_lr is None:
        raise ValueError("base_lr=None and max_lr=None: give at least one of the bounds")
    _refuse_unread_bounds(schedule, {"base_lr": base_lr, "max_lr": max_lr})
    shared.position.warn_unread_bounds()
    position = shared.position.settle()
    bounds = []
    for i, ((old_base, old_max), new_base, new_max) in enumerate(
        zip(
            shared.mirror.bounds(),
            optional_per_group("base_lr", base_lr, groups),
            optional_per_group("max_lr", max_lr, groups),
            strict=True,
        )
    ):
        base = old_base if new_base is None else new_base
        top = old_max if new_max is None else new_max
        if new_base is None and not schedule.reads_base_lr:
            base = min(base, top)  # the user need not know of it
        check_bounds(base, top, f" in parameter group {i}")
        bounds.append((base, top))
    shared.mirror.look_ahead(position, bounds)  # a scale_fn may raise, before anything changes
    for group, (base, top) in zip(groups, bounds, strict=True):
        group[BASE], group[MAX] = base, top
    shared.position.go_to(position)
    if base_lr is not None:
        warn_each([unread_base_warning(schedule, [base for base, _ in bounds])])


def _refuse_unread_bounds(schedule: Schedule, given: Mapping[str, object]) -> None:
    """Raise if a schedule with bounds would not read the bounds that the user gave, by name."""
    if given and schedule.has_bounds:
        raise ValueError(
            f"{', '.join(f'{name}={value!r}' for name, value in given.items())}: every phase of "
            f"the schedule {schedule.name!r} has bounds already, which these would not change"
        )


def add_param_group(shared: Shared, param_group: Any) -> None:
    """Add a group in mid-training; the caller holds the lock."""
    inner = shared.settings.optimizer
    _check_new_group(inner, param_group)
    given: dict[str, Any] = {k: param_group[k] for k in ("base_lr", "max_lr") if k in param_group}
    schedule = shared.settings.schedule
    _refuse_unread_bounds(schedule, {k: v for k, v in given.items() if v is not None})
    probe = {"lr": inner.defaults.get("lr"), **param_group}
    check_tensor_lr(probe["lr"], "lr in param_group")
    bounds = initial_bounds(
        probe,
        " in param_group",
        optional_number("param_group['base_lr']", given.get("base_lr")),
        optional_number("param_group['max_lr']", given.get("max_lr")),
    )
    if shared.settings.master_weights:
        _check_masters(shared, param_group)
    whole = {**inner.defaults, **param_group}
    if shared.settings.cycle_momentum:
        check_cycled_momentum(whole, " in param_group")
    noted = leftover.noted_settings(inner)
    warning = check_new_group(shared.settings, whole, param_group.keys(), noted)
    position, mirror = shared.position, shared.mirror
    known = not position.is_on_device and mirror.is_known(position.number)
    if not known:
        position.settle()
    schedule.rates(position.number, [bounds])  # a scale_fn may raise, before anything changes
    for key in given:
        del param_group[key]
    try:
        inner.add_param_group(param_group)
    except BaseException as error:
        param_group.update(given)
        if isinstance(error, TypeError):
            raise TypeError(
                f"param_group['params'] must be a tensor or a list of tensors, got "
                f"{shown(param_group['params'])}: {error}"
            ) from error
        if isinstance(error, ValueError):
            raise ValueError(
                f"param_group cannot be added: {error}; 'params' must be leaf tensors that no "
                "group has yet, with names if the other groups have names"
            ) from error
        raise
    groups = inner.param_groups
    shared.in_backward.add_hooks(groups[-1]["params"])
    leftover.note_group(inner, groups[-1])
    mirror.fill_in_bounds(len(groups) - 1, groups[-1], bounds)
    if known:
        mirror.join(position.number)
    else:
        position.rewrite()
    unread = None
    if given.get("base_lr") is not None:
        unread = unread_base_warning(schedule, [bounds[0]])
    warn_each([warning, unread])


def _check_masters(shared: Shared, group: dict[str, Any]) -> None:
    """Raise if a parameter of a new group cannot have a master.

    Args:
        shared: the optimizer.
        group: the group. An iterator over parameters becomes a list, as in torch.
    """
    inner = shared.settings.optimizer
    if isinstance(group["params"], Iterator):
        group["params"] = list(group["params"])
    given = group["params"]
    if not isinstance(given, (Tensor, Sequence)):
        return  # torch refuses it
    members = [given] if isinstance(given, Tensor) else given
    named = (each[1] if isinstance(each, tuple) and len(each) == 2 else each for each in members)
    tensors = [each for each in named if isinstance(each, Tensor)]
    whole = {**inner.defaults, **group, "params": tensors}
    check_params(inner, [whole], shared.serving.name)


def _check_new_group(inner: Optimizer, param_group: object) -> None:
    """Raise unless a group looks like one that torch takes."""
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, one group a call, got {shown(param_group)}")
    torchs_own = type(inner).add_param_group is Optimizer.add_param_group
    if torchs_own and isinstance(inner.param_groups, tuple):
        raise TypeError(
            "param_groups is a tuple, to which no group can be added: write "
            "opt.param_groups = list(opt.param_groups) first"
        )
    if "params" not in param_group:
        raise ValueError(
            f"param_group lacks 'params': give it the tensors to train; it has "
            f"{sorted(map(str, param_group))}"
        )
