"""Take over any scheduler of torch whose rate is a function of the step, at any step of its run."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from fractions import Fraction

import pytest
import torch
from cases import BY_NAME, Problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from clr_optim import CyclicalOptimizer

RATES = (0.3, 0.002)

# torch's own, where a chain begins a sequence.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")


def sgd(rates=RATES):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in rates]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def rates_of(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def go(optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.step()
        scheduler.step()


def assert_close(rates, expected, scale=RATES):
    for rate, torchs, top in zip(rates, expected, scale, strict=True):
        # Relative to the bound, since torch's subtraction makes the rates near 0.
        assert rate == pytest.approx(torchs, rel=1e-9, abs=1e-13 * top)


def wave(step):
    return 0.5 + 0.5 * math.cos(0.1 * step) ** 2


def downhill(step):
    return 1.0 - 0.3 * step


def shrink(step):
    return 0.99 if step % 3 else 0.97


class Decay:
    """A function that pickles and compares by identity."""

    def __call__(self, step):
        return 1.0 / (1.0 + step)


def warmed_up(optimizer, then, steps=7):
    warmup = LinearLR(optimizer, 0.05, total_iters=steps)
    return SequentialLR(optimizer, [warmup, then(optimizer)], [steps])


def chain(*makers):
    return lambda o: ChainedScheduler([make(o) for make in makers])


# name: makes a scheduler
SHAPES = {
    "LinearLR up": lambda o: LinearLR(o, 0.1, total_iters=9),
    "LinearLR down": lambda o: LinearLR(o, 1.0, 0.0, total_iters=11),
    "LinearLR level": lambda o: LinearLR(o, 0.5, 0.5, total_iters=11),
    "LinearLR of one step": lambda o: LinearLR(o, 1 / 3, total_iters=1),
    "ConstantLR": lambda o: ConstantLR(o, 0.25, total_iters=6),
    "StepLR": lambda o: StepLR(o, 4, 0.3),
    "StepLR of one step": lambda o: StepLR(o, 1, 0.9),
    "StepLR of gamma 1": lambda o: StepLR(o, 4, 1.0),
    "MultiStepLR": lambda o: MultiStepLR(o, [3, 9, 9, 20], 0.5),
    "MultiStepLR from step 0 on": lambda o: MultiStepLR(o, [0, 5], 0.5),
    "MultiStepLR rising": lambda o: MultiStepLR(o, [3, 9, 12], 2.5),
    "MultiStepLR without any": lambda o: MultiStepLR(o, [], 0.5),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.93),
    "PolynomialLR": lambda o: PolynomialLR(o, 13, power=2.5),
    "PolynomialLR of power 1": lambda o: PolynomialLR(o, 13),
    "PolynomialLR of power 0": lambda o: PolynomialLR(o, 13, power=0.0),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 10),
    "CosineAnnealingLR with eta_min": lambda o: CosineAnnealingLR(o, 7, eta_min=0.001),
    "CosineAnnealingLR of one step": lambda o: CosineAnnealingLR(o, 1, eta_min=0.001),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 6, eta_min=0.0005),
    "CosineAnnealingWarmRestarts longer": lambda o: CosineAnnealingWarmRestarts(o, 3, 2),
    "LambdaLR": lambda o: LambdaLR(o, wave),
    "LambdaLR, one function twice": lambda o: LambdaLR(o, [wave, wave]),
    "LambdaLR below 0": lambda o: LambdaLR(o, downhill),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, shrink),
    "warm-up, CosineAnnealingLR": lambda o: warmed_up(
        o, lambda o: CosineAnnealingLR(o, 20, eta_min=0.001)
    ),
    "warm-up, ExponentialLR": lambda o: warmed_up(o, lambda o: ExponentialLR(o, 0.9)),
    "warm-up, StepLR": lambda o: warmed_up(o, lambda o: StepLR(o, 5, 0.5)),
    "warm-up, MultiStepLR": lambda o: warmed_up(o, lambda o: MultiStepLR(o, [2, 9], 0.5)),
    "warm-up, PolynomialLR": lambda o: warmed_up(o, lambda o: PolynomialLR(o, 9, power=0.5)),
    "warm-up, restarts": lambda o: warmed_up(o, lambda o: CosineAnnealingWarmRestarts(o, 4, 2)),
    "warm-up, LambdaLR": lambda o: warmed_up(o, lambda o: LambdaLR(o, wave)),
    "warm-up, CyclicLR": lambda o: warmed_up(
        o, lambda o: CyclicLR(o, 0.0001, 0.2, 4, 3, mode="triangular2", cycle_momentum=False)
    ),
    "CyclicLR, then a fall": lambda o: SequentialLR(
        o,
        [
            ConstantLR(o, 0.5, total_iters=2),
            CyclicLR(o, 0.01, 0.1, 4, cycle_momentum=False),
            LinearLR(o, 1.0, 0.0, total_iters=9),
        ],
        [3, 19],
    ),
    "three, cut off": lambda o: SequentialLR(
        o,
        [
            ConstantLR(o, 0.5, total_iters=30),
            CosineAnnealingLR(o, 8, eta_min=0.0002),
            CosineAnnealingLR(o, 3, eta_min=0.001),
        ],
        [5, 16],
    ),
    "a sequence that skips one": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=3), StepLR(o, 2), ExponentialLR(o, 0.9)], [4, 4]
    ),
    "a MultiplicativeLR before others": lambda o: SequentialLR(
        o, [MultiplicativeLR(o, shrink), StepLR(o, 4)], [10]
    ),
    "chain of one": chain(lambda o: CosineAnnealingWarmRestarts(o, 4, eta_min=0.001)),
    "chain: ConstantLR, ExponentialLR": chain(
        lambda o: ConstantLR(o, 0.1, total_iters=7), lambda o: ExponentialLR(o, 0.9)
    ),
    "chain: LinearLR, StepLR": chain(
        lambda o: LinearLR(o, 0.1, total_iters=12), lambda o: StepLR(o, 5, 0.5)
    ),
    "chain: LinearLR, MultiStepLR": chain(
        lambda o: MultiStepLR(o, [4, 8, 30], 0.5), lambda o: LinearLR(o, 1.0, 0.2, total_iters=12)
    ),
    "chain: two ExponentialLR and a LinearLR": chain(
        lambda o: ExponentialLR(o, 0.9),
        lambda o: LinearLR(o, 0.1, total_iters=9),
        lambda o: ExponentialLR(o, 0.98),
    ),
    "chain: StepLR, ExponentialLR": chain(
        lambda o: StepLR(o, 3, 0.5), lambda o: ExponentialLR(o, 0.98)
    ),
    "chain: LinearLR, CosineAnnealingLR": chain(
        lambda o: LinearLR(o, 0.1, total_iters=5), lambda o: CosineAnnealingLR(o, 15)
    ),
    "chain: CosineAnnealingLR, ConstantLR": chain(
        lambda o: CosineAnnealingLR(o, 15), lambda o: ConstantLR(o, 0.5, total_iters=15)
    ),
    "chain: two LinearLR": chain(
        lambda o: LinearLR(o, 0.1, total_iters=5), lambda o: LinearLR(o, 1.0, 0.1, total_iters=12)
    ),
    "chain: LinearLR, MultiplicativeLR": chain(
        lambda o: LinearLR(o, 0.1, total_iters=5), lambda o: MultiplicativeLR(o, shrink)
    ),
    "chain: PolynomialLR, LinearLR": chain(
        lambda o: PolynomialLR(o, 14, power=2.0), lambda o: LinearLR(o, 0.1, total_iters=5)
    ),
    "chain: a chain, StepLR": lambda o: ChainedScheduler(
        [
            ChainedScheduler([LinearLR(o, 0.1, total_iters=5), ExponentialLR(o, 0.95)]),
            StepLR(o, 4, 0.9),
        ]
    ),
    "a sequence that begins with a chain": lambda o: SequentialLR(
        o,
        [
            ChainedScheduler([LinearLR(o, 0.1, total_iters=5), StepLR(o, 4, 0.95)]),
            StepLR(o, 3),
        ],
        [9],
    ),
}

#: the names of those whose rates only a function gives
BY_FUNCTION = {
    "LambdaLR",
    "LambdaLR, one function twice",
    "LambdaLR below 0",
    "MultiplicativeLR",
    "warm-up, LambdaLR",
    "a MultiplicativeLR before others",
    "chain: LinearLR, CosineAnnealingLR",
    "chain: two LinearLR",
    "chain: LinearLR, MultiplicativeLR",
    "chain: PolynomialLR, LinearLR",
}


def taken_over(build, position, **options):
    """Return our optimizer, and torch's optimizer and scheduler, all at a step of the run."""
    pairs = []
    for _ in range(2):
        optimizer = sgd()
        scheduler = build(optimizer)
        go(optimizer, scheduler, position)
        pairs.append((optimizer, scheduler))
    return CyclicalOptimizer.from_scheduler(pairs[0][1], **options), *pairs[1]


