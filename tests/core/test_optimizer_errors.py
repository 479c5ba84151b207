"""Wrong input raises an error that names argument, value and remedy, and changes nothing."""

from __future__ import annotations

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from cases import BY_NAME, Problem
from internals import is_next_step_ordinary

from clr_optim import (
    CycleEnd,
    CyclicalOptimizer,
    CyclicalScheduler,
    Ema,
    Phase,
    Schedule,
    Spike,
    schedule,
)
from clr_optim.schedule import fixed, one_cycle, ramp, sequence, triangular, warm_restarts

NAN = float("nan")


def adam(params=None):
    return torch.optim.Adam(params or [torch.nn.Parameter(torch.ones(2))], lr=0.1)


class NoRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


# name: (arguments of CyclicalOptimizer besides the optimizer, error, pattern)
CONSTRUCTOR = {
    "policy unknown": ({"policy": "cosines"}, ValueError, r"policy must be one of 'triangular'.*'cosines'"),
    "policy misspelt": (
        {"policy": "exp-range"}, ValueError, r"policy must be one of .*got 'exp-range'; did you mean 'exp_range'\?$",
    ),
    "policy with lengths": (
        {"policy": "wsd"}, ValueError,
        r"policy='wsd' needs warmup, stable, decay: .*policy=clr_optim.schedule.wsd\(warmup=\.\.\.,",
    ),
    "policy without cycles": (
        {"policy": "fixed", "step_size_up": 5}, ValueError, "step_size_up=5 has no effect with policy='fixed'",
    ),
    "policy a number": ({"policy": 3}, ValueError, "policy must be .* a Schedule .*got 3"),
    "policy a function": ({"policy": triangular}, ValueError, "policy must be .* a Schedule.*call it"),
    "base_lr NaN": ({"base_lr": NAN}, ValueError, "base_lr must be a finite number >= 0, got nan"),
    "base_lr negative": ({"base_lr": -0.1}, ValueError, "base_lr must be .* >= 0, got -0.1"),
    "base_lr a string": ({"base_lr": "1e-3"}, TypeError, "base_lr must be a number, got '1e-3'"),
    "base_lr above max_lr": (
        {"base_lr": 0.5, "max_lr": 0.2}, ValueError, "base_lr=0.5 is above max_lr=0.2 .*group 0.*swap",
    ),
    "base_lr above the own lr": ({"base_lr": 0.5}, ValueError, "base_lr=0.5 is above max_lr=0.1"),
    "base_lr of wrong length": (
        {"base_lr": [0.1, 0.2]}, ValueError, "base_lr has 2 values and the optimizer 1 param.*one per group",
    ),
    "base_lr an array of wrong length": (
        {"base_lr": np.array([0.1, 0.2])}, ValueError, "base_lr has 2 values and the optimizer 1 param",
    ),
    "base_lr a tensor of wrong length": (
        {"base_lr": torch.ones(2)}, ValueError, "base_lr has 2 values and the optimizer 1 param",
    ),
    "base_lr a matrix": ({"base_lr": np.ones((1, 2))}, TypeError, r"base_lr\[0\] must be a number"),
    "base_lr a tensor that is NaN": ({"base_lr": torch.tensor(NAN)}, ValueError, "base_lr must be a finite"),
    "base_lr on meta": (
        {"base_lr": torch.ones((), device="meta")}, TypeError, "base_lr must be a number, got tensor",
    ),
    "base_lr a dictionary": ({"base_lr": {0: 0.1}}, TypeError, "base_lr must be a number"),
    "base_lr a set": ({"base_lr": {0.1}}, TypeError, "base_lr must be a number"),
    "base_lr complex in a tensor": ({"base_lr": torch.tensor(1j)}, TypeError, "base_lr must be a number"),
    "a phase beyond floats": (
        {"policy": Schedule("rise", [Phase(window="constant", base_gamma=10, steps=1000)])},
        ValueError, r"phases\[0\] of .*'rise' has base_gamma=10.0 and steps=1000: .*beyond .*lower one",
    ),
    "a scale_fn that gives NaN": (
        {"scale_fn": lambda cycle: NAN}, ValueError, r"scale_fn\(1\) must be a finite number, got nan",
    ),
    "base_lr with a bad entry": ({"base_lr": [NAN]}, ValueError, r"base_lr\[0\] must be"),
    "max_lr infinite": ({"max_lr": math.inf}, ValueError, "max_lr must be a finite number"),
    "max_lr a bool": ({"max_lr": True}, TypeError, "max_lr must be a number, got True"),
    "max_lr empty": ({"max_lr": []}, ValueError, "max_lr has 0 values"),
    "step_size_up negative": ({"step_size_up": -1}, ValueError, "step_size_up must be an integer >= 0, got -1"),
    "step_size_up broken": ({"step_size_up": 2.5}, ValueError, "step_size_up must be a whole number.*2.5"),
    "step_size_up a string": ({"step_size_up": "7"}, TypeError, "step_size_up must be an integer"),
    "step_size_down NaN": ({"step_size_down": NAN}, ValueError, "step_size_down must be a whole number"),
    "both halves 0": (
        {"step_size_up": 0, "step_size_down": 0}, ValueError, "step_size_up=0 and step_size_down=0.*at least one",
    ),
    "step_size_up 0 alone": ({"step_size_up": 0}, ValueError, "step_size_up=0 and step_size_down=0"),
    "gamma 0": ({"policy": "exp_range", "gamma": 0}, ValueError, "gamma must be .* > 0 and <= 1, got 0"),
    "gamma above 1": ({"policy": "exp_range", "gamma": 1.1}, ValueError, "gamma must be .* <= 1, got 1.1"),
    "gamma NaN, not even used": ({"gamma": NAN}, ValueError, "gamma must be"),
    "window unknown": ({"window": "hamming"}, ValueError, "window must be one of 'triangle', 'welch', 'hann', 'sqrt', got"),
    "window constant": ({"window": "constant"}, ValueError, "window must be one of"),
    "scale_fn a number": ({"scale_fn": 0.5}, TypeError, "scale_fn must be a callable of one number, got 0.5"),
    "scale_mode unknown": ({"scale_mode": "epoch"}, ValueError, "scale_mode must be one of 'cycle', 'iterations'"),
    "cycle_momentum a number": ({"cycle_momentum": 1}, TypeError, "cycle_momentum must be True or False, got 1"),
    "cycle_momentum without cycles": (
        {"policy": "fixed", "cycle_momentum": True}, ValueError,
        "cycle_momentum=True has no effect with the schedule 'fixed'",
    ),
    "base_momentum alone": (
        {"base_momentum": 0.7}, ValueError, "base_momentum=0.7 .*no effect without cycle_momentum=True",
    ),
    "base_momentum above 1": ({"base_momentum": 1.5}, ValueError, "base_momentum must be .* <= 1, got 1.5"),
    "base_momentum above max": (
        {"base_momentum": 0.95}, ValueError, "base_momentum=0.95 is above max_momentum=0.9",
    ),
    "max_momentum NaN": ({"max_momentum": NAN}, ValueError, "max_momentum must be"),
    "max_momentum of wrong length": ({"max_momentum": [0.9, 0.9]}, ValueError, "max_momentum has 2 values"),
    "max_grad_norm 0": ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be .* > 0, got 0"),
    "max_grad_norm a string": ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number"),
    "average unknown": ({"average": "ema"}, ValueError, "average must be 'cycle_end'.*got 'ema'"),
    "average a number": ({"average": 0.999}, TypeError, r"average must be .*got 0.999; .*give Ema\(0.999\)"),
    "average a class": ({"average": Ema}, TypeError, "average must be .*got <class"),
    "average True": ({"average": True}, TypeError, "average must be .*got True"),
    "average without cycles": (
        {"policy": fixed(), "average": "cycle_end"}, ValueError, "average='cycle_end' needs cycles .* use Ema",
    ),
    "average after the last cycle": (
        {"policy": one_cycle(4), "average": CycleEnd(start=5)}, ValueError,
        r"average=CycleEnd\(start=5\) starts after the last cycle of the schedule 'one_cycle', which ends after 4 steps: .*below 4",
    ),
    "skip_above 0": ({"skip_above": 0}, ValueError, "skip_above must be a number > 0, got 0"),
    "skip_above NaN": ({"skip_above": NAN}, ValueError, "skip_above must be a number > 0, got nan"),
    "skip_above True": ({"skip_above": True}, TypeError, r"skip_above must be a number.*math\.inf or Spike\(\)$"),
    "skip_above a string": ({"skip_above": "inf"}, TypeError, "skip_above must be a number.*give the largest norm"),
    "skip_above the class": ({"skip_above": Spike}, TypeError, "skip_above must be .*the class .*call it$"),
    "backend unknown": ({"backend": "cuda"}, ValueError, "backend='cuda' must be one of 'auto'"),
    "backend an array": ({"backend": np.array([1.5, 2.0])}, TypeError, r"backend=array\(.* must be one of 'auto'"),
    "backend None": ({"backend": None}, TypeError, "backend=None must be one of"),
    "max_momentum 1 for a beta": (
        {"cycle_momentum": True, "max_momentum": 1.0}, ValueError, "max_momentum=1.0 must be below 1 .*betas",
    ),
    "max_lr beyond floats": ({"max_lr": 10**400}, ValueError, "max_lr must be a finite number"),
    "scale_fn that gives nothing": (
        {"scale_fn": lambda cycle: None}, TypeError, r"scale_fn\(1\) must be a number, got None",
    ),
    "max_grad_norm an array": (
        {"max_grad_norm": np.array([1.0, 2.0])}, TypeError, "max_grad_norm must be a number",
    ),
    "scale_fn an array beside a Schedule": (
        {"policy": fixed(), "scale_fn": np.array([1, 2])}, ValueError, "scale_fn=.* has no effect",
    ),
    "backend that cannot serve": (
        {"backend": "triton"}, ValueError, "backend='triton' cannot serve Adam: .*use backend='auto'",
    ),
    "step size beside a Schedule": (
        {"policy": fixed(), "step_size_up": 5}, ValueError, "step_size_up=5 has no effect with policy='fixed'",
    ),
    "scale_fn beside a Schedule": (
        {"policy": fixed(), "scale_fn": math.sqrt}, ValueError, "scale_fn=.* has no effect with policy='fixed'",
    ),
    "bounds beside a Schedule's own": (
        {"policy": fixed(0.1), "base_lr": 0.1}, ValueError, "base_lr=0.1 .* have no effect: every phase .*'fixed'",
    ),
    "policy a rate": ({"policy": 0.1}, ValueError, r"policy must be .*got 0\.1; .*as max_lr=0\.1$"),
    "mode": ({"mode": "triangular2"}, TypeError, "^mode='triangular2' is no argument of .*: give policy='triangular2'$"),
    "step_size": ({"step_size": 50}, TypeError, "^step_size=50 is no argument of .*: give step_size_up=50$"),
    "lr": ({"lr": 0.1}, TypeError, r"^lr=0\.1 is no argument of CyclicalOptimizer: give max_lr=0\.1$"),
    "min_lr": ({"min_lr": 0.1}, TypeError, r"give min_lr as base_lr=0\.1, or, .* as end= of the schedule$"),
    "skip_nonfinite": ({"skip_nonfinite": True}, TypeError, r"^skip_nonfinite=True is no argument .*skip_above=math\.inf"),
    "max_norm": ({"max_norm": 1.0}, TypeError, r"give max_grad_norm=1\.0$"),
    "total_steps": ({"total_steps": 9}, TypeError, r"^total_steps=9 is no .*one_cycle\(total_steps.*from_scheduler"),
    "T_max": ({"T_max": 9}, TypeError, r"^T_max=9 is no argument .*cosine\(steps\).*from_scheduler"),
    "T_0": ({"T_0": 9}, TypeError, r"^T_0=9 is no argument .*warm_restarts\(.*from_scheduler"),
    "warmup_steps": ({"warmup_steps": 9}, TypeError, r"^warmup_steps=9 is no argument .*cosine\(total_steps - warmup\)\.with_warmup\("),
    "last_epoch": ({"last_epoch": 3}, TypeError, r"^last_epoch=3 is no argument .*set_iteration"),
    "scheduler": ({"scheduler": None}, TypeError, r"^scheduler=None is no argument .*from_scheduler\(scheduler\)"),
    "an argument of the wrapped class": (
        {"weight_decay": 0.1}, TypeError, r"^weight_decay=0\.1 is no argument .*: give weight_decay to Adam, which is wrapped$",
    ),
    "a slip of the pen": ({"cycle_momentums": True}, TypeError, "give cycle_momentum=True$"),
    "an argument of nothing": ({"speed": 3}, TypeError, "^speed=3 is no argument .*: give one of optimizer, policy, base_lr"),
    "two unknown arguments": ({"mode": "exp_range", "lr": 0.1}, TypeError, r"give policy='exp_range'; lr=0\.1 is no .*max_lr"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_the_constructor(name):
    options, error, pattern = CONSTRUCTOR[name]
    inner = adam()
    before = copy.deepcopy((inner.param_groups, dict(inner.__dict__.get("state", {}))))
    with pytest.raises(error, match=pattern):
        CyclicalOptimizer(inner, **options)
    assert str(inner.param_groups) == str(before[0])
    assert not inner.state


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ((0.01, 0.1), r"CyclicalOptimizer\(optimizer, base_lr=0\.01, max_lr=0\.1\)$"),
        (("exp_range", 0.1), r"got 3 arguments: .*\(optimizer, 'exp_range', base_lr=0\.1\)$"),
        ((0.01, 0.1, 50, 60, "exp_range"), r"step_size_up=50, step_size_down=60, \.\.\.\)$"),
    ],
)
def test_arguments_by_position(arguments, pattern):
    """The order is that of torch's CyclicLR."""
    inner = adam()
    before = str(inner.param_groups)
    with pytest.raises(TypeError, match="takes optimizer and policy by position.*" + pattern):
        CyclicalOptimizer(inner, *arguments)
    assert str(inner.param_groups) == before


