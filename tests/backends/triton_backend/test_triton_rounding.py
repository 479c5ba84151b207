"""16-bit tensors take approximate roots and quotients: the results stay within the contract.

The relative error of NVIDIA's ``sqrt.approx`` and ``div.full`` is at most 2⁻²² (PTX ISA). The
interpreter rounds as IEEE does, so here each root and quotient gets such an error.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from native_helpers import HALF, KERNELS, like, members, parameters, wrapped
from triton_helpers import INTERPRETED, MARKS, Contract, drawn, in_both_ways, named, take_way

pytestmark = [
    *MARKS,
    pytest.mark.skipif(not INTERPRETED, reason="patches the interpreter"),
]

MOST = 2.0**-22


@pytest.fixture
def errors(monkeypatch):
    """Give each float32 root and quotient of the kernels an error; return how many got one."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    generator, found = np.random.default_rng(5), []

    def inexact(compute):
        def computed(builder, *operands):
            handle = compute(builder, *operands)
            if handle.data.dtype != np.float32:
                return handle
            found.append(handle.data.size)
            wrong = 1 + MOST * generator.choice([-1, 1], handle.data.shape)
            return TensorHandle((handle.data * wrong).astype(np.float32), handle.dtype.scalar)

        return computed

    for name in ("create_sqrt", "create_fdiv"):
        monkeypatch.setattr(InterpreterBuilder, name, inexact(getattr(InterpreterBuilder, name)))
    return found


@pytest.mark.parametrize("cell", in_both_ways(itertools.product(KERNELS, HALF)), ids=named)
def test_16_bit_results_stay_within_the_contract(cell, monkeypatch, errors):
    case, dtype, way = cell
    take_way(monkeypatch, way)
    contract = Contract(case, dtype, drawn([(40,), (1100,)], torch.float64))
    for k in range(6):
        grads = drawn([(40,), (1100,)], torch.float64, k + 1)
        contract.step([like(g, p) for g, p in zip(grads, members(contract.ours), strict=True)])
    contract.compare()
    exact = case.kernel in ("sgd", "sgd_momentum", "lion")
    assert bool(errors) is not exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_takes_no_approximation(dtype, errors):
    for case in KERNELS:
        opt = case.ours(parameters(drawn([(40,)], dtype)), backend="triton")
        members(opt)[0].grad = torch.ones_like(members(opt)[0])
        opt.step()
    assert not errors


def test_the_root_of_a_subnormal_number_is_not_zero(monkeypatch):
    """The approximation takes subnormal numbers for 0: without ``eps`` the quotient is infinite."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    root = InterpreterBuilder.create_sqrt

    def flushing(builder, operand):
        data = operand.data
        if data.dtype == np.float32:
            data = np.where(np.abs(data) < np.finfo(np.float32).tiny, np.float32(0), data)
        return root(builder, TensorHandle(data, operand.dtype))

    monkeypatch.setattr(InterpreterBuilder, "create_sqrt", flushing)
    (p,) = parameters([torch.ones(3)], torch.bfloat16)
    opt = wrapped(torch.optim.Adam([p], lr=0.5, eps=0.0), backend="triton", base_lr=0.5, max_lr=0.5)
    p.grad = torch.full_like(p, 3e-18)  # its square times 0.001 is subnormal
    opt.step()
    assert p.tolist() == [0.5] * 3
