"""A row: one parameter with the state tensors that a kernel updates beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clr_optim.plan.eligible import is_plain
from clr_optim.plan.reading import Reading
from clr_optim.rules import UpdateRule

__all__ = ["Row", "make_row"]


@dataclass(eq=False)
class Row:
    """A parameter of a bucket, with its state.

    Args:
        param: the parameter.
        group: the number of its group.
        slots: its state tensors, in the kernel's order.
        counter: ``state["step"]``, or None if the rule counts no steps.
        pending: state that torch would create in this step, by name.
        first: whether the first slot holds nothing yet.
    """

    param: Tensor
    group: int
    slots: list[Tensor]
    counter: Tensor | None
    pending: dict[str, Tensor]
    first: bool

    @property
    def state_tensors(self) -> list[Tensor]:
        """The slots, and the step counter if the row has one."""
        return self.slots if self.counter is None else [*self.slots, self.counter]


def make_row(
    param: Tensor,
    group: int,
    reading: Reading,
    *,
    optimizer: Optimizer,
    rule: UpdateRule,
    device: str,
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
    """
    # optimizer.state[param] would create an entry earlier than torch does.
    state = optimizer.state.get(param, {})
    if not isinstance(state, dict):
        return "state that is no dictionary"
    fresh = len(state) == 0
    pending: dict[str, Tensor] = {}
    counter = None
    if rule.has_step:
        if fresh:
            counter = pending["step"] = _new_counter(param, reading)
        else:
            counter = _counter_in(state, param, device)
            if counter is None:
                return "a step counter that is no float tensor on the CPU"
    slots: list[Tensor] = []
    first = False
    for slot in reading.slots:
        tensor: Any = state.get(slot.name)
        if tensor is None and (fresh or slot.fill is None):
            if slot.fill is None:
                tensor, first = torch.empty_like(param, requires_grad=False), True
            else:
                value = slot.fill(optimizer.defaults)
                tensor = torch.full_like(param, value, requires_grad=False)
            pending[slot.name] = tensor
        elif not is_plain(tensor, param):
            return f"state[{slot.name!r}] of another layout, dtype or type than its parameter"
        slots.append(tensor)
    ordered = {name: pending[name] for name in rule.state_order if name in pending}
    return Row(param, group, slots, counter, ordered, first)


def _new_counter(param: Tensor, reading: Reading) -> Tensor:
    """Return a step counter as torch's ``_get_scalar_dtype`` makes it, beside its parameter."""
    wide = torch.get_default_dtype() == torch.float64 and not reading.fused
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=param.device)


def _counter_in(state: dict[str, Any], param: Tensor, device: str) -> Tensor | None:
    """Return the step counter in this state, or None if a kernel cannot use it.

    Moves the counter beside its parameter, where the kernel counts. ``state_dict`` moves it back to
    where torch keeps it.
    """
    counter = state.get("step")
    if (
        type(counter) is not Tensor
        or counter.device.type not in ("cpu", device)
        or counter.dim() != 0
        or counter.is_neg()
        or counter.dtype not in (torch.float32, torch.float64)
    ):
        return None
    if counter.device != param.device:
        counter = state["step"] = counter.to(param.device)
    return counter
