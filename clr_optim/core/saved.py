"""Read the position, bounds and rates that other code, a checkpoint or a wrapper left in groups."""

from __future__ import annotations

import inspect
import json
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from clr_optim.checks import as_position, check_bounds, check_number, item, shown
from clr_optim.keys import BASE, MAX, SCHEDULE, STEP
from clr_optim.schedule import POLICIES, Schedule

__all__ = [
    "BASE_FRACTION",
    "are_close",
    "bounds_shown",
    "edited_rates_warning",
    "found_bounds",
    "initial_bounds",
    "is_rate",
    "policy_call",
    "policy_name",
    "read_position",
    "unread_base_warning",
    "unread_bounds_warning",
    "written_position",
    "written_rates",
]

#: The paper's guideline for the lower bound: a third or a quarter of the upper bound.
BASE_FRACTION = 4.0

# Groups whose bounds a message shows.
_SHOWN_GROUPS = 8

# Phases of a policy that a message shows.
_SHOWN_PHASES = 4


def read_position(groups: Sequence[Mapping[str, Any]], name: str) -> tuple[int, bool]:
    """Return ``(position, whether any group holds one)``.

    Raises:
        ValueError: if the groups disagree, or if a group names no policy.
    """
    steps = {
        i: as_position(group[STEP], f"{name}[{i}][{STEP!r}]")
        for i, group in enumerate(groups)
        if STEP in group
    }
    known: set[str] = set()
    for i, group in enumerate(groups):
        if SCHEDULE in group:
            text = group[SCHEDULE]
            if not isinstance(text, str) or text not in known:
                policy_name(text, f"{name}[{i}][{SCHEDULE!r}]")
                known.add(text)
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"{name} disagree on {STEP}: {steps} by group; all groups share one position, "
            "so set them all to it"
        )
    return (next(iter(steps.values())), True) if steps else (0, False)


def written_position(
    groups: Sequence[Mapping[str, Any]], believed: int, ours: Iterable[Mapping[str, Any]]
) -> int | None:
    """Return the position that groups hold, or ``None`` if no group holds one.

    A position other than the believed one was written by other code, and counts. A sharded restore
    writes into our groups, or replaces all of them. A group that was taken out for a while, or
    copied earlier, shows an old position beside our groups, and does not count.

    Args:
        groups: the groups.
        believed: the position that we last wrote.
        ours: the groups into which we wrote it.
    """
    is_written = False
    known: set[int] | None = None
    for group in groups:
        step = group.get(STEP)
        if step is None:
            continue
        is_written = True
        if type(step) is int and step == believed:
            continue
        if known is None:
            known = set(map(id, ours))
            known = known if any(id(each) in known for each in groups) else set()
        if not known or id(group) in known:
            position = as_position(step, f"param_groups: {STEP}")
            if position != believed:
                return position
    return believed if is_written else None


def policy_name(saved: object, where: str) -> str:
    """Return the name in a policy that a checkpoint holds, whatever version wrote the policy."""
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


class _Named:
    """A function that a checkpoint names and does not hold; its repr is the name."""

    def __init__(self, name: object) -> None:
        self._name = name

    def __call__(self, _: float) -> float:
        return 1.0

    def __repr__(self) -> str:
        return str(self._name)


def policy_call(saved: object, where: str) -> str:
    """Return the Python call that makes a policy in a checkpoint.

    If another version wrote the policy, return its name and its JSON.

    Args:
        saved: the policy, as the groups hold it.
        where: the checkpoint, for an error.
    """
    name = policy_name(saved, where)
    try:
        data = json.loads(cast("str", saved))
        names = [row["scale_fn"] for row in data["phases"] if "scale_fn" in row]
        schedule = Schedule.from_dict(data, scale_fn={name: _Named(name) for name in names})
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
        return f"{name!r} of another version, {saved}"
    phases = len(schedule.phases)
    if phases > _SHOWN_PHASES:
        first = repr(Schedule(name, schedule.phases[:1])).removesuffix("])")
        return f"{first}, and {phases - 1} more])"
    return _call_by_name(schedule) or repr(schedule)


