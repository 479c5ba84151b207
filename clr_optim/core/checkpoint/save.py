"""Save: the wrapped optimizer's state dict, with our keys, as torch lays it out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.core.checkpoint.keys import with_our_entry
from clr_optim.core.shared import Shared
from clr_optim.rules import NUMBERS

__all__ = ["save"]

# How often a state dict is read again if another thread adds a group meanwhile.
_ATTEMPTS = 8

# How often, and after which pause, if another thread creates state meanwhile.
_PATIENT_ATTEMPTS, _PAUSE_S = 1000, 0.001


def save(shared: Shared) -> dict[str, Any]:
    """Return a checkpoint of an optimizer; the caller holds the lock.

    If other code wrote an ``lr``, the policy overrules it first: a checkpoint holds the policy's
    rates.
    """
    inner = shared.settings.optimizer
    state_dict: dict[str, Any] = {}
    shared.refuse_unsettled("state_dict()")
    shared.position.warn_unread_bounds()
    for _ in range(_ATTEMPTS):
        shared.position.settle()  # asks the device, if only the device knows the position
        shared.position.overrule()
        shared.write_notes()
        state_dict = _read(inner)
        if len(shared.mirror.records) == len(inner.param_groups):
            break  # no other thread has added a group, which would lack our keys
    shared.warn_of_skips()
    has_groups = isinstance(state_dict, dict) and "param_groups" in state_dict
    if has_groups and any(isinstance(group["lr"], Tensor) for group in inner.param_groups):
        # Steps fill the group's tensor, and checkpointers fill that of a state dict.
        state_dict["param_groups"] = [
            {**group, "lr": group["lr"].detach().clone()}
            if isinstance(group["lr"], Tensor)
            else group
            for group in state_dict["param_groups"]
        ]
    traits = shared.serving.traits
    if has_groups and "state" in state_dict and traits is not None and traits.counts_on_device:
        state_dict["state"] = _with_counters_as_torch(state_dict)
    whole: dict[str, Any] = with_our_entry(state_dict, inner.param_groups)
    return whole


def _read(inner: Optimizer) -> dict[str, Any]:
    """Return the wrapped optimizer's state dict.

    torch's own step runs without the lock. If the step creates state meanwhile, torch's iteration
    over the state fails, and begins again after a pause.
    """
    for _ in range(_PATIENT_ATTEMPTS):
        try:
            return inner.state_dict()
        except RuntimeError as error:
            if "changed size during iteration" not in str(error):
                raise
            time.sleep(_PAUSE_S)
    return inner.state_dict()


def _with_counters_as_torch(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the state of a state dict, its step counters on the device where torch has them.

    torch keeps counters and other states of one element on the CPU, unless a group's flags say
    otherwise; the kernels keep them on the device. One copy brings all of them.
    """
    stays = {
        index
        for group in state_dict["param_groups"]
        for index in group["params"]
        if group.get("capturable") or group.get("fused")
    }
    state: dict[Any, Any] = dict(state_dict["state"])
    by_kind: dict[Any, list[Any]] = {}
    for index, values in state.items():
        for name in NUMBERS if isinstance(values, Mapping) and index not in stays else ():
            number = values.get(name)
            if isinstance(number, Tensor) and number.device.type != "cpu":
                kind = (number.device, number.dtype, number.shape)
                by_kind.setdefault(kind, []).append((index, name))
    for places in by_kind.values():
        numbers = torch.stack([state[index][name] for index, name in places]).cpu()
        for (index, name), number in zip(places, numbers, strict=True):
            state[index] = {**state[index], name: number.clone()}
    return state
