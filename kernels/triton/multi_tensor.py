"""One launch updates every tensor of a bucket: the kernel around the rules, and its launch.

A program takes a chunk of one tensor: it reads where the tensor lies from a table on the device,
evaluates the schedule at the device's own position, and updates. Nothing that changes from step to
step is an argument that Triton compiles for: neither the rate nor the number of tensors.

Whether a step happens at all, and what its gradients are multiplied by, stands in two float64 on
the device, the *gate*: ``(factor, whether there was an overflow)``. Where gradients are clipped or
a GradScaler is at work, :func:`sum_of_squares` and :func:`open_gate` fill it before the update; the
host need not know what they found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from clr_optim.kernels.triton.rules import constants, held, update
from clr_optim.kernels.triton.schedule import rate_and_momentum

__all__ = [
    "BLOCKS_PER_CHUNK", "COLUMNS", "GROUP", "Shape", "advance", "constexprs", "multi_tensor",
    "open_gate", "options", "shape_of", "sum_of_squares",
]  # fmt: skip

#: Columns of the rows' table, int64; in step with ``_ROW`` in plan.py.
COLUMNS = (
    "param", "grad", "state0", "state1", "state2", "counter", "numel", "group", "first", "active",
)  # fmt: skip
#: Columns of the groups' table, float64: these, and then the kernel's own scalars.
GROUP = (
    "base_lr", "max_lr", "base_momentum", "max_momentum", "cycle_momentum", "weight_decay", "sign",
)  # fmt: skip

#: So many blocks make a chunk, to spread what a program does once over more than one block: what a
#: persistent grid would gain, from a plain one, whose programs the device hands out by itself.
BLOCKS_PER_CHUNK = 8

_ROW: tl.constexpr = tl.constexpr(len(COLUMNS))
_OWN: tl.constexpr = tl.constexpr(len(GROUP))


class Shape(NamedTuple):
    """How a kernel is launched for a dtype: elements per block, and threads per program."""

    block: int
    threads: int


# A thread then has 16 bytes of each tensor to read at a time (8 of those that are 16 bits wide:
# twice as many elements would cost more registers than wider loads gain).
_SHAPES = {8: Shape(512, 256), 4: Shape(1024, 256), 2: Shape(1024, 256)}


def shape_of(itemsize: int) -> Shape:
    """The launch for parameters of so many bytes per element."""
    return _SHAPES[itemsize]


_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def constexprs(
    kernel: str, slots: int, dtype: torch.dtype, counter: torch.dtype | None, aligned: bool
) -> dict[str, Any]:
    """What :func:`multi_tensor` is compiled for."""
    return {
        "KERNEL": kernel,
        "SLOTS": slots,
        "DTYPE": _TYPES[dtype],
        "COUNTER": None if counter is None else _TYPES[counter],
        "ALIGNED": aligned,
        "BLOCK": shape_of(dtype.itemsize).block,
        "BLOCKS": BLOCKS_PER_CHUNK,
    }


def options(dtype: torch.dtype, warp: int) -> dict[str, Any]:
    """How it is compiled, for warps of so many threads.

    Multiplications and additions are not contracted: which are, the rules say.
    """
    return {"num_warps": shape_of(dtype.itemsize).threads // warp, "enable_fp_fusion": False}


@triton.jit
def _load(pointer, at, mask, MASKED: tl.constexpr):
    # A mask that the compiler cannot see through would cost the wide loads.
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
    p,
    g,
    s0,
    s1,
    s2,
    at,
    numel,
    scale,
    decay,
    decays,
    first,
    c0,
    c1,
    c2,
    c3,
    c4,
    c5,
    c6,
    KERNEL: tl.constexpr,
    SLOTS: tl.constexpr,
    A: tl.constexpr,
    MASKED: tl.constexpr,
):
    mask = at < numel
    param = _load(p, at, mask, MASKED).to(A)
    grad = _load(g, at, mask, MASKED).to(A) * scale
    # Without weight decay nothing is added: 0·p would turn an infinite p into NaN.
    grad = tl.where(decays, tl.fma(decay, param, grad), grad)
    a0 = param
    a1 = param
    a2 = param
    if SLOTS > 0:
        a0 = _load(s0, at, mask, MASKED).to(A)
    if SLOTS > 1:
        a1 = _load(s1, at, mask, MASKED).to(A)
    if SLOTS > 2:
        a2 = _load(s2, at, mask, MASKED).to(A)
    param, a0, a1, a2 = update(param, grad, a0, a1, a2, first, c0, c1, c2, c3, c4, c5, c6, KERNEL)
    _store(p, at, param, mask, MASKED)
    if SLOTS > 0:
        _store(s0, at, a0, mask, MASKED)
    if SLOTS > 1:
        _store(s1, at, a1, mask, MASKED)
    if SLOTS > 2:
        _store(s2, at, a2, mask, MASKED)


@triton.jit
def _pointer(rows, column: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(rows + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(
    do_not_specialize=["phases", "width"],
    do_not_specialize_on_alignment=[
        "chunks",
        "rows",
        "groups",
        "ints",
        "floats",
        "control",
        "gate",
    ],
)
def multi_tensor(
    chunks, rows, groups, width, ints, floats, phases, control, gate,
    KERNEL: tl.constexpr, SLOTS: tl.constexpr, DTYPE: tl.constexpr,
    COUNTER: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Update one chunk of one tensor.

    Args:
        chunks: int32 pairs, one per program: the row of a tensor, and which of its chunks.
        rows: the rows' table, int64.
        groups: the groups' table, float64, ``width`` columns.
        ints, floats, phases: the schedule's tables, and how many rows they have.
        control: int64, the position in the schedule first.
        gate: float64, what gradients are multiplied by on their way in, and whether there was an
            overflow, in which case nothing is written.
        KERNEL, SLOTS: its name in :data:`clr_optim.rules.KERNELS`, and how much state it has.
        DTYPE, COUNTER: of parameters, gradients and state; of the step counters, if there are any.
        ALIGNED: whether all tensors begin at a multiple of 16 bytes.
        BLOCK, BLOCKS: elements per block and blocks per chunk.
    """
    A: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    chunks += tl.program_id(0).to(tl.int64) * 2
    rows += tl.load(chunks).to(tl.int64) * _ROW
    numel = tl.load(rows + 6)
    groups += tl.load(rows + 7) * width
    first = tl.load(rows + 8) != 0

    rate, momentum = rate_and_momentum(
        ints, floats, phases, tl.load(control),
        tl.load(groups), tl.load(groups + 1), tl.load(groups + 2), tl.load(groups + 3),
    )  # fmt: skip
    step = rate
    if COUNTER is not None:
        step = tl.load(tl.load(rows + 5).to(tl.pointer_type(COUNTER))).to(tl.float64) + 1.0
    decay = tl.load(groups + 5)
    own = groups + _OWN
    c0, c1, c2, c3, c4, c5, c6 = constants(
        own, rate, decay, step, momentum, tl.load(groups + 4) != 0, KERNEL, A
    )
    c0, c1, c2, c3, c4, c5, c6 = (
        c0.to(A), c1.to(A), c2.to(A), c3.to(A), c4.to(A), c5.to(A), c6.to(A)
    )  # fmt: skip
    decays = decay != 0
    if KERNEL == "adam" or KERNEL == "adam_amsgrad":
        decays = decays & (tl.load(own + 3) == 0)
    decay = decay.to(A)
    scale = tl.load(gate).to(A) * tl.load(groups + 6).to(A)

    begin = tl.load(chunks + 1).to(tl.int64) * (BLOCK * BLOCKS)
    p = _pointer(rows, 0, DTYPE, ALIGNED) + begin
    g = _pointer(rows, 1, DTYPE, ALIGNED) + begin
    s0 = _pointer(rows, 2, DTYPE, ALIGNED) + begin
    s1 = _pointer(rows, 3, DTYPE, ALIGNED) + begin
    s2 = _pointer(rows, 4, DTYPE, ALIGNED) + begin
    left = tl.minimum(numel - begin, BLOCK * BLOCKS).to(tl.int32)
    left = tl.where(tl.load(gate + 1) == 0, left, 0)
    full = left // BLOCK
    lanes = tl.arange(0, BLOCK)
    for i in range(0, full):
        _block(
            p, g, s0, s1, s2, i * BLOCK + lanes, left, scale, decay, decays, first,
            c0, c1, c2, c3, c4, c5, c6, KERNEL, SLOTS, A, False,
        )  # fmt: skip
    if full * BLOCK < left:
        _block(
            p, g, s0, s1, s2, full * BLOCK + lanes, left, scale, decay, decays, first,
            c0, c1, c2, c3, c4, c5, c6, KERNEL, SLOTS, A, True,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["chunks", "rows", "grad_scale", "sums"])