@pytest.mark.parametrize("position", [0, 1, 4, 7, 12, 40])
@pytest.mark.parametrize("name", SHAPES)
def test_the_rates_go_on(name, position):
    opt, optimizer, scheduler = taken_over(SHAPES[name], position)
    assert opt.iteration == position
    for _ in range(60):
        assert_close(rates_of(opt), rates_of(optimizer))
        assert rates_of(opt) == opt.get_last_lr()
        opt.step()
        go(optimizer, scheduler, 1)
    assert opt.iteration == position + 60
    assert [group["momentum"] for group in opt.param_groups] == [0.9, 0.9]


@pytest.mark.parametrize("name", SHAPES)
def test_a_function_is_the_last_resort(name):
    opt = CyclicalOptimizer.from_scheduler(SHAPES[name](sgd()))
    assert (opt.schedule.scale_fn is not None) == (name in BY_FUNCTION)


@pytest.mark.parametrize("name", SHAPES)
def test_a_run_resumes_pickles_and_copies(name):
    opt, _, _ = taken_over(SHAPES[name], 5)
    for _ in range(9):
        opt.step()
    again = CyclicalOptimizer.from_scheduler(SHAPES[name](sgd()))
    again.load_state_dict(opt.state_dict())
    for other in (again, pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
        assert other.iteration == 14
        assert rates_of(other) == rates_of(opt)
        assert other.lr_at(23) == opt.lr_at(23)


@pytest.mark.parametrize("name", SHAPES)
def test_a_scheduler_restored_in_mid_run(name):
    optimizer = sgd()
    scheduler = SHAPES[name](optimizer)
    go(optimizer, scheduler, 11)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    optimizer = sgd()
    restored = SHAPES[name](optimizer)
    optimizer.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    opt = CyclicalOptimizer.from_scheduler(restored)
    twin = CyclicalOptimizer.from_scheduler(scheduler)
    assert opt.iteration == 11
    assert [opt.lr_at(k) for k in range(50)] == [twin.lr_at(k) for k in range(50)]


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(
    "name", ["warm-up, CosineAnnealingLR", "StepLR", "MultiplicativeLR", "warm-up, CyclicLR"]
)
def test_training_comes_to_the_same_parameters(name, backend):
    runs = []
    for ours in (True, False):
        problem = Problem(BY_NAME["adam"], torch.float64)
        optimizer = BY_NAME["adam"].make(problem.params)
        scheduler = SHAPES[name](optimizer)
        problem.run(optimizer, range(5), after=lambda k, s=scheduler: s.step())
        if ours:
            problem.run(CyclicalOptimizer.from_scheduler(scheduler, backend=backend), range(5, 30))
        else:
            problem.run(optimizer, range(5, 30), after=lambda k, s=scheduler: s.step())
        runs.append(problem.values())
    for mine, torchs in zip(*runs, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-9, atol=1e-10)


LONG = {
    "LinearLR": lambda o: LinearLR(o, 0.001, total_iters=70_000),
    "StepLR": lambda o: StepLR(o, 999, 0.9),
    "MultiStepLR": lambda o: MultiStepLR(o, [10_000, 50_000], 0.1),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.9999),
    "PolynomialLR": lambda o: PolynomialLR(o, 70_000, power=1.7),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 30_000, eta_min=1e-5),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 1000, 3),
}