def test_the_constructor_shows_its_arguments_and_no_others():
    parameters = inspect.signature(CyclicalOptimizer).parameters
    assert list(parameters)[:4] == ["optimizer", "policy", "base_lr", "max_lr"]
    assert {each.kind.name for each in parameters.values()} == {
        "POSITIONAL_OR_KEYWORD",
        "KEYWORD_ONLY",
    }
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'optimizer'"):
        CyclicalOptimizer()


def test_a_subclass_takes_arguments_of_other_names():
    class Mine(CyclicalOptimizer):
        def __init__(self, optimizer, mode, **options):
            super().__init__(optimizer, mode, **options)

    assert Mine(adam(), mode="exp_range").schedule.name == "exp_range"
    with pytest.raises(TypeError, match="step_size=3 is no argument of CyclicalOptimizer"):
        Mine(adam(), mode="exp_range", step_size=3)


def of_lr(lr):
    inner = adam()
    inner.param_groups[0]["lr"] = lr
    return inner


# name: (makes the object to wrap, error, pattern)
UNWRAPPABLE = {
    "a class": (lambda: torch.optim.Adam, TypeError, "optimizer must be an instance of torch.optim.Optimizer"),
    "a list of tensors": (lambda: [torch.ones(1)], TypeError, "optimizer must be an instance.*of type list"),
    "None": (lambda: None, TypeError, "optimizer must be an instance.*None"),
    "one of ours": (
        lambda: CyclicalOptimizer(adam()), ValueError, "already a CyclicalOptimizer.*set_bounds",
    ),
    "without a rate": (lambda: NoRate([torch.ones(1)]), ValueError, "parameter group 0 of NoRate has no 'lr'"),
    "lr two": (lambda: of_lr(torch.ones(2)), ValueError, r"lr of parameter group 0 must be.*shape \[2\]"),
    "lr on meta": (lambda: of_lr(torch.ones((), device="meta")), ValueError, "one element, got a tensor .*on meta"),
    "lr a string": (lambda: of_lr("0.1"), TypeError, "lr in parameter group 0 must be a number, got '0.1'"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNWRAPPABLE)
def test_what_cannot_be_wrapped(name):
    make, error, pattern = UNWRAPPABLE[name]
    with pytest.raises(error, match=pattern):
        CyclicalOptimizer(make())


def test_cycled_momentum_needs_one():
    inner = torch.optim.Adagrad([torch.ones(1)], lr=0.1)
    with pytest.raises(
        ValueError, match=r"cycle_momentum=True needs a 'momentum' or 'betas'.*Adagrad"
    ):
        CyclicalOptimizer(inner, cycle_momentum=True)


def test_the_environment_is_checked_too(monkeypatch):
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "warp")
    with pytest.raises(ValueError, match="CLR_OPTIM_BACKEND='warp' must be one of"):
        CyclicalOptimizer(adam())
    monkeypatch.setenv("CLR_OPTIM_BACKEND", "torch")
    assert "CLR_OPTIM_BACKEND='torch'" in CyclicalOptimizer(adam()).explain()
    assert "asked for by backend='torch'" in CyclicalOptimizer(adam(), backend="torch").explain()


