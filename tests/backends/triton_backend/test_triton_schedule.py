"""The schedule on the device against the host's, and the position that steps leave there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from exact_formulas import FORMULAS
from native_helpers import BY_NAME, feed, held, like, members, parameters, wrapped
from triton_helpers import (
    INTERPRETED,
    MARKS,
    assert_alike,
    changes,
    choose_triton,
    drawn,
    on_device,
    twins,
)

from clr_optim import schedule
from clr_optim.schedule import Phase, Schedule

pytestmark = MARKS
_backend = pytest.fixture(autouse=True)(choose_triton)


# ---- the schedule


def _windows():
    for window in schedule.WINDOWS:
        own = {"window": window, "step_size_up": 7}
        yield f"triangular-{window}", schedule.triangular(step_size_down=3, **own)
        yield f"triangular2-{window}", schedule.triangular2(**own)
        yield f"exp_range-{window}", schedule.exp_range(gamma=0.999, **own)
        yield f"exp_range_bounds-{window}", schedule.exp_range_bounds(gamma=0.999, **own)
        yield f"one_cycle-{window}", schedule.one_cycle(100, window=window)
        yield (
            f"one-sided-{window}",
            Schedule("x", [Phase(step_size_up=0, step_size_down=5, window=window)]),
        )


SCHEDULES = {
    **dict(_windows()),
    "slow": schedule.triangular(step_size_up=2000, step_size_down=3001),
    "rising-only": Schedule("x", [Phase(step_size_up=6, step_size_down=0)]),
    "warm_restarts": schedule.warm_restarts(10),
    "warm_restarts-2": schedule.warm_restarts(3, period_multiplier=2),
    "warm_restarts-3": schedule.warm_restarts(10, period_multiplier=3, base_lr=0.0, max_lr=0.3),
    "one_cycle-own": schedule.one_cycle(37, pct_start=0.2, base_lr=0.01, max_lr=0.5),
    "decay": schedule.decay(20),
    "decay-own": schedule.decay(20, base_lr=0.0, max_lr=0.1),
    "exp": schedule.exp(gamma=0.999),
    "exp-own": schedule.exp(0.3, gamma=0.9),
    "exp-never-falls": schedule.exp(gamma=1.0),
    "ramp": schedule.ramp(100),
    "ramp-own": schedule.ramp(50, 1e-6, 1.0),
    "ramp-exponential": schedule.ramp(50, 1e-6, 10.0, mode="exponential"),
    "fixed": schedule.fixed(),
    "fixed-own": schedule.fixed(0.25),
    "sequence": schedule.sequence(
        [
            (schedule.triangular2(step_size_up=4, window="hann"), 20),
            (schedule.fixed(0.02), 5),
            (schedule.one_cycle(40, window="welch"), 40),
            (schedule.warm_restarts(4, period_multiplier=2), 50),
            (schedule.exp_range(step_size_up=3, gamma=0.9), None),
        ]
    ),
    "top": Schedule("x", [Phase(step_size_up=3, step_size_down=4, step_size_top=6)]),
    "top-one-sided": Schedule(
        "x",
        [
            Phase(step_size_up=0, step_size_down=4, step_size_top=6, window="hann", steps=30),
            Phase(step_size_up=5, step_size_down=0, step_size_top=3, window="sqrt"),
        ],
    ),
    "exponential-falls": Schedule(
        "x",
        [
            Phase(step_size_down=90, step_size_top=9, steps=297, base_drop=0.01, upper=(1.0, 0.0)),
            Phase(step_size_down=90, steps=50, base_drop=0.5, base_gamma=1.01),
            Phase(step_size_up=7, base_drop=1e-300),
        ],
    ),
    "stairs": Schedule(
        "x",
        [
            Phase(window="boxcar", step_size_down=30, cycle_gamma=0.1, steps=99, lower=(0.0, 0.0)),
            Phase(window="triangle", step_size_down=200, stride=20, steps=195),
            Phase(window="hann", step_size_down=1000, stride=7, gamma=0.9999),
        ],
    ),
    "goes-on": Schedule(
        "x",
        [
            Phase(step_size_up=8, gamma=0.99, cycle_gamma=0.9, base_gamma=0.98, steps=16),
            Phase(
                step_size_up=16,
                gamma=0.99,
                cycle_gamma=0.9,
                base_gamma=0.98,
                first_step=16,
                first_cycle=1,
            ),
        ],
    ),
    "linear": schedule.linear(90, end=0.1),
    "cosine": schedule.cosine(90, end=0.1, max_lr=0.3),
    **{
        f"wsd-{shape}": schedule.wsd(10, 50, 30, shape=shape, end=0.01)
        for shape in ("linear", "cosine", "sqrt", "exp")
    },
    **{
        f"wsd_cycles-{shape}": schedule.wsd_cycles(10, 50, 30, shape=shape, end=0.01)
        for shape in ("linear", "cosine", "sqrt", "exp")
    },
    "wsd_cycles-growing": schedule.wsd_cycles(10, 5, 3, period_multiplier=2),
    "growing": schedule.triangular(7, 3, period_multiplier=10),
    "triangular2-growing": schedule.triangular2(5, period_multiplier=2),
    "exp_range-growing": schedule.exp_range(5, period_multiplier=2, gamma=0.999),
    "exp_range_bounds-growing": schedule.exp_range_bounds(5, period_multiplier=2, gamma=0.999),
    "warm-up": schedule.one_cycle(37).with_warmup(11, start=0.5),
    "warm-up-own": schedule.warm_restarts(10, base_lr=0.1, max_lr=0.3).with_warmup(3),
    "rises-for-ever": Schedule("x", [Phase(window="constant", base_gamma=1.5, steps=10)]),
    "rises-from-0": Schedule(
        "x", [Phase(step_size_up=3, base_gamma=3.0, steps=4, base_lr=0.0, max_lr=1.0)]
    ),
    "ends-beyond-floats": Schedule(
        "x",
        [
            Phase(step_size_up=3, steps=7, base_lr=1e200, max_lr=1e300, lower=(1e200, 1e10)),
            Phase(step_size_up=3, steps=9, base_lr=1e200, max_lr=1e300, upper=(0.0, 1e10)),
            Phase(step_size_up=2, base_lr=1e300, max_lr=1e308, lower=(0.0, 9.0), upper=(1e9, 9.0)),
        ],
    ),
    "own-bounds": Schedule(
        "x",
        [
            Phase(step_size_up=3, steps=1, base_lr=0.1, max_lr=0.2),
            Phase(step_size_up=3, steps=13, base_lr=0.2, max_lr=0.7, base_gamma=1.05),
            Phase(step_size_up=5, steps=9, lower=(0.5, 0.0), upper=(2.0, 0.5), cycle_gamma=0.3),
            Phase(window="constant", steps=4, lower=(0.0, 1.0), cycle_momentum=False),
            Phase(step_size_up=5, base_lr=0.0, max_lr=1.0, gamma=0.99999),
        ],
    ),
}
# A window to a power comes from a logarithm, whose rounding error grows as the rate falls.
POWERS = {
    "inverse_sqrt": schedule.inverse_sqrt(500),
    "inverse_sqrt-timescale": schedule.inverse_sqrt(0, timescale=10_000, max_lr=0.3),
    "inverse": Schedule("x", [Phase(window="inverse", step_size_down=3)]),
    **{
        f"polynomial-{power}": schedule.polynomial(90_000, power)
        for power in (0.3, 0.5, 0.9, 1.0, 2.0, 3.5)
    },
    "polynomial-warm-up": schedule.polynomial(900, 0.9, end=0.1).with_warmup(30),
    "hann-squared": Schedule("x", [Phase(step_size_up=50, window="hann", power=2.0)]),
    "sqrt-cubed": Schedule(
        "x", [Phase(step_size_up=50, window="sqrt", power=3.0, step_size_top=7)]
    ),
}
BOUNDS = (0.001, 0.006, 0.8, 0.95)


def assert_schedule(of, steps, *, further=0.0):
    rates, momenta = on_device(of, steps, BOUNDS)
    expected = of(steps, *BOUNDS[:2]), of.momentum(steps, *BOUNDS[2:])
    # Three float64 ulps, or five with a GPU's exp2. Numbers below atol have fewer than 53 bits.
    tolerance = (7e-16 if INTERPRETED else 1.1e-15) + further
    for found, wanted in zip((rates, momenta), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=1e-300)


@pytest.mark.parametrize("name", POWERS)
def test_windows_to_a_power(name):
    of = POWERS[name]
    steps = [*range(100_001), *(2**n for n in range(17, 41))]
    # The error of |power − 1|·log2(w), where log2(w) has up to five bits before the point.
    assert_schedule(of, steps, further=1e-14)
    # Four ulps of the highest rate: squaring doubles the error of a window.
    rates, _ = on_device(of, steps, BOUNDS)
    expected = of(steps, *BOUNDS[:2])
    assert abs(rates - expected).max() <= 4 * np.spacing(expected.max())


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule(name):
    of = SCHEDULES[name]
    steps = set(range(100_001))
    for start in itertools.accumulate(phase.steps or 0 for phase in of.phases[:-1]):
        for period in {0, 1, 2, of.phases[0].period}:
            steps.update((start - 1 + period, start + period, start + 1 + period))
    generator = np.random.default_rng(4)
    steps.update(int(2**x) for x in generator.uniform(8, 40, 600))
    steps.update(generator.integers(0, 2**40, 300).tolist())
    assert_schedule(of, sorted(step for step in steps if 0 <= step <= 2**40))


@pytest.mark.parametrize("name", [*SCHEDULES, *POWERS])
def test_phase_boundaries(name):
    """Where a phase begins, and where its first cycle turns, host and device differ by one ulp.

    A GPU's exp2 and log2 add their own errors.
    """
    of = {**SCHEDULES, **POWERS}[name]
    starts = [0, *itertools.accumulate(phase.steps for phase in of.phases[:-1])]
    steps = set()
    for start, phase in zip(starts, of.phases, strict=True):
        top = phase.step_size_up + phase.step_size_top
        steps.update(start + turn for turn in (0, phase.step_size_up, top, phase.period))
    steps = sorted(step for step in steps if step < 2**53)
    rates, momenta = on_device(of, steps, BOUNDS)
    for found, wanted in (
        (rates, of(steps, *BOUNDS[:2])),
        (momenta, of.momentum(steps, *BOUNDS[2:])),
    ):
        with np.errstate(over="ignore"):  # no float follows the largest
            ulp = np.spacing(wanted)
        assert (abs(found - wanted) <= (1 if INTERPRETED else 5) * ulp).all()


def test_a_scale_fn_is_not_for_the_device():
    from clr_optim.kernels.triton.schedule import phase_tables

    with pytest.raises(ValueError, match="scale_fn: evaluate it on the host"):
        phase_tables(schedule.triangular(scale_fn=lambda x: 1.0))


# ---- the position


def at_backend(case, backend, **options):
    values = drawn([(5, 3), (7,)], torch.float64)
    return case.ours(parameters(values), backend=backend, **{"step_size_up": 3, **options})


def run_both(ours, twin, steps, seed=0):
    for k in range(steps):
        for p, q in zip(members(ours), members(twin), strict=True):
            p.grad = like(drawn([p.shape], p.dtype, seed + k)[0], p)
            q.grad = p.grad.clone()
        ours.step()
        twin.step()
    assert_alike(ours, twin)
    assert ours.get_last_lr() == twin.get_last_lr()
    assert ours.iteration == twin.iteration


POLICIES = {
    "triangular2": {"policy": "triangular2"},
    "exp_range": {"policy": "exp_range", "gamma": 0.9, "window": "hann"},
    "one_cycle": {"policy": schedule.one_cycle(8)},
    "warm_restarts": {"policy": schedule.warm_restarts(2, period_multiplier=2)},
    "own-bounds": {"policy": SCHEDULES["own-bounds"]},
    "scale_fn-cycle": {"scale_fn": lambda x: 1 / 2 ** (x - 1)},
    "scale_fn-iterations": {"scale_fn": lambda x: 0.9**x, "scale_mode": "iterations"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["sgd-wd", "adam-cycled"])
def test_policies(name, policy):
    options = dict(POLICIES[policy])
    if isinstance(options.get("policy"), Schedule):
        options = {"step_size_up": 2000, **options}  # the constructor's default
    run_both(*(at_backend(BY_NAME[name], b, **options) for b in ("triton", "torch")), 9)


@pytest.mark.parametrize("cycle_momentum", [True, False])
@pytest.mark.parametrize(
    "name", ["sgd-mom", "sgd-nest", "sgd-damp", "adam", "adamw-ams", "rmsprop-mom-cent"]
)
def test_cycled_momentum(name, cycle_momentum):
    options = {"cycle_momentum": cycle_momentum}
    if cycle_momentum:
        options |= {"base_momentum": 0.3, "max_momentum": 0.95}
    run_both(*(at_backend(BY_NAME[name], b, **options) for b in ("triton", "torch")), 8)


@pytest.mark.parametrize("name", ["sgd", "adam", "sgd-mom-cycled"])
def test_a_step_without_any_gradient_advances(name):
    pair = [at_backend(BY_NAME[name], b) for b in ("triton", "torch")]
    for opt in pair:
        opt.step()
    assert pair[0].iteration == 1
    assert not pair[0].state
    run_both(*pair, 2)
    for opt in pair:
        opt.zero_grad()
        opt.step()
        opt.step()
    assert pair[0].iteration == 5
    run_both(*pair, 3)


@pytest.mark.parametrize("name", ["sgd", "adam-cycled", "rmsprop"])
def test_position_and_bounds_changed_in_mid_run(name):
    pair = [at_backend(BY_NAME[name], b) for b in ("triton", "torch")]
    run_both(*pair, 2)
    for position in (7, 0, 2**40 + 1):
        for opt in pair:
            opt.set_iteration(position)
        run_both(*pair, 2)
    for opt in pair:
        opt.set_bounds(base_lr=0.1, max_lr=0.3)
    run_both(*pair, 2)
    assert pair[0].iteration == 2**40 + 5


@pytest.mark.parametrize("edge", [2**24, 2**31, 2**32, 2**53])
@pytest.mark.parametrize("policy", ["triangular", "exp_range", "longer than an int32"])
def test_the_rate_far_along(policy, edge):
    """The kernel's rate at the device's own position: gradients of -1 move a weight by it."""
    of, formula = FORMULAS[policy]
    weight = drawn([(3,)], torch.float64)[0].zero_().requires_grad_()
    weight.grad = -torch.ones_like(weight)
    opt = wrapped(
        torch.optim.SGD([weight], lr=0.006), policy=of, step_size_up=2000,
        base_lr=0.001, max_lr=0.006,
    )  # fmt: skip
    opt.set_iteration(edge - 2)
    for step in range(edge - 2, edge + 2):
        with torch.no_grad():
            weight.zero_()
        opt.step()
        assert weight.tolist() == pytest.approx([formula(step)] * 3, rel=2e-15, abs=0)
        assert opt.iteration == step + 1


@pytest.mark.parametrize("name", ["adam", "adagrad-decay", "rmsprop"])
def test_torchs_own_counter_stalls_where_it_does_in_torch(name):
    """A float32 counter stalls at 2**24, and the cycle goes on."""
    pair = twins(BY_NAME[name], backend="auto")
    pair.run(2)
    for opt in pair.both():
        for p in members(opt):
            opt.state[p]["step"].fill_(2**24 - 2)
    for expected in (-1, 0, 0):
        pair.run(1)
        for opt in pair.both():
            assert {opt.state[p]["step"].item() for p in members(opt)} == {2**24 + expected}
    assert pair.ours.iteration == 5


@pytest.mark.parametrize("setting", ["weight-decay", "betas", "eps", "maximize", "amsgrad-on"])
def test_settings_changed_in_mid_run(setting):
    pair = twins(BY_NAME["adam"], backend="auto")
    pair.run(2)
    before = dict(pair.twin.param_groups[0])
    for _ in range(2):
        for opt in pair.both():
            opt.param_groups[0].update(changes.SETTINGS[setting])
        pair.run(2)
        for opt in pair.both():
            opt.param_groups[0].update({k: before[k] for k in changes.SETTINGS[setting]})
        pair.run(1)


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("name", ["sgd-nest-wd", "adamw", "adam-cycled", "rmsprop-mom-cent"])
def test_a_zero_rate_step_makes_state_and_nothing_else(name, warm):
    """``torch.distributed.checkpoint`` takes such a step before it reads or writes state."""
    pair = twins(BY_NAME[name])
    pair.run(warm)
    before = [p.detach().clone() for p in members(pair.ours)]
    position, rates = pair.ours.iteration, pair.ours.get_last_lr()
    feed(pair.twin, pair.ours)
    for opt in pair.both():
        kept = [group["lr"] for group in opt.param_groups]
        for group in opt.param_groups:
            group["lr"] = 0.0
        for p in members(opt):
            p.grad = torch.zeros_like(p)
        opt.step()
        for group, lr in zip(opt.param_groups, kept, strict=True):
            group["lr"] = lr
    assert (pair.ours.iteration, pair.ours.get_last_lr()) == (position, rates)
    assert_alike(*pair.both())
    if not warm:  # a warm twin's momentum moves by rounding
        assert all(torch.equal(p, v) for p, v in zip(members(pair.ours), before, strict=True))
    assert all(held(pair.ours))
    pair.run(3)
    assert pair.ours.iteration == position + 3