@pytest.mark.parametrize("name", LONG)
def test_the_closed_forms_over_100_000_steps(name):
    optimizer = sgd()
    scheduler = LONG[name](optimizer)
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    closed = getattr(scheduler, "_get_closed_form_lr", scheduler.get_lr)
    for step in range(0, 100_000, 37):
        scheduler.last_epoch = step
        if name == "CosineAnnealingWarmRestarts":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step(step)
            expected = rates_of(optimizer)
        else:
            expected = closed()
        assert_close(opt.lr_at(step), [float(lr) for lr in expected])


def test_rates_near_0_are_exacter_than_torchs():
    """One step before T_max torch subtracts numbers that are nearly equal."""
    opt = CyclicalOptimizer.from_scheduler(CosineAnnealingLR(sgd(), 1_000_000))
    small = math.pi / 2_000_000
    expected = Fraction(small) ** 2 * (1 - Fraction(small) ** 2 / 3)  # sin², to 1e-23
    for step in (999_999, 1_000_001):
        rates = opt.lr_at(step)
        assert rates == pytest.approx([lr * float(expected) for lr in RATES], rel=1e-12)


def test_the_drift_of_torch_is_no_edit():
    """torch's recursive cosine is wrong by 1e-7 after its first low."""
    optimizer = sgd()
    scheduler = CosineAnnealingLR(optimizer, 20_000)
    go(optimizer, scheduler, 30_000)
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    expected = [lr * math.cos(math.pi * 30_000 / 40_000) ** 2 for lr in RATES]
    assert opt.get_last_lr() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["ExponentialLR", "CosineAnnealingLR", "warm-up, StepLR"])
