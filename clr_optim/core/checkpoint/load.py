"""Load a checkpoint of this library or of the plain wrapped optimizer, in any layout."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from clr_optim.averages import take_over_kind, unmoved_averages_warning
from clr_optim.core import leftover
from clr_optim.core.checkpoint.keys import (
    checked_keys,
    keys_in_use,
    other_bounds_warning,
    other_momentum_warning,
    without_our_entry,
)
from clr_optim.core.checkpoint.rests import without_rests
from clr_optim.core.checkpoint.settings import are_groups, check_for, check_layout
from clr_optim.core.checkpoint.state import check_mapping, own_counters, restore_dtypes
from clr_optim.core.checkpoint.undo import undone_on_error
from clr_optim.core.checkpoint.wrapped import (
    load_errors_as_value_errors,
    loads_as_torch,
    run_load_pre_hooks,
    without_load_pre_hooks,
)
from clr_optim.core.saved import edited_rates_warning, policy_call, read_position
from clr_optim.core.scheduled import warn_other_schedules
from clr_optim.core.settings import Settings
from clr_optim.core.shared import Shared
from clr_optim.core.warn import callers_level, warn_each
from clr_optim.gate import saved_statistics
from clr_optim.keys import AVERAGES, ENTRY, KEYS, SCHEDULE, SCHEDULES

__all__ = ["load", "shallow_copy", "warn_other_policy"]

_GROUPS = "state_dict['param_groups']"


def load(shared: Shared, state_dict: Any) -> None:
    """Load a checkpoint; the caller holds the lock.

    Raises:
        TypeError, ValueError: for what is no checkpoint, or one of another class or other groups;
            the optimizer is then as before.
    """
    settings, mirror = shared.settings, shared.mirror
    inner, cycles = settings.optimizer, settings.cycle_momentum
    shared.averaging.refuse_exchanged("load_state_dict()")
    own = leftover.noted_settings(inner)
    gate = shared.gate
    objects = (shared, mirror, shared.position, *([] if gate is None else [gate]))
    with undone_on_error(inner, *objects):
        state_dict, saved_keys = without_our_entry(shallow_copy(state_dict))
        before = keys_in_use(mirror, inner.param_groups)
        if loads_as_torch(inner):
            loaded, keys = _load_as_torch(settings, state_dict)
        else:
            loaded, keys = _load_own_layout(settings, state_dict)
        if saved_keys is not None:
            where = f"state_dict[{ENTRY!r}]"
            keys = checked_keys(saved_keys, where, cycle_momentum=cycles)
            if len(keys) != len(inner.param_groups):
                raise ValueError(
                    f"{where} is of {len(keys)} parameter groups, the optimizer has "
                    f"{len(inner.param_groups)}: build the optimizer with the groups that it had "
                    "when it was saved"
                )
        position, resumed = read_position(keys, _GROUPS)
        warned: list[str | None] = []
        if not settings.schedule.has_bounds:
            warned.append(other_bounds_warning(shared.constructor_bounds, before, keys))
        if resumed:
            warned.append(other_momentum_warning(before, keys, cycles=cycles))
        if saved_keys is None and not _fills_in_our_keys():
            lrs = [group.get("lr") for group in loaded]
            warned.append(edited_rates_warning(keys, settings.schedule, lrs))
        for i, (group, old, new) in enumerate(zip_longest(inner.param_groups, before, keys)):
            if group is not None:
                group.update({**(old or {}), **(new or {})})
                mirror.fill_in_momentum_bounds(i, group)
        warned.append(take_over_kind(settings.average, inner.param_groups, "state_dict"))
        if gate is not None:
            gate.begin(saved_statistics(keys, _GROUPS))
        with load_errors_as_value_errors(inner):
            shared.position.go_to(position)
    shared.in_backward.drop_pass()
    loaded_at = position if resumed else None
    leftover.take_note(inner, own, settings.schedule, loaded_at, settings.schedules)
    if resumed and SCHEDULE in keys[0]:
        warn_other_policy(shared, keys[0][SCHEDULE], "state_dict")
    if resumed:
        saved = [each.get(SCHEDULES) for each in keys]
        warned.append(warn_other_schedules(inner.param_groups, saved, "state_dict"))
    if settings.average is None and any(AVERAGES in each for each in keys):
        warned.append(unmoved_averages_warning("state_dict"))
    warn_each(warned)


def shallow_copy(state_dict: Any) -> Any:
    """Return what torch hands to load hooks: a copy, or the object if it cannot be copied."""
    if isinstance(state_dict, Mapping):
        return dict(state_dict)
    return state_dict.copy() if isinstance(state_dict, list) else state_dict


def _load_as_torch(
    settings: Settings, state_dict: Any
) -> tuple[Sequence[Any], list[dict[str, Any]]]:
    """Load a checkpoint of torch's layout, checked once the wrapped optimizer's hooks have run.

    Returns:
        The checkpoint's groups, and our keys in each.
    """
    inner, cycles = settings.optimizer, settings.cycle_momentum
    state_dict = dict(check_mapping("state_dict", run_load_pre_hooks(inner, state_dict)))
    check_layout(state_dict)
    groups = state_dict["param_groups"]
    keys = checked_keys(groups, _GROUPS, cycle_momentum=cycles)
    scheduled, masters = settings.with_momentum_schedule(len(groups)), settings.master_weights
    check_for(inner, state_dict, cycles, scheduled, masters=masters)
    state_dict["state"] = own_counters(without_rests(inner, state_dict))
    with load_errors_as_value_errors(inner), without_load_pre_hooks(inner):
        inner.load_state_dict(state_dict)
    restore_dtypes(inner, state_dict, masters=masters)
    return groups, keys


def _load_own_layout(
    settings: Settings, state_dict: Any
) -> tuple[Sequence[Any], list[dict[str, Any]]]:
    """Load a checkpoint whose layout only the wrapped class knows, by that class's own method.

    Returns:
        The groups as loaded, and our keys in each, which come from the checkpoint alone.
    """
    inner, cycles = settings.optimizer, settings.cycle_momentum
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if groups is not None and are_groups(groups):
        checked_keys(groups, _GROUPS, cycle_momentum=cycles)
    if isinstance(state_dict, dict) and isinstance(state_dict.get("state"), Mapping):
        state_dict["state"] = own_counters(state_dict["state"])
    for group in inner.param_groups:
        for key in KEYS:
            group.pop(key, None)
    with load_errors_as_value_errors(inner):
        inner.load_state_dict(state_dict)
    loaded = inner.param_groups  # perhaps other objects than before
    return loaded, checked_keys(loaded, _GROUPS, cycle_momentum=cycles)


def warn_other_policy(shared: Shared, saved: object, source: str) -> None:
    """Warn if a checkpoint was written under another policy.

    Args:
        shared: the optimizer.
        saved: the policy in the checkpoint.
        source: the checkpoint in the message.
    """
    settings = shared.settings
    if saved == settings.schedule_json:
        return
    warnings.warn(
        f"{source} was written under the policy {policy_call(saved, source)}; this optimizer's "
        f"policy, {policy_call(settings.schedule_json, source)}, decides from step "
        f"{shared.position.number} on. To continue under the old policy, construct with "
        "policy=... of it; to begin anew, call set_iteration(0).",
        UserWarning,
        stacklevel=callers_level(),
    )


def _fills_in_our_keys() -> bool:
    """Return whether ``torch.distributed.checkpoint`` is loading.

    If a plain optimizer's checkpoint lacks our keys, it keeps those that the optimizer holds.
    """
    frame = sys._getframe(1)
    ours = ("clr_optim.", "torch.")
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(ours):
        if frame.f_globals["__name__"].startswith("torch.distributed.checkpoint"):
            return True
        frame = frame.f_back
    return False
