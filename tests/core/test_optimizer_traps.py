"""Traps that a wrapper falls into: each was a bug once."""

from __future__ import annotations

import copy
import functools
import gc
import math
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from cases import BY_NAME, Problem, rates_in_groups
from native_helpers import members
from torch.optim.optimizer import register_optimizer_step_pre_hook

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import decay, fixed, one_cycle, ramp, sequence

pytestmark = pytest.mark.usefixtures("each_backend")


def param(value=1.0):
    p = torch.nn.Parameter(torch.full((3,), value))
    p.grad = torch.ones(3)
    return p


def test_a_tensor_lr_that_torch_shares_among_groups():
    lr = torch.tensor(0.1, dtype=torch.float64)
    inner = torch.optim.Adam([{"params": [param()]}, {"params": [param()]}], lr=lr, foreach=False)
    opt = CyclicalOptimizer(inner, max_lr=[0.1, 0.8], base_lr=[0.05, 0.2], step_size_up=4)
    assert opt.param_groups[0]["lr"] is lr
    for _ in range(3):
        assert rates_in_groups(opt) == opt.get_last_lr()
        opt.step()
    assert opt.defaults["lr"].item() == 0.1
    opt.add_param_group({"params": [param()]})
    assert opt.param_groups[-1]["clr_max_lr"] == 0.1
    assert rates_in_groups(opt) == opt.get_last_lr()
    opt.load_state_dict(opt.state_dict())
    opt.step()
    assert rates_in_groups(opt) == opt.get_last_lr()


def test_tensor_betas_that_torch_shares_among_groups():
    betas = (torch.tensor(0.9), torch.tensor(0.999))
    inner = torch.optim.Adam(
        [{"params": [param()]}, {"params": [param()]}], lr=torch.tensor(0.1), betas=betas,
        foreach=False,
    )  # fmt: skip
    opt = CyclicalOptimizer(inner, cycle_momentum=True, max_momentum=[0.9, 0.95])
    assert [g["betas"][0].item() for g in opt.param_groups] == pytest.approx([0.9, 0.95])
    assert opt.defaults["betas"][0].item() == pytest.approx(0.9)


def test_a_step_replaced_on_the_object_runs_even_below_a_scheduler():
    p = param()
    inner = torch.optim.SGD([p], lr=0.1)

    def answer(self, closure=None):
        for group in self.param_groups:
            for q in group["params"]:
                q.data.fill_(42)

    inner.step = types.MethodType(answer, inner)
    torch.optim.lr_scheduler.ConstantLR(inner)
    opt = CyclicalOptimizer(inner, max_lr=0.1)
    opt.step()
    assert (p == 42).all()


@pytest.mark.parametrize("stepped", [False, True], ids=["at first", "after a step"])
def test_a_step_replaced_after_the_wrapping_is_refused_by_a_backend_by_name(stepped):
    inner = torch.optim.SGD([param()], lr=0.1)
    opt = CyclicalOptimizer(inner, backend="native")
    if stepped:
        opt.step()
    calls, fired = [], []
    inner.step = lambda closure=None: calls.append(closure)
    opt.register_step_pre_hook(lambda *a: fired.append("pre"))
    before = copy.deepcopy(opt.state_dict()), members(opt)[0].detach().clone()
    message = "backend='native' cannot serve SGD: its step was replaced.*del .*step.*'auto'"
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert not calls
    assert not fired
    assert (opt.state_dict(), opt.iteration) == (before[0], int(stepped))
    assert torch.equal(members(opt)[0], before[1])
    assert opt.explain().endswith("SGD: its step was replaced")
    del inner.step
    opt.step()
    assert opt.iteration == stepped + 1
    assert opt.explain().startswith("native")


def test_a_step_replaced_after_the_wrapping_runs_under_auto():
    inner = torch.optim.SGD([param()], lr=0.1)
    opt = CyclicalOptimizer(inner)
    opt.step()
    explained = opt.explain()
    calls, step = [], inner.step
    inner.step = lambda closure=None: calls.append(closure)
    opt.step()
    assert (len(calls), opt.iteration) == (1, 2)
    assert opt.explain().startswith("torch: ")
    assert explained.startswith("torch") or opt.explain().endswith("SGD: its step was replaced")
    inner.step = step  # as tools do that replaced the step for a while
    opt.step()
    assert (len(calls), opt.iteration) == (1, 3)
    assert opt.explain() == explained


def test_a_warm_ups_zero_with_a_closure_is_no_zero_rate_step():
    p = param()
    p.grad = torch.zeros(3)
    opt = CyclicalOptimizer(torch.optim.SGD([p], lr=0.1))
    opt.param_groups[0]["lr"] = 0.0

    def closure():
        opt.zero_grad(set_to_none=False)
        loss = (p**2).sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="from outside"):
        opt.step(closure)
    assert opt.iteration == 1
    assert (p != 1).all()


def zero_rate_step(opt):
    for group in opt.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
    opt.step(closure=None)