def test_rates_in_tensors(name):
    optimizer = sgd()
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
    scheduler = SHAPES[name](optimizer)
    go(optimizer, scheduler, 6)
    opt = CyclicalOptimizer.from_scheduler(scheduler)
    expected, _, _ = taken_over(SHAPES[name], 6)
    for _ in range(20):
        assert rates_of(opt) == pytest.approx(rates_of(expected), rel=1e-6)
        opt.step()
        expected.step()


# ---- a scheduler that is stepped once per epoch

PER_EPOCH = [
    "LinearLR up", "LinearLR down", "ConstantLR", "StepLR", "MultiStepLR", "ExponentialLR",
    "PolynomialLR", "CosineAnnealingLR with eta_min", "CosineAnnealingWarmRestarts longer",
    "LambdaLR", "MultiplicativeLR", "warm-up, CosineAnnealingLR", "warm-up, ExponentialLR",
    "chain: LinearLR, StepLR", "chain: two ExponentialLR and a LinearLR", "chain: two LinearLR",
]  # fmt: skip


@pytest.mark.parametrize("epochs", [0, 3])
@pytest.mark.parametrize("name", PER_EPOCH)
def test_once_per_epoch(name, epochs):
    per_epoch = 5
    opt, optimizer, scheduler = taken_over(SHAPES[name], epochs, steps_per_epoch=per_epoch)
    assert opt.iteration == epochs * per_epoch
    for _ in range(25):
        for _ in range(per_epoch):
            assert_close(rates_of(opt), rates_of(optimizer))
            opt.step()
            optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "build",
    [
        lambda o: CyclicLR(o, 0.01, 0.1, 4, 2, mode="exp_range", gamma=0.9, cycle_momentum=False),
        lambda o: CyclicLR(o, 0.01, 0.1, 4, scale_fn=Decay(), cycle_momentum=True),
        lambda o: CyclicLR(
            o, 0.01, 0.1, 4, scale_fn=Decay(), scale_mode="iterations", cycle_momentum=False
        ),
        lambda o: OneCycleLR(o, 0.1, total_steps=20),
        lambda o: OneCycleLR(o, 0.1, total_steps=21),
    ],
)
def test_a_cyclic_scheduler_once_per_epoch(build):
    opt, optimizer, scheduler = taken_over(build, 2, steps_per_epoch=3)
    for _ in range(17):
        for _ in range(3):
            for mine, torchs in zip(opt.param_groups, optimizer.param_groups, strict=True):
                assert mine["lr"] == pytest.approx(torchs["lr"], rel=1e-9)
                assert mine["momentum"] == pytest.approx(torchs["momentum"], rel=1e-9)
            opt.step()
            optimizer.step()
        scheduler.step()
    if isinstance(scheduler, OneCycleLR) and opt.schedule.scale_fn is None:
        assert [k for k in range(1, 99) if opt.schedule.is_cycle_end(k)] == [60]


