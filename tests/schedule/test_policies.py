"""Compare each policy with its formula, written here, and with the schedulers of torch."""

from __future__ import annotations

import importlib.util
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from torch.optim import lr_scheduler

from clr_optim import CyclicalOptimizer, cli, plotting
from clr_optim.schedule import (
    POLICIES,
    WINDOWS,
    Phase,
    Schedule,
    cosine,
    decay,
    exp,
    exp_range,
    exp_range_bounds,
    fixed,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
    ramp,
    triangular,
    triangular2,
    warm_restarts,
    wsd,
    wsd_cycles,
)
from clr_optim.schedule.registry import policy

STEPS = 100_000
LR = 0.3
TIME = np.arange(STEPS)


def falls(steps, of_progress, end):
    """Return max_lr·(end + (1 − end)·f(p)) for the progress p of a fall, which stays at its end."""
    p = np.minimum(TIME / steps, 1.0)
    return LR * (end + (1 - end) * of_progress(p))


def warms_up(steps, then):
    """Return a rise from 0 in a straight line, and then ``then``, which counts from there."""
    return np.concatenate([then[0] * TIME[:steps] / steps, then])[:STEPS]


def to_cosine(p):
    return (1 + np.cos(np.pi * p)) / 2


# The formulas of transformers' get_{linear,cosine,polynomial_decay,inverse_sqrt,wsd}_schedule.
CURVES = {
    "linear": (linear(70_000, end=0.1), falls(70_000, lambda p: 1 - p, 0.1)),
    "cosine": (cosine(70_000, end=0.1), falls(70_000, to_cosine, 0.1)),
    "polynomial": (polynomial(70_000, 0.9, end=0.1), falls(70_000, lambda p: (1 - p) ** 0.9, 0.1)),
    "polynomial to 0": (polynomial(99_999, 3), falls(99_999, lambda p: (1 - p) ** 3, 0.0)),
    "inverse_sqrt": (
        inverse_sqrt(4_000),
        LR * np.minimum(TIME / 4_000, np.sqrt(4_000 / np.maximum(TIME, 1))),
    ),
    "inverse_sqrt with a timescale": (
        inverse_sqrt(700, timescale=10_000),
        warms_up(700, LR / np.sqrt((TIME + 10_000) / 10_000)),
    ),
    "constant with warm-up": (fixed().with_warmup(999), LR * np.minimum(TIME / 999, 1.0)),
    "cosine with warm-up": (
        cosine(50_000).with_warmup(3_000),
        warms_up(3_000, falls(50_000, to_cosine, 0.0)),
    ),
    "warm-up from a quarter": (
        linear(9_000).with_warmup(1_000, start=0.25),
        np.concatenate(
            [LR * (0.25 + 0.75 * TIME[:1_000] / 1_000), falls(9_000, lambda p: 1 - p, 0.0)]
        )[:STEPS],
    ),
}
DECAYS = {
    "linear": lambda p, end: end + (1 - end) * (1 - p),
    "cosine": lambda p, end: end + (1 - end) * to_cosine(p),
    "sqrt": lambda p, end: end + (1 - end) * (1 - np.sqrt(p)),
    "exp": lambda p, end: end**p,
}
for shape, of_progress in DECAYS.items():
    for end in (0.02, 1.0) if shape == "exp" else (0.0, 0.02):
        p = np.clip((TIME - 60_000) / 9_000, 0.0, 1.0)
        CURVES[f"wsd {shape} to {end}"] = (
            wsd(5_000, 60_000, 9_000, shape=shape, end=end),
            warms_up(5_000, LR * of_progress(p, end)),
        )
        p = np.clip((TIME % 700 - 300) / 400, 0.0, 1.0)
        CURVES[f"wsd_cycles {shape} to {end}"] = (
            wsd_cycles(50, 300, 400, shape=shape, end=end),
            warms_up(50, LR * of_progress(p, end)),
        )


@pytest.mark.parametrize("name", CURVES)
def test_the_formula_over_100_000_steps(name):
    schedule, expected = CURVES[name]
    found = schedule(TIME, LR / 4, LR)  # the lower bound has no effect
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15 * LR)
    # The peak is exact up to the rounding of low + (high - low), and the last rate stays.
    assert abs(found.max() - LR) <= np.spacing(LR)
    if schedule.phases[-1].window == "constant":
        over = sum(phase.steps for phase in schedule.phases[:-1])
        assert (found[over:] == LR * schedule.phases[-1].lower[1]).all()
    # Momentum mirrors the course from the highest rate to the last.
    if name.startswith(("linear", "cosine", "wsd linear", "wsd cosine", "wsd sqrt")):
        end = float(schedule.phases[-1].lower[1])
        falling = slice(int(np.argmax(found)), None)
        momenta = schedule.momentum(TIME, 0.5, 0.9)
        mirrored = 0.9 - 0.4 * (found / LR - end) / (1 - end)
        np.testing.assert_allclose(momenta[falling], mirrored[falling], rtol=1e-12)


