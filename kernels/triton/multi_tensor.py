"""The update kernels: one launch updates every tensor of a bucket, a program per chunk of a tensor.

A program reads its tensor's addresses from a table on the device. Triton compiles for no value that
changes from step to step: neither for the rate nor for the number of tensors.

There are two ways to take a step. :func:`multi_tensor` reads the constants that an earlier launch
of :func:`~clr_optim.kernels.triton.prepare.prepare` has written. :func:`whole_step` does all in one
launch, and each of its programs computes the constants anew: for few programs this takes less time
than a second launch. In the backward pass, :func:`~.row_step.row_step` updates one tensor alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from clr_optim.kernels.triton.masters import join, split
from clr_optim.kernels.triton.prepare import (
    AT_FIRST,
    AT_GROUP,
    AT_NUMEL,
    AT_STATE,
    COLUMNS,
    COMMON,
    WIDTH,
    advance_counters,
    advance_position,
    average_weight,
    is_done,
    is_gradient,
    row_constants,
)
from clr_optim.kernels.triton.rules import KERNELS, lerp

__all__ = [
    "PASSED", "Constants", "Shape", "constants_for", "multi_tensor", "shape_of",
    "update_row", "whole_step",
]  # fmt: skip

#: The largest number of gradients whose addresses travel as arguments of :func:`whole_step`.
PASSED = 8

# Rows that the last program of `whole_step` advances at once.
_LANES: tl.constexpr = tl.constexpr(128)

_ROW: tl.constexpr = tl.constexpr(len(COLUMNS))
_COMMON: tl.constexpr = tl.constexpr(len(COMMON))
_WIDTH: tl.constexpr = tl.constexpr(WIDTH)


class Shape(NamedTuple):
    """How a kernel is launched for a dtype: elements per block, and threads per program."""

    block: int
    threads: int


# A thread reads 16 bytes of each tensor at a time, where registers allow that.
_SHAPES = {8: Shape(512, 256), 4: Shape(1024, 256), 2: Shape(2048, 256)}
# With so many state tensors, 16 bytes would need too many registers: 8 bytes at a time.
_SHAPES_OF_MANY = {8: (2, Shape(256, 256)), 2: (3, Shape(1024, 256))}

# The rest and float32 state take more registers.
_SHAPES_OF_MASTERS = (2, Shape(1024, 256))

# Bytes of an average that the threads of a program read at once.
_BYTES: tl.constexpr = tl.constexpr(16 * _SHAPES[4].threads)


def shape_of(slots: int, itemsize: int, masters: bool = False) -> Shape:
    """Return the launch's shape for state tensors and bytes per element of so many.

    Args:
        slots: the number of the rule's state tensors.
        itemsize: the bytes of a value of the parameter.
        masters: whether the rows have masters, with which float32 state tensors go.
    """
    many, narrow = _SHAPES_OF_MANY.get(itemsize, (slots + 1, _SHAPES[itemsize]))
    if masters:
        many, narrow = _SHAPES_OF_MASTERS
    return narrow if slots >= many else _SHAPES[itemsize]


_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Constants(NamedTuple):
    """The constants and options that each kernel is compiled with for one bucket."""

    prepare: dict[str, Any]
    multi_tensor: dict[str, Any]
    whole_step: dict[str, Any]
    sum_of_squares: dict[str, Any]


def constants_for(
    kernel: str,
    slots: int,
    dtype: torch.dtype,
    numbers: Sequence[torch.dtype],
    average: torch.dtype | None,
    masters: bool,
    warp: int,
) -> Constants:
    """Return what the kernels are compiled for.

    The compiler must not contract multiplications and additions: the rules name each fused one.

    Args:
        kernel: the name of the kernel.
        slots: the number of the rule's state tensors.
        dtype: the dtype of parameters, gradients and, without masters, these state tensors.
        numbers: the dtypes of the step counter and the scalar state, as far as the rule has them.
        average: the dtype of the parameters' averages, if any.
        masters: whether the rows have masters.
        warp: the threads of a warp.
    """
    counter, scalar = (*(_TYPES[number] for number in numbers), None, None)[:2]
    functions = KERNELS[kernel]
    block, threads = shape_of(slots, dtype.itemsize, masters)
    arithmetic = tl.float64 if dtype == torch.float64 else tl.float32
    options = {"num_warps": threads // warp, "enable_fp_fusion": False}
    of_rows = {
        "CONSTANTS": functions.constants, "FACTOR": functions.factor, "COUNTER": counter,
        "SCALAR": scalar, "AVERAGE": None if average is None else _TYPES[average],
    }  # fmt: skip
    of_update = {
        "UPDATE": functions.update, "FLAGS": functions.flags, "SLOTS": slots,
        "DTYPE": _TYPES[dtype], "MASTER": masters, "BLOCK": block, **options,
    }  # fmt: skip
    few = {"num_warps": 128 // warp, "enable_fp_fusion": False}
    return Constants(
        prepare={**of_rows, "A": arithmetic, "LANES": 128, **few},
        multi_tensor={
            "COUNT": functions.constant_count, "AVERAGE": of_rows["AVERAGE"], **of_update,
        },
        whole_step={**of_rows, **of_update},
        sum_of_squares={"DTYPE": _TYPES[dtype], "BLOCK": block, **options},
    )  # fmt: skip


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
def _load_param(p, r, at, mask, A: tl.constexpr, MASTER: tl.constexpr, MASKED: tl.constexpr):
    """Return parameters, or their masters, in the arithmetic type."""
    param = _load(p, at, mask, MASKED)
    if MASTER:
        return join(param, _load(r, at, mask, MASKED))
    else:
        return param.to(A)


@triton.jit
def _block(
    p, r, g, s, at, left, scale, decay, shrink, first, c,
    UPDATE: tl.constexpr, FLAGS: tl.constexpr, SLOTS: tl.constexpr, MASTER: tl.constexpr,
    A: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    mask = at < left
    param = _load_param(p, r, at, mask, A, MASTER, MASKED)
    grad = _load(g, at, mask, MASKED).to(A) * scale
    # Without weight decay add nothing: 0·p would turn an infinite p into NaN.
    grad = tl.where(decay != 0, tl.fma(decay, param, grad), grad)
    state = [_load(slot, at, mask, MASKED).to(A) for slot in s]
    EXACT: tl.constexpr = MASTER or p.dtype.element_ty.primitive_bitwidth > 16
    # Decoupled weight decay. Without it `shrink` is 1.
    param, state = UPDATE(param * shrink, grad, state, first, c, FLAGS, EXACT)
    if MASTER:
        param, rest = split(param)
        _store(r, at, rest, mask, MASKED)
    _store(p, at, param, mask, MASKED)
    for k in tl.static_range(SLOTS):
        _store(s[k], at, state[k], mask, MASKED)


@triton.jit
def _pointer(address, begin, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + begin


@triton.jit
def _update(
    row, gradient, chunk, blocks, scale, decay, shrink, c,
    UPDATE: tl.constexpr, FLAGS: tl.constexpr, SLOTS: tl.constexpr, DTYPE: tl.constexpr,
    MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a chunk of a tensor, given the number of the chunk and its blocks."""
    A: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    PARAM: tl.constexpr = tl.int16 if MASTER else DTYPE
    SLOT: tl.constexpr = tl.float32 if MASTER else DTYPE
    begin = chunk.to(tl.int64) * blocks * BLOCK
    first = tl.load(row + AT_FIRST) != 0
    param = tl.load(row)
    state = row + AT_STATE
    slots = (tl.load(state), tl.load(state + 1), tl.load(state + 2))[:SLOTS]
    addresses = param | gradient
    for k in tl.static_range(SLOTS):
        addresses = addresses | slots[k]
    rest = tl.load(state + SLOTS) if MASTER else param
    addresses = addresses | rest
    left = tl.minimum(tl.load(row + AT_NUMEL) - begin, blocks * BLOCK).to(tl.int32)
    # Only tensors that begin at multiples of 16 bytes can be read 16 bytes at a time.
    full = tl.where(addresses & 15 == 0, left // BLOCK, 0)
    lanes = tl.arange(0, BLOCK)
    if full > 0:
        p = _pointer(param, begin, PARAM, True)
        r = _pointer(rest, begin, PARAM, True)
        g = _pointer(gradient, begin, DTYPE, True)
        s = [_pointer(slot, begin, SLOT, True) for slot in slots]
        for i in range(0, full):
            _block(
                p, r, g, s, i * BLOCK + lanes, left, scale, decay, shrink, first, c,
                UPDATE, FLAGS, SLOTS, MASTER, A, False,
            )  # fmt: skip
    # Half a block at a time takes fewer registers than the loop above.
    PART: tl.constexpr = BLOCK // 2
    lanes = tl.arange(0, PART)
    p = _pointer(param, begin, PARAM, False)
    r = _pointer(rest, begin, PARAM, False)
    g = _pointer(gradient, begin, DTYPE, False)
    s = [_pointer(slot, begin, SLOT, False) for slot in slots]
    for i in range(2 * full, tl.cdiv(left, PART)):
        _block(
            p, r, g, s, i * PART + lanes, left, scale, decay, shrink, first, c,
            UPDATE, FLAGS, SLOTS, MASTER, A, True,
        )  # fmt: skip


@triton.jit
def _average_block(
    p, r, a, at, left, weight, A: tl.constexpr, MASTER: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    mask = at < left
    param = _load_param(p, r, at, mask, A, MASTER, MASKED)
    average = _load(a, at, mask, MASKED).to(A)
    # The weight 1 copies, whatever the average holds.
    average = tl.where(weight == 1, param, lerp(average, param, weight))
    _store(a, at, average, mask, MASKED)


@triton.jit
def _average(
    row, chunk, blocks, weight,
    SLOTS: tl.constexpr, DTYPE: tl.constexpr, MASTER: tl.constexpr, AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the parameters of a chunk into their averages, given the weight of the parameters."""
    A: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    PARAM: tl.constexpr = tl.int16 if MASTER else DTYPE
    begin = chunk.to(tl.int64) * blocks * BLOCK
    param = tl.load(row)
    rest = tl.load(row + AT_STATE + SLOTS) if MASTER else param
    average = tl.load(row + AT_STATE + SLOTS + MASTER)
    left = tl.minimum(tl.load(row + AT_NUMEL) - begin, blocks * BLOCK).to(tl.int32)
    # If the average is wider than the parameter, each thread reads 16 bytes of the average.
    UNIT: tl.constexpr = _BYTES * 8 // AVERAGE.primitive_bitwidth
    full = tl.where((param | rest | average) & 15 == 0, left // UNIT, 0)
    # The compiler lays all accesses of one shape out alike: this shape is not that of the update.
    lanes = tl.arange(0, UNIT)[None, :]
    # Other threads of the program may have written the parameters.
    tl.debug_barrier()
    if full > 0:
        p = _pointer(param, begin, PARAM, True)
        r = _pointer(rest, begin, PARAM, True)
        a = _pointer(average, begin, AVERAGE, True)
        for i in range(0, full):
            _average_block(p, r, a, i * UNIT + lanes, left, weight, A, MASTER, False)
    PART: tl.constexpr = UNIT // 2
    lanes = tl.arange(0, PART)[None, :]
    p = _pointer(param, begin, PARAM, False)
    r = _pointer(rest, begin, PARAM, False)
    a = _pointer(average, begin, AVERAGE, False)
    for i in range(2 * full, tl.cdiv(left, PART)):
        _average_block(p, r, a, i * PART + lanes, left, weight, A, MASTER, True)


@triton.jit(
    do_not_specialize=["blocks"],
    do_not_specialize_on_alignment=["chunks", "rows", "gradients", "constants"],
)
def multi_tensor(
    chunks, rows, gradients, constants, blocks,
    COUNT: tl.constexpr, UPDATE: tl.constexpr, FLAGS: tl.constexpr, SLOTS: tl.constexpr,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr, AVERAGE: tl.constexpr,
):  # fmt: skip
    """Update one chunk of one tensor with prepared constants.

    Args:
        chunks: int32 pairs, one per program: the row of a tensor and the number of its chunk.
        rows, gradients, constants: as for :func:`~clr_optim.kernels.triton.prepare.prepare`.
        blocks: blocks per chunk.
        COUNT: the number of constants of the rule.
        UPDATE, FLAGS: of :class:`clr_optim.kernels.triton.rules.Kernel`.
        SLOTS: the number of the rule's state tensors.
        DTYPE: the dtype of parameters, gradients and these state tensors.
        MASTER: whether the rows have masters, see :mod:`.masters`: state tensors are then float32.
        BLOCK: elements per block.
        AVERAGE: the dtype of the rows' averages, if any.
    """
    chunks += tl.program_id(0).to(tl.int64) * 2
    row = tl.load(chunks).to(tl.int64)
    constants += row * _WIDTH
    if tl.load(constants) != 0:
        own = constants + _COMMON
        c = (
            tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3),
            tl.load(own + 4), tl.load(own + 5), tl.load(own + 6), tl.load(own + 7),
        )[:COUNT]  # fmt: skip
        _update(
            rows + row * _ROW, tl.load(gradients + row), tl.load(chunks + 1), blocks,
            tl.load(constants + 1), tl.load(constants + 2), tl.load(constants + 3), c,
            UPDATE, FLAGS, SLOTS, DTYPE, MASTER, BLOCK,
        )  # fmt: skip
    if AVERAGE is not None:
        weight = tl.load(constants + 4)
        if weight != 0:
            _average(
                rows + row * _ROW, tl.load(chunks + 1), blocks, weight,
                SLOTS, DTYPE, MASTER, AVERAGE, BLOCK,
            )  # fmt: skip


@triton.jit
def _gradients(
    gradients, row, exists, g0, g1, g2, g3, g4, g5, g6, g7, ARE_PASSED: tl.constexpr
):  # fmt: skip
    """Return the addresses of rows' gradients, for one row or a vector of them."""
    if ARE_PASSED:
        low = tl.where(row == 0, g0, tl.where(row == 1, g1, tl.where(row == 2, g2, g3)))
        high = tl.where(row == 4, g4, tl.where(row == 5, g5, tl.where(row == 6, g6, g7)))
        return tl.where(exists, tl.where(row < 4, low, high), 0).to(tl.int64)
    else:
        return tl.load(gradients + row, mask=exists, other=0)


@triton.jit
def update_row(
    row, gradient, chunk, blocks, groups, width, ints, floats, phases, control, gate, position,
    CONSTANTS: tl.constexpr, COUNTER: tl.constexpr, SCALAR: tl.constexpr, AVERAGE: tl.constexpr,
    UPDATE: tl.constexpr, FLAGS: tl.constexpr, SLOTS: tl.constexpr, DTYPE: tl.constexpr,
    MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a chunk of a tensor with constants computed here, and its average, if that is due."""
    A: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    if is_gradient(gradient):
        scale, decay, shrink, c = row_constants(
            row, True, groups, width, ints, floats, phases, position, gate,
            CONSTANTS, COUNTER, SCALAR, A,
        )  # fmt: skip
        _update(
            row, gradient, chunk, blocks, scale, decay, shrink, c,
            UPDATE, FLAGS, SLOTS, DTYPE, MASTER, BLOCK,
        )  # fmt: skip
    if AVERAGE is not None:  # rows without a gradient take part
        averages = tl.load(groups + tl.load(row + AT_GROUP) * width + 5)
        weight = average_weight(averages, ints, phases, control, position).to(A)
        if ~is_done(gradient) & (weight != 0):
            _average(row, chunk, blocks, weight, SLOTS, DTYPE, MASTER, AVERAGE, BLOCK)


@triton.jit(
    do_not_specialize=[
        "blocks", "count", "width", "phases", "kept",
        "g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7",
    ],
    do_not_specialize_on_alignment=[
        "chunks", "rows", "gradients", "groups", "ints", "floats", "control", "gate", "rates",
    ],
)  # fmt: skip
def whole_step(
    chunks, rows, gradients, blocks, count, groups, width, ints, floats, phases, control, gate,
    rates, kept, g0: tl.int64, g1: tl.int64, g2: tl.int64, g3: tl.int64, g4: tl.int64,
    g5: tl.int64, g6: tl.int64, g7: tl.int64, ARE_PASSED: tl.constexpr,
    CONSTANTS: tl.constexpr, FACTOR: tl.constexpr, COUNTER: tl.constexpr, SCALAR: tl.constexpr,
    AVERAGE: tl.constexpr, UPDATE: tl.constexpr, FLAGS: tl.constexpr, SLOTS: tl.constexpr,
    DTYPE: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take a whole step: update one chunk of one tensor; the last program advances the rest.

    Args:
        chunks, blocks: as for :func:`multi_tensor`.
        rows, gradients, count, groups, width, ints, floats, phases, control, gate, rates, kept: as
            for :func:`~clr_optim.kernels.triton.prepare.prepare`.
        g0, g1, g2, g3, g4, g5, g6, g7: the addresses of the gradients if they are passed.
        ARE_PASSED: whether the addresses of the gradients are passed, at most eight. If not, they
            lie in ``gradients``.
        CONSTANTS, FACTOR, COUNTER, SCALAR, AVERAGE: as for
            :func:`~clr_optim.kernels.triton.prepare.prepare`.
        UPDATE, FLAGS, SLOTS, DTYPE, MASTER, BLOCK: as for :func:`multi_tensor`.
    """
    chunks += tl.program_id(0).to(tl.int64) * 2
    position = tl.load(control)
    happened = tl.load(gate + 1) == 0
    index = tl.load(chunks)
    gradient = _gradients(
        gradients, index, index >= 0, g0, g1, g2, g3, g4, g5, g6, g7, ARE_PASSED
    )  # fmt: skip
    row = rows + index.to(tl.int64) * _ROW
    if happened:
        update_row(
            row, gradient, tl.load(chunks + 1), blocks,
            groups, width, ints, floats, phases, control, gate, position,
            CONSTANTS, COUNTER, SCALAR, AVERAGE, UPDATE, FLAGS, SLOTS, DTYPE, MASTER, BLOCK,
        )  # fmt: skip
    # All programs have read counters and position when the last one comes here.
    tl.debug_barrier()
    ticket = tl.atomic_add(control + 2, 1)
    if ticket == tl.num_programs(0) - 1:
        tl.store(control + 2, 0)
        for begin in range(0, tl.where(happened, count, 0), _LANES):
            lane = begin + tl.arange(0, _LANES)
            exists = lane < count
            address = _gradients(
                gradients, lane, exists, g0, g1, g2, g3, g4, g5, g6, g7, ARE_PASSED
            )  # fmt: skip
            advance_counters(
                rows + lane.to(tl.int64) * _ROW, exists & is_gradient(address), groups, width, ints,
                floats, phases, position, FACTOR, COUNTER, SCALAR,
            )  # fmt: skip
        advance_position(
            rates, kept, groups, width, ints, floats, phases, control, position, happened
        )