def test_a_zero_rate_step_holds_with_something_pending_beneath():
    p, q = param(), param()
    opt = CyclicalOptimizer(torch.optim.AdamW([p], lr=0.1, weight_decay=0.5))
    opt.optimizer.add_param_group({"params": [q]})
    zero_rate_step(opt)
    assert opt.iteration == 0
    assert (p == 1).all()
    assert (q == 1).all()

    opt = CyclicalOptimizer(torch.optim.SGD([p], lr=0.1, weight_decay=0.5))
    opt.optimizer.load_state_dict(torch.optim.SGD([p], lr=0.1, weight_decay=0.5).state_dict())
    zero_rate_step(opt)
    assert opt.iteration == 0
    assert (p == 1).all()


def test_a_zero_rate_step_of_frozen_parameters():
    p = param().requires_grad_(False)
    p.grad = None
    opt = CyclicalOptimizer(torch.optim.SGD([p], lr=0.1))
    zero_rate_step(opt)
    assert opt.iteration == 0


def test_a_scale_fn_that_raises_changes_nothing():
    inner = torch.optim.SGD([param()], lr=0.1)
    with pytest.raises(TypeError):
        CyclicalOptimizer(inner, max_lr=9.0, scale_fn=lambda: 1)
    assert "clr_step" not in inner.param_groups[0]
    with pytest.raises(ValueError, match=r"scale_fn\(1\) must be a finite number, got nan"):
        CyclicalOptimizer(inner, scale_fn=lambda x: math.nan)
    assert CyclicalOptimizer(inner).lr_at(2000) == [0.1]

    p = param()
    opt = CyclicalOptimizer(
        torch.optim.SGD([p], lr=0.1), scale_mode="iterations", step_size_up=4,
        scale_fn=lambda x: 1 / (3 - x),
    )  # fmt: skip
    opt.step()
    opt.step()
    before, rate = p.detach().clone(), rates_in_groups(opt)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            opt.step()
        with pytest.raises(ZeroDivisionError):
            opt.set_iteration(3)
    assert opt.iteration == 2
    assert rates_in_groups(opt) == rate
    assert torch.equal(p, before)


def test_a_tensor_lr_that_requires_grad():
    lr = torch.tensor(0.1, requires_grad=True)
    opt = CyclicalOptimizer(torch.optim.Adam([param()], lr=lr, foreach=False))
    assert opt.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["param_groups"][0].pop("lr"), "needs 'lr' and a list of 'params'"),
        (lambda s: s["param_groups"][0].update(params=3), "needs 'lr' and a list of 'params'"),
        (lambda s: s["param_groups"][0].update(lr=torch.tensor([1, 2])), "a floating point tensor"),
        (lambda s: s["param_groups"][0].update(clr_base_momentum="x"), "must be a number"),
        (lambda s: s["param_groups"][0].pop("betas"), "neither 'betas' nor 'momentum'"),
        (lambda s: s.update(state=None), r"\['state'\] must be a dictionary"),
        (lambda s: s.update(state=[1]), r"\['state'\] must be a dictionary"),
    ],
)
def test_a_damaged_checkpoint_changes_nothing(damage, message):
    opt = CyclicalOptimizer(torch.optim.Adam([param()], lr=0.1), cycle_momentum=True)
    opt.step()
    bad = copy.deepcopy(opt.state_dict())
    damage(bad)
    before = str((opt.param_groups, dict(opt.state)))
    with pytest.raises((ValueError, TypeError), match=message):
        opt.load_state_dict(bad)
    assert str((opt.param_groups, dict(opt.state))) == before


def test_a_plain_checkpoint_loaded_beneath_us_is_seen_at_once():
    inner = torch.optim.SGD([param()], lr=0.1)
    plain = copy.deepcopy(inner.state_dict())
    opt = CyclicalOptimizer(inner, max_lr=0.3, step_size_up=4)
    for _ in range(3):
        opt.step()
    inner.load_state_dict(plain)
    assert (opt.iteration, opt.cycle) == (0, 0.0)
    assert opt.get_last_lr() == [0.075]
    other = copy.deepcopy(opt)
    assert other.lr_at(4) == opt.lr_at(4) == [0.3]


def test_the_last_part_of_a_sequence_keeps_its_own_end():
    schedule = sequence([(fixed(), 2), (decay(3), 3)])
    assert schedule(range(9), 0.1, 0.4).round(12).tolist() == [0.4, 0.4, 0.4, 0.3, 0.2] + [0.1] * 4
    schedule = sequence([(fixed(), 2), (one_cycle(10), 8)])
    assert schedule(500, 0.1, 0.4) == one_cycle(10)(500, 0.1, 0.4)


