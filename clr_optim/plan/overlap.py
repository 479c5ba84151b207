"""Which tensors share memory. torch updates one tensor after the other, a kernel all at once."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clr_optim.sharding import local_part

__all__ = ["Memory", "overlap", "sharing"]


class Memory:
    """The memory of tensors, as disjoint spans of addresses in ascending order.

    Args:
        tensors: the tensors. They may share memory with each other.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._spans: list[tuple[int, int]] = []
        for begin, end in sorted(filter(None, map(_span, tensors))):
            if self._spans and begin < self._spans[-1][1]:
                first, last = self._spans[-1]
                self._spans[-1] = (first, max(last, end))
            else:
                self._spans.append((begin, end))

    def add(self, tensors: Iterable[Tensor]) -> bool:
        """Add tensors one by one; stop and return False at the first that shares memory."""
        for span in filter(None, map(_span, tensors)):
            place = bisect_left(self._spans, span)
            if place and self._spans[place - 1][1] > span[0]:
                return False
            if place < len(self._spans) and self._spans[place][0] < span[1]:
                return False
            insort(self._spans, span)
        return True

    def remove(self, spans: Iterable[tuple[int, int]]) -> bool:
        """Remove spans one by one; stop and return False at the first unknown span."""
        for span in spans:
            place = bisect_left(self._spans, span)
            if self._spans[place : place + 1] != [span]:
                return False
            del self._spans[place]
        return True


def sharing(owners: Sequence[Sequence[Tensor]]) -> set[int]:
    """Return which owners share memory with another owner, or have two tensors in one place.

    Args:
        owners: the tensors of each owner.

    Returns:
        Indices of ``owners``.
    """
    spans = [
        (*span, owner)
        for owner, tensors in enumerate(owners)
        for span in map(_span, tensors)
        if span is not None
    ]
    spans.sort()
    found: set[int] = set()
    last, holder = 0, -1
    for begin, end, owner in spans:
        if begin < last:
            found |= {owner, holder}
        if end > last:
            last, holder = end, owner
    return found


def overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors share memory."""
    a, b = _span(one), _span(other)
    return a is not None and b is not None and a[0] < b[1] and b[0] < a[1]


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """Return the addresses of a tensor's first byte and past its last; None without memory."""
    part = local_part(tensor)
    if part.layout is not torch.strided or not part.numel():
        return None
    if part.is_contiguous():
        size = part.nbytes
    else:
        reach = sum((n - 1) * s for n, s in zip(part.shape, part.stride(), strict=True))
        size = (1 + reach) * part.element_size()
    begin = part.data_ptr()
    return begin, begin + size
