"""Mastered: the float32 masters of an optimizer's bfloat16 parameters, to save and to load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clr_optim.backends import rule_for
from clr_optim.checks import shown
from clr_optim.core.averaged import Averaged
from clr_optim.core.serving import parameters_of
from clr_optim.core.shared import alone
from clr_optim.core.wrapper import OptimizerT
from clr_optim.keys import REST
from clr_optim.masters import master_of, split
from clr_optim.plan import state_with_rest
from clr_optim.sharding import local_part, same_spread

__all__ = ["Mastered"]


class Mastered(Averaged[OptimizerT]):
    """A wrapper whose steps may keep a float32 master of each bfloat16 parameter."""

    @alone
    def master_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return a model's state dict with float32 masters in place of bfloat16 parameters.

        Load the result into the same model in float32: training in float32 would have reached these
        values.

        Args:
            model: the module whose parameters this optimizer updates.

        Returns:
            As :meth:`torch.nn.Module.state_dict`, with copies of all tensors. A parameter that no
            step has updated yet is its own master.

        Raises:
            RuntimeError: if ``master_weights`` is ``False``, within :meth:`averaged`, and between a
                backward pass with :meth:`step_in_backward` and ``step()``.
            ValueError: if no bfloat16 parameter of the model belongs to this optimizer.

        Example:
            >>> model = torch.nn.Linear(2, 1).to(torch.bfloat16)
            >>> inner = torch.optim.AdamW(model.parameters())
            >>> opt = CyclicalOptimizer(inner, master_weights=True)
            >>> opt.master_state_dict(model)["weight"].dtype
            torch.float32
        """
        found = self._find_mastered(model, "master_state_dict()")
        copies: dict[str, Any] = model.state_dict()
        for name, value in copies.items():
            if isinstance(value, Tensor):
                param = found.get(name)
                dtype = value.dtype if param is None else torch.float32
                copies[name] = copied = value.detach().to(dtype, copy=True)
                if param is not None:
                    local_part(copied).copy_(master_of(param, self.state.get(param) or {}))
        return copies

    @alone
    def load_master_state_dict(self, model: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
        """Load a model's state dict whose float32 values become the masters, exactly.

        ``model.load_state_dict`` would round them. This works before the first step, and with the
        state dict of a float32 model. If the optimizer has a checkpoint too, load that first.

        Args:
            model: the module whose parameters this optimizer updates.
            state_dict: as :meth:`master_state_dict` returns it.

        Raises:
            RuntimeError: if ``master_weights`` is ``False``, within :meth:`averaged`, and between a
                backward pass with :meth:`step_in_backward` and ``step()``.
            TypeError, ValueError: if the keys are not the model's, or if a tensor has another
                shape, is not float32 or is not dense. Nothing has changed.

        Example:
            >>> model = torch.nn.Linear(2, 1).to(torch.bfloat16)
            >>> inner = torch.optim.AdamW(model.parameters())
            >>> opt = CyclicalOptimizer(inner, master_weights=True)
            >>> opt.load_master_state_dict(model, torch.nn.Linear(2, 1).state_dict())
        """
        found = self._find_mastered(model, "load_master_state_dict()")
        _check_masters(model, state_dict, found)
        settings = self._shared.settings
        rule = rule_for(settings.optimizer)
        if isinstance(rule, str):
            raise RuntimeError(f"load_master_state_dict() needs the fused kernels: {rule}")
        self._shared.ordinary.leave()
        if self._shared.serving.fused is not None:
            self._shared.serving.fused.plan.forget()  # a row may have a draft of its state
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        model.load_state_dict(state_dict)
        for name, param in found.items():
            if REST not in (self.state.get(param) or {}):
                whole = state_with_rest(param, groups[id(param)], settings.optimizer, rule)
                self.state[param].update(whole)
            master = local_part(state_dict[name]).to(local_part(param).device)
            split(master, local_part(param), local_part(self.state[param][REST]))

    def _find_mastered(self, model: torch.nn.Module, what: str) -> dict[str, Tensor]:
        """Return the parameters of a model that have masters here, by their names.

        Args:
            model: the module.
            what: the method that the user has called.
        """
        shared = self._shared
        settings = shared.settings
        shared.refuse_unsettled(what)
        if not settings.master_weights:
            raise RuntimeError(
                f"{what} needs float32 masters, which this optimizer does not keep: construct it "
                "with master_weights=True"
            )
        own = {id(param) for param in parameters_of(settings.optimizer)}
        values: Mapping[str, Any] = model.state_dict(keep_vars=True)
        found = {
            name: value
            for name, value in values.items()
            if id(value) in own and settings.extras.has_master(value)
        }
        if not found:
            raise ValueError(
                f"model must hold bfloat16 parameters of this optimizer, and the "
                f"{type(model).__name__} holds none: give the model that it trains"
            )
        return found


def _check_masters(model: torch.nn.Module, state_dict: object, found: Mapping[str, Tensor]) -> None:
    """Raise unless a state dict fits a model, and holds masters of its parameters.

    Args:
        model: the module.
        state_dict: the state dict.
        found: the parameters with masters, by name.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be a dictionary from master_state_dict(), got {shown(state_dict)}"
        )
    values: Mapping[str, Any] = model.state_dict(keep_vars=True)
    if state_dict.keys() != values.keys():
        absent = sorted(values.keys() - state_dict.keys())
        unknown = sorted(map(str, state_dict.keys() - values.keys()))
        raise ValueError(
            f"state_dict must have the keys of the {type(model).__name__}: it lacks {absent}, and "
            f"has {unknown} beside them; give what master_state_dict() of such a model returned"
        )
    for name, value in values.items():
        given = state_dict[name]
        is_tensor = isinstance(given, Tensor)
        if isinstance(value, Tensor) and not (is_tensor and given.shape == value.shape):
            raise ValueError(
                f"state_dict[{name!r}] must be a tensor of shape {list(value.shape)}, got "
                f"{shown(given)}: give the state dict of a model of the same shapes"
            )
    for name, param in found.items():
        given = state_dict[name]
        if given.dtype != torch.float32 or not same_spread(given, param):
            raise ValueError(
                f"state_dict[{name!r}] must be float32, divided over the ranks as its parameter, "
                f"got {shown(given)}: load other dtypes by model.load_state_dict"
            )
        if given.layout != torch.strided or given.is_meta:
            raise ValueError(
                f"state_dict[{name!r}] must be a dense tensor with values, got {shown(given)}: "
                "give tensors as master_state_dict() returns them"
            )
