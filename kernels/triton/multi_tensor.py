"""The kernels around the update rules: one launch updates every tensor of a bucket.

A program takes a chunk of one tensor. The program reads the tensor's address from a table on the
device, evaluates the schedule at the device's own position, and updates. Triton compiles for no
value that changes from step to step: neither for the rate nor for the number of tensors.

The *gate* is two float64 on the device: ``(factor of the gradients, whether they overflowed)``.
After an overflow the step does nothing. With clipping or a GradScaler, :func:`sum_of_squares` and
:func:`open_gate` fill the gate before the update, and the host need not read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from clr_optim.kernels.triton.rules import KERNELS, advanced, held
from clr_optim.kernels.triton.schedule import rate_and_momentum

__all__ = [
    "BLOCKS_PER_CHUNK", "COLUMNS", "COUNTER", "GROUP", "Shape", "advance", "advance_scalars",
    "constexprs", "multi_tensor", "open_gate", "options", "shape_of", "sum_of_squares",
]  # fmt: skip

#: Columns of the rows' table, int64: the fields of ``Row`` in native/kernels.h, in this order.
COLUMNS = (
    "param", "state0", "state1", "state2", "counter", "scalar", "numel", "group", "first",
)  # fmt: skip
#: The first columns of the groups' table, float64. The kernel's own scalars follow.
GROUP = (
    "base_lr", "max_lr", "base_momentum", "max_momentum", "cycle_momentum", "weight_decay",
    "shrinking", "sign",
)  # fmt: skip

#: Columns of the table of step counters, int64: two addresses, each with whether a float64 lies
#: there, and the number of the group.
COUNTER = ("counter", "wide_counter", "scalar", "wide_scalar", "group")

#: Blocks of a chunk. They share the cost of the schedule, evaluated once per program.
BLOCKS_PER_CHUNK = 8

_ROW: tl.constexpr = tl.constexpr(len(COLUMNS))
_COUNTER: tl.constexpr = tl.constexpr(len(COUNTER))
_OWN: tl.constexpr = tl.constexpr(len(GROUP))


class Shape(NamedTuple):
    """How a kernel is launched for a dtype: elements per block, and threads per program."""

    block: int
    threads: int


# A thread reads 16 bytes of each tensor at a time, or 8 bytes of a 16-bit dtype: there, twice as
# many elements would cost more registers than wider loads gain.
_SHAPES = {8: Shape(512, 256), 4: Shape(1024, 256), 2: Shape(1024, 256)}


def shape_of(itemsize: int) -> Shape:
    """Return the launch's shape for parameters with this many bytes per element."""
    return _SHAPES[itemsize]


_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def constexprs(
    kernel: str,
    slots: int,
    dtype: torch.dtype,
    numbers: Sequence[torch.dtype],
    aligned: bool,
) -> dict[str, Any]:
    """Return the constants that :func:`multi_tensor` is compiled for.

    Args:
        kernel: the name of the kernel.
        slots: the number of state tensors.
        dtype: the dtype of parameters, gradients and state tensors.
        numbers: the dtypes of the step counter and the scalar state, as far as the rule has them.
        aligned: whether all tensors begin at a multiple of 16 bytes.
    """
    counter, scalar = (*(_TYPES[number] for number in numbers), None, None)[:2]
    functions = KERNELS[kernel]
    return {
        "CONSTANTS": functions.constants,
        "UPDATE": functions.update,
        "FLAGS": functions.flags,
        "SLOTS": slots,
        "DTYPE": _TYPES[dtype],
        "COUNTER": counter,
        "SCALAR": scalar,
        "ALIGNED": aligned,
        "BLOCK": shape_of(dtype.itemsize).block,
        "BLOCKS": BLOCKS_PER_CHUNK,
    }


