"""Float32 masters of bfloat16 parameters on the device, beside float32 models and NumPy's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_helpers import DEVICE, INTERPRETED, MARKS, RUNS, SLOW

pytestmark = MARKS

if RUNS:
    import triton
    import triton.language as tl

    from clr_optim.kernels.triton.masters import join, split

    @triton.jit
    def _join(params, rests, masters, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(masters + at, join(tl.load(params + at), tl.load(rests + at)))

    @triton.jit
    def _split(masters, params, rests, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        param, rest = split(tl.load(masters + at))
        tl.store(params + at, param)
        tl.store(rests + at, rest)


# ---- bits


def launched(kernel, *tensors):
    """Launch a kernel on tensors of one size: in the interpreter, one program."""
    block = len(tensors[0]) if INTERPRETED else 1024
    on_device = [torch.from_numpy(tensor).to(DEVICE) for tensor in tensors]
    kernel[(len(tensors[0]) // block,)](*on_device, BLOCK=block)
    return [tensor.cpu().numpy() for tensor in on_device]


def joined(params, rests):
    masters = np.zeros(len(params), np.float32)
    return launched(_join, params.view(np.int16), rests, masters)[2]


def parted(masters):
    halves = [np.zeros(len(masters), np.int16) for _ in range(2)]
    return launched(_split, masters, *halves)[1:]


PARAMS = np.arange(1 << 16, dtype=np.uint16)
RESTS = [0, 1, -1, 2, 0x7FFF, -0x8000, 0x4000, -0x4001, 12345, -12345]
# The fake device takes each program by itself.
SOME = RESTS[:6] if SLOW and not INTERPRETED else [*RESTS, *range(-30_000, 30_000, 1009)]


@pytest.mark.parametrize("rest", SOME)
def test_every_parameter_with_a_rest(rest):
    """No pair makes NaN of a number, and each master that has a pair keeps it."""
    rests = np.full(1 << 16, rest, np.int16)
    found = joined(PARAMS, rests)
    rounded = (PARAMS.astype(np.uint32) << 16).view(np.float32)
    is_nan = np.isnan(rounded)
    assert np.isnan(found[is_nan]).all()
    magnitude = PARAMS & 0x7FFF
    is_stale = (magnitude == 0) & (rest < 0) | (magnitude == 0x7F80) & (rest > 0)
    assert (found[is_stale] == rounded[is_stale]).all()
    assert (np.signbit(found) == np.signbit(rounded))[~is_nan].all()
    exact = ~is_nan & ~is_stale
    bits = (PARAMS.astype(np.int64) << 16) + rest
    assert (found.view(np.uint32)[exact] == bits[exact]).all()
    params, rests_again = parted(found)
    assert (params.view(np.uint16)[exact] == PARAMS[exact]).all()
    assert (rests_again[exact] == rest).all()


def test_masters_are_rounded_to_nearest_and_come_back():
    """Subnormals, ties, the largest numbers, infinities, NaN, and random bits."""
    ends = np.array([0, 1, 2, 0x3FFF, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF], np.uint32)
    uppers = [0, 1, 0x7F, 0x80, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF]
    known = [(u << 16) | ends for each in uppers for u in (each, each | 0x8000)]
    drawn = np.random.default_rng(3).integers(0, 1 << 32, 1 << 15, dtype=np.uint32)
    bits = np.concatenate([*known, drawn])[: 1 << 15].astype(np.uint32)
    masters = bits.view(np.float32)
    params, rests = parted(masters)
    is_nan = np.isnan(masters)
    assert (params[is_nan] == 0x7FC0).all()
    assert (rests[is_nan] == 0).all()
    again = joined(params.view(np.uint16), rests)
    assert np.isnan(again[is_nan]).all()
    assert (again.view(np.uint32) == bits)[~is_nan].all()
    # To nearest, ties away from zero, in exact arithmetic.
    finite = np.isfinite(masters)
    bits, exact = bits[finite], masters[finite].astype(np.float64)
    rounded = params.view(np.uint16)[finite].astype(np.int64)
    down = (bits & 0xFFFF0000).view(np.float32).astype(np.float64)
    unit = np.spacing(down.astype(np.float32)).astype(np.float64) * 65536  # signed as the number
    is_up = abs(exact - down) >= abs(unit) / 2
    assert (rounded == (bits >> 16) + is_up).all()
