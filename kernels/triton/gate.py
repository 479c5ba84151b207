"""The gate of a step: the factor of its gradients, and whether they overflowed.

The gate is two float64 on the device. After an overflow the step does nothing. With clipping or a
GradScaler, these kernels fill the gate before the update, and the host need not read it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clr_optim.kernels.triton.prepare import COLUMNS

__all__ = ["open_gate", "sum_of_squares"]

_ROW: tl.constexpr = tl.constexpr(len(COLUMNS))


@triton.jit(
    do_not_specialize=["blocks"],
    do_not_specialize_on_alignment=["chunks", "rows", "gradients", "grad_scale", "sums"],
)
def sum_of_squares(
    chunks, rows, gradients, blocks, grad_scale, sums, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the squares of one chunk of one gradient, in a fixed order.

    Args:
        chunks, rows, gradients, blocks: as for :func:`~.multi_tensor.multi_tensor`.
        grad_scale: float32, divided out first: squares of scaled gradients may exceed float32.
        sums: float64, one per program; 0 for a row without a gradient.
        DTYPE: the dtype of the gradients.
        BLOCK: elements per block.
    """
    A: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    chunks += tl.program_id(0).to(tl.int64) * 2
    row = tl.load(chunks).to(tl.int64)
    address = tl.load(gradients + row)
    begin = tl.load(chunks + 1).to(tl.int64) * blocks * BLOCK
    left = tl.minimum(tl.load(rows + row * _ROW + 7) - begin, blocks * BLOCK).to(tl.int32)
    left = tl.where(address != 0, left, 0)
    full = tl.where(address & 15 == 0, left // BLOCK, 0)
    scale = (1.0 / tl.load(grad_scale).to(tl.float64)).to(A)
    lanes = tl.arange(0, BLOCK)
    sum = tl.zeros([BLOCK], dtype=A)
    if full > 0:
        aligned = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16) + begin
        for i in range(0, full):
            grad = tl.load(aligned + (i * BLOCK + lanes)).to(A) * scale
            sum = tl.fma(grad, grad, sum)
    g = address.to(tl.pointer_type(DTYPE)) + begin
    for i in range(full, tl.cdiv(left, BLOCK)):
        at = i * BLOCK + lanes
        grad = tl.load(g + at, mask=at < left, other=0.0).to(A) * scale
        sum = tl.fma(grad, grad, sum)
    tl.store(sums + tl.program_id(0), tl.sum(sum.to(tl.float64), axis=0))


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["sums", "limit", "grad_scale", "found_inf", "norm", "gate"],
)
def open_gate(
    sums, count, limit, grad_scale, found_inf, norm, gate, CLIPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Fill the gate: the factor of this step's gradients, and whether they overflowed.

    One program does this.

    Args:
        sums, count: sums of squares, float64, and their number.
        limit: float64, the largest norm; a larger one is clipped.
        grad_scale, found_inf: float32, from a GradScaler: the factor that the gradients in memory
            carry, and 0 unless a gradient is infinite or NaN.
        norm: receives the norm.
        gate: float64, receives the results.
        CLIPS: whether ``sums`` and ``limit`` count.
    """
    factor = 1.0 / tl.load(grad_scale).to(tl.float64)
    if CLIPS:
        lanes = tl.arange(0, BLOCK)
        sum = tl.zeros([BLOCK], dtype=tl.float64)
        for begin in range(0, count, BLOCK):
            sum += tl.load(sums + begin + lanes, mask=begin + lanes < count, other=0.0)
        length = tl.sqrt(tl.sum(sum, axis=0))
        tl.store(norm, length.to(norm.dtype.element_ty))
        clip = tl.load(limit) / (length + 1e-6)
        factor = tl.where(clip > 1.0, factor, factor * clip)  # NaN stays NaN
    tl.store(gate, factor)
    tl.store(gate + 1, tl.load(found_inf).to(tl.float64))