def test_hooks_fire_once_below_a_patched_class():
    class Plain(torch.optim.SGD):
        pass

    inner = Plain([param()], lr=0.1)
    original = Plain.step

    @functools.wraps(original)
    def traced(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    Plain.step = traced
    opt = CyclicalOptimizer(inner)
    fired = []
    inner.register_step_pre_hook(lambda *a: fired.append("own"))
    opt.step()
    assert fired == ["own"]


def test_global_hooks_fire_once():
    opt = CyclicalOptimizer(torch.optim.SGD([param()], lr=0.1))
    fired = []
    handle = register_optimizer_step_pre_hook(lambda *a: fired.append(1))
    opt.step()
    handle.remove()
    assert fired == [1]


def test_nothing_keeps_the_parameters_alive():
    p = param()
    opt = CyclicalOptimizer(torch.optim.Adam([p], lr=0.1), max_grad_norm=1.0)
    view = opt.scheduler
    opt.step()
    view.step()
    alive = [weakref.ref(p), weakref.ref(opt)]
    gc.disable()
    try:
        del p, opt, view
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_a_users_own_keys_in_a_checkpoint():
    p = param()
    inner = torch.optim.Adam([p], lr=0.1)
    inner.step()
    inner.state[p]["ema"] = torch.zeros(3)
    inner.param_groups[0]["alpha"] = 0.5
    opt = CyclicalOptimizer(torch.optim.Adam([param()], lr=0.1))
    opt.load_state_dict(inner.state_dict())
    assert opt.param_groups[0]["alpha"] == 0.5


def test_a_tensor_that_other_code_put_in_lr_is_not_filled():
    opt = CyclicalOptimizer(torch.optim.SGD([param()], lr=0.1))
    for foreign in (torch.tensor(1), torch.tensor(0.7)):
        kept = foreign.clone()
        opt.param_groups[0]["lr"] = foreign
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step()
        assert torch.equal(foreign, kept)
        assert opt.param_groups[0]["lr"] == opt.get_last_lr()[0]
        assert type(opt.param_groups[0]["lr"]) is float
    with pytest.raises(ValueError, match="floating point tensor of one element, got tensor"):
        CyclicalOptimizer(torch.optim.SGD([param()], lr=torch.tensor(1)))


def test_a_numpy_number_in_lr_does_not_stay():
    opt = CyclicalOptimizer(torch.optim.SGD([param()], lr=0.1))
    opt.param_groups[0]["lr"] = np.float64(opt.param_groups[0]["lr"])
    assert type(opt.state_dict()["param_groups"][0]["lr"]) is float


def test_a_copied_dict_as_lightnings_shares_what_moves():
    opt = CyclicalOptimizer(torch.optim.SGD([param()], lr=0.1), max_grad_norm=1.0, step_size_up=3)
    twin = CyclicalOptimizer.__new__(CyclicalOptimizer)
    twin.__dict__ = {k: v for k, v in opt.__dict__.items() if k != "step"}
    twin.__class__ = type("Framework", (CyclicalOptimizer,), {})
    for k in range(5):
        opt.step()
        assert twin.iteration == k + 1
        assert twin.get_last_lr() == opt.get_last_lr()
        assert twin.grad_norm is opt.grad_norm
    assert isinstance(twin, CyclicalOptimizer)


def test_a_ramps_momentum_stays_low_at_its_top():
    assert ramp(4).momentum([0, 3, 4], 0.8, 0.9).round(12).tolist() == [0.9, 0.8, 0.8]


def test_optimizers_that_do_things_their_own_way():
    class KeywordOnly(torch.optim.SGD):
        def step(self, *, closure=None):
            return super().step(closure)

    p = param()
    opt = CyclicalOptimizer(KeywordOnly([p], lr=0.1))
    opt.step()
    assert opt.step(lambda: 3.0) == 3.0
    assert opt.step(closure=lambda: 4.0) == 4.0

    class NoInit(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups = [{"params": list(params), "lr": 0.1}]
            self.state, self.defaults = {}, {}

        def step(self, closure=None):
            self.stepped = True

    opt = CyclicalOptimizer(NoInit([param()]))
    opt.step()
    assert opt.optimizer.stepped


def test_add_param_group_keeps_the_callers_dict_as_torch_does():
    opt = CyclicalOptimizer(torch.optim.SGD([param()], lr=0.1))
    group = {"params": [param()], "max_lr": 0.5}
    opt.add_param_group(group)
    assert opt.param_groups[-1] is group
    bad = {"params": opt.param_groups[0]["params"], "max_lr": 0.5}
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group(bad)
    assert bad["max_lr"] == 0.5


def test_a_closure_may_add_a_group_beneath_us():
    case = BY_NAME["sgd"]
    problem = Problem(case)
    opt = CyclicalOptimizer(case.make(problem.params))
    extra = param()

    def closure():
        if len(opt.param_groups) == 1:
            opt.optimizer.add_param_group({"params": [extra]})
        return problem.backward(0)

    opt.step(closure)
    assert opt.iteration == 1
    assert len(rates_in_groups(opt)) == 2
    assert rates_in_groups(opt) == opt.get_last_lr()


def test_a_group_removed_beneath_us_takes_nothing_of_its_neighbours():
    groups = [{"params": [param()], "lr": 0.1 * (i + 1)} for i in range(2)]
    opt = CyclicalOptimizer(torch.optim.SGD(groups, lr=1.0))
    opt.optimizer.add_param_group({"params": [param()], "lr": 0.8})
    opt.param_groups.pop(0)
    opt.step()
    assert [g["clr_max_lr"] for g in opt.param_groups] == [0.2, 0.8]
