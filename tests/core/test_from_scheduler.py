"""Take over a CyclicLR or OneCycleLR of torch in mid-run: rates and momenta go on unchanged."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import BY_NAME, Problem
from hypothesis import assume, example, given
from hypothesis import strategies as st
from internals import backend_of
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR

from clr_optim import CyclicalOptimizer
from clr_optim.schedule import triangular

RULES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
}


def make(rule="sgd", groups=2, **options):
    """Return an optimizer whose groups have one parameter each, without a gradient."""
    cls, own = RULES[rule]
    params = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(groups)]
    return cls(params, **{"lr": 0.1, **own, **options})


def momentum(group):
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def held(optimizer):
    """Return the rate and momentum of every group for the next step."""
    return [(float(g["lr"]), momentum(g)) for g in optimizer.param_groups]


def go(optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.step()
        scheduler.step()


def taken_over(build, steps, **options):
    """Return our optimizer, and torch's optimizer and scheduler, all ``steps`` steps into a run."""
    pairs = []
    for _ in range(2):
        optimizer = make(**options)
        scheduler = build(optimizer)
        go(optimizer, scheduler, steps)
        pairs.append((optimizer, scheduler))
    return CyclicalOptimizer.from_scheduler(pairs[0][1]), *pairs[1]


def assert_goes_on(opt, optimizer, scheduler, steps, scale):
    for _ in range(steps):
        for (lr, m), (torchs_lr, torchs_m) in zip(held(opt), held(optimizer), strict=True):
            # Relative to the bound, since subtraction makes the rates near 0.
            assert lr == pytest.approx(torchs_lr, rel=1e-9, abs=1e-13 * scale)
            assert m == pytest.approx(torchs_m, rel=1e-9)
        assert [float(lr) for lr, _ in held(opt)] == opt.get_last_lr()
        assert opt.iteration == scheduler.last_epoch
        opt.step()
        go(optimizer, scheduler, 1)


def by_cycle(cycle):
    return 1 / cycle


def by_step(step):
    return 0.5 * (1 + math.cos(0.3 * step))


MODES = {
    "triangular": {"mode": "triangular"},
    "triangular2": {"mode": "triangular2"},
    "exp_range": {"mode": "exp_range", "gamma": 0.97},
    "exp_range of gamma 1": {"mode": "exp_range"},
    "scale_fn": {"scale_fn": by_cycle},
    "scale_fn of the step": {"scale_fn": by_step, "scale_mode": "iterations"},
    "scale_fn in a mode of no name": {"mode": "my own", "scale_fn": by_cycle},
}


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_cyclic_lr(mode, data):
    rule = data.draw(st.sampled_from(sorted(RULES)))
    up = data.draw(st.integers(1, 9))
    down = data.draw(st.none() | st.integers(0, 9))
    bases = data.draw(st.lists(st.sampled_from([0.0, 1e-5, 0.003, 0.1]), min_size=2, max_size=2))
    tops = [base + data.draw(st.just(0.0) | st.floats(1e-9, 2.0)) for base in bases]
    momenta = {}
    if cycled := data.draw(st.booleans()):
        low = data.draw(st.lists(st.floats(0.0, 0.8), min_size=2, max_size=2))
        momenta = {"base_momentum": low, "max_momentum": [0.85, 0.95]}
    period = up + (up if down is None else down)
    position = data.draw(st.integers(0, 3 * period))

    def build(optimizer):
        return CyclicLR(
            optimizer, bases, tops, up, down, cycle_momentum=cycled, **momenta, **MODES[mode]
        )

    opt, optimizer, scheduler = taken_over(build, position, rule=rule)
    assert opt.iteration == position
    assert_goes_on(opt, optimizer, scheduler, 2 * period + 1, max(tops))


