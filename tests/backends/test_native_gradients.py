"""The native backend beside torch: which gradients come, groups, shared memory, clipping."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from changes import PATTERNS, drop, sparse
from contract import (
    assert_clips,
    assert_clips_in_another_dtype,
    assert_clips_nan_and_inf,
    assert_one_norm_over_both_backends,
    kernels,
    name_of,
)
from native_helpers import (
    BY_NAME,
    DTYPES,
    HALF,
    MIXED_GROUPS,
    Twins,
    drawn,
    failure,
    feed,
    held,
    many_groups,
    members,
    parameters,
    tensors_of,
    twins,
)

from clr_optim import CyclicalOptimizer

pytestmark = pytest.mark.usefixtures("native_kernels")


# ---- gradients that come and go


@pytest.mark.parametrize("pattern", PATTERNS)
@kernels
def test_gradient_patterns(case, pattern):
    pair = twins(case, ((5, 3), (7,), (), (7,)))
    for k in range(9):
        PATTERNS[pattern](pair, k)
        pair.step()


# torch warns once per process, in its step on sparse gradients.
quiet = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


@quiet
@pytest.mark.parametrize("name", ["sgd", "sgd-mom", "adagrad-decay", "adagrad-init"])
def test_sparse_gradients_beside_dense(name):
    pair = twins(BY_NAME[name], ((5, 3), (7,), (4, 2)))
    for k in range(9):
        pair.draw()
        for opt in pair.both():
            p = members(opt)[0]
            p.grad = sparse(p.grad, k)
            if k % 4 == 3:
                p.grad = None
        pair.step()


@quiet
@pytest.mark.parametrize("name", ["sgd", "sgd-mom", "adam", "adadelta", "rmsprop", "adagrad"])
def test_gradients_that_turn_sparse_and_dense_again(name):
    # SGD's sparse buffer takes no dense gradient, and Adam takes no sparse one: both raise.
    pair = twins(BY_NAME[name], ((5, 3), (7,)))
    for k in range(9):
        pair.draw()
        if k % 3 == 1:
            for opt in pair.both():
                p = members(opt)[0]
                p.grad = sparse(p.grad, k)
        pair.step()


@kernels
def test_a_gradient_that_is_its_parameter(case):
    """A kernel may write the parameter before it reads the gradient; torch's own step serves."""
    pair = twins(case)
    pair.draw()
    pair.step()
    for _ in range(3):
        for opt in pair.both():
            for p in members(opt):
                p.grad = p.detach()
        pair.step()
    assert "gradients in the memory of their parameter" in pair.ours.explain()
    pair.draw()
    pair.step()
    assert "memory" not in pair.ours.explain()


@kernels
def test_a_gradient_that_overlaps_its_parameter(case):
    """torch's step may raise, and ours then raises the same."""

    def with_overlaps(make):
        bases = [torch.cat([x.flatten(), x.new_zeros(1)]) for x in values]
        params = [torch.nn.Parameter(base[:-1]) for base in bases]
        return bases, make(params)

    values = drawn([(5,), (70,)], torch.float64)
    (bases, ours), (others, twin) = with_overlaps(case.ours), with_overlaps(case.make)
    for grads in (values, None):  # a first step, which a kernel takes
        for opt, memory in ((ours, bases), (twin, others)):
            for i, p in enumerate(members(opt)):
                p.grad = memory[i][1:] if grads is None else grads[i].clone()
        feed(twin, ours)
        if grads is not None:
            ours.step()
            twin.step()
    errors = [failure(lambda opt: opt.step(), opt) for opt in (ours, twin)]
    assert type(errors[0]) is type(errors[1])
    if errors[0] is None:  # after an error both may have changed a part
        for p, q in zip(members(ours), members(twin), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# ---- groups


@pytest.mark.parametrize("name", MIXED_GROUPS)
def test_groups(name):
    pair = Twins(many_groups(*MIXED_GROUPS[name]))
    for k in range(12):
        pair.draw()
        drop(pair, lambda i: (i + k) % 4 == 0)  # noqa: B023
        pair.step()


@kernels
def test_several_dtypes_in_one_optimizer(case):
    values = drawn([(5, 3)] * 4, torch.float64)
    mixed = case.ours([p for d in DTYPES for p in parameters(values[:1], d)], backend="native")
    alone = [case.ours(parameters(values[:1], d), backend="native") for d in DTYPES]
    for k in range(6):
        for p, single in zip(members(mixed), alone, strict=True):
            grad = drawn([(5, 3)], p.dtype, seed=k)[0]
            p.grad, members(single)[0].grad = grad, grad.clone()
            single.step()
        mixed.step()
    for i, single in enumerate(alone):
        (mine,), expected = held(single), held(mixed)[i]
        for (_, a), (_, b) in zip(mine, expected, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(members(mixed)[i], members(single)[0])


@pytest.mark.parametrize("name", ["sgd-mom", "adamw", "adagrad", "rmsprop-mom"])
def test_a_parameter_given_twice(name):
    def make():
        p, q = parameters(drawn(((4, 3), (5,)), torch.float64))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            return BY_NAME[name].make([p, q, p])

    Twins(make).run(5)


@pytest.mark.parametrize("kind", ["all-of-it", "part", "neighbours"])
@kernels
def test_parameters_that_share_memory(case, kind):
    def make():
        base = drawn([(24,)], torch.float64)[0]
        views = {
            "all-of-it": [base, base.view(4, 6)],
            "part": [base[:16], base[8:]],
            "neighbours": [base[:8], base[8:]],
        }[kind]
        (other,) = parameters(drawn([(3,)], torch.float64))
        return case.make([*map(torch.nn.Parameter, views), other])

    Twins(make).run(6)


@pytest.mark.parametrize("gaps_first", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd-wd", "rmsprop-mom"])
def test_parameters_that_share_memory_with_one_left_to_torch(name, gaps_first):
    def make():
        base = drawn([(4, 6)], torch.float64)[0]
        pair = [torch.nn.Parameter(base), torch.nn.Parameter(base[:, :3])]
        case = BY_NAME[name]
        return case.make(pair[::-1] if gaps_first else pair, lr=0.5, weight_decay=0.5)

    Twins(make).run(4)


@kernels
def test_parameters_with_gaps(case):
    def make():
        base = drawn([(4, 6)], torch.float64)[0]
        gaps = torch.nn.Parameter(base[:, ::2])
        assert not gaps.is_contiguous()
        return case.make([gaps, *parameters(drawn([(5,)], torch.float64))])

    pair = Twins(make)
    pair.run(5)
    assert "gaps" in pair.ours.explain()


def test_an_overlapping_parameter():
    def make():
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(1).expand(3))], lr=0.1, foreach=False)

    pair = Twins(make)
    pair.draw()
    for opt in pair.both():
        members(opt)[0].grad = torch.ones(3)
    pair.step()