def test_the_cycles_of_a_cosine_end_at_its_lows():
    opt = CyclicalOptimizer.from_scheduler(CosineAnnealingLR(sgd(), 10))
    assert [k for k in range(1, 60) if opt.schedule.is_cycle_end(k)] == [10, 30, 50]
    opt = CyclicalOptimizer.from_scheduler(SHAPES["warm-up, restarts"](sgd()))
    assert [k for k in range(1, 60) if opt.schedule.is_cycle_end(k)] == [11, 19, 35]
    assert opt.policy == "SequentialLR"


def of_transformers(function):
    """Give a function the name and the module of one in transformers."""
    function.__name__ = "_get_linear_schedule_with_warmup_lr_lambda"
    function.__module__ = "transformers.optimization"
    return functools.partial(function, num_warmup_steps=5, num_training_steps=20)


def test_a_function_of_transformers_counts_only_if_it_has_the_known_rates():
    def linear(step, *, num_warmup_steps, num_training_steps):
        if step < num_warmup_steps:
            return step / num_warmup_steps
        left = num_training_steps - num_warmup_steps
        return max(0.0, (num_training_steps - step) / left)

    def of_another_version(step, *, num_warmup_steps, num_training_steps):
        return linear(step + 1, num_warmup_steps=5, num_training_steps=num_training_steps)

    for function, is_known in ((linear, True), (of_another_version, False)):
        function = of_transformers(function)
        opt = CyclicalOptimizer.from_scheduler(LambdaLR(sgd(), function))
        assert (opt.schedule.scale_fn is None) == is_known
        for step in (0, 1, 4, 5, 6, 19, 20, 1000):
            expected = [lr * function(step) for lr in RATES]
            assert opt.lr_at(step) == pytest.approx(expected, rel=1e-12, abs=1e-15)


# ---- random products


FACTORS = st.one_of(
    st.builds(
        lambda a, b, n: lambda o: LinearLR(o, a, b, total_iters=n),
        st.sampled_from([0.1, 0.5, 1.0]),
        st.sampled_from([0.2, 1.0]),
        st.integers(1, 20),
    ),
    st.builds(
        lambda a, n: lambda o: ConstantLR(o, a, total_iters=n),
        st.sampled_from([0.1, 0.5]),
        st.integers(1, 20),
    ),
    st.builds(
        lambda n, g: lambda o: StepLR(o, n, g), st.integers(1, 9), st.sampled_from([0.5, 0.9])
    ),
    st.builds(
        lambda m, g: lambda o: MultiStepLR(o, m, g),
        st.lists(st.integers(1, 30), max_size=4),
        st.sampled_from([0.5, 1.5]),
    ),
    st.builds(lambda g: lambda o: ExponentialLR(o, g), st.sampled_from([0.8, 0.99])),
    st.builds(
        lambda n, p: lambda o: PolynomialLR(o, n, power=p),
        st.integers(1, 40),
        st.sampled_from([0.5, 1.0, 2.0]),
    ),
)


