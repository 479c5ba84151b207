"""Random numbers from counters: the same on every device, and known without a generator's state.

A captured graph draws other numbers at each replay if its counters move on the device. A resumed
run draws the numbers of an uninterrupted one, since a checkpoint has the counters.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

__all__ = ["CROPS", "GATES", "draw"]

#: The numbers of the augmentation and of stochastic depth, which must not repeat each other.
CROPS, GATES = 0, 1

_MASK = 0xFFFFFFFF
_Whole = TypeVar("_Whole", int, Tensor)


def draw(seed: int, kind: int, counts: Tensor) -> Tensor:
    """Return one random whole number in [0, 2**32) per counter.

    Args:
        seed: of the run, an integer >= 0.
        kind: :data:`CROPS` or :data:`GATES`. Each kind has other numbers.
        counts: int64, from 0 to 2**32 - 1, of any shape.

    Returns:
        int64 numbers of the shape and on the device of ``counts``.

    Source: the finalizer of A. Appleby's MurmurHash3, applied twice, with a key in between.
    """
    key = _mix(2 * seed + kind + 1)
    return _mix(_mix(counts) ^ key)


def _mix(x: _Whole) -> _Whole:
    x = x ^ (x >> 16)
    x = _times(x, 0x85EBCA6B)
    x = x ^ (x >> 13)
    x = _times(x, 0xC2B2AE35)
    return x ^ (x >> 16)


def _times(x: _Whole, factor: int) -> _Whole:
    """Multiply modulo 2**32, by halves of ``x``: a product of 64 bits would overflow int64."""
    low, high = x & 0xFFFF, x >> 16
    return (low * factor + ((high * factor & 0xFFFF) << 16)) & _MASK
