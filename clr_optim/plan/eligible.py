"""Why no kernel serves a tensor: checks of parameters, gradients and state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from clr_optim.plan.overlap import overlap
from clr_optim.rules import UpdateRule
from clr_optim.sharding import local_part, same_spread, why_not_local

__all__ = ["DTYPES", "classify", "is_plain", "why_not"]

#: Dtypes that kernels serve, in the order of ``Dtype`` in kernels.h; a test compares.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not(param: Tensor, grad: Tensor | None, device: str) -> str | None:
    """Return why a kernel cannot update a parameter with this gradient, or None.

    Args:
        param: the parameter.
        grad: its gradient, which the caller reads once, since another thread may replace it.
        device: the type of the devices that the kernels serve.
    """
    why = why_not_local(param)
    if why is not None:
        return why
    whole, param = param, local_part(param)
    if type(param) not in (Tensor, torch.nn.Parameter):
        return f"tensors of type {type(param).__name__}"
    if param.device.type != device:
        return f"tensors on {param.device.type}"
    if param.layout is not torch.strided or param.dtype not in DTYPES:
        return f"{str(param.dtype).removeprefix('torch.')} {param.layout} tensors"
    if not _is_dense(param):
        return "parameters whose memory has gaps or overlaps"
    if param.is_neg():
        return "parameters that are lazy negations"
    if grad is None:
        return None
    if is_plain(grad, whole):
        shares = overlap(grad, param)
        return "gradients in the memory of their parameter" if shares else None
    if not same_spread(grad, whole):
        return "gradients divided over the ranks in another way than their parameter"
    if grad.layout is not torch.strided:
        return "sparse gradients"
    return "gradients of another layout, dtype or type than their parameter"


def is_plain(tensor: object, param: Tensor, dtype: torch.dtype | None = None) -> TypeGuard[Tensor]:
    """Return whether a kernel may read this tensor element by element with its parameter.

    Args:
        tensor: the tensor.
        param: the parameter.
        dtype: the dtype that the tensor must have; None is that of the parameter.
    """
    if not isinstance(tensor, Tensor) or not same_spread(tensor, param):
        return False
    tensor, param = local_part(tensor), local_part(param)
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device == param.device
        and tensor.dtype == (dtype or param.dtype)
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and _same_layout(tensor, param)
    )


def classify(
    groups: Iterable[Mapping[str, Any]],
    rule: UpdateRule,
    device: str,
    *,
    capturable: bool = False,
) -> dict[str | None, list[Tensor]]:
    """Return the parameters by the reason why no kernel serves them; None: a kernel does."""
    reasons: dict[str | None, list[Tensor]] = {}
    for group in groups:
        why = rule.not_fused(group, capturable=capturable)
        for param in group["params"]:
            reasons.setdefault(why or why_not(param, param.grad, device), []).append(param)
    return reasons


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the tensor fills its memory without gaps or overlaps, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_layout(tensor: Tensor, param: Tensor) -> bool:
    if tensor.shape != param.shape:
        return False
    if param.is_contiguous():
        return tensor.is_contiguous()
    return tensor.stride() == param.stride()
