"""The watch over the kernels' memory, tried on kernels that break its rules."""

from __future__ import annotations

import pytest
import torch
from triton_helpers import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton_memory import MemoryFaultError


@triton.jit
def _add_one(pointer, numel, every, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * every + tl.arange(0, BLOCK)
    values = tl.load(pointer + at, mask=at < numel)
    tl.store(pointer + at, values + 1, mask=at < numel)


@triton.jit
def _add_one_at(table, numel, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    pointer = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(pointer + at, tl.load(pointer + at, mask=at < numel) + 1, mask=at < numel)


@triton.jit
def _read_wide(table, target, DTYPE: tl.constexpr, TOLD: tl.constexpr):  # noqa: N803
    pointer = tl.multiple_of(tl.load(table).to(tl.pointer_type(DTYPE)), TOLD)
    tl.store(target, tl.load(pointer).to(tl.float32))


@triton.jit
def _copy_before(pointer, numel, ahead, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(pointer + at + ahead, mask=at < numel)
    tl.store(pointer + at, values, mask=at < numel)


@triton.jit
def _write_then_read(pointer, target, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    tl.store(pointer + at, at)
    tl.store(target + at, tl.load(pointer + BLOCK - 1 - at))


@triton.jit
def _write_wait_read(pointer, target, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    tl.store(pointer + at, at)
    tl.debug_barrier()
    tl.store(target + at, tl.load(pointer + BLOCK - 1 - at))


@triton.jit
def _write_all_to_one(pointer, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    tl.store(pointer + at * 0, at)


@triton.jit
def _count_at_the_end(counter, tickets, target, early):
    before = tl.load(counter)
    if tl.program_id(0) == early:
        tl.store(counter, before + 1)
    ticket = tl.atomic_add(tickets, 1)
    tl.store(target + tl.program_id(0), before)
    if ticket == tl.num_programs(0) - 1 and early < 0:
        tl.store(counter, before + 1)


def test_the_last_program_may_write_what_the_others_have_read():
    counter, tickets, target = (torch.zeros(8, dtype=torch.int32) for _ in range(3))
    _count_at_the_end[8,](counter, tickets, target, -1)
    assert (counter[0], tickets[0], target.sum()) == (1, 8, 0)
    with pytest.raises(MemoryFaultError, match=r"program 0 reads what .* program 4 writes"):
        _count_at_the_end[8,](counter, tickets, target, 4)


def test_a_barrier_orders_the_lanes_of_a_program_and_no_others():
    pointer, target = torch.zeros(8), torch.zeros(8)
    _write_wait_read[1,](pointer, target, BLOCK=8)
    assert target.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(MemoryFaultError, match=r"program 0 and .* program 1 write"):
        _write_wait_read[2,](pointer, target, BLOCK=8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64])
@pytest.mark.parametrize("numel", [1, 8, 29])
def test_what_is_right_passes(dtype, numel):
    whole = torch.zeros(64, dtype=dtype)
    of = whole[3 : 3 + numel]
    _add_one[4,](of, numel, 8, BLOCK=8)
    assert of.eq(1).all()
    assert whole.sum() == numel
    _copy_before[1,](whole, 32, 32, BLOCK=32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_an_element_past_the_end(dtype):
    of = torch.zeros(16, dtype=dtype)
    with pytest.raises(
        InterpreterError, match=r"_add_one: program 2 reads .* 0 bytes past .* 1 el"
    ):
        _add_one[3,](of, 17, 8, BLOCK=8)


def test_an_element_before_the_first():
    of = torch.zeros(16)
    with pytest.raises(InterpreterError, match=r"program 0 reads 4 bytes at .* in all 1 elements"):
        _copy_before[1,](of, 8, -1, BLOCK=8)


def test_what_has_been_freed():
    of = torch.zeros(1 << 16)
    table = torch.tensor([of.data_ptr()])
    _add_one_at[1,](table, 8, BLOCK=8)
    assert of[:8].eq(1).all()
    of = of[8:].clone()
    with pytest.raises(InterpreterError, match="_add_one_at: program 0 reads 4 bytes at "):
        _add_one_at[1,](table, 8, BLOCK=8)


def test_what_is_not_aligned():
    of, target = torch.zeros(16), torch.zeros(1)
    table = torch.tensor([of.data_ptr() + 4])
    _read_wide[1,](table, target, DTYPE=tl.float32, TOLD=4)
    with pytest.raises(InterpreterError, match=r"_read_wide: program 0 reads 8 bytes at 0x\w+4, w"):
        _read_wide[1,](table, target, DTYPE=tl.float64, TOLD=4)
    with pytest.raises(InterpreterError, match="_read_wide: no multiples of 16, as promised"):
        _read_wide[1,](table, target, DTYPE=tl.float32, TOLD=16)


def test_only_a_gradient():
    """Only its parameter refers to the gradient."""
    parameter = torch.nn.Parameter(torch.zeros(1 << 16))
    parameter.sum().backward()
    _add_one_at[1,](torch.tensor([parameter.grad.data_ptr()]), 8, BLOCK=8)
    assert parameter.grad[:8].eq(2).all()


RACES = {
    "programs that write the same": (
        lambda: _add_one[2,](torch.zeros(16), 16, 7, BLOCK=8),
        "lane 7 of program 0 and lane 0 of program 1 write to the same place, 0x",
    ),
    "lanes that write the same": (
        lambda: _write_all_to_one[1,](torch.zeros(8), BLOCK=8),
        "lane 0 of program 0 and lane 1 of program 0 write to the same place, 0x",
    ),
    "a program that reads what another writes": (
        lambda: _copy_before[2,](torch.zeros(24), 16, 8, BLOCK=8),
        "lane 0 of program 0 reads what lane 0 of program 1 writes, at 0x",
    ),
    "a lane that reads what another writes": (
        lambda: _copy_before[1,](torch.zeros(9), 8, 1, BLOCK=8),
        "lane 0 of program 0 reads what lane 1 of program 0 writes, at 0x",
    ),
    "a lane that reads what another has written": (
        lambda: _write_then_read[1,](torch.zeros(8), torch.zeros(8), BLOCK=8),
        "lane 0 of program 0 reads what lane 7 of program 0 writes, at 0x",
    ),
}


@pytest.mark.parametrize("what", RACES)
def test_a_race(what):
    launch, said = RACES[what]
    with pytest.raises(MemoryFaultError, match=said):
        launch()
