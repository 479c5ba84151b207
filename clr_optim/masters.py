"""Masters: a float32 value in two halves, a bfloat16 parameter and a rest of 16 bits.

The parameter is the master rounded to nearest, ties away from zero. The rest is the lower half of
the master's bits, signed: it is raw, in a tensor of dtype bfloat16, since collectives carry no
int16. :func:`join` and :func:`split` are the plain reference of the kernels, and serve on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clr_optim.keys import REST
from clr_optim.sharding import local_part

__all__ = ["join", "master_of", "split"]

_NAN, _INFINITY = 0x7FC0, 0x7F80


def join(param: Tensor, rest: Tensor) -> Tensor:
    """Return masters, float32.

    Other code may have written the parameter. If the parameter is then 0 with a negative rest, or
    infinite with a positive rest, the rest counts as 0: no master has these pairs.

    Args:
        param: bfloat16, a plain tensor.
        rest: the rest, of the parameter's shape and dtype.
    """
    upper, lower = (t.detach().view(torch.int16).to(torch.int32) for t in (param, rest))
    magnitude = upper & 0x7FFF
    is_foreign = ((magnitude == 0) & (lower < 0)) | ((magnitude == _INFINITY) & (lower > 0))
    return ((upper << 16) + lower.masked_fill_(is_foreign, 0)).view(torch.float32)


def split(master: Tensor, param: Tensor, rest: Tensor) -> None:
    """Write masters into a parameter and its rest, in place.

    Args:
        master: float32, a plain tensor.
        param: bfloat16, of the same shape; receives the rounded masters.
        rest: as ``param``; receives the rest.
    """
    bits, is_nan = master.detach().view(torch.int32), master.isnan()
    upper = ((bits + 0x8000) >> 16).masked_fill_(is_nan, _NAN)
    param.detach().view(torch.int16).copy_(upper)
    # The conversion keeps the lower 16 bits.
    rest.detach().view(torch.int16).copy_(bits.masked_fill(is_nan, 0).to(torch.int16))


def master_of(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return this rank's part of a parameter; its masters, if the state has a rest."""
    rest, local = state.get(REST), local_part(param.detach())
    return local if rest is None else join(local, local_part(rest))