@pytest.mark.parametrize("three_phase", [False, True], ids=["two phases", "three phases"])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
@given(data=st.data())
def test_one_cycle_lr(anneal, three_phase, data):
    rule = data.draw(st.sampled_from(sorted(RULES)))
    total = data.draw(st.integers(1, 50))
    # Turns at whole steps, between two, before the first, beyond the last.
    whole = st.integers(0, total).map(lambda n: n / total)
    pct = data.draw(st.sampled_from([0.0, 0.3, 0.25, 0.5, 0.61, 1.0]) | whole)
    position = data.draw(st.integers(0, total - 1))
    options = {
        "max_lr": data.draw(st.lists(st.floats(1e-4, 2.0), min_size=2, max_size=2)),
        "div_factor": data.draw(st.sampled_from([1.0, 2.5, 25.0])),
        "final_div_factor": data.draw(st.sampled_from([0.5, 1.0, 1e4, 1e9])),
    }
    if cycled := data.draw(st.booleans()):
        options |= {"base_momentum": [0.5, 0.85], "max_momentum": 0.95}

    def build(optimizer):
        return OneCycleLR(
            optimizer, total_steps=total, pct_start=pct, anneal_strategy=anneal,
            three_phase=three_phase, cycle_momentum=cycled, **options,
        )  # fmt: skip

    try:
        build(make(rule))
        opt, optimizer, scheduler = taken_over(build, position, rule=rule)
    except ZeroDivisionError:  # raised by torch for a phase without steps
        assume(False)
    left = total - 1 - position
    assert_goes_on(opt, optimizer, scheduler, left, max(options["max_lr"]))
    last = held(optimizer)
    for _ in range(3):  # here torch overshoots, and then raises
        for mine, torchs in zip(held(opt), last, strict=True):
            assert mine == pytest.approx(torchs, rel=1e-9, abs=1e-15)
        opt.step()


@given(epochs=st.integers(1, 9), per_epoch=st.integers(2, 400), three_phase=st.booleans())
@example(10, 391, False)
@example(10, 391, True)
def test_a_one_cycle_of_whole_steps_is_phases_alone(epochs, per_epoch, three_phase):
    total = 10 * epochs * per_epoch
    optimizer = make()
    scheduler = OneCycleLR(
        optimizer, 0.5, epochs=10 * epochs, steps_per_epoch=per_epoch, three_phase=three_phase
    )
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    assert opt.schedule.scale_fn is None
    top = round(0.3 * total) - 1
    assert opt.lr_at(top) == [0.5, 0.5]
    assert opt.lr_at(total - 1) == pytest.approx([0.5 / 25 / 1e4] * 2, rel=1e-12)
    # The only cycle ends after the last step.
    ends = [step for step in range(1, total + 3) if opt.schedule.is_cycle_end(step)]
    assert ends == [total]
    assert opt.steps_to_cycle_end == total