@settings(max_examples=300)
@given(factors=st.lists(FACTORS, min_size=2, max_size=4), position=st.integers(0, 40))
def test_a_chain_is_a_product(factors, position):
    opt, optimizer, scheduler = taken_over(chain(*factors), position)
    for _ in range(45):
        assert_close(rates_of(opt), rates_of(optimizer))
        opt.step()
        go(optimizer, scheduler, 1)


# ---- what is refused


def edited(optimizer):
    scheduler = ExponentialLR(optimizer, 0.9)
    go(optimizer, scheduler, 3)
    optimizer.param_groups[1]["lr"] *= 0.5
    return scheduler


def with_a_new_group(optimizer):
    scheduler = StepLR(optimizer, 3)
    optimizer.add_param_group({"params": [torch.ones(1)]})
    return scheduler


def behind(optimizer):
    scheduler = warmed_up(optimizer, lambda o: StepLR(o, 5))
    go(optimizer, scheduler, 9)
    scheduler._schedulers[1].last_epoch = 4
    return scheduler


def stepped_apart(optimizer):
    scheduler = chain(lambda o: ExponentialLR(o, 0.9), lambda o: StepLR(o, 9))(optimizer)
    go(optimizer, scheduler._schedulers[0], 2)
    return scheduler


def by_fractions(optimizer):
    scheduler = CosineAnnealingWarmRestarts(optimizer, 4, 2)
    scheduler.step(5.5)
    return scheduler


class Halved(StepLR):
    def get_lr(self):
        return [lr / 2 for lr in super().get_lr()]


