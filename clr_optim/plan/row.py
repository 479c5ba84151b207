"""A row: one parameter with the state tensors that a kernel updates beside it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.averages import Average, slot_of
from clr_optim.keys import AVERAGE, REST
from clr_optim.masters import master_of
from clr_optim.plan.eligible import is_plain
from clr_optim.plan.reading import Reading
from clr_optim.rules import AverageSlot, RestSlot, Slot, UpdateRule
from clr_optim.sharding import local_part, same_spread

__all__ = ["NO_EXTRAS", "Extras", "Row", "make_row", "state_with_rest"]

_WIDE, _NARROW = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Extras:
    """The state that steps keep beside torch's.

    Args:
        average: which average of the parameters the steps keep, if any.
        masters: whether bfloat16 parameters have float32 masters.
    """

    average: Average | None = None
    masters: bool = False

    @functools.cached_property
    def average_slot(self) -> AverageSlot | None:
        """The slot of the averages, if the steps keep any."""
        return slot_of(self.average, masters=self.masters)

    def slots_for(self, param: Tensor) -> tuple[Slot, ...]:
        """Return the slots of a parameter after those of its rule, in a row's order."""
        rest = (RestSlot(),) if self.has_master(param) else ()
        return rest if self.average_slot is None else (*rest, self.average_slot)

    def has_master(self, param: Tensor) -> bool:
        """Return whether a parameter has a float32 master."""
        return self.masters and param.dtype == torch.bfloat16

    def rule_dtype(self, param: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's state that belongs to its rule."""
        return torch.float32 if self.has_master(param) else param.dtype


NO_EXTRAS = Extras()


@dataclass(eq=False)
class Row:
    """A parameter of a bucket, with its state.

    Args:
        param: the parameter.
        group: the number of its group.
        kinds: what its state tensors are: the slots of the rule in the kernel's order, then the
            rest of the master, then the average.
        slots: its state tensors, in this order.
        numbers: its state of one element, in the order of :attr:`UpdateRule.numbers`.
        pending: state that torch would create in this step, by name.
        first: whether the first slot holds nothing yet.
    """

    param: Tensor
    group: int
    kinds: tuple[Slot, ...]
    slots: list[Tensor]
    numbers: list[Tensor]
    pending: dict[str, Tensor]
    first: bool

    @property
    def state_tensors(self) -> list[Tensor]:
        """The slots and the state of one element."""
        return [*self.slots, *self.numbers]


def make_row(
    param: Tensor,
    group: int,
    reading: Reading,
    *,
    optimizer: Optimizer,
    rule: UpdateRule,
    device: str,
    extras: Extras = NO_EXTRAS,
) -> Row | str:
    """Return the row of a parameter that has a gradient, or why a kernel cannot use its state.

    State that torch would create in this step is created here, but not yet put into
    ``optimizer.state``.

    Args:
        param: the parameter.
        group: the number of its group.
        reading: the settings of its group.
        optimizer: the wrapped optimizer.
        rule: its update rule.
        device: the type of the devices that the kernels serve.
        extras: the state that steps keep beside torch's.
    """
    # optimizer.state[param] would create an entry earlier than torch does.
    state = optimizer.state.get(param, {})
    if not isinstance(state, dict):
        return "state that is no dictionary"
    fresh = len(state) == 0
    pending: dict[str, Tensor] = {}
    numbers: list[Tensor] = []
    for name, value in rule.numbers.items():
        if fresh:
            number = pending[name] = _new_number(value, param, fused=reading.fused)
        else:
            found = _number_in(state, name, param, device)
            if found is None:
                what = "a step counter" if name == "step" else f"state[{name!r}]"
                return f"{what} that is no float tensor on the CPU"
            number = found
        numbers.append(number)
    kinds = (*reading.slots, *extras.slots_for(param))
    of_rule = extras.rule_dtype(param)
    slots: list[Tensor] = []
    first = False
    for slot in kinds:
        tensor: Any = state.get(slot.name)
        if isinstance(slot, AverageSlot):
            tensor = slot.find(state, param)
        laid = _laid_as(param, tensor) if extras.has_master(param) else tensor
        if laid is not tensor:
            tensor = pending[slot.name] = laid
        if isinstance(slot, AverageSlot):
            if tensor is None:
                tensor = pending[slot.name] = param.detach().to(slot.dtype_for(param), copy=True)
                if extras.has_master(param):
                    local_part(tensor).copy_(master_of(param, state))
            if not is_plain(tensor, param, slot.dtype_for(param)):
                return "an average of another layout or type than its parameter"
        elif isinstance(slot, RestSlot):
            if tensor is None:
                tensor = pending[slot.name] = torch.zeros_like(param, requires_grad=False)
            elif not is_plain(tensor, param):
                return _other_than(slot.name, tensor, param.dtype)
        elif tensor is None and (fresh or slot.fill is None):
            first = first or slot.fill is None
            filled = _filled(slot, param, of_rule, optimizer.defaults)
            if filled is None:
                filled = torch.empty_like(param, dtype=of_rule, requires_grad=False)
            tensor = pending[slot.name] = filled
        elif not is_plain(tensor, param, of_rule):
            if not extras.has_master(param):
                return f"state[{slot.name!r}] of another layout, dtype or type than its parameter"
            if tensor is None:
                return f"its state lacks {slot.name!r}; delete the parameter's state to begin anew"
            if REST in state or not is_plain(tensor, param):
                return _other_than(slot.name, tensor, of_rule)
            # Without a rest the optimizer has stepped without masters, or not yet.
            step = numbers[0] if rule.has_step else None
            tensor = pending[slot.name] = _widened(tensor, slot, step, optimizer.defaults)
        slots.append(tensor)
    order = (*rule.state_order, REST, AVERAGE)
    ordered = {name: pending[name] for name in order if name in pending}
    return Row(param, group, kinds, slots, numbers, ordered, first)


def _laid_as(param: Tensor, tensor: Any) -> Any:
    """Return a state tensor in its parameter's memory layout: a copy if the layouts differ.

    Other code may have changed the parameter's layout (``memory_format``), or the layout of a
    checkpoint is another. Where torch's own step serves, it takes any layout.
    """
    if (
        not isinstance(tensor, Tensor)
        or is_plain(tensor, param, tensor.dtype)
        or type(local_part(tensor)) is not Tensor
        or tensor.layout is not torch.strided
        or tensor.shape != param.shape
        or tensor.device != param.device
        or not same_spread(tensor, param)
    ):
        return tensor
    copied = torch.empty_like(param, dtype=tensor.dtype, requires_grad=False)
    return copied.copy_(tensor.detach())


def _other_than(name: str, tensor: Any, dtype: torch.dtype) -> str:
    """Return why a master's rest or the state beside a rest cannot be used."""
    found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
    return (
        f"state[{name!r}] is {found}, and beside a float32 master it must be {dtype} in the "
        "layout of its parameter; load checkpoints through the CyclicalOptimizer, since the "
        "load_state_dict() of the wrapped optimizer casts state"
    )


def _widened(
    tensor: Tensor, slot: Slot, step: Tensor | None, defaults: Mapping[str, Any]
) -> Tensor:
    """Return a slot's tensor in float32; filled anew if no step has changed the tensor.

    Args:
        tensor: the tensor in bfloat16, in which a first value such as 0.1 is rounded.
        slot: the slot.
        step: the step counter, on the device of the tensor; None if the rule has none.
        defaults: those of the optimizer.
    """
    wide = tensor.to(torch.float32)
    if step is not None and slot.fill is not None:
        # Without an answer of the device: a step must not wait.
        part = local_part(wide)
        part.copy_(torch.where(step == 0, slot.fill(defaults), part))
    return wide


def state_with_rest(
    param: Tensor,
    group: Mapping[str, Any],
    optimizer: Optimizer,
    rule: UpdateRule,
    extras: Extras,
) -> dict[str, Any]:
    """Return a parameter's state with the rest of its master, as a step would find it.

    Args:
        param: a parameter that has a master, and no rest yet.
        group: its group.
        optimizer: the wrapped optimizer.
        rule: its update rule.
        extras: the state that steps keep beside torch's.
    """
    state: dict[str, Any] = dict(optimizer.state.get(param) or {})
    is_new, dtype = not state, extras.rule_dtype(param)
    for name, value in rule.numbers.items() if is_new else ():
        state[name] = _new_number(value, param, fused=bool(group.get("fused")))
    for slot in rule.slots(group):
        tensor = state.get(slot.name)
        if is_new:
            state[slot.name] = _filled(slot, param, dtype, optimizer.defaults)
        elif isinstance(tensor, Tensor) and tensor.dtype == param.dtype:
            step = state.get("step")
            here = step.to(local_part(tensor).device) if isinstance(step, Tensor) else None
            state[slot.name] = _widened(tensor, slot, here, optimizer.defaults)
    state[REST] = torch.zeros_like(param, requires_grad=False)
    return state


def _filled(
    slot: Slot, param: Tensor, dtype: torch.dtype, defaults: Mapping[str, Any]
) -> Tensor | None:
    """Return a new slot; None if the slot starts as the first gradient."""
    if slot.fill is None:
        return None
    return torch.full_like(param, slot.fill(defaults), dtype=dtype, requires_grad=False)


def _new_number(value: float, param: Tensor, *, fused: bool) -> Tensor:
    """Return a tensor of the dtype of torch's ``_get_scalar_dtype``, beside its parameter."""
    wide = torch.get_default_dtype() == torch.float64 and not fused
    dtype = torch.float64 if wide else torch.float32
    return torch.full((), value, dtype=dtype, device=param.device)


def _number_in(state: dict[str, Any], name: str, param: Tensor, device: str) -> Tensor | None:
    """Return a state of one element, or None if a kernel cannot use it.

    Moves the tensor beside its parameter, where the kernel counts. ``state_dict`` moves the tensor
    back to where torch keeps it.
    """
    number = state.get(name)
    if (
        type(number) is not Tensor
        or number.device.type not in ("cpu", device)
        or number.dim() != 0
        or number.is_neg()
        or number.dtype not in (_WIDE if name == "step" else (*_WIDE, *_NARROW))
    ):
        return None
    # torch's load_state_dict casts all state but the counter to the dtype of the parameter.
    dtype = torch.float32 if number.dtype in _NARROW else number.dtype
    if number.device != param.device or number.dtype != dtype:
        number = state[name] = number.to(param.device, dtype)
    return number