SGD_STATE = torch.optim.SGD([torch.ones(2)], lr=0.1).state_dict()


def stepped(cls, **options):
    p = torch.nn.Parameter(torch.ones(2))
    opt = cls([p], **options)
    p.grad = torch.ones(2)
    opt.step()
    return opt.state_dict()


def with_group(**keys):
    return lambda o: o.load_state_dict(
        {"state": {}, "param_groups": [{**o.optimizer.state_dict()["param_groups"][0], **keys}]}
    )


# name: (call on a CyclicalOptimizer around an Adam that has taken steps, error, pattern)
METHODS = {
    "set_iteration negative": (lambda o: o.set_iteration(-1), ValueError, "iteration must be an integer >= 0, got -1"),
    "set_iteration broken": (lambda o: o.set_iteration(1.5), ValueError, "iteration must be a whole number"),
    "set_iteration a string": (lambda o: o.set_iteration("3"), TypeError, "iteration must be an integer"),
    "set_iteration beyond devices": (lambda o: o.set_iteration(2**63), ValueError, r"iteration must be an integer <= 2\*\*63 - 1"),
    "step with a number": (lambda o: o.step(3), TypeError, "closure must be a callable .*or None, got 3"),
    "step with a loss": (lambda o: o.step(torch.ones(())), TypeError, "closure must be a callable"),
    "set_bounds nothing": (lambda o: o.set_bounds(), ValueError, "give at least one"),
    "set_bounds crossed": (lambda o: o.set_bounds(base_lr=9.0), ValueError, "base_lr=9.0 is above max_lr=0.01"),
    "set_bounds NaN": (lambda o: o.set_bounds(max_lr=NAN), ValueError, "max_lr must be"),
    "set_bounds length": (lambda o: o.set_bounds(max_lr=[1, 2]), ValueError, "max_lr has 2 values"),
    "lr_at negative": (lambda o: o.lr_at(-3), ValueError, "step must be an integer >= 0, got -3"),
    "lr_at None": (lambda o: o.lr_at(None), TypeError, "step must be an integer"),
    "hook without an argument": (
        lambda o: o.register_cycle_end_hook(lambda: None), TypeError,
        r"hook must be a callable of one optimizer, got .* \(too many positional arguments\)",
    ),
    "scheduler of a plain optimizer": (
        lambda o: CyclicalScheduler(torch.optim.SGD([torch.ones(1)])), TypeError,
        "optimizer must be a CyclicalOptimizer, got SGD: wrap it",
    ),
    "hook not callable": (lambda o: o.register_cycle_end_hook(3), TypeError, "hook must be a callable.*got 3"),
    "group not a dict": (lambda o: o.add_param_group([torch.ones(1)]), TypeError, "param_group must be a dict"),
    "group in a tuple": (
        lambda o: o.add_param_group(({"params": [torch.ones(1)]},)),
        TypeError, "param_group must be a dict, one group a call, got",
    ),
    "group with bad bounds": (
        lambda o: o.add_param_group({"params": [torch.ones(1)], "base_lr": 1.0, "max_lr": 0.1}),
        ValueError, "base_lr=1.0 is above max_lr=0.1 in param_group",
    ),
    "group with NaN": (
        lambda o: o.add_param_group({"params": [torch.ones(1)], "max_lr": NAN}),
        ValueError, r"param_group\['max_lr'\] must be",
    ),
    "group with NaN remembered": (
        lambda o: o.add_param_group({"params": [torch.ones(1)], "clr_base_lr": NAN}),
        ValueError, "clr_base_lr in param_group must be a finite",
    ),
    "group with a negative bound": (
        lambda o: o.add_param_group({"params": [torch.ones(1)], "clr_base_lr": -1.0}),
        ValueError, "clr_base_lr in param_group must be",
    ),
    "group without params": (lambda o: o.add_param_group({"lr": 0.1}), ValueError, r"param_group lacks 'params'.*\['lr'\]"),
    "group of a number": (
        lambda o: o.add_param_group({"params": 3}), TypeError, r"param_group\['params'\] must be a tensor .*got 3",
    ),
    "group of strings": (
        lambda o: o.add_param_group({"params": ["w"]}), TypeError, r"param_group\['params'\] must be .*'w'.*is str",
    ),
    "group with lr on meta": (
        lambda o: o.add_param_group({"params": [torch.ones(1)], "lr": torch.ones((), device="meta")}),
        ValueError, "lr in param_group must be a number or a floating point tensor",
    ),
    "group with a known parameter": (
        lambda o: o.add_param_group({"params": o.param_groups[0]["params"]}),
        ValueError, "more than one parameter group",
    ),
    "load None": (lambda o: o.load_state_dict(None), TypeError, "state_dict must be a dictionary .*got None"),
    "load a model": (
        lambda o: o.load_state_dict(torch.nn.Linear(1, 1).state_dict()),
        ValueError, r"state_dict lacks \['state', 'param_groups'\]",
    ),
    "load groups that are none": (
        lambda o: o.load_state_dict({"state": {}, "param_groups": [3]}), ValueError, "must be a list of dict",
    ),
    "load other sizes": (
        lambda o: o.load_state_dict(adam().state_dict()),
        ValueError, r"groups of \[1\] parameters, the optimizer of \[3\]: build the optimizer",
    ),
    "load NaN bounds": (with_group(clr_max_lr=NAN), ValueError, r"\['clr_max_lr'\] must be"),
    "load crossed bounds": (with_group(clr_base_lr=5.0), ValueError, "base_lr=5.0 is above"),
    "load a negative position": (with_group(clr_step=-2), ValueError, r"\['clr_step'\] must be an integer >= 0"),
}  # fmt: skip


