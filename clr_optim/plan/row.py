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
        first: whether a slot is empty, since it starts as the first gradient.
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
    fresh = not state
    pending: dict[str, Tensor] = {}
    numbers: list[Tensor] = []
    for name, value in rule.numbers.items():
        number: Tensor | None
        if fresh:
            number = pending[name] = _new_number(value, param, fused=reading.fused)
        else:
            number = _take_number(state, name, param, device)
        if number is None:
            what = "a step counter" if name == "step" else f"state[{name!r}]"
            return f"{what} that is no float tensor on the CPU"
        numbers.append(number)
    has_master = extras.has_master(param)
    step = numbers[0] if rule.has_step else None
    kinds = (*reading.slots, *extras.slots_for(param))
    slots: list[Tensor] = []
    first = False
    for slot in kinds:
        found = slot.find(state, param) if isinstance(slot, AverageSlot) else state.get(slot.name)
        # torch's own step takes state of any layout, but cannot serve a master: copy the state.
        tensor = _laid_as(param, found) if has_master else found
        slot_tensor: Tensor | str
        if isinstance(slot, AverageSlot):
            slot_tensor = _average(slot, tensor, param, state, has_master=has_master)
        elif isinstance(slot, RestSlot):
            slot_tensor = _rest(slot, tensor, param)
        elif found is None and (fresh or slot.fill is None):
            slot_tensor = _new(slot, param, has_master=has_master, optimizer=optimizer)
        elif has_master:
            slot_tensor = _wide_rule_slot(slot, tensor, param, state, step, optimizer)
        else:
            slot_tensor = _rule_slot(slot, tensor, param)
        if isinstance(slot_tensor, str):
            return slot_tensor
        if slot_tensor is not found:
            pending[slot.name] = slot_tensor
        first = first or (found is None and slot.fill is None)
        slots.append(slot_tensor)
    order = (*rule.state_order, REST, AVERAGE)
    ordered = {name: pending[name] for name in order if name in pending}
    return Row(param, group, kinds, slots, numbers, ordered, first)


# Each of the following returns the tensor of a slot, or why a kernel cannot use the given one. The
# result is the given tensor, or a new one, which make_row adds to the pending state.


def _average(
    slot: AverageSlot, tensor: Any, param: Tensor, state: dict[str, Any], *, has_master: bool
) -> Tensor | str:
    """Return the average of a parameter; a new one is a copy of the parameter or of its master."""
    dtype = slot.dtype_for(param)
    if tensor is None:
        tensor = param.detach().to(dtype, copy=True)
        if has_master:
            local_part(tensor).copy_(master_of(param, state))
    if is_plain(tensor, param, dtype):
        return tensor
    return "an average of another layout or type than its parameter"


def _rest(slot: RestSlot, tensor: Any, param: Tensor) -> Tensor | str:
    """Return the rest of a parameter's master; a new one is zero."""
    if tensor is None:
        return torch.zeros_like(param, requires_grad=False)
    return tensor if is_plain(tensor, param) else _other_than(slot.name, tensor, param.dtype)


def _rule_slot(slot: Slot, tensor: Any, param: Tensor) -> Tensor | str:
    """Return the given slot of the rule, of a parameter without a master."""
    if is_plain(tensor, param):
        return tensor
    return f"state[{slot.name!r}] of another layout, dtype or type than its parameter"


def _wide_rule_slot(
    slot: Slot,
    tensor: Any,
    param: Tensor,
    state: dict[str, Any],
    step: Tensor | None,
    optimizer: Optimizer,
) -> Tensor | str:
    """Return the given slot of the rule in float32, of a parameter with a master.

    While the state has no rest, no step with masters has run, and the slot may be bfloat16.
    """
    if is_plain(tensor, param, torch.float32):
        return tensor
    if tensor is None:
        return f"its state lacks {slot.name!r}; delete the parameter's state to begin anew"
    if REST in state or not is_plain(tensor, param):
        return _other_than(slot.name, tensor, torch.float32)
    return _widened(tensor, slot, step, optimizer.defaults)


def _laid_as(param: Tensor, tensor: Any) -> Any:
    """Return a state tensor in its parameter's memory layout: a copy if the layouts differ.

    Other code may have changed the parameter's layout (``memory_format``), or the layout of a
    checkpoint is another.
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
) -> dict[str, Any]:
    """Return a parameter's state with the rest of its master, as a step would find it.

    Args:
        param: a parameter that has a master, and no rest yet.
        group: its group.
        optimizer: the wrapped optimizer.
        rule: its update rule.
    """
    state: dict[str, Any] = dict(optimizer.state.get(param) or {})
    is_new = not state
    for name, value in rule.numbers.items() if is_new else ():
        state[name] = _new_number(value, param, fused=bool(group.get("fused")))
    for slot in rule.slots(group):
        tensor = state.get(slot.name)
        if is_new:
            state[slot.name] = _filled(slot, param, torch.float32, optimizer.defaults)
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


def _new(slot: Slot, param: Tensor, *, has_master: bool, optimizer: Optimizer) -> Tensor:
    """Return a new slot of the rule; without values if the slot starts as the first gradient."""
    dtype = torch.float32 if has_master else param.dtype
    filled = _filled(slot, param, dtype, optimizer.defaults)
    return torch.empty_like(param, dtype=dtype, requires_grad=False) if filled is None else filled


def _new_number(value: float, param: Tensor, *, fused: bool) -> Tensor:
    """Return a tensor of the dtype of torch's ``_get_scalar_dtype``, beside its parameter."""
    wide = torch.get_default_dtype() == torch.float64 and not fused
    dtype = torch.float64 if wide else torch.float32
    return torch.full((), value, dtype=dtype, device=param.device)


def _take_number(state: dict[str, Any], name: str, param: Tensor, device: str) -> Tensor | None:
    """Return a state of one element, or None if a kernel cannot use it.

    A number elsewhere, or of 16 bits, is replaced in the state by a copy beside the parameter.
    ``state_dict`` moves it back to where torch keeps it.
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