@given(
    step=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(1, 9_999), st.integers(0, 9_999), st.integers(1, 9_999)),
    end=st.sampled_from([0.0, 0.125, 0.5, 1.0]),
)
def test_straight_lines_in_exact_fractions(step, sizes, end):
    warmup, stable, falling = sizes
    step %= 2 * sum(sizes)
    p = min(max(Fraction(step - warmup - stable, falling), Fraction(0)), Fraction(1))
    exact = 1 - (1 - Fraction(end)) * p
    if step < warmup:
        exact = Fraction(step, warmup)
    found = wsd(warmup, stable, falling, end=end)(step, 0.0, 1.0)
    assert abs(Fraction(found) - exact) <= Fraction(4e-16) * exact
    p = min(Fraction(step, falling), Fraction(1))
    exact = 1 - (1 - Fraction(end)) * p
    assert abs(Fraction(linear(falling, end=end)(step)) - exact) <= Fraction(4e-16) * exact


# ---- torch's schedulers


def torchs_rates(make, steps=STEPS):
    """Return the rates of a scheduler of torch, over many steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    scheduler = make(optimizer)
    optimizer._opt_called = True
    rates = np.empty(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(steps):
            rates[k] = optimizer.param_groups[0]["lr"]
            scheduler.step()
    return rates


def warmup_and_cosine(optimizer):
    return lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3_000),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=97_000, eta_min=0.1 * LR),
        ],
        milestones=[3_000],
    )


# Ours, torch's, and the steps over which both are defined. Torch's recursive forms drift.
TORCHS = {
    "LinearLR": (
        linear(60_000, end=0.1),
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=60_000),
        STEPS,
    ),
    "CosineAnnealingLR": (
        cosine(90_000, end=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 90_000, eta_min=0.1 * LR),
        90_001,
    ),
    "PolynomialLR": (
        polynomial(90_000, 0.9),
        lambda o: lr_scheduler.PolynomialLR(o, 90_000, power=0.9),
        89_000,
    ),
    "ExponentialLR": (exp(gamma=0.9999), lambda o: lr_scheduler.ExponentialLR(o, 0.9999), STEPS),
    "CosineAnnealingWarmRestarts": (
        warm_restarts(1_000, period_multiplier=2, base_lr=0.01, max_lr=LR),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 1_000, T_mult=2, eta_min=0.01),
        STEPS,
    ),
    "LinearLR, then CosineAnnealingLR": (
        cosine(97_000, end=0.1).with_warmup(3_000, start=0.25),
        warmup_and_cosine,
        STEPS,
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_the_rates_are_torchs(name):
    schedule, make, steps = TORCHS[name]
    found = schedule(np.arange(steps), 0.01, LR)
    np.testing.assert_allclose(found, torchs_rates(make, steps), rtol=1e-9, atol=1e-12 * LR)


# ---- cycles that grow


def grown(step, first, multiplier):
    """Return the number of a step's cycle, its start and its length, by counting."""
    start, length, cycle = 0, first, 0
    while step >= start + length:
        start, length, cycle = start + length, length * multiplier, cycle + 1
    return cycle, start, length


@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("make", "amplitude", "floor"),
    [
        (triangular, lambda cycle, step: 1.0, lambda step: 1.0),
        (triangular2, lambda cycle, step: 0.5**cycle, lambda step: 1.0),
        (exp_range, lambda cycle, step: 0.99994**step, lambda step: 1.0),
        (exp_range_bounds, lambda cycle, step: 0.99994**step, lambda step: 0.99994**step),
    ],
)
def test_growing_cycles(make, amplitude, floor, window, multiplier):
    schedule = make(30, 50, window=window, period_multiplier=multiplier)
    for step in [*range(2_000), 9_999, 10_000, 54_321, 99_999]:
        cycle, start, length = grown(step, 80, multiplier)
        scale, offset = length // 80, step - start
        x = Fraction(offset, 30 * scale)
        if offset >= 30 * scale:
            x = Fraction(length - offset, 50 * scale)
        w = {
            "triangle": float(x),
            "welch": float(1 - (1 - x) ** 2),
            "hann": (1 - math.cos(math.pi * x)) / 2,
            "sqrt": 1 - math.sqrt(1 - x),
        }[window]
        a = amplitude(cycle, step)
        expected = floor(step) * 0.1 + 0.2 * a * w
        assert schedule(step, 0.1, 0.3) == pytest.approx(expected, rel=1e-11)
        assert schedule.momentum(step, 0.8, 0.9) == pytest.approx(0.9 - 0.1 * a * w, rel=1e-11)
        assert schedule.cycle(step) == pytest.approx(cycle + (step - start) / length)
        assert schedule.steps_to_cycle_end(step) == start + length - step
        assert schedule.is_cycle_end(step) == (step == start > 0)