def options(dtype: torch.dtype, warp: int) -> dict[str, Any]:
    """Return the options of the compiler, for warps with this many threads.

    The compiler must not contract multiplications and additions: the rules name each fused one.
    """
    return {"num_warps": shape_of(dtype.itemsize).threads // warp, "enable_fp_fusion": False}


@triton.jit
def _load(pointer, at, mask, MASKED: tl.constexpr):
    # A mask costs the wide loads, as the compiler cannot know that all its lanes are on.
    if MASKED:
        return tl.load(pointer + at, mask=mask, other=0.0)
    else:
        return tl.load(pointer + at)


@triton.jit
def _store(pointer, at, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)
    else:
        tl.store(pointer + at, value.to(pointer.dtype.element_ty))


@triton.jit
def _block(
    p, g, s, at, numel, scale, decay, decays, shrink, first, c,
    UPDATE: tl.constexpr, FLAGS: tl.constexpr, SLOTS: tl.constexpr, A: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    mask = at < numel
    param = _load(p, at, mask, MASKED).to(A)
    grad = _load(g, at, mask, MASKED).to(A) * scale
    # Without weight decay add nothing: 0·p would turn an infinite p into NaN.
    grad = tl.where(decays, tl.fma(decay, param, grad), grad)
    state = [_load(slot, at, mask, MASKED).to(A) for slot in s]
    # Decoupled weight decay. Without it `shrink` is 1.
    param, state = UPDATE(param * shrink, grad, state, first, c, FLAGS)
    _store(p, at, param, mask, MASKED)
    for k in tl.static_range(SLOTS):
        _store(s[k], at, state[k], mask, MASKED)


@triton.jit
def _pointer(place, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(place).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(
    do_not_specialize=["phases", "width"],
    do_not_specialize_on_alignment=[
        "chunks",
        "rows",
        "gradients",
        "groups",
        "ints",
        "floats",
        "control",
        "gate",
    ],
)
def multi_tensor(
    chunks, rows, gradients, groups, width, ints, floats, phases, control, gate,
    CONSTANTS: tl.constexpr, UPDATE: tl.constexpr, FLAGS: tl.constexpr, SLOTS: tl.constexpr,
    DTYPE: tl.constexpr, COUNTER: tl.constexpr, SCALAR: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Update one chunk of one tensor.

    Args:
        chunks: int32 pairs, one per program: the row of a tensor and the number of its chunk.
        rows: the rows' table, int64.
        gradients: int64, the address of each row's gradient.
        groups: the groups' table, float64, ``width`` columns.
        ints, floats, phases: the schedule's tables, and their number of rows.
        control: int64, the position in the schedule first.
        gate: float64, the factor of the gradients and whether they overflowed. After an overflow
            the kernel writes nothing.
        CONSTANTS, UPDATE, FLAGS: of :class:`clr_optim.kernels.triton.rules.Kernel`.
        SLOTS: the number of state tensors.
        DTYPE: the dtype of parameters, gradients and state.
        COUNTER, SCALAR: the dtypes of step counters and of scalar states, if any.
        ALIGNED: whether all tensors begin at a multiple of 16 bytes.
        BLOCK, BLOCKS: elements per block and blocks per chunk.
    """
    A: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    chunks += tl.program_id(0).to(tl.int64) * 2
    row = tl.load(chunks).to(tl.int64)
    rows += row * _ROW
    numel = tl.load(rows + 6)
    groups += tl.load(rows + 7) * width
    first = tl.load(rows + 8) != 0

    rate, momentum = rate_and_momentum(
        ints, floats, phases, tl.load(control),
        tl.load(groups), tl.load(groups + 1), tl.load(groups + 2), tl.load(groups + 3),
    )  # fmt: skip
    step = rate
    if COUNTER is not None:
        step = tl.load(tl.load(rows + 4).to(tl.pointer_type(COUNTER))).to(tl.float64) + 1.0
    scalar = rate
    if SCALAR is not None:
        scalar = tl.load(tl.load(rows + 5).to(tl.pointer_type(SCALAR)))
    decay = tl.load(groups + 5)
    own = groups + _OWN
    constants = CONSTANTS(own, rate, step, scalar, momentum, tl.load(groups + 4) != 0, A)
    c = [constant.to(A) for constant in constants]
    decays = decay != 0
    decay = decay.to(A)
    shrink = held(1.0 - rate * tl.load(groups + 6), A).to(A)
    scale = tl.load(gate).to(A) * tl.load(groups + 7).to(A)

    begin = tl.load(chunks + 1).to(tl.int64) * (BLOCK * BLOCKS)
    p = _pointer(rows, DTYPE, ALIGNED) + begin
    g = _pointer(gradients + row, DTYPE, ALIGNED) + begin
    s = (
        _pointer(rows + 1, DTYPE, ALIGNED) + begin,
        _pointer(rows + 2, DTYPE, ALIGNED) + begin,
        _pointer(rows + 3, DTYPE, ALIGNED) + begin,
    )[:SLOTS]
    left = tl.minimum(numel - begin, BLOCK * BLOCKS).to(tl.int32)
    left = tl.where(tl.load(gate + 1) == 0, left, 0)
    full = left // BLOCK
    lanes = tl.arange(0, BLOCK)
    for i in range(0, full):
        _block(
            p, g, s, i * BLOCK + lanes, left, scale, decay, decays, shrink, first,
            c, UPDATE, FLAGS, SLOTS, A, False,
        )  # fmt: skip
    if full * BLOCK < left:
        _block(
            p, g, s, full * BLOCK + lanes, left, scale, decay, decays, shrink, first,
            c, UPDATE, FLAGS, SLOTS, A, True,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["chunks", "rows", "gradients", "grad_scale", "sums"])
def sum_of_squares(
    chunks, rows, gradients, grad_scale, sums,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sum the squares of one chunk of one gradient, in a fixed order.

    Args:
        chunks, rows, gradients: as for :func:`multi_tensor`.
        grad_scale: float32, divided out first: squares of scaled gradients may exceed float32.
        sums: float64, one per program.
    """
    A: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    chunks += tl.program_id(0).to(tl.int64) * 2
    row = tl.load(chunks).to(tl.int64)
    numel = tl.load(rows + row * _ROW + 6)
    g = _pointer(gradients + row, DTYPE, ALIGNED)
    scale = (1.0 / tl.load(grad_scale).to(tl.float64)).to(A)
    begin = tl.load(chunks + 1).to(tl.int64) * (BLOCK * BLOCKS)
    left = numel - begin
    full = tl.minimum(left // BLOCK, BLOCKS).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    sum = tl.zeros([BLOCK], dtype=A)
    for i in range(0, full):
        grad = tl.load(g + (begin + i * BLOCK + lanes)).to(A) * scale
        sum = tl.fma(grad, grad, sum)
    if full * BLOCK < tl.minimum(left, BLOCK * BLOCKS):
        at = begin + full * BLOCK + lanes
        grad = tl.load(g + at, mask=at < numel, other=0.0).to(A) * scale
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


@triton.jit(
    do_not_specialize=["width", "phases"],
    do_not_specialize_on_alignment=[
        "counters", "control", "gate", "groups", "ints", "floats",
    ],
)  # fmt: skip
def advance_scalars(
    counters, groups, width, ints, floats, phases, control, gate, FACTOR: tl.constexpr
):
    """Multiply the scalar state of one tensor, after the updates of a step and before its end.

    The programs of an update read the state, and :func:`advance` moves the counter and the
    position that the factor depends on. So this launch comes after the update and before that one.

    Args:
        counters: as for :func:`advance`; one program per row.
        groups, width, ints, floats, phases, control: as for :func:`multi_tensor`.
        gate: float64. After an overflow nothing moves.
        FACTOR: of :class:`clr_optim.kernels.triton.rules.Kernel`.
    """
    counters += tl.program_id(0).to(tl.int64) * _COUNTER
    groups += tl.load(counters + 4) * width
    _, momentum = rate_and_momentum(
        ints, floats, phases, tl.load(control),
        tl.load(groups), tl.load(groups + 1), tl.load(groups + 2), tl.load(groups + 3),
    )  # fmt: skip
    place = tl.load(counters)
    if tl.load(counters + 1) != 0:
        step = tl.load(place.to(tl.pointer_type(tl.float64)))
    else:
        step = tl.load(place.to(tl.pointer_type(tl.float32))).to(tl.float64)
    by = FACTOR(groups + _OWN, step + 1.0, momentum, tl.load(groups + 4) != 0)
    happened = tl.load(gate + 1) == 0
    place = tl.load(counters + 2)
    if tl.load(counters + 3) != 0:
        wide = place.to(tl.pointer_type(tl.float64))
        tl.store(wide, advanced(tl.load(wide), by), mask=happened)
    else:
        narrow = place.to(tl.pointer_type(tl.float32))
        tl.store(narrow, advanced(tl.load(narrow), by), mask=happened)


@triton.jit(
    do_not_specialize=["count", "kept", "width", "phases"],
    do_not_specialize_on_alignment=[
        "counters", "control", "gate", "rates", "groups", "ints", "floats",
    ],
)  # fmt: skip
def advance(
    counters, count, rates, kept, groups, width, ints, floats, phases, control, gate,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance the step counters, the position and the kept rates, after the updates of a step.

    Args:
        counters: int64, a row of ``COUNTER`` per updated tensor.
        count: the number of counters.
        rates: int64 triples, one per group whose ``lr`` is a tensor that the device keeps current:
            its address, whether it is a float64, and the group's number.
        kept: the number of such groups.
        groups, width, ints, floats, phases: as for :func:`multi_tensor`.
        control: int64, the position and the number of steps to add.
        gate: float64. After an overflow nothing moves.
    """
    happened = tl.load(gate + 1) == 0
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.where(happened, count, 0)
    address = tl.load(counters + _COUNTER * at, mask=mask, other=0)
    wide = tl.load(counters + _COUNTER * at + 1, mask=mask, other=0) != 0
    narrow = address.to(tl.pointer_type(tl.float32))
    value = tl.load(narrow, mask=mask & ~wide, other=0.0)
    tl.store(narrow, value + 1.0, mask=mask & ~wide)
    double = address.to(tl.pointer_type(tl.float64))
    value64 = tl.load(double, mask=mask & wide, other=0.0)
    tl.store(double, value64 + 1.0, mask=mask & wide)
    if tl.program_id(0) == 0:
        position = tl.load(control) + tl.where(happened, tl.load(control + 1), 0)
        for i in range(0, kept):
            group = groups + tl.load(rates + 3 * i + 2) * width
            rate, _ = rate_and_momentum(
                ints, floats, phases, position,
                tl.load(group), tl.load(group + 1), tl.load(group + 2), tl.load(group + 3),
            )  # fmt: skip
            place = tl.load(rates + 3 * i)
            if tl.load(rates + 3 * i + 1) != 0:
                tl.store(place.to(tl.pointer_type(tl.float64)), rate)
            else:
                tl.store(
                    place.to(tl.pointer_type(tl.float32)), held(rate, tl.float32).to(tl.float32)
                )
        tl.store(control, position)