def trained():
    """Return a trained optimizer for METHODS and WRITTEN, and its problem."""
    case = BY_NAME["adam"]
    problem = Problem(case)
    opt = CyclicalOptimizer(case.make(problem.params), step_size_up=3)
    problem.run(opt, range(4))
    return opt, problem


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    call, error, pattern = METHODS[name]
    opt, problem = trained()

    def snapshot():
        return str((opt.param_groups, opt.state_dict(), problem.values(), opt.iteration))

    before, group = snapshot(), opt.param_groups[0]
    with pytest.raises(error, match=pattern):
        call(opt)
    assert snapshot() == before
    assert opt.param_groups[0] is group


META = torch.ones((), device="meta")
# name: (key of a group, the value that other code writes there, error, pattern)
WRITTEN = {
    "lr a string": ("lr", "fast", TypeError, "lr in parameter group 0 must be a number .*got 'fast': leave it"),
    "lr None": ("lr", None, TypeError, "lr in parameter group 0 must be a number .*got None"),
    "lr beyond floats": ("lr", 10**400, TypeError, "lr in parameter group 0 must be a number"),
    "lr two": ("lr", torch.ones(2), TypeError, r"lr in parameter group 0 must be .*shape \[2\]"),
    "lr on meta": ("lr", META, TypeError, "lr in parameter group 0 must be"),
    "clr_step negative": ("clr_step", -1, ValueError, "clr_step must be an integer >= 0, got -1"),
    "clr_step NaN": ("clr_step", NAN, ValueError, "clr_step must be a whole number"),
    "clr_step two": ("clr_step", torch.tensor([1, 2]), TypeError, "clr_step must be an integer >= 0"),
    "clr_step an array": ("clr_step", np.array([1, 2]), TypeError, "clr_step must be an integer >= 0"),
    "clr_step on meta": ("clr_step", META, TypeError, "clr_step must be an integer >= 0"),
    "base a string": ("clr_base_lr", "0.1", TypeError, "clr_base_lr in parameter group 0 must be a number"),
    "base None": ("clr_base_lr", None, TypeError, "clr_base_lr in parameter group 0 must be a number"),
    "base NaN": ("clr_base_lr", NAN, ValueError, "clr_base_lr in parameter group 0 must be a finite"),
    "base complex": ("clr_base_lr", 1j, TypeError, "clr_base_lr in parameter group 0 must be a number"),
    "base an array": ("clr_base_lr", np.array([1.0, 2.0]), TypeError, "clr_base_lr in parameter group 0"),
    "base above max": ("clr_base_lr", 5.0, ValueError, "base_lr=5.0 is above max_lr=0.01 in parameter group 0"),
    "max a tensor": ("clr_max_lr", torch.ones(2), TypeError, "clr_max_lr in parameter group 0 must be a number"),
    "max beyond floats": ("clr_max_lr", 10**400, ValueError, "clr_max_lr in parameter group 0 must be a finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_what_other_code_writes_into_the_groups(name):
    key, value, error, pattern = WRITTEN[name]
    opt, problem = trained()
    good, before = opt.param_groups[0][key], problem.values()
    opt.param_groups[0][key] = value
    for call in (opt.step, opt.state_dict):
        with pytest.raises(error, match=pattern):
            call()
    for mine, then in zip(problem.params, before, strict=True):
        assert torch.equal(mine, then)
    opt.param_groups[0][key] = good
    opt.step()
    assert opt.iteration == 5


@pytest.mark.parametrize("make", [np.float64, np.float32, int], ids=["float64", "float32", "int"])
def test_bounds_of_other_numbers_written_from_outside_are_taken(make):
    opt, problem = trained()
    opt.param_groups[0]["clr_max_lr"] = make(1)
    problem.step(opt, 4)
    assert opt.lr_at(3) == [1.0]
    assert is_next_step_ordinary(opt)


def test_set_bounds_where_the_schedule_has_all():
    opt = CyclicalOptimizer(adam(), fixed(0.3))
    with pytest.raises(
        ValueError, match=r"base_lr=0.1.*every phase of the schedule 'fixed' has bounds"
    ):
        opt.set_bounds(base_lr=0.1)


_optim = torch.optim
FOREIGN = {
    "SGD into Adam": (_optim.SGD, {"momentum": 0.9}, _optim.Adam, {}),
    "plain SGD into Adam": (_optim.SGD, {}, _optim.Adam, {}),
    "Adam into SGD": (_optim.Adam, {}, _optim.SGD, {}),
    "Adam into Adamax": (_optim.Adam, {}, _optim.Adamax, {}),
    "Adamax into Adam": (_optim.Adamax, {}, _optim.Adam, {}),
    "RMSprop into Adadelta": (_optim.RMSprop, {}, _optim.Adadelta, {}),
    "Adadelta into RMSprop": (_optim.Adadelta, {}, _optim.RMSprop, {}),
    "Adagrad into RMSprop": (_optim.Adagrad, {}, _optim.RMSprop, {}),
    "Rprop into SGD": (_optim.Rprop, {}, _optim.SGD, {}),
}


@pytest.mark.parametrize("wrapped_source", [True, False], ids=["ours", "plain"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_of_another_class(name, wrapped_source):
    source, source_options, target, options = FOREIGN[name]
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    inner = source([p], lr=0.1, **source_options)
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    writer = CyclicalOptimizer(inner) if wrapped_source else inner
    writer.step()
    opt = CyclicalOptimizer(target([q], lr=0.1, **options))
    opt.step()
    before = str((opt.param_groups, dict(opt.state), q))
    with pytest.raises(
        ValueError, match=f"another optimizer class than {target.__name__}.*load it"
    ):
        opt.load_state_dict(writer.state_dict())
    assert str((opt.param_groups, dict(opt.state), q)) == before


def test_checkpoints_that_only_look_foreign_load():
    # Adam and AdamW share their state, older versions lack keys, users add keys.
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    inner = torch.optim.Adam([p], lr=0.1)
    inner.step()
    state = inner.state_dict()
    for key in ("fused", "decoupled_weight_decay", "maximize"):
        state["param_groups"][0].pop(key, None)
    state["param_groups"][0]["my_own_key"] = "head"
    CyclicalOptimizer(torch.optim.AdamW([p], lr=0.1)).load_state_dict(state)
    opt = CyclicalOptimizer(torch.optim.Adam([p], lr=0.1))
    opt.load_state_dict(state)
    assert opt.param_groups[0]["my_own_key"] == "head"


@pytest.mark.parametrize("target", [_optim.Adam, _optim.AdamW, _optim.RAdam])
def test_another_classs_checkpoint_that_torch_can_step_with_loads(target):
    """torch fills in missing settings. Additional settings do no harm."""
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    saved = stepped(_optim.NAdam, lr=0.1)
    saved["param_groups"][0].pop("decoupled_weight_decay", None)
    ours, twin = CyclicalOptimizer(target([p], lr=0.1), fixed(0.1)), target([q], lr=0.1)
    for each, opt in ((p, ours), (q, twin)):
        opt.load_state_dict(copy.deepcopy(saved))
        each.grad = torch.ones(2)
        opt.step()
    assert torch.allclose(p, q, rtol=1e-6)
    assert ours.param_groups[0]["momentum_decay"] == twin.param_groups[0]["momentum_decay"]


def test_positions_that_disagree():
    inner = torch.optim.SGD([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}], lr=0.1)
    opt = CyclicalOptimizer(inner)
    state = opt.state_dict()
    state["param_groups"][1]["clr_step"] = 5
    with pytest.raises(ValueError, match=r"disagree on clr_step: \{0: 0, 1: 5\}.*set them all"):
        opt.load_state_dict(state)
    assert opt.iteration == 0


SCHEDULES = {
    "triangular both 0": (lambda: triangular(0, 0), ValueError, "step_size_up=0 and step_size_down=0"),
    "triangular one bound": (lambda: triangular(2, base_lr=0.1), ValueError, "either both bounds or neither"),
    "triangular crossed": (lambda: triangular(2, base_lr=0.2, max_lr=0.1), ValueError, "base_lr=0.2 is above"),
    "triangular2 window": (lambda: schedule.triangular2(2, window=3), ValueError, "window must be one of"),
    "exp_range gamma": (lambda: schedule.exp_range(2, gamma=2), ValueError, "gamma must be"),
    "exp_range_bounds gamma": (lambda: schedule.exp_range_bounds(2, gamma="a"), TypeError, "gamma must be"),
    "fixed negative": (lambda: fixed(-1), ValueError, "^lr must be .* >= 0, got -1"),
    "decay 0": (lambda: schedule.decay(0), ValueError, "steps must be an integer >= 1, got 0"),
    "exp gamma": (lambda: schedule.exp(gamma=0), ValueError, "gamma must be"),
    "one_cycle short": (lambda: one_cycle(2), ValueError, "total_steps must be an integer >= 3"),
    "one_cycle endless": (lambda: one_cycle(10**400), ValueError, r"total_steps must be an integer <= 2\*\*63 - 1"),
    "ramp endless": (
        lambda: ramp(10**400, 0.1, 1.0, mode="exponential"), ValueError, r"num_steps must be an integer <= 2\*\*63 - 1",
    ),
    "Phase gamma above 1": (lambda: Phase(step_size_up=1, gamma=2.0), ValueError, "gamma must be .* <= 1"),
    "Phase base_gamma without end": (
        lambda: Phase(step_size_up=1, base_gamma=2.0), ValueError, "base_gamma must be .* <= 1",
    ),
    "one_cycle pct": (lambda: one_cycle(9, pct_start=0.7), ValueError, "pct_start must be .* <= 0.5, got 0.7"),
    "one_cycle factor": (lambda: one_cycle(9, final_div_factor=0.5), ValueError, "final_div_factor must be"),
    "warm_restarts 0": (lambda: warm_restarts(0), ValueError, "period must be an integer >= 1"),
    "warm_restarts factor": (
        lambda: warm_restarts(3, period_multiplier=1.5), ValueError, "period_multiplier must be a whole number",
    ),
    "ramp short": (lambda: ramp(1), ValueError, "num_steps must be an integer >= 2"),
    "ramp one end": (lambda: ramp(5, 0.1), ValueError, "start_lr=0.1 and end_lr=None: give both"),
    "ramp falling": (lambda: ramp(5, 0.2, 0.1), ValueError, "end_lr=0.1 must be above start_lr=0.2"),
    "ramp mode": (lambda: ramp(5, mode="log"), ValueError, "mode must be one of 'linear', 'exponential'"),
    "ramp from 0": (lambda: ramp(5, 0, 1, mode="exponential"), ValueError, "start_lr must be .* > 0"),
    "ramp no ends": (lambda: ramp(5, mode="exponential"), ValueError, "needs both ends"),
    "sequence empty": (lambda: sequence([]), ValueError, "parts is empty: give at least one"),
    "sequence no list": (lambda: sequence(fixed()), TypeError, "parts must be a list of"),
    "sequence no pair": (lambda: sequence([fixed()]), TypeError, r"parts\[0\] must be a pair"),
    "sequence no schedule": (lambda: sequence([("fixed", 3)]), TypeError, r"parts\[0\]\[0\] must be a Schedule"),
    "sequence 0 steps": (lambda: sequence([(fixed(), 0)]), ValueError, r"parts\[0\]\[1\] must be an integer >= 1"),
    "sequence endless start": (
        lambda: sequence([(fixed(), None), (fixed(), 3)]), ValueError, r"parts\[1\] would never begin",
    ),
    "Schedule empty": (lambda: Schedule("mine", []), ValueError, "phases is empty"),
    "Schedule of strings": (lambda: Schedule("mine", ["a"]), TypeError, r"phases\[0\] must be a Phase, got 'a'"),
    "Schedule unnamed": (lambda: Schedule("", [Phase(step_size_up=1)]), TypeError, "name must be"),
    "Schedule endless start": (
        lambda: Schedule("mine", [Phase(step_size_up=1)] * 2), ValueError, r"phases\[1\] would never begin",
    ),
    "Phase constant with a cycle": (
        lambda: Phase(step_size_up=3, window="constant"), ValueError, "window='constant' has no cycle",
    ),
    "Phase scale_fn without a cycle": (
        lambda: Phase(window="constant", scale_fn=math.sqrt), ValueError, "scale_fn=.* scales the amplitude of a cycle.*'iterations'",
    ),
    "Phase gamma": (lambda: Phase(step_size_up=1, base_gamma=-1), ValueError, "base_gamma must be"),
    "ramp beyond floats": (
        lambda: ramp(5, 1e-300, 1e300, mode="exponential"), ValueError, "end_lr=1e.300 is more times start_lr.*raise",
    ),
    "Phase ends": (lambda: Phase(step_size_up=1, lower=1), TypeError, "lower must be a pair"),
    "call with a fraction": (lambda: fixed()(0.5), ValueError, "step must be a whole number"),
    "call with floats": (lambda: fixed()([0.5]), TypeError, "step must be an integer or an array of integers"),
    "call with a ragged list": (lambda: fixed()([[1], [1, 2]]), TypeError, "step must be an integer or an array"),
    "call with a tensor on meta": (
        lambda: fixed()(torch.ones(2, device="meta")), TypeError, "step must be an integer or an array",
    ),
    "call with crossed bounds": (lambda: triangular(2)(1, base_lr=2, max_lr=1), ValueError, "base_lr=2.0 is above"),
    "call with NaN": (lambda: triangular(2)(1, base_lr=NAN), ValueError, "base_lr must be"),
    "momentum NaN": (lambda: triangular(2).momentum(1, NAN), ValueError, "base_momentum must be"),
    "momentum a list": (lambda: triangular(2).momentum(1, 0.1, [1]), TypeError, "max_momentum must be a number"),
    "momentum crossed": (lambda: triangular(2).momentum(1, 0.9, 0.8), ValueError, "base_momentum=0.9 is above.*swap"),
    "rates at a string": (lambda: fixed().rates("1", [(0.1, 1.0)]), TypeError, "step must be an integer >= 0, got '1'"),
    "rates at a negative": (lambda: fixed().rates(-1, [(0.1, 1.0)]), ValueError, "step must be an integer >= 0"),
    "rates of a number": (lambda: fixed().rates(1, 0.1), TypeError, r"bounds must be a list of pairs \(base_lr, max_lr\).*0.1"),
    "rates of strings": (lambda: fixed().rates(1, [("a", "b")]), TypeError, "bounds must be a list of pairs"),
    "rates of single numbers": (lambda: fixed().rates(1, [0.1]), TypeError, "bounds must be a list of pairs"),
    "momenta of a number": (lambda: triangular(2).momenta(1, 0.9), TypeError, "bounds must be a list of pairs .*momentum"),
    "locate of NaN": (lambda: fixed().locate(NAN), ValueError, "step must be a whole number"),
    "position of None": (lambda: Phase(step_size_up=1).position(None), TypeError, "step must be an integer >= 0"),
    "shape of an array": (
        lambda: Phase(step_size_up=1).shape(np.array([1, 2])), TypeError, "step must be an integer >= 0",
    ),
    "ends of None": (lambda: Phase(step_size_up=1).ends(None, 1.0), TypeError, "base_lr must be a number, got None"),
    "call with a negative": (lambda: fixed()([3, -1]), ValueError, "step must be an integer >= 0, got -1"),
    "cycle of a negative": (lambda: fixed().cycle(-1), ValueError, "step must be an integer >= 0"),
    "from_dict no dict": (lambda: Schedule.from_dict([1]), TypeError, "data must be a dictionary"),
    "from_dict format": (lambda: Schedule.from_dict({"format": 9}), ValueError, "format=9, and this version reads 1"),
    "from_dict phases": (
        lambda: Schedule.from_dict({"format": 1, "name": "x", "phases": "y"}), ValueError, "must be a list",
    ),
    "from_dict unknown key": (
        lambda: Schedule.from_dict({"format": 1, "name": "x", "phases": [{"speed": 1}]}),
        ValueError, r"unknown keys \['speed'\]; known",
    ),
    "from_dict format an array": (
        lambda: Schedule.from_dict({"format": np.array([1, 2])}), ValueError, "and this version reads 1",
    ),
    "from_dict odd keys": (
        lambda: Schedule.from_dict({"format": 1, "name": "x", "phases": [{3: 1, "speed": 1}]}),
        ValueError, r"unknown keys \['3', 'speed'\]; known",
    ),
    "from_json nested": (lambda: Schedule.from_json("[" * 10**6), ValueError, r"text is no JSON.*'\[\[.*; give what"),
    "from_json": (lambda: Schedule.from_json("{"), ValueError, "text is no JSON of a schedule"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    call, error, pattern = SCHEDULES[name]
    with pytest.raises(error, match=pattern):
        call()


def test_a_cycle_number_beyond_floats_is_infinite():
    assert triangular(2).cycle(10**400) == math.inf
