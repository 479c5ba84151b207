"""Read and write the rate of one parameter group; read the bounds of its momentum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from clr_optim.checks import shown
from clr_optim.keys import BASE_MOMENTUM, MAX_MOMENTUM

__all__ = [
    "check_tensor_lr",
    "fill",
    "momentum_bounds",
    "never_driven",
    "write_rate",
    "written_rate",
]


def check_tensor_lr(lr: object, name: str) -> None:
    """Raise for a tensor that cannot hold a rate."""
    if isinstance(lr, Tensor) and (not lr.is_floating_point() or lr.numel() != 1 or lr.is_meta):
        raise ValueError(
            f"{name} must be a number or a floating point tensor of one element, got {shown(lr)}"
        )


def written_rate(lr: object, index: int) -> float:
    """Return the number that other code wrote into a group's ``lr``.

    Args:
        lr: the value in the group.
        index: the number of the group, for the message.
    """
    try:
        return float(cast("float", lr))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(
            f"lr in parameter group {index} must be a number or a tensor of one element, got "
            f"{shown(lr)}: leave it to the policy"
        ) from error


@torch.no_grad()
def fill(tensor: Tensor, value: float) -> None:
    """Write a rate or a momentum into a tensor, at most the largest number of its dtype."""
    largest = torch.finfo(tensor.dtype).max
    tensor.fill_(max(-largest, min(value, largest)))


def never_driven(_: Tensor) -> bool:
    """Return False: the device has written no rate."""
    return False


def write_rate(
    group: dict[str, Any],
    lr: object,
    rate: float,
    taken: set[int],
    is_driven: Callable[[Tensor], bool],
    *,
    kept: bool,
) -> tuple[object, float]:
    """Write a rate into a group; return the object in ``lr`` and its value.

    Args:
        group: the group.
        lr: the object for ``group["lr"]``. A tensor is filled in place; another object is replaced
            by a float, even if other code has put a tensor there.
        rate: the rate.
        taken: ids of the tensors that serve other groups; the group's tensor is added.
        is_driven: returns whether the device has already written the rate into a tensor.
        kept: whether the device keeps the rate current, so that ``lr`` must be a tensor.
    """
    if kept and not isinstance(lr, Tensor):
        lr = torch.tensor(rate, device=group["params"][0].device, dtype=torch.float32)
    if not isinstance(lr, Tensor):
        group["lr"] = rate
        return rate, rate
    if id(lr) in taken:  # torch's default, which groups share
        lr = lr.detach().clone()
    taken.add(id(lr))
    if not (kept and is_driven(lr)):
        fill(lr, rate)
    group["lr"] = lr
    return lr, lr.item() if lr.device.type == "cpu" and not kept else rate


def momentum_bounds(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return the bounds of a group's cycled momentum."""
    return group[BASE_MOMENTUM], group[MAX_MOMENTUM]