def test_a_one_cycle_between_steps_resumes_pickles_and_copies():
    def build():
        optimizer = make()
        return optimizer, OneCycleLR(optimizer, [0.5, 0.1], total_steps=25)

    optimizer, scheduler = build()
    go(optimizer, scheduler, 3)
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    assert opt.schedule.scale_fn is not None
    assert (opt.cycle, opt.steps_to_cycle_end) == (0.0, None)
    opt.step()
    again = CyclicalOptimizer.from_scheduler(build()[1])
    again.load_state_dict(opt.state_dict())
    for other in (again, pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
        assert other.schedule == opt.schedule
        assert other.iteration == 4
        assert held(other) == held(opt)
        assert other.lr_at(17) == opt.lr_at(17)


def test_a_one_cycle_that_is_over_stays_at_its_last_rate():
    optimizer = make()
    scheduler = OneCycleLR(optimizer, 1.0, total_steps=10)
    go(optimizer, scheduler, 10)
    with pytest.raises(ValueError, match="Tried to step 11 times"):
        scheduler.step()
    scheduler.last_epoch = 10  # the refused step has moved it
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    for _ in range(3):
        assert held(opt) == [(pytest.approx(1 / 25 / 1e4), 0.95)] * 2
        opt.step()
    assert opt.iteration == 13


def test_frozen_groups_have_a_rate_of_0():
    opt, optimizer, scheduler = taken_over(lambda o: OneCycleLR(o, [0.0, 0.3], 20), 4)
    assert_goes_on(opt, optimizer, scheduler, 15, 0.3)
    opt, optimizer, scheduler = taken_over(lambda o: OneCycleLR(o, 0.0, 20), 4)
    assert_goes_on(opt, optimizer, scheduler, 15, 0.0)


def test_no_last_rate():
    opt, optimizer, scheduler = taken_over(
        lambda o: OneCycleLR(o, 0.3, 20, three_phase=True, final_div_factor=math.inf), 4
    )
    assert_goes_on(opt, optimizer, scheduler, 15, 0.3)
    assert opt.get_last_lr() == [0.0, 0.0]


SCHEDULERS = {
    "CyclicLR": lambda o: CyclicLR(o, 0.01, 0.1, 7, mode="triangular2", cycle_momentum=True),
    "CyclicLR, momentum left": lambda o: CyclicLR(o, 0.01, 0.1, 7, cycle_momentum=False),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, total_steps=60),
    "OneCycleLR between steps": lambda o: OneCycleLR(o, 0.1, total_steps=61),
}


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "rmsprop-mom-cent"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_training_comes_to_the_same_parameters(name, case, backend):
    case = BY_NAME[case]
    runs = []
    for ours in (True, False):
        problem = Problem(case, torch.float64)
        optimizer = case.make(problem.params)
        scheduler = SCHEDULERS[name](optimizer)
        problem.run(optimizer, range(20), after=lambda k, s=scheduler: s.step())
        if ours:
            opt = CyclicalOptimizer.from_scheduler(scheduler, backend=backend)
            problem.run(opt, range(20, 50))
        else:
            problem.run(optimizer, range(20, 50), after=lambda k, s=scheduler: s.step())
        runs.append(problem.values())
    for mine, torchs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_hooks_fire_once_and_the_kernels_serve(backend):
    case = BY_NAME["adam"]
    problem = Problem(case)
    optimizer = case.make(problem.params)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(("inner pre", opt)))
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(("inner post", opt)))
    scheduler = CyclicLR(optimizer, 0.01, 0.1, 4, cycle_momentum=False)
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched")  # torch's own patch
    opt = CyclicalOptimizer.from_scheduler(scheduler, backend=backend)
    assert opt.explain().startswith(f"{backend}: 3 parameter tensors")
    handles = [
        register_optimizer_step_pre_hook(lambda opt, *_: seen.append(("pre", opt))),
        register_optimizer_step_post_hook(lambda opt, *_: seen.append(("post", opt))),
    ]
    try:
        for k in range(3):
            seen.clear()
            problem.step(opt, k)
            assert seen == [
                ("pre", opt), ("inner pre", optimizer), ("inner post", optimizer), ("post", opt),
            ]  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    assert (backend_of(opt) is not None) == (backend == "native")


@pytest.mark.parametrize("build", [SCHEDULERS["CyclicLR"], SCHEDULERS["OneCycleLR"]])
@pytest.mark.parametrize("steps", [0, 5])
def test_the_scheduler_stepped_by_code_left_over_is_overruled_with_one_warning(build, steps):
    problem = Problem(BY_NAME["sgd-momentum"])
    optimizer = BY_NAME["sgd-momentum"].make(problem.params)
    scheduler = build(optimizer)
    go(optimizer, scheduler, steps)
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    expected = [opt.lr_at(k) for k in range(steps, steps + 6)]
    problem.step(opt, 0)
    scheduler.step()
    scheduler.step()  # far enough from ours
    with pytest.warns(UserWarning, match="lr was written from outside") as warned:
        problem.step(opt, 1)
    for k in range(2, 6):
        scheduler.step()  # torch would warn at its first step if its patch of step() were gone
        assert opt.get_last_lr() == expected[k]
        problem.step(opt, k)
    assert len(warned) == 1
    assert opt.iteration == steps + 6