@pytest.mark.parametrize("mode", ["cycle", "iterations"])
def test_a_scale_fn_counts_on_through_growing_cycles(mode):
    schedule = triangular(1, scale_fn=lambda x: 1 / (x + 1), scale_mode=mode, period_multiplier=2)
    for step in range(500):
        cycle, start, length = grown(step, 2, 2)
        x = 1 - abs(2 * (step - start) / length - 1)
        scale = 1 / (cycle + 2) if mode == "cycle" else 1 / (step + 1)
        assert schedule(step) == pytest.approx(scale * x, rel=1e-14)


def test_growing_wsd_cycles_grow_in_both_parts():
    schedule = wsd_cycles(5, 6, 2, period_multiplier=2)
    peaks = [step for step in range(61) if schedule(step) == 1.0]
    assert peaks == [*range(5, 12), *range(13, 26), *range(29, 54)]
    assert [step for step in range(61) if schedule.is_cycle_end(step)] == [13, 29, 61][:2]


@pytest.mark.parametrize("multiplier", [2, 3, 10, 1000, 10**9])
def test_growing_cycles_are_few_and_fit_an_int64(multiplier):
    schedule = exp_range(7, 6, period_multiplier=multiplier)
    assert len(schedule.phases) <= 62
    for phase in schedule.phases:
        assert phase.first_step + phase.period < 2**64
        assert phase.period < 2**63
    assert schedule.phases[-1].steps is None


def test_a_multiplier_of_1_is_stored_as_before():
    assert triangular2(3, period_multiplier=1).to_json() == (
        '{"format":1,"name":"triangular2","phases":'
        '[{"cycle_gamma":0.5,"step_size_down":3,"step_size_up":3}]}'
    )
    assert (
        warm_restarts(3, period_multiplier=2)
        .to_json()
        .startswith(
            '{"format":1,"name":"warm_restarts","phases":'
            '[{"step_size_down":3,"steps":3,"window":"hann"},'
            '{"step_size_down":6,"steps":6,"window":"hann"},'
        )
    )


# ---- bounds and warm-up


def test_policies_of_a_peak_ignore_the_lower_bound():
    for schedule in (linear(9), cosine(9), polynomial(9, 2), wsd(1, 3, 5), inverse_sqrt(4)):
        for step in range(20):
            rates = schedule.rates(step, [(0.0, 1.0), (0.25, 1.0), (1.0, 1.0)])
            assert rates[0] == rates[1] == rates[2]
        assert not schedule.has_bounds


def test_between_gives_bounds_to_every_phase():
    for make in (
        linear(9, end=0.25), cosine(9), polynomial(9, 2), wsd(2, 3, 5, end=0.5), inverse_sqrt(4),
        triangular2(3).with_warmup(4, start=0.5), wsd_cycles(1, 2, 3), decay(5), ramp(5),
    ):  # fmt: skip
        course = make(range(40), 0.0, 1.0)
        bounded = make.between(0.25, 1.25)
        assert bounded.has_bounds
        np.testing.assert_allclose(bounded(range(40), 7.0, 9.0), 0.25 + course, rtol=1e-15)
        assert bounded.momentum(range(40)).tolist() == make.momentum(range(40)).tolist()
    schedule = wsd(2, 3, 5, end=0.5).between(0.0, 0.4)
    assert (
        schedule(range(12), 7.0, 9.0).tolist()
        == wsd(2, 3, 5, end=0.5)(range(12), 0.0, 0.4).tolist()
    )
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert one_cycle(20).between(0.0, 1.0).steps_to_cycle_end(0) == 20
    assert one_cycle(20).between(0.1, 0.4)(range(30)).tolist() == (
        one_cycle(20, base_lr=0.1, max_lr=0.4)(range(30)).tolist()
    )
    falls = [exp(), wsd(1, 2, 3, shape="exp", end=0.1)]
    assert [schedule.between(0.0, 0.5)(1) for schedule in falls] == [0.5 * 0.99994, 0.5]
    for schedule in falls:
        with pytest.raises(ValueError, match=r"low=0\.1 has no effect on an exponential fall"):
            schedule.between(0.1, 0.5)
    with pytest.raises(ValueError, match=r"between\(0.0, 0.1\): the schedule 'fixed' has bounds"):
        fixed(0.1).between(0.0, 0.1)
    with pytest.raises(ValueError, match=r"low=0\.2 is above high=0.1: swap the two"):
        fixed().between(0.2, 0.1)
    with pytest.raises(ValueError, match="low must be a finite number >= 0, got -1"):
        fixed().between(-1, 0.1)


