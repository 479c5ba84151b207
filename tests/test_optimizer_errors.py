"""Wrong input raises an error that names argument, value and remedy, and changes nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import BY_NAME, Problem

from clr_optim import CyclicalOptimizer, Phase, Schedule, schedule
from clr_optim.schedule import fixed, one_cycle, ramp, sequence, triangular, warm_restarts

NAN = float("nan")


def adam(params=None):
    return torch.optim.Adam(params or [torch.nn.Parameter(torch.ones(2))], lr=0.1)


class NoRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


# name: (arguments of CyclicalOptimizer besides the optimizer, error, pattern)
CONSTRUCTOR = {
    "policy unknown": ({"policy": "cosine"}, ValueError, r"policy must be one of 'triangular'.*'cosine'"),
    "policy a number": ({"policy": 3}, ValueError, "policy must be .* a Schedule .*got 3"),
    "policy a function": ({"policy": triangular}, ValueError, "policy must be .* a Schedule"),
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
    "window unknown": ({"window": "hamming"}, ValueError, "window must be one of 'triangle', 'welch', 'hann', got"),
    "window constant": ({"window": "constant"}, ValueError, "window must be one of"),
    "scale_fn a number": ({"scale_fn": 0.5}, TypeError, "scale_fn must be a callable of one number, got 0.5"),
    "scale_mode unknown": ({"scale_mode": "epoch"}, ValueError, "scale_mode must be one of 'cycle', 'iterations'"),
    "cycle_momentum a number": ({"cycle_momentum": 1}, TypeError, "cycle_momentum must be True or False, got 1"),
    "base_momentum above 1": ({"base_momentum": 1.5}, ValueError, "base_momentum must be .* <= 1, got 1.5"),
    "base_momentum above max": (
        {"base_momentum": 0.95}, ValueError, "base_momentum=0.95 is above max_momentum=0.9",
    ),
    "max_momentum NaN": ({"max_momentum": NAN}, ValueError, "max_momentum must be"),
    "max_momentum of wrong length": ({"max_momentum": [0.9, 0.9]}, ValueError, "max_momentum has 2 values"),
    "max_grad_norm 0": ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be .* > 0, got 0"),
    "max_grad_norm a string": ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number"),
    "backend unknown": ({"backend": "cuda"}, ValueError, "backend='cuda' must be one of 'auto'"),
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
    ("make", "error", "pattern"),
    [
        (lambda: torch.optim.Adam, TypeError, "optimizer must be an instance of torch.optim.Optimizer"),
        (lambda: [torch.ones(1)], TypeError, "optimizer must be an instance.*of type list"),
        (lambda: None, TypeError, "optimizer must be an instance.*None"),
        (lambda: CyclicalOptimizer(adam()), ValueError, "already a CyclicalOptimizer.*set_bounds"),
        (lambda: NoRate([torch.ones(1)]), ValueError, "parameter group 0 of NoRate has no 'lr'"),
    ],
)  # fmt: skip
def test_what_cannot_be_wrapped(make, error, pattern):
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
    "set_bounds nothing": (lambda o: o.set_bounds(), ValueError, "give at least one"),
    "set_bounds crossed": (lambda o: o.set_bounds(base_lr=9.0), ValueError, "base_lr=9.0 is above max_lr=0.01"),
    "set_bounds NaN": (lambda o: o.set_bounds(max_lr=NAN), ValueError, "max_lr must be"),
    "set_bounds length": (lambda o: o.set_bounds(max_lr=[1, 2]), ValueError, "max_lr has 2 values"),
    "lr_at negative": (lambda o: o.lr_at(-3), ValueError, "step must be an integer >= 0, got -3"),
    "lr_at None": (lambda o: o.lr_at(None), TypeError, "step must be an integer"),
    "hook not callable": (lambda o: o.register_cycle_end_hook(3), TypeError, "hook must be a callable.*got 3"),
    "group not a dict": (lambda o: o.add_param_group([torch.ones(1)]), TypeError, "param_group must be a dict"),
    "group with bad bounds": (
        lambda o: o.add_param_group({"params": [torch.ones(1)], "base_lr": 1.0, "max_lr": 0.1}),
        ValueError, "base_lr=1.0 is above max_lr=0.1 in param_group",
    ),
    "group with NaN": (
        lambda o: o.add_param_group({"params": [torch.ones(1)], "max_lr": NAN}),
        ValueError, r"param_group\['max_lr'\] must be",
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


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    call, error, pattern = METHODS[name]
    case = BY_NAME["adam"]
    problem = Problem(case)
    opt = CyclicalOptimizer(case.make(problem.params), step_size_up=3)
    problem.run(opt, range(4))

    def snapshot():
        return str((opt.param_groups, opt.state_dict(), problem.values(), opt.iteration))

    before, group = snapshot(), opt.param_groups[0]
    with pytest.raises(error, match=pattern):
        call(opt)
    assert snapshot() == before
    assert opt.param_groups[0] is group


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
    "NAdam into Adam": (_optim.NAdam, {}, _optim.Adam, {}),
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
    # Adam and AdamW share their state, older versions lack keys, users add keys of their own.
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
    "triangular one bound": (lambda: triangular(2, base_lr=0.1), ValueError, "both bounds of its own or neither"),
    "triangular crossed": (lambda: triangular(2, base_lr=0.2, max_lr=0.1), ValueError, "base_lr=0.2 is above"),
    "triangular2 window": (lambda: schedule.triangular2(2, window=3), ValueError, "window must be one of"),
    "exp_range gamma": (lambda: schedule.exp_range(2, gamma=2), ValueError, "gamma must be"),
    "exp_range_bounds gamma": (lambda: schedule.exp_range_bounds(2, gamma="a"), TypeError, "gamma must be"),
    "fixed negative": (lambda: fixed(-1), ValueError, "^lr must be .* >= 0, got -1"),
    "decay 0": (lambda: schedule.decay(0), ValueError, "steps must be an integer >= 1, got 0"),
    "exp gamma": (lambda: schedule.exp(gamma=0), ValueError, "gamma must be"),
    "one_cycle short": (lambda: one_cycle(2), ValueError, "total_steps must be an integer >= 3"),
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
    "Phase ends": (lambda: Phase(step_size_up=1, lower=1), TypeError, "lower must be a pair"),
    "call with a fraction": (lambda: fixed()(0.5), ValueError, "step must be a whole number"),
    "call with floats": (lambda: fixed()([0.5]), TypeError, "step must be an integer or an array of integers"),
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
    "from_json": (lambda: Schedule.from_json("{"), ValueError, "text is no JSON of a schedule"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    call, error, pattern = SCHEDULES[name]
    with pytest.raises(error, match=pattern):
        call()