def _call_by_name(schedule: Schedule) -> str | None:
    """Return the call of a policy that makes a schedule of one phase, if one does."""
    make, phase = POLICIES.get(schedule.name), schedule.phases[0]
    if make is None:
        return None
    settings = {
        name: getattr(phase, name)
        for name, parameter in inspect.signature(make).parameters.items()
        if getattr(phase, name, parameter.default) != parameter.default
    }
    if settings.get("step_size_down") == phase.step_size_up:
        del settings["step_size_down"]
    try:
        if make(**settings) != schedule:
            return None
    except (TypeError, ValueError):
        return None
    return f"{schedule.name}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


# ---- bounds


def initial_bounds(
    group: Mapping[str, Any], where: str, base_lr: float | None = None, max_lr: float | None = None
) -> tuple[float, float]:
    """Return a group's bounds: the given ones, else those in its keys, else from its own ``lr``."""
    if max_lr is None:
        # The keys come first: a rate in mid-cycle is not the rate that the user chose.
        name = MAX if MAX in group else "lr"
        remembered = group[name]
        if isinstance(remembered, Tensor):
            remembered = remembered.item()
        max_lr = check_number(f"{name}{where}", remembered)
    if base_lr is None:
        base_lr = max_lr / BASE_FRACTION
        # The base_lr in the keys belongs to the max_lr in the keys.
        if BASE in group:
            remembered = check_number(f"{BASE}{where}", group[BASE])
            if remembered <= max_lr and max_lr == group.get(MAX, max_lr):
                base_lr = remembered
    check_bounds(base_lr, max_lr, where)
    return base_lr, max_lr


def found_bounds(
    groups: Sequence[Mapping[str, Any]], known: Sequence[tuple[float, float] | None]
) -> list[tuple[float, float]]:
    """Return each group's bounds: those in its keys, else the known ones, else from ``lr``.

    Args:
        groups: the groups.
        known: bounds by place; None, or a missing place, for a group of which none are known.
    """
    return [
        _written_bounds(group, i)
        if BASE in group and MAX in group
        else (known[i] if i < len(known) else None) or initial_bounds(group, f" in group {i}")
        for i, group in enumerate(groups)
    ]


def _written_bounds(group: Mapping[str, Any], index: int) -> tuple[float, float]:
    """Return the bounds in a group's keys, which other code may have written."""
    base, top = group[BASE], group[MAX]
    if type(base) is not float or type(top) is not float or not 0.0 <= base <= top < math.inf:
        where = f" in parameter group {index}"
        base, top = check_number(BASE + where, base), check_number(MAX + where, top)
        check_bounds(base, top, where)
    return base, top