def test_a_step_that_other_code_replaced_still_runs():
    optimizer = make()
    scheduler = CyclicLR(optimizer, 0.01, 0.1, 4)
    inner, calls = optimizer.step, []

    def logged(closure=None):
        calls.append(float(optimizer.param_groups[0]["lr"]))
        return inner(closure)

    optimizer.step = logged
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    rates = [opt.lr_at(k)[0] for k in range(5)]
    for _ in range(5):
        opt.step()
    assert calls == rates
    assert optimizer.step is logged


def test_a_tensor_lr_is_filled():
    lr = torch.tensor(0.1)
    optimizer = make("adam", groups=1, lr=lr, capturable=False, foreach=False)
    scheduler = CyclicLR(optimizer, 0.01, 0.1, 4, cycle_momentum=False)
    go(optimizer, scheduler, 3)
    tensor = optimizer.param_groups[0]["lr"]
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    opt.step()
    assert opt.param_groups[0]["lr"] is tensor
    assert tensor.item() == pytest.approx(0.1)
    assert opt.get_last_lr() == pytest.approx([0.1], rel=1e-12)


def test_a_scheduler_restored_in_mid_run():
    for build in SCHEDULERS.values():
        optimizer = make()
        scheduler = build(optimizer)
        go(optimizer, scheduler, 9)
        saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
        optimizer, other = make(), make()
        restored = build(optimizer)
        optimizer.load_state_dict(saved[0])
        restored.load_state_dict(saved[1])
        go(other, reference := build(other), 9)
        opt = CyclicalOptimizer.from_scheduler(restored)
        assert_goes_on(opt, other, reference, 20, 0.1)