def sum_of_squares(
    chunks, rows, grad_scale, sums,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The sum of squares of one chunk of one gradient, summed in a fixed order.

    Args:
        chunks, rows: as for :func:`multi_tensor`.
        grad_scale: float32, divided out first: with it, squares might be beyond float32.
        sums: float64, one per program.
    """
    A: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    chunks += tl.program_id(0).to(tl.int64) * 2
    rows += tl.load(chunks).to(tl.int64) * _ROW
    numel = tl.load(rows + 6)
    g = _pointer(rows, 1, DTYPE, ALIGNED)
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
    """By one program: what the gradients of this step are multiplied by, and whether it happens.

    Args:
        sums, count: sums of squares, float64, and how many.
        limit: float64, what the norm is clipped to.
        grad_scale, found_inf: as a GradScaler has them, float32: what the gradients in memory are
            too large by, and 0 unless one of them is infinite or NaN.
        norm: where the norm goes.
        gate: float64, where the results go.
        CLIPS: whether there are sums, and a limit.
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
    do_not_specialize=["count", "kept", "width", "phases"],
    do_not_specialize_on_alignment=[
        "counters", "control", "gate", "rates", "groups", "ints", "floats",
    ],
)  # fmt: skip
def advance(
    counters, count, rates, kept, groups, width, ints, floats, phases, control, gate,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """After the updates of a step: the tensors' step counters, the position, the next step's rates.

    Args:
        counters: int64 pairs, one per tensor that was updated: the address of its counter, and
            whether that is a float64 and no float32.
        count: how many there are.
        rates: int64 triples, one per group whose ``lr`` is a tensor that is kept current here: its
            address, whether it is a float64, and the group's number.
        kept: how many there are.
        groups, width, ints, floats, phases: as for :func:`multi_tensor`.
        control: int64: the position, and what this step adds to it.
        gate: float64: after an overflow nothing moves.
    """
    happened = tl.load(gate + 1) == 0
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.where(happened, count, 0)
    address = tl.load(counters + 2 * at, mask=mask, other=0)
    wide = tl.load(counters + 2 * at + 1, mask=mask, other=0) != 0
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