def unread_bounds_warning(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a warning if other code wrote bounds into groups, where no code reads them.

    Only ``add_param_group`` reads bounds of the rate. A torch scheduler leaves an ``initial_lr``,
    and CyclicLR and OneCycleLR leave bounds with it.
    """
    for i, group in enumerate(groups):
        if "initial_lr" in group:
            continue
        for name in ("base_lr", "max_lr", "base_momentum", "max_momentum"):
            if name in group:
                later = ", or later to set_bounds," if name.endswith("lr") else ""
                return (
                    f"{name!r} in parameter group {i} has no effect: give the bounds to the "
                    f"constructor{later} as {name}=[...] with one number per group"
                )
    return None


def unread_base_warning(schedule: Schedule, bases: Sequence[float]) -> str | None:
    """Return a warning if lower bounds above 0 have no effect."""
    if not any(bases) or schedule.has_bounds or schedule.reads_base_lr:
        return None
    return (
        f"base_lr={max(bases):g} has no effect: the rates of the schedule {schedule.name!r} are "
        "multiples of max_lr. Leave base_lr out; if the schedule's function takes end=, give it "
        "the last rate divided by max_lr."
    )


def are_close(one: float, other: float) -> bool:
    """Return whether two bounds are equal up to the rounding of a file format."""
    return one == other or math.isclose(one, other, rel_tol=1e-6)


def bounds_shown(bounds: Sequence[tuple[float, float]]) -> str:
    """Return bounds as arguments of ``set_bounds``: lists where they differ between groups."""
    shown = []
    for name, values in zip(("base_lr", "max_lr"), zip(*bounds, strict=True), strict=False):
        numbers = [f"{value:g}" for value in values]
        if len(set(numbers)) == 1:
            shown.append(f"{name}={numbers[0]}")
        else:
            ellipsis = ["..."] if len(numbers) > _SHOWN_GROUPS else []
            shown.append(f"{name}=[{', '.join(numbers[:_SHOWN_GROUPS] + ellipsis)}]")
    return ", ".join(shown)


# ---- rates


def written_rates(
    groups: Sequence[Mapping[str, Any]], schedule: Schedule
) -> Iterator[float | None]:
    """Yield the rate of each group's own position, bounds and policy; ``None`` if one is unknown.

    Args:
        groups: groups, or our keys of each.
        schedule: the policy of the groups that name it.
    """
    policies: dict[object, Schedule | None] = {schedule.to_json(): schedule}
    rates: dict[object, float | None] = {}
    for group in groups:
        if any(key not in group for key in (STEP, BASE, MAX, SCHEDULE)):
            yield None
            continue
        text, step = group[SCHEDULE], group[STEP]
        key = (group[BASE], group[MAX], step, text)
        try:
            if key not in rates:
                if text not in policies:
                    policies[text] = _schedule_of(text)
                policy, position = policies[text], as_position(step, STEP)
                rates[key] = None if policy is None else policy.rates(position, [key[:2]])[0]
            yield rates[key]
        except (ArithmeticError, LookupError, TypeError, ValueError):
            yield None


def _schedule_of(text: str) -> Schedule | None:
    """Return the schedule in a checkpoint, or ``None`` if this version cannot read it."""
    try:
        return Schedule.from_json(text)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None


def is_rate(lr: object, rate: float) -> bool:
    """Return whether ``lr`` is a rate, up to the rounding of its type."""
    error, smallest = 1e-5, 1e-30
    if isinstance(lr, Tensor):
        kind = torch.finfo(lr.dtype)
        rate = min(rate, kind.max)
        error, smallest = max(error, 4 * kind.eps), kind.smallest_normal * kind.eps
    try:
        return math.isclose(float(cast("float", lr)), rate, rel_tol=error, abs_tol=smallest)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def edited_rates_warning(
    groups: Sequence[Mapping[str, Any]], schedule: Schedule, lrs: Sequence[object] | None = None
) -> str | None:
    """Return a warning if an ``lr`` of a checkpoint is not the rate of its position and bounds.

    Args:
        groups: the checkpoint's groups, or our keys of each.
        schedule: the policy of the optimizer that has loaded the checkpoint.
        lrs: the checkpoint's rates, if the groups lack them.
    """
    lrs = [group["lr"] for group in groups] if lrs is None else lrs
    edited = [
        f"{i} ({_number_shown(lr)} instead of {rate:g})"
        for i, (lr, rate) in enumerate(zip(lrs, written_rates(groups, schedule), strict=False))
        if rate is not None and lr is not None and not is_rate(lr, rate)
    ]
    if not edited:
        return None
    remedy = "set_bounds(base_lr=..., max_lr=...) after loading"
    if schedule.has_bounds:
        remedy = "the constructor with another policy: set_bounds cannot change this one's bounds"
    return (
        f"the checkpoint's lr is not the rate of its position, bounds and policy in parameter "
        f"group {', '.join(edited)}; the policy {schedule.name!r} decides instead. To train at "
        f"other rates, call {remedy}."
    )


def _number_shown(lr: object) -> str:
    number = item(lr)
    return f"{number:g}" if isinstance(number, numbers.Real) else shown(number)
