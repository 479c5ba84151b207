"""The gate of a step: the factor of its gradients, and whether the step is skipped.

The gate is two float64 on the device; with ``skip_above``, five of statistics follow. If the gate
is closed, the step does nothing. With clipping, ``skip_above`` or a GradScaler, these kernels fill
the gate before the update, and the host need not read it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clr_optim.gate import FLOOR, LARGEST
from clr_optim.kernels.triton.prepare import AT_NUMEL, COLUMNS

__all__ = ["judge", "open_gate", "sum_of_squares"]

_ROW: tl.constexpr = tl.constexpr(len(COLUMNS))
_FLOOR: tl.constexpr = tl.constexpr(FLOOR)
_LARGEST: tl.constexpr = tl.constexpr(LARGEST)


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
    left = tl.minimum(tl.load(rows + row * _ROW + AT_NUMEL) - begin, blocks * BLOCK).to(tl.int32)
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


@triton.jit
def judge(norm, overflowed, limits, statistics):
    """Return whether a step is skipped, and take its norm into the statistics.

    :meth:`clr_optim.gate.Gate.closes` is the same formula on the host, bit for bit.

    Args:
        norm: the norm of all gradients, float64.
        overflowed: whether a GradScaler has found an overflow, which does not count.
        limits: float64: the limit, sigmas, window and warmup.
        statistics: float64, see :data:`clr_optim.gate.Statistics`; overwritten.
    """
    window = tl.load(limits + 2)
    count, mean, variance = tl.load(statistics), tl.load(statistics + 1), tl.load(statistics + 2)
    in_a_row, skipped = tl.load(statistics + 3), tl.load(statistics + 4)
    is_finite = norm <= _LARGEST
    is_small = is_finite & (norm <= tl.load(limits))
    deviation = tl.maximum(tl.sqrt(variance), mean * _FLOOR)
    is_spike = is_small & (count >= tl.load(limits + 3))
    is_spike = is_spike & (norm > mean + tl.load(limits + 1) * deviation)
    starts_anew = is_spike & (in_a_row >= window)
    closes = ~is_small | (is_spike & (in_a_row < window))
    weight = tl.maximum(1.0 / (count + 1.0), 1.0 / window)
    distance = norm - mean
    new_mean = mean + weight * distance
    new_variance = (1.0 - weight) * (variance + weight * (distance * distance))
    counts = (norm != 0) & ~overflowed
    is_taken, is_normal = counts & ~closes, counts & ~closes & ~starts_anew
    new_count = tl.where(is_normal, count + 1.0, tl.where(is_taken, 1.0, count))
    tl.store(statistics, new_count)
    tl.store(statistics + 1, tl.where(is_normal, new_mean, tl.where(is_taken, norm, mean)))
    tl.store(statistics + 2, tl.where(is_normal, new_variance, tl.where(is_taken, 0.0, variance)))
    row = tl.where(counts & closes & is_spike, in_a_row + 1.0, in_a_row)
    tl.store(statistics + 3, tl.where(is_taken, 0.0, row))
    tl.store(statistics + 4, tl.where(counts & closes, skipped + 1.0, skipped))
    return closes


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["sums", "limits", "grad_scale", "found_inf", "norm", "gate"],
)
def open_gate(
    sums, count, limits, grad_scale, found_inf, norm, gate,
    CLIPS: tl.constexpr, SKIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill the gate: the factor of this step's gradients, and whether the step is skipped.

    One program does this.

    Args:
        sums, count: sums of squares, float64, and their number.
        limits: float64, the largest norm, since a larger one is clipped; then those of
            :func:`judge`.
        grad_scale, found_inf: float32, from a GradScaler: the factor that the gradients in memory
            carry, and 0 unless a gradient is infinite or NaN.
        norm: receives the norm.
        gate: float64, receives the results; the statistics of :func:`judge` follow.
        CLIPS: whether ``sums`` and ``limits`` count.
        SKIPS: whether the norm may close the gate.
    """
    factor = 1.0 / tl.load(grad_scale).to(tl.float64)
    closed = tl.load(found_inf).to(tl.float64)
    if CLIPS:
        lanes = tl.arange(0, BLOCK)
        sum = tl.zeros([BLOCK], dtype=tl.float64)
        for begin in range(0, count, BLOCK):
            sum += tl.load(sums + begin + lanes, mask=begin + lanes < count, other=0.0)
        length = tl.sqrt(tl.sum(sum, axis=0))
        rounded = length.to(norm.dtype.element_ty)
        tl.store(norm, rounded)
        clip = tl.load(limits) / (length + 1e-6)
        factor = tl.where(clip > 1.0, factor, factor * clip)  # NaN stays NaN
        if SKIPS:
            closes = judge(rounded.to(tl.float64), closed != 0, limits + 1, gate + 2)
            closed = tl.where(closes & (closed == 0), 1.0, closed)
    tl.store(gate, factor)
    tl.store(gate + 1, closed)
