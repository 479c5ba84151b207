"""Our keys in a checkpoint: what they may hold, and where they are if the layout drops them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clr_optim.averages import check_count
from clr_optim.checks import check_bounds, check_momenta, check_number, item, shown
from clr_optim.core.checkpoint.settings import are_groups
from clr_optim.core.groups import GroupMirror
from clr_optim.core.saved import BASE_FRACTION, are_close, bounds_shown, read_position
from clr_optim.gate import saved_statistics
from clr_optim.keys import (
    AVERAGE_KIND,
    AVERAGES,
    BASE,
    BASE_MOMENTUM,
    ENTRY,
    KEYS,
    MAX,
    MAX_MOMENTUM,
    SCHEDULES,
    STEP,
)

__all__ = [
    "checked_keys",
    "keys_in_use",
    "other_bounds_warning",
    "other_momentum_warning",
    "with_our_entry",
    "without_our_entry",
]


def checked_keys(
    groups: Sequence[Mapping[str, Any]], name: str, *, cycle_momentum: bool
) -> list[dict[str, Any]]:
    """Return our keys in each group of a checkpoint.

    Args:
        groups: the checkpoint's groups, or dictionaries of our keys alone.
        name: the groups in messages.
        cycle_momentum: whether momentum cycles.

    Raises:
        TypeError, ValueError: for values that this library never writes.
    """
    found = [{key: group[key] for key in KEYS if key in group} for group in groups]
    for i, keys in enumerate(found):
        if BASE_MOMENTUM in keys or MAX_MOMENTUM in keys:
            low, high = (
                check_number(f"{name}[{i}][{key!r}]", item(keys.get(key)), maximum=1.0)
                for key in (BASE_MOMENTUM, MAX_MOMENTUM)
            )
            beta = cycle_momentum and "betas" in groups[i]
            check_momenta(low, high, f" in {name}[{i}]", beta=beta)
            keys.update({BASE_MOMENTUM: low, MAX_MOMENTUM: high})
        for key, what in ((SCHEDULES, "a string of JSON"), (AVERAGE_KIND, "a string")):
            if not isinstance(keys.get(key, ""), str):
                raise TypeError(
                    f"{name}[{i}][{key!r}] must be {what}, got {shown(keys[key])}: delete that key "
                    "from the groups to load the rest"
                )
        if AVERAGES in keys:
            keys[AVERAGES] = check_count(keys[AVERAGES], f"{name}[{i}][{AVERAGES!r}]")
        base, top = keys.get(BASE), keys.get(MAX)
        if type(base) is type(top) is float and 0.0 <= base <= top < math.inf:
            continue
        if BASE in keys or MAX in keys:
            base = check_number(f"{name}[{i}][{BASE!r}]", item(base))
            top = check_number(f"{name}[{i}][{MAX!r}]", item(top))
            check_bounds(base, top, f" in {name}[{i}]")
            keys.update({BASE: base, MAX: top})
    read_position(found, name)
    saved_statistics(found, name)
    return found


def keys_in_use(mirror: GroupMirror, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the bounds of rate and momentum in each group, for a checkpoint without any."""
    return [
        {
            **{key: group[key] for key in (BASE_MOMENTUM, MAX_MOMENTUM) if key in group},
            BASE: base,
            MAX: top,
        }
        for group, (base, top) in zip(groups, mirror.bounds(), strict=True)
    ]


def other_bounds_warning(
    given: Sequence[tuple[float | None, float]],
    before: Sequence[Mapping[str, Any]],
    keys: Sequence[Mapping[str, Any]],
) -> str | None:
    """Return a warning if a checkpoint's bounds are neither those in use nor the constructor's.

    Args:
        given: the constructor's bounds of each group.
        before: the bounds in use, as :func:`keys_in_use` returns them.
        keys: our keys in the checkpoint.
    """
    saved: list[tuple[float, float]] = []
    code: list[tuple[float, float]] = []
    is_new = False
    for i, (old, new) in enumerate(zip(before, keys, strict=False)):
        base, top = old[BASE], old[MAX]
        new_base, new_top = (new[BASE], new[MAX]) if BASE in new else (base, top)
        code_base, code_top = given[i] if i < len(given) else (base, top)
        as_code = code_base is None or are_close(new_base, code_base)
        as_code = as_code and are_close(new_top, code_top)
        is_new |= not as_code and not (are_close(new_base, base) and are_close(new_top, top))
        code_base = code_top / BASE_FRACTION if code_base is None else code_base
        saved.append((new_base, new_top))
        code.append((code_base, code_top))
    if not is_new:
        return None
    return (
        f"state_dict has the bounds {bounds_shown(saved)}, and this optimizer was given "
        f"{bounds_shown(code)}: the checkpoint's bounds hold from here on. To train with the "
        f"others, call set_bounds({bounds_shown(code)}) after loading."
    )


def other_momentum_warning(
    before: Sequence[Mapping[str, Any]], keys: Sequence[Mapping[str, Any]], *, cycles: bool
) -> str | None:
    """Return a warning if a checkpoint cycles momentum otherwise than this optimizer.

    Args:
        before: the bounds in use, as :func:`keys_in_use` returns them.
        keys: our keys in the checkpoint.
        cycles: whether momentum cycles here.
    """
    for i, (old, new) in enumerate(zip(before, keys, strict=False)):
        if BASE_MOMENTUM not in new:
            continue
        low, high = new[BASE_MOMENTUM], new[MAX_MOMENTUM]
        if not cycles:
            return (
                "state_dict was written with cycle_momentum=True, and this optimizer has False: "
                "momentum stays where the checkpoint has it. To go on cycling it, construct with "
                f"cycle_momentum=True, base_momentum={low:g}, max_momentum={high:g}."
            )
        own = old.get(BASE_MOMENTUM, low), old.get(MAX_MOMENTUM, high)
        if not (are_close(low, own[0]) and are_close(high, own[1])):
            return (
                f"state_dict has base_momentum={low:g}, max_momentum={high:g} in parameter group "
                f"{i}, and this optimizer was given {own[0]:g} and {own[1]:g}: the checkpoint's "
                f"hold. To cycle between the others, write them into group[{BASE_MOMENTUM!r}] and "
                f"group[{MAX_MOMENTUM!r}] after loading."
            )
    return None


# ---- layouts that drop what groups hold


def with_our_entry(state_dict: Any, groups: Sequence[Mapping[str, Any]]) -> Any:
    """Return a state dict with our keys, in an entry beside a layout that has dropped them."""
    if not groups or not isinstance(state_dict, dict) or _holds_key(state_dict, STEP):
        return state_dict
    entry = [{key: group[key] for key in KEYS if key in group} for group in groups]
    return {**state_dict, ENTRY: entry}


def without_our_entry(state_dict: Any) -> tuple[Any, Any]:
    """Return a state dict without that entry, and the entry; ``None`` if there is none."""
    if not isinstance(state_dict, dict) or ENTRY not in state_dict:
        return state_dict, None
    keys = state_dict.pop(ENTRY)
    if not are_groups(keys):
        raise ValueError(f"state_dict[{ENTRY!r}] must be a list of dictionaries, got {shown(keys)}")
    return state_dict, keys


def _holds_key(value: object, key: str, depth: int = 8) -> bool:
    """Return whether a dictionary, or one that is nested in it, has a key."""
    if isinstance(value, Mapping):
        if key in value:
            return True
        value = list(value.values())  # a copy: another thread's step may create state
    elif not isinstance(value, (list, tuple)):
        return False
    return depth > 0 and any(_holds_key(each, key, depth - 1) for each in value)