def test_a_warm_up_reaches_the_first_rate_in_a_straight_line():
    for schedule in (triangular(3), triangular(0, 4), fixed(), exp(gamma=0.5), one_cycle(9)):
        warm = schedule.with_warmup(8, start=0.5)
        first = schedule(0, 1.0, 3.0)
        line = [1.5 + (first - 1.5) * k / 8 for k in range(8)]
        assert warm(range(8), 1.0, 3.0).tolist() == pytest.approx(line, rel=1e-15)
        assert warm(range(8, 40), 1.0, 3.0).tolist() == schedule(range(32), 1.0, 3.0).tolist()
        assert warm.momentum(range(8, 40)).tolist() == schedule.momentum(range(32)).tolist()
        jump = abs(warm.momentum(8) - warm.momentum(7))
        assert jump <= 0.1 / 8 + 1e-15
    with_own = fixed(0.2).with_warmup(4)
    assert with_own(range(6), 5.0, 9.0).tolist() == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2])


def test_warm_ups_nest_and_scale_functions_count():
    twice = fixed().with_warmup(4).with_warmup(2, start=1.0)
    assert twice(range(8)).tolist() == [1.0, 0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    half = triangular(0, 4, scale_fn=lambda cycle: 0.5).with_warmup(2)
    assert half(range(6), 0.0, 1.0).tolist() == [0.0, 0.25, 0.5, 0.375, 0.25, 0.125]
    with pytest.raises(ValueError, match=r"scale_fn of 'triangular' returns 2\.0"):
        triangular(0, 4, scale_fn=lambda cycle: 2.0).with_warmup(2)
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        fixed().with_warmup(0)
    with pytest.raises(ValueError, match="start must be a finite number >= 0, got -1"):
        fixed().with_warmup(5, start=-1)


def test_one_cycle_begins_at_a_part_of_the_peak():
    schedule = one_cycle(100, div_factor=25)
    assert schedule(0, 0.09, 0.1) == 0.1 / 25
    assert schedule(45, 0.09, 0.1) == 0.1
    assert schedule(99, 0.09, 0.1) == pytest.approx(0.1 / 25 / 1e4, rel=1e-14)
    own = one_cycle(100, max_lr=0.1, div_factor=25)
    assert own(range(120), 3.0, 5.0).tolist() == schedule(range(120), 0.09, 0.1).tolist()


# ---- wrong arguments, and those of torch's schedulers

ADAM = torch.optim.Adam([torch.zeros(1)])
WRONG = {
    "rate first": (
        lambda: one_cycle(0.1, total_steps=90), TypeError,
        "one_cycle: multiple values for argument 'total_steps'; the first argument is total_steps; "
        "give a rate by its name, as max_lr",
    ),
    "rate first, then the steps": (
        lambda: one_cycle(0.1, 90), TypeError, "too many positional .* give a rate by its name",
    ),
    "rate alone": (lambda: one_cycle(0.1), ValueError, "total_steps must be a whole number of"),
    "max_lr alone": (
        lambda: one_cycle(90, max_lr=0.1), ValueError, "give base_lr too, or div_factor=25",
    ),
    "both first rates": (
        lambda: one_cycle(90, base_lr=0.1, max_lr=1.0, div_factor=9), ValueError,
        "leave one of them out",
    ),
    "epochs": (
        lambda: one_cycle(max_lr=1, epochs=3, steps_per_epoch=9), TypeError,
        "epochs: give total_steps, the epochs times the steps per epoch",
    ),
    "anneal_strategy": (
        lambda: one_cycle(90, anneal_strategy="cos"), TypeError, "anneal_strategy is called window",
    ),
    "momentum": (
        lambda: one_cycle(90, max_momentum=0.9), TypeError,
        "give max_momentum to CyclicalOptimizer",
    ),
    "optimizer first": (
        lambda: cosine(ADAM, T_max=90), TypeError,
        r"T_max.*wrap that by CyclicalOptimizer\(optimizer, cosine\(...\)\); the argument T_max is "
        "called steps",
    ),
    "optimizer alone": (lambda: cosine(ADAM), TypeError, "argument is a Adam, and a schedule"),
    "T_mult": (
        lambda: warm_restarts(9, T_mult=2, eta_min=0.0), TypeError,
        "T_mult is called period_multiplier here; the argument eta_min is called base_lr here",
    ),
    "transformers' names": (
        lambda: wsd(num_warmup_steps=1, num_stable_steps=2, num_decay_steps=3), TypeError,
        "num_warmup_steps is called warmup here; .* num_stable_steps is called stable",
    ),
    "num_warmup_steps": (
        lambda: cosine(90, num_warmup_steps=9), TypeError, r"call .with_warmup\(steps\) of the",
    ),
    "unknown": (lambda: linear(90, slope=1), TypeError, "the arguments are steps, end, max_lr"),
    "shape": (lambda: wsd(1, 2, 3, shape="cos"), ValueError, "shape must be one of 'linear', 'cos"),
    "exp to 0": (lambda: wsd(1, 2, 3, shape="exp"), ValueError, "exponential fall never reaches"),
    "decay": (lambda: wsd(1, 2, 0), ValueError, "decay must be an integer >= 1, got 0"),
    "stable": (lambda: wsd(1, -2, 3), ValueError, "stable must be an integer >= 0, got -2"),
    "warmup": (lambda: wsd(-1, 2, 3), ValueError, "warmup must be an integer >= 0, got -1"),
    "end": (lambda: cosine(9, end=2), ValueError, "end must be a finite number >= 0 and <= 1"),
    "power": (lambda: polynomial(9, 0), ValueError, "power must be a finite number > 0, got 0"),
    "no timescale": (lambda: inverse_sqrt(0), ValueError, "warmup=0 and timescale=None"),
    "multiplier": (
        lambda: triangular(2, period_multiplier=0), ValueError,
        "period_multiplier must be an integer >= 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


# ---- one registry


def test_every_schedule_that_goes_by_name():
    made = {
        "fixed": fixed(), "decay": decay(9), "exp": exp(), "ramp": ramp(9), "linear": linear(9),
        "cosine": cosine(9), "polynomial": polynomial(9), "inverse_sqrt": inverse_sqrt(9),
        "wsd": wsd(1, 2, 3), "one_cycle": one_cycle(9), "triangular": triangular(),
        "triangular2": triangular2(), "exp_range": exp_range(), "warm_restarts": warm_restarts(9),
        "exp_range_bounds": exp_range_bounds(), "wsd_cycles": wsd_cycles(1, 2, 3),
    }  # fmt: skip
    assert made.keys() == POLICIES.keys()
    assert [schedule.name for schedule in made.values()] == list(made)


def load_gallery():
    spec = importlib.util.spec_from_file_location("draw_gallery", ROOT / "docs/draw_gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_show_the_registry():
    gallery = load_gallery()
    assert gallery.markdown() in (ROOT / "docs/schedules.md").read_text()
    assert gallery.restructured() in (ROOT / "docs/reference/schedule.rst").read_text()
    assert all((ROOT / f"docs/{name}.png").exists() for name in gallery.pictures())


def test_a_policy_that_enters_the_registry_is_everywhere(tmp_path, capsys):
    before = dict(POLICIES)
    try:

        @policy
        def staircase(step_size_up: int = 2000) -> Schedule:
            """Halve the rate again and again."""
            phase = Phase(
                step_size_up=0, step_size_down=step_size_up, window="boxcar", cycle_gamma=0.5,
                lower=(0.0, 0.0),
            )  # fmt: skip
            return Schedule("staircase", [phase])

        weight = torch.nn.Parameter(torch.ones(1))
        opt = CyclicalOptimizer(torch.optim.SGD([weight], lr=1.0), "staircase", step_size_up=2)
        assert [opt.lr_at(step)[0] for step in range(5)] == [1.0, 1.0, 0.5, 0.5, 0.25]
        out = tmp_path / "mine.png"
        assert cli.main(["plot", "--policy", "staircase", "--out", str(out)]) == 0
        assert out.exists()
        with pytest.raises(SystemExit):
            cli.main(["train", "--help"])
        assert "staircase" in " ".join(capsys.readouterr().out.split())
        assert "staircase" in [path.stem for path in plotting.plot_policies(tmp_path)]
        gallery = load_gallery()
        assert (
            "| `staircase` ![Halve the rate again and again](staircase.png) |" in gallery.markdown()
        )
        assert ":func:`staircase`" in gallery.restructured()
    finally:
        POLICIES.clear()
        POLICIES.update(before)
