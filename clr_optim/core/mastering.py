"""Mastering: which optimizers, parameters and steps cannot keep float32 masters, and why."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from clr_optim import backends
from clr_optim.backends import NoKernelsError, rule_for
from clr_optim.backends.native import library
from clr_optim.checks import check_bool
from clr_optim.core.serving import parameters_of
from clr_optim.core.settings import Settings
from clr_optim.core.shared import Shared
from clr_optim.core.warn import callers_level
from clr_optim.keys import REST
from clr_optim.plan import Plan, classify, state_with_rest
from clr_optim.rules import class_name

__all__ = [
    "check_master_weights", "check_params", "create_rests", "refuse_fallback", "refuse_torchs_step",
]  # fmt: skip

_LEAVE_OUT = "leave master_weights out"


def check_master_weights(optimizer: Optimizer, value: object, chosen: tuple[str, str]) -> bool:
    """Return the constructor's ``master_weights``, checked.

    Args:
        optimizer: the optimizer to wrap.
        value: the argument.
        chosen: the backend's name, and why it was chosen.

    Raises:
        TypeError, ValueError: naming the argument, its value, the reason and the remedy.
    """
    if not check_bool("master_weights", value):
        _refuse_masters_in(optimizer)
        return False
    name, reason = chosen
    if name != "torch":
        try:
            library()
        except NoKernelsError as error:
            name, reason = "torch", str(error)
    if name == "torch":
        raise ValueError(
            f"master_weights=True needs fused kernels, and {class_name(type(optimizer))} runs its "
            f"own step: {reason}; use an optimizer and a backend with kernels, or {_LEAVE_OUT}"
        )
    check_params(optimizer, optimizer.param_groups, name)
    if not any(is_lazy(p) or p.dtype == torch.bfloat16 for p in parameters_of(optimizer)):
        warnings.warn(
            "master_weights=True has no effect: no parameter of the optimizer is bfloat16; convert "
            f"the model first (model.to(torch.bfloat16)), or {_LEAVE_OUT}",
            UserWarning,
            stacklevel=callers_level(),
        )
    return True


def _refuse_masters_in(optimizer: Optimizer) -> None:
    """Raise if a parameter has the rest of a master, which no step would keep current."""
    for param in parameters_of(optimizer) if isinstance(optimizer.state, Mapping) else ():
        values = optimizer.state.get(param)
        if isinstance(values, dict) and REST in values and param.dtype == torch.bfloat16:
            raise ValueError(
                f"master_weights=False, and the optimizer's state has {REST!r}, the rest of "
                "float32 masters: construct with master_weights=True, or clear the state to "
                "begin anew"
            )


def check_params(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], backend: str) -> None:
    """Raise if a bfloat16 or float16 parameter cannot have a master, as far as is known now.

    Args:
        optimizer: the wrapped optimizer.
        groups: the groups to check.
        backend: the name of a fused backend.

    Raises:
        ValueError: naming the number of such parameters, the reason and the remedy.
    """
    rule, traits = rule_for(optimizer), backends.traits(backend)
    assert not isinstance(rule, str), rule
    assert traits is not None, backend
    found: dict[str, int] = {}
    device = backends.plan_device(backend, optimizer)
    for why, params in classify(groups, rule, device, capturable=traits.capturable).items():
        for param in params:
            if is_lazy(param) or param.dtype not in (torch.bfloat16, torch.float16):
                continue
            if param.dtype == torch.float16:
                why = "float16 has no master, so train in bfloat16"
            if why is not None:
                found[why] = found.get(why, 0) + 1
    if found:
        reasons = "; ".join(f"{why} ({count} parameters)" for why, count in found.items())
        raise ValueError(
            f"master_weights=True cannot keep masters of all parameters: {reasons}: change these "
            f"parameters, or {_LEAVE_OUT}"
        )


def create_rests(settings: Settings) -> None:
    """Create the rests of parameters that have state already, and widen that state to float32.

    torch's checkpointers load only keys that the state has, and have a step create the state only
    if the optimizer has none.
    """
    optimizer, rule = settings.optimizer, rule_for(settings.optimizer)
    if not settings.master_weights or isinstance(rule, str):
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            values = optimizer.state.get(param)
            if settings.extras.has_master(param) and values and REST not in values:
                values.update(state_with_rest(param, group, optimizer, rule))


def refuse_fallback(shared: Shared, plan: Plan, left: Iterable[tuple[Tensor, str]]) -> None:
    """Raise if torch's own step would have to update a parameter that has a master.

    Args:
        shared: the optimizer.
        plan: the plan. The next step builds it anew, since the reason may have vanished.
        left: the parameters that no kernel serves, and why.

    Raises:
        RuntimeError: with the reason. Nothing has changed.
    """
    reasons = [why for param, why in left if shared.settings.extras.has_master(param)]
    if reasons:
        plan.forget()
        raise RuntimeError(
            f"master_weights=True, and no kernel can update {len(reasons)} of the bfloat16 "
            f"parameters: {reasons[0]}"
        )


def refuse_torchs_step(shared: Shared, *, has_arguments: bool) -> None:
    """Raise if parameters have masters, which the wrapped optimizer's own step cannot update.

    Args:
        shared: the optimizer.
        has_arguments: whether the step has arguments beside a closure.

    Raises:
        RuntimeError: with the reason. Nothing has changed.
    """
    settings, serving = shared.settings, shared.serving
    if not any(map(settings.extras.has_master, parameters_of(settings.optimizer))):
        return
    rule = rule_for(settings.optimizer)
    if has_arguments:
        reason = "step() got arguments beside the closure; leave them out"
    elif isinstance(rule, str):
        reason = rule
    elif serving.traits is None:
        reason = serving.reason
    else:
        reason = "no parameter is on a device that the kernels serve, or the step was replaced"
    raise RuntimeError(
        f"master_weights=True needs the fused kernels, and the wrapped step would run: {reason}"
    )