@pytest.mark.parametrize("restored", ["optimizer", "scheduler"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_only_one_of_the_two_restored(name, restored):
    optimizer = make()
    scheduler = SCHEDULERS[name](optimizer)
    go(optimizer, scheduler, 9)
    saved = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    optimizer = make()
    scheduler = SCHEDULERS[name](optimizer)
    {"optimizer": optimizer, "scheduler": scheduler}[restored].load_state_dict(saved[restored])
    with pytest.raises(ValueError, match=r"has lr=.* at its step .* says .* only one of optimizer"):
        CyclicalOptimizer.from_scheduler(scheduler)


def test_last_epoch_as_argument():
    optimizer = make()
    go(optimizer, CyclicLR(optimizer, 0.01, 0.1, 4), 5)
    opt = CyclicalOptimizer.from_scheduler(CyclicLR(optimizer, 0.01, 0.1, 4, last_epoch=5))
    assert opt.iteration == 6
    assert opt.get_last_lr() == pytest.approx([0.055, 0.055])


def test_bounds_changed_by_hand_hold():
    optimizer = make()
    scheduler = CyclicLR(optimizer, 0.01, 0.1, 4)
    scheduler.max_lrs[1] = 0.9
    scheduler.base_momentums[0] = 0.5
    go(optimizer, scheduler, 4)
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    assert held(opt) == [(0.1, 0.5), (0.9, 0.8)]


def test_a_group_that_was_added():
    optimizer = make()
    scheduler = CyclicLR(optimizer, 0.01, 0.1, 4, cycle_momentum=False)
    optimizer.add_param_group({"params": [torch.ones(1)], "lr": 0.02})
    with pytest.raises(ValueError, match=r"base_lrs=\[0.01, 0.01\].* 3 parameter groups: append"):
        CyclicalOptimizer.from_scheduler(scheduler)
    scheduler.base_lrs.append(0.02)
    scheduler.max_lrs.append(0.2)
    assert CyclicalOptimizer.from_scheduler(scheduler).lr_at(4) == [0.1, 0.1, 0.2]

    optimizer = make()
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=60)
    optimizer.add_param_group({"params": [torch.ones(1)]})
    with pytest.raises(ValueError, match=r"\['initial_lr', 'max_lr', .* in parameter group 2"):
        CyclicalOptimizer.from_scheduler(scheduler)


def test_the_other_arguments_and_the_class():
    class Mine(CyclicalOptimizer):
        pass

    optimizer = make(groups=1)
    scheduler = CyclicLR(optimizer, 0.01, 0.1, 4)
    keys = dict(optimizer.param_groups[0])
    opt = Mine.from_scheduler(scheduler, max_grad_norm=1.0, backend="torch")
    assert type(opt) is Mine
    assert opt.optimizer is optimizer
    assert "asked for by backend='torch'" in opt.explain()
    optimizer.param_groups[0]["params"][0].grad = torch.full((2,), 3.0)
    opt.step()
    assert opt.grad_norm == pytest.approx(math.sqrt(18.0))
    assert keys.keys() <= opt.param_groups[0].keys()
    make(groups=1).load_state_dict(opt.state_dict())


class Louder(CyclicLR):
    """A subclass with the same rates."""

    def get_last_lr(self):
        return super().get_last_lr()


class Doubled(CyclicLR):
    def get_lr(self):
        return [2 * lr for lr in super().get_lr()]


class EverySecond(OneCycleLR):
    def step(self, epoch=None):
        if getattr(self, "_step_count", 0) % 2 == 0:
            super().step(epoch)


def test_a_subclass_with_the_same_rates():
    opt, *torchs = taken_over(lambda o: Louder(o, 0.01, 0.1, 4), 3)
    assert_goes_on(opt, *torchs, 17, 0.1)


def chained(optimizer):
    cyclic = CyclicLR(optimizer, 0.01, 0.1, 4)
    return ChainedScheduler([cyclic, ExponentialLR(optimizer, 0.9)])


def in_a_chain(optimizer):
    chain = chained(optimizer)
    go(optimizer, chain, 3)
    return chain._schedulers[0]


def in_a_sequence(optimizer):
    warmup = LinearLR(optimizer, 0.1, total_iters=5)
    return SequentialLR(optimizer, [warmup, CyclicLR(optimizer, 0.01, 0.1, 4)], [5])


def patched(optimizer):
    scheduler = CyclicLR(optimizer, 0.01, 0.1, 4)
    scheduler.get_lr = lambda: [0.3, 0.3]
    return scheduler


def on_ours(optimizer):
    return CyclicLR(CyclicalOptimizer(optimizer), 0.01, 0.1, 4, cycle_momentum=False)


def written(**keys):
    def build(optimizer):
        scheduler = CyclicLR(optimizer, 0.01, 0.1, 4)
        optimizer.param_groups[1].update(keys)
        return scheduler

    return build


def with_other_min(optimizer):
    scheduler = OneCycleLR(optimizer, 0.1, 30)
    optimizer.param_groups[1]["min_lr"] *= 2
    return scheduler


def at(last_epoch):
    def build(optimizer):
        scheduler = CyclicLR(optimizer, 0.01, 0.1, 4)
        scheduler.last_epoch = last_epoch
        return scheduler

    return build


# name: (makes the scheduler for an SGD of two groups, error, pattern)
REFUSED = {
    "None": (
        lambda o: None,
        TypeError,
        r"scheduler must be one of .*\(LinearLR, .*, MultiplicativeLR\), got .*of type NoneType",
    ),
    "an optimizer": (lambda o: o, TypeError, "scheduler must be .*of type SGD"),
    "another class": (lambda o: SWALR(o, 0.1), TypeError, "of type SWALR: .*policy.*set_iteration"),
    "a sequence that cycles momentum": (
        in_a_sequence,
        ValueError,
        "has a CyclicLR within a SequentialLR.*cycle_momentum=True: give",
    ),
    "a chain": (chained, ValueError, "ChainedScheduler with a CyclicLR: the chain is no product"),
    "one of a chain": (in_a_chain, ValueError, "group 0 has lr=.*at its step 3 .*several sched"),
    "a class": (lambda o: CyclicLR, TypeError, "scheduler must be .*of type type"),
    "our own view": (lambda o: CyclicalOptimizer(o).scheduler, TypeError, "CyclicalScheduler"),
    "one on ours": (on_ours, ValueError, "optimizer is already a CyclicalOptimizer"),
    "another get_lr": (
        lambda o: Doubled(o, 0.1, 1.0, 4),
        TypeError,
        "a Doubled with another get_lr",
    ),
    "another step": (lambda o: EverySecond(o, 0.1, 9), TypeError, "another step than OneCycleLR's"),
    "a patched get_lr": (patched, TypeError, "another get_lr than CyclicLR's"),
    "broken size up": (
        lambda o: CyclicLR(o, 0.1, 1.0, 2.5, 3),
        ValueError,
        "step_size_up=2.5.*whole steps.*step_size_up=2, step_size_down=3.*set_iteration",
    ),
    "broken size down": (lambda o: CyclicLR(o, 0.1, 1.0, 2, 1.5), ValueError, "step_size_down=1.5"),
    "size below 1": (lambda o: CyclicLR(o, 0.1, 1.0, 0.4), ValueError, "=0.4.*step_size_up=1, "),
    "crossed bounds": (
        lambda o: CyclicLR(o, [0.1, 1.0], 0.5, 4),
        ValueError,
        "base_lr=1.0 is above .*=0.5 in .*group 1.*policy",
    ),
    "a div_factor below 1": (
        lambda o: OneCycleLR(o, 0.1, 30, div_factor=0.5),
        ValueError,
        "base_lr=0.2 is above max_lr=0.1",
    ),
    "a negative bound": (
        lambda o: CyclicLR(o, -0.1, 1.0, 4),
        ValueError,
        "base_lr of parameter group 0",
    ),
    "gamma above 1": (
        lambda o: CyclicLR(o, 0.1, 1.0, 4, mode="exp_range", gamma=1.1),
        ValueError,
        "gamma must be .*1.1",
    ),
    "momentum of 1": (
        lambda o: CyclicLR(o, 0.1, 1.0, 4, max_momentum=1.1),
        ValueError,
        r"max_momentum\[0\] must be",
    ),
    "a broken position": (at(1.5), ValueError, "scheduler.last_epoch must be a whole number"),
    "a lr by hand": (written(lr=0.3), ValueError, "group 1 has lr=0.3, .*step 0 .*says 0.01:"),
    "a lr of NaN": (written(lr=math.nan), ValueError, "group 1 has lr=nan"),
    "a momentum by hand": (
        written(momentum=0.3),
        ValueError,
        "group 1 has momentum=0.3, .*says 0.9:",
    ),
    "last rates that differ": (
        with_other_min,
        ValueError,
        "min_lr=.* divided by initial_lr=.* differs between",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    build, error, pattern = REFUSED[name]
    optimizer = make()
    scheduler = build(optimizer)
    before = str(optimizer.param_groups)
    with pytest.raises(error, match=pattern):
        CyclicalOptimizer.from_scheduler(scheduler)
    assert str(optimizer.param_groups) == before


@pytest.mark.parametrize("options", [{"backend": "cuda"}, {"max_grad_norm": -1.0}])
def test_the_constructors_errors_change_nothing(options):
    optimizer = make()
    scheduler = CyclicLR(optimizer, 0.01, 0.1, 4)
    before = str(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"backend='cuda' must|max_grad_norm must"):
        CyclicalOptimizer.from_scheduler(scheduler, **options)
    assert str(optimizer.param_groups) == before
    assert CyclicalOptimizer.from_scheduler(scheduler).iteration == 0


def test_settings_may_follow_schedules_after_a_takeover():
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.4, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 10)
    for _ in range(3):
        sgd.step()
        scheduler.step()
    decays = triangular(4).between(0.0, 0.1)
    opt = CyclicalOptimizer.from_scheduler(scheduler, schedules={"weight_decay": decays})
    assert opt.iteration == 3
    assert sgd.param_groups[0]["weight_decay"] == decays(3)
