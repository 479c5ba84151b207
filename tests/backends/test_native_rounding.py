"""The native kernels' conversions between float32 and 16 bits."""

from __future__ import annotations

import math

import pytest
import torch
from contract import name_of
from native_helpers import HALF, wrapped

from clr_optim.kernels.native import load
from clr_optim.plan import DTYPES as NATIVE_DTYPES

pytestmark = pytest.mark.usefixtures("native_kernels")


def rounded(dtype, values):
    """Return the values after the library's store and load."""
    out = torch.empty_like(values)
    number = NATIVE_DTYPES.index(dtype)
    load().round(number, values.data_ptr(), out.data_ptr(), values.numel())
    return out


def assert_rounds(dtype, values):
    values = values.contiguous()
    ours, expected = rounded(dtype, values), values.to(dtype).float()
    wrong = ~((ours == expected) & (ours.signbit() == expected.signbit()))
    wrong &= ~(ours.isnan() & expected.isnan())
    assert not wrong.any(), (values[wrong][:5], ours[wrong][:5], expected[wrong][:5])


def patterns(dtype):
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_every_16_bit_pattern_survives(dtype):
    assert_rounds(dtype, patterns(dtype).float())


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_every_16_bit_pattern_is_loaded_by_a_step(dtype):
    values = patterns(dtype)
    p = torch.nn.Parameter(torch.zeros_like(values))
    p.grad = values.clone()
    opt = wrapped(torch.optim.SGD([p], lr=1.0, momentum=0.5), base_lr=1.0, backend="native")
    opt.step()
    buffer = opt.state[p]["momentum_buffer"]
    assert torch.equal(buffer.isnan(), values.isnan())
    assert torch.equal(buffer.nan_to_num(), values.nan_to_num())
    assert torch.equal(p.nan_to_num(), (-values).nan_to_num())


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_rounding_halfway_between_neighbours(dtype):
    low = patterns(dtype).float()
    low = low[low.isfinite()].sort().values
    halves = (low[:-1].double() + low[1:].double()).mul(0.5).float()
    for towards in (-math.inf, math.inf):
        assert_rounds(dtype, torch.nextafter(halves, torch.tensor(towards)))
    assert_rounds(dtype, halves)


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_rounding_at_the_ends(dtype):
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal
    steps = torch.linspace(-2, 2, 40001)
    edges = [math.inf, math.nan, 0.0, 3.4e38, 1e-45, 65504, 65519.996, 65520, 65536, 2**-25, 2**-24]
    values = torch.cat([steps * tiny, torch.tensor(edges), steps[steps.abs() <= 1] * largest])
    assert_rounds(dtype, torch.cat([values, -values]))
    near = torch.tensor([largest], dtype=torch.float64) * torch.linspace(0.99, 1.01, 20001)
    assert_rounds(dtype, near.float())


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_rounding_any_float(dtype):
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator)
    assert_rounds(dtype, bits.to(torch.int32).view(torch.float32))
    normal = torch.randn(1 << 18, generator=generator)
    for scale in (1e-7, 1e-4, 1.0, 1e4):
        assert_rounds(dtype, normal * scale)


@pytest.mark.parametrize("rate", [0.3, 1.7, 3e-4])
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_a_step_rounds_alike_in_vectors_and_tails(dtype, rate):
    # Vectors use the processor's instruction, tails use integer arithmetic; both round to nearest.
    values = patterns(dtype)
    expected = (values.float() * torch.tensor(-rate)).to(dtype)
    for length in (len(values), 7):
        params = [torch.nn.Parameter(torch.zeros_like(v)) for v in values.split(length)]
        for p, g in zip(params, values.split(length), strict=True):
            p.grad = g
        wrapped(torch.optim.SGD(params, lr=rate), base_lr=rate, backend="native").step()
        found = torch.cat([p.detach() for p in params])
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_float16s_subnormals_count_where_float32s_are_flushed():
    # They are normal numbers in float32, so torch's step does not flush them.
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        results = []
        for backend in ("native", "torch"):
            p = torch.nn.Parameter(torch.zeros(19, dtype=torch.float16))
            p.grad = torch.full((19,), 3 * 2.0**-24).half()
            inner = torch.optim.SGD([p], lr=1.0, foreach=False)
            opt = wrapped(inner, base_lr=1.0, backend=backend, max_grad_norm=1.0)
            opt.step()
            results.append((p.detach(), opt.grad_norm))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(results[0][0], torch.full((19,), -3 * 2.0**-24).half())
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].item() == pytest.approx(math.sqrt(19) * 3 * 2.0**-24)
