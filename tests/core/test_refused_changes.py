"""A change of course that is refused leaves everything as it was; one without effect is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LinearLR, SequentialLR

from clr_optim import CyclicalOptimizer, Ema
from clr_optim.schedule import cosine, exp, fixed, one_cycle, triangular


def sgd(**settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.4, momentum=0.9, **settings)


def adamw(**settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.4, **settings)


def step(opt: Any) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()


def shown(opt: Any) -> str:
    return str((opt.iteration, opt.state_dict(), opt.get_last_lr()))


class Breakable:
    """A ``scale_fn`` that raises while it is broken."""

    def __init__(self) -> None:
        self.is_broken = False

    def __call__(self, cycle: float) -> float:
        if self.is_broken:
            raise ZeroDivisionError("scale_fn is broken")
        return 1.0 / cycle


CHANGES = {
    "set_iteration": lambda opt: opt.set_iteration(50),
    "set_bounds": lambda opt: opt.set_bounds(max_lr=2.0),
    "add_param_group": lambda opt: opt.add_param_group({"params": [torch.ones(2)], "lr": 0.3}),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_scale_fn_that_raises(what, backend):
    scale_fn = Breakable()
    opt = CyclicalOptimizer(
        sgd(), step_size_up=4, scale_fn=scale_fn, average=Ema(0.5), backend=backend
    )
    for _ in range(3):
        step(opt)
    before = shown(opt)
    scale_fn.is_broken = True
    with pytest.raises(ZeroDivisionError, match="broken"):
        CHANGES[what](opt)
    scale_fn.is_broken = False
    assert shown(opt) == before
    with opt.averaged():
        pass
    CHANGES[what](opt)
    assert shown(opt) != before


def test_a_group_whose_momentum_cannot_cycle():
    opt = CyclicalOptimizer(adamw(), cycle_momentum=True)
    step(opt)
    before = shown(opt)
    for betas in (0.9, None, ("0.9", 0.999)):
        message = f"betas in param_group must be a tuple of numbers, got {re.escape(repr(betas))}"
        with pytest.raises(TypeError, match=message + r": cycle_momentum=True writes betas\[0\]"):
            opt.add_param_group({"params": [torch.ones(2)], "betas": betas})
        assert shown(opt) == before
    step(opt)
    opt = CyclicalOptimizer(sgd(), cycle_momentum=True)
    with pytest.raises(TypeError, match="momentum in param_group must be a number, got 'high'"):
        opt.add_param_group({"params": [torch.ones(2)], "momentum": "high"})
    step(opt)
    inner = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.ones(2))], "betas": 0.9}])
    groups = copy.deepcopy(inner.param_groups)
    with pytest.raises(TypeError, match="betas in parameter group 0 must be a tuple"):
        CyclicalOptimizer(inner, cycle_momentum=True)
    assert str(inner.param_groups) == str(groups)


def test_bounds_of_a_new_group_that_no_phase_reads():
    opt = CyclicalOptimizer(sgd(), triangular(3).between(0.1, 0.3))
    before = shown(opt)
    for name in ("base_lr", "max_lr"):
        with pytest.raises(ValueError, match=f"^{name}=0.2: .*'triangular' has bounds already"):
            opt.add_param_group({"params": [torch.ones(2)], name: 0.2})
        assert shown(opt) == before
    opt.add_param_group({"params": [torch.ones(2)], "max_lr": None})
    opt = CyclicalOptimizer(sgd(), cosine(10))
    with pytest.warns(UserWarning, match=r"base_lr=0\.1 has no effect: .*'cosine' are multiples"):
        opt.add_param_group({"params": [torch.ones(2)], "base_lr": 0.1})


def test_a_group_without_the_names_that_the_others_have():
    named = torch.optim.SGD([("weight", torch.nn.Parameter(torch.ones(2)))], lr=0.4)
    opt = CyclicalOptimizer(named)
    with pytest.raises(ValueError, match=r"cannot be added: .*names.*; .*with names if the other"):
        opt.add_param_group({"params": [torch.ones(2)]})


def test_bounds_of_a_momentum_that_does_not_cycle():
    for given in ({"base_momentum": 0.5}, {"max_momentum": [0.95]}):
        message = r"base_momentum=.* and max_momentum=.* have no effect without cycle_momentum=True"
        with pytest.raises(ValueError, match=message):
            CyclicalOptimizer(sgd(), **given)
    CyclicalOptimizer(sgd(), base_momentum=0.8, max_momentum=0.9)  # CyclicLR's own


@pytest.mark.parametrize("name", ["base_momentum", "max_momentum"])
def test_bounds_of_momentum_in_a_group_warn(name):
    inner = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.ones(2))], name: 0.5}], lr=0.4, momentum=0.9
    )
    message = rf"'{name}' in parameter group 0 has no effect: .*constructor as {name}=\[\.\.\.\]"
    with pytest.warns(UserWarning, match=message):
        CyclicalOptimizer(inner, cycle_momentum=True)


def test_a_scheduler_at_a_step_beyond_what_a_device_counts():
    inner = sgd()
    scheduler = LinearLR(inner, 0.5, total_iters=4)
    for _ in range(2):
        inner.step()
        scheduler.step()
    before = copy.deepcopy(inner.param_groups)
    with pytest.raises(ValueError, match="must be an integer"):
        CyclicalOptimizer.from_scheduler(scheduler, steps_per_epoch=2**62)
    assert str(inner.param_groups) == str(before)
    assert CyclicalOptimizer.from_scheduler(scheduler).iteration == 2


def test_one_cycle_takes_bounds_of_a_new_group():
    opt = CyclicalOptimizer(sgd(), one_cycle(10))
    opt.add_param_group({"params": [torch.ones(2)], "max_lr": 0.7})
    assert opt.max_lr == [0.4, 0.7]


@pytest.mark.parametrize("schedule", [fixed(), exp(0.9), fixed().with_warmup(3)], ids=str)
def test_momentum_under_a_schedule_that_does_not_cycle_it(schedule):
    with pytest.raises(ValueError, match=r"cycle_momentum=True has no effect with the schedule"):
        CyclicalOptimizer(sgd(), schedule, cycle_momentum=True)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_written_momentum_warns_once(backend):
    for make, key, value in ((sgd, "momentum", 0.5), (adamw, "betas", (0.5, 0.999))):
        opt = CyclicalOptimizer(make(), step_size_up=3, cycle_momentum=True, backend=backend)
        twin = CyclicalOptimizer(make(), step_size_up=3, cycle_momentum=True, backend=backend)
        for each in (opt, twin):
            step(each)
        opt.param_groups[0][key] = value
        message = rf"^{key}.* in parameter group 0 \(0\.5\) was written .*the cycle decides"
        with pytest.warns(UserWarning, match=message):
            step(opt)
        step(twin)
        opt.param_groups[0][key] = value
        for each in (opt, twin):
            step(each)
        assert str(opt.param_groups) == str(twin.param_groups)


WRITES = {
    "a beta of 1": (adamw, {"betas": (1.0, 0.9)}, ZeroDivisionError),
    "a string": (adamw, {"eps": "1e-8"}, TypeError),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_written_setting_that_torchs_step_refuses(what):
    make, settings, error = WRITES[what]
    for wrap in (CyclicalOptimizer, lambda inner: inner):
        opt = wrap(make())
        for _ in range(2):
            step(opt)
        opt.param_groups[0].update(settings)
        with pytest.raises(error):
            step(opt)


# torch warns of the nested scheduler, whose step its constructor calls.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("order", [1, -1])
def test_a_sequential_scheduler_within_another(order):
    inner = sgd()
    nested = SequentialLR(inner, [LinearLR(inner, 0.1), ConstantLR(inner, 1.0)], [2])
    scheduler = SequentialLR(inner, [nested, ExponentialLR(inner, 0.9)][::order], [5])
    with pytest.raises(ValueError, match=r"a SequentialLR within a SequentialLR, .*: give one"):
        CyclicalOptimizer.from_scheduler(scheduler)
    if order == 1:  # it is over, and no longer counts
        for _ in range(7):
            inner.step()
            scheduler.step()
        opt = CyclicalOptimizer.from_scheduler(scheduler)
        assert opt.iteration == 7
        assert opt.get_last_lr() == pytest.approx(scheduler.get_last_lr())
