"""The native backend's scan: looking ahead, releasing gradients, tensors beyond plain memory."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch
from changes import Odd, drop, many, sparse
from internals import plan_of
from native_helpers import BY_NAME, assert_alike, feed, members, twins

from clr_optim import CyclicalOptimizer
from clr_optim.plan import words

pytestmark = pytest.mark.usefixtures("native_kernels")


# ---- the scan looks ahead


def test_the_words_are_found_in_this_torch():
    impl, storage = words.find_pointers()
    assert (impl, storage) == words.known_words()[:2] != (0, 0)
    # A parameter with a gradient has the same words as the plain tensor of the search.
    p = torch.nn.Parameter(torch.ones(3).t())
    p.grad = torch.ones(3)
    for tensor in (p, p.grad):
        four_words = ctypes.c_void_p * 4
        assert four_words.from_address(id(tensor))[impl] == tensor._cdata
        found = four_words.from_address(tensor._cdata)[storage]
        assert found == tensor.untyped_storage()._cdata


def test_without_the_words_it_does_not_look_ahead(monkeypatch):
    for storage in (SimpleNamespace(), SimpleNamespace(_cdata=8)):
        monkeypatch.setattr(torch.Tensor, "untyped_storage", lambda self, s=storage: s)
        assert words.find_pointers() == (0, 0)


def test_a_switch_keeps_it_from_looking_ahead(monkeypatch):
    monkeypatch.setenv("CLR_OPTIM_LOOK_AHEAD", "0")
    known = words.known_words()
    assert known.storage == 0
    assert known.impl != 0  # still needed to read the negation bit
    assert known.negative != 0
    pair = many("adam", 20)
    pair.run(2)
    assert [bucket.native.looks_ahead for bucket in plan_of(pair.ours).buckets] == [False]


@pytest.fixture(params=["ahead", "off", "blind"])
def _sight(request, monkeypatch):
    """The scan looks ahead, is switched off, or knows no words and asks torch."""
    if request.param == "off":
        monkeypatch.setenv("CLR_OPTIM_LOOK_AHEAD", "0")
    if request.param == "blind":
        monkeypatch.setattr(words, "_WORDS", words.Words())


sights = pytest.mark.usefixtures("_sight")
# Fewer rows than the scan looks ahead (gradients 8, objects 12), as many, and more.
rows = pytest.mark.parametrize("count", [1, 2, 4, 7, 8, 9, 11, 12, 13, 16, 17, 40])


@sights
@rows
@pytest.mark.parametrize("name", ["sgd", "adamw-ams"])
def test_looking_ahead(name, count):
    pair = many(name, count)
    pair.run(2)
    for k in range(5):
        pair.draw()
        if k % 2:
            drop(pair, lambda i, k=k: (i + k) % 3 == 0)
        versions = [p._version for p in members(pair.ours)]
        given = [p.grad is not None for p in members(pair.ours)]
        pair.step()
        moved = [p._version > v for p, v in zip(members(pair.ours), versions, strict=True)]
        assert moved == given


def counts(tensors):
    return [sys.getrefcount(t) for t in tensors]


def _strided(pair, i):
    for opt in pair.both():
        p = members(opt)[i]
        p.grad = p.grad.t().contiguous().t()


def _sparse(pair, i):
    for opt in pair.both():
        p = members(opt)[i]
        p.grad = sparse(p.grad, 1)


def _subclass(pair, i):
    for opt in pair.both():
        p = members(opt)[i]
        p.grad = Odd.subclass(p, p.grad)


def _moved(pair, i):
    for opt in pair.both():
        p = members(opt)[i]
        p.data = p.data.clone()


def _replaced_state(pair, i):
    for opt in pair.both():
        state = opt.state.get(members(opt)[i], {})
        state.update({k: t.clone() for k, t in state.items()})


def _no_gradient(pair, i):
    for opt in pair.both():
        members(opt)[i].grad = None


CUTS = {f.__name__.strip("_"): f for f in (
    _strided, _sparse, _subclass, _moved, _replaced_state, _no_gradient,
)}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@sights
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("count", [5, 8, 30])
def test_a_scan_cut_short_keeps_no_gradient(cut, count):
    pair = many("sgd-mom" if cut != "sparse" else "sgd", count)
    pair.run(2)
    for i in (0, 1, count // 2, count - 1):
        pair.draw()
        CUTS[cut](pair, i)
        grads = [p.grad for p in members(pair.ours) if p.grad is not None]
        before = counts(grads)
        pair.step()
        assert counts(grads) == before
        pair.draw()
        pair.step()


@pytest.mark.parametrize("at", [0, 3, 8, 19])
def test_an_exception_in_a_scan_keeps_no_gradient_and_is_forgotten(at):
    pair = many("sgd-mom", 20)
    pair.run(2)
    pair.draw()
    chosen = members(pair.ours)[at]
    raised = []

    class Fails(torch.overrides.TorchFunctionMode):
        """The first look at the gradient, by the scan, raises. The plan is then built anew."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            if name == "__get__" and args[0] is chosen and not raised:
                raised.append(func)
                raise ZeroDivisionError
            return func(*args, **(kwargs or {}))

    grads = [p.grad for p in members(pair.ours)]
    before = counts(grads)
    feed(pair.twin, pair.ours)
    with Fails():
        pair.ours.step()
    assert raised
    pair.twin.step()
    assert_alike(*pair.both())
    assert counts(grads) == before
    pair.run(2)


# ---- gradients that only look like plain memory


@pytest.mark.parametrize("kind", ["negated", "zeros", "wrapper", "subclass"])
@pytest.mark.parametrize("warm", [True, False], ids=["later", "at-once"])
def test_a_gradient_that_is_not_plain_memory(kind, warm):
    # Tensors of one element: the strides of an imaginary part pass for any others only there.
    pair = twins(BY_NAME["sgd"], ((1,), (), (5, 3), (7,)))
    if warm:
        pair.run(2)
    for _ in range(2):
        pair.draw()
        for opt in pair.both():
            for p in members(opt)[: 2 if kind == "negated" else 3]:
                p.grad = getattr(Odd, kind)(p, p.grad)
        pair.step()
        pair.run(1)


def test_autograd_may_hand_over_a_negated_view():
    # The gradient of a phase has one element, so its strides do not reveal it.
    pair = twins(BY_NAME["sgd"], ((1,),))
    pair.run(2)
    for _ in range(2):
        for opt in pair.both():
            (p,) = members(opt)
            p.grad = None
            (torch.complex(torch.zeros_like(p), p).conj() * (1 + 2j)).abs().sum().backward()
        pair.step()


class Renamed(torch.nn.Parameter):
    """A class that a parameter gets after the kernels have served it."""


def test_a_parameter_whose_class_changes_is_left_to_torch():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = CyclicalOptimizer(torch.optim.SGD(params, lr=0.1, momentum=0.9))
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(3)
        opt.step()
        params[0].__class__ = Renamed
    assert plan_of(opt).fallback == [(params[0], "tensors of type Renamed")]
    assert torch.equal(*params)
