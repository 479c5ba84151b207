"""Parameters that join a run late: a resumed run has them in another order, and the same bits."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from clr_optim import CyclicalOptimizer, Spike

SIZES = (35, 7, 21, 3, 50)


def make(dtype: torch.dtype, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(size, generator=generator, dtype=dtype)) for size in SIZES
    ]
    inner = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    return params, CyclicalOptimizer(inner, "triangular", step_size_up=5, **options)


def run(params: list[torch.nn.Parameter], opt: Any, steps: range, joins: int) -> list[float]:
    norms = []
    for k in steps:
        opt.zero_grad()
        for j, p in enumerate(params):
            # Later layers first, as in gradual unfreezing.
            if k >= joins or j >= 3:
                p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype) * (j + 1) + k * k)
        opt.step()
        norms.append(opt.grad_norm.item())
    return norms


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_above": Spike()}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("joins", [3, 9])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_resumed_run_has_the_same_bits(backend, joins, dtype, options):
    params, opt = make(dtype, backend=backend, **options)
    norms = run(params, opt, range(30), joins)
    others, first = make(dtype, backend=backend, **options)
    assert run(others, first, range(6), joins) == norms[:6]
    again, second = make(dtype, backend=backend, **options)
    for p, q in zip(again, others, strict=True):
        p.data.copy_(q.detach())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert run(again, second, range(6, 30), joins) == norms[6:]
    assert all(map(torch.equal, params, again))
    assert str(second.state_dict()["param_groups"]) == str(opt.state_dict()["param_groups"])


def test_the_norm_is_that_of_exact_arithmetic_in_any_order():
    generator = torch.Generator().manual_seed(1)
    sizes = [3, 70_000, 1, 5, 20_000]
    values = [
        torch.randn(size, generator=generator, dtype=torch.float64) * 10.0 ** (2 * i)
        for i, size in enumerate(sizes)
    ]
    norms = set()
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]):
        params = [torch.nn.Parameter(torch.zeros_like(values[i])) for i in order]
        opt = CyclicalOptimizer(torch.optim.SGD(params), max_grad_norm=1.0, backend="native")
        for _ in range(3):  # the general way, and then native code alone
            for i, p in zip(order, params, strict=True):
                p.grad = values[i].clone()
            opt.step()
            norms.add(opt.grad_norm.item())
    assert len(norms) == 1
    exact = math.sqrt(math.fsum(x * x for each in values for x in each.tolist()))
    assert norms.pop() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e200])
def test_a_norm_beyond_floats(value):
    params = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    opt = CyclicalOptimizer(torch.optim.SGD(params), max_grad_norm=1.0, backend="native")
    for _ in range(3):
        for p in params:
            p.grad = torch.full_like(p, value)
        opt.step()
        norm = opt.grad_norm.item()
        assert math.isnan(norm) if math.isnan(value) else norm == math.inf
