"""The native backend in use: autograd, the first step, ``backend="native"`` and ``"auto"``."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from changes import PATTERNS, sparse
from contract import assert_a_backward_through_an_older_graph_raises, kernels
from native_helpers import (
    BY_NAME,
    Twins,
    assert_alike,
    assert_first_gradient_is_whole,
    drawn,
    held,
    members,
    parameters,
    tensors_of,
    twins,
    wrapped,
)

from clr_optim import CyclicalOptimizer

pytestmark = pytest.mark.usefixtures("native_kernels")


# ---- autograd


@kernels
def test_a_backward_through_an_older_graph_raises(case):
    for opt in twins(case, ((3, 3), (3,))).both():
        assert_a_backward_through_an_older_graph_raises(opt)


def test_the_step_needs_no_grad_mode_and_leaves_leaves():
    pair = twins(BY_NAME["adam"])
    pair.draw()
    with torch.no_grad():
        pair.step()
    pair.draw()
    with torch.enable_grad():
        pair.step()
    for p in members(pair.ours):
        assert p.is_leaf
        assert p.requires_grad


# ---- the first step


@pytest.mark.parametrize("name", ["sgd-mom", "sgd-damp", "adam", "adagrad", "rmsprop-mom"])
def test_a_step_that_fails_leaves_no_state(name):
    pair = twins(BY_NAME[name])
    pair.draw()

    def fails(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pair.ours.step(fails)
    handle = pair.ours.register_step_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        pair.ours.step()
    handle.remove()
    handle = pair.ours.optimizer.register_step_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        pair.ours.step()
    handle.remove()
    assert pair.ours.iteration == 0
    assert_alike(*pair.both())
    pair.run(3)


@pytest.mark.parametrize("name", ["sgd-mom", "adam"])
def test_a_first_step_refused_by_torch_leaves_no_state(name):
    pair = twins(BY_NAME["adam"], ((5, 3), (7,)))
    pair.draw()
    before = copy.deepcopy(tensors_of(pair.ours))
    for opt in pair.both():
        p = members(opt)[0]
        p.grad = sparse(p.grad, 1)
        with pytest.raises(RuntimeError, match="sparse gradients"):
            opt.step()
    assert all(torch.equal(t, before[k]) for k, t in tensors_of(pair.ours).items())
    assert pair.ours.iteration == 0
    assert all(not state for state in held(pair.ours))
    pair.run(2)


def test_dampening_does_not_touch_the_first_gradient():
    assert_first_gradient_is_whole("native")


def test_a_buffer_of_none_is_a_first_step():
    # Checkpoints of older versions of torch hold None.
    pair = twins(BY_NAME["sgd-damp"])
    for opt in pair.both():
        for p in members(opt):
            opt.state[p]["momentum_buffer"] = None
    pair.run(4)


def test_a_buffer_is_a_copy_of_the_gradient():
    pair = twins(BY_NAME["sgd-mom"])
    pair.draw()
    pair.step()
    for p in members(pair.ours):
        assert pair.ours.state[p]["momentum_buffer"].data_ptr() != p.grad.data_ptr()


# ---- asked for by name


def test_by_name_it_refuses_other_optimizers():
    inner = torch.optim.ASGD(parameters(drawn([(3,)], torch.float32)))
    groups = str(inner.param_groups)
    with pytest.raises(ValueError, match="no fused kernel for ASGD"):
        CyclicalOptimizer(inner, backend="native")

    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(ValueError, match="no fused kernel for Mine"):
        CyclicalOptimizer(Mine(parameters(drawn([(3,)], torch.float32))), backend="native")
    assert str(inner.param_groups) == groups


@pytest.mark.parametrize("name", ["sgd-mom", "adagrad"])
@pytest.mark.parametrize("warm", [0, 2])
def test_by_name_it_refuses_what_only_torch_can_do_and_changes_nothing(name, warm):
    pair = twins(BY_NAME[name], ((5, 3), (7,)), backend="native")
    pair.run(warm)
    pair.draw()
    p = members(pair.ours)[0]
    dense_grad = p.grad
    for odd, why in (
        (sparse(dense_grad, 1), "sparse gradients"),
        (dense_grad.t().contiguous().t(), "another layout"),
    ):
        p.grad = odd
        before = copy.deepcopy(tensors_of(pair.ours))
        rate = pair.ours.param_groups[0]["lr"]
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"backend='native' cannot serve 1 .*{why}"):
                pair.ours.step()
        assert why.split()[-1] in pair.ours.explain()
        assert pair.ours.iteration == warm
        assert pair.ours.param_groups[0]["lr"] == rate
        assert list(tensors_of(pair.ours)) == list(before)
        assert all(torch.equal(t, before[k]) for k, t in tensors_of(pair.ours).items())
        assert p.grad is odd
    p.grad = dense_grad  # the backend serves again
    pair.step()
    pair.run(2)


def test_auto_returns_to_the_kernels(monkeypatch):
    pair = twins(BY_NAME["sgd-mom"], ((5, 3), (7,)))
    pair.run(1)
    PATTERNS["other_layout"](pair, 1)
    pair.step()
    pair.run(1)

    def refuse(*args, **kwargs):
        raise AssertionError("torch's step ran")

    monkeypatch.setattr(torch.optim.SGD, "_init_group", refuse)
    pair.draw()
    pair.ours.step()


def test_explain_names_the_reasons():
    gapped = torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
    plain, odd, rows = parameters(drawn(((5, 3), (5, 3), (5, 3)), torch.float32))
    imaginary = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    (decayed,) = parameters(drawn([(3,)], torch.float32))
    for p in (plain, gapped, odd, rows, imaginary, decayed):
        p.grad = torch.ones_like(p)
    odd.grad = torch.ones(3, 5).t()
    rows.grad = sparse(torch.ones(5, 3), 1)
    groups = [
        {"params": [plain, gapped, odd, rows, imaginary]},
        {"params": [decayed], "weight_decay": torch.tensor(0.1)},
    ]
    opt = wrapped(torch.optim.SGD(groups, lr=0.1, foreach=False))
    lines = opt.explain().splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("native: 1 parameter tensors, 15 values, SGD")
    for why in ("gaps", "another layout", "sparse", "complex64", "weight_decay is a tensor"):
        assert sum(line.startswith("torch: 1 ") and why in line for line in lines) == 1, why
    opt.step()
    assert "asked for by" in wrapped(torch.optim.SGD([plain], lr=0.1), backend="torch").explain()


# ---- auto never changes the numbers beyond rounding


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@kernels
def test_what_the_wrapped_optimizer_was_built_with_does_not_matter(case, flag):
    values = drawn(((5, 3), (7,)), torch.float64)
    twin = case.make(parameters(values))
    try:
        inner = case.cls(parameters(values), **{"lr": case.lr, **case.options, flag: True})
    except TypeError:
        pytest.skip(f"{case.cls.__name__} has no {flag}")
    pair = Twins(lambda: twin)
    pair.ours = wrapped(inner)
    pair.run(6)


@kernels
def test_training_a_model(case):
    def make(backend):
        torch.manual_seed(6)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
        ).double()
        model = model.to(memory_format=torch.channels_last)
        return model, case.ours(model.parameters(), backend=backend, max_grad_norm=1.0)

    runs = [make("torch"), make("auto")]
    generator = torch.Generator().manual_seed(11)
    for _ in range(10):
        x = torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (8,), generator=generator)
        for model, opt in runs:
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
    assert_alike(runs[1][1], runs[0][1], 1e-10)


def test_no_warning_and_no_state_on_an_idle_step():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = BY_NAME["adam"].ours(parameters(drawn([(3,)], torch.float32)), backend="native")
        opt.step()
        assert opt.iteration == 1
        assert not opt.state
