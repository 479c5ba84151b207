"""What cannot have float32 masters is refused, with the reason, before anything has changed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import BY_NAME as EVERY_CASE
from native_helpers import members

from clr_optim import CyclicalOptimizer

BF16, REST = torch.bfloat16, "clr_rest"


def narrow_params(dtype=BF16):
    return [torch.nn.Parameter(torch.ones(3, 2, dtype=dtype))]


def gapped():
    return [torch.nn.Parameter(torch.ones(4, 6, dtype=BF16)[:, ::2])]


def adamw(params, **options):
    return torch.optim.AdamW(params, **options)


REFUSED = {
    "a string": (TypeError, lambda: (adamw(narrow_params()), {"master_weights": "yes"})),
    "a number": (TypeError, lambda: (adamw(narrow_params()), {"master_weights": 1})),
    "backend='torch'": (ValueError, lambda: (adamw(narrow_params()), {"backend": "torch"})),
    "a class without a kernel": (ValueError, lambda: (torch.optim.ASGD(narrow_params()), {})),
    "a class of the user's": (
        ValueError, lambda: (EVERY_CASE["sign-descent"].make(narrow_params()), {})
    ),
    "float16 parameters": (ValueError, lambda: (adamw(narrow_params(torch.float16)), {})),
    "bfloat16 and float16 parameters": (
        ValueError, lambda: (adamw([*narrow_params(), *narrow_params(torch.float16)]), {})
    ),
    "memory with gaps": (ValueError, lambda: (adamw(gapped()), {})),
    "another device": (
        ValueError,
        lambda: (adamw([*narrow_params(), torch.nn.Parameter(narrow_params()[0].to("meta"))]), {}),
    ),
    "a setting that is a tensor": (
        ValueError,
        lambda: (torch.optim.SGD(narrow_params(), weight_decay=torch.tensor(0.1)), {}),
    ),
    "differentiable=True": (ValueError, lambda: (adamw(narrow_params(), differentiable=True), {})),
}  # fmt: skip


def construct(inner, wrap):
    return CyclicalOptimizer(inner, **{"master_weights": True, **wrap})


@pytest.mark.parametrize("reason", REFUSED)
def test_the_constructor_refuses(reason, no_environment):
    error, make = REFUSED[reason]
    inner, wrap = make()
    before = copy.deepcopy(inner.state_dict())
    with pytest.raises(error, match="master_weights"):
        construct(inner, wrap)
    assert inner.state_dict() == before


def test_without_the_extension_masters_are_refused(monkeypatch, no_environment):
    from clr_optim.backends import NoKernelsError
    from clr_optim.core import mastering

    def missing():
        raise NoKernelsError("no compiler was there")

    monkeypatch.setattr(mastering, "library", missing)
    with pytest.raises(ValueError, match="no compiler was there"):
        CyclicalOptimizer(adamw(narrow_params()), master_weights=True)


def test_a_group_that_cannot_have_masters_is_refused():
    opt = CyclicalOptimizer(adamw(narrow_params()), master_weights=True)
    for params in (gapped(), narrow_params(torch.float16), iter(gapped()), gapped()[0]):
        with pytest.raises(ValueError, match="master_weights=True"):
            opt.add_param_group({"params": params})
    assert len(opt.param_groups) == 1
    more = narrow_params()
    opt.add_param_group({"params": iter(more)})
    more[0].grad = torch.ones_like(more[0])
    opt.step()
    assert REST in opt.state[more[0]]


def test_a_warning_says_that_masters_have_no_effect():
    with pytest.warns(UserWarning, match="master_weights=True has no effect"):
        CyclicalOptimizer(adamw(narrow_params(torch.float32)), master_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lazy = torch.nn.LazyLinear(3, dtype=BF16)
        opt = CyclicalOptimizer(torch.optim.SGD(lazy.parameters()), master_weights=True)
    lazy(torch.ones(2, 4, dtype=BF16)).sum().backward()
    opt.step()
    assert all(REST in opt.state[p] for p in lazy.parameters())


def sparse(params, opt):
    params[0].grad = torch.ones(3, 2, dtype=BF16).to_sparse()


def shared(params, opt):
    opt.add_param_group({"params": [torch.nn.Parameter(params[0].detach()[:2])]})
    for p in members(opt):
        p.grad = torch.ones_like(p)


def replaced(params, opt):
    params[0].grad = torch.ones_like(params[0])
    opt.optimizer.step = lambda closure=None: None


@pytest.mark.parametrize("change", [sparse, shared, replaced], ids=lambda c: c.__name__)
def test_a_step_of_torchs_own_is_refused(change):
    params = narrow_params()
    opt = CyclicalOptimizer(torch.optim.SGD(params, lr=0.1, momentum=0.9), master_weights=True)
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    before, rest = params[0].detach().clone(), opt.state[params[0]][REST].clone()
    change(params, opt)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="master_weights=True"):
            opt.step()
    assert torch.equal(params[0], before)
    assert torch.equal(opt.state[params[0]][REST], rest)
    assert opt.iteration == 1


def checkpoint(masters=True, dtype=BF16):
    opt = CyclicalOptimizer(adamw(narrow_params(dtype)), master_weights=masters)
    for p in members(opt):
        p.grad = torch.full_like(p, 0.3)
    opt.step()
    return opt.state_dict()


BAD_CHECKPOINTS = {
    "a rest without masters": (False, lambda saved: None),
    "a rest in float32": (True, lambda saved: saved[0].update({REST: saved[0][REST].float()})),
    "a rest in int16": (
        True, lambda saved: saved[0].update({REST: saved[0][REST].view(torch.int16)})
    ),
    "a rest of another shape": (True, lambda saved: saved[0].update({REST: saved[0][REST][:2]})),
    "a rest on meta": (True, lambda saved: saved[0].update({REST: saved[0][REST].to("meta")})),
    "no rest but None": (True, lambda saved: saved[0].update({REST: None})),
    "moments in bfloat16": (
        True, lambda saved: saved[0].update(exp_avg=saved[0]["exp_avg"].to(BF16))
    ),
}  # fmt: skip


def load_checkpoint(what, opt=None):
    masters, change = BAD_CHECKPOINTS[what]
    saved = checkpoint()
    change(saved["state"])
    opt = opt or CyclicalOptimizer(adamw(narrow_params()), master_weights=masters)
    opt.load_state_dict(saved)


@pytest.mark.parametrize("what", BAD_CHECKPOINTS)
def test_a_checkpoint_that_lost_a_dtype_is_refused(what):
    masters, _ = BAD_CHECKPOINTS[what]
    opt = CyclicalOptimizer(adamw(narrow_params()), master_weights=masters)
    with pytest.raises(ValueError, match=REST if "rest" in what else "exp_avg"):
        load_checkpoint(what, opt)
    assert not opt.state
    assert opt.iteration == 0


def linear(dtype=BF16, masters=True):
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2).to(dtype)
    return model, CyclicalOptimizer(adamw(model.parameters()), master_weights=masters)


BAD_LOADS = {
    "no dictionary": (TypeError, lambda state: [1]),
    "a key too few": (ValueError, lambda state: {"weight": state["weight"]}),
    "a key too many": (ValueError, lambda state: {**state, "more": state["bias"]}),
    "another shape": (ValueError, lambda state: {**state, "bias": torch.ones(3)}),
    "no tensor": (ValueError, lambda state: {**state, "bias": 1.0}),
    "bfloat16": (ValueError, lambda state: {**state, "bias": state["bias"].to(BF16)}),
    "sparse": (ValueError, lambda state: {**state, "bias": state["bias"].to_sparse()}),
    "on meta": (ValueError, lambda state: {**state, "bias": state["bias"].to("meta")}),
}


def load_masters(change, model, opt):
    opt.load_master_state_dict(model, change(torch.nn.Linear(3, 2).state_dict()))


@pytest.mark.parametrize("what", BAD_LOADS)
def test_wrong_masters_are_refused(what):
    error, change = BAD_LOADS[what]
    model, opt = linear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match="state_dict"):
        load_masters(change, model, opt)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not opt.state


def test_masters_are_asked_only_of_an_optimizer_that_has_them():
    model, opt = linear(masters=False)
    with pytest.raises(RuntimeError, match="master_weights=True"):
        opt.master_state_dict(model)
    with pytest.raises(RuntimeError, match="master_weights=True"):
        opt.load_master_state_dict(model, model.state_dict())
    _, opt = linear()
    with pytest.raises(ValueError, match="model must hold bfloat16 parameters"):
        opt.master_state_dict(model)