# ---- clipping


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6, math.inf])
@kernels
def test_clipping(case, limit):
    assert_clips(twins(case, max_grad_norm=limit), limit, steps=6)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=name_of)
def test_clipping_in_other_dtypes(dtype):
    assert_clips_in_another_dtype(dtype, backend="native", draw=drawn, tolerance=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
@kernels
def test_clipping_nan_and_inf(case, value):
    assert_clips_nan_and_inf(twins(case, max_grad_norm=1.0), value, steps=4)


def test_clipping_one_norm_over_both_backends():
    assert_one_norm_over_both_backends(Twins, steps=5)


def _torch_clips_sparse_gradients() -> bool:
    """Return whether torch takes the norm of sparse gradients, as torch 2.14 and later do."""
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = sparse(torch.ones(2, 2), 1)
    try:
        torch.nn.utils.clip_grad_norm_([p], 1.0)
    except NotImplementedError:
        return False
    return True


refuses_sparse = pytest.mark.skipif(
    _torch_clips_sparse_gradients(), reason="this torch clips sparse gradients"
)
clips_sparse = pytest.mark.skipif(
    not _torch_clips_sparse_gradients(), reason="this torch takes no norm of sparse gradients"
)


@clips_sparse
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_clipping_sparse_gradients_equals_torch(backend):
    def start() -> tuple[list[torch.nn.Parameter], torch.optim.Adagrad]:
        params = [torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(3))]
        params[0].grad, params[1].grad = sparse(torch.ones(4, 2), 1), torch.ones(3)
        return params, torch.optim.Adagrad(params, lr=0.1)

    (params, adagrad), (expected, twin) = start(), start()
    opt = CyclicalOptimizer(adagrad, base_lr=0.1, max_grad_norm=0.5, backend=backend)
    own = params[0].grad.to_dense()
    norm = torch.nn.utils.clip_grad_norm_(expected, 0.5)
    opt.step()
    twin.step()
    assert opt.grad_norm == norm
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0.0)
    assert torch.equal(params[0].grad.to_dense(), own)


@refuses_sparse
def test_clipping_sparse_gradients_fails_as_in_torch_and_changes_nothing():
    pair = twins(BY_NAME["sgd-mom"], ((5, 3), (7,)), max_grad_norm=0.5)
    pair.draw()
    torch.nn.utils.clip_grad_norm_(members(pair.twin), 0.5)
    pair.step()
    pair.draw()
    p, q = members(pair.ours)
    p.grad = sparse(p.grad, 2)
    grads = p.grad, q.grad
    before = copy.deepcopy(tensors_of(pair.ours))
    with pytest.raises(NotImplementedError, match=r"max_grad_norm=0\.5 cannot clip sparse"):
        pair.ours.step()
    assert (p.grad, q.grad) == grads
    assert pair.ours.iteration == 1
    assert all(torch.equal(t, before[k]) for k, t in tensors_of(pair.ours).items())


@refuses_sparse
@pytest.mark.parametrize("backend", ["auto", "native", "torch"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_clipping_sparse_gradients_says_what_to_do(backend, with_closure):
    rows, dense = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(3))
    adagrad = torch.optim.Adagrad([rows, dense], lr=0.1)
    opt = CyclicalOptimizer(adagrad, max_grad_norm=2.0, backend=backend)
    rows.grad = sparse(torch.ones(4, 2), 1)
    dense.grad = torch.ones(3)
    before = copy.deepcopy(opt.state_dict())
    message = r"max_grad_norm=2\.0 cannot clip sparse .*shape \[4, 2\].*without max_grad_norm"
    with pytest.raises(NotImplementedError, match=message):
        opt.step(*([lambda: torch.ones(())] if with_closure else []))
    assert str(opt.state_dict()) == str(before)
    assert (rows.tolist(), dense.tolist()) == ([[1.0] * 2] * 4, [1.0] * 3)
    assert rows.grad.layout is torch.sparse_coo
