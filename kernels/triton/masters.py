"""A float32 master in two halves of 16 bits: the bfloat16 parameter, and the rest.

:mod:`clr_optim.masters` is the same formula in torch's operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["join", "split"]


@triton.jit
def join(param, rest):
    """Return the masters, float32, of the bits of parameters and rests, int16."""
    upper = param.to(tl.int32) << 16
    rounded = upper.to(tl.float32, bitcast=True)
    master = (upper + rest.to(tl.int32)).to(tl.float32, bitcast=True)
    # Only a rest that is none of this zero or infinity makes NaN of it: other code has written it.
    return tl.where(master == master, master, rounded)


@triton.jit
def split(master):
    """Return the bits of parameters and rests, int16: the master rounded, ties away from zero."""
    bits = master.to(tl.int32, bitcast=True)
    # Rounding could make an infinity of NaN, and takes no rest of NaN.
    bits = tl.where(master == master, bits, 0x7FC00000)
    return ((bits + 0x8000) >> 16).to(tl.int16), bits.to(tl.int16)