# name: (makes the scheduler, error, pattern)
REFUSED = {
    "ReduceLROnPlateau": (
        ReduceLROnPlateau,
        TypeError,
        r"is a ReduceLROnPlateau, whose rates depend on the loss.*set_bounds\(max_lr",
    ),
    "other rates": (
        lambda o: Halved(o, 3),
        TypeError,
        "a Halved with another get_lr",
    ),
    "functions that differ": (
        lambda o: LambdaLR(o, [wave, Decay()]),
        ValueError,
        "LambdaLR has another function for parameter group 1 .*Decay.* than for group 0 .*wave",
    ),
    "products that differ": (
        lambda o: MultiplicativeLR(o, [wave, shrink]),
        ValueError,
        "MultiplicativeLR has another function for parameter group 1",
    ),
    "gamma above 1": (
        lambda o: ExponentialLR(o, 1.1),
        ValueError,
        r"gamma of ExponentialLR is 1\.1: the rate grows without end",
    ),
    "stairs of gamma above 1": (
        lambda o: StepLR(o, 3, gamma=2.0),
        ValueError,
        r"gamma of StepLR is 2\.0: the rate grows without end",
    ),
    "gamma 0": (lambda o: StepLR(o, 3, gamma=0.0), ValueError, "gamma of StepLR must be .* > 0"),
    "T_max between steps": (
        lambda o: CosineAnnealingLR(o, 2.5),
        ValueError,
        r"T_max of CosineAnnealingLR must be a whole number of steps, got 2\.5",
    ),
    "no step at all": (
        lambda o: LinearLR(o, total_iters=0),
        ValueError,
        "total_iters of LinearLR must be an integer >= 1, got 0",
    ),
    "eta_min above the lr": (
        lambda o: CosineAnnealingLR(o, 5, eta_min=0.01),
        ValueError,
        r"eta_min=0\.01 above the initial lr 0\.002 of parameter group 1",
    ),
    "fractions of epochs": (
        by_fractions,
        ValueError,
        r"T_cur=1\.5 and T_i=8 .*step\(epoch \+ i / iters\).*warm_restarts\(4 \* iters",
    ),
    "a chain with a LambdaLR": (
        chain(lambda o: LambdaLR(o, wave), lambda o: ExponentialLR(o, 0.9)),
        ValueError,
        "a ChainedScheduler with a LambdaLR: the chain is no product",
    ),
    "a chain with restarts": (
        chain(lambda o: ExponentialLR(o, 0.9), lambda o: CosineAnnealingWarmRestarts(o, 4)),
        ValueError,
        "a ChainedScheduler with a CosineAnnealingWarmRestarts: the chain is no product",
    ),
    "a chain with eta_min": (
        chain(
            lambda o: ConstantLR(o, 0.5, total_iters=2),
            lambda o: CosineAnnealingLR(o, 4, eta_min=0.001),
        ),
        ValueError,
        "a CosineAnnealingLR, an eta_min other than 0: the chain is no product",
    ),
    "a chain with a cosine and no end": (
        chain(lambda o: ExponentialLR(o, 0.9), lambda o: CosineAnnealingLR(o, 4)),
        ValueError,
        "T_max=4, and the other schedulers still change the rate then",
    ),
    "a chain of two cosines": (
        chain(lambda o: CosineAnnealingLR(o, 4), lambda o: CosineAnnealingLR(o, 8)),
        ValueError,
        "several CosineAnnealingLR",
    ),
    "a product after another scheduler": (
        lambda o: warmed_up(o, lambda o: MultiplicativeLR(o, shrink)),
        ValueError,
        "a MultiplicativeLR after another scheduler",
    ),
    "milestones out of order": (
        lambda o: SequentialLR(o, [StepLR(o, 3), StepLR(o, 4), StepLR(o, 5)], [9, 5]),
        ValueError,
        r"milestones \[9, 5\], which must rise",
    ),
    "one of a sequence restored": (
        behind,
        ValueError,
        "at its step 9, where its StepLR 1 should be at 2 and is at 4: load all",
    ),
    "a OneCycleLR in a sequence": (
        lambda o: warmed_up(o, lambda o: OneCycleLR(o, 0.1, total_steps=20)),
        TypeError,
        r"a OneCycleLR within a SequentialLR.*sequence\(",
    ),
    "bounds that differ in a sequence": (
        lambda o: warmed_up(o, lambda o: CyclicLR(o, 0.01, [0.1, 0.2], 4, cycle_momentum=False)),
        ValueError,
        r"a CyclicLR within a SequentialLR, with bounds .*give all groups the same",
    ),
    "a sequence of CyclicLR alone": (
        lambda o: SequentialLR(
            o, [CyclicLR(o, 0.01, 0.1, n, cycle_momentum=False) for n in (3, 4)], [6]
        ),
        ValueError,
        r"made of CyclicLR or OneCycleLR alone: .*sequence\(",
    ),
    "a chain stepped apart": (
        stepped_apart,
        ValueError,
        r"schedulers of its chain have taken \[2, 0\] steps",
    ),
    "a rate by hand": (
        edited,
        ValueError,
        r"group 1 has lr=0\.000729, and at its step 3 the scheduler says 0\.001458",
    ),
    "a group that was added later": (
        with_a_new_group,
        ValueError,
        r"base_lrs=\[0\.3, 0\.002\] for 3 parameter groups: append",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    build, error, pattern = REFUSED[name]
    optimizer = sgd()
    scheduler = build(optimizer)
    before = str(optimizer.param_groups)
    with pytest.raises(error, match=pattern):
        CyclicalOptimizer.from_scheduler(scheduler)
    assert str(optimizer.param_groups) == before


@pytest.mark.parametrize(
    ("steps", "error"), [(0, ValueError), (2.5, ValueError), ("two", TypeError)]
)
def test_steps_per_epoch_is_a_number_of_steps(steps, error):
    with pytest.raises(error, match="steps_per_epoch must be"):
        CyclicalOptimizer.from_scheduler(StepLR(sgd(), 3), steps_per_epoch=steps)
