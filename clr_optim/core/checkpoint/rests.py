"""Rests of float32 masters in a checkpoint, and the float32 state beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.checks import shown
from clr_optim.keys import REST

__all__ = ["check_rest", "without_rests"]


def check_rest(
    index: object,
    values: Mapping[str, Any],
    param: Tensor,
    slots: Collection[str],
    *,
    masters: bool,
) -> None:
    """Raise where a checkpoint has a rest that this optimizer could not use exactly.

    Args:
        index: the parameter's number.
        values: the state in the checkpoint.
        param: the parameter.
        slots: the names of the state tensors that belong to the rule.
        masters: whether the optimizer keeps masters of its bfloat16 parameters.

    Raises:
        ValueError: naming the entry, its value and the remedy.
    """
    if REST not in values or param.dtype != torch.bfloat16:
        return
    where = f"state_dict['state'][{index!r}]"
    if not masters:
        raise ValueError(
            f"{where}[{REST!r}] is the rest of float32 masters, and this optimizer keeps none: "
            "construct it with master_weights=True"
        )
    for name, dtype in ((REST, torch.bfloat16), *((slot, torch.float32) for slot in slots)):
        value = values.get(name)
        if name != REST and value is None:
            continue
        if (
            not isinstance(value, Tensor)
            or value.layout is not torch.strided
            or (value.is_meta and not param.is_meta)
            or value.dtype != dtype
            or value.shape != param.shape
        ):
            raise ValueError(
                f"{where}[{name!r}] must be a dense tensor of dtype {dtype} and shape "
                f"{list(param.shape)} beside float32 masters, got {shown(value)}: give the "
                "state_dict() of a CyclicalOptimizer with master_weights=True"
            )


def without_rests(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the state of a checkpoint without the rests of parameters that are not bfloat16.

    Such a parameter has all bits of its master, which the model's checkpoint brings.
    """
    state: dict[Any, Any] = dict(state_dict["state"])
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for param, index in zip(group["params"], saved["params"], strict=True):
            values = state.get(index)
            is_narrow = param.dtype == torch.bfloat16
            if not is_narrow and isinstance(values, Mapping) and REST in values:
                state[index] = {name: v for name, v in values.items() if name != REST}
    return state
