"""The torch backend equals torch with its CyclicLR, and torch fed our rates, bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import (
    BY_NAME,
    EVERY_CLASS,
    Problem,
    assert_equals_torch_fed_our_rates,
    assert_same,
    feed,
)

from clr_optim import CyclicalOptimizer


@pytest.fixture(autouse=True)
def _torch_backend(monkeypatch):
    # contract.py compares the kernels, which may round otherwise.
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "torch")


CYCLE = {"step_size_up": 7, "step_size_down": 12}
# 100 steps of the paper's gamma would not show a decay. This gamma is stronger.
GAMMA = 0.99


def ids(values):
    return pytest.mark.parametrize("case", values, ids=lambda c: c.name)


def by_groups(problem):
    return [{"params": [p]} for p in problem.params]


@pytest.mark.parametrize("policy", ["triangular", "triangular2", "exp_range", "scale_fn"])
@ids(EVERY_CLASS)
def test_bit_identical_to_torch_with_cyclic_lr_in_float32(case, policy):
    mine, torchs = Problem(case), Problem(case)
    options = {"scale_fn": lambda x: 1 / (5 ** (x * 0.0001)), "scale_mode": "iterations"}
    if policy != "scale_fn":
        options = {"gamma": GAMMA}
    base = [case.lr / (4 + i) for i in range(len(mine.params))]
    top = [case.lr * (1 + i) for i in range(len(mine.params))]
    if case.closure:  # LBFGS has one group
        base, top = base[:1], top[:1]
    groups = (lambda p: p.params) if case.closure else by_groups
    opt = CyclicalOptimizer(
        case.make(groups(mine)), "triangular" if policy == "scale_fn" else policy,
        base_lr=base, max_lr=top, **CYCLE, **options,
    )  # fmt: skip
    reference = case.make(groups(torchs))
    mode = {} if policy == "scale_fn" else {"mode": policy}
    scheduler = torch.optim.lr_scheduler.CyclicLR(
        reference, base, top, cycle_momentum=False, **CYCLE, **options, **mode
    )
    for k in range(200):
        mine.step(opt, k, case.closure)
        torchs.step(reference, k, case.closure)
        scheduler.step()
        for a, b in zip(opt.param_groups, reference.param_groups, strict=True):
            assert abs(a["lr"] - b["lr"]) <= 1e-10 * b["lr"]
    assert_same(mine.values(), torchs.values())
    for p, q in zip(mine.params, torchs.params, strict=True):
        assert opt.state[p].keys() == reference.state[q].keys()


@ids(
    [
        c
        for c in EVERY_CLASS
        if "momentum" in c.make(Problem(c).params).defaults
        or "betas" in c.make(Problem(c).params).defaults
    ]
)
def test_bit_identical_with_cycled_momentum(case):
    mine, torchs = Problem(case), Problem(case)
    options = {"base_momentum": 0.7, "max_momentum": 0.9, **CYCLE}
    opt = CyclicalOptimizer(
        case.make(mine.params), base_lr=case.lr / 4, max_lr=case.lr, cycle_momentum=True, **options
    )
    reference = case.make(torchs.params)
    scheduler = torch.optim.lr_scheduler.CyclicLR(
        reference, case.lr / 4, case.lr, cycle_momentum=True, **options
    )
    for k in range(200):
        mine.step(opt, k)
        torchs.step(reference, k)
        scheduler.step()
    assert_same(mine.values(), torchs.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@ids(EVERY_CLASS)
def test_bit_identical_to_plain_torch_fed_our_rates(case, dtype):
    if dtype == torch.bfloat16 and case.name in ("rprop", "lbfgs"):
        # Both train nothing sensible in 16 bits, wrapped or not. Their float32 is tested.
        dtype = torch.float64
    assert_equals_torch_fed_our_rates(case, dtype)


@ids([c for c in EVERY_CLASS if c.name not in ("sparse-adam",)])
def test_closures_are_called_as_torch_calls_them(case):
    mine, torchs = Problem(case), Problem(case)
    opt = CyclicalOptimizer(case.make(mine.params), step_size_up=3)
    reference = case.make(torchs.params)
    for k in range(10):
        feed(reference, opt.lr_at(k))
        calls = {"mine": 0, "torch": 0}

        def closure(problem, who, k=k, calls=calls):
            calls[who] += 1
            return problem.backward(k)

        ours = opt.step(lambda: closure(mine, "mine"))
        expected = reference.step(lambda: closure(torchs, "torch"))
        assert torch.equal(ours, expected)
        assert calls["mine"] == calls["torch"] >= 1
    assert_same(mine.values(), torchs.values())


@ids([c for c in EVERY_CLASS if not c.sparse])
def test_max_grad_norm_is_clip_grad_norm_before_the_step(case):
    mine, torchs = Problem(case), Problem(case)
    opt = CyclicalOptimizer(case.make(mine.params), step_size_up=3, max_grad_norm=0.7)
    assert opt.grad_norm is None
    reference = case.make(torchs.params)
    for k in range(30):
        feed(reference, opt.lr_at(k))
        norms = []

        def closure(problem, clip, k=k, norms=norms):
            loss = problem.backward(k)
            if clip:
                norms.append(torch.nn.utils.clip_grad_norm_(problem.params, 0.7))
            return loss

        if case.closure:
            opt.step(lambda: closure(mine, False))
            reference.step(lambda: closure(torchs, True))
        else:
            closure(mine, False)
            grads = [(p.grad, p.grad.clone()) for p in mine.params]
            opt.step()
            for p, (grad, copy) in zip(mine.params, grads, strict=True):
                assert p.grad is grad
                assert torch.equal(grad, copy)
            closure(torchs, True)
            reference.step()
        assert torch.equal(opt.grad_norm, norms[-1])
    assert_same(mine.values(), torchs.values())


def test_gradients_come_back_when_the_step_fails():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("halfway")

    problem = Problem(BY_NAME["sgd"])
    opt = CyclicalOptimizer(Fails(problem.params, lr=0.1), max_grad_norm=0.1)
    problem.backward(0)
    grads = [p.grad for p in problem.params]
    with pytest.raises(RuntimeError, match="halfway"):
        opt.step()
    assert all(p.grad is g for p, g in zip(problem.params, grads, strict=True))
    assert opt.iteration == 0


def test_clipping_with_nan_gradients_is_torchs():
    mine, torchs = Problem(BY_NAME["sgd"]), Problem(BY_NAME["sgd"])
    opt = CyclicalOptimizer(torch.optim.SGD(mine.params, lr=0.1), max_grad_norm=1.0)
    reference = torch.optim.SGD(torchs.params, lr=opt.lr_at(0)[0])
    for problem in (mine, torchs):
        problem.backward(0)
        problem.params[0].grad[0, 0] = float("nan")
    torch.nn.utils.clip_grad_norm_(torchs.params, 1.0)
    opt.step()
    reference.step()
    assert_same(mine.values(), torchs.values())


def test_zero_grad_both_ways():
    problem = Problem(BY_NAME["adam"])
    opt = CyclicalOptimizer(BY_NAME["adam"].make(problem.params))
    problem.backward(0)
    opt.zero_grad(set_to_none=False)
    assert all(torch.count_nonzero(p.grad) == 0 for p in problem.params)
    opt.zero_grad()
    assert all(p.grad is None for p in problem.params)


def test_complex_parameters():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2)]
    opt = CyclicalOptimizer(torch.optim.Adam(params[:1], lr=0.1), step_size_up=2)
    reference = torch.optim.Adam(params[1:], lr=0.1)
    for k in range(6):
        feed(reference, opt.lr_at(k))
        for p in params:
            p.grad = torch.full_like(p, 1 + 2j) * (k + 1)
        opt.step()
        reference.step()
    assert_same(params[:1], params[1:])


def test_differentiable_optimizers():
    def run(wrap):
        p = torch.ones(3, dtype=torch.float64, requires_grad=True)
        q = p.clone()
        q.retain_grad()
        inner = torch.optim.SGD([q], lr=0.1, differentiable=True)
        opt = CyclicalOptimizer(inner, base_lr=0.05, step_size_up=2) if wrap else inner
        if not wrap:
            inner.param_groups[0]["lr"] = 0.05
        q.grad = (3 * q * q).detach()
        opt.step()
        (q**2).sum().backward()
        return p.grad

    assert torch.equal(run(True), run(False))


def test_torch_compile_breaks_the_graph_and_cycles_on():
    model = torch.nn.Linear(2, 1)
    opt = CyclicalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), step_size_up=2)
    rates = []

    @torch.compile(backend="eager")
    def train(x):
        model(x).sum().backward()
        opt.step()
        opt.zero_grad()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own
        for _ in range(5):
            rates.append(opt.param_groups[0]["lr"])
            train(torch.ones(1, 2))
    assert opt.iteration == 5
    assert rates == [opt.lr_at(k)[0] for k in range(5)]


@pytest.mark.parametrize("name", ["Triangular2", "EXP_RANGE"])
def test_the_case_of_a_policys_name_does_not_matter(name):
    param = torch.nn.Parameter(torch.ones(2))
    opt, same = (
        CyclicalOptimizer(torch.optim.SGD([param], lr=0.1), policy, step_size_up=2, gamma=0.9)
        for policy in (name, name.lower())
    )
    assert opt.schedule == same.schedule
    assert opt.schedule.name == name.lower()


@pytest.mark.parametrize("hook", [print, lambda opt, more=1: None, lambda *opts: None])
def test_hooks_of_one_argument_are_accepted(hook):
    opt = CyclicalOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    opt.register_cycle_end_hook(hook).remove()
